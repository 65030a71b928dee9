"""`tinyvgpt evaluate` as a user types it: a table, a record, one line for a mistake."""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvgpt import (
    GPT,
    VQVAE,
    GPTConfig,
    VideoGPT,
    VQVAEConfig,
    cli,
    evaluate,
    frechet,
    open_dataset,
    probes,
    shown,
)
from tinyvgpt.encode import encode_folder
from tinyvgpt.features import I3DFeatures
from tinyvgpt.probes import Probe, ProbeConfig
from tinyvgpt.sampling import SamplingRule

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
TINY = VQVAEConfig(
    channels=1, frames=16, resolution=32, downsample=(4, 8, 8), hidden=8, res_blocks=1, codes=8,
    code_dim=4, axial=False, causal_time=True,
)  # fmt: skip


class Corners(nn.Module):
    """In I3D's place: 400 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool3d(x[:, :1], (16, 5, 5)).flatten(1)


def save_model(folder, **fields):
    torch.manual_seed(0)
    vqvae = VQVAE(TINY)
    config = GPTConfig.for_vqvae(TINY, width=12, heads=2, layers=1, **fields)
    names = open_dataset("moving-mnist").label_names if fields.get("classes") else None
    VideoGPT(vqvae, GPT(config, vqvae.codebook.codes), names).save(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), classes=55)


@pytest.fixture
def i3d(tmp_path, monkeypatch):
    """A file in place of I3D's, distances from 6 clips on, and short work of intervals."""
    monkeypatch.setattr(I3DFeatures, "least", 6)
    monkeypatch.setattr(frechet, "DISTANCE_RESAMPLES", 5)
    torch.jit.script(Corners()).save(tmp_path / "i3d.pt")
    return tmp_path / "i3d.pt"


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """A probe that has learnt nothing, and counts whatever it marks: 8 features."""
    torch.manual_seed(0)
    config = ProbeConfig("moving-mnist", tuple("0123456789"), 2, width=2, threshold=0.0)
    folder = tmp_path_factory.mktemp("probe")
    Probe(config).save(folder)
    return folder


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_table_and_record(model, tmp_path, capsys):
    out = tmp_path / "new" / "figures.json"
    options = ["--data", "moving-mnist", "--clips", 5, "--seed", 3, "--device", "cpu"]
    assert run("evaluate", model, *options, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"{model} on 5 clips of moving-mnist test, told their labels" in printed
    assert "95 % interval" in printed
    assert re.search(r"^bits a token +3\.000   3\.000 … 3\.000$", printed, flags=re.MULTILINE)
    assert printed.endswith(f"record in {out}\n")
    found = json.loads(out.read_text())
    assert (found["clips"], found["split_clips"], found["seed"]) == (5, 10_000, 3)
    assert found["told"] == ["labels"]
    assert {"date", "python", "torch", "tinyvgpt", "torchmetrics", "device"} <= found.keys()
    expected = "--data moving-mnist --split test --clips 5 --seed 3"
    assert found["command"] == f"tinyvgpt evaluate {model} {expected}"
    assert "distances" not in found
    loaded = VideoGPT.from_pretrained(model)
    data = open_dataset("moving-mnist", "test", frames=16, resolution=32)
    for group, figures in evaluate.evaluate(loaded, data, 5, seed=3).items():
        for name, (value, *interval) in figures.items():
            assert found[group][name] == {"value": value, "interval": interval}


def test_distances(model, i3d, tmp_path, capsys):
    out = tmp_path / "figures.json"
    options = ["--data", "moving-mnist", "--clips", 6, "--i3d", i3d, "--given", 4, "--out", out]
    assert run("evaluate", model, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-5:-1]] == [
        "FVD",
        "R-FVD",
        "FVD*",
        "FVD, real from real",
    ]
    found = json.loads(out.read_text())
    assert found["distances"].keys() == {"FVD", "R-FVD", "FVD*", "FVD, real from real"}
    assert found["distances_between"] == {
        "FVD": ["samples", "real"],
        "R-FVD": ["reconstructions", "real"],
        "FVD*": ["samples", "reconstructions"],
        "FVD, real from real": "6 clips and 6 others",
    }
    assert (found["features"]["FVD"]["size"], found["features"]["FVD"]["frames"]) == (400, 16)
    assert found["features"]["FVD"]["resizing"].startswith("224 × 224")
    assert found["features"]["FVD"]["clips_of_published_figures"] == 256
    assert found["first_frames_given"] == 4
    assert f"--i3d {i3d} --given 4" in found["command"]
    assert run("evaluate", model, *options, "--given", 8) == 0
    other = json.loads(out.read_text())["distances"]
    assert other["FVD"] != found["distances"]["FVD"]
    assert other["R-FVD"] == found["distances"]["R-FVD"]


