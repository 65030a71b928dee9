"""The original VideoGPT's checkpoints: their settings and tensors, under our names.

Source: VideoGPT's released code (names and settings). A checkpoint is untrusted; `unpickle` reads
it.

Shapes: as in `vqvae` and `gpt`; axial projections of the three axes and q, k, v are fused here.
"""

import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from tinyvgpt.conditioning import BLOCKS
from tinyvgpt.gpt import GPT, GPTConfig
from tinyvgpt.store import check_fits
from tinyvgpt.unpickle import Placeholder, UnsafeCheckpoint, read
from tinyvgpt.videogpt import VideoGPT
from tinyvgpt.vqvae import VQVAE, VQVAEConfig

__all__ = ["UnsafeCheckpoint", "gpt_from", "infer_vqvae_args", "load", "read", "vqvae_from"]

State = Mapping[str, Tensor]
Args = Mapping[str, Any]


def load(path: str | Path) -> VQVAE | VideoGPT:
    """Loads a checkpoint file of the original, a VQ-VAE's or a GPT's.

    Raises:
        ValueError: as `read`, `vqvae_from`, `gpt_from`, and if weights or settings are missing.
    """
    checkpoint = read(path)
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path} has no state_dict of tensors")
    settings = _attributes(checkpoint.get("hyper_parameters"))
    args = _attributes(settings.get("args")) or settings
    if not args:
        raise ValueError(f"{path} has no hyper_parameters: its settings are unknown")
    try:
        if any(name.startswith("vqvae.") for name in state):
            return gpt_from(args, infer_vqvae_args(args, state), state)
        return vqvae_from(args, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _attributes(value: Any) -> dict[str, Any]:
    """Settings as a dict, from a dict, a Namespace, or another object's placeholder."""
    value = value.attributes if isinstance(value, Placeholder) else value
    return value if isinstance(value, dict) else {}


# Settings -----------------------------------------------------------------------------------------


def infer_vqvae_args(args: Args, state: State) -> dict[str, Any]:
    """The VQ-VAE's settings (original names) behind a GPT checkpoint, from its tensors' shapes.

    Raises:
        ValueError: if a tensor or setting they follow from is missing or of another kind.
    """
    frames, resolution = _get(args, "sequence_length", int), _get(args, "resolution", int)
    latent = [_shape(state, f"attn_stack.pos_embd.emb.d_{axis}", 2)[0] for axis in range(3)]
    sizes = (frames, resolution, resolution)
    if any(n == 0 or size % n for size, n in zip(sizes, latent, strict=True)):
        raise ValueError(f"clips of (T, H, W) = {sizes} don't divide into a grid of {latent}")
    codes, code_dim = _shape(state, "vqvae.codebook.embeddings", 2)
    block = re.compile(r"vqvae\.encoder\.res_stack\.(\d+)\.block\.")
    return {
        "embedding_dim": code_dim,
        "n_codes": codes,
        "n_hiddens": _shape(state, "vqvae.encoder.conv_last.conv.weight", 5)[0],
        "n_res_layers": len({match[1] for match in map(block.match, state) if match}),
        "downsample": [size // n for size, n in zip(sizes, latent, strict=True)],
        "sequence_length": frames,
        "resolution": resolution,
    }


def _shape(state: State, name: str, axes: int) -> tuple[int, ...]:
    """Shape of a tensor; ValueError if it is missing or has another number of axes."""
    if name not in state:
        raise ValueError(f"the checkpoint has no tensor {name}")
    shape = tuple(state[name].shape)
    if len(shape) != axes:
        raise ValueError(f"the checkpoint's {name} has shape {shape}, must have {axes} axes")
    return shape


def _get(args: Args, name: str, kind: type | UnionType) -> Any:
    """A setting; ValueError if it is missing or of another kind."""
    if name not in args:
        raise ValueError(f"the checkpoint's settings lack {name}")
    value = args[name]
    if not isinstance(value, kind):
        raise ValueError(
            f"the checkpoint's setting {name} is {reprlib.repr(value)}, must be {kind}"
        )
    return value


def vqvae_from(args: Args, state_dict: State) -> VQVAE:
    """A VQVAE, in evaluation mode, of the original's settings and state dict (original names).

    Raises:
        ValueError: if a setting is missing, or tensors are missing, extra or misshapen.
    """
    downsample = tuple(_get(args, "downsample", list | tuple))
    if not all(isinstance(factor, int) for factor in downsample):
        raise ValueError("the checkpoint's setting downsample must be three integers")
    config = VQVAEConfig(
        frames=_get(args, "sequence_length", int),
        resolution=_get(args, "resolution", int),
        downsample=downsample,
        hidden=_get(args, "n_hiddens", int),
        res_blocks=_get(args, "n_res_layers", int),
        codes=_get(args, "n_codes", int),
        code_dim=_get(args, "embedding_dim", int),
    )
    where = "the original's VQ-VAE"
    check_size(lambda: _vqvae_targets(VQVAE(config)), state_dict, config.res_blocks, where)
    vqvae = VQVAE(config)
    _fill(_vqvae_targets(vqvae), state_dict)
    return vqvae.eval()


def gpt_from(args: Args, vqvae_args: Args, state_dict: State) -> VideoGPT:
    """A VideoGPT, in evaluation mode, of the original's settings and GPT state dict.

    Raises:
        ValueError: if a setting is missing, or tensors are missing, extra or misshapen.
    """
    prefix = "vqvae."
    vqvae = vqvae_from(
        vqvae_args,
        {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)},
    )
    attention = _get(args, "attn_type", str)
    config = GPTConfig.for_vqvae(
        vqvae.config,
        width=_get(args, "hidden_dim", int),
        heads=_get(args, "heads", int),
        layers=_get(args, "layers", int),
        dropout=_get(args, "dropout", float | int),
        attn_dropout=_get(args, "attn_dropout", float | int),
        attention={"sparse": "strided"}.get(attention, attention),
        classes=_get(args, "class_cond_dim", int) if args.get("class_cond") else 0,
        cond_frames=_get(args, "n_cond_frames", int),
    )
    # Causal masks, which the original stored too, are left out.
    ours = (name for name in state_dict if not name.startswith(prefix))
    names = [name for name in ours if not name.endswith(".attn.attn.mask")]
    state, where = {name: state_dict[name] for name in names}, "the original's GPT"
    check_size(lambda: _gpt_targets(GPT(config)), state, config.layers, where)
    gpt = GPT(config, vqvae.codebook.codes)
    _fill(_gpt_targets(gpt), state)
    return VideoGPT(vqvae, gpt).eval()


# Names --------------------------------------------------------------------------------------------

RES_STACK = r"(res_stack)\.blocks\.(\d+)"
VQVAE_NAMES = {  # patterns over our names, applied in turn: what the original says instead
    r"^(encoder\.convs\.\d+|encoder\.conv_last)\.": r"\1.conv.",
    r"^decoder\.convs\.(\d+)\.": r"decoder.convts.\1.convt.",
    r"^to_code\.": "pre_vq_conv.conv.",
    r"^from_code\.": "post_vq_conv.conv.",
    RES_STACK + r"\.conv\.(2|5)\.": r"\1.\2.block.\3.conv.",
    RES_STACK + r"\.conv\.": r"\1.\2.block.",
    RES_STACK + r"\.norm\.0\.": r"\1.\2.block.6.",
    RES_STACK + r"\.axial\.": r"\1.\2.block.8.",
    r"codebook\.codes$": "codebook.embeddings",
    r"codebook\.count$": "codebook.N",
    r"codebook\.total$": "codebook.z_avg",
}
GPT_NAMES = {
    r"^token_in\.": "fc_in.",
    r"^token_out\.": "fc_out.",
    r"^start$": "attn_stack.right_shift.sos",
    r"^positions\.tables\.": "attn_stack.pos_embd.emb.d_",
    r"^frame_encoder\.positions\.tables\.": "cond_pos_embd.emb.d_",
    r"^frame_encoder\.stem\.0\.": "resnet.stem.0.",
    r"^frame_encoder\.stem\.1\.": "resnet.stem.1.norm.norm.",
    r"\.norm(1|2)\.": r".bnr\1.norm.norm.",
    r"\.shortcut\.0\.": ".proj_conv.",
    r"\.shortcut\.1\.": ".proj_bnr.norm.norm.",
    r"^blocks\.": "attn_stack.attn_nets.",
    r"\.norm_attn\.": ".pre_attn_norm.",
    r"\.norm_cross\.": ".pre_enc_norm.",
    r"\.norm_mlp\.": ".pre_fc_norm.",
    r"norm\.gain$": "norm.g",
    r"^(norm|attn_stack.*norm)\.bias$": r"\1.b",
    r"norm\.gain\.weight$": "norm.w.weight",
    r"norm\.bias\.weight$": "norm.wb.weight",
    r"\.cross\.(q|k|v)\.": r".enc_attn.w_\1s.",
    r"\.cross\.out\.": ".enc_attn.fc.",
    r"\.attn\.out\.": ".attn.fc.",
    r"\.mlp\.up\.": ".fc_block.0.",
    r"\.mlp\.down\.": ".fc_block.2.",
}


def check_size(targets: Callable[[], State], state: State, blocks: int, where: str) -> None:
    """Raises ValueError unless a model has the tensors that `state` has, before it takes memory.

    `targets` makes the model; here it does so without values.
    """
    if blocks > len(state):
        raise ValueError(f"{where} has {blocks} blocks by its settings, and {len(state)} tensors")
    try:
        with torch.device("meta"):
            expected = targets()
    except (TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where} can't be built of its settings: {reason}") from None
    check_fits(expected, state, where)


def _fill(targets: State, state: State) -> None:
    """Writes the original's tensors into the views of our tensors that have their names."""
    for target in targets.values():
        target.zero_()
    for name, target in targets.items():  # added, as a bias of ours may be the sum of three
        target.add_(state[name].to(target.dtype))


def _vqvae_targets(vqvae: VQVAE) -> dict[str, Tensor]:
    """Every tensor of the original's VQ-VAE, by its name, as a view of one of ours."""
    last = rf"\1.{vqvae.config.res_blocks}."
    targets: dict[str, Tensor] = {}
    for name, tensor in vqvae.state_dict().items():
        name = _renamed(name, {r"(res_stack)\.norm\.": last, **VQVAE_NAMES})
        block, axial, part = name.rpartition(".block.8.")
        axes = [f"{block}{axial}attn_{axis}" for axis in "thw"]  # ours are fused
        if not axial:
            targets[name] = tensor
        elif part == "qkv.weight":
            names = [f"{axis}.w_{qkv}s.weight" for axis in axes for qkv in "qkv"]
            targets |= zip(names, tensor.chunk(9), strict=True)
        elif part == "out.weight":
            names = [f"{axis}.fc.weight" for axis in axes]
            targets |= zip(names, tensor.chunk(3, dim=1), strict=True)
        else:
            targets |= {f"{axis}.fc.bias": tensor for axis in axes}
    return targets


def _gpt_targets(gpt: GPT) -> dict[str, Tensor]:
    """Every tensor of the original's GPT, by its name, as a view of one of ours."""
    targets: dict[str, Tensor] = {}
    for name, tensor in gpt.state_dict().items():
        name = _renamed(name, {**_frame_block_names(), **GPT_NAMES})
        if name.endswith(".qkv.weight"):
            names = [name.replace("qkv", f"w_{qkv}s") for qkv in "qkv"]
            targets |= zip(names, tensor.chunk(3), strict=True)
        elif name.endswith(("norm.w.weight", "norm.wb.weight")):
            targets[name] = (
                tensor.T
            )  # our table of classes is the original's linear map, transposed
        elif name != "codes":  # the original looks them up in its VQ-VAE
            targets[name] = tensor
    return targets


def _frame_block_names() -> dict[str, str]:
    """Names of the frame encoder's blocks: we number them through, the original by group."""
    blocks = [
        f"resnet.group{group}." + (f"blocks.{i - 1}." if i else "start_block.")
        for group, count in enumerate(BLOCKS[34], 1)
        for i in range(count)
    ]
    return {rf"^frame_encoder\.blocks\.{i}\.": name for i, name in enumerate(blocks)}


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name
