"""Where a training step spends its time on a GPU; chapter 16 shows it.

Shapes: B clips · C channels · T H W frames, rows, columns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from tinyvgpt import VQVAE, video
from tinyvgpt.convolution import FEW

WARM_UP, PROFILED = 2, 3  # steps
# Kinds of work by the operator, or the compiled kernel, that launches it; the first that fits.
KINDS = {
    "convolutions": ("aten::cudnn_convolution", "aten::convolution"),
    "attention": ("aten::bmm", "aten::_scaled_dot_product", "aten::_flash", "aten::_cudnn_att"),
    "projections and convolutions of few channels": ("aten::mm", "aten::addmm"),
    "batch norms and what is fused with them": ("batch_norm",),
    "other compiled elementwise kernels": ("triton_",),
    "optimizer": ("aten::_fused_adamw", "aten::_foreach"),
}
# The package's own kernels, by their names; what launches them isn't among the above.
OWN = {"attention": ("axial_forward", "axial_backward", "flash_forward", "flash_backward")}


def kinds_of_kernels(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a step that the GPU spends on each kind of kernel."""
    events = profiled(step)
    sums = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if kind := kind_of(event):
            sums[kind] += event.self_device_time_total / 1e3 / PROFILED
    sums["codebook, loss and the rest"] = total(events) - sum(sums.values())
    return {kind: round(spent, 2) for kind, spent in sums.items() if spent}


def kind_of(event: FunctionEventAvg) -> str | None:
    """What an event's time belongs to; None if nothing fits, or if another event has it, too."""
    kinds = KINDS if event.device_type == DeviceType.CPU else OWN  # what launches kernels, or they
    return next((k for k, names in kinds.items() if any(n in str(event.key) for n in names)), None)


def profiled(call: Callable[[], object]) -> list[FunctionEventAvg]:
    """What the profiler has on `PROFILED` calls, once they are warm."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    return list(profiler.key_averages())


def total(events: list[FunctionEventAvg]) -> float:
    """Milliseconds a call that kernels run.

    Of the kernels' own events, as PyTorch's table sums them: added up over what launches them, the
    first kernel was once counted twice.
    """
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sum(event.self_device_time_total for event in kernels) / 1e3 / PROFILED


def convolutions(vqvae: VQVAE | nn.Module, clips: Tensor) -> list[dict[str, Any]]:
    """Milliseconds of each kind of convolution, alone, in bfloat16: forward and both gradients.

    Args:
        vqvae: on the GPU.
        clips: uint8 (B, T, H, W, C), on the GPU.

    Returns:
        For each shape its layers' count, milliseconds, and TFLOP/s of the forward pass.
    """
    inputs: dict[str, Any] = {}
    hooks = []
    for name, module in vqvae.named_modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            hooks.append(module.register_forward_hook(keep_input(name, inputs)))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        vqvae(video.to_model(clips))
    for hook in hooks:
        hook.remove()
    seen: dict[tuple, dict[str, Any]] = {}
    for name, (module, shape, out_shape) in inputs.items():
        key = (type(module).__name__, tuple(module.weight.shape), module.stride, shape)
        if key in seen:
            seen[key]["layers"] += 1
            continue
        flops = 2 * module.weight[0].numel() * torch.Size(out_shape).numel()
        if isinstance(module, nn.ConvTranspose3d):
            flops = 2 * module.weight[0].numel() * torch.Size(shape).numel()
        seen[key] = {"first": name, "layers": 1, **time_convolution(module, shape, flops)}
    return list(seen.values())


def keep_input(name: str, inputs: dict[str, Any]) -> Callable:
    """A hook that notes a layer's shapes."""

    def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        inputs[name] = module, tuple(args[0].shape), tuple(out.shape)

    return hook


def milliseconds(call: Callable[[], object]) -> float:
    """Time that a call's kernels run."""
    return round(total(profiled(call)), 3)


def time_convolution(module: nn.Module, shape: tuple[int, ...], flops: float) -> dict[str, Any]:
    """Milliseconds of one layer's forward pass and of its gradients."""
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last_3d).requires_grad_(shape[1] > FEW)
    weight = module.weight
    assert isinstance(weight, Tensor)

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return module(x)

    y = forward()
    g = torch.randn_like(y)
    took = milliseconds(forward)
    found: dict[str, Any] = {"shape": list(shape), "forward": took}
    for name, wanted in (("input gradient", x), ("weight gradient", weight)):
        if wanted.requires_grad:
            backward = partial(torch.autograd.grad, y, wanted, g, retain_graph=True)
            found[name] = milliseconds(backward)
    return {**found, "forward TFLOP/s": round(flops / took / 1e9)}
