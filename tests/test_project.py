"""The skeleton of a student's project trains on a folder of films, and says what is wrong."""

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from videos import encode, fill, waves

from tinyvgpt import VideoGPT, video
from tinyvgpt.presets import preset

PROJECT = Path(__file__).parents[1] / "book" / "project"
TINY = {
    "project": {"fps": 15.0, "by_class": True, "shown": 2, "given": 4},
    "tokenizer": {"resolution": 32, "hidden": 8, "codes": 16, "code_dim": 4},
    "train_tokenizer": {"steps": 4, "batch_size": 2, "validate_every": 2},
    "gpt": {"width": 24, "heads": 2, "layers": 1},
    "train_gpt": {"steps": 4, "batch_size": 2, "validate_every": 2},
}
CONFIG = tomllib.loads((PROJECT / "config.toml").read_text(encoding="utf-8"))
FIELDS = [(section, field) for section, fields in CONFIG.items() for field in fields]


def written(sections):
    """Sections as TOML; JSON's numbers, strings, booleans and lists are TOML's, too."""
    lines = []
    for section, fields in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{field} = {json.dumps(value)}" for field, value in fields.items()]
    return "\n".join(lines) + "\n"


def changed(changes):
    """The shipped configuration with some fields changed, or new."""
    sections = {section: {**fields} for section, fields in CONFIG.items()}
    for section, fields in changes.items():
        sections.setdefault(section, {}).update(fields)
    return written(sections)


def train(folder):
    """Runs the script as a reader does."""
    command = [sys.executable, "train.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with script and configuration, and a folder of six films."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(PROJECT / "train.py", folder)
    for number in range(6):
        name = ("rising", "falling")[number % 2]
        film = waves(40 + number, 48, 64)[:: 1 if number % 2 else -1]
        place = folder / "videos" / ("test" if number > 3 else "train") / name
        place.mkdir(parents=True, exist_ok=True)
        encode(place / f"{number}.mp4", film.copy(), "libx264")
    return folder


@pytest.fixture(scope="module")
def trained(project):
    """What two runs of the script say; the first one has half the steps."""
    (project / "config.toml").write_text(changed(TINY), encoding="utf-8")
    first = train(project)
    checkpoint = project / "runs/first/model/checkpoint-0000004.pt"
    before = checkpoint.read_bytes() if checkpoint.exists() else b""
    return first, train(project), before == checkpoint.read_bytes()


def test_it_trains_and_draws(project, trained):
    first, _, _ = trained
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("18 clips of train, 1 clips of val, 2 clips of test")
    out = project / "runs/first"
    model = VideoGPT.from_pretrained(out / "model")
    assert model.label_names == ("falling", "rising")
    for name, rows in (("reconstructions", 2), ("samples", 1), ("continuations", 2)):
        clip = video.read(out / f"{name}.mp4")
        assert clip.shape == (16, 3 * (rows * 34 - 2), 3 * (2 * 34 - 2), 3), name


def test_a_continuation_begins_as_the_film_does(project, trained):
    sheet = video.read(project / "runs/first/continuations.mp4").float()
    film, goes_on = sheet[:, :96], sheet[:, -96:]
    apart = (film - goes_on).abs().mean((1, 2, 3))
    assert apart[:4].max() < 3
    assert apart[8:].min() > 10


def test_figures_are_those_of_the_logs(project, trained):
    figures = json.loads((project / "runs/first/figures.json").read_text())
    for stage, name in (("tokenizer", "val_psnr"), ("model", "val_bits_per_token")):
        log = (project / f"runs/first/{stage}/log.jsonl").read_text().splitlines()
        measured = [line for line in map(json.loads, log) if name in line]
        assert [line["step"] for line in measured] == [2, 4]
        assert figures[stage][name] == measured[-1][name]
    assert figures["config"]["tokenizer"]["hidden"] == 8
    assert figures["config"]["gpt"]["latent_shape"] == [4, 4, 4]


def test_run_again_it_trains_no_further(trained):
    _, second, same = trained
    assert second.returncode == 0, second.stderr
    assert same


def test_with_more_steps_it_would_be_another_run(project, trained):
    changes = {section: dict(fields) for section, fields in TINY.items()}
    changes["train_tokenizer"]["steps"] = 6
    (project / "config.toml").write_text(changed(changes), encoding="utf-8")
    refused = train(project)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("train.py: ")
    assert "of a run with other settings: steps was 4, is 6" in line


def test_the_configuration_is_the_preset():
    chosen = preset("own-videos")
    sections = (
        ("tokenizer", chosen.vqvae, {}),
        ("train_tokenizer", chosen.train_vqvae, {"validate_every"}),
        ("gpt", chosen.gpt, {}),
        ("train_gpt", chosen.train_gpt, {"validate_every"}),
    )
    for section, config, apart in sections:
        for field, value in CONFIG[section].items():
            expected = getattr(config, field)
            expected = list(expected) if isinstance(expected, tuple) else expected
            assert field in apart or value == expected, (section, field)


def test_every_field_has_a_comment():
    for line in (PROJECT / "config.toml").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"|#.+|\[\w+\].*|\w+ = \S.* # .+", line), line


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    yield importlib.import_module("train")
    del sys.modules["train"]


@pytest.fixture
def read(script, tmp_path):
    """What the script makes of a configuration's text."""

    def reading(text):
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return script.read(path)

    return reading


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_field_is_used_and_checked(read, section, field):
    value = CONFIG[section][field]
    others = {bool: lambda v: not v, int: lambda v: 2 * v or 1, float: lambda v: v / 2 or 0.5}
    others |= {str: lambda v: v + "x", list: lambda v: [2, *v[1:]]}
    other = others[type(value)](value)
    before, after = read(changed({})), read(changed({section: {field: other}}))
    assert getattr(before[section], field) != getattr(after[section], field)
    wrong = 3 if isinstance(value, str) else "three"
    with pytest.raises(ValueError, match=rf"\[{section}\]: {field} is {wrong!r}, something like "):
        read(changed({section: {field: wrong}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gpt\n", r"config.toml: .*\(at line 1, column 5\)"),
        ("tokenizer = 3\n", r"config.toml: tokenizer is 3, something like {} is needed"),
        (changed({"gtp": {"width": 24}}), r"config.toml: there is no 'gtp'; did you mean gpt\?"),
        (changed({"gpt": {"widht": 24}}), r"\[gpt\]: there is no 'widht'; did you mean width\?"),
        (changed({"gpt": {"width": 25}}), r"\[gpt\]: .*25"),
        (changed({"tokenizer": {"downsample": [4, "8", 8]}}), r"\[tokenizer\]: "),
        (changed({"tokenizer": {"downsample": [3, 8, 8]}}), r"\[tokenizer\]: downsample .* two"),
        (changed({"train_gpt": {"steps": 0}}), r"\[train_gpt\]: steps is 0, must be at least 1"),
        (changed({"project": {"folder": "vidoes"}}), r"there is no file or folder '.*vidoes'"),
        (changed({"project": {"folder": "films", "by_class": True}}), "has no class folders"),
    ],
)
def test_a_mistake_is_told_in_a_line(script, tmp_path, text, message):
    fill(tmp_path / "films", "a.mp4", "b.mp4", frames=60)
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as refusal:
        script.main(tmp_path / "config.toml")
    assert "\n" not in str(refusal.value)
