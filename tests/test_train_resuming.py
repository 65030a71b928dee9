"""Resuming a training run: what it continues from, what it refuses to continue."""

from dataclasses import replace

import pytest
import torch
from test_train import (
    LAST,
    QUICK,
    Clips,
    Stop,
    StopsAfter,
    fresh_gpt,
    fresh_vqvae,
    lines,
    same,
)

from tinyvgpt.checkpoints import Checkpoints
from tinyvgpt.train import train_gpt, train_vqvae


@pytest.mark.parametrize("stage", ["vqvae", "gpt"])
@pytest.mark.parametrize("stopped_at", [1, 2, 5])
def test_resumes_exactly(tmp_path, stage, stopped_at):
    """Averaged and plain weights, codebook and log are those of a run that was never stopped."""
    fields = {"classes": 10, "label_dropout": 0.3}
    make = fresh_vqvae if stage == "vqvae" else lambda: fresh_gpt(**fields)
    train = train_vqvae if stage == "vqvae" else train_gpt
    expected = train(make(), Clips(), QUICK, tmp_path / "whole", validation=Clips("val"))
    with pytest.raises(Stop):
        train(make(), StopsAfter(stopped_at), QUICK, tmp_path / "cut", validation=Clips("val"))
    assert bool([*(tmp_path / "cut").glob("checkpoint-*.pt")]) == (stopped_at >= 2)
    data = Clips()
    torch.manual_seed(99)  # of no consequence
    resumed = train(make(), data, QUICK, tmp_path / "cut", validation=Clips("val"))
    assert same(resumed, expected)
    assert len(data.asked) == 1 + 6 - stopped_at // 2 * 2, "goes on where the checkpoint was made"
    a, b = (torch.load(tmp_path / run / LAST) for run in ("whole", "cut"))
    assert all(torch.equal(a["module"][name], b["module"][name]) for name in a["module"])
    strip = lambda line: {k: v for k, v in line.items() if "per_second" not in k}  # noqa: E731
    cut, whole = ([strip(x) for x in lines(tmp_path / run)] for run in ("cut", "whole"))
    assert cut == whole


def test_other_seed_other_weights(tmp_path):
    """The comparison above can fail: the seed reaches the weights, and so does the data's order."""
    first = train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path / "a")
    second = train_vqvae(fresh_vqvae(), Clips(), replace(QUICK, seed=1), tmp_path / "b")
    assert not same(first, second)


def test_finished_run_is_not_trained_again(tmp_path):
    first = train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)
    data = StopsAfter(0)
    assert same(train_vqvae(fresh_vqvae(), data, QUICK, tmp_path), first)


def test_resuming_does_not_redraw_the_codebook(tmp_path):
    """The original's `initialised` flag is not saved: its codebook starts anew on resuming."""
    config = replace(QUICK, lr=0.0, ema=0.0)
    with pytest.raises(Stop):
        train_vqvae(fresh_vqvae(), StopsAfter(4), config, tmp_path)
    before = torch.load(tmp_path / "checkpoint-0000004.pt")["module"]["codebook.codes"]
    vqvae = train_vqvae(fresh_vqvae(), Clips(), replace(config), tmp_path)
    kept = (vqvae.codebook.codes - before).norm(dim=1) < 0.3 * before.norm(dim=1)
    assert kept.float().mean() > 0.5


def test_left_over_lines_and_files_go(tmp_path):
    with pytest.raises(Stop):
        train_vqvae(fresh_vqvae(), StopsAfter(4), QUICK, tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(
            '{"step": 5, "loss": 1}\n{"step": 6, "lo'
        )  # written after the checkpoint; cut off
    (tmp_path / ".checkpoint-0000006.pt.1-ab.tmp").write_bytes(b"half a checkpoint")
    train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lr": 1e-4}, "lr was 0.003, is 0.0001"),
        ({"seed": 5}, "seed was 0, is 5"),
        ({"steps": 8}, "steps was 6, is 8"),
        ({"ema": 0.0, "batch_size": 2}, "batch_size was 4, is 2, ema was 0.9, is 0.0"),
    ],
)
def test_checkpoint_of_other_settings(tmp_path, changed, named):
    train_vqvae(fresh_vqvae(), Clips(), replace(QUICK, steps=6), tmp_path)
    with pytest.raises(ValueError, match=named) as caught:
        train_vqvae(fresh_vqvae(), Clips(), replace(QUICK, **changed), tmp_path)
    assert LAST in str(caught.value)


def test_checkpoint_of_another_model(tmp_path):
    """Settings that no tensor's shape betrays are noticed too, and so is another tokenizer."""
    train_gpt(fresh_gpt(), Clips(), QUICK, tmp_path)
    with pytest.raises(ValueError, match=r"heads was 2, is 1"):
        train_gpt(fresh_gpt(heads=1), Clips(), QUICK, tmp_path)
    other = fresh_gpt()
    other.vqvae.codebook.codes.add_(1)
    other.gpt.codes.add_(1)
    with pytest.raises(ValueError, match="codebook was"):
        train_gpt(other, Clips(), QUICK, tmp_path)
    with pytest.raises(ValueError, match="another kind of model, without downsample"):
        train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)


def test_what_may_change(tmp_path):
    with pytest.raises(Stop):
        train_vqvae(fresh_vqvae(), StopsAfter(4), QUICK, tmp_path / "cut")
    free = {"log_every": 1, "checkpoint_every": 5, "validate_every": 0, "validation_clips": 2}
    resumed = train_vqvae(fresh_vqvae(), Clips(), replace(QUICK, **free), tmp_path / "cut")
    assert same(resumed, train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path / "whole"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: path.write_bytes(b"nonsense"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"module", b"nodule", 1)),
    ],
)
def test_damaged_checkpoints(tmp_path, damage):
    """The one before is used, and the run ends as it would have; without one it says so."""
    expected = train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path / "a")
    folder = tmp_path / "b"
    train_vqvae(fresh_vqvae(), Clips(), QUICK, folder)
    assert sorted(path.name for path in folder.glob("*.pt")) == ["checkpoint-0000004.pt", LAST]
    damage(folder / LAST)
    data = Clips()
    with pytest.warns(UserWarning, match=f"{LAST} is damaged .* going on from checkpoint-0000004"):
        assert same(train_vqvae(fresh_vqvae(), data, QUICK, folder), expected)
    assert len(data.asked) == 1 + 2
    for path in folder.glob("*.pt"):
        damage(path)
    with pytest.raises(ValueError, match="damaged; remove them to start again") as caught:
        train_vqvae(fresh_vqvae(), Clips(), QUICK, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"module": {}},
        {"optimizer": None},
        {"average": None},
        {"average": {"nonsense": torch.zeros(1)}},
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path, change):
    """Whole, but of other contents than this program saves."""
    train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)
    content = torch.load(tmp_path / LAST)
    Checkpoints(tmp_path, 1).save(6, {**content, **change})
    with pytest.raises(ValueError, match="doesn't fit this run") as caught:
        train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)
    assert "\n" not in str(caught.value)
    assert LAST in str(caught.value)


def test_resuming_with_other_data(tmp_path):
    train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)
    with pytest.raises(ValueError, match=r"data was 40 clips .*, is 41 clips"):
        train_vqvae(fresh_vqvae(), Clips(size=41), QUICK, tmp_path)
    with pytest.raises(ValueError, match=r"data was 40 clips .*, is 40 clips"):
        train_vqvae(fresh_vqvae(), Clips("val"), QUICK, tmp_path)


def test_full_disk_keeps_the_checkpoint(tmp_path, file_limit):
    with pytest.raises(Stop):
        train_vqvae(fresh_vqvae(), StopsAfter(4), QUICK, tmp_path)
    saved = tmp_path / "checkpoint-0000004.pt"
    before = saved.read_bytes()
    limited = file_limit(len(before) // 2)
    with limited, pytest.raises(OSError, match="could not be written"):
        train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)
    assert saved.read_bytes() == before
    assert not list(tmp_path.glob(".*"))
