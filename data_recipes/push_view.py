"""How robot_push.py sees its world: MuJoCo's renderer, without a screen.

A frame is rendered at four times its size each way and averaged down, which smooths edges and
shadows alike. Cameras, lights and background never change, so what nothing moves over keeps its
value to the bit. A software renderer (Mesa's llvmpipe, whether through EGL or OSMesa) gives the
same pixels every time; a GPU's may differ from them in the last bit.
"""

import atexit

import mujoco
import numpy as np
from push_world import FINE, SIDE, World, world_xml

CAMERAS = ("main", "aux1")
MOST_SHAPES = 100  # that a scene is made of; ours has about thirty


class Eyes:
    """Renders worlds. One OpenGL context serves them all: they differ in no texture and no mesh."""

    def __init__(self):
        """Opens a context of the back end that MUJOCO_GL named when mujoco was imported."""
        self._gl = mujoco.GLContext(FINE, FINE)
        atexit.register(self._gl.free)  # before EGL itself ends
        self._gl.make_current()
        empty = mujoco.MjModel.from_xml_string(world_xml([]))
        self._context = mujoco.MjrContext(empty, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._rectangle = mujoco.MjrRect(0, 0, FINE, FINE)
        self._fine = np.empty((FINE, FINE, 3), np.uint8)

    def open(self, world: World) -> None:
        """Turns to another world, for the calls of `see` that follow."""
        self._world = world
        self._scene = mujoco.MjvScene(world.model, MOST_SHAPES)

    def see(self, camera: str) -> np.ndarray:
        """What a camera sees at this moment, uint8 (SIDE, SIDE, 3)."""
        model, data = self._world.model, self._world.data
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, view, everything, self._scene)
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(self._fine, None, self._rectangle, self._context)
        return smaller(self._fine[::-1])  # OpenGL's first row is the lowest


def smaller(picture: np.ndarray) -> np.ndarray:
    """A picture's means over squares, rounded: uint8 (FINE, FINE, 3) → (SIDE, SIDE, 3)."""
    times = FINE // SIDE
    sums = picture.reshape(SIDE, times, SIDE, times, 3).sum((1, 3), dtype=np.uint16)
    return ((sums + times**2 // 2) // times**2).astype(np.uint8)
