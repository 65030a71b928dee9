import base64
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from tinyvgpt import video


@pytest.fixture(autouse=True)
def live_notebook(monkeypatch):
    monkeypatch.delenv("TINYVGPT_BOOK_MEDIA", raising=False)
    monkeypatch.delenv("TINYVGPT_BOOK_MEDIA_URL", raising=False)


@pytest.fixture
def clip():
    """A white square on its way down: (T, H, W, 1), odd sides."""
    clip = torch.zeros(6, 33, 47, 1, dtype=torch.uint8)
    for t in range(6):
        clip[t, 3 * t : 3 * t + 12, 20:40] = 255
    return clip


def tag(player):
    """(name, attributes, text inside) of the one element that a player shows."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, name, attributes):
            found.append([name, dict(attributes), ""])

        def handle_data(self, data):
            found[-1][2] += data

    Parser().feed(player._repr_html_())
    assert len(found) == 1
    return found[0]


def unpack(address, kind, path):
    prefix = f"data:{kind};base64,"
    assert address.startswith(prefix)
    path.write_bytes(base64.b64decode(address.removeprefix(prefix)))
    return path


def check_video(mp4, poster, clip):
    """The video is the clip, each pixel doubled, and the poster its first frame, or nearly."""
    found = video.read(mp4)
    expected = clip.repeat_interleave(2, 1).repeat_interleave(2, 2).expand(-1, -1, -1, 3)
    assert found.shape == expected.shape
    assert (found.int() - expected.int()).abs().float().mean() < 1
    with Image.open(poster) as image:
        still = torch.from_numpy(np.array(image)).int()
    assert still.shape == expected[0].shape
    assert (still - expected[0].int()).abs().float().mean() < 1


def test_inline(clip, tmp_path):
    name, attributes, inside = tag(video.show(clip, scale=3, alt='a "square" & more'))
    assert name == "video"
    assert {"autoplay", "loop", "muted", "playsinline"} <= attributes.keys()
    assert (attributes["width"], attributes["height"]) == ("141", "99")
    assert "image-rendering: pixelated" in attributes["style"]
    assert "filter: none" in attributes["style"]
    assert attributes["aria-label"] == attributes["title"] == inside == 'a "square" & more'
    mp4 = unpack(attributes["src"], "video/mp4", tmp_path / "inline.mp4")
    poster = unpack(attributes["poster"], "image/jpeg", tmp_path / "inline.jpg")
    check_video(mp4, poster, clip)


def test_grey_clips_of_even_sides_are_not_doubled(clip, tmp_path):
    even = clip[:, :32, :46]
    _, attributes, _ = tag(video.show(even, scale=3))
    assert (attributes["width"], attributes["height"]) == ("138", "96")
    found = video.read(unpack(attributes["src"], "video/mp4", tmp_path / "inline.mp4"))
    assert found.shape == (6, 32, 46, 3)
    assert (found.int() - even.int()).abs().float().mean() < 1


def test_book(clip, tmp_path, monkeypatch):
    folder = tmp_path / "build" / "media"
    monkeypatch.setenv("TINYVGPT_BOOK_MEDIA", str(folder))
    monkeypatch.setenv("TINYVGPT_BOOK_MEDIA_URL", "../_static/media/")
    _, first, _ = tag(video.show(clip))
    _, again, _ = tag(video.show(clip.numpy()))
    _, slower, _ = tag(video.show(clip, fps=4))
    assert first == again
    assert slower["src"] != first["src"]
    names = [first[key].removeprefix("../_static/media/") for key in ("src", "poster")]
    assert names[0].endswith(".mp4")
    assert "/" not in names[0]
    assert len(list(folder.iterdir())) == 4  # two videos with their posters, no temporary files
    check_video(folder / names[0], folder / names[1], clip)


def test_book_without_address_uses_the_folder_name(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYVGPT_BOOK_MEDIA", str(tmp_path / "media"))
    assert tag(video.show(clip))[1]["src"].startswith("media/")


def test_several_clips(clip):
    player = video.show(torch.stack([clip] * 5), columns=3)
    _, attributes, _ = tag(player)
    assert (attributes["width"], attributes["height"]) == ("580", "272")  # 4 · (3·47+4, 2·33+2)
    assert repr(player) == "<5 clips, 6 frames of 47×33 pixels, 8 a second>"
    assert attributes["aria-label"] == repr(player)[1:-1]


def test_default_size_fits_the_page():
    for side, count, width in (
        (64, 1, 256),
        (64, 4, 520),
        (64, 16, 524),
        (64, 64, 526),
        (300, 1, 300),
    ):
        clips = torch.zeros(count, 1, side, side, 1, dtype=torch.uint8)
        assert tag(video.show(clips))[1]["width"] == str(width)


def test_without_pyav_a_gif(clip, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        name, attributes, _ = tag(video.show(clip, fps=10, scale=2, alt="a square"))
        with pytest.raises(ValueError, match="fps is 60, a GIF"):
            video.show(clip, fps=60)
        patch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match="pip install av"):
            video.show(clip)
    assert (name, attributes["alt"], attributes["width"]) == ("img", "a square", "94")
    assert "filter: none" in attributes["style"]
    gif = unpack(attributes["src"], "image/gif", tmp_path / "inline.gif")
    with Image.open(gif) as image:
        assert (image.info["loop"], image.info["duration"]) == (0, 100)
    found = video.read(gif, fps=10)
    assert torch.equal(found[:, ::2, ::2, :1], clip)


def test_refuses(clip):
    with pytest.raises(ValueError, match="float32"):
        video.show(video.to_model(clip))
    with pytest.raises(ValueError, match="fps is 0"):
        video.show(clip, fps=0)
    with pytest.raises(ValueError, match="scale is 0"):
        video.show(clip, scale=0)


def test_import_needs_no_pyav():
    code = (
        "import sys; sys.modules['av'] = None; import tinyvgpt.video as v; print(v.show.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "show\n"), done.stderr
