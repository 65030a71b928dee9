"""Sampling on a GPU: the original's loop, the usual way in PyTorch, and ours; chapter 15.

One run on one machine, at the size of the original's released BAIR models, on random weights:

- "reference" is the original's way: float32, launched from Python, a fixed cache that is read whole
  under a dense mask;
- "usual" is what an afternoon's work makes of it: bfloat16, the step compiled, a fixed cache under
  a mask of what is filled, the whole captured in a CUDA graph;
- "ours" is `sampling.Sampler` as `VideoGPT.sample` uses it.

Between them, "one thing at a time" changes a single thing from one line to the next.

What reads the whole cache takes equally long wherever it is in a clip, so some hundred steps stand
for it; they are those in the middle, where an average step reads. Ours are whole clips, with the
tokenizer's decoder.

Shapes: B batch · N tokens of a clip · D width · nh heads · d head dim · K codes.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig
from tinyvgpt.bench.kernels import rate_of_copies
from tinyvgpt.bench.sampling import ReferenceDecoder, time_decoding
from tinyvgpt.bench.train import RELEASED, compiling_anew, in_fresh_process
from tinyvgpt.gpt import Block
from tinyvgpt.kernels import decode_attention, step
from tinyvgpt.sampling import Sampler

STEPS = 256  # of all that isn't ours
USUAL = "small operations merged"  # the way of an afternoon


class UsualDecoder(nn.Module):
    """A decoding step over a fixed cache, to be compiled; the model is unconditional.

    With `filled` attention is `kernels.decode_attention`, which reads what is filled and no more.
    """

    places: Tensor
    table: Tensor
    offsets: Tensor

    def __init__(self, gpt: GPT, batch: int, *, filled: bool = False):
        """Takes a GPT in bfloat16, and makes room for `batch` clips."""
        super().__init__()
        config, self.gpt, self.filled = gpt.config, gpt, filled
        shape = (batch, config.heads, config.tokens, config.width // config.heads)
        for i in range(2 * config.layers):  # apart: of one buffer, compiled, each step makes copies
            self.register_buffer(f"cache_{i}", gpt.codes.new_zeros(shape))
        self.register_buffer("places", torch.arange(config.tokens, device=gpt.codes.device))
        self.register_buffer("table", gpt.token_in(gpt.codes))
        self.register_buffer("offsets", gpt.offsets(gpt.condition(batch))[0])

    def forward(self, tokens: Tensor, position: Tensor, u: Tensor) -> Tensor:
        """The tokens (B,) that follow `tokens` at `position` (1,), drawn with u (B,)."""
        x = self.table[tokens][:, None] + self.offsets[position]
        heads = self.gpt.config.heads
        if self.filled:
            attend = partial(decode_attention, lengths=(position + 1).int().repeat(len(tokens)))
        else:
            seen = (self.places <= position)[None, None, None]  # (1, 1, 1, N)
            attend = partial(F.scaled_dot_product_attention, attn_mask=seen)
        for i, module in enumerate(self.gpt.blocks):
            block = cast(Block, module)
            qkv = block.attn.qkv(block.norm_attn(x)).unflatten(-1, (3, heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, 1, d)
            keys, values = (self.get_buffer(f"cache_{2 * i + j}") for j in range(2))
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            y = attend(q, keys, values)
            x = x + block.attn.out(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm_mlp(x))
        p = self.gpt.token_out(self.gpt.norm(x))[:, 0].float().softmax(-1)
        return torch.searchsorted(p.cumsum(-1), u[:, None])[:, 0].clamp_max(p.shape[-1] - 1)


def sampling_on_gpu(
    vqvae: VQVAEConfig = RELEASED,
    gpt: GPTConfig | None = None,
    *,
    batches: tuple[int, ...] = (1, 16, 64),
) -> dict[str, Any]:
    """Tokens a second each way.

    Args:
        vqvae: the tokenizer, whose decoder's time is counted with ours.
        gpt: the GPT; by default the released one, with its 4 heads and with 9.
        batches: clips decoded together.
    """
    released = gpt or GPTConfig.for_vqvae(vqvae, width=576, layers=8)
    heads = (4, 9) if gpt is None else (gpt.heads,)
    found: dict[str, Any] = {"copy, TB/s": round(in_fresh_process(copies), 3)}
    for count in heads:
        config = replace(released, heads=count)
        for batch in batches:
            job = partial(each_way, config, vqvae, batch, steps=count == heads[0])
            row = in_fresh_process(job)
            floor = bytes_of_a_clip(config, batch) / found["copy, TB/s"] / 1e12
            row["of the byte floor"] = round(floor / row["ours, seconds of tokens"], 3)
            found[f"{count} heads, batch {batch}"] = row
    return found


def copies() -> float:
    """TB/s of a copy of a gigabyte."""
    with torch.cuda.stream(torch.cuda.Stream()):
        return rate_of_copies(20)


def bytes_of_a_clip(config: GPTConfig, batch: int) -> int:
    """What has to be read: all weights for each token, and keys and values of the tokens before."""
    width, hidden = config.width, int(config.mlp_ratio * config.width)
    weights = config.layers * (4 * width**2 + 2 * width * hidden) + width * config.codes
    seen = config.tokens * (config.tokens + 1) // 2
    return 2 * (config.tokens * weights + batch * seen * 2 * config.layers * width)


def each_way(config: GPTConfig, vqvae: VQVAEConfig, batch: int, *, steps: bool) -> dict[str, Any]:
    """Tokens a second of a GPT at a batch size; by choice also on the way from one to the other."""
    torch.manual_seed(0)
    tokenizer = VQVAE(vqvae)
    model = VideoGPT(tokenizer, GPT(config, tokenizer.codebook.codes)).cuda().eval()
    nn.init.normal_(model.gpt.token_out.weight, std=0.02)
    with torch.no_grad():
        found = ours(model, batch)
        if batch == 1:
            found["ours, seconds to a stream's first frames"] = first_frames(config, vqvae)
        rates = {"reference": reference(model.gpt, batch)}
        own = found["ours, tokens per second"]
        if steps:
            climbed = {"the original's loop": rates["reference"], **one_at_a_time(model.gpt, batch)}
            climbed["each kernel begins before the former ends"] = own
            rates["usual"] = climbed[USUAL]
            found["one thing at a time, tokens per second"] = {
                name: round(rate, 1) for name, rate in climbed.items()
            }
    for name, rate in rates.items():
        found[f"{name}, tokens per second"] = round(rate, 1)
        found[f"ours against {name}"] = round(own / rate, 2)
    return found


def seconds(job: Callable[[], object]) -> float:
    """What a job takes, until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ours(model: VideoGPT, batch: int) -> dict[str, Any]:
    """Whole clips, once everything is compiled."""
    tokens = model.gpt.config.tokens
    drawn = torch.zeros(batch, *model.gpt.config.latent_shape, dtype=torch.int64, device="cuda")
    Sampler(model.gpt, batch, seed=0).draw(40)
    model.vqvae.decode(drawn)
    torch.cuda.reset_peak_memory_stats()
    drawing = seconds(lambda: Sampler(model.gpt, batch, seed=0).draw(tokens))
    peak = torch.cuda.max_memory_allocated()
    decoding = seconds(lambda: model.vqvae.decode(drawn))
    return {
        "ours, tokens per second": round(batch * tokens / drawing, 1),
        "ours, seconds of tokens": round(drawing, 4),
        "ours, seconds of the decoder": round(decoding, 4),
        "ours, clips per second": round(batch / (drawing + decoding), 3),
        "ours, peak GiB": round(peak / 2**30, 2),
    }


