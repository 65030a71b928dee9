"""The commands as a user types them, in process; mistakes end with exit code 2 and one line."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinyvgpt import (
    GPT,
    VQVAE,
    GPTConfig,
    VideoGPT,
    VQVAEConfig,
    bench,
    cli,
    open_dataset,
    presets,
    video,
)

PARITY = Path(__file__).parent / "parity"
TINY = VQVAEConfig(
    channels=1,
    frames=8,
    resolution=32,
    downsample=(4, 8, 8),
    hidden=16,
    res_blocks=1,
    codes=16,
    code_dim=8,
    causal_time=True,
)
TRAIN = ["--train.steps", "3", "--train.batch-size", "2", "--train.validation-clips", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny untrained model."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    vqvae = VQVAE(TINY)
    vqvae.train()(torch.rand(2, 1, 8, 32, 32) - 0.5)
    config = GPTConfig.for_vqvae(TINY, width=12, heads=2, layers=1, classes=55, label_dropout=0.1)
    names = open_dataset("moving-mnist").label_names
    VideoGPT(vqvae, GPT(config, vqvae.codebook.codes), names).save(folder)
    return folder


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_sample(model, tmp_path):
    out = tmp_path / "clips.mp4"
    assert run("sample", model, "--n", 3, "--out", out, "--labels", "73", "--guidance", 2) == 0
    clip = video.read(out)
    assert len(clip) == TINY.frames
    assert clip.shape[1:3] == (66 * 3, 66 * 3)  # 2 × 2 cells of 32 pixels, 2 between them, × 3
    assert run("sample", model, "--n", 1, "--out", out, "--length", 13, "--overlap", 4) == 0
    assert len(video.read(out)) == 13


@pytest.mark.parametrize(
    ("names", "labels", "asked"),
    [
        (True, "37", ["37", "37", "37"]),
        (True, "37, 05", ["37", "05", "37"]),
        (True, "a, b", ["a, b", "a, b", "a, b"]),
        (False, "3,0", [3, 0, 3]),
        (False, None, None),
    ],
)
def test_labels_take_turns(tmp_path, monkeypatch, names, labels, asked):
    given = {}

    def sample(self, n, **options):
        given.update(options, n=n)
        return torch.zeros(n, 4, 32, 32, 1, dtype=torch.uint8)

    monkeypatch.setattr(VideoGPT, "sample", sample)
    vqvae = VQVAE(TINY)
    gpt = GPT(
        GPTConfig.for_vqvae(TINY, width=12, heads=2, layers=1, classes=55), vqvae.codebook.codes
    )
    classes = ["a, b", *open_dataset("moving-mnist").label_names[1:]] if names else None
    VideoGPT(vqvae, gpt, classes).save(tmp_path / "model")
    words = [] if labels is None else ["--labels", labels]
    out = tmp_path / "clips.mp4"
    assert run("sample", tmp_path / "model", "--n", 3, "--out", out, *words) == 0
    assert given["labels"] == asked


def test_sample_continues_a_file(model, tmp_path):
    clips = open_dataset("moving-mnist", "val", frames=8, resolution=32).batch([0])["video"]
    given, out = tmp_path / "given.mp4", tmp_path / "continued.mp4"
    video.write(given, clips, fps=8)
    options = ["--n", 1, "--frames", given, "--given", 4, "--scale", 1]
    assert run("sample", model, *options, "--out", out) == 0
    first = video.read(out)[:4, ..., :1].float()
    assert (first - clips[0, :4].float()).abs().mean() < 2  # as given, but for the codec


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "nowhere/clips.mp4"], "there is no folder nowhere"),
        (["--out", "clips.avi"], "ends in '.avi'"),
        (["--out", "clips.gif", "--fps", 60], "fps is 60, a GIF plays at most 50"),
        (["--columns", 0], "columns is 0"),
        (["--scale", 0], "scale is 0"),
        (["--scale", 500], "67000×67000 pixels are too many: .mp4 has 16384 a side at most"),
        (["--fps", 1e12], "fps is 1000000000000.0, at most 1000"),
        (["--frames", "films/a.mp4", "--out", "films/a.mp4"], "is what is read; give another"),
        (["--frames", "films", "--out", "films/b.mp4"], "would be one of the videos of films"),
    ],
)
def test_sample_draws_nothing_that_it_could_not_write(
    model, tmp_path, monkeypatch, capsys, words, says
):
    (tmp_path / "films").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(VideoGPT, "sample", None)
    assert run("sample", model, *words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--given", 100], "given is 100 frames, must be from 1 to 7"),
        (["--given", 8], "given is 8 frames, must be from 1 to 7"),
        (["--given", 0], "given is 0 frames, must be from 1 to 7"),
        (["--given", -4], "given is -4 frames, must be from 1 to 7"),
        (["--length", 4], "given is 4 frames, must be from 1 to 3"),
        (["--length", 12, "--given", 12], "given is 12 frames, must be from 1 to 8"),
    ],
)
def test_given_frames_leave_some_to_draw(model, tmp_path, capsys, words, says):
    options = ["--frames", "moving-mnist", "--out", tmp_path / "clips.mp4"]
    assert run("sample", model, *options, *words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "clips.mp4").exists()


def test_sample_continues_clips_by_their_actions(tmp_path):
    size = {"channels": 3, "frames": 8, "resolution": 32, "downsample": (4, 8, 8)}
    vqvae = VQVAE(
        VQVAEConfig(**size, hidden=8, res_blocks=1, codes=8, code_dim=4, causal_time=True)
    )
    config = GPTConfig.for_vqvae(vqvae.config, width=24, heads=2, layers=1, action_dim=4)
    VideoGPT(vqvae, GPT(config, vqvae.codebook.codes)).save(tmp_path / "arm")
    options = ["--n", 6, "--frames", "robot-push", "--columns", 3, "--scale", 1]
    assert run("sample", tmp_path / "arm", *options, "--out", tmp_path / "arm.mp4") == 0
    clip = video.read(tmp_path / "arm.mp4")
    real = open_dataset("robot-push", "test", frames=8, resolution=32).batch(range(6))["video"]
    expected = video.grid(real, 3)
    assert clip.shape == expected.shape
    assert (clip[:4].float() - expected[:4].float()).abs().mean() < 8  # as given, but for the codec
    options = ["--n", 2, "--frames", "robot-push", "--length", 20, "--overlap", 4, "--scale", 1]
    assert run("sample", tmp_path / "arm", *options, "--out", tmp_path / "long.mp4") == 0
    assert len(video.read(tmp_path / "long.mp4")) == 20


def test_reconstruct(model, tmp_path, capsys):
    out = tmp_path / "both.gif"
    assert run("reconstruct", model, "--n", 2, "--out", out) == 0
    assert "PSNR" in capsys.readouterr().out
    assert len(video.read(out)) == TINY.frames


def test_look(tmp_path, capsys):
    out = tmp_path / "look.gif"
    assert run("look", "moving-mnist", "--split", "val", "--n", 3, "--frames", 5, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "10,000 clips of 5 frames in val" in printed
    assert "classes: 00, 01" in printed
    assert video.read(out).shape == (5, 130 * 3, 130 * 3, 3)


@pytest.mark.parametrize("command", ["look", "reconstruct"])
def test_nothing_is_written_among_the_films(model, tmp_path, monkeypatch, capsys, command):
    (tmp_path / "films").mkdir()
    monkeypatch.chdir(tmp_path / "films")
    words = ["."] if command == "look" else [model, "--data", "."]
    assert run(command, *words) == 2
    assert "would be one of the videos of .; give another --out" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["encode", "train-vqvae", "train-gpt"])
def test_the_folder_of_the_data_is_no_folder_for_results(model, tmp_path, capsys, command):
    words = [model] if command == "encode" else []
    assert run(command, *words, "--data", tmp_path, "--out", tmp_path) == 2
    assert f"{tmp_path} is the folder of the data" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "bench"])
def test_measures_nothing_that_it_could_not_record(model, tmp_path, capsys, command):
    (tmp_path / "file").touch()
    words = ["data"] if command == "bench" else [model, "--data", "moving-mnist"]
    out = tmp_path / "file" / ("x.json" if command == "evaluate" else "")
    assert run(command, *words, "--out", out) == 2
    assert f"the folder {tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_own_videos_from_looking_to_reconstructing(model, tmp_path, capsys):
    films = tmp_path / "films"
    clips = open_dataset("moving-mnist", "val", frames=24).batch(range(3))["video"]
    films.mkdir()
    for number, clip in enumerate(clips):
        video.write(films / f"{number}.mp4", clip, fps=24)
    (films / "broken.mp4").write_bytes(b"no film")
    out = tmp_path / "look.gif"
    with pytest.warns(UserWarning, match=r"broken\.mp4"):
        assert run("look", films, "--sample-fps", 12, "--frames", 8, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "10 clips of 8 frames" in printed  # two films of 12 frames, one is held out
    assert f"left out: {films / 'broken.mp4'}" in printed
    with pytest.warns(UserWarning, match=r"broken\.mp4"):
        assert run("reconstruct", model, "--data", films, "--split", "val", "--out", out) == 2
    assert "the data has channels 3, the model needs 1" in capsys.readouterr().err
    one = ["--data", films / "0.mp4", "--sample-fps", 12]
    assert run("reconstruct", model, *one, "--out", out) == 0
    assert len(video.read(out)) == 8


def test_a_warning_is_one_line(tmp_path):
    fine = open_dataset("moving-mnist", "val", frames=16).batch([0])["video"]
    video.write(tmp_path / "fine.mp4", fine, fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    words = ["look", tmp_path, "--out", tmp_path.with_suffix(".gif")]
    command = [sys.executable, "-m", "tinyvgpt.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tinyvgpt: {tmp_path / 'broken.mp4'} is skipped: ")


def test_as_many_classes_as_the_data_have(model, tmp_path, capsys):
    train = ["--vqvae", model, "--out", tmp_path / "run", *TRAIN, "--train.preview-every", 0]
    small = ["--gpt.width", 24, "--gpt.layers", 1, "--gpt.classes", 3, "--by-class"]
    assert run("train-gpt", *train, *small) == 0
    assert VideoGPT.from_pretrained(tmp_path / "run").gpt.config.classes == 55
    assert run("train-gpt", *train, *small, "--data", "robot-push", "--stride", 5) == 2
    assert "--by-class: robot-push has no classes" in capsys.readouterr().err


def test_train_both_stages_from_a_preset(tmp_path, capsys):
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    small = ["--vqvae.frames", 8, "--vqvae.resolution", 32, "--vqvae.hidden", 16]
    assert run("train-vqvae", "--out", first, *small, *TRAIN) == 0
    assert VQVAE.from_pretrained(first).config.frames == 8
    gpt = ["--gpt.width", 24, "--gpt.layers", 1, "--train.preview-every", 0]
    assert run("train-gpt", "--out", second, "--vqvae", first, *gpt, *TRAIN) == 0
    model = VideoGPT.from_pretrained(second)
    assert model.gpt.config.latent_shape == (2, 4, 4)  # the tokenizer's, whatever the preset says
    assert model.label_names[-1] == "99"
    more = tmp_path / "stage2b"
    assert (
        run("train-gpt", "--out", more, "--init", second, "--train.preview-every", 0, *TRAIN) == 0
    )
    assert not torch.equal(VideoGPT.from_pretrained(more).gpt.start, model.gpt.start)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_dry_run(name, tmp_path, capsys):
    for command in ("train-vqvae", "train-gpt"):
        assert run(command, "--preset", name, "--out", tmp_path / "run", "--dry-run") == 0
    printed = capsys.readouterr().out
    chosen = presets.preset(name)
    assert f"{chosen.gpt.tokens:,} a clip" in printed
    assert f"{chosen.train_gpt.steps:,} steps" in printed
    assert not (tmp_path / "run").exists()


def test_a_dry_run_is_of_the_model_that_would_be_trained(model, tmp_path, capsys):
    """Of a given tokenizer or model, not of the preset's."""
    tokens = f"{VideoGPT.from_pretrained(model).gpt.config.tokens:,}"
    options = ["--preset", "laptop", "--out", tmp_path / "run", "--dry-run"]
    assert run("train-gpt", *options, "--vqvae", model, "--by-class") == 0
    printed = capsys.readouterr().out
    assert f"{tokens} a clip" in printed
    assert run("train-gpt", *options, "--init", model) == 0
    assert f"{tokens} a clip" in capsys.readouterr().out
    assert run("train-vqvae", *options, "--init", model) == 0
    assert f"{tokens} a clip" in capsys.readouterr().out
    assert run("train-vqvae", *options, "--vqvae.hidden", 20000) == 0  # 100 GB, if it were made
    assert run("train-gpt", *options, "--vqvae", model, "--gpt.width", 240000) == 0
    assert "a clip" in capsys.readouterr().out
    assert run("train-gpt", *options, "--vqvae", tmp_path / "nowhere") == 2
    assert run("train-gpt", *options, "--init", model, "--by-class") == 2
    assert "--by-class is for a new model" in capsys.readouterr().err


