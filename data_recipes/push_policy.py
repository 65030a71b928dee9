"""What the arm of robot_push.py does: it goes to an object and pushes through it, again and again.

Actions are drawn from a numpy generator alone, so a clip is a pure function of its seed. A plan is
a place beside an object, a direction and a distance, or now and then a few random places; the arm
follows it with a step that never exceeds STEP, plus noise that is alike from frame to frame.

Shapes: n objects · an action is dx, dy, dz (metres) and a turn (radians).
"""

from dataclasses import dataclass

import numpy as np
from push_world import COLOURS, HIGH, LOW, MOST_OBJECTS, REACH, SHAPES, TRAY, Thing

STEP = 0.040  # most that an action moves along an axis
MOST = np.array([STEP, STEP, STEP, 0.35])  # of an action's numbers
NOISE = np.array([0.002, 0.002, 0.001, 0.03])  # standard deviations of what is added to them
FEWEST_OBJECTS = 3
WANDER = 0.2  # part of the plans that ignore the objects
BESIDE = 0.042  # from an object's edge to where a push begins
LOWER = np.array([*-REACH, LOW])
UPPER = np.array([*REACH, HIGH])
QUARTER = np.pi / 2  # the hand turns so far to each side


@dataclass(frozen=True)
class Plan:
    """Where the hand wants to go: to `start` above the objects, down, and on to `end`."""

    start: np.ndarray  # (2,)
    end: np.ndarray  # (2,)
    low: float  # height of the fingertips on the way from start to end
    high: float  # and on the way to start
    speed: float  # metres a frame
    turn: float


def scatter(rng: np.random.Generator) -> list[Thing]:
    """Three to five objects of different colours that don't touch each other or the rim."""
    colours = rng.permutation(list(COLOURS))
    things: list[Thing] = []
    count = rng.integers(FEWEST_OBJECTS, MOST_OBJECTS + 1)
    while len(things) < count:
        shape = str(rng.choice(SHAPES))
        size = {
            "box": rng.uniform((0.030, 0.030, 0.024), (0.045, 0.045, 0.038)),
            "cylinder": rng.uniform((0.030, 0.024), (0.041, 0.042)),
            "capsule": rng.uniform((0.023, 0.027), (0.029, 0.046)),
            "sphere": rng.uniform((0.031,), (0.041,)),
        }[shape]
        thing = Thing(
            shape,
            str(colours[len(things)]),
            tuple(size),
            tuple(rng.uniform(-1, 1, 2) * (TRAY - 0.05)),
            rng.uniform(0, np.pi),
        )
        inside = np.all(np.abs(thing.position) + thing.radius < TRAY - 0.005)
        apart = all(
            np.hypot(*np.subtract(thing.position, other.position))
            > thing.radius + other.radius + 0.01
            for other in things
        )
        if inside and apart:
            things.append(thing)
    return things


def room(place: np.ndarray, middles: np.ndarray, radii: np.ndarray) -> bool:
    """Whether the hand can come down at `place` (2,) between objects at `middles` (n, 2)."""
    away = np.linalg.norm(middles - place, axis=1) - radii
    return bool(np.all(np.abs(place) <= REACH) and np.all(away > BESIDE - 1e-9))


def push(
    rng: np.random.Generator, index: int, middles: np.ndarray, radii: np.ndarray
) -> Plan | None:
    """A push through object `index`, or None where twenty directions leave no room.

    Args:
        rng: the source of chance.
        index: which of the objects.
        middles: where all of them are, (n, 2).
        radii: of circles around them, (n,).
    """
    middle, radius = middles[index], radii[index]
    for _ in range(20):
        angle = rng.uniform(-np.pi, np.pi)
        direction = np.array([np.cos(angle), np.sin(angle)])
        start = middle - (radius + BESIDE) * direction
        end = np.clip(middle + rng.uniform(0.05, 0.22) * direction, -REACH, REACH)
        if room(start, middles, radii) and np.linalg.norm(end - start) > 0.10:
            # The two fingers stand side by side across the way.
            turn = (angle + QUARTER + 0.2 * rng.normal()) % np.pi - QUARTER
            return _plan(rng, start, end, turn, low=rng.uniform(LOW, LOW + 0.01))
    return None


def wander(rng: np.random.Generator) -> Plan:
    """From one random place to another, high or low."""
    start, end = rng.uniform(-REACH, REACH, (2, 2))
    return _plan(rng, start, end, rng.uniform(-QUARTER, QUARTER), low=rng.uniform(LOW, HIGH))


def _plan(
    rng: np.random.Generator, start: np.ndarray, end: np.ndarray, turn: float, low: float
) -> Plan:
    return Plan(start, end, low, rng.uniform(0.085, HIGH), rng.uniform(0.024, STEP), turn)


class Policy:
    """Chooses the actions of one clip."""

    def __init__(self, rng: np.random.Generator, things: list[Thing]):
        """Makes a first plan, and chooses where the hand starts.

        Args:
            rng: the only source of chance; the policy goes on drawing from it.
            things: the objects.
        """
        self._rng = rng
        self._radii = np.array([thing.radius for thing in things])
        middles = np.array([thing.position for thing in things])
        self._plan = self._next(middles)
        self._sweeping = rng.random() < 0.6 and room(self._plan.start, middles, self._radii)
        if self._sweeping:
            tip = [*self._plan.start, self._plan.low]
        else:
            tip = [*rng.uniform(-REACH, REACH), self._plan.high]
        self.tip = np.clip(tip, LOWER, UPPER)  # what is commanded, not where the arm is
        self.turn = self._plan.turn if self._sweeping else rng.uniform(-QUARTER, QUARTER)
        self._noise = np.zeros(4)

    def _next(self, middles: np.ndarray) -> Plan:
        """A new plan, with the objects at `middles` (n, 2)."""
        for index in self._rng.permutation(len(middles)):
            if self._rng.random() < WANDER:
                break
            plan = push(self._rng, index, middles, self._radii)
            if plan is not None:
                return plan
        return wander(self._rng)

    def act(self, middles: np.ndarray) -> np.ndarray:
        """The next action, float32 (4,); `tip` and `turn` are then what it commands.

        Args:
            middles: where the objects are, (n, 3).
        """
        goal = self._plan.end if self._sweeping else self._plan.start
        if np.linalg.norm(goal - self.tip[:2]) < 0.012 and (
            self._sweeping or self.tip[2] - self._plan.low < 0.01
        ):
            if self._sweeping:
                self._plan = self._next(middles[:, :2])
            self._sweeping = not self._sweeping
            goal = self._plan.end if self._sweeping else self._plan.start
        way = goal - self.tip[:2]
        far = np.linalg.norm(way)
        height = self._plan.low if self._sweeping or far < 0.03 else self._plan.high
        if not self._sweeping and self.tip[2] < 0.07 and far > 0.03:
            way = way * 0.3  # first up, then on
        wish = np.array(
            [
                *way * min(1, self._plan.speed / max(far, 1e-9)),
                height - self.tip[2],
                self._plan.turn - self.turn,
            ]
        )
        self._noise = 0.6 * self._noise + self._rng.normal(size=4) * NOISE
        action = np.clip(wish + self._noise, -MOST, MOST)
        tip = np.clip(self.tip + action[:3], LOWER, UPPER)
        turn = np.clip(self.turn + action[3], -QUARTER, QUARTER)
        action = np.array([*tip - self.tip, turn - self.turn], np.float32)
        self.tip, self.turn = self.tip + action[:3], self.turn + action[3]
        return action
