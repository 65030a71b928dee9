import math
import re
import struct
import sys
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvgpt import video

LEVELS = 60  # frames of the numbered clip


def numbered(count=LEVELS, side=32):
    """Frame i is a plain grey of level 4 i: lossy codecs keep it, so that i can be read back."""
    level = 4 * torch.arange(count, dtype=torch.uint8)
    return level[:, None, None, None].expand(-1, side, side, 3).contiguous()


def numbers(clip):
    return [round(level / 4) for level in clip[:, :14].float().mean((1, 2, 3)).tolist()]


def encode(path, clip, times, tick, codec="libx264", **options):
    """Write frames with their own timestamps, in ticks."""
    with av.open(path, "w") as output:
        stream = output.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        stream.codec_context.time_base = tick
        for array, time in zip(clip.numpy(), times, strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, tick
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


MANY_GOPS = {
    "closed.mp4": ("libx264", {"g": "12"}),
    "open.mkv": ("libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3"}),
    "refresh.mov": ("libx264", {"g": "12", "x264-params": "intra-refresh=1:bframes=0"}),
    "b.avi": ("mpeg4", {"g": "12", "bf": "2", "b": "8000000"}),
    "plain.webm": ("libvpx-vp9", {"g": "12"}),
    "gops.ts": ("libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3"}),
}


@pytest.fixture(scope="module", params=MANY_GOPS)
def many_gops(request, folder):
    """60 numbered frames at 30 a second, in groups of 12, as containers differ in them."""
    codec, options = MANY_GOPS[request.param]
    clip = numbered(side=64)
    t, y, x = np.mgrid[:LEVELS, 16:64, :64]  # waves that drift, for each frame to build on
    waves = np.stack([np.sin(x / 9 + t / 5), np.cos(y / 8 + t / 4), np.sin((x + y) / 15)], -1)
    clip[:, 16:] = torch.from_numpy(127 + 120 * waves)
    return encode(folder / request.param, clip, range(len(clip)), Fraction(1, 30), codec, **options)


class TestDoors:
    def test_every_pixel_value_returns(self):
        clip = torch.arange(256, dtype=torch.uint8).reshape(1, 4, 8, 8, 1)
        assert torch.equal(video.to_uint8(video.to_model(clip)), clip)

    def test_values_and_axes(self):
        clip = np.zeros((2, 3, 4, 5, 3), np.uint8)
        clip[1, 2, 3, 4] = 255, 51, 0
        x = video.to_model(clip)
        assert (x.dtype, x.shape) == (torch.float32, (2, 3, 3, 4, 5))
        assert x.is_contiguous()
        torch.testing.assert_close(x[1, :, 2, 3, 4], torch.tensor([0.5, -0.3, -0.5]))
        assert (x == -0.5).sum() == x.numel() - 2
        assert torch.equal(video.to_model(clip[1]), x[1:])

    @given(st.lists(st.integers(1, 5), min_size=4, max_size=4), st.integers(1, 4), st.integers())
    def test_round_trip(self, shape, channels, seed):
        random = np.random.default_rng(abs(seed))
        clip = random.integers(0, 256, (*shape, channels), np.uint8)
        assert np.array_equal(video.to_uint8(video.to_model(clip)).numpy(), clip)

    def test_out_of_range_is_clamped_and_halves_are_rounded(self):
        x = torch.tensor([-9.0, -0.5, 10.4 / 255 - 0.5, 10.6 / 255 - 0.5, 0.5, 9.0])
        pixels = video.to_uint8(x.reshape(1, 1, 6, 1, 1)).flatten().tolist()
        assert pixels == [0, 0, 10, 11, 255, 255]

    def test_low_precision_floats(self):
        clip = torch.arange(256, dtype=torch.uint8).reshape(1, 4, 8, 8, 1)
        back = video.to_uint8(video.to_model(clip).to(torch.bfloat16))
        assert (back.int() - clip.int()).abs().max() <= 1

    @pytest.mark.parametrize(
        ("clip", "named"),
        [
            (torch.zeros(4, 8, 8, 3), "float32"),
            (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\(8, 8, 3\)"),
            (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), r"\(0, 8, 8, 3\)"),
            (torch.zeros(2, 3, 16, 64, 64, dtype=torch.uint8), "64 channels"),
        ],
    )
    def test_to_model_refuses(self, clip, named):
        with pytest.raises(ValueError, match=named):
            video.to_model(clip)

    @pytest.mark.parametrize(
        ("x", "named"),
        [
            (torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8), "uint8"),
            (torch.zeros(3, 4, 8, 8), r"\(3, 4, 8, 8\)"),
            (torch.zeros(2, 16, 64, 64, 3), "16 channels"),
        ],
    )
    def test_to_uint8_refuses(self, x, named):
        with pytest.raises(ValueError, match=named):
            video.to_uint8(x)


