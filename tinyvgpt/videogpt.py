"""Both stages as one model: sample, continue, reconstruct, save, load.

Source: VideoGPT (Yan et al. 2021), fig. 2.

Shapes: B batch · C channels · T H W frames and pixels · t h w latent grid · K codes ·
n given frames · A action dim.
"""

import operator
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from tqdm import tqdm

from tinyvgpt import rollout, video
from tinyvgpt.gpt import GPT, GPTConfig
from tinyvgpt.memory import memory_explained
from tinyvgpt.sampling import SamplingRule
from tinyvgpt.store import (
    build_config,
    built,
    load_weights,
    read_config,
    resolve,
    save_folder,
    weights_of,
)
from tinyvgpt.vqvae import VQVAE
from tinyvgpt.write import batched


class VideoGPT(nn.Module):
    """A VQ-VAE and the GPT over its tokens."""

    def __init__(self, vqvae: VQVAE, gpt: GPT, label_names: Sequence[str] | None = None):
        """Joins two stages; `label_names` are the classes' names, in order.

        Raises:
            ValueError: if the GPT was made for another tokenizer, or names don't match classes.
        """
        super().__init__()
        expected = GPTConfig.for_vqvae(vqvae.config)
        for name in ("latent_shape", "codes", "code_dim", "frames", "resolution", "channels"):
            found, needed = getattr(gpt.config, name), getattr(expected, name)
            if found != needed:
                raise ValueError(f"the GPT is made for {name} {found}, the VQ-VAE has {needed}")
        if not torch.equal(gpt.codes, vqvae.codebook.codes):
            raise ValueError("the GPT was trained on another codebook than this VQ-VAE's")
        if label_names is not None and len(label_names) != gpt.config.classes:
            raise ValueError(
                f"{len(label_names)} label names are given for {gpt.config.classes} classes"
            )
        self.vqvae, self.gpt = vqvae, gpt
        self.label_names = None if label_names is None else tuple(label_names)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.gpt.codes.device

    def logits(
        self,
        tokens: Tensor,
        *,
        frames: Tensor | None = None,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, t, h, w, K) of tokens (B, t, h, w) given earlier ones; see `GPT.forward`."""
        return self.gpt(tokens, labels=labels, frames=frames, actions=actions)

    def sample(
        self,
        n: int | None = None,
        *,
        frames: Tensor | None = None,
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        actions: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        seed: int | None = None,
        length: int | None = None,
        overlap: int | None = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Tensor:
        """Generates clips.

        On a GPU that the package's kernels run on, steps have 16-bit products and caches; under
        `attention.use("torch")` they are PyTorch's, in the weights' dtype.

        Args:
            n: number of clips; by default as many as frames, labels or actions are given for,
                else 1.
            frames: uint8 (B, n, H, W, C), or (n, H, W, C) for all clips: how the clips begin. They
                come back as given. A model with a frame encoder takes its `cond_frames`; a model
                with a `causal_time` tokenizer takes any whole number of latent frames, kept as a
                token prefix.
            labels: index or name of a class, or one for each clip.
            actions: float (B, length, A), or (length, A) for all clips.
            temperature: see `SamplingRule`, as for the next three.
            top_k: keeps the likeliest k tokens.
            top_p: keeps the likeliest tokens that together reach this probability.
            guidance: 1 is off.
            seed: of the random draws; by default a new one every time. The same seed gives the same
                clips on the same kind of machine.
            length: frames of a clip, by default as many as the model was trained on (T). Longer
                clips take a frame encoder or a `causal_time` tokenizer: they are drawn in windows
                of T frames that begin with the last frames of what there is.
            overlap: how many frames that is. A whole number of latent frames, by default half a
                window; with a frame encoder its `cond_frames`.
            batch_size: clips decoded together.
            progress: shows a progress bar on the error stream.

        Returns:
            uint8 (n, length, H, W, C).

        Raises:
            ValueError: for conditions that the model can't use, or of another shape or range; for
                a length or overlap that it can't do; for more clips at a time than memory holds.
        """
        rule = SamplingRule(temperature, top_k, top_p, guidance)
        _check_batch_size(batch_size)
        if callable(actions):
            raise ValueError("actions must be numbers here; model.stream asks a function for them")
        length = self.vqvae.config.frames if length is None else length
        request = self._request(n, frames, labels, actions, rule, seed, length, overlap)
        parts = list(request.parts(batch_size))
        drawn = rollout.tokens_to_draw(self.vqvae.config, request) * len(parts)
        clips = []
        with (
            evaluating(self),
            tqdm(total=drawn, unit="token", disable=not progress) as bar,
            memory_explained(f"with {parts[0].n} clips at a time: lower batch_size"),
        ):
            for part in parts:
                pieces = list(rollout.roll(self.vqvae, self.gpt, part, progress=bar))
                clips.append(torch.cat(pieces, dim=1).cpu())
        return torch.cat(clips)

    def stream(
        self,
        n: int | None = None,
        *,
        frames: Tensor | None = None,
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        actions: Tensor | rollout.ActionSource | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        seed: int | None = None,
        length: int | None = None,
        overlap: int | None = None,
    ) -> Iterator[Tensor]:
        """Generates clips that are handed out as they are drawn, for a `causal_time` tokenizer.

        With the same seed they have the frames that `sample` gives, drawn as one batch.

        Args:
            n: as `sample`, as for what is not listed here.
            frames: as `sample`.
            labels: as `sample`.
            actions: as `sample`, or a function. It is asked before each latent frame, with the
                number of its first frame in the clip, for what leads to its frames: (A,) for all of
                them, (f, A) or (n, f, A). For given frames, too. What would lead to frame 0 is not
                looked at.
            temperature: as `sample`.
            top_k: as `sample`.
            top_p: as `sample`.
            guidance: as `sample`.
            seed: as `sample`.
            length: frames of a clip; by default as many as there are actions, or endless.
            overlap: as `sample`.

        Yields:
            uint8 (n, f, H, W, C): first the given frames, then the frames of each latent frame (f
            of them; fewer where `length` ends) as soon as they are final.

        Raises:
            ValueError: as `sample`; or if the tokenizer isn't `causal_time`.
        """
        config, cond = self.vqvae.config, self.gpt.config.cond_frames
        if not config.causal_time:
            raise ValueError(
                "the model can't be streamed: its tokenizer isn't causal_time, so that frames are "
                "final only when all of the window's tokens are drawn"
            )
        if cond % config.downsample[0]:
            raise ValueError(
                f"the model can't be streamed: its frame encoder takes {cond} frames, which isn't "
                f"a multiple of {config.downsample[0]} (a latent frame)"
            )
        rule = SamplingRule(temperature, top_k, top_p, guidance)
        if length is None and actions is not None and not callable(actions):
            actions = torch.as_tensor(actions)
            length = actions.shape[-2] if actions.ndim > 1 else None
        return self._stream(self._request(n, frames, labels, actions, rule, seed, length, overlap))

    def reconstruct(self, clips: Tensor, batch_size: int = 16) -> Tensor:
        """Encodes clips to tokens and decodes them again; uint8 (B, T, H, W, C) in and out.

        A single clip (T, H, W, C) is a batch of one.

        Raises:
            ValueError: as `VQVAE.forward`, or for a batch_size below 1.
        """
        _check_batch_size(batch_size)
        clips = batched(clips)
        with evaluating(self), torch.no_grad():
            parts = (video.to_model(part).to(self.device) for part in clips.split(batch_size))
            decoded = [self.vqvae.decode(self.vqvae.encode(x)) for x in parts]
        return torch.cat([video.to_uint8(x).cpu() for x in decoded])

    def label_indices(
        self, labels: int | str | Collection[int | str] | Tensor | None
    ) -> Tensor | None:
        """Class indices (B,), int64, of indices or names; "73" finds "37", the same digits.

        Raises:
            ValueError: for a name that no class has, or an index that is out of range.
        """
        if labels is None:
            return None
        if hasattr(labels, "tolist"):
            labels = labels.tolist()
        if not isinstance(labels, Collection) or isinstance(labels, str):
            labels = [labels]
        return torch.tensor([self._label_index(label) for label in labels])

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and both stages' weights; floats as `dtype` if one is given.

        Raises:
            OSError: if writing fails; a model that was in the folder stays whole.
        """
        config: dict = {"vqvae": asdict(self.vqvae.config), "gpt": asdict(self.gpt.config)}
        if self.label_names:
            config["label_names"] = list(self.label_names)
        weights = {"vqvae": weights_of(self.vqvae, dtype), "gpt": weights_of(self.gpt, dtype)}
        save_folder(Path(folder), config, weights)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "VideoGPT":
        """Loads a model, in evaluation mode: a folder, shipped name, or hub id ("user/model").

        Raises:
            ValueError: if there is no such model, or its files are damaged or of another version.
        """
        folder = resolve(name)
        config = read_config(folder)
        if "gpt" not in config:
            raise ValueError(f"{folder} holds a VQ-VAE only: load it with VQVAE.from_pretrained")
        vqvae = VQVAE.from_pretrained(folder)
        where = f"{folder}/config.json"
        settings = build_config(GPTConfig, config["gpt"], where)
        gpt = built(lambda: GPT(settings), where)
        load_weights(folder / "gpt.safetensors", gpt)
        names = config.get("label_names")
        if names is not None and not isinstance(names, list):
            raise ValueError(f"{folder}/config.json is damaged: label_names is {names!r:.40}")
        return cls(vqvae, gpt, names).eval()

    def _label_index(self, label: Any) -> int:
        if isinstance(label, str):
            names = self.label_names or ()
            spellings = [label, "".join(sorted(label))] if _digits_in_order(names) else [label]
            for spelling in spellings:
                if spelling in names:
                    return names.index(spelling)
            some = ", ".join(names if len(names) <= 6 else (*names[:5], "…", names[-1]))
            known = f"one of {some}" if names else "an index: the model has no label names"
            raise ValueError(f"the model has no class named {label!r}; give {known}")
        config = self.gpt.config
        if not config.classes:
            raise ValueError(
                "labels are given, but the model is not class-conditional (classes is 0)"
            )
        highest = config.classes - (config.label_dropout == 0)
        try:
            index = operator.index(label)
        except TypeError:
            raise ValueError(f"label is {label!r}, must be an integer or a name") from None
        if not 0 <= index <= highest:
            raise ValueError(f"label {index} is out of range, the model has 0 to {highest}")
        return index

    @staticmethod
    def _batch(n: int | None, **given: Tensor | None) -> int:
        """Number of clips; ValueError where conditions disagree about it."""
        counts = {name: len(x) for name, x in given.items() if x is not None}
        n = max([*counts.values(), 1]) if n is None else n
        if n < 1:
            raise ValueError(f"n is {n}, must be at least 1")
        for name, count in counts.items():
            if count not in (1, n):
                raise ValueError(
                    f"{name} are given for {count} clips, {n} are asked for; give 1 or {n}"
                )
        return n

    def _request(
        self,
        n: int | None,
        frames: Tensor | None,
        labels: int | str | Sequence[int | str] | Tensor | None,
        actions: Tensor | rollout.ActionSource | None,
        rule: SamplingRule,
        seed: int | None,
        length: int | None,
        overlap: int | None,
    ) -> rollout.Request:
        """What is asked for, checked, with a row of each condition for each clip."""
        vqvae, gpt = self.vqvae.config, self.gpt.config
        frames = _batched("frames", frames, 5, "(B, n, H, W, C) or (n, H, W, C)")
        if not callable(actions):
            actions = _batched("actions", actions, 3, "(B, T, A) or (T, A)")
            actions = None if actions is None else actions.float()
        label = self.label_indices(labels)
        table = None if callable(actions) else actions
        n = self._batch(n, frames=frames, labels=label, actions=table)
        actions = actions if callable(actions) else _rows(actions, n)
        if frames is not None:
            rollout.check_frames(vqvae, gpt, frames)
        given = 0 if frames is None else frames.shape[1]
        length = None if length is None else rollout.check_length(length, given)
        rollout.check_actions(gpt, actions, vqvae.frames if length is None else length)
        longer = length is None or length > vqvae.frames
        common = rollout.check_overlap(vqvae, gpt, overlap) if longer or overlap is not None else 0
        return rollout.Request(
            n,
            rule,
            secrets.randbits(63) if seed is None else seed,
            length,
            common,
            _rows(frames, n),
            _rows(label, n),
            actions,
        )

    def _stream(self, request: rollout.Request) -> Iterator[Tensor]:
        """Frames as they become final; between them the model is as the caller has it."""
        pieces = rollout.roll(self.vqvae, self.gpt, request, each=True)
        while True:
            with evaluating(self), memory_explained(f"with {request.n} clips: lower n"):
                piece = next(pieces, None)
                if piece is None:
                    return
                piece = piece.cpu()
            yield piece


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module in evaluation mode for a block, then back as it was."""
    training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in training.items():
            m.training = mode


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")


def _digits_in_order(names: Sequence[str]) -> bool:
    """Whether names of classes are sets of digits, as Moving MNIST's: "37" is also "73"."""
    return len({len(name) for name in names}) == 1 and all(
        name.isdigit() and len(name) > 1 and list(name) == sorted(name) for name in names
    )


def _batched(name: str, x: Tensor | None, ndim: int, shapes: str) -> Tensor | None:
    """A condition with a batch axis in front; ValueError for another number of axes."""
    if x is None:
        return None
    x = torch.as_tensor(x)
    if x.ndim not in (ndim - 1, ndim):
        raise ValueError(f"{name} have shape {tuple(x.shape)}, must be {shapes}")
    return x if x.ndim == ndim else x[None]


def _rows(x: Tensor | None, n: int) -> Tensor | None:
    """A condition for each of n clips, given for one or for all of them."""
    return x if x is None or len(x) == n else repeat(x, "1 ... -> n ...", n=n)
