"""Networks whose features tell how alike two sets of clips are, behind one interface.

`Features` is what a Fréchet distance asks of a network; `I3DFeatures` is the one of the Fréchet
video distance (Unterthiner et al. 2018), from a file that you have; `probes.ProbeFeatures` are of
networks of our own. Chapter 18 uses them.

Shapes: B clips · T frames · H W pixels · C channels · D features (size).
"""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from tinyvgpt import video
from tinyvgpt.frechet import FeatureSet
from tinyvgpt.i3d import CLASSES, I3D
from tinyvgpt.store import check_fits

SIDE, FRAMES = 224, 16  # of I3D's clips
PUBLISHED_CLIPS = 256  # of VideoGPT's distances (Yan et al. 2021)
SCRIPT_OPTIONS = {"rescale": False, "resize": False, "return_features": True}


class Features(Protocol):
    """A network that turns clips into features."""

    @property
    def name(self) -> str:
        """What it is called; the same only for the same weights."""

    @property
    def distance(self) -> str:
        """What a distance between its features is called in short, such as FVD."""

    @property
    def size(self) -> int:
        """D, features of a clip."""

    @property
    def least(self) -> int:
        """Clips that a distance needs: D + 1, or as many as a published protocol has."""

    @property
    def protocol(self) -> dict[str, str | int]:
        """What is done to clips of what length, for the record."""

    def __call__(self, clips: Tensor) -> Tensor:
        """Return features, float (B, D), of clips, uint8 (B, T, H, W, C) on any device.

        Raises:
            ValueError: the clips are not of the network's length or kind.
        """
        ...


def feature_set(features: Features, parts: list[Tensor]) -> FeatureSet:
    """What `features` made of clips, part after part, each (B, D), as one set in float64."""
    values = torch.cat([part.detach().cpu().double() for part in parts])
    return FeatureSet(values, features.name, features.least)


class I3DFeatures:
    """I3D's 400 logits for Kinetics-400, as the Fréchet video distance takes them.

    Clips of 16 frames are resized to 224 × 224, bilinear between pixel centres, and scaled to
    [-1, 1]; grey ones are repeated to three channels. With 256 clips, as published, a covariance of
    400 features has a rank of 255 at most.

    Values in [-1, 1] are as the distance's authors have them, the norms' epsilon of 1e-3 (of state
    dicts) as the network's. VideoGPT's released script has [-0.5, 0.5] and 1e-5 with the same
    weights, so its figures are not quite these.
    """

    distance = "FVD"
    size = CLASSES
    least = PUBLISHED_CLIPS

    def __init__(self, path: str | Path, device: str | torch.device = "cpu"):
        """Loads the network.

        Args:
            path: a TorchScript file that takes clips (B, 3, 16, 224, 224) in [-1, 1], as
                "i3d_torchscript.pt"; or a state dict of the port "pytorch-i3d", as
                "i3d_pretrained_400.pt", or as safetensors. Of a TorchScript file the program is
                run, so take it from where you trust.
            device: where it computes.

        Raises:
            ValueError: there is no such file, or it isn't an I3D of 400 classes.
        """
        self.device, path = torch.device(device), Path(path)
        if not path.is_file():
            raise ValueError(f"there is no I3D file {path}")
        self.scripted = _is_script(path)
        self.network = (_load_script if self.scripted else _load_state)(path, self.device)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.name = f"I3D {digest[:12]}"
        self.protocol: dict[str, str | int] = {
            "network": "I3D, logits for Kinetics-400, means over time",
            "weights": f"{'TorchScript' if self.scripted else 'state dict'}, sha256 {digest}",
            "frames": FRAMES,
            "clips_of_published_figures": PUBLISHED_CLIPS,
            "resizing": f"{SIDE} × {SIDE}, bilinear between pixel centres",
            "values": "-1 to 1",
        }

    def __call__(self, clips: Tensor) -> Tensor:
        """Logits, float32 (B, 400), of clips, uint8 (B, 16, H, W, C).

        Raises:
            ValueError: for clips of another length, or another number of channels than 1 or 3.
        """
        frames, channels = clips.shape[1], clips.shape[-1]
        if frames != FRAMES:
            raise ValueError(f"clips have {frames} frames, the video distance takes {FRAMES}")
        if channels not in (1, 3):
            raise ValueError(f"clips have {channels} channels, I3D takes 1 or 3")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return torch.cat([self._of(clip[None]) for clip in clips])

    def _of(self, clip: Tensor) -> Tensor:
        """One clip at a time: 224 × 224 pixels take much memory, and fill a GPU."""
        resized = video.resize_crop(clip.to(self.device).float(), SIDE)  # (1, T, 224, 224, C)
        x = (resized / 127.5 - 1).movedim(-1, 1)
        return self.network(x.expand(-1, 3, -1, -1, -1).contiguous()).float()


def _is_script(path: Path) -> bool:
    """Whether a file is TorchScript: a zip file with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _load_script(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A TorchScript file as a function; ValueError unless it makes 400 numbers of a clip."""
    try:
        module = torch.jit.load(path, map_location=device).eval()
        named = {argument.name for argument in module.forward.schema.arguments}
        options = {name: value for name, value in SCRIPT_OPTIONS.items() if name in named}
        with torch.no_grad():
            made = module(torch.zeros(1, 3, FRAMES, SIDE, SIDE, device=device), **options)
    except (RuntimeError, AttributeError) as error:  # TorchScript's own errors are RuntimeErrors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ValueError(
            f"{path} is no I3D: it fails on a clip (1, 3, {FRAMES}, {SIDE}, {SIDE}): {reason:.200}"
        ) from None
    found = f"a {type(made).__name__}"
    if isinstance(made, Tensor):
        found = f"{made.dtype} of shape {tuple(made.shape)}"
        if made.shape == (1, CLASSES) and made.is_floating_point() and made.isfinite().all():
            return lambda x: module(x, **options)
        if made.is_floating_point() and not made.isfinite().all():
            found = "numbers that are not finite"
    raise ValueError(f"{path} is no I3D: of a clip it makes {found}, not floats (1, {CLASSES})")


def _load_state(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Our I3D with a state dict's weights; ValueError unless it has them all and no others."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a file of another kind can go wrong in any way; PyTorch's advice is unsafe
        raise ValueError(
            f"{path} is no I3D, or is damaged: neither TorchScript nor a state dict of tensors only"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path} is no I3D: it holds {type(state).__name__}, not a state dict")
    network = I3D().to(device)
    counters = "num_batches_tracked"  # of batch norms in training; older files lack them
    expected = {n: x for n, x in network.state_dict().items() if not n.endswith(counters)}
    weights = {n: x for n, x in state.items() if not n.endswith(counters)}
    check_fits(expected, weights, str(path))
    network.load_state_dict(weights, strict=False)
    return network