def bilinear(image, rows, columns):
    """Plain bilinear interpolation between pixel centres: (H, W) -> (rows, columns)."""

    def taps(count, size):
        at = np.maximum((np.arange(count) + 0.5) * size / count - 0.5, 0)
        low = at.astype(int)
        return low, np.minimum(low + 1, size - 1), at - low

    top, bottom, down = taps(rows, image.shape[0])
    left, right, across = taps(columns, image.shape[1])
    image = image[top] * (1 - down)[:, None] + image[bottom] * down[:, None]
    return image[:, left] * (1 - across) + image[:, right] * across


class TestResizeCrop:
    @pytest.mark.parametrize(
        ("rows", "resolution", "expected"),
        [
            ([[0, 10, 20, 30], [40, 50, 60, 71]], 1, [[25]]),  # mean of the left four
            (
                [[9, 9, 9, 9], [9, 1, 2, 9], [9, 3, 4, 9], [9, 9, 9, 9]],
                1,
                [[2]],
            ),  # no antialias: 2.5
            ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 2, [[1, 2], [6, 7]]),  # only cropped
            ([[0, 100]], 2, [[25, 75], [25, 75]]),  # 0 25 75 100, the middle two
        ],
    )
    def test_by_hand(self, rows, resolution, expected):
        clip = torch.tensor(rows, dtype=torch.uint8)[None, :, :, None]
        assert video.resize_crop(clip, resolution)[0, :, :, 0].tolist() == expected

    @settings(deadline=None)
    @given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
    def test_against_plain_interpolation(self, height, width, resolution, seed):
        image = np.random.default_rng(seed).random((height, width))
        scale = resolution / min(height, width)
        rows = resolution if height < width else math.ceil(height * scale)
        columns = math.ceil(width * scale) if height < width else resolution
        top, left = (rows - resolution) // 2, (columns - resolution) // 2
        whole = bilinear(image, rows, columns)
        expected = whole[top : top + resolution, left : left + resolution]
        found = video.resize_crop(torch.from_numpy(image)[None, :, :, None], resolution)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-9)

    def test_pixels_are_half_a_level_from_floats(self):
        clip = torch.randint(0, 256, (2, 3, 37, 50, 3), dtype=torch.uint8)
        pixels, floats = video.resize_crop(clip, 24), video.resize_crop(clip / 255, 24) * 255
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (2, 3, 24, 24, 3))
        assert (pixels - floats).abs().max() <= 0.501

    @pytest.mark.parametrize(
        ("clip", "resolution", "named"),
        [
            (torch.zeros(1, 8, 8, 3), 0, "resolution is 0"),
            (torch.zeros(8, 8), 4, r"\(8, 8\)"),
            (torch.zeros(1, 8, 8, 3, dtype=torch.int64), 4, "int64"),
        ],
    )
    def test_refuses(self, clip, resolution, named):
        with pytest.raises(ValueError, match=named):
            video.resize_crop(clip, resolution)


