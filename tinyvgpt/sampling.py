"""Drawing tokens one at a time: cached decoding steps, and rules for choosing from logits.

Chapter 10 builds this file. A step costs one token's work: keys and values of earlier tokens are
kept, projected code vectors and positions are looked up in tables, cross-attention's keys are
computed once.

Shapes: B batch · t h w latent grid · N = t·h·w tokens in raster order · K codes · D width ·
n prefix tokens.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from tinyvgpt import counter
from tinyvgpt.attention import LayerCache
from tinyvgpt.conditioning import Condition
from tinyvgpt.gpt import GPT
from tinyvgpt.graph_decoder import GraphDecoder, can_decode
from tinyvgpt.vqvae import check_tokens


@dataclass(frozen=True)
class SamplingRule:
    """How a token is chosen from logits; by default from the model's distribution as it is."""

    temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest token
    top_k: int | None = None  # keep the k likeliest tokens only
    top_p: float | None = None  # keep the likeliest tokens that together reach this probability
    guidance: float = 1.0  # weight w of logits(null) + w·(logits(label) - logits(null)); 1 is off

    def __post_init__(self) -> None:
        """Raises ValueError for a rule that makes no sense."""
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature is {self.temperature}, must be 0 (the likeliest token) or above"
            )
        if np.float32(self.temperature) == 0:  # below what float32 has, and logits are divided by
            object.__setattr__(self, "temperature", 0.0)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if not abs(self.guidance) <= 1e6:
            raise ValueError(f"guidance is {self.guidance}, must be a number up to 1e6; 1 is off")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Float32 probabilities (B, K) with which tokens are drawn, of logits (B, K).

        Top-k comes first, then top-p (Holtzman et al. 2020, §3.1) among what is left. Ties at the
        edge are kept together, so the result does not depend on the order of equal logits.
        """
        logits = logits.float()
        if self.temperature == 0:
            likeliest = logits == logits.amax(-1, keepdim=True)
            return (likeliest & (likeliest.cumsum(-1) == 1)).float()
        # With the largest at 0, however low the temperature, nothing overflows.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        p = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered = p.double().sort(-1, descending=True)[0]
            reached = ordered.cumsum(-1) - ordered >= self.top_p  # without this token p is reached
            least = ordered.masked_fill(reached, torch.inf).amin(-1, keepdim=True)
            p = p.masked_fill(p < least, 0)
        return p / p.sum(-1, keepdim=True)


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Tokens (B,) at which the cumulative sum of probabilities p (B, K) passes u (B,) in [0, 1)."""
    cumulative = p.double().cumsum(-1)
    u = u[:, None] * cumulative[:, -1:]  # rounding may leave the sum beside 1
    return torch.searchsorted(cumulative, u, right=True)[:, 0].clamp_max(p.shape[-1] - 1)