def test_train_vqvae_takes_clips_of_the_shape_of_the_model_that_it_begins_with(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    small = ["--vqvae.frames", 8, "--vqvae.resolution", 32, "--vqvae.hidden", 16]
    assert run("train-vqvae", "--out", first, *small, *TRAIN) == 0
    assert run("train-vqvae", "--out", second, "--init", first, *TRAIN) == 0
    assert VQVAE.from_pretrained(second).config.frames == 8


def test_released_preset_has_the_original_s_parameters(capsys, tmp_path):
    """21.1 M and, without frame conditioning, 33.2 M, as in the original's released code."""
    assert run("train-vqvae", "--preset", "released-bair", "--out", tmp_path, "--dry-run") == 0
    assert "parameters: 21,1" in capsys.readouterr().out
    options = ["--preset", "released-bair", "--gpt.cond-frames", 0, "--dry-run"]
    assert run("train-gpt", "--out", tmp_path, *options) == 0
    assert "parameters: 33,2" in capsys.readouterr().out


def test_convert(tmp_path, capsys):
    assert run("convert", PARITY / "gpt_uncond.ckpt", tmp_path / "new") == 0
    assert isinstance(VideoGPT.from_pretrained(tmp_path / "new"), VideoGPT)


def test_ctrl_c_is_one_line(model, monkeypatch, capsys):
    def interrupted(self, *words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoGPT, "sample", interrupted)
    assert run("sample", model) == 130
    assert capsys.readouterr().err == "tinyvgpt: interrupted\n"


@pytest.mark.parametrize("tokens", [-5, 0, 4097])
def test_bench_of_tokens_that_a_clip_doesn_t_have(capsys, tokens):
    assert run("bench", "sampling", "--tokens", tokens, "--device", "cpu") == 2
    assert f"tokens is {tokens}, must be from 1 to 4096" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["steer_arm", "measure_drift"])
