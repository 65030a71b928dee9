"""Driving a model in a terminal, a pseudo-terminal: what is seen, pressed and left behind."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, cli, open_dataset, terminal
from tinyvgpt.driving import KEYS, STEP, Drive

termios = pytest.importorskip("termios")  # there is no terminal to play on elsewhere
import fcntl  # noqa: E402
import pty  # noqa: E402
import struct  # noqa: E402

ROOT = Path(__file__).parents[1]
TOKENIZER = VQVAEConfig(
    channels=3, frames=8, resolution=32, downsample=(2, 16, 16), hidden=8, res_blocks=1, codes=12,
    code_dim=4, axial=False, causal_time=True,
)  # fmt: skip
STD = (0.02, 0.03, 0.01, 0.2)
SECONDS = 60  # until a step of the test has surely been made


def build(causal=True, **fields):
    torch.manual_seed(0)
    vqvae = VQVAE(replace(TOKENIZER, causal_time=causal))
    fields = {"action_dim": 4, "action_std": STD, **fields}
    config = GPTConfig.for_vqvae(vqvae.config, width=12, heads=2, layers=1, **fields)
    gpt = GPT(config, vqvae.codebook.codes)
    torch.nn.init.normal_(gpt.token_out.weight)
    return VideoGPT(vqvae, gpt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    build().save(path)
    return path


# Driving ------------------------------------------------------------------------------------------


def test_a_drive_begins_with_a_clip_and_its_actions():
    drive = Drive(build(), clip=3)
    real = open_dataset("robot-push", "test", frames=8, resolution=32).batch([3])
    pieces = iter(drive)
    shown = torch.cat([next(pieces), next(pieces)])
    assert torch.equal(shown, real["video"][0, :4])
    assert torch.equal(drive.lead(2), real["action"][0, 1:3])
    assert torch.equal(drive.lead(0)[1:], real["action"][0, :1])
    assert next(pieces).shape == (2, 32, 32, 3)


def test_keys_go_on_until_another():
    drive, (x, y, _, _) = Drive(build()), STD
    for key, expected in [
        ("other", [0, 0, 0, 0]),
        ("left", [0, -y, 0, 0]),
        ("other", [0, -y, 0, 0]),
        ("right", [0, y, 0, 0]),
        ("up", [-x, 0, 0, 0]),
        ("space", [0, 0, 0, 0]),
        ("down", [x, 0, 0, 0]),
    ]:
        drive.press(key)
        for frame in (4, 400):
            assert torch.allclose(drive.lead(frame), STEP * torch.tensor(expected))


def test_steps_are_within_what_the_arm_does():
    """At most four centimetres a frame (data_recipes/push_policy.py)."""
    moves = Drive(VideoGPT.from_pretrained("robot-push")).moves
    assert all(0.02 < move.abs().max() < 0.04 for move in moves.values())


def test_an_action_is_rounded_once():
    """To the bits of chapter 17: on a GPU a last one can be enough for another token."""
    model = VideoGPT.from_pretrained("robot-push")
    moves, std = Drive(model).moves, model.gpt.config.action_std
    for key, (number, sign) in KEYS.items():
        assert moves[key][number] == torch.tensor(STEP * sign * std[number])


def test_the_arm_goes_where_keys_say():
    """The hand's column in the picture, of the shipped model, after a few latent frames."""
    from steer_arm import column

    model, columns = VideoGPT.from_pretrained("robot-push"), []
    for key in ("left", "right"):
        drive = Drive(model, clip=10)
        drive.press(key)
        frames = torch.cat([piece for piece, _ in zip(drive, range(3), strict=False)])
        columns.append(column(frames[None])[0, -1] - column(frames[None])[0, 7])
    assert columns[0] < -2
    assert columns[1] > 2


@pytest.mark.parametrize(
    ("model", "fields", "says"),
    [
        (lambda: build(action_dim=0, action_std=()), {}, "can't be driven: it takes no actions"),
        (lambda: build(causal=False, cond_frames=2, cond_depth=10, cond_width=8), {}, "causal_tim"),
        (build, {"clip": 99}, "clip is 99, robot-push has 0 to 95"),
        (build, {"clip": -1}, "clip is -1"),
        (build, {"data": "moving-mnist"}, "moving-mnist doesn't have the 4 numbers of an action"),
        (lambda: build(action_dim=2, action_std=()), {}, "doesn't have the 2 numbers"),
    ],
)
def test_models_that_cannot_be_driven(model, fields, says):
    with pytest.raises(ValueError, match=says):
        Drive(model(), **fields)


# Drawing and keys ---------------------------------------------------------------------------------


def colours(line):
    """Upper and lower colours of a line of half blocks, (2, W, 3)."""
    numbers = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", line)
    return np.array(numbers, np.uint8).reshape(-1, 2, 3).swapaxes(0, 1)


