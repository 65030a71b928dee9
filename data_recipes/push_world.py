"""The world of robot_push.py: a small arm above a tray of coloured objects, in MuJoCo.

The arm stands behind the tray: a turret that turns, an upper arm, a forearm and a wrist that keeps
the hand vertical, and the hand turns about its own axis. So five joints carry out what a command
asks for: a place of the fingertips and a turn of the hand. `joint_angles` is their inverse
kinematics in closed form. The joints are driven by servos of limited torque, so an object that is
stuck stops the hand instead of being crushed. Objects are boxes, cylinders, capsules and balls
that slide, tip and roll with friction; the tray's rim, and invisible walls on top of it, keep them
inside.

Lengths are metres, angles radians, times seconds. x points from the arm over the tray towards the
camera, y to the right in the picture, z up; the origin is the middle of the tray's floor.

Shapes: n objects · J = 5 joints.
"""

from dataclasses import dataclass

import mujoco
import numpy as np

TIMESTEP = 0.002
FRAME_SECONDS = 0.1  # between two frames
TRAVEL = 0.75  # part of a frame's time in which a command is carried out; then the hand settles
SERVO_STEPS = 2  # timesteps between two set points of the servos

TRAY = np.array([0.20, 0.26])  # half the length of the floor along x and y
RIM, RIM_THICKNESS = 0.045, 0.012
REACH = TRAY - 0.07  # the fingertips stay this far inside, so that no object is crushed at the rim
LOW, HIGH = 0.014, 0.12  # heights of the fingertips above the floor

BASE_X, SHOULDER = -0.40, 0.27  # where the turret stands, height of the shoulder
UPPER, FORE, HAND = 0.36, 0.36, 0.16  # lengths; the hand's from the wrist to the fingertips
JOINTS = ("turret", "shoulder", "elbow", "wrist", "hand")
STIFFNESS, TORQUE = 600.0, (8.0, 8.0, 6.0, 2.0, 1.0)  # N·m/rad; N·m, the most a servo gives

COLOURS = {  # of objects, far apart in hue or lightness
    "red": (0.86, 0.13, 0.13),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.98, 0.85, 0.15),
    "green": (0.15, 0.62, 0.22),
    "blue": (0.12, 0.32, 0.85),
    "purple": (0.52, 0.20, 0.68),
    "white": (0.95, 0.95, 0.93),
}
SHAPES = ("box", "cylinder", "capsule", "sphere")
MOST_OBJECTS = 5
SIDE = 64  # pixels of a frame, each way
FINE = 4 * SIDE  # and of the rendered picture that it is a smaller version of


@dataclass(frozen=True)
class Thing:
    """An object of the tray at its start."""

    shape: str  # one of SHAPES
    colour: str  # one of COLOURS
    size: tuple[float, ...]  # as MuJoCo's geom: half lengths of a box, radius and half height, …
    position: tuple[float, float]  # x, y
    turn: float  # about z

    @property
    def height(self) -> float:
        """Height of its middle above the floor as it lies there."""
        return {"box": self.size[-1], "cylinder": self.size[-1]}.get(self.shape, self.size[0])

    @property
    def radius(self) -> float:
        """Radius of a circle around it, seen from above."""
        if self.shape == "box":
            return float(np.hypot(*self.size[:2]))
        return sum(self.size) if self.shape == "capsule" else self.size[0]


def joint_angles(tip: np.ndarray, turn: float) -> np.ndarray:
    """Angles (5,) that bring the fingertips to `tip` (3,), the hand vertical and turned by `turn`.

    The wrist is HAND above the fingertips; turret and wrist span a vertical plane, in which upper
    arm and forearm are two sides of a triangle, elbow up.
    """
    turret = np.arctan2(tip[1], tip[0] - BASE_X)
    out, up = np.hypot(tip[0] - BASE_X, tip[1]), tip[2] + HAND - SHOULDER
    cosine = (out**2 + up**2 - UPPER**2 - FORE**2) / (2 * UPPER * FORE)
    bend = np.arccos(np.clip(cosine, -1, 1))
    rise = np.arctan2(up, out) + np.arctan2(FORE * np.sin(bend), UPPER + FORE * np.cos(bend))
    return np.array([turret, -rise, bend, rise - bend, turn - turret])


