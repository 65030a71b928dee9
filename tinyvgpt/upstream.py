"""The original VideoGPT's checkpoints: reads them safely and renames their tensors.

Source: VideoGPT's released code (names and settings) and PyTorch's zip file format. A checkpoint is
untrusted: its pickle is read by an unpickler that imports nothing and calls nothing it names.

Shapes: as in `vqvae` and `gpt`; axial projections of the three axes and q, k, v are fused here.
"""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyvgpt.gpt import GPT, GPTConfig
from tinyvgpt.store import fill
from tinyvgpt.videogpt import VideoGPT
from tinyvgpt.vqvae import VQVAE, VQVAEConfig

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class UnsafeCheckpoint(ValueError):
    """A checkpoint asks for something that reading weights does not need."""


# Reading ------------------------------------------------------------------------------------------


class _PlaceholderType(type):
    """Class of the classes that stand for unknown names."""

    def __call__(cls, *args, **kwargs):
        # A class is called to make an object; anything else would be a function asked to run.
        if not cls.__name__.rpartition(".")[2].lstrip("_")[:1].isupper():
            raise UnsafeCheckpoint(
                f"the checkpoint asks to call {cls.__name__}, which reading weights never needs"
            )
        return cls.__new__(cls)  # type: ignore[call-overload]


class _Placeholder(metaclass=_PlaceholderType):
    """Stands for an object of an unknown class: keeps plain attributes, does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """A tensor over a storage; refuses a view that would reach beyond it."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (all(size) and last >= len(storage)):
        raise UnsafeCheckpoint(
            f"the checkpoint has a tensor of shape {size} that reaches beyond its data"
        )
    return torch.as_strided(storage, size, stride, offset).clone()


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


SAFE = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Unpickler(pickle.Unpickler):
    """Builds containers, tensors and placeholders; nothing else."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Never imports: a known safe stand-in, a storage's dtype, or a placeholder class."""
        if (module, name) in SAFE:
            return SAFE[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return _PlaceholderType(f"{module}.{name}", (_Placeholder,), {})

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage (flat tensor) that a persistent id names."""
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(length)):
                pass
            case _:
                raise UnsafeCheckpoint(f"the checkpoint asks for the external object {pid!r:.100}")
        if key not in self.storages:
            data = self.archive.read(f"{self.root}/data/{key}")
            if len(data) != length * dtype.itemsize:
                raise ValueError(
                    f"the checkpoint's storage {key} has {len(data)} bytes, not {length} × {dtype}"
                )
            flat = (
                torch.frombuffer(bytearray(data), dtype=dtype)
                if data
                else torch.empty(0, dtype=dtype)
            )
            self.storages[key] = flat
        return self.storages[key]


def read(path: str | Path) -> dict:
    """Reads a PyTorch checkpoint file without running anything that it names.

    Objects of unknown classes become inert placeholders that keep their plain attributes.

    Raises:
        UnsafeCheckpoint: if the file asks for a function call or an external object; names it.
        ValueError: if the file isn't a (whole) PyTorch zip file with a dict inside.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            roots = [
                n.removesuffix("/data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")
            ]
            if len(roots) != 1:
                raise ValueError(f"{path} is a zip file, but not a PyTorch checkpoint")
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise UnsafeCheckpoint(f"{path} has compressed members, which PyTorch never writes")
            content = _Unpickler(archive, roots[0]).load()
    except UnsafeCheckpoint:
        raise
    except zipfile.BadZipFile:
        raise ValueError(
            f"{path} is not a checkpoint of PyTorch 1.6 or later (not a zip file), or is truncated"
        ) from None
    except (
        pickle.UnpicklingError,
        KeyError,
        EOFError,
        AttributeError,
        TypeError,
        IndexError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def load(path: str | Path) -> VQVAE | VideoGPT:
    """Loads a checkpoint file of the original, a VQ-VAE's or a GPT's.

    Raises:
        ValueError: as `read`, `vqvae_from`, `gpt_from`, and if weights or settings are missing.
    """
    checkpoint = read(path)
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} has no state_dict of tensors")
    settings = checkpoint.get("hyper_parameters")
    args = settings.get("args", settings) if isinstance(settings, dict) else {}
    args = vars(args) if isinstance(args, _Placeholder) else args
    if not isinstance(args, dict) or not args:
        raise ValueError(f"{path} has no hyper_parameters: its settings are unknown")
    if any(name.startswith("vqvae.") for name in state):
        return gpt_from(args, infer_vqvae_args(args, state), state)
    return vqvae_from(args, state)


