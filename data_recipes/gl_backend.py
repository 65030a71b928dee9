"""Which OpenGL MuJoCo renders with where there is no screen: EGL, or OSMesa.

MuJoCo decides when it is imported, by the environment variable MUJOCO_GL, and once a try has failed
a process can't try the other. So each back end is tried in a process of its own, and `choose` sets
the variable before this process imports mujoco.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

BACKENDS = ("egl", "osmesa")  # in the order of trying
PATIENCE = 120  # seconds; a driver that hangs does not work
PROBE = """
import mujoco
context = mujoco.GLContext(64, 64)
context.make_current()
from OpenGL import GL
print("renderer:", GL.glGetString(GL.GL_RENDERER).decode())
context.free()
"""
PACKAGES = "on Debian or Ubuntu: apt-get install libosmesa6, or libegl1 libopengl0 libgl1-mesa-dri"


def environment(backend: str) -> dict[str, str]:
    """What a process needs in its environment to render with this back end."""
    # A software renderer uses one thread: clips are made in parallel already.
    return {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend, "LP_NUM_THREADS": "0"}


def probe(backend: str) -> str | None:
    """The renderer that a back end has here, or None where it can't render."""
    try:
        process = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**os.environ, **environment(backend)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return None
    found = [line for line in process.stdout.splitlines() if line.startswith("renderer: ")]
    return found[0].removeprefix("renderer: ") if found and process.returncode == 0 else None


def choose(asked: str = "auto") -> tuple[str, str]:
    """Finds a back end that works, and sets the environment for it and for child processes.

    Args:
        asked: "egl", "osmesa", or "auto": what MUJOCO_GL says, else the first that works.

    Returns:
        The back end and its renderer's name.

    Raises:
        ValueError: MUJOCO_GL names something else.
        OSError: no back end works here; says what to install.
        ImportError: MuJoCo is not installed.
    """
    if find_spec("mujoco") is None:
        raise ImportError("the simulator needs MuJoCo, which is not installed: pip install mujoco")
    named = os.environ.get("MUJOCO_GL", "").lower() if asked == "auto" else asked
    if named and named not in BACKENDS:
        raise ValueError(f"MUJOCO_GL is {named!r}, it must be one of {', '.join(BACKENDS)}")
    wanted = (named,) if named else BACKENDS
    for backend in wanted:
        renderer = probe(backend)
        if renderer is not None:
            os.environ.update(environment(backend))
            return backend, renderer
    tried = "neither egl nor osmesa works" if len(wanted) > 1 else f"{wanted[0]} doesn't work"
    raise OSError(f"there is no OpenGL to render with, {tried} here; {PACKAGES}")