def _object_xml(index: int, thing: Thing) -> str:
    half = thing.turn / 2
    # A capsule lies on its side: its axis, z at first, is turned to x and then about z.
    quaternion = np.array([np.cos(half), 0, 0, np.sin(half)])
    if thing.shape == "capsule":
        quaternion = np.array([np.cos(half), -np.sin(half), np.cos(half), np.sin(half)])
    numbers = {
        "pos": (*thing.position, thing.height),
        "quat": quaternion / np.linalg.norm(quaternion),
        "size": thing.size,
        "rgba": (*COLOURS[thing.colour], 1),
    }
    text = {name: " ".join(f"{value:.9g}" for value in row) for name, row in numbers.items()}
    return (
        f'<body name="object{index}" pos="{text["pos"]}" quat="{text["quat"]}">'
        '<joint type="free" damping="0.0004" armature="0"/>'
        f'<geom class="object" type="{thing.shape}" size="{text["size"]}" rgba="{text["rgba"]}"/>'
        "</body>"
    )


def _tray_xml() -> str:
    """Floor, rim, and the invisible walls above the rim that only objects feel."""
    x, y = TRAY
    t, deep = RIM_THICKNESS, 0.02  # half of each thickness
    parts = [
        f'<geom class="tray" type="box" size="{x} {y} {deep}" pos="0 0 {-deep}" material="floor"/>'
    ]
    for sign in (-1, 1):
        for pos, half in (
            ((sign * (x + t), 0), (t, y + 2 * t)),
            ((0, sign * (y + t)), (x, t)),
        ):
            parts.append(
                f'<geom class="tray" type="box" size="{half[0]} {half[1]} {RIM / 2 + deep}" '
                f'pos="{pos[0]} {pos[1]} {RIM / 2 - deep}" material="rim"/>'
            )
            parts.append(
                f'<geom class="wall" type="box" size="{half[0]} {half[1]} 0.2" '
                f'pos="{pos[0]} {pos[1]} {RIM + 0.2}"/>'
            )
    return "".join(parts)


ARM = f"""
<body name="turret" pos="{BASE_X} 0 {SHOULDER}" gravcomp="1">
  <joint name="turret" axis="0 0 1"/>
  <geom class="arm" type="cylinder" size="0.055 0.04" material="joint"/>
  <body name="upper" gravcomp="1">
    <joint name="shoulder" axis="0 1 0"/>
    <geom class="arm" type="capsule" fromto="0 0 0 {UPPER} 0 0" size="0.036" material="link"/>
    <body name="fore" pos="{UPPER} 0 0" gravcomp="1">
      <joint name="elbow" axis="0 1 0"/>
      <geom class="arm" type="cylinder" fromto="0 -0.045 0 0 0.045 0" size="0.044"
            material="joint"/>
      <geom class="arm" type="capsule" fromto="0 0 0 {FORE} 0 0" size="0.030" material="link"/>
      <body name="wrist" pos="{FORE} 0 0" gravcomp="1">
        <joint name="wrist" axis="0 1 0"/>
        <geom class="arm" type="cylinder" fromto="0 -0.036 0 0 0.036 0" size="0.036"
              material="joint"/>
        <body name="hand" gravcomp="1">
          <joint name="hand" axis="0 0 1"/>
          <geom class="arm" type="cylinder" fromto="0 0 0 0 0 -0.07" size="0.022" material="joint"/>
          <geom class="finger" type="box" size="0.018 0.046 0.014" pos="0 0 -0.076"
                material="grip"/>
          <geom class="finger" type="box" size="0.013 0.018 0.038" pos="0 -0.022 {0.038 - HAND}"
                material="grip"/>
          <geom class="finger" type="box" size="0.013 0.018 0.038" pos="0 0.022 {0.038 - HAND}"
                material="grip"/>
          <site name="tip" pos="0 0 {-HAND}"/>
        </body>
      </body>
    </body>
  </body>
</body>
"""


