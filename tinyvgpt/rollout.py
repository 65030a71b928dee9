"""Clips of any length, window after window.

A GPT knows clips of T frames. A longer clip is drawn in windows of T frames: each begins with the
last frames of what there is, `overlap` of them, and goes on from there. A `causal_time` tokenizer
encodes these frames anew, as the first latent frames of the window; with a `local_encoder` a token
doesn't depend on where in the window it stands, so those that were drawn are kept, and nothing is
lost again and again. A frame encoder looks at the frames. Frames that were once produced stay as
they are. Chapter 15 builds this file.

Shapes: B batch · T frames of a window · f frames of a latent frame · t h w latent grid ·
H W C pixels · A action dim.
"""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tinyvgpt import video
from tinyvgpt.gpt import GPT, GPTConfig
from tinyvgpt.sampling import Sampler, SamplingRule
from tinyvgpt.vqvae import VQVAE, VQVAEConfig
from tinyvgpt.write import batched

# Asked with the number of a latent frame's first frame in the clip; says what leads to its frames:
# (A,) for all of them, (f, A), or (B, f, A).
ActionSource = Callable[[int], Any]


@dataclass(frozen=True)
class Request:
    """The clips that are asked for, checked."""

    n: int  # how many
    rule: SamplingRule
    seed: int  # of the random draws
    length: int | None  # frames of each; None goes on for ever
    overlap: int  # frames of a window that the one before has too; 0 if there is one window only
    frames: Tensor | None = None  # uint8 (n, given, H, W, C), how they begin
    labels: Tensor | None = None  # int64 (n,)
    actions: Tensor | ActionSource | None = None  # float (n, length, A), or asked for
    first_clip: int = 0  # number of the first of them, for random numbers

    @property
    def given(self) -> int:
        """How many first frames are given."""
        return 0 if self.frames is None else self.frames.shape[1]

    def parts(self, size: int) -> Iterator["Request"]:
        """The same for `size` clips at a time."""
        for start in range(0, self.n, size):
            part = slice(start, start + size)
            cut = {
                name: getattr(self, name)[part]
                for name in ("frames", "labels", "actions")
                if isinstance(getattr(self, name), Tensor)
            }
            yield replace(self, n=min(size, self.n - start), first_clip=start, **cut)


@dataclass(frozen=True)
class Window:
    """T frames of a clip, of which the first are known and others are to be drawn."""

    start: int  # its first frame's number in the clip
    known: int  # frames at its beginning that there are already
    first: int  # latent frame from which on tokens are drawn; those before are known
    last: int  # latent frame at which drawing ends