def test_half_blocks():
    frame = torch.randint(256, (6, 5, 3), dtype=torch.uint8)
    lines = list(terminal.half_blocks(frame))
    assert len(lines) == 3
    assert np.array_equal(np.concatenate([colours(line) for line in lines]), frame.numpy())


@pytest.mark.parametrize(
    ("columns", "lines", "side"),
    [(80, 23, 46), (64, 40, 64), (140, 80, 128), (20, 50, 20), (21, 50, 20), (1, 0, 2)],
)
def test_frames_fit_the_terminal(columns, lines, side):
    frame = torch.randint(256, (64, 64, 1), dtype=torch.uint8)
    fitted = terminal.fitted(frame, columns, lines)
    assert fitted.shape == (side, side, 3)
    if side == 128:
        assert torch.equal(fitted[1::2, ::2, :1], frame)


def test_names_of_keys():
    sent = b"\x1b[A\x1b[B\x1bOC\x1b[D qQ\x04A\x1b[1;5Ax\x1b"
    names = ["up", "down", "right", "left", "space", "quit", "quit", "quit"]
    assert list(terminal.named(sent)) == [*names, "other", "other", "other", "other"]


# In a terminal ------------------------------------------------------------------------------------


@contextmanager
def playing(*words, size=(24, 80)):
    """The command in a terminal of its own: (process, its end of the terminal, ours)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyvgpt.cli", "play", *map(str, words)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    try:
        yield process, theirs, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def read_until(terminal, text):
    """What the terminal shows until the text is in it."""
    end, seen = time.monotonic() + SECONDS, b""
    while text.encode() not in seen:
        assert time.monotonic() < end, f"{text!r} does not come, but {seen[-500:]!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 1 << 16)
    return seen.decode(errors="ignore")  # a character may be cut at the end


def wait_for_end(process, terminal):
    """The rest of what is shown, and the exit code."""
    end, seen = time.monotonic() + SECONDS, b""
    while process.poll() is None or select.select([terminal], [], [], 0)[0]:
        assert time.monotonic() < end, "the command doesn't end"
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 1 << 16)
    return seen.decode(errors="ignore"), process.returncode


def test_playing(folder):
    with playing(folder, "--fps", 50) as (process, theirs, ours):
        before = termios.tcgetattr(theirs)
        seen = read_until(ours, "·  arrows")
        assert terminal.ENTER in seen
        during = termios.tcgetattr(theirs)
        assert not during[3] & (termios.ECHO | termios.ICANON)
        picture = [colours(line) for line in seen.split(terminal.HOME)[1].split("\n")[:16]]
        first = open_dataset("robot-push", "test", frames=8, resolution=32).batch([10])["video"]
        assert np.array_equal(np.concatenate(picture), first[0, 0].numpy())
        for key, sign in [("\x1b[D", "←"), ("\x1bOC", "→"), ("\x1b[A", "↑"), (" ", "·")]:
            os.write(ours, key.encode())
            read_until(ours, f"{sign}  arrows")
        os.write(ours, b"q")
        seen, code = wait_for_end(process, ours)
        assert code == 0
        assert seen.endswith(terminal.LEAVE)
        assert termios.tcgetattr(theirs) == before


@pytest.mark.parametrize(
    ("how", "code"),
    [(b"\x03", 0), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)],
)
def test_the_terminal_is_put_back(folder, how, code):
    with playing(folder, "--fps", 50) as (process, theirs, ours):
        before = termios.tcgetattr(theirs)
        read_until(ours, "arrows")
        os.write(ours, b"\x1a\x1c")  # Ctrl-Z and Ctrl-\ do nothing
        read_until(ours, "arrows")
        if isinstance(how, bytes):
            os.write(ours, how)
        else:
            process.send_signal(how)
        seen, left_with = wait_for_end(process, ours)
        assert seen.endswith(terminal.LEAVE), "and no traceback"
        assert left_with == code
        assert termios.tcgetattr(theirs) == before


def test_a_mistake_is_read_on_the_usual_screen(folder):
    with playing(folder, "--clip", 99) as (process, theirs, ours):
        before = termios.tcgetattr(theirs)
        seen, code = wait_for_end(process, ours)
        assert code == 2
        after = seen.split(terminal.LEAVE)[1]
        assert after.strip() == "tinyvgpt: clip is 99, robot-push has 0 to 95"
        assert termios.tcgetattr(theirs) == before


def test_without_a_terminal(folder, capsys):
    assert cli.main(["play", str(folder)]) == 2
    assert "input and output must be a terminal" in capsys.readouterr().err
    assert cli.main(["play", str(folder), "--fps", "0"]) == 2
    assert "fps is 0.0, must be above 0" in capsys.readouterr().err


def test_without_termios(monkeypatch):
    monkeypatch.setattr(terminal, "termios", None)
    with pytest.raises(ValueError, match="no terminal that can be played on"), terminal.opened():
        pass