def world_xml(things: list[Thing]) -> str:
    """MuJoCo's description of the arm, the tray, the lights, the two cameras and these objects."""
    servos = "".join(
        f'<position joint="{name}" kp="{STIFFNESS}" dampratio="1" forcerange="{-most} {most}"/>'
        for name, most in zip(JOINTS, TORQUE, strict=True)
    )
    return f"""
<mujoco>
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="5"/>
  <visual>
    <global offwidth="{FINE}" offheight="{FINE}"/>
    <quality shadowsize="1024" offsamples="0" numslices="28" numstacks="16"/>
    <headlight ambient="0.34 0.34 0.36" diffuse="0.22 0.22 0.22" specular="0 0 0"/>
    <map znear="0.05" zfar="20" shadowclip="1.2" shadowscale="0.7"/>
  </visual>
  <default>
    <joint armature="0.03" damping="0.1"/>
    <default class="arm"><geom contype="0" conaffinity="0" group="1" density="100"/></default>
    <default class="finger">
      <geom contype="2" conaffinity="1" friction="0.5 0.005 0.0001" group="1" mass="0.05"/>
    </default>
    <default class="tray">
      <geom contype="1" conaffinity="1" friction="0.45 0.01 0.002"/>
    </default>
    <default class="wall">
      <geom contype="1" conaffinity="1" friction="0.1 0.005 0.0001" group="4"/>
    </default>
    <default class="object">
      <geom contype="1" conaffinity="3" condim="6" friction="0.45 0.01 0.002" density="500"
            solref="0.005 1"/>
    </default>
  </default>
  <asset>
    <material name="floor" rgba="0.80 0.73 0.60 1" specular="0" shininess="0"/>
    <material name="rim" rgba="0.50 0.36 0.22 1" specular="0" shininess="0"/>
    <material name="table" rgba="0.20 0.24 0.30 1" specular="0" shininess="0"/>
    <material name="link" rgba="0.82 0.84 0.87 1" specular="0.2" shininess="0.3"/>
    <material name="joint" rgba="0.16 0.17 0.20 1" specular="0.2" shininess="0.3"/>
    <material name="grip" rgba="0.42 0.45 0.50 1" specular="0.2" shininess="0.3"/>
  </asset>
  <worldbody>
    <light directional="true" pos="0.3 -0.4 1.5" dir="-0.25 0.35 -1" diffuse="0.55 0.53 0.50"
           specular="0.25 0.25 0.25" castshadow="true"/>
    <camera name="aux1" {look((0.62, -0.26, 0.64), (-0.015, 0.026, 0.01))} fovy="43.5"/>
    <camera name="main" {look((0.46, 0.50, 0.66), (-0.018, -0.003, 0.0))} fovy="44"/>
    <geom type="plane" size="3 3 0.1" pos="0 0 -0.04" material="table" contype="0"
          conaffinity="0"/>
    <geom class="arm" type="cylinder" fromto="{BASE_X} 0 -0.04 {BASE_X} 0 {SHOULDER}" size="0.05"
          material="joint"/>
    {_tray_xml()}
    {ARM}
    {"".join(_object_xml(index, thing) for index, thing in enumerate(things))}
  </worldbody>
  <actuator>{servos}</actuator>
</mujoco>"""


def look(eye: tuple[float, float, float], at: tuple[float, float, float]) -> str:
    """A camera's `pos` and `xyaxes`, at `eye`, looking at `at`, upright."""
    back = np.subtract(eye, at) / np.linalg.norm(np.subtract(eye, at))
    right = np.cross((0, 0, 1), back)
    right /= np.linalg.norm(right)
    axes = (*right, *np.cross(back, right))
    return f'pos="{" ".join(map(str, eye))}" xyaxes="{" ".join(f"{value:.9g}" for value in axes)}"'


class World:
    """The simulation of one clip; cameras see it through push_view's `Eyes`."""

    def __init__(self, things: list[Thing], tip: np.ndarray, turn: float):
        """Puts the objects on the floor and the hand where it is told, and lets all come to rest.

        Args:
            things: the objects, at most MOST_OBJECTS.
            tip: where the fingertips start, (3,).
            turn: the hand's turn.
        """
        self.model = mujoco.MjModel.from_xml_string(world_xml(things))
        self.data = mujoco.MjData(self.model)
        self.objects = [self.model.body(f"object{index}").id for index in range(len(things))]
        self.data.qpos[: len(JOINTS)] = joint_angles(tip, turn)
        self.move((tip, turn), (tip, turn))
        self.move((tip, turn), (tip, turn))

    def move(self, old: tuple[np.ndarray, float], new: tuple[np.ndarray, float]) -> None:
        """Goes on by a frame, while the command glides from `old` to `new`: (tip, turn) each."""
        steps = round(FRAME_SECONDS / TIMESTEP)
        for step in range(0, steps, SERVO_STEPS):
            part = min((step + SERVO_STEPS) / (TRAVEL * steps), 1.0)
            tip, turn = ((1 - part) * a + part * b for a, b in zip(old, new, strict=True))
            self.data.ctrl[:] = joint_angles(tip, turn)
            mujoco.mj_step(self.model, self.data, SERVO_STEPS)
        mujoco.mj_forward(self.model, self.data)

    def tip(self) -> np.ndarray:
        """Where the fingertips are, (3,)."""
        return self.data.site("tip").xpos.copy()

    def middles(self) -> np.ndarray:
        """Where the objects' middles are, (n, 3)."""
        return self.data.xpos[self.objects].copy()

    def pixels(self, camera: str) -> np.ndarray:
        """Where a camera sees the objects' middles: (n, 2), pixels to the right and down."""
        view = self.data.camera(camera)
        local = (self.middles() - view.xpos) @ view.xmat.reshape(3, 3)
        focal = SIDE / 2 / np.tan(np.deg2rad(self.model.camera(camera).fovy[0]) / 2)
        return SIDE / 2 + focal * local[:, :2] * (1, -1) / -local[:, 2:]