def plan(vqvae: VQVAEConfig, request: Request) -> Iterator[Window]:
    """The windows of a clip, one after another."""
    factor, length = vqvae.downsample[0], request.length
    start, known = 0, request.given
    while length is None or start + known < length:
        if known < vqvae.frames:
            # Without causal time the first latent frames can't be told from the first frames, and
            # the last ones are needed for any frame.
            first = known // factor if vqvae.causal_time and known % factor == 0 else 0
            wanted = vqvae.frames if length is None else min(vqvae.frames, length - start)
            last = -(-wanted // factor) if vqvae.causal_time else vqvae.latent_shape[0]
            yield Window(start, known, first, last)
        start, known = start + vqvae.frames - request.overlap, request.overlap


class Actions:
    """The actions that lead to each frame of a window, as far as they are known; zeros beyond."""

    def __init__(self, config: GPTConfig, request: Request, device: torch.device):
        """Asks for those that lead to the given frames."""
        self.count = config.frames // config.latent_shape[0]  # f
        self.start = 0  # the window's first frame
        self.leading = torch.zeros(request.n, config.frames, config.action_dim, device=device)
        if isinstance(request.actions, Tensor):
            # Before the first frame there is none; room behind, as the last window may reach there.
            room = (0, 0, 1, config.frames)
            table = F.pad(request.actions[:, :-1].to(device), room)
            self.source: ActionSource = lambda frame: table[:, frame : frame + self.count]
        else:
            assert request.actions is not None
            self.source = request.actions
        for latent in range(request.given // self.count):
            self.ask(latent)

    def move(self, start: int) -> None:
        """Goes on to the window that starts at this frame."""
        passed = start - self.start
        self.leading = F.pad(self.leading[:, passed:], (0, 0, 0, passed))
        self.start = start

    def ask(self, latent: int) -> None:
        """Fills in those that lead to a latent frame of the window.

        Raises:
            ValueError: for actions of another shape.
        """
        shape = (len(self.leading), self.count, self.leading.shape[-1])
        answer = self.source(self.start + latent * self.count)
        if answer is None:
            raise ValueError("actions were asked for, and None was returned")
        found = torch.as_tensor(answer)
        fits = [shape[2:], shape[1:], (1, *shape[1:]), shape]
        if tuple(found.shape) not in fits:
            raise ValueError(
                f"actions asked for have shape {tuple(found.shape)}, must be (A,), (f, A) or "
                f"(n, f, A) with (n, f, A) = {shape}"
            )
        part = slice(latent * self.count, (latent + 1) * self.count)
        self.leading[:, part] = found.to(self.leading)

    def following(self) -> Tensor:
        """The same as (B, T, A), action i leading from frame i to i + 1.

        The last one leads out of the window, and is not looked at.
        """
        return self.leading.roll(-1, 1)


@torch.no_grad()
def roll(
    vqvae: VQVAE,
    gpt: GPT,
    request: Request,
    *,
    each: bool = False,
    progress: tqdm | None = None,
) -> Iterator[Tensor]:
    """Draws clips as one batch; both stages must be in evaluation mode.

    Args:
        vqvae: the tokenizer.
        gpt: the GPT over its tokens.
        request: what is asked for.
        each: yields the frames of each latent frame as soon as they are final, for which the
            tokenizer must be `causal_time`; otherwise of each window.
        progress: bar to advance by one a drawn token.

    Yields:
        uint8 (B, ·, H, W, C), on the model's device, from the given frames on.

    Raises:
        ValueError: as `Sampler`, or for actions asked for of another shape.
    """
    config, device = vqvae.config, gpt.codes.device
    size = (config.resolution, config.resolution, config.channels)
    clip = torch.empty(request.n, 0, *size, dtype=torch.uint8, device=device)
    clip = clip if request.frames is None else request.frames.to(device)
    actions = None if request.actions is None else Actions(gpt.config, request, device)
    if request.given:
        yield from clip.split(config.downsample[0] if each else request.given, dim=1)
    drawn = None  # the last window's tokens, (B, N)
    for window in plan(config, request):
        known = clip[:, clip.shape[1] - window.known :]
        if actions is not None:
            actions.move(window.start)
        prefix = known_tokens(vqvae, window, known, drawn)
        sampler = begin(vqvae, gpt, request, window, known, prefix, actions)
        drawn = sampler.tokens
        done = window.known
        for pixels, end in draw(vqvae, sampler, window, actions, each, progress):
            end = end if request.length is None else min(end, request.length - window.start)
            if end > done:
                yield pixels[:, done:end]
                done = end
        clip = torch.cat([known, pixels[:, window.known : done]], dim=1)


def known_tokens(
    vqvae: VQVAE, window: Window, known: Tensor, drawn: Tensor | None
) -> Tensor | None:
    """The tokens (B, n) that a window begins with, if any.

    Of its known frames, uint8 (B, known, H, W, C), or, where a token tells of its own pixels only,
    the last of those `drawn` (B, N) for the window before.
    """
    if not window.first:
        return None
    if vqvae.config.local_encoder and drawn is not None:
        return drawn[:, -window.first * math.prod(vqvae.config.latent_shape[1:]) :]
    return vqvae.encode(video.to_model(known)).flatten(1)


def begin(
    vqvae: VQVAE,
    gpt: GPT,
    request: Request,
    window: Window,
    known: Tensor,
    prefix: Tensor | None,
    actions: Actions | None,
) -> Sampler:
    """A sampler that has read what is known of a window.

    Its frames, uint8 (B, known, H, W, C), for a frame encoder, and the tokens (B, n) of its
    beginning.
    """
    x = video.to_model(known) if gpt.config.cond_frames and window.known else None
    row = math.prod(gpt.config.latent_shape[1:])
    return Sampler(
        gpt,
        request.n,
        seed=request.seed,
        rule=request.rule,
        prefix=prefix,
        first_clip=request.first_clip,
        # Rounded up: what is drawn anew, because it can't be encoded, has the same numbers again.
        first_position=-(-window.start // vqvae.config.downsample[0]) * row,
        labels=None if request.labels is None else request.labels.to(gpt.codes.device),
        frames=x,
        actions=None if actions is None else actions.following(),
    )


def draw(
    vqvae: VQVAE,
    sampler: Sampler,
    window: Window,
    actions: Actions | None,
    each: bool,
    progress: tqdm | None,
) -> Iterator[tuple[Tensor, int]]:
    """Draws a window: yields its pixels, uint8 (B, T, H, W, C), and how many frames are final."""
    shape = sampler.gpt.config.latent_shape
    row = math.prod(shape[1:])  # tokens of a latent frame
    for end in range(window.first + 1, window.last + 1) if each else [window.last]:
        if actions is not None:
            for latent in range(sampler.position // row, end):
                actions.ask(latent)
            sampler.steer(actions.following())
        sampler.draw(end * row - sampler.position, progress)
        # Always whole windows: final frames don't depend on what follows, yet kernels that are
        # chosen by shape would round them in another way.
        tokens = torch.zeros_like(sampler.tokens)
        tokens[:, : sampler.position] = sampler.tokens[:, : sampler.position]
        x = vqvae.decode(tokens.view(-1, *shape))
        yield video.to_uint8(x), end * vqvae.config.downsample[0]


def tokens_to_draw(vqvae: VQVAEConfig, request: Request) -> int:
    """How many tokens of each clip will be drawn."""
    row = math.prod(vqvae.latent_shape[1:])
    return sum((window.last - window.first) * row for window in plan(vqvae, request))


def check_overlap(vqvae: VQVAEConfig, gpt: GPTConfig, overlap: int | None) -> int:
    """Frames that a window has in common with the one before, by default if None.

    Raises:
        ValueError: if the model can't continue clips, or not with this overlap.
    """
    factor, frames = vqvae.downsample[0], vqvae.frames
    if not gpt.cond_frames and not vqvae.causal_time:
        raise ValueError(
            f"the model makes clips of {frames} frames and can't continue them: it has no frame "
            "encoder and its tokenizer isn't causal_time"
        )
    if (gpt.cond_frames or factor) >= frames:
        raise ValueError(
            f"the model can't continue clips: of a window of {frames} frames "
            f"{gpt.cond_frames or factor} must be known, and none is left to draw"
        )
    if gpt.cond_frames:
        if overlap not in (None, gpt.cond_frames):
            raise ValueError(
                f"overlap is {overlap}, the model's frame encoder takes {gpt.cond_frames}"
            )
        return gpt.cond_frames
    if overlap is None:
        return max(frames // factor // 2, 1) * factor
    if not 1 <= _integer("overlap", overlap) < frames or overlap % factor:
        raise ValueError(
            f"overlap is {overlap}, must be a multiple of {factor} frames (a latent frame) "
            f"from {factor} to {frames - factor}"
        )
    return overlap


def check_length(length: int, given: int) -> int:
    """Raises ValueError for a length below 1 or of fewer frames than are given."""
    if _integer("length", length) < 1:
        raise ValueError(f"length is {length}, must be at least 1 frame")
    if length < given:
        raise ValueError(f"length is {length}, but {given} first frames are given")
    return operator.index(length)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, must be a whole number of frames") from None


def check_frames(vqvae: VQVAEConfig, gpt: GPTConfig, frames: Tensor) -> None:
    """Raises ValueError unless the model can begin with frames: uint8 (B, n, H, W, C)."""
    frames = batched(frames)
    count, factor = frames.shape[1], vqvae.downsample[0]
    size = (vqvae.resolution, vqvae.resolution, vqvae.channels)
    if tuple(frames.shape[2:]) != size or count > vqvae.frames:
        raise ValueError(
            f"frames have {' × '.join(map(str, frames.shape[1:]))} (n, H, W, C), the model needs "
            f"at most {' × '.join(map(str, (vqvae.frames, *size)))}"
        )
    if not gpt.cond_frames and not vqvae.causal_time:
        raise ValueError(
            "the model can't continue frames: it has no frame encoder "
            "and its tokenizer isn't causal_time"
        )
    if gpt.cond_frames and count != gpt.cond_frames:
        raise ValueError(
            f"{count} first frames are given, the model's frame encoder takes {gpt.cond_frames}"
        )
    if not gpt.cond_frames and count % factor:
        raise ValueError(
            f"{count} first frames are given, the tokenizer needs a multiple of {factor}"
        )


def check_actions(gpt: GPTConfig, actions: Tensor | ActionSource | None, length: int) -> None:
    """Raises ValueError unless actions are what the model needs for clips of `length` frames.

    A function's answers are looked at when it is asked.
    """
    if actions is None:
        if gpt.action_dim:
            raise ValueError(
                "the model is action-conditional: give actions "
                f"(B, T, A) with (T, A) = {(length, gpt.action_dim)}"
            )
        return
    if not gpt.action_dim:
        raise ValueError(
            "actions are given, but the model is not action-conditional (action_dim is 0)"
        )
    if isinstance(actions, Tensor) and tuple(actions.shape[1:]) != (length, gpt.action_dim):
        raise ValueError(
            f"actions have shape {tuple(actions.shape)}, {length} frames need (B, T, A) with "
            f"(T, A) = {(length, gpt.action_dim)}"
        )
    if isinstance(actions, Tensor) and not actions.isfinite().all():
        raise ValueError("actions have numbers that aren't finite")