class TestRead:
    def test_all_frames_in_order(self, many_gops):
        clip = video.read(many_gops)
        assert (clip.dtype, clip.shape) == (torch.uint8, (LEVELS, 64, 64, 3))
        assert numbers(clip) == list(range(LEVELS))

    def test_starts_at_the_frame_on_screen(self, many_gops):
        clip = video.read(many_gops)
        for index in range(0, LEVELS - 1, 3):
            for start in (index / 30, (index + 0.9) / 30):
                found = video.read(many_gops, start=start, frames=2)
                assert torch.equal(found, clip[index : index + 2]), start

    def test_resamples(self, many_gops):
        assert numbers(video.read(many_gops, fps=30)) == list(range(LEVELS))
        assert numbers(video.read(many_gops, fps=10, start=0.5, frames=5)) == [15, 18, 21, 24, 27]
        assert numbers(video.read(many_gops, fps=60, frames=6)) == [0, 0, 1, 1, 2, 2]
        assert len(video.read(many_gops, fps=7)) == 14  # sample times below 2 s

    @pytest.mark.parametrize("fps", [30000 / 1001, 29.97, 23.976, 30, 8, 50])
    @pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
    def test_rounded_timestamps_lose_no_frame(self, folder, ending, fps):
        path = folder / f"rate.{ending}"
        video.write(path, numbered(20), fps=fps)
        assert numbers(video.read(path, fps=fps)) == list(range(20))

    def test_variable_frame_rate(self, folder):
        times = [0, 40, 300, 310, 900, 1000]  # milliseconds
        path = encode(folder / "variable.mkv", numbered(6), times, Fraction(1, 1000))
        for fps, start in ((10, 0.0), (25, 0.0), (3, 0.2), (100, 0.05)):
            count = int((0.999 - start) * fps) + 1
            at = [1000 * (start + index / fps) for index in range(count)]
            expected = [max(i for i, time in enumerate(times) if time <= t + 1e-6) for t in at]
            assert numbers(video.read(path, fps=fps, start=start, frames=count)) == expected
        assert numbers(video.read(path, start=0.305)) == [2, 3, 4, 5]

    def test_time_counts_from_the_first_frame(self, folder):
        times = range(500, 560)
        path = encode(folder / "late.mkv", numbered(), times, Fraction(1, 30), g="12")
        assert numbers(video.read(path, start=1.0, frames=2)) == [30, 31]

    @pytest.mark.parametrize(("ending", "codec"), [("mpg", "mpeg2video"), ("h264", "libx264")])
    def test_sparse_or_no_timestamps(self, folder, ending, codec):
        path = folder / f"sparse.{ending}"
        encode(path, numbered(), range(LEVELS), Fraction(1, 30), codec, g="12")
        assert numbers(video.read(path)) == list(range(LEVELS))
        for index in range(0, LEVELS, 3):
            assert numbers(video.read(path, start=(index + 0.5) / 30, frames=1)) == [index]

    def test_resolution(self, folder):
        clip = torch.randint(0, 256, (4, 24, 40, 3), dtype=torch.uint8)
        path = folder / "wide.gif"
        video.write(path, clip)
        expected = video.resize_crop(video.read(path), 16)
        assert torch.equal(video.read(path, resolution=16), expected)

    def test_frame_size_changes_midway(self, folder):
        parts = [
            encode(folder / f"{side}.h264", numbered(3, side), range(3), Fraction(1, 30))
            for side in (32, 48)
        ]
        path = folder / "grows.h264"
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        with pytest.raises(ValueError, match=r"grows\.h264 changes its frame size midway"):
            video.read(path)
        assert numbers(video.read(path, resolution=16)) == [0, 1, 2, 0, 1, 2]

    def test_colours(self, folder):
        colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40]])
        clip = colours.to(torch.uint8)[:, None, None].expand(-1, 16, 16, -1)
        for ending, tolerance in (("mp4", 2), ("webm", 2), ("gif", 0)):
            video.write(folder / f"colours.{ending}", clip)
            found = video.read(folder / f"colours.{ending}")
            assert (found.int() - clip.int()).abs().max() <= tolerance, ending

    def test_film_of_a_turned_phone_is_upright(self, folder):
        clip = torch.zeros(2, 32, 64, 3, dtype=torch.uint8)
        clip[:, :16, :16] = 255  # top left, as stored
        video.write(folder / "turned.mp4", clip)
        data = bytearray((folder / "turned.mp4").read_bytes())
        matrix = data.index(b"tkhd") + 4 + 40
        one = 1 << 16
        data[matrix : matrix + 36] = struct.pack(
            ">9i", 0, one, 0, -one, 0, 0, 32 * one, 0, 1 << 30
        )  # shown turned clockwise by 90 degrees
        (folder / "turned.mp4").write_bytes(data)
        found = video.read(folder / "turned.mp4")
        assert found.shape == (2, 64, 32, 3)
        assert found[:, :14, 18:].min() > 240  # top right, as shown
        assert found[:, 20:].max() < 15