def test_probe(model, probe, i3d, tmp_path, capsys):
    """Distances of its features beside I3D's, and what clips show, as `shown` finds them."""
    out = tmp_path / "figures.json"
    options = ["--data", "moving-mnist", "--clips", 9, "--probe-from", probe, "--out", out]
    more = ["--temperature", 0.5, "--top-p", 0.9, "--seed", 2]
    assert run("evaluate", model, *options, *more, "--probe", "--read", "--i3d", i3d) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    names = [n.format(of) for of in ("FVD", "FD") for n in (*evaluate.DISTANCES, evaluate.REAL)]
    assert list(found["distances"]) == list(found["distances_between"]) == names
    assert found["features"]["FD"]["size"] == 8
    assert found["probe"]["name"] == found["features"]["FD"]["name"]
    assert found["first_frames_gone_on_from"] == 4
    assert (found["sampling"]["temperature"], found["sampling"]["top_p"]) == (0.5, 0.9)
    assert found["command"].endswith("--temperature 0.5 --top-p 0.9 --seed 2 --probe --read")
    loaded = VideoGPT.from_pretrained(model)
    data = open_dataset("moving-mnist", "test", frames=16, resolution=32)
    rule = SamplingRule(temperature=0.5, top_p=0.9)
    again = shown.show_digits(loaded, data, Probe.from_pretrained(probe), 9, rule=rule, seed=2)
    for measure, of in again["shown"].items():
        for name, (figure, of_real, clips) in of.items():
            in_file = found["shown"][measure][name]
            assert in_file["clips"] == clips
            assert in_file["value"] == figure.value
            assert in_file["interval"] == list(figure[1:])
            assert ("of_real" in in_file) == (of_real is not None)
            if of_real:
                assert in_file["of_real"]["value"] == of_real.value
    for name, figure in again["going on"].items():
        assert found["going on"][name] == {"value": figure.value, "interval": list(figure[1:])}
    assert re.search(r"^frames with both digits read\n  real clips +1\.000 ", printed, re.MULTILINE)
    assert re.search(r"^  samples +1\.000 .* of real clips' +1\.000 ", printed, re.MULTILINE)
    assert "\ngoing on from given frames\nPSNR, dB " in printed


def test_halves_are_named(tmp_path, i3d):
    films = tmp_path / "robots.json"
    vqvae = VQVAE(VQVAEConfig(**{**TINY.__dict__, "channels": 3}))
    config = GPTConfig.for_vqvae(vqvae.config, width=12, heads=2, layers=1, action_dim=4)
    VideoGPT(vqvae, GPT(config, vqvae.codebook.codes)).save(tmp_path / "arm")
    options = ["--data", "robot-push", "--clips", 999, "--i3d", i3d, "--out", films]
    assert run("evaluate", tmp_path / "arm", *options) == 0
    found = json.loads(films.read_text())
    assert found["clips"] == found["split_clips"] == 32
    assert found["told"] == ["actions"]
    assert found["distances_between"]["FVD, real from real"] == "halves of 32 clips"


def test_a_shipped_model_brings_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", "robot-push", "--clips", 2) == 0
    assert "robot-push on 2 clips of robot-push test, told their actions" in capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert 0.4 < found["likelihood"]["bits_per_token"]["value"] < 1  # its card: 0.61
    assert 28 < found["reconstruction"]["psnr"]["value"] < 34  # its card: 30.90