# Settings -----------------------------------------------------------------------------------------


def infer_vqvae_args(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The VQ-VAE's settings (original names) behind a GPT checkpoint, from its tensors' shapes.

    Raises:
        ValueError: if a tensor they follow from is missing.
    """
    latent = [len(_get(state, f"attn_stack.pos_embd.emb.d_{axis}")) for axis in range(3)]
    frames, resolution = int(_get(args, "sequence_length")), int(_get(args, "resolution"))
    codes, code_dim = _get(state, "vqvae.codebook.embeddings").shape
    stack = "vqvae.encoder.res_stack."
    return {
        "embedding_dim": code_dim,
        "n_codes": codes,
        "n_hiddens": len(_get(state, "vqvae.encoder.conv_last.conv.weight")),
        "n_res_layers": len(
            {name.split(".")[3] for name in state if name.startswith(stack) and ".block." in name}
        ),
        "downsample": [
            size // n for size, n in zip((frames, resolution, resolution), latent, strict=True)
        ],
        "sequence_length": frames,
        "resolution": resolution,
    }


def _get(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ValueError(f"the checkpoint has no {name}")
    return values[name]


def vqvae_from(args: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> VQVAE:
    """A VQVAE, in evaluation mode, of the original's settings and state dict (original names).

    Raises:
        ValueError: if a setting is missing, or tensors are missing, extra or misshapen.
    """
    config = VQVAEConfig(
        frames=_get(args, "sequence_length"),
        resolution=_get(args, "resolution"),
        downsample=tuple(_get(args, "downsample")),
        hidden=_get(args, "n_hiddens"),
        res_blocks=_get(args, "n_res_layers"),
        codes=_get(args, "n_codes"),
        code_dim=_get(args, "embedding_dim"),
    )
    vqvae = VQVAE(config)
    fill(vqvae, _rename_vqvae(dict(state_dict), config.res_blocks), "the original's VQ-VAE")
    return vqvae.eval()


def gpt_from(
    args: Mapping[str, Any], vqvae_args: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> VideoGPT:
    """A VideoGPT, in evaluation mode, of the original's settings and GPT state dict.

    Raises:
        ValueError: if a setting is missing, or tensors are missing, extra or misshapen.
    """
    prefix = "vqvae."
    vqvae = vqvae_from(
        vqvae_args,
        {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)},
    )
    config = GPTConfig.for_vqvae(
        vqvae.config,
        width=_get(args, "hidden_dim"),
        heads=_get(args, "heads"),
        layers=_get(args, "layers"),
        dropout=_get(args, "dropout"),
        attn_dropout=_get(args, "attn_dropout"),
        attention={"full": "full", "sparse": "strided"}.get(
            _get(args, "attn_type"), str(args["attn_type"])
        ),
        classes=_get(args, "class_cond_dim") if args.get("class_cond") else 0,
        cond_frames=_get(args, "n_cond_frames"),
    )
    gpt = GPT(config)
    state = {name: t for name, t in state_dict.items() if not name.startswith(prefix)}
    fill(gpt, {**_rename_gpt(state), "codes": vqvae.codebook.codes}, "the original's GPT")
    return VideoGPT(vqvae, gpt).eval()


# Names --------------------------------------------------------------------------------------------


def _rename(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Replaces, in every name, each pattern of `rules` in turn."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _rename_vqvae(state: dict[str, Tensor], res_blocks: int) -> dict[str, Tensor]:
    for side in ("encoder", "decoder"):
        for i in range(res_blocks):
            _fuse_axial(state, f"{side}.res_stack.{i}.block.8.")
    rules = [
        (r"^(encoder\.conv_last|pre_vq_conv|post_vq_conv)\.conv\.", r"\1."),
        (r"^encoder\.convs\.(\d+)\.conv\.", r"encoder.convs.\1."),
        (r"^decoder\.convts\.(\d+)\.convt\.", r"decoder.convs.\1."),
        (rf"res_stack\.{res_blocks}\.", "res_stack.norm."),
        (r"res_stack\.(\d+)\.block\.(\d)\.conv\.", r"res_stack.blocks.\1.conv.\2."),
        (r"res_stack\.(\d+)\.block\.6\.", r"res_stack.blocks.\1.norm.0."),
        (r"res_stack\.(\d+)\.block\.8\.", r"res_stack.blocks.\1.axial."),
        (r"res_stack\.(\d+)\.block\.(\d)\.", r"res_stack.blocks.\1.conv.\2."),
        (r"^pre_vq_conv", "to_code"),
        (r"^post_vq_conv", "from_code"),
        (r"codebook\.embeddings$", "codebook.codes"),
        (r"codebook\.N$", "codebook.count"),
        (r"codebook\.z_avg$", "codebook.total"),
    ]
    return _rename(state, rules)


def _fuse_axial(state: dict[str, Tensor], block: str) -> None:
    """Fuses, in place, the projections of the three axes into `qkv` and `out`."""
    axes = [f"{block}attn_{axis}." for axis in "thw"]
    names = [f"{axis}{part}.weight" for axis in axes for part in ("w_qs", "w_ks", "w_vs")]
    if any(
        name not in state
        for name in [*names, *(f"{a}fc.{p}" for a in axes for p in ("weight", "bias"))]
    ):
        return  # `fill` names what is missing
    state[f"{block}qkv.weight"] = torch.cat([state.pop(name) for name in names])
    state[f"{block}out.weight"] = torch.cat([state.pop(f"{axis}fc.weight") for axis in axes], dim=1)
    state[f"{block}out.bias"] = torch.stack([state.pop(f"{axis}fc.bias") for axis in axes]).sum(0)


def _rename_gpt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".attn.attn.mask")}
    for name in [n for n in state if n.endswith(".attn.w_qs.weight")]:
        parts = [name.replace("w_qs", part) for part in ("w_qs", "w_ks", "w_vs")]
        if all(part in state for part in parts):
            state[name.replace("w_qs", "qkv")] = torch.cat([state.pop(part) for part in parts])
    for name in [n for n in state if n.endswith(("norm.w.weight", "norm.wb.weight"))]:
        state[name] = state[name].T.contiguous()  # (width, classes): a table of classes, transposed
    state = _number_frame_blocks(state)
    rules = [
        (r"^fc_in\.", "token_in."),
        (r"^fc_out\.", "token_out."),
        (r"^attn_stack\.right_shift\.sos$", "start"),
        (r"^attn_stack\.pos_embd\.emb\.d_(\d)$", r"positions.tables.\1"),
        (r"^cond_pos_embd\.emb\.d_(\d)$", r"frame_encoder.positions.tables.\1"),
        (r"^attn_stack\.attn_nets\.", "blocks."),
        (r"\.pre_attn_norm\.", ".norm_attn."),
        (r"\.pre_enc_norm\.", ".norm_cross."),
        (r"\.pre_fc_norm\.", ".norm_mlp."),
        (r"(norm\w*)\.g$", r"\1.gain"),
        (r"(norm\w*)\.b$", r"\1.bias"),
        (r"(norm\w*)\.w\.", r"\1.gain."),
        (r"(norm\w*)\.wb\.", r"\1.bias."),
        (r"\.enc_attn\.", ".cross."),
        (r"\.cross\.w_(q|k|v)s\.", r".cross.\1."),
        (r"\.(attn|cross)\.fc\.", r".\1.out."),
        (r"\.fc_block\.0\.", ".mlp.up."),
        (r"\.fc_block\.2\.", ".mlp.down."),
        (r"^resnet\.stem\.", "frame_encoder.stem."),
        (r"\.norm\.norm\.", "."),
        (r"\.bnr(\d)\.", r".norm\1."),
        (r"\.proj_conv\.", ".shortcut.0."),
        (r"\.proj_bnr\.", ".shortcut.1."),
    ]
    return _rename(state, rules)


def _number_frame_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers the frame encoder's residual blocks through; the original counts them by group."""
    blocks = []
    for name in state:
        if name.startswith("resnet.group"):
            parts = name.split(".")
            block = ".".join(parts[:3] if parts[2] == "start_block" else parts[:4])
            if block not in blocks:
                blocks.append(block)
    # Within a group `start_block` comes before `blocks.{i}`.
    blocks.sort(
        key=lambda b: (
            b.split(".")[1],
            "start_block" not in b,
            int(b.split(".")[-1]) if b[-1].isdigit() else 0,
        )
    )
    renamed = {}
    for name, tensor in state.items():
        for i, block in enumerate(blocks):
            if name.startswith(block + "."):
                name = f"frame_encoder.blocks.{i}." + name.removeprefix(block + ".")
                break
        renamed[name] = tensor
    return renamed
