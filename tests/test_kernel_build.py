"""Compiling kernels: what comes out, what is kept, and what is said when something is wrong."""

import io
import os
import subprocess
import sys

import pytest

pytest.importorskip("cuda.core")
from tinyvgpt.kernels import build

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"]
SMALL = """
template <class T, int N> __global__ void add(const T* x, T* y) {
    y[threadIdx.x] = x[threadIdx.x] + (T)N;
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYVGPT_KERNELS", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cubin_and_what_the_assembler_says(arch):
    log = io.StringIO()
    name, cubin = build.compiled(SMALL, "add<float, 3>", arch, log)
    assert cubin.startswith(b"\x7fELF")
    assert "add" in name
    assert name.encode() in cubin
    assert "registers" in log.getvalue()


def test_the_second_time_it_comes_from_disk(folder, monkeypatch):
    first = build.kept(SMALL, "add<int, 1>", "sm_80")
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(build, "compiled", lambda *args: pytest.fail("compiled again"))
    assert build.kept(SMALL, "add<int, 1>", "sm_80") == first


@pytest.mark.parametrize(
    "other",
    [(SMALL + " ", "add<int, 1>", "sm_80"), (SMALL, "add<int, 2>", "sm_80"),
     (SMALL, "add<int, 1>", "sm_86")],
)  # fmt: skip
def test_what_differs_is_kept_apart(folder, other):
    build.kept(SMALL, "add<int, 1>", "sm_80")
    build.kept(*other)
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINYVGPT_KERNELS", str(tmp_path / "file" / "kept"))
    assert build.kept(SMALL, "add<int, 1>", "sm_80")[1].startswith(b"\x7fELF")


def test_several_processes_at_once(folder):
    code = f"from tinyvgpt.kernels import build; build.kept({SMALL!r}, 'add<int, 5>', 'sm_80')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (file,) = folder.iterdir()
    assert file.suffix == ".cubin"


def test_the_first_error_is_shown(folder):
    wrong = SMALL.replace("(T)N", "nothing")
    with pytest.raises(RuntimeError, match=r'add<int, 1> does not compile for sm_80: .*"nothing"'):
        build.kept(wrong, "add<int, 1>", "sm_80")
    assert not folder.exists()
