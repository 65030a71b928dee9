"""I3D from a file gets clips as the video distance says; whatever isn't I3D is refused by name."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyvgpt.features import I3DFeatures, feature_set
from tinyvgpt.i3d import I3D

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Probe(nn.Module):
    """In I3D's place: what of a clip reaches the network, and by which options."""

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        frames = x[:, 0, :, 0, 0]  # (B, 16)
        numbers = [x.flatten(1).amin(1), x.flatten(1).amax(1), x[:, 0, 3, 100, 40]]
        numbers += [x[:, 1, 3, 100, 40], x[:, 2, 3, 100, 40]]
        options = float(rescale) + 2 * float(resize) + 4 * float(not return_features)
        numbers += [torch.full_like(x[:, 0, 0, 0, 0], options)]
        made = torch.cat([torch.stack(numbers, 1), frames], 1)
        return F.pad(made, (0, 400 - made.shape[1]))


class Plain(nn.Module):
    """Without options; `kind` is what is wrong with what it makes."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        made = x.mean((2, 3, 4))[:, :1].expand(-1, 400)
        if self.kind == "600 classes":
            return made.repeat(1, 2)[:, :600]
        if self.kind == "no numbers":
            return made * float("nan")
        if self.kind == "integers":
            return made.long()
        if self.kind == "other clips":
            return made + x[:, :, :, 0, 300].mean()
        return made


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def clips(n, frames=16, side=64, channels=3):
    size = (n, frames, side, side, channels)
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.manual_seed(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = I3D()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm3d):  # something else than fresh ones have
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return made


@pytest.fixture(scope="module")
def state(network):
    """A state dict as old files have it: without counters of batches."""
    return {n: x for n, x in network.state_dict().items() if "tracked" not in n}


@pytest.fixture
def probe(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Probe()).save(path)
    return I3DFeatures(path)


def test_a_state_dict(network, state, tmp_path):
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(network.state_dict(), tmp_path / "new.pt")
    save_file(state, tmp_path / "new.safetensors")
    loaded = [I3DFeatures(tmp_path / n) for n in ("old.pt", "new.pt", "new.safetensors")]
    for features in loaded:
        found = features.network.state_dict()
        assert all(torch.equal(found[name], state[name]) for name in state)
        assert not features.network.training
    x = clips(1)
    resized = F.interpolate(
        x[0].movedim(-1, 1).float(), size=(224, 224), mode="bilinear", align_corners=False
    )
    with torch.no_grad():
        expected = network((resized / 255 * 2 - 1).movedim(0, 1)[None])
    made = loaded[0](x)
    assert made.shape == (1, 400)
    assert torch.allclose(made, expected, atol=1e-4 * expected.std().item())
    assert len({features.name for features in loaded}) == 3  # the files differ
    assert loaded[0].name == I3DFeatures(tmp_path / "old.pt").name


def test_torchscript(probe):
    x = clips(3)
    x[0, 3], x[1] = 51, 255
    made = probe(x)
    assert made.shape == (3, 400)
    assert made.dtype == torch.float32
    assert made[0, 2:5].tolist() == pytest.approx([-0.6] * 3)  # 51 / 255 · 2 - 1
    assert made[1, :2].tolist() == pytest.approx([1, 1])
    assert (made[:, :2].abs() <= 1 + 1e-6).all()
    assert (made[:, 5] == 0).all()  # its own resizing and scaling are off, features are asked for
    corner = x[2, :, 0, 0, 0].float() / 127.5 - 1  # each frame's, in their order
    assert torch.allclose(made[2, 6:22], corner, atol=1e-5)
    assert torch.equal(probe(x[2:]), made[2:])


def test_torchscript_without_options(tmp_path):
    torch.jit.script(Plain("")).save(tmp_path / "i3d.pt")
    assert I3DFeatures(tmp_path / "i3d.pt")(clips(2)).shape == (2, 400)


def test_grey_clips_and_oblong_ones(probe):
    grey = clips(1, channels=1)
    assert torch.equal(probe(grey), probe(grey.expand(-1, -1, -1, -1, 3)))
    wide = torch.cat([grey, 255 - grey], 3)
    inside = slice(2, 5)  # a pixel's three channels
    assert torch.allclose(probe(wide)[0, inside], probe(wide[:, :, :, 32:96])[0, inside])


def test_what_is_told(probe):
    assert (probe.size, probe.least) == (400, 256)
    assert re.fullmatch("I3D [0-9a-f]{12}", probe.name)
    assert probe.protocol["frames"] == 16
    assert probe.protocol["resizing"].startswith("224 × 224, bilinear")
    assert probe.protocol["weights"].startswith("TorchScript, sha256 ")


def test_feature_set(probe):
    made = feature_set(probe, [probe(clips(2)), probe(clips(3))])
    assert made.values.shape == (5, 400)
    assert made.values.dtype == torch.float64
    assert (made.network, made.least) == (probe.name, 256)
    assert torch.equal(made.values[:2], made.values[2:4])
    broken = torch.full((1, 400), math.nan)
    with pytest.raises(ValueError, match="not finite for 1 of 3 clips"):
        feature_set(probe, [probe(clips(2)), broken])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (clips(2, frames=8), "clips have 8 frames, the video distance takes 16"),
        (clips(2, channels=2), "clips have 2 channels, I3D takes 1 or 3"),
    ],
)
def test_clips_that_do_not_fit(probe, x, message):
    with pytest.raises(ValueError, match=message):
        probe(x)


# Files that are none ------------------------------------------------------------------------------


class Runs:
    """Unpickled by Python's own machine, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def refused(path):
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        I3DFeatures(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_no_file(tmp_path):
    assert "there is no I3D file" in refused(tmp_path / "missing.pt")
    assert "there is no I3D file" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"some text\n", b"\x00" * 300, b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", ["i3d.pt", "i3d.safetensors"])
def test_something_else(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    assert "is no I3D, or is damaged: neither TorchScript" in refused(path)


def test_half_a_file(tmp_path, state):
    for name, save in (
        ("state.pt", lambda path: torch.save(state, path)),
        ("script.pt", lambda path: torch.jit.script(Probe()).save(path)),
    ):
        path = tmp_path / name
        save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert "is no I3D, or is damaged: neither TorchScript" in refused(path)


def test_a_file_that_would_run_something(tmp_path):
    path = tmp_path / "i3d.pt"
    torch.save({"logits": Runs(str(tmp_path / "made"))}, path)
    assert "a state dict of tensors only" in refused(path)
    assert not (tmp_path / "made").exists()


def test_another_network_s_state(tmp_path, state):
    path = tmp_path / "i3d.pt"
    torch.save({**state, "logits.conv3d.bias": torch.zeros(600)}, path)
    assert "logits.conv3d.bias (600,), the model has (400,)" in refused(path)
    torch.save({n: x for n, x in state.items() if "b2b" not in n}, path)
    assert "tensors missing (Mixed_3b.b2b.bn.bias, " in refused(path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    assert "2 tensors not part of the model (bias, weight)" in refused(path)
    torch.save([torch.zeros(2)], path)
    assert "it holds list, not a state dict" in refused(path)
    torch.save({"state_dict": state}, path)
    assert "not a state dict" in refused(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("600 classes", "of a clip it makes torch.float32 of shape (1, 600), not floats (1, 400)"),
        ("no numbers", "of a clip it makes numbers that are not finite, not floats"),
        ("integers", "of a clip it makes torch.int64 of shape (1, 400), not floats (1, 400)"),
        ("other clips", "it fails on a clip (1, 3, 16, 224, 224): "),
    ],
)
def test_another_script(tmp_path, kind, message):
    path = tmp_path / "script.pt"
    torch.jit.script(Plain(kind)).save(path)
    assert message in refused(path)


def test_a_script_of_several_things(tmp_path):
    torch.jit.script(Pair()).save(tmp_path / "script.pt")
    assert "of a clip it makes a tuple, not floats (1, 400)" in refused(tmp_path / "script.pt")