def test_a_recipe_of_no_model_is_one_line(name, tmp_path):
    script = Path(__file__).parents[1] / "data_recipes" / f"{name}.py"
    words = ["nosuch"] + (["--out", tmp_path / "a.png"] if name == "steer_arm" else [])
    ended = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1


def test_bench(tmp_path, capsys):
    assert run("bench", "sampling", "--tokens", 2, "--device", "cpu", "--out", tmp_path) == 0
    (path,) = tmp_path.glob("sampling-cpu*.json")
    record = json.loads(path.read_text())
    assert record["tokens_of_each_clip"] == 2
    assert record["ours_tokens_per_second"] > 0
    assert "--tokens 2" in record["command"]
    assert re.fullmatch(r"CPU, \d+ threads", record["device"])


def test_bench_data(tmp_path, monkeypatch):
    for name, value in (("WARM_UP", 0.1), ("LEAST", 0.2), ("SECONDS", 2), ("FILMS", 2)):
        monkeypatch.setattr(bench.data, name, value)
    monkeypatch.setattr(bench.data, "write_hdf5", partial(bench.data.write_hdf5, clips=6))
    assert run("bench", "data", "--workers", 0, "--batch", 4, "--out", tmp_path) == 0
    (path,) = tmp_path.glob("data-cpu*.json")
    rates = json.loads(path.read_text())["clips_per_second"]
    assert len(rates) == 5
    assert all(rate > 0 for rate in rates.values())
    assert run("bench", "data", "--data", "moving-mnist", "--workers", 0, "--out", tmp_path) == 0
    record = json.loads(path.read_text())
    assert record["clips_per_second"].keys() == {"moving-mnist"}
    assert record["command"].endswith("--data moving-mnist")


