"""Decoding on a GPU: steps of the package's kernels, captured in CUDA graphs.

A step at batch 1 is some forty kernels of a few microseconds. Launched from Python it would take a
hundred times what they take; so a step is captured, several in a row, and the graph is replayed.
Where a clip is and what was drawn last stands on the device: a replay reads and writes the same
buffers, nothing is allocated, and nobody waits for the device before a clip's end. Products and
caches are 16-bit, sums, norms and the residual stream float32. Chapter 15 builds this file.

Shapes: B clips · R rows (2B if guided, else B) · N tokens of a clip · K codes · D width ·
nh heads · d head dim · M memory positions.
"""

from collections import deque
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tinyvgpt import kernels
from tinyvgpt.attention import LayerCache, own_kernel
from tinyvgpt.conditioning import Condition, LayerNorm, memory_width
from tinyvgpt.gpt import GPT, Block
from tinyvgpt.kernels.decode import MOST_DIM
from tinyvgpt.kernels.step import ADD, GELU, MOST_CODES, NARROW, WIDE, Norm, draw, product

if TYPE_CHECKING:
    from tinyvgpt.sampling import SamplingRule

DTYPE = torch.bfloat16
STEPS = 4  # in a graph; with more, capturing takes longer than they save at batch 1
capturing = Lock()  # a thread at a time