def test_mistakes(model, i3d, probe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = open_dataset("moving-mnist", "test", frames=16, resolution=32)
    encode_folder(VideoGPT.from_pretrained(model).vqvae, data, tmp_path / "tokens/test", clips=4)
    (tmp_path / "text.pt").write_text("no network")
    of = ["--data", "moving-mnist"]
    short = save_model(tmp_path / "unlabelled")
    monkeypatch.setattr(probes, "FOLDER", tmp_path / "none")
    read = ["--probe-from", probe, "--read"]
    Probe(ProbeConfig("moving-mnist", ("a",), 1, channels=3, width=2)).save(tmp_path / "colour")
    Probe(ProbeConfig("cats", ("a",), 1, width=2)).save(tmp_path / "cats")
    capsys.readouterr()
    for words, said in (
        ([model], "give --data, the clips to measure the model on"),
        (["nowhere"], "no model 'nowhere'"),
        ([model, "--data", "robot-push"], "the data has channels 3, the model needs 1"),
        ([model, "--data", "tokens"], "the data are tokens, clips are needed"),
        ([model, *of, "--clips", "1"], "clips is 1, of 10000; an interval needs at least 2"),
        ([model, *of, "--out", "record.txt"], "--out is record.txt, its name must end in .json"),
        ([model, *of, "--split", "tset"], "tset"),
        ([model, *of, "--i3d", "gone.pt"], "there is no I3D file gone.pt"),
        ([model, *of, "--i3d", "text.pt"], "text.pt is no I3D"),
        ([model, *of, "--clips", "5", "--i3d", i3d], "5 clips are too few for a distance"),
        ([model, *of, "--probe"], "moving-mnist has no probe, give --probe-from: no probe 'moving"),
        ([model, *of, "--read"], "moving-mnist has no probe, give --probe-from"),
        ([model, *of, "--probe-from", probe], "--probe-from is given, but neither --probe nor"),
        ([model, *of, "--read", "--probe-from", "gone"], "no probe 'gone': not a folder"),
        ([model, *of, "--read", "--probe-from", model], "holds no probe, but another model"),
        ([model, *of, "--read", "--probe-from", "colour"], "reads 3 channels, the clips have 1"),
        ([model, *of, "--read", "--probe-from", "cats"], "read by probes of moving-mnist"),
        ([model, *of, "--probe", "--clips", 8, *read[:2]], "8 clips are too few for a distance "),
        ([model, *of, *read, "--guidance", 2], "guidance is 2.0, but the model has no null label"),
        ([model, *of, *read, "--temperature", -1], "temperature is -1.0, must be 0"),
        ([short, *of, "--clips", "6", "--given", "3"], "given is 3, must be a multiple of 4"),
    ):
        assert run("evaluate", *words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("tinyvgpt: ")
        assert error.count("\n") == 1, error
        assert said in error
    assert not (tmp_path / "evaluation.json").exists()


def test_too_short_for_the_video_distance(tmp_path, i3d, capsys):
    vqvae = VQVAE(VQVAEConfig(**{**TINY.__dict__, "frames": 8}))
    config = GPTConfig.for_vqvae(vqvae.config, width=12, heads=2, layers=1)
    VideoGPT(vqvae, GPT(config, vqvae.codebook.codes)).save(tmp_path / "short")
    options = ["--data", "moving-mnist", "--clips", 6, "--i3d", i3d]
    assert run("evaluate", tmp_path / "short", *options) == 2
    assert "clips have 8 frames, the video distance takes 16" in capsys.readouterr().err


def test_without_tyro(model, tmp_path):
    """Where a machine lacks it, the command's dataclass is filled by hand."""
    out = tmp_path / "figures.json"
    lines = (
        "import pathlib, sys",
        "sys.modules |= dict.fromkeys(('av', 'tyro', 'mujoco'))",
        "from tinyvgpt.commands.evaluate import Evaluate",
        "model, out = sys.argv[1:]",
        "Evaluate(model=model, data='moving-mnist', clips=2, out=pathlib.Path(out)).run()",
    )
    command = [sys.executable, "-c", "\n".join(lines), model, out]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads(out.read_text())["clips"] == 2
