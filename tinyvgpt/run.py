"""The state of a training run: weights, optimizer, averaged weights and step, and one update.

Chapters 06 and 09 read this file. Sources: AdamW, Loshchilov & Hutter 2019; loss scaling,
Micikevicius et al. 2018, §3.2.

Shapes: none of its own.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tinyvgpt.checkpoints import Checkpoints
from tinyvgpt.settings import FREE, TrainConfig

KEYS = ("config", "model", "module", "optimizer", "scale", "average")  # of a checkpoint


class Run:
    """Model, optimizer, averaged weights and step: what a checkpoint holds."""

    def __init__(self, module: nn.Module, config: TrainConfig, model: Mapping[str, Any]):
        """Starts at step 0; `model` holds what a checkpoint must share with this run."""
        self.module, self.config, self.model, self.step = module, config, dict(model), 0
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        device = next(module.parameters()).device
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=fused)
        self.average = copy.deepcopy(module).requires_grad_(False) if config.ema else None
        # A scaler also leaves out, on the device, updates whose gradient isn't finite. Gradients of
        # float16 need it; scaled by 1 it does only this for others.
        half = config.dtype(device) == torch.float16
        self.skipping = half or config.non_finite == "skip"
        self.scaler = torch.amp.GradScaler(
            device.type,
            enabled=self.skipping,
            init_scale=2.0**16 if half else 1.0,
            growth_interval=2000 if half else 2**31 - 1,
        )
        self._fixed_scale = None if half else 1.0

    @property
    def best(self) -> nn.Module:
        """The weights to use: averaged ones if there are any."""
        return self.module if self.average is None else self.average

    def buffers(self) -> list[Tensor] | None:
        """Copies of what a forward pass moves without gradients, where `update` may need them."""
        return [b.clone() for b in self.module.buffers()] if self.skipping else None

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, one of `accumulate` parts of the step's."""
        if self.skipping:  # an infinite loss may have a finite gradient
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        self.scaler.scale(loss / self.config.accumulate).backward()

    def update(self, former: list[Tensor] | None = None) -> Tensor:
        """One step down the gradient; returns its norm (before clipping).

        If the norm isn't finite and such steps are skipped, weights and their averages stay, and
        buffers are again what they were (`former`, from `buffers`). Nothing here waits for a GPU.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update(self._fixed_scale)
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(self.module.buffers(), former or [], strict=bool(former)):
            buffer.copy_(torch.where(norm.isfinite(), buffer, value))
        self.step += 1
        self._move_average(norm.isfinite() if self.skipping else torch.ones_like(norm))
        return norm

    @torch.no_grad()
    def _move_average(self, moved: Tensor) -> None:
        """Averages weights over about step/10 steps at first, so that early ones are forgotten.

        Not if `moved`, a scalar, is 0.
        """
        if self.average is None:
            return
        decay = min(self.config.ema, (self.step - 1) / (self.step + 8))
        weights: list[Tensor] = list(self.average.parameters())
        current: list[Tensor] = list(self.module.parameters())
        changes: list[Tensor] = list(torch._foreach_sub(current, weights))
        torch._foreach_mul_(changes, moved * (1 - decay))
        torch._foreach_add_(weights, changes)
        for averaged, buffer in zip(self.average.buffers(), self.module.buffers(), strict=True):
            averaged.copy_(buffer)

    def save(self, checkpoints: Checkpoints) -> None:
        """Writes a checkpoint; OSError if that fails (the former ones survive)."""
        content = {
            "config": asdict(self.config),
            "model": self.model,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scale": None if self._fixed_scale else self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        checkpoints.save(self.step, content)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Continues from the newest checkpoint that is whole, if there is one.

        Raises:
            ValueError: if all are damaged, or of a run with other settings, data or model (names
                what differs).
        """
        found = checkpoints.load(KEYS)
        if found is None:
            return
        path, content = found
        self._check_settings(path, {**content["model"], **content["config"]})
        try:
            self.module.load_state_dict(content["module"])
            self.optimizer.load_state_dict(content["optimizer"])
            self._match_layouts()
            if not self._fixed_scale and content["scale"]:
                self.scaler.load_state_dict(content["scale"])
            if self.average is not None:
                self.average.load_state_dict(content["average"])
            self.step = content["step"]
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} doesn't fit this run: {reason}") from None

    def _check_settings(self, path: Any, saved: Mapping[str, Any]) -> None:
        lacking = [name for name in self.model if name not in saved]
        if lacking:
            raise ValueError(
                f"{path} is of another kind of model, without {', '.join(lacking[:3])}"
            )
        now = {**self.model, **asdict(self.config)}
        changed = [k for k in now if k not in FREE and saved.get(k) != now[k]]
        if changed:
            differences = ", ".join(f"{k} was {saved.get(k)}, is {now[k]}" for k in changed)
            raise ValueError(
                f"{path} is of a run with other settings: {differences}. Go on with its settings, "
                "or train in another folder"
            )

    def _match_layouts(self) -> None:
        """Gives AdamW's moments their parameters' memory layouts, which devices may differ in."""
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter).copy_(value)