class TestBadFiles:
    def test_missing(self, folder):
        with pytest.raises(FileNotFoundError, match=r"no-such\.mp4"):
            video.read(folder / "no-such.mp4")

    @pytest.mark.parametrize(
        ("content", "named"),
        [(b"", r"is empty \(0 bytes\)"), (bytes(range(256)) * 20, "cannot be read")],
    )
    def test_unreadable(self, folder, content, named):
        (folder / "bad.mp4").write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.mp4 {named}"):
            video.read(folder / "bad.mp4")

    def test_no_video_stream(self, folder):
        with wave.open(str(folder / "sound.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(bytes(16000))
        with pytest.raises(ValueError, match=r"sound\.wav has no video stream, it holds audio"):
            video.read(folder / "sound.wav")

    def test_cover_of_a_song_is_no_video(self, folder):
        path = folder / "song.m4a"
        with av.open(path, "w", format="mp4") as output:
            sound = output.add_stream("aac", rate=8000, layout="mono")
            cover = output.add_stream("png", rate=1)
            cover.height, cover.width, cover.pix_fmt = 16, 16, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            output.mux(cover.encode(av.VideoFrame(16, 16, "rgb24")))
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.rate = 8000
            output.mux(sound.encode(silence))
            output.mux(sound.encode())
        with av.open(path) as container:
            assert len(container.streams.video) == 1
        with pytest.raises(
            ValueError, match=r"song\.m4a has no video stream, it holds audio, cover"
        ):
            video.read(path)

    @pytest.mark.parametrize("ending", ["mp4", "mov", "webm", "mkv", "avi", "gif"])
    def test_truncated_anywhere(self, folder, ending):
        whole = folder / f"whole.{ending}"
        if ending in ("mp4", "webm", "gif"):
            random = np.random.default_rng(0)
            video.write(whole, random.integers(0, 256, (12, 16, 16, 1), np.uint8))
        else:
            codec = "mpeg4" if ending == "avi" else "libx264"
            encode(whole, numbered(12), range(12), Fraction(1, 30), codec)
        data, clip = whole.read_bytes(), video.read(whole)
        cut, refusals = folder / f"cut.{ending}", []
        between = [found.start() for found in re.finditer(b"00dc", data)]  # an avi's frames
        for size in [*range(1, len(data), len(data) // 40), *between, len(data) - 1]:
            cut.write_bytes(data[:size])
            try:
                found = video.read(cut)
            except ValueError as error:
                refusals.append(str(error))
            else:  # only its index was cut
                assert torch.equal(found, clip)
        assert len(refusals) > 25
        assert all(f"cut.{ending} " in refusal for refusal in refusals)

    def test_cut_in_the_last_frame(self, folder):
        path = encode(folder / "cut.flv", numbered(12), range(12), Fraction(1, 1000), "flv", bf="0")
        assert len(video.read(path)) == 12
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match=r"cut\.flv is truncated"):
            video.read(path)

    def test_whole_beginning_of_a_truncated_file(self, folder):
        clip = numbered(30)
        path = encode(folder / "begin.mkv", clip, range(30), Fraction(1, 30), bf="0")
        path.write_bytes(path.read_bytes()[:-200])
        assert numbers(video.read(path, frames=4)) == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="truncated"):
            video.read(path)

    def test_too_short(self, folder):
        path = folder / "short.mp4"
        video.write(path, numbered(12), fps=8)
        with pytest.raises(
            ValueError, match=r"short\.mp4 lasts 1.500 s and has 12 .* 16 are needed"
        ):
            video.read(path, frames=16)
        with pytest.raises(ValueError, match=r"has 8 frames from 0.5 s on, 9 are needed"):
            video.read(path, start=0.5, frames=9)
        with pytest.raises(ValueError, match=r"has 4 frames at 4 a second from 0.5 s on, 5"):
            video.read(path, fps=4, start=0.5, frames=5)
        with pytest.raises(
            ValueError, match=r"lasts 1.500 s .* from 1.5 s on, at least 1 is needed"
        ):
            video.read(path, start=1.5)
        assert len(video.read(path, start=0.5, frames=8)) == 8

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"fps": 0}, "fps is 0"),
            ({"fps": math.nan}, "fps is nan"),
            ({"start": -0.1}, "start is -0.1"),
            ({"start": math.inf}, "start is inf"),
            ({"frames": 0}, "frames 0"),
            ({"resolution": 0}, "resolution is 0"),
        ],
    )
    def test_arguments(self, folder, arguments, named):
        video.write(folder / "fine.gif", numbered(2))
        with pytest.raises(ValueError, match=named):
            video.read(folder / "fine.gif", **arguments)

    def test_pyav_missing(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match="pip install av"):
            video.read(folder / "any.mp4")
