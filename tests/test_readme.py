"""README's Python runs as it stands, and the commands and files it names exist."""

import re
import tomllib
from pathlib import Path

import yaml

from tinyvgpt import cli, video

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_runs(tmp_path, monkeypatch):
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["clips"].shape == (2, 16, 64, 64, 1)
    assert (names["continued"][:, :8] == names["first"]).all()
    assert names["tokens"].shape == (1, 8, 16, 16)
    assert len(video.read("digits.mp4")) == 16
    assert names["longer"].shape == (1, 40, 64, 64, 1)
    assert names["frames"].shape == (1, 4, 64, 64, 3)


def test_commands_exist():
    lines = "\n".join(blocks("sh")).splitlines()
    words = [line.split() for line in lines if line.startswith(("tinyvgpt", "make"))]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert len(words) >= 7
    for program, command, *_ in words:
        assert command in (cli.COMMANDS if program == "tinyvgpt" else targets), command


def test_links_and_tree():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    tree = re.search(r"```\nbook/.*?```", README, flags=re.DOTALL).group()
    package = tree.split("tinyvgpt/\n")[1]
    named = set(re.findall(r"(\w+\.py|\w+/)", package))
    present = {p.name + "/" * p.is_dir() for p in (ROOT / "tinyvgpt").iterdir()}
    assert present - named - {"__init__.py", "__pycache__/"} == set()
    assert named - present == set()


def test_what_is_cited_is_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["authors"] == project["authors"]
    (entry,) = blocks("bibtex")
    assert f"{{{project['version']}}}" in entry
    assert cited["authors"][0]["name"] in entry
    title = re.search(r"title += \{(.*)\}", entry)[1]
    assert cited["title"] == title.replace("{VideoGPT}", "VideoGPT")
