"""The longer trainings of the page on own videos: their films, what is recorded and shown."""

import json
import sys

import own_videos
import pytest

from tinyvgpt import open_dataset, video


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["own_videos.py", *map(str, words)])
    own_videos.main()


def test_smoke(tmp_path, monkeypatch, capsys):
    """All runs, tiny; they leave the book alone, and are not repeated."""
    runs, book = tmp_path / "runs", tmp_path / "book"
    main(monkeypatch, "--runs", runs, "--smoke", "--book", book)
    assert not book.exists()
    record = json.loads((runs / "results" / "own-videos.json").read_text())
    assert record["command"] == "python data_recipes/own_videos.py --runs RUNS --smoke"
    assert record["films"] == {
        "train": 231, "val": 25, "test": 32, "minutes": pytest.approx(7.7), "clips": 1155,
    }  # fmt: skip
    for kind in ("preset", "finer"):
        tokenizer, gpt = record[kind]["tokenizer"], record[kind]["gpt"]
        assert tokenizer["steps"] == gpt["steps"] == 2
        assert 5 < tokenizer["test_psnr"] < 20
        assert 1 <= tokenizer["val_codes_used"] <= 16
        assert 3.5 < gpt["test_bits"] < 4.5  # of one in 16 codes
        assert min(tokenizer["minutes"], gpt["minutes"]) > 0
    steps, *bits = zip(*record["preset"]["curves"]["gpt"], strict=True)
    assert steps == (1, 2, 3)
    assert all(3.5 < value < 4.5 for values in bits for value in values)
    assert [part["films"] for part in record["data"]] == [2, 231]
    shapes = {
        "reconstructions": (16, 3, 8), "samples-preset": (16, 2, 8), "samples-finer": (16, 2, 8),
        "continuations-finer": (16, 4, 4),
    }  # fmt: skip
    for name, (frames, rows, columns) in shapes.items():
        clip = video.read(runs / "_static" / f"own-videos-{name}.mp4")
        side = 2 * 64
        assert clip.shape[0] == frames
        assert rows * side <= clip.shape[1] < (rows + 1) * side
        assert columns * side <= clip.shape[2] < (columns + 1) * side
    capsys.readouterr()
    for stage in ("train_vqvae", "train_gpt"):
        monkeypatch.setattr(own_videos, stage, None)  # nothing is trained again
    main(monkeypatch, "--runs", runs, "--smoke")
    assert json.loads((runs / "results" / "own-videos.json").read_text()) == record


def test_films_are_those_of_the_page():
    """Two seconds in which the hand gets furthest aside, and to which side, found one by one."""
    films = own_videos.Films("test")
    source = open_dataset("robot-push", "test", frames=30)
    for row in range(len(source)):
        take = source.batch([row])
        aside = take["action"][0, :, 1] - take["action"][0, :, 0]
        ways = [aside[start : start + 20].sum().item() for start in range(11)]
        start = max(range(11), key=lambda i: abs(ways[i]))
        assert films.films[row].equal(take["video"][0, start : start + 20])
        assert films.labels[row] == (ways[start] > 0)


def test_clips():
    some = own_videos.Films("train", 3)
    assert len(some) == 3 * 5
    batch = some.batch([0, 7, 14])
    assert batch["label"].equal(some.labels)
    for clip, (film, start) in zip(batch["video"], [(0, 0), (1, 2), (2, 4)], strict=True):
        assert clip.equal(some.films[film, start : start + 16])
    assert len(own_videos.Films("test")) == 32


def test_minutes_are_of_steps(tmp_path):
    lines = [
        {"step": 10, "clips_per_second": 8.0},
        {"step": 10, "val_psnr": 20.0},
        {"step": 25, "clips_per_second": 16.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert own_videos.minutes(tmp_path, "clips", 32) == pytest.approx((40 + 30) / 60)


def test_the_page_s_commands():
    """What the page's commands for a longer run say, in numbers."""
    kinds = own_videos.plan().kinds
    assert [of.train_vqvae.steps for of in kinds.values()] == [4000, 3000]
    assert [of.train_gpt.steps for of in kinds.values()] == [1200, 1800]
    assert [of.gpt.tokens for of in kinds.values()] == [256, 1024]
    assert [(of.gpt.width, of.gpt.layers, of.gpt.dropout) for of in kinds.values()] == [
        (144, 4, 0.1), (240, 6, 0.2),
    ]  # fmt: skip
    assert all(of.gpt.classes == 2 and of.gpt.label_dropout == 0.1 for of in kinds.values())
    assert {of.train_vqvae.ema for of in kinds.values()} == {0.999}
