"""Decoding against the original's loop; chapter 15 reads the record.

Shapes: B batch · N = t·h·w tokens · D width · nh heads · d head dim · K codes.
"""

import time
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tinyvgpt.attention import CausalSelfAttention, LayerCache
from tinyvgpt.conditioning import Condition
from tinyvgpt.gpt import GPT, Block, GPTConfig
from tinyvgpt.sampling import Decoder, SamplingRule, draw

RELEASED_BAIR = GPTConfig(
    latent_shape=(4, 32, 32)
)  # 4096 tokens, K 2048, width 576, 4 heads, 8 layers


class ReferenceDecoder:
    """Decodes as the original does: fixed cache read whole, dense mask, look-ups for all tokens.

    Takes and gives what `sampling.Decoder` does, so both can be checked and timed by the same loop.
    """

    def __init__(self, gpt: GPT, batch: int, condition: Condition):
        """Makes room for `batch` clips; the model must be unconditional and in evaluation mode."""
        config = gpt.config
        self.gpt, self.condition, self.position = gpt, condition, 0
        self.tokens = torch.zeros(batch, config.tokens, dtype=torch.int64, device=gpt.codes.device)
        self.mask = torch.ones(config.tokens, config.tokens, device=gpt.codes.device).tril()
        if gpt.layout is not None:
            self.mask = self.mask * gpt.layout.mask.to(self.mask)
        dim = config.width // config.heads
        self.caches = [
            LayerCache(batch, config.heads, config.tokens, dim, like=gpt.codes) for _ in gpt.blocks
        ]
        for cache in self.caches:  # positions not yet decoded are read, though they weigh nothing
            cache.k.zero_()
            cache.v.zero_()

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, K) of the token that follows `tokens` (B, 1), or (B, 0) at the first step."""
        gpt, i = self.gpt, self.position
        if i:
            self.tokens[:, i - 1] = tokens[:, 0]
        vectors = F.embedding(self.tokens, gpt.codes)  # (B, N, code_dim), though one is needed
        x = gpt.token_in(vectors[:, i - 1 : i]) if i else gpt.start.expand(len(tokens), 1, -1)
        x = x + gpt.offsets(self.condition)[:, i : i + 1]
        for module, cache in zip(gpt.blocks, self.caches, strict=True):
            block = cast(Block, module)
            x = x + self._attention(block.attn, block.norm_attn(x), cache)
            x = x + block.mlp(block.norm_mlp(x))
        logits = gpt.token_out(gpt.norm(x))[:, 0]
        F.cross_entropy(logits, self.tokens[:, i])  # the original computes its loss here too
        self.position += 1
        return logits

    def _attention(self, attn: CausalSelfAttention, x: Tensor, cache: LayerCache) -> Tensor:
        i = self.position
        q, k, v = (
            rearrange(F.linear(x, w), "b n (nh d) -> b nh n d", nh=attn.heads)
            for w in attn.qkv.weight.chunk(3)
        )
        cache.k[:, :, i : i + 1] = k
        cache.v[:, :, i : i + 1] = v
        scores = torch.matmul(q, cache.k.transpose(-1, -2)) / q.shape[-1] ** 0.5  # (B, nh, 1, N)
        scores = scores.masked_fill(self.mask[[i]] == 0, float("-inf"))
        y = torch.matmul(F.softmax(scores, dim=-1), cache.v)
        return attn.out(rearrange(y, "b nh n d -> b n (nh d)"))


def time_decoding(decoder: Decoder | ReferenceDecoder, steps: int) -> float:
    """Seconds that the first `steps` tokens take, drawn at random."""
    batch = decoder.caches[0].k.shape[0]
    device = decoder.gpt.codes.device
    u = torch.rand(batch, steps, dtype=torch.float64, device=device)
    rule, tokens = SamplingRule(), torch.zeros(batch, 0, dtype=torch.int64, device=device)
    start = time.perf_counter()
    with torch.no_grad():
        for i in range(steps):
            tokens = draw(rule.probabilities(decoder.step(tokens)), u[:, i])[:, None]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def sampling(
    config: GPTConfig = RELEASED_BAIR,
    *,
    batch: int = 1,
    tokens: int | None = None,
    device: str = "cpu",
) -> dict:
    """Tokens a second of the original's decoding loop and of ours, on random weights.

    Args:
        config: of the GPT; unconditional.
        batch: clips decoded together.
        tokens: how many of each clip's tokens to draw; by default all.
        device: "cpu" or "cuda".

    Returns:
        tokens a second of both, their ratio, and what was run.
    """
    gpt = GPT(config, torch.randn(config.codes, config.code_dim)).eval().to(device)
    torch.nn.init.normal_(gpt.token_out.weight, std=0.02)
    steps = tokens or config.tokens
    rates = {}
    for name, decoder in (("reference", ReferenceDecoder), ("ours", Decoder)):
        with torch.no_grad():
            time_decoding(decoder(gpt, batch, gpt.condition(batch)), min(steps, 16))  # warm up
            made = decoder(gpt, batch, gpt.condition(batch))
        rates[name] = batch * steps / time_decoding(made, steps)
    return {
        "batch": batch,
        "tokens_of_each_clip": steps,
        "reference_tokens_per_second": round(rates["reference"], 1),
        "ours_tokens_per_second": round(rates["ours"], 1),
        "ratio": round(rates["ours"] / rates["reference"], 2),
        "width": config.width,
        "heads": config.heads,
        "layers": config.layers,
        "tokens": config.tokens,
        "codes": config.codes,
        "dtype": "float32",
    }
