import errno
import os
import sys

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyvgpt import video
from tinyvgpt.write import frame_rate

ENDINGS = ["mp4", "webm", "gif"]


def psnr(found, expected):
    """Decibels, over 8-bit levels."""
    error = (found.double() - expected.double()).square().mean()
    return float(10 * torch.log10(255**2 / error)) if error else float("inf")


def bouncing(frames=12, height=64, width=64):
    """A white square over a grey ramp: (T, H, W, 1) with hard edges, like digits."""
    clip = torch.zeros(frames, height, width, 1, dtype=torch.uint8)
    clip[..., -12:, 0] = torch.linspace(0, 255, height).to(torch.uint8)[:, None]
    for t in range(frames):
        clip[t, 5 + 2 * t : 25 + 2 * t, 10:30] = 255
    return clip


def rainbow(frames=12, side=64):
    """Smooth colours that drift: (T, H, W, 3)."""
    t, y, x = np.mgrid[:frames, :side, :side]
    waves = np.sin(x / 9 + t / 5), np.cos(y / 8 + t / 4), np.sin((x + y) / 15)
    return torch.from_numpy((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


class TestGrid:
    def test_places_and_padding(self):
        clips = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None, None]
        sheet = video.grid(clips.expand(5, 3, 1, 2, 1), columns=3, pad=1)
        assert sheet.shape == (3, 3, 8, 1)
        g = 128
        assert sheet[2, :, :, 0].tolist() == [
            [1, 1, g, 2, 2, g, 3, 3],
            [g, g, g, g, g, g, g, g],
            [4, 4, g, 5, 5, g, g, g],
        ]

    @given(st.integers(1, 9), st.none() | st.integers(1, 12), st.integers(0, 3), st.integers(0, 9))
    def test_every_clip_is_in_its_cell(self, count, columns, pad, seed):
        clips = np.random.default_rng(seed).integers(0, 256, (count, 2, 3, 4, 3), np.uint8)
        sheet = video.grid(clips, columns, pad).numpy()
        columns = min(columns or {1: 1, 2: 2, 3: 2, 4: 2}.get(count, 3), count)
        rows = -(-count // columns)
        assert sheet.shape == (2, rows * (3 + pad) - pad, columns * (4 + pad) - pad, 3)
        for index in range(count):
            top, left = index // columns * (3 + pad), index % columns * (4 + pad)
            assert np.array_equal(sheet[:, top : top + 3, left : left + 4], clips[index])

    def test_single_clip_is_itself(self):
        assert torch.equal(video.grid(bouncing()), bouncing())

    @pytest.mark.parametrize(("columns", "pad"), [(0, 2), (2, -1)])
    def test_refuses(self, columns, pad):
        with pytest.raises(ValueError, match=f"columns is {columns} and pad {pad}"):
            video.grid(bouncing(), columns, pad)


class TestWrite:
    @pytest.mark.parametrize(("ending", "least"), [("mp4", 48), ("webm", 48), ("gif", np.inf)])
    def test_grey_comes_back(self, tmp_path, ending, least):
        clip = bouncing()
        video.write(tmp_path / f"clip.{ending}", clip, fps=12)
        found = video.read(tmp_path / f"clip.{ending}")
        assert found.shape == (12, 64, 64, 3)
        assert psnr(found, clip) >= least

    @pytest.mark.parametrize(("ending", "least"), [("mp4", 40), ("webm", 40), ("gif", 22)])
    def test_colour_comes_back(self, tmp_path, ending, least):
        video.write(tmp_path / f"clip.{ending}", rainbow())
        assert psnr(video.read(tmp_path / f"clip.{ending}"), rainbow()) >= least

    @pytest.mark.parametrize("ending", ["mp4", "webm"])
    def test_a_higher_crf_makes_it_smaller_and_less_true(self, tmp_path, ending):
        sizes, truth = [], []
        for crf in (12, 18, 40):
            path = tmp_path / f"{crf}.{ending}"
            video.write(path, rainbow(), crf=crf)
            sizes.append(path.stat().st_size)
            truth.append(psnr(video.read(path), rainbow()))
        assert sizes == sorted(sizes, reverse=True)
        assert truth == sorted(truth, reverse=True)
        assert truth[1] >= 38

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_scale_repeats_pixels(self, tmp_path, ending):
        checks = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
        checks[:, ::2, 1::2] = torch.tensor([255, 0, 0], dtype=torch.uint8)
        checks[:, 1::2, ::2] = torch.tensor([0, 0, 255], dtype=torch.uint8)
        video.write(tmp_path / f"clip.{ending}", checks, scale=4)
        found = video.read(tmp_path / f"clip.{ending}")
        assert found.shape == (2, 64, 64, 3)
        assert psnr(found[:, 2::4, 2::4], checks) >= 35

    @pytest.mark.parametrize("ending", ENDINGS)
    @pytest.mark.parametrize(("height", "width"), [(33, 48), (34, 47), (7, 9), (1, 1)])
    def test_odd_sizes(self, tmp_path, ending, height, width):
        clip = 255 - bouncing(4)[:, :height, :width]
        video.write(tmp_path / f"clip.{ending}", clip)
        found = video.read(tmp_path / f"clip.{ending}")
        even = (height + height % 2, width + width % 2)
        assert found.shape[1:3] == (even if ending == "mp4" else (height, width))
        assert psnr(found[:, :height, :width], clip) >= 40
        for axis, side in ((1, height), (2, width)):  # the last row and column, repeated
            last = found.narrow(axis, side - 1, 1).int()
            added = found.narrow(axis, side, found.shape[axis] - side).int()
            assert added.numel() == 0 or (added - last).abs().max() <= 8

    def test_batches_arrays_and_views(self, tmp_path):
        clips = torch.stack([bouncing(), bouncing().flip(1), bouncing().flip(2)])
        expected = video.grid(clips)
        frozen = clips.numpy().copy()
        frozen.setflags(write=False)
        for name, given_ in (
            ("tensor", clips),
            ("array", frozen),
            ("mirrored", np.flip(np.flip(clips.numpy(), 3).copy(), 3)),
        ):
            video.write(tmp_path / f"{name}.gif", given_)
            assert torch.equal(video.read(tmp_path / f"{name}.gif")[..., :1], expected), name

    @pytest.mark.parametrize("fps", [8, 12.5, 30000 / 1001])
    def test_timing(self, tmp_path, fps):
        for ending in ENDINGS:
            video.write(tmp_path / f"clip.{ending}", bouncing(), fps=fps)
            with av.open(tmp_path / f"clip.{ending}") as container:
                seconds = container.duration / 1e6
            assert abs(seconds - 12 / fps) < 0.0101  # a GIF's tick

    def test_gif_has_room_for_every_grey(self, tmp_path):
        clip = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
        video.write(tmp_path / "clip.gif", clip)
        assert torch.equal(video.read(tmp_path / "clip.gif")[..., :1], clip)

    def test_gif_loops(self, tmp_path):
        video.write(tmp_path / "clip.gif", bouncing(), fps=10)
        with Image.open(tmp_path / "clip.gif") as image:
            assert (image.n_frames, image.info["loop"], image.info["duration"]) == (12, 0, 100)

    def test_mp4_plays_before_it_is_all_there(self, tmp_path):
        video.write(tmp_path / "clip.mp4", bouncing())
        data = (tmp_path / "clip.mp4").read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")

    @pytest.mark.parametrize(
        ("name", "arguments", "named"),
        [
            ("clip.mp3", {}, r"clip\.mp3 ends in '\.mp3', one of \.mp4, \.webm, \.gif"),
            ("clip", {}, "ends in ''"),
            ("clip.mp4", {"fps": 0}, "fps is 0"),
            ("clip.mp4", {"fps": -np.inf}, "fps is -inf"),
            ("clip.gif", {"fps": 60}, "fps is 60, a GIF plays at most 50"),
            ("clip.mp4", {"scale": 0}, "scale is 0"),
            ("clip.mp4", {"scale": 1.5}, "scale is 1.5"),
            ("clip.mp4", {"crf": 52}, "crf is 52"),
            ("clip.mp4", {"clip": torch.zeros(4, 8, 8, 2, dtype=torch.uint8)}, "2 channels"),
            ("clip.mp4", {"clip": torch.zeros(4, 8, 8, 3)}, "float32"),
            ("clip.mp4", {"clip": np.zeros((8, 8, 3), np.uint8)}, r"\(8, 8, 3\)"),
        ],
    )
    def test_refuses(self, tmp_path, name, arguments, named):
        with pytest.raises(ValueError, match=named):
            video.write(tmp_path / name, **{"clip": bouncing(), **arguments})
        assert list(tmp_path.iterdir()) == []

    def test_pyav_missing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match="pip install av"):
            video.write(tmp_path / "clip.mp4", bouncing())


class TestFullDisk:
    @pytest.mark.parametrize("ending", ENDINGS)
    def test_old_file_survives(self, tmp_path, ending, file_limit):
        path = tmp_path / f"clip.{ending}"
        video.write(path, bouncing())
        old = path.read_bytes()
        noise = torch.randint(0, 256, (12, 64, 64, 3), dtype=torch.uint8)
        for limit in (0, 1000, 20_000):  # noise takes more than 50,000 bytes
            match = rf"clip\.{ending} was not written"
            with file_limit(limit), pytest.raises(OSError, match=match) as raised:
                video.write(path, noise)
            assert raised.value.errno == errno.EFBIG
            assert path.read_bytes() == old
            assert list(tmp_path.iterdir()) == [path]

    def test_old_file_survives_a_failed_rename(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        path = tmp_path / "clip.gif"
        path.write_bytes(b"old")
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"clip\.gif was not written.*No space left") as raised:
            video.write(path, bouncing())
        assert raised.value.errno == errno.ENOSPC
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no-folder.clip\.mp4 was not written"):
            video.write(tmp_path / "no-folder" / "clip.mp4", bouncing())


def test_frame_rates_are_the_fractions_meant():
    for fps, numerator, denominator in ((30000 / 1001, 30000, 1001), (12.5, 25, 2), (8, 8, 1)):
        rate = frame_rate(fps)
        assert (rate.numerator, rate.denominator) == (numerator, denominator)
