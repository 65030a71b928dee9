"""Workflows run only what is pinned and exists; notebooks get to their branch commit by commit."""

import os
import re
import shutil
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def jobs(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def commands(path):
    """What a workflow's steps run."""
    return [s["run"] for job in jobs(path).values() for s in job["steps"] if "run" in s]


def test_all_of_them_are_there():
    assert [path.stem for path in FILES] == ["pages", "release", "tests", "weekly"]


@each_file
def test_actions_are_pinned(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.fullmatch(r" +(- )?uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_has_one_version():
    versions = defaultdict(set)
    for path in FILES:
        for action, pin in re.findall(r"uses: (\S+)@(.*)", path.read_text(encoding="utf-8")):
            versions[action].add(pin)
    assert {action for action, pins in versions.items() if len(pins) > 1} == set()


@each_file
def test_jobs_may_write_only_what_they_must(path):
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert text["permissions"] == {"contents": "read"}
    may = {name: job["permissions"] for name, job in jobs(path).items() if "permissions" in job}
    assert may == {
        "pages": {
            "notebooks": {"contents": "write"},
            "deploy": {"pages": "write", "id-token": "write"},
        },
        "release": {"publish": {"id-token": "write"}},
    }.get(path.stem, {})
    assert all("timeout-minutes" in job for job in jobs(path).values())


@each_file
def test_what_is_run_exists(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in commands(path):
        for line in command.splitlines():
            if line.startswith("make "):
                words = [word for word in line.split()[1:] if re.fullmatch(r"[a-z-]+", word)]
                assert words
                assert set(words) <= set(targets), line
            for script in re.findall(r"(?:^| )(\.?\w[\w/]*/[\w.]+\.(?:sh|py)|\.ci/run)", line):
                assert (ROOT / script).exists(), line


def test_systems_and_the_oldest_pytorch():
    path = ROOT / ".github" / "workflows" / "tests.yml"
    matrix = jobs(path)["units"]["strategy"]["matrix"]["include"]
    systems = {job["runs-on"] for job in jobs(path).values()} | {row["os"] for row in matrix}
    assert {"ubuntu-latest", "macos-latest", "windows-latest"} <= systems
    packages = {row["packages"]: row for row in matrix}
    (oldest,) = re.findall(r"torch==([\d.]+)\.\*", "\n".join(commands(path)))
    assert f"torch>={oldest}" in PROJECT["dependencies"]
    assert f">={packages['oldest']['python']}" == PROJECT["requires-python"]
    assert "-c " not in next(c for c in commands(path) if "--upgrade" in c)


def test_pages_come_after_the_notebooks_that_they_open():
    found = jobs(ROOT / ".github" / "workflows" / "pages.yml")
    assert set(found["deploy"]["needs"]) == {"build", "notebooks"}


def git(folder, *arguments):
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)
    return done.stdout.decode().strip()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of a repository with one commit."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "somebody@example.org")
    git(tmp_path, "init", "-q", "--bare", "origin")
    git(tmp_path, "clone", "-q", f"file://{tmp_path}/origin", "clone")
    (tmp_path / "clone" / "source.md").write_text("a source")
    git(tmp_path / "clone", "add", "--all")
    git(tmp_path / "clone", "commit", "-qm", "source")
    return tmp_path / "clone"


@pytest.mark.skipif(os.name == "nt", reason="a script for bash")
def test_notebooks_are_published_commit_by_commit(clone):
    script, made = str(ROOT / "book" / "notebooks" / "publish.sh"), clone.parent / "made"
    origin, history = clone.parent / "origin", []
    contents = [
        {"book/1.ipynb": "one", "book/2.ipynb": "two", ".binder/environment.yml": "x"},
        {"book/1.ipynb": "one", "book/2.ipynb": "two", ".binder/environment.yml": "x"},
        {"book/1.ipynb": "other", ".binder/environment.yml": "x"},
    ]
    for files in contents:
        shutil.rmtree(made, ignore_errors=True)
        for name, content in files.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(content)
        subprocess.run([script, str(made)], cwd=clone, check=True, capture_output=True)
        listed = git(origin, "ls-tree", "-r", "--name-only", "notebooks").splitlines()
        assert sorted(listed) == sorted(files)
        history.append(git(origin, "rev-list", "notebooks").splitlines())
        assert git(clone, "status", "--porcelain") == ""
        assert len(git(clone, "worktree", "list").splitlines()) == 1
    assert [len(commits) for commits in history] == [1, 1, 2]
    assert history[2][1] == history[1][0]  # what was pulled before can be pulled again
    assert git(origin, "show", "notebooks:book/1.ipynb") == "other"