class SplitLinear(nn.Module):
    """A linear map for few rows on a CPU: its weight lies transposed, cut in one part a thread.

    A matrix-vector product is bound by reading the matrix, and PyTorch's reads it with one thread.
    A batched product reads the parts at the same time.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear):
        """Packs a copy of `linear`'s weight."""
        super().__init__()
        parts = torch.get_num_threads()
        parts = parts if linear.out_features % parts == 0 else 1
        weight = rearrange(linear.weight.detach(), "(part o) i -> part i o", part=parts)
        self.register_buffer("weight", weight.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        rows = x.reshape(1, -1, x.shape[-1]).expand(len(self.weight), -1, -1)
        y = rearrange(torch.bmm(rows, self.weight), "part row o -> row (part o)")
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def pack(gpt: GPT) -> GPT:
    """A copy of a GPT with its linear maps packed for decoding on a CPU; all else is shared."""
    memo: dict[int, object] = {id(t): t for t in (*gpt.parameters(), *gpt.buffers())}
    memo |= {id(m): SplitLinear(m) for m in gpt.modules() if isinstance(m, nn.Linear)}
    return copy.deepcopy(gpt, memo)


class Decoder:
    """A GPT with its caches, decoding a batch of clips step by step.

    The model must be in evaluation mode.
    """

    def __init__(self, gpt: GPT, batch: int, condition: Condition):
        """Makes room for `batch` clips under `condition`, as computed by `gpt.condition`."""
        config = gpt.config
        gpt = pack(gpt) if gpt.codes.device.type == "cpu" else gpt
        self.gpt, self.condition = gpt, condition
        self.table = gpt.token_in(gpt.codes)  # (K, D)
        self.offsets = gpt.offsets(condition)  # (1 or B, N, D)
        self.position = 0  # how many tokens of the sequence have been decoded
        self.caches = [
            LayerCache(
                batch, config.heads, config.tokens, config.width // config.heads, like=self.table
            )
            for _ in gpt.blocks
        ]

    def steer(self, actions: Tensor) -> None:
        """Changes the actions (B, T, A), for positions that are not decoded yet."""
        embedded = self.gpt.embed_actions(len(actions), actions)
        self.condition = replace(self.condition, actions=embedded)
        self.offsets = self.gpt.offsets(self.condition)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, K) of the token that follows `tokens` (B, n), as yet unseen ones.

        The first call takes the prefix, with n = 0 for none; later ones take the last token, n = 1.
        """
        x = self.table[tokens]  # (B, n, D)
        if self.position == 0:
            x = torch.cat([self.gpt.start.expand(len(x), 1, -1).type_as(x), x], dim=1)
        end = self.position + x.shape[1]
        x = x + self.offsets[:, self.position : end]
        self.position = end
        return self.gpt.decode(x, self.condition, self.caches, last_only=True)[:, 0]


class Sampler:
    """Draws the tokens of a batch of clips, some at a time.

    The random number behind a token depends on (seed, clip, position) only.

    Attributes:
        tokens: (B, N) int64, valid up to `position`.
        position: how many tokens of each clip there are.
    """

    def __init__(
        self,
        gpt: GPT,
        batch: int,
        *,
        seed: int,
        rule: SamplingRule = SamplingRule(),
        prefix: Tensor | None = None,
        first_clip: int = 0,
        first_position: int = 0,
        labels: Tensor | None = None,
        frames: Tensor | None = None,
        actions: Tensor | None = None,
    ):
        """Prepares to draw; arguments as `sample_tokens`.

        `first_position` is the place of the clips' first token in longer ones, for random numbers.
        """
        config, device = gpt.config, gpt.codes.device
        self.gpt, self.batch, self.rule = gpt, batch, rule
        self.tokens = torch.empty(batch, config.tokens, dtype=torch.int64, device=device)
        self.position = 0 if prefix is None else prefix.shape[1]
        if self.position > config.tokens:
            raise ValueError(f"prefix has {self.position} tokens, a clip has {config.tokens}")
        if prefix is not None:
            if len(prefix) != batch:
                raise ValueError(f"prefixes of {len(prefix)} clips are given for {batch} clips")
            check_tokens(prefix[:, :, None, None], config.codes)
            self.tokens[:, : self.position] = prefix
        if rule.top_k is not None and rule.top_k > config.codes:
            raise ValueError(f"top_k is {rule.top_k}, the model has {config.codes} codes")
        self.guided = rule.guidance != 1 and self.position < config.tokens
        if self.guided:  # clips 0 … B - 1 with their labels, B … 2B - 1 with the null label
            if labels is None or not config.label_dropout:
                raise ValueError(
                    "guidance needs labels and a model with a null label (label_dropout above 0)"
                )
            labels = torch.cat([labels, torch.full_like(labels, config.classes)])
        frames, actions = self._rows(frames), self._rows(actions)
        clips = np.arange(first_clip, first_clip + batch)[:, None]
        positions = np.arange(first_position, first_position + config.tokens)
        self.u = torch.from_numpy(counter.uniform(seed, clips, positions)).to(device)  # (B, N)
        rows = 2 * batch if self.guided else batch
        with torch.no_grad():
            condition = gpt.condition(rows, labels=labels, frames=frames, actions=actions)
            self.decoder: Decoder | GraphDecoder
            if can_decode(gpt):
                self.decoder = GraphDecoder(gpt, condition, rule, self.tokens, self.u)
            else:
                self.decoder = Decoder(gpt, rows, condition)

    def _rows(self, x: Tensor | None) -> Tensor | None:
        """What the clips are conditioned on, twice if they are decoded twice."""
        return x if x is None or not self.guided else torch.cat([x, x])

    @torch.no_grad()
    def steer(self, actions: Tensor) -> None:
        """Changes the actions (B, T, A), for tokens that are not drawn yet."""
        rows = self._rows(actions)
        assert rows is not None
        self.decoder.steer(rows)

    @torch.no_grad()
    def draw(self, count: int, progress: tqdm | None = None) -> Tensor:
        """The next `count` tokens of each clip (B, count); advances a bar by one each."""
        if isinstance(self.decoder, GraphDecoder):
            self.decoder.draw(self.position, count, progress)
        else:
            for i in range(self.position, self.position + count):
                self._draw_one(self.decoder, i)
                if progress is not None:
                    progress.update()
        self.position += count
        return self.tokens[:, self.position - count : self.position]

    def _draw_one(self, decoder: Decoder, i: int) -> None:
        """Draws the token at position i of each clip."""
        unseen = self.tokens[:, max(decoder.position - 1, 0) : i]
        logits = decoder.step(torch.cat([unseen, unseen]) if self.guided else unseen)
        if self.guided:
            with_label, without = logits.chunk(2)
            logits = without + self.rule.guidance * (with_label - without)
        self.tokens[:, i] = draw(self.rule.probabilities(logits), self.u[:, i])


@torch.no_grad()
def sample_tokens(
    gpt: GPT,
    batch: int,
    *,
    seed: int,
    rule: SamplingRule = SamplingRule(),
    prefix: Tensor | None = None,
    first_clip: int = 0,
    progress: tqdm | None = None,
    labels: Tensor | None = None,
    frames: Tensor | None = None,
    actions: Tensor | None = None,
) -> Tensor:
    """Draws the tokens of `batch` clips.

    The random number behind a token depends on (seed, clip, position) only.

    Args:
        gpt: in evaluation mode.
        batch: B, how many clips.
        seed: any integer.
        rule: how tokens are chosen.
        prefix: (B, n) int64, the first n tokens in raster order, kept as they are.
        first_clip: number of the batch's first clip, where a larger batch is cut in parts.
        progress: bar to advance by one a drawn token.
        labels: as `GPT.forward`.
        frames: as `GPT.forward`.
        actions: as `GPT.forward`.

    Returns:
        (B, t, h, w) int64.

    Raises:
        ValueError: if the prefix is too long, guidance is asked of a model without a null label, or
            as `GPT.condition`; if it has tokens out of range, or is not of `batch` clips.
    """
    sampler = Sampler(
        gpt,
        batch,
        seed=seed,
        rule=rule,
        prefix=prefix,
        first_clip=first_clip,
        labels=labels,
        frames=frames,
        actions=actions,
    )
    sampler.draw(gpt.config.tokens - sampler.position, progress)
    return sampler.tokens.view(batch, *gpt.config.latent_shape)