def test_encode_and_train_from_tokens(model, tmp_path, capsys):
    tokens, out = tmp_path / "tokens", tmp_path / "run"
    options = ["--data", "moving-mnist", "--clips", 6, "--out", tokens]
    assert run("encode", model, *options) == 0
    assert f"6 clips of val in {tokens / 'val'}" in capsys.readouterr().out
    assert run("encode", model, *options) == 0  # nothing is left to do
    assert len(open_dataset(tokens, "train")) == 6
    train = ["--vqvae", model, "--data", tokens, *TRAIN, "--train.preview-every", 0]
    small = ["--gpt.width", 24, "--gpt.layers", 1]
    assert run("train-gpt", "--out", out, *train, *small) == 0
    assert VideoGPT.from_pretrained(out).label_names[-1] == "99"


def test_info(model, capsys):
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert "moving-mnist" in printed
    assert torch.__version__ in printed
    assert run("info", model) == 0
    assert "latent_shape = [2, 4, 4]" in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "who"), [(None, "tinyvgpt: "), ("1", "tinyvgpt, process 1: ")])
def test_lines_say_which_process(monkeypatch, capsys, rank, who):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert run("sample", "nowhere") == 2
    assert capsys.readouterr().err.startswith(f"{who}no model 'nowhere'")


