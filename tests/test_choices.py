"""Clips to choose from: each is there under its keys, and nothing that no button leads to."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from tinyvgpt.choices import choices

KEYS = {"left": "←", "up": "<"}
RNG = np.random.default_rng(0)
FIRST = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
PATHS = [("left",), ("up",), ("left", "up"), ("left", "left")]
CLIPS = {path: RNG.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8) for path in PATHS}


def elements(player):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, values: found.append((tag, dict(values)))
    parser.feed(player.html)
    return found


def decoded(source):
    image = pytest.importorskip("PIL.Image")
    data = base64.b64decode(source.removeprefix("data:image/webp;base64,"))
    with image.open(io.BytesIO(data)) as opened:
        return np.asarray(opened)


def test_every_choice_is_in_the_page_losslessly():
    player = choices({path: torch.from_numpy(x) for path, x in CLIPS.items()}, FIRST, KEYS, alt='"')
    (box,) = [values for _, values in elements(player) if values.get("class") == "choices"]
    sources = json.loads(box["data-clips"])
    assert sources.keys() == {"", "left", "up", "left up", "left left"}
    assert box["data-frames"] == "5"
    assert box["aria-label"] == '"'
    assert np.array_equal(decoded(sources[""]), FIRST)
    for path, clip in CLIPS.items():
        strip = decoded(sources[" ".join(path)])  # (4, 5 · 6, 3)
        assert np.array_equal(strip.reshape(4, 5, 6, 3).swapaxes(0, 1), clip)
    assert repr(player) == "<4 clips of 5 frames of 6×4 pixels to choose from>"


def test_a_button_a_key_and_one_to_begin_again():
    player = choices(CLIPS, FIRST, KEYS, alt="arm", fps=10)
    buttons = [values for tag, values in elements(player) if tag == "button"]
    assert [button["value"] for button in buttons] == ["left", "up", ""]
    assert all("setInterval(step, 100)" in button["onclick"] for button in buttons)
    assert ">&lt;</button>" in player.html
    assert "<script" not in player.html


def test_files_while_the_book_is_built(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYVGPT_BOOK_MEDIA", str(tmp_path))
    monkeypatch.setenv("TINYVGPT_BOOK_MEDIA_URL", "../media")
    box = elements(choices(CLIPS, FIRST, KEYS, alt="arm"))[0][1]
    sources = set(json.loads(box["data-clips"]).values())
    assert sources == {f"../media/{path.name}" for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clips": {}}, r"shapes \[\]"),
        ({"clips": CLIPS | {("up", "up"): FIRST[None]}}, "one .f, H, W, C."),
        ({"first": FIRST[:3]}, r"first picture \(3, 6, 3\)"),
        ({"first": FIRST.astype(float)}, "must be uint8"),
        ({"clips": CLIPS | {("up", "up", "up"): CLIPS["up",]}}, "no buttons lead to .'up', 'up'"),
        ({"clips": CLIPS | {("down",): CLIPS["up",]}}, r"no buttons lead to \('down',\)"),
        ({"keys": KEYS | {"to the left": "l"}}, "names without spaces"),
        ({"fps": 0}, "fps is 0"),
        ({"scale": 0}, "scale 0"),
    ],
)
def test_what_cannot_be_shown(change, message):
    with pytest.raises(ValueError, match=message):
        choices(**{"clips": CLIPS, "first": FIRST, "keys": KEYS, "alt": "arm", **change})
