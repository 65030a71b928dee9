"""When each frame of a video file is on screen, and where decoding may begin: what a seek needs.

`scan` finds it without decoding the file: a packet of the common codecs is a frame, and its
timestamp the frame's. The first frames are decoded all the same, to see that the file is so; where
it is not, the whole file is decoded once, and its frames are counted from its beginning rather than
found by their timestamps. Chapter 02 uses it.

Shapes: n frames in a video · T frames in a clip.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyvgpt.container import cut_short, explained, frame_length, opened, rounding, timed
from tinyvgpt.write import import_av

Runs = tuple[tuple[int, int], ...]  # (value, how often in a row) …
PACKET_IS_FRAME = {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}  # codecs; others may hide some
CHECKED = 16  # frames decoded to see whether packets and frames agree
DAY = 86_400  # seconds
LONGEST = 30 * DAY  # a video may last
SKIPPED_FRAME = 16  # bytes: an MPEG-4 packet below may say "as before", and gives no frame


@dataclass(frozen=True)
class Timeline:
    """The frames of a video in the order of display; times in units since the first one."""

    tick: Fraction  # seconds; the file's timestamps count them
    origin: int  # timestamp of the first frame, in ticks
    unit: Fraction  # seconds; the times below count them
    steps: Runs  # from each frame's time to the next one's, n - 1 in all
    end: int  # when the last frame's length is over
    keys: Runs  # frames where decoding may begin, as steps from 0; none: only at the file's start

    def __len__(self) -> int:
        """Return n, the number of frames."""
        return 1 + sum(count for _, count in self.steps)

    @property
    def times(self) -> np.ndarray:
        """When each frame appears, int64 (n,), in units."""
        return np.concatenate([[0], np.cumsum(_expand(self.steps))])

    @property
    def key_frames(self) -> np.ndarray:
        """Numbers of the frames where decoding may begin, int64, increasing."""
        return np.cumsum(_expand(self.keys))

    def stamps(self, frames: np.ndarray) -> np.ndarray:
        """The timestamps of frames in the file, int64, in ticks."""
        ticks = self.unit / self.tick
        return self.origin + self.times[frames] * ticks.numerator // ticks.denominator

    def samples(self, rate: Fraction | None) -> int:
        """How many frames `tinyvgpt.video.read` gives at so many a second; None: each one."""
        return len(self) if rate is None else max(0, int(self._passed(rate)[-1]))

    def frames_at(self, first: int, count: int, rate: Fraction | None) -> np.ndarray:
        """Which frames are on screen at samples first … first + count - 1, int64 (count,)."""
        moments = np.arange(first, first + count)
        if rate is None:
            return moments
        return np.searchsorted(self._passed(rate), moments, side="right")

    def _passed(self, rate: Fraction) -> np.ndarray:
        """How many of the moments 0, 1 / rate, … each frame and those before it fill, int64 (n,).

        A frame fills those before it leaves, give or take what its time is rounded by. The last
        one's end is rounded twice: its beginning is, and its length.
        """
        per_unit, late = self.unit * rate, rounding(self.tick) * rate  # both in moments
        below = per_unit.denominator * late.denominator
        scale, slack = per_unit.numerator * late.denominator, late.numerator * per_unit.denominator
        fits = max(abs(self.end * scale) + 2 * slack, below) < 2**62
        # Python's integers are exact, whatever their size, and take twenty times as long.
        leaves = np.append(self.times[1:], self.end).astype(np.int64 if fits else object)
        roundings = np.ones_like(leaves)
        roundings[-1] = 2
        above = leaves * scale - roundings * slack
        return np.maximum.accumulate(-(-above // below)).astype(np.int64)  # rounded up

    def to_json(self) -> dict[str, Any]:
        """It as JSON can store it."""
        fractions = {"tick": str(self.tick), "unit": str(self.unit)}
        runs = {"steps": self.steps, "keys": self.keys}
        return {**fractions, "origin": self.origin, "end": self.end, **runs}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Timeline":
        """What `to_json` stored."""
        steps, keys = (tuple((int(v), int(n)) for v, n in stored[k]) for k in ("steps", "keys"))
        tick, unit = Fraction(stored["tick"]), Fraction(stored["unit"])
        return cls(tick, int(stored["origin"]), unit, steps, int(stored["end"]), keys)


def scan(path: Path) -> Timeline:
    """Find the frames of a video file.

    Raises:
        ValueError: as `tinyvgpt.video.read` does for a file that it refuses; the reason begins with
            the path.
        OSError: the file is missing or may not be read.
        ImportError: PyAV is not installed.
    """
    with explained(path):
        with opened(path) as (container, stream):
            timeline = _from_packets(container, stream, path)
        if timeline is None:
            with opened(path) as (container, stream):
                timeline = _from_frames(container, stream, path)
    return timeline


class _Packet(NamedTuple):
    """What a packet says of its frame; times in ticks."""

    pts: Any  # when the frame appears; None where the file doesn't say
    dts: Any  # when it is decoded, or None
    duration: int  # 0: unknown
    is_keyframe: bool
    size: int  # bytes


def _from_packets(container: Any, stream: Any, path: Path) -> Timeline | None:
    """The timeline as the packets tell it; None if they can't be relied on."""
    shown: list[_Packet] = []
    decoded: list[int | None] = []
    last = None
    for packet in container.demux(stream):
        last = packet if packet.size else last
        if packet.size and not packet.is_discard:  # an edit list hides what it discards
            shown.append(_Packet(*(getattr(packet, field) for field in _Packet._fields)))
        if len(decoded) < CHECKED:
            decoded += [frame.pts for frame in packet.decode()]
    if last is None or last.is_corrupt or cut_short(path, stream):
        raise ValueError(f"{path} is truncated: it ends before its last frame")
    if not shown or not _reliable(container, stream, shown):
        return None
    shown.sort()
    told = [packet.pts for packet in shown]
    keys = [number for number, packet in enumerate(shown) if packet.is_keyframe]
    if told[: max(len(decoded), CHECKED)] != decoded or not keys:
        return None
    length = shown[-1].duration or frame_length(stream) / stream.time_base
    times = [Fraction(pts) for pts in told]
    return _timeline(path, stream.time_base, times, times[-1] + length, keys)