def can_decode(gpt: GPT) -> bool:
    """Whether a GPT's steps are to be computed by the kernels, where it is."""
    config = gpt.config
    widths = (config.width, int(config.mlp_ratio * config.width))
    values = memory_width(config.cond_width) // config.heads if config.cond_frames else 0
    fits = all(width % 8 == 0 for width in widths) and values <= MOST_DIM
    fits = fits and config.codes <= MOST_CODES
    return fits and own_kernel("decode", gpt.codes, DTYPE, config.width // config.heads)


@dataclass(frozen=True)
class Linear:
    """A linear map as `product` takes it."""

    weight: Tensor  # 16 bits, (out, in)
    bias: Tensor | None = None  # float32


@dataclass(frozen=True)
class Memory:
    """What a layer's cross-attention reads: keys and values (B, nh, M, d), computed once."""

    norm: Norm
    q: Linear
    out: Linear
    k: Tensor
    v: Tensor
    lengths: Tensor  # int32 (R,), M


@dataclass(frozen=True)
class Layer:
    """A block's weights and its cache."""

    norm_attn: Norm
    qkv: Linear
    out: Linear
    norm_mlp: Norm
    up: Linear
    down: Linear
    cache: LayerCache
    memory: Memory | None


class GraphDecoder:
    """A GPT with its caches and what was drawn so far, on a GPU.

    The model must be in evaluation mode. Its weights are copied.
    """

    def __init__(
        self, gpt: GPT, condition: Condition, rule: "SamplingRule", tokens: Tensor, u: Tensor
    ):
        """Prepares to draw into `tokens` (B, N) int64, with random numbers u (B, N) float64.

        The condition is of R rows: of B, or of 2B clips of which the last B are without a label.
        """
        self.gpt, self.condition, self.rule = gpt, condition, rule
        self.tokens, self.u = tokens, u
        given = [
            x for x in (condition.labels, condition.memory, condition.actions) if x is not None
        ]
        rows = len(given[0]) if given else len(tokens)
        config, device = gpt.config, tokens.device
        self.position: int | None = None  # of the next token, once the prefix is decoded
        self.table = gpt.token_in(gpt.codes).float()  # (K, D)
        self.offsets = gpt.offsets(condition).float().contiguous()  # (1 or R, N, D)
        self.layout = None if gpt.layout is None else gpt.layout.packed()
        like = torch.empty(0, dtype=DTYPE, device=device)
        self.layers = [self.layer(cast(Block, block), rows, like) for block in gpt.blocks]
        self.norm, self.token_out = self.norm_of(gpt.norm), linear(gpt.token_out)
        hidden = len(self.layers[0].up.weight)
        self.x = torch.empty(rows, config.width, device=device)
        self.qkv = like.new_empty(rows, 3 * config.width)
        self.hidden = like.new_empty(rows, hidden)
        self.logits = torch.empty(rows, config.codes, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.warm = False
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by how many steps they make

    def norm_of(self, norm: LayerNorm) -> Norm:
        """A layer norm's factors and shifts under the condition."""
        if not norm.classes:
            return Norm(norm.gain.float(), norm.bias.float())
        labels = self.condition.labels
        return Norm((1 + norm.gain(labels)).float(), norm.bias(labels).float())

    def layer(self, block: Block, rows: int, like: Tensor) -> Layer:
        """A block's weights as the kernels take them, and an empty cache."""
        config = self.gpt.config
        dim = config.width // config.heads
        cache = LayerCache(rows, config.heads, config.tokens, dim, like=like)
        memory = None
        if self.condition.memory is not None:
            memory = self.memory(block)
            values = block.cross.v.out_features // config.heads
            cache.memory = memory.k, memory.v[..., :values]  # for the prefix
        return Layer(
            norm_attn=self.norm_of(block.norm_attn),
            qkv=linear(block.attn.qkv),
            out=linear(block.attn.out),
            norm_mlp=self.norm_of(block.norm_mlp),
            up=linear(block.mlp.up),
            down=linear(block.mlp.down),
            cache=cache,
            memory=memory,
        )

    def memory(self, block: Block) -> Memory:
        """Keys and values of the given frames; a value's numbers are padded to a multiple of 8."""
        cross, frames = block.cross, self.condition.memory
        k, v = (part(frames).unflatten(-1, (cross.heads, -1)).transpose(1, 2) for part in
                (cross.k, cross.v))  # fmt: skip
        spare = -v.shape[-1] % 8
        weight = cross.out.weight.unflatten(1, (cross.heads, -1))  # (D, nh, dv)
        out = Linear(F.pad(weight, (0, spare)).flatten(1).to(DTYPE), linear(cross.out).bias)
        k, v = k.to(DTYPE).contiguous(), F.pad(v, (0, spare)).to(DTYPE).contiguous()
        lengths = torch.full((len(k),), k.shape[2], dtype=torch.int32, device=k.device)
        return Memory(self.norm_of(block.norm_cross), linear(cross.q), out, k, v, lengths)

    def steer(self, actions: Tensor) -> None:
        """Changes the actions (R, T, A), for positions that are not decoded yet."""
        embedded = self.gpt.embed_actions(len(actions), actions)
        condition = Condition(self.condition.labels, self.condition.memory, embedded)
        self.offsets.copy_(self.gpt.offsets(condition))
        if self.position is not None:
            self.begin(self.position)

    def begin(self, position: int) -> None:
        """Puts what the step at a position reads in its place."""
        start = self.gpt.start.float().expand(len(self.tokens), -1)
        last = start if position == 0 else self.table[self.tokens[:, position - 1]]  # (B, D)
        twice = last.repeat(len(self.x) // len(last), 1)
        self.x.copy_(twice + self.offsets[:, position])
        self.lengths.fill_(position + 1)

    def prefill(self, position: int) -> None:
        """Decodes the tokens before a position, all in one pass."""
        self.position = position
        if position:
            last = self.table[self.tokens[:, : position - 1]]
            start = self.gpt.start.float().expand(len(last), 1, -1)
            x = torch.cat([start, last], dim=1).repeat(len(self.x) // len(last), 1, 1)
            x = x + self.offsets[:, :position]
            with torch.autocast(x.device.type, DTYPE):
                caches = [layer.cache for layer in self.layers]
                self.gpt.decode(x, self.condition, caches, last_only=True)
        self.begin(position)

    def step(self) -> None:
        """Queues the kernels of one step: the next token of each clip is drawn."""
        for layer in self.layers:
            self.attend(layer)
            if layer.memory is not None:
                self.look_at(layer.memory)
            up, down = layer.up, layer.down
            product(self.x, up.weight, self.hidden, GELU, norm=layer.norm_mlp, bias=up.bias)
            product(self.hidden, down.weight, self.x, ADD, bias=down.bias)
        product(self.x, self.token_out.weight, self.logits, WIDE, norm=self.norm)
        draw(
            self.logits, self.u, self.tokens, self.lengths, self.table, self.offsets, self.x,
            guidance=self.rule.guidance, temperature=self.rule.temperature,
            top_k=self.rule.top_k, top_p=self.rule.top_p,
        )  # fmt: skip

    def attend(self, layer: Layer) -> None:
        """A layer's self-attention, whose cache grows by a token."""
        product(self.x, layer.qkv.weight, self.qkv, NARROW, norm=layer.norm_attn)
        heads = self.gpt.config.heads
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in self.qkv.chunk(3, dim=-1))
        cache = layer.cache
        y = kernels.decode_attention(
            q, cache.k, cache.v, self.lengths, self.layout, new=(k, v), overlap=True
        )
        product(y.flatten(1), layer.out.weight, self.x, ADD, bias=layer.out.bias)

    def look_at(self, memory: Memory) -> None:
        """A layer's attention to the given frames."""
        q = torch.empty(self.x.shape, dtype=DTYPE, device=self.x.device)
        product(self.x, memory.q.weight, q, NARROW, norm=memory.norm)
        q = q.unflatten(-1, (self.gpt.config.heads, -1))
        y = kernels.decode_attention(q, memory.k, memory.v, memory.lengths, overlap=True)
        product(y.flatten(1), memory.out.weight, self.x, ADD, bias=memory.out.bias)

    def draw(self, position: int, count: int, progress: tqdm | None = None) -> None:
        """Draws `count` tokens of each clip from `position` on; returns before they are there.

        With a progress bar it returns once they are.
        """
        if not count:
            return
        if self.position is None:
            self.prefill(position)
        assert self.position == position
        self.position += count
        done: deque[tuple[int, torch.cuda.Event]] = deque()
        with torch.cuda.device(self.tokens.device):  # whose streams, graphs and events are taken
            while count:
                steps = self.take(count)
                count -= steps
                if progress is not None:
                    done.append((steps, torch.cuda.Event()))
                    done[-1][1].record()
        for steps, event in done:
            event.synchronize()
            progress.update(steps)  # type: ignore[union-attr]

    def take(self, most: int) -> int:
        """Queues some steps, at most so many, and says how many."""
        if not self.warm:  # compiles what has to be there before a graph captures it
            self.step()
            self.warm = True
            return 1
        steps = STEPS if most >= STEPS else 1
        if steps not in self.graphs:
            self.graphs[steps] = self.captured(steps)
        self.graphs[steps].replay()
        return steps

    def captured(self, steps: int) -> torch.cuda.CUDAGraph:
        """A graph of some steps."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with capturing, torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for _ in range(steps):
                    self.step()
            finally:
                graph.capture_end()
        return graph


def linear(module: torch.nn.Linear) -> Linear:
    """A linear map's weights as `product` takes them."""
    bias = None if module.bias is None else module.bias.float()
    return Linear(module.weight.to(DTYPE), bias)