def test_info_on_a_gpu(monkeypatch, capsys):
    """It says which attention kernels training uses there."""
    gpu = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert "CUDA device: Some GPU" in printed
    assert "in training CUDNN_ATTENTION, else FLASH_ATTENTION" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smaple"], "did you mean sample?"),
        (["sample", "nowhere"], "no model 'nowhere'"),
        (["sample", "moving-mnist", "--labels", "xx"], "no class named 'xx'"),
        (["sample", "moving-mnist", "--frames", "missing.mp4"], "missing.mp4"),
        (["train-gpt", "--out", "x"], "give --vqvae"),
        (["train-vqvae", "--out", "x", "--preset", "huge"], "no preset 'huge'"),
        (["train-vqvae", "--out", "x", "--vqvae.downsample", "3", "4", "4"], "powers of two"),
        (["train-vqvae", "--out", "x", "--data", "moving-minst"], "moving-mnist"),
        (["train-vqvae", "--out", "x", "--train.device", "cuda"], "no CUDA device"),
        (["train-vqvae", "--out", "x", "--data", "gone.h5"], "no file or folder 'gone.h5'"),
        (["train-vqvae", "--out", "x", "--sample-fps", "8"], "moving-mnist has no option 'fps'"),
        (["encode", "moving-mnist", "--out", "x"], "--data"),
        (
            ["encode", "moving-mnist", "--data", "moving-mnist", "--out", "x", "--device", "mps"],
            "mps",
        ),
        (["look", "robot-push", "--n", "0"], "n is 0, it must be at least 1"),
        (["reconstruct", "moving-mnist", "--n", "0"], "n is 0, it must be at least 1"),
        (["encode", "moving-mnist", "--data", "robot-push", "--out", "x", "--splits"], "is empty"),
        (["bench", "data", "--batch", "0"], "batch is 0, it must be at least 1"),
        (["bench", "coffee"], "no benchmark 'coffee'"),
        (["train-vqvae", "--out", "x", "--train.seed", f"{10**20}"], "seed is 1000"),
        (["evaluate", "moving-mnist", "--seed", f"{10**20}"], "seed is 1000"),
        (["convert", "README.md", "x"], "README.md"),
        (["sample", "moving-mnist", "--tempreture", "1"], "--temperature"),
        (["sample"], "required"),
        (["sample", "moving-mnist", "--length", "32", "--overlap", "5"], "overlap is 5"),
        (["sample", "robot-push", "--frames", "robot-push", "--length", "40"], "frames is 40"),
        (["play", "moving-mnist"], "must be a terminal"),
        (["sample", "robot-push"], "steered by actions: --frames takes them from a dataset"),
        (["sample", "moving-mnist", "--frames", "robot-push"], "channels 3, the model needs 1"),
    ],
)
def test_mistakes(words, said, capsys, tmp_path, monkeypatch):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("tinyvgpt: ")
    assert error.count("\n") == 1
    assert said in error


def test_help_comes_from_the_dataclass(capsys):
    assert run("--help") == 0
    assert "train-gpt" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run("sample", "--help")
    assert stop.value.code == 0
    assert "Draw among the k likeliest tokens." in " ".join(capsys.readouterr().out.split())
