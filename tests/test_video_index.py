"""The index of a video file's frames, and clips decoded with it: the same as decoding it all."""

import json
import math
import struct
import wave
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import encode, waves

from tinyvgpt import video
from tinyvgpt.data import video_clip
from tinyvgpt.data.video_clip import read_frames
from tinyvgpt.data.video_index import Timeline, scan

SIDE = 24  # resolution of the clips compared
RATES = (7, 24, 29.97, 60)
B_FRAMES = {"g": "12", "x264-params": "bframes=3:scenecut=0"}
SOUGHT = {  # clips of these begin at key frames
    "b.mp4": ("libx264", B_FRAMES),
    "open.mp4": ("libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}),
    "open.mkv": ("libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}),
    "b.mov": ("libx264", B_FRAMES),
    "pyramid.mp4": ("libx264", {"g": "30", "x264-params": "b-pyramid=normal:bframes=8:b-adapt=0"}),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=12:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12"}),
    "hidden.webm": ("libvpx-vp9", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "av1.mp4": ("libsvtav1", {"g": "12"}),
    # Of one thread its packets don't tell frames, as on a machine with one core.
    "part2.mp4": ("mpeg4", {"g": "12", "bf": "2", "threads": "2"}),
    "plain.avi": ("mpeg4", {"g": "12"}),
    "jpeg.avi": ("mjpeg", {}),
}
COUNTED = {  # of these packets don't tell what frames there are
    "b.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "h264.avi": ("libx264", B_FRAMES),
    "vp8.webm": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "palette.gif": ("gif", {}),
}
FORMATS = (
    SOUGHT
    | COUNTED
    | {
        "refresh.mov": ("libx264", {"g": "12", "x264-params": "intra-refresh=1:bframes=0"}),
    }
)
PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def make(folder):
    """Return the file of a name in FORMATS."""

    def make(name):
        codec, options = FORMATS[name]
        if codec not in av.codecs_available:
            pytest.skip(f"this PyAV has no {codec}")
        if not (folder / name).exists():
            pixels = PIXELS.get(codec, "yuv420p")
            encode(folder / name, waves(), codec, pixels=pixels, **options)
        return folder / name

    return make


@pytest.fixture
def openings(monkeypatch):
    """How often a file was opened to read frames from it."""
    opened, paths = video_clip.opened, []

    @contextmanager
    def counted(path):
        paths.append(path)
        with opened(path) as inside:
            yield inside

    monkeypatch.setattr(video_clip, "opened", counted)
    return paths


def assert_clips_agree(path, timeline, step=3, length=8, rates=RATES):
    """Clips all over the file are those that reading it from its beginning gives."""
    for fps in (None, *rates):
        rate = None if fps is None else video.frame_rate(fps)
        whole = video.read(path, fps=fps, resolution=SIDE)
        assert timeline.samples(rate) == len(whole)
        assert (whole[1:] != whole[:-1]).any()  # or nothing is compared
        for first in range(0, len(whole) - length + 1, step if fps is None else 3 * step):
            frames = timeline.frames_at(first, length, rate)
            found = read_frames(path, timeline, frames, SIDE)
            assert torch.equal(found, whole[first : first + length]), (path.name, fps, first)


@pytest.mark.parametrize("name", FORMATS)
def test_clips_are_what_decoding_everything_shows(make, name):
    path = make(name)
    assert_clips_agree(path, scan(path))


@pytest.mark.parametrize("name", ["b.mp4", "open.mkv", "hidden.webm", "b.avi"])
def test_any_frames_in_order(make, name):
    path = make(name)
    timeline, whole = scan(path), video.read(path, resolution=SIDE)
    random = np.random.default_rng(0)
    for _ in range(10):
        frames = np.sort(random.integers(0, len(whole), 6))
        assert torch.equal(read_frames(path, timeline, frames, SIDE), whole[frames])


@pytest.mark.parametrize("name", SOUGHT)
def test_seeking_lands_at_the_first_try(make, name, openings):
    timeline = scan(make(name))
    assert len(timeline.key_frames) > 1
    for first in range(0, 50, 7):
        read_frames(make(name), timeline, np.arange(first, first + 8), SIDE)
    assert len(openings) == 8


@pytest.mark.parametrize("name", COUNTED)
def test_where_packets_do_not_tell_frames_are_counted(make, name):
    timeline = scan(make(name))
    assert len(timeline) == 60
    assert timeline.keys == ()


def test_a_key_frame_that_needs_others_is_noticed(make, openings):
    path = make("refresh.mov")
    timeline = scan(path)
    assert len(timeline.key_frames) > 1  # so the file says
    read_frames(path, timeline, np.arange(40, 48), SIDE)
    assert len(openings) == 2


def test_decoding_begins_at_the_key_frame(make, folder):
    """What is before it may be rubbish; a clip that needs the rubbish is refused."""
    path = make("b.mp4")
    timeline, whole = scan(path), video.read(path, resolution=SIDE)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for position, size in packets[1:12]:  # the first group, but for its key frame
        content[position : position + size] = b"\xff" * size
    bad = folder / "rubbish.mp4"
    bad.write_bytes(content)
    assert torch.equal(read_frames(bad, timeline, np.arange(30, 38), SIDE), whole[30:38])
    with pytest.raises(ValueError, match=r"rubbish\.mp4 cannot be read"):
        read_frames(bad, timeline, np.arange(4, 12), SIDE)


def test_another_file_than_was_scanned(make, folder):
    timeline = scan(make("b.mp4"))
    short = encode(folder / "short.mp4", waves(20), "libx264", **B_FRAMES)
    with pytest.raises(ValueError, match=r"short\.mp4 is damaged or has changed: its frame 3\d"):
        read_frames(short, timeline, np.arange(30, 38), SIDE)


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_variable_frame_rate_and_a_late_start(folder, ending):
    gaps = np.random.default_rng(1).integers(1, 120, 60)
    times = (70_000 + np.cumsum(gaps)).tolist()  # milliseconds
    path = folder / f"variable.{ending}"
    encode(path, waves(), "libx264", times, Fraction(1, 1000), **B_FRAMES)
    timeline = scan(path)
    assert len(timeline.key_frames) > 1
    assert_clips_agree(path, timeline)


def with_edits(content, edits):
    """An mp4's bytes with another edit list: pairs of milliseconds shown, frame to begin with."""
    content = bytearray(content)
    start = content.index(b"elst") - 4
    before = struct.unpack_from(">I", content, start)[0]
    box = struct.pack(">I4sII", 16 + 12 * len(edits), b"elst", 0, len(edits))
    for duration, frame in edits:
        box += struct.pack(">IiI", duration, 1024 + 512 * frame, 1 << 16)
    content[start : start + before] = box
    for outer in (b"moov", b"trak", b"edts"):
        place = content.index(outer) - 4
        size = struct.unpack_from(">I", content, place)[0]
        struct.pack_into(">I", content, place, size + len(box) - before)
    return bytes(content)


def test_two_frames_at_the_same_time(folder):
    """A container that rounds to milliseconds can't tell them apart; counting can."""
    times = sorted([*range(0, 400, 10), *range(104, 304, 10)])  # tenths of milliseconds
    path = folder / "fast.mkv"
    encode(path, waves(), "libx264", times, Fraction(1, 10_000), g="12", bf="0")
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert len(set(stamps)) < 60
    assert_clips_agree(path, scan(path), rates=(300, 900))


@pytest.mark.parametrize(
    ("edits", "keys"),
    [
        ([(1830, 5)], [7, 19, 31, 43]),  # begins between key frames
        ([(1430, 17)], [7, 19, 31]),
        ([(500, 17), (500, 10)], [7, 17, 29]),  # some frames twice
        ([(500, 0), (1000, 20)], [0, 12, 19, 31, 43]),  # some left out
        ([(500, 30), (500, 0)], []),  # back in time: FFmpeg reads it so that frames are counted
    ],
)
def test_edit_lists(make, folder, edits, keys):
    path = folder / "edited.mp4"
    path.write_bytes(with_edits(make("b.mp4").read_bytes(), edits))
    timeline, uncut = scan(path), video.read(make("b.mp4"), resolution=SIDE)
    assert timeline.key_frames.tolist() == keys
    assert torch.equal(video.read(path, resolution=SIDE)[0], uncut[edits[0][1]])
    assert_clips_agree(path, timeline)


def test_mpeg4_packets_without_a_frame(make, folder):
    """A picture that is "not coded" gives no frame: two of them make two frames fewer."""
    path = folder / "skips.avi"
    with av.open(str(make("plain.avi"))) as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                content = bytearray(bytes(packet))
                if number in (30, 41):
                    # start code, type (2 bits), 0, 1, time (5 bits), 1, coded (1 bit)
                    assert content[:4] == b"\0\0\1\xb6"
                    assert content[4] >> 6 == 1
                    content = content[:7]
                    content[5] &= ~0x20
                copy = av.Packet(bytes(content))
                copy.stream, copy.time_base = stream, packet.time_base
                copy.pts, copy.dts, copy.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
                output.mux(copy)
    timeline = scan(path)
    assert len(timeline) == 58
    assert_clips_agree(path, timeline)


def test_film_of_a_turned_phone_is_upright(folder):
    path = encode(folder / "turned.mp4", waves(), "libx264", **B_FRAMES)
    content = bytearray(path.read_bytes())
    matrix, one = content.index(b"tkhd") + 44, 1 << 16
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    content[matrix : matrix + 36] = turned
    path.write_bytes(content)
    assert video.read(path).shape[1:3] == (64, 48)
    assert_clips_agree(path, scan(path), step=9)


def test_name_with_a_colon(folder):
    path = encode(folder / "a:b.mp4", waves(20), "libx264")
    assert len(scan(path)) == 20
    assert read_frames(path, scan(path), np.arange(8), SIDE).shape == (8, SIDE, SIDE, 3)


@pytest.mark.parametrize("name", ["b.mp4", "open.mkv", "b.avi"])
def test_stored_as_json(make, name):
    timeline = scan(make(name))
    stored = json.dumps(timeline.to_json())
    assert Timeline.from_json(json.loads(stored)) == timeline
    if name != "open.mkv":  # whose times are rounded to milliseconds
        assert len(stored) < 150


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=20),
    st.sampled_from([Fraction(1, 1000), Fraction(1, 25), Fraction(1001, 30000)]),
    st.sampled_from([7, 25, 29.97, 60]),
)
def test_samples_against_their_definition(gaps, tick, fps):
    """Sample k is the first frame that leaves after k / fps, give or take half a tick."""
    rate, late = video.frame_rate(fps), tick / 2 if tick <= Fraction(1, 100) else 0
    ends = np.cumsum(gaps)
    steps = tuple((gap, 1) for gap in gaps[:-1])
    timeline = Timeline(tick, 5, tick, steps, int(ends[-1]), ())
    expected, frame = [], 0
    while True:
        last = frame == len(gaps) - 1
        if len(expected) / rate < int(ends[frame]) * tick - late * (2 if last else 1):
            expected.append(frame)
        elif last:
            break
        else:
            frame += 1
    assert timeline.samples(rate) == len(expected)
    assert timeline.frames_at(0, len(expected), rate).tolist() == expected


def test_long_videos_in_fine_ticks_are_exact():
    """Weeks in nanoseconds times 30000/1001 are more than 64 bits."""
    tick, rate, days = Fraction(1, 10**9), video.frame_rate(29.97), 10 * 86_400 * 10**9
    timeline = Timeline(tick, 0, tick, ((days, 2),), 3 * days, ())
    moments = [(end * days * tick - tick / 2 * end_rounding) * rate for end, end_rounding in (
        (1, 1), (2, 1), (3, 2),
    )]  # fmt: skip
    assert timeline.samples(rate) == math.ceil(moments[2])
    second = math.ceil(moments[0])  # the first sample that shows the second frame
    assert timeline.frames_at(second - 1, 2, rate).tolist() == [0, 1]


class TestBadFiles:
    def test_missing(self, folder):
        with pytest.raises(FileNotFoundError, match=r"no-such\.mp4"):
            scan(folder / "no-such.mp4")

    @pytest.mark.parametrize(
        ("content", "named"),
        [(b"", r"is empty \(0 bytes\)"), (bytes(range(256)) * 20, "cannot be read")],
    )
    def test_no_video_at_all(self, folder, content, named):
        (folder / "bad.mp4").write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.mp4 {named}"):
            scan(folder / "bad.mp4")

    def test_only_sound(self, folder):
        with wave.open(str(folder / "sound.avi"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(bytes(16000))
        with pytest.raises(ValueError, match=r"sound\.avi has no video stream, it holds audio"):
            scan(folder / "sound.avi")

    def test_timestamps_that_cannot_be(self, folder):
        path = folder / "long.mkv"
        encode(path, waves(4), "libx264", [0, 1, 2, 10**11], Fraction(1, 1000), bf="0")
        with pytest.raises(
            ValueError, match=r"long\.mkv has damaged timestamps, .* 1\.16e\+03 days"
        ):
            scan(path)

    @pytest.mark.parametrize("reader", [scan, video.read])
    def test_a_codec_that_pyav_lacks(self, make, folder, reader):
        content = make("b.mp4").read_bytes().replace(b"avc1", b"zzz1")
        (folder / "strange.mp4").write_bytes(content)
        with pytest.raises(ValueError, match=r"strange\.mp4 is of a codec that PyAV .* lacks"):
            reader(folder / "strange.mp4")

    @pytest.mark.parametrize("name", ["b.mp4", "b.mov", "open.mkv", "vp9.webm", "plain.avi"])
    def test_truncated(self, make, folder, name):
        content, timeline = make(name).read_bytes(), scan(make(name))
        cut, refusals = folder / f"cut-{name}", []
        for size in range(1, len(content) - 1, len(content) // 12):
            cut.write_bytes(content[:size])
            try:
                found = scan(cut)
            except ValueError as error:
                refusals.append(str(error))
            else:  # the very end holds nothing of the frames
                assert found == timeline
        assert len(refusals) >= 12
        assert all(f"cut-{name} " in refusal for refusal in refusals)