def _reliable(container: Any, stream: Any, shown: list[_Packet]) -> bool:
    """Whether each packet is a frame, and its timestamp finds it."""
    flags = import_av().format.Flags
    if flags(container.format.flags) & (flags.no_timestamps | flags.ts_discont):
        return False
    codec = stream.codec_context.codec.canonical_name
    stamps = {packet.pts for packet in shown}
    if codec not in PACKET_IS_FRAME or None in stamps or len(stamps) < len(shown):
        return False
    if codec == "mpeg4" and min(packet.size for packet in shown) < SKIPPED_FRAME:
        return False
    # AVI has no timestamps: FFmpeg counts packets, and guesses where they are out of order.
    return container.format.name != "avi" or all(packet.pts == packet.dts for packet in shown)


def _from_frames(container: Any, stream: Any, path: Path) -> Timeline:
    """The timeline that decoding everything shows."""
    tick = stream.time_base
    times, end = [], Fraction(0)
    for time, length, _ in timed(container, stream, path):
        times.append(time / tick)
        end = (time + length) / tick
    if not times:
        raise ValueError(f"{path} has no frame that can be decoded")
    return _timeline(path, tick, times, end, [])


def _timeline(
    path: Path, tick: Fraction, times: list[Fraction], end: Fraction, keys: list[int]
) -> Timeline:
    """Of times in ticks, in units that make them whole numbers and regular ones small."""
    since = [(time - times[0]) * tick for time in [*times, end]]
    if max(since) > LONGEST:
        days = float(max(since) / DAY)
        raise ValueError(f"{path} has damaged timestamps, by which it lasts {days:.3g} days")
    unit = Fraction(1, math.lcm(*(time.denominator for time in since)))
    counted = [int(time / unit) for time in since]
    steps = _runs(np.diff(counted[:-1]))
    return Timeline(tick, int(times[0]), unit, steps, counted[-1], _runs(np.diff(keys, prepend=0)))


def _runs(values: Iterable[int]) -> Runs:
    """Equal values in a row, as (value, count)."""
    return tuple((int(value), len(list(same))) for value, same in groupby(values))


def _expand(runs: Runs) -> np.ndarray:
    """The values that `_runs` took."""
    values, counts = zip(*runs, strict=True) if runs else ((), ())
    return np.repeat(np.array(values, np.int64), np.array(counts, np.int64))
