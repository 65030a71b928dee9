"""Which OpenGL the robot simulator renders with: what doesn't work here is named."""

import os
from importlib.util import find_spec

import gl_backend
import pytest

pytestmark = pytest.mark.skipif(
    find_spec("mujoco") is None,  # not imported here: it would choose a back end by that
    reason="the simulator needs the extra: pip install 'tinyvgpt[data]'",
)


def test_a_back_end_of_another_name_is_refused(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(ValueError, match="MUJOCO_GL is 'glfw', it must be one of egl, osmesa"):
        gl_backend.choose()


def test_an_egl_without_a_driver_does_not_work(monkeypatch):
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", os.devnull)
    with pytest.raises(OSError, match="egl doesn't work here; on Debian"):
        gl_backend.choose("egl")


def test_a_driver_that_hangs_does_not_work(tmp_path, monkeypatch):
    (tmp_path / "mujoco.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gl_backend, "PATIENCE", 0.5)
    with pytest.raises(OSError, match="egl doesn't work here; on Debian"):
        gl_backend.choose("egl")
