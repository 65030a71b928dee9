"""What is published works in an empty environment: the wheel, and notebooks from their first cell.

Slow, as PyTorch is installed; and needs a package index. `make test-install` runs it.
"""

import json
import os
import re
import subprocess
import sys
import venv
import zipfile

import nbclient
import pytest
from addresses import ROOT, Addresses, project
from convert import notebook
from labels import with_code

pytestmark = pytest.mark.slow

# Python runs this at its start. Only pip may speak to other machines.
SITECUSTOMIZE = """\
import socket, sys
from ipaddress import ip_address

connect = socket.socket.connect

def guarded(self, address):
    if self.family != socket.AF_UNIX and not ip_address(address[0]).is_loopback:
        raise OSError(f"{address} is another machine")
    return connect(self, address)

if "pip" not in sys.orig_argv:
    socket.socket.connect = guarded
"""

PLAY = """\
from tinyvgpt import VideoGPT, widget
shown = widget.play(VideoGPT.from_pretrained("robot-push"))
picture, buttons = shown.children
before = picture.value
buttons.children[0].click()
assert picture.value != before
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The folder of the built wheel, where pip looks, too; it takes CI's versions of the rest."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    workflow = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "one/book"}
    subprocess.run(pip, check=True, env=os.environ | workflow)
    with pytest.MonkeyPatch.context() as patch:
        others = os.environ.get("PIP_FIND_LINKS", "")
        patch.setenv("PIP_FIND_LINKS", f"{folder} {others}".strip())
        patch.setenv("PIP_CONSTRAINT", str(ROOT / "constraints.txt"))
        yield folder


class Clean:
    """A virtual environment with nothing in it, that no program but pip leaves."""

    def __init__(self, folder):
        venv.create(folder, with_pip=True)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        (site,) = (path for path in folder.rglob("site-packages") if (path / "pip").is_dir())
        (site / "sitecustomize.py").write_text(SITECUSTOMIZE)

    def python(self, *arguments, **options):
        """Runs its Python, which must succeed, and returns what it prints."""
        program = [str(self.bin / "python"), *arguments]
        return subprocess.run(program, check=True, capture_output=True, text=True, **options).stdout

    def pip(self, *requirements):
        """Installs packages."""
        self.python("-m", "pip", "install", "-q", *requirements)

    def versions(self):
        """Installed packages by their names."""
        listed = self.python("-m", "pip", "list", "--format", "json")
        return {package["name"]: package["version"] for package in json.loads(listed)}

    def run(self, chapter, folder, monkeypatch):
        """Runs a published notebook's cells, from the first to the last, as they stand."""
        spec = folder / "kernels" / "clean" / "kernel.json"
        spec.parent.mkdir(parents=True)
        start = [str(self.bin / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec.write_text(json.dumps({"argv": start, "display_name": "", "language": "python"}))
        monkeypatch.setenv("JUPYTER_PATH", str(folder))
        monkeypatch.setenv("TINYVGPT_BUDGET", "smoke")
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("PYTHONPATH", raising=False)
        made = notebook(chapter, Addresses("", "", f"tinyvgpt>={project()['version']}"))
        place = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(made, timeout=600, kernel_name="clean", resources=place).execute()
        return made


@pytest.fixture(scope="module")
def clean(wheels, tmp_path_factory):
    """An environment with what a notebook server brings, and no more."""
    made = Clean(tmp_path_factory.mktemp("clean"))
    made.pip("ipykernel")
    return made


def test_the_wheel_has_what_the_package_needs(wheels):
    (path,) = wheels.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names, metadata = set(wheel.namelist()), ""
        for name in names:
            if name.endswith(".dist-info/METADATA"):
                metadata = wheel.read(name).decode()
    listed = ["git", "ls-files", "tinyvgpt", "book/results"]
    tracked = subprocess.check_output(listed, cwd=ROOT, text=True).split()
    inside = {name.replace("book/results", "tinyvgpt/results") for name in tracked}
    assert {name for name in names if ".dist-info/" not in name} == inside
    assert "Project-URL: Repository, https://github.com/one/book\n" in metadata
    readme = metadata.partition("\n\n")[2]
    links = re.findall(r"\]\(([^)]*)\)", readme)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    inside = re.findall(r"\]\(https://github.com/one/book/(?:blob|raw)/v[\d.]+/([^)]*)", readme)
    assert len(inside) > 10
    assert [path for path in inside if not (ROOT / path).exists()] == []


def test_readmes_code_runs_where_only_the_wheel_is_installed(wheels, tmp_path):
    clean = Clean(tmp_path / "venv")
    clean.pip("tinyvgpt")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.partition("\n```python\n")[2].partition("\n```\n")[0]
    clean.python("-c", code, cwd=tmp_path)
    assert (tmp_path / "digits.mp4").stat().st_size > 1000
    assert len(clean.versions()) < 60  # what the package needs, no tools


@pytest.mark.parametrize("chapter", with_code(), ids=lambda path: path.stem)
def test_a_notebook_runs_where_nothing_is_installed(clean, chapter, tmp_path, monkeypatch):
    clean.run(chapter, tmp_path, monkeypatch)


def test_pytorch_and_old_widgets_stay_as_they_are(wheels, tmp_path, monkeypatch):
    """As on Colab, whose page shows the widgets of ipywidgets 7 only."""
    clean, constraints = Clean(tmp_path / "venv"), tmp_path / "constraints.txt"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints.write_text("\n".join(pin for pin in pins if "widgets" not in pin))
    monkeypatch.setenv("PIP_CONSTRAINT", str(constraints))
    clean.pip("ipykernel", "torch", "numpy", "ipywidgets==7.7.1")
    before = clean.versions()
    clean.run(ROOT / "book" / "01_clips.md", tmp_path, monkeypatch)
    after = clean.versions()
    assert "tinyvgpt" not in before
    assert before.items() <= after.items()
    clean.python("-c", PLAY)