def first_frames(config: GPTConfig, vqvae: VQVAEConfig) -> float:
    """Seconds from asking for a stream to its first frames, with a tokenizer that can stream."""
    tokenizer = VQVAE(replace(vqvae, causal_time=True))
    model = VideoGPT(tokenizer, GPT(config, tokenizer.codebook.codes)).cuda().eval()

    def first() -> Tensor:
        return next(iter(model.stream(1, seed=0)))

    first()
    return round(sorted(seconds(first) for _ in range(5))[2], 4)


def reference(gpt: GPT, batch: int) -> float:
    """The original's way."""
    time_decoding(ReferenceDecoder(gpt, batch, gpt.condition(batch)), 16)
    return batch * STEPS / time_decoding(ReferenceDecoder(gpt, batch, gpt.condition(batch)), STEPS)


def one_at_a_time(gpt: GPT, batch: int) -> dict[str, float]:
    """Tokens a second, a change after the other, between the reference and ours.

    With our kernels for the rest, attention begins before the former kernel ends; products and
    draws don't. The GPT is in bfloat16 afterwards.
    """
    overlapping, step.OVERLAP = step.OVERLAP, False
    Sampler(gpt, batch, seed=0).draw(40)
    apart = seconds(lambda: Sampler(gpt, batch, seed=0).draw(gpt.config.tokens))
    step.OVERLAP = overlapping
    gpt.bfloat16()
    rates = {
        "bfloat16": in_pytorch(gpt, batch),
        "a graph instead of Python": in_pytorch(gpt, batch, graph=True),
        USUAL: in_pytorch(gpt, batch, graph=True, merged=True),
        "only what is filled is read": in_pytorch(gpt, batch, graph=True, merged=True, filled=True),
    }
    return rates | {"kernels of our own for the rest": batch * gpt.config.tokens / apart}


def in_pytorch(
    gpt: GPT, batch: int, *, graph: bool = False, merged: bool = False, filled: bool = False
) -> float:
    """Tokens a second of a step in the middle of a clip, of a GPT in bfloat16.

    Args:
        gpt: the model.
        batch: clips.
        graph: the step is repeated by a CUDA graph, not launched by Python.
        merged: `torch.compile` merges its small operations.
        filled: attention reads the filled part of the cache only.
    """
    decoder = UsualDecoder(gpt, batch, filled=filled)
    tokens = torch.zeros(batch, dtype=torch.int64, device="cuda")
    position = torch.full((1,), (gpt.config.tokens - STEPS) // 2, device="cuda")
    u = torch.rand(batch, device="cuda")
    with compiling_anew():
        run = torch.compile(decoder) if merged else decoder

        def advance() -> None:
            tokens.copy_(run(tokens, position, u))
            position.add_(1)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                advance()
        torch.cuda.current_stream().wait_stream(stream)
        repeat = captured(advance) if graph else advance

    def steps() -> None:
        for _ in range(STEPS):
            repeat()

    return batch * STEPS / seconds(steps)


def captured(job: Callable[[], None]) -> Callable[[], None]:
    """What a job launches, as one graph, to be replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay
