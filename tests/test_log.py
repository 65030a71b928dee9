"""What a run tells: progress on a terminal and in log files, JSON lines, TensorBoard's events."""

import json
import math
import sys
import time

import pytest
import torch
from test_train import QUICK, Clips, Stop, StopsAfter, fresh_vqvae, lines, replace, same

from tinyvgpt import loop
from tinyvgpt.log import Log, Rates
from tinyvgpt.progress import gist, three_digits
from tinyvgpt.train import train_vqvae

CPU = torch.device("cpu")
RATES = Rates("clips", units=8, flops=1e9, peak_flops=None)


def metrics(loss, norm=1.0):
    return {"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}


def new_log(out, rates=RATES, step=0, skipping=False):
    return Log(out, rates, step, 10, CPU, tensorboard=False, skipping=skipping)


def events(folder):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sizes = {"scalars": 0, "images": 0, "histograms": 0}
    return module.EventAccumulator(str(folder / "tensorboard"), size_guidance=sizes).Reload()


def test_gist_has_the_loss_first_and_three_digits():
    values = {"psnr": 14.234, "clips_per_second": 61.56, "loss": 0.53412, "lr": 1.0, "skipped": 0}
    assert gist(values) == "loss 0.534, PSNR 14.2 dB, 61.6 clips/s"
    assert gist({"loss": 1, "skipped": 2}) == "loss 1, 2 skipped"
    assert [three_digits(x) for x in (897_123, 0.99831, 0.00001234)] == [
        "897,000",
        "0.998",
        "1.23e-05",
    ]


def test_without_a_terminal_a_line_for_each_line_of_the_log(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # of pytest's plug-ins
    train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path, validation=Clips("val"))
    shown = capsys.readouterr().err.splitlines()
    logged = [line for line in lines(tmp_path) if "loss" in line]
    plain = [line for line in shown if "validation" not in line]
    for line, values in zip(plain, logged, strict=True):
        assert line.startswith(f"step {values['step']}/6: loss {three_digits(values['loss'])}, ")
        assert line.endswith(" left") == (values["step"] < 6)
    checked = [line.split(" loss")[0] for line in shown if "validation" in line]
    assert checked == ["step 3/6: validation", "step 6/6: validation"]
    train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)
    assert capsys.readouterr().err == "step 6/6: trained already\n"


def test_on_a_terminal_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path)
    shown = capsys.readouterr().err
    assert "| 6/6 [" in shown
    assert "left" not in shown


def test_mfu_is_work_over_what_could_have_been_done(tmp_path):
    log = new_log(tmp_path, Rates("clips", units=8, flops=1e9, peak_flops=4e9))
    log.collect(metrics(2.0))
    log.since -= 10
    log.write(1)
    (line,) = lines(tmp_path)
    assert line["mfu"] == pytest.approx(1e9 / 10 / 4e9, rel=0.01)
    assert line["clips_per_second"] == pytest.approx(0.8, rel=0.01)
    assert "peak_memory_gib" not in line


def test_pauses_do_not_count(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tinyvgpt.log.time.perf_counter", lambda: now[0])
    log = new_log(tmp_path)
    log.collect(metrics(1.0))
    now[0] += 2
    with log.paused():
        now[0] += 50
    log.write(1)
    assert lines(tmp_path)[0]["clips_per_second"] == 4


def test_skipped_steps_are_counted_and_left_out(tmp_path):
    log = new_log(tmp_path, skipping=True)
    for values in (metrics(1.0), metrics(math.inf), metrics(7.0, math.nan), metrics(3.0)):
        log.collect(values)
    log.check(4, 0, None)
    log.write(4)
    (line,) = lines(tmp_path)
    assert (line["skipped"], line["loss"]) == (2, 2.0)
    for step in range(5, 24):
        log.collect(metrics(math.nan))
        log.check(step, 0, None)
        log.write(step)
    log.collect(metrics(math.nan))
    with pytest.raises(ValueError, match=r"not finite at step 5 \(batch 4 "):
        log.check(24, 0, None)


@pytest.mark.parametrize("good", [0, 1])
def test_a_run_that_skips_all_its_steps_fails_at_its_end(tmp_path, good):
    log = new_log(tmp_path, skipping=True)
    log.steps = 4
    for step in range(1, 5):
        log.collect(metrics(1.0 if step == good else math.nan))
        if step < 4 or good:
            log.check(step, 0, None)
    if not good:
        with pytest.raises(ValueError, match=r"not finite at step 1 "):
            log.check(4, 0, None)


def test_every_line_is_json(tmp_path):
    new_log(tmp_path).write_validation(1, {"loss": 1.0, "psnr": math.inf})
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "val_loss": 1.0,
        "val_psnr": None,
    }


def test_events_hold_what_the_log_holds(tmp_path):
    pytest.importorskip("av")
    config = replace(QUICK, preview_every=4)
    train_vqvae(fresh_vqvae(), Clips(), config, tmp_path, validation=Clips("val"))
    found = events(tmp_path)
    logged = lines(tmp_path)
    names = {name for line in logged for name in line} - {"step"}
    assert set(found.Tags()["scalars"]) == names
    for name in names:
        expected = [(line["step"], line[name]) for line in logged if name in line]
        scalars = [(event.step, event.value) for event in found.Scalars(name)]
        assert scalars == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert [event.step for event in found.Histograms("codebook/count")] == [2, 4, 6]
    previews = found.Images("preview")
    assert [event.step for event in previews] == [4, 6]
    assert all(event.encoded_image_string.startswith(b"GIF89a") for event in previews)


def test_resuming_hides_later_events(tmp_path):
    config = replace(QUICK, log_every=1, checkpoint_every=4)
    with pytest.raises(Stop):
        train_vqvae(fresh_vqvae(), StopsAfter(5), config, tmp_path)
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [1, 2, 3, 4, 5]
    time.sleep(1)  # of files of one second TensorBoard may take the second for the first
    train_vqvae(fresh_vqvae(), Clips(), config, tmp_path)
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("quiet")
def test_without_tensorboard(tmp_path, monkeypatch):
    with_it = train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path / "a")
    off = replace(QUICK, tensorboard=False)
    assert same(train_vqvae(fresh_vqvae(), Clips(), off, tmp_path / "b"), with_it)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert same(train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path / "c"), with_it)
    assert [(tmp_path / run / "tensorboard").exists() for run in "abc"] == [True, False, False]


def test_out_of_memory_says_what_to_lower(tmp_path):
    class Large(Clips):
        def batch(self, indices, device="cpu"):
            if len(self.asked) > 1:
                raise error
            return super().batch(indices, device)

    for error in (  # noqa: B007
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ):
        with pytest.raises(ValueError, match=r"with 2 clips at a time: raise accumulate \(now 2"):
            train_vqvae(fresh_vqvae(), Large(), replace(QUICK, accumulate=2), tmp_path / "run")
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        train_vqvae(fresh_vqvae(), Large(), QUICK, tmp_path / "run")


def test_folders_that_cannot_be_written(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(OSError, match="is a file"):
        loop.make_writable(taken)
    with pytest.raises(OSError, match="taken/run can't be written to: Not a directory"):
        loop.make_writable(taken / "run")
    assert taken.read_text() == "mine"
