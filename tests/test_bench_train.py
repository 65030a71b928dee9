"""Benchmarks of training: what they count, at sizes that a CPU steps through in no time."""

import json
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from tinyvgpt import GPTConfig, VQVAEConfig, open_dataset
from tinyvgpt import settings as settings_module
from tinyvgpt.bench import kernel_steps
from tinyvgpt.bench import learning as bench_learning
from tinyvgpt.bench import profile as bench_profile
from tinyvgpt.bench import train as bench_train
from tinyvgpt.bench.kernel_steps import training_steps
from tinyvgpt.bench.learning import averaged, learning, settings, window_means
from tinyvgpt.bench.profile import PROFILED
from tinyvgpt.bench.scaling import scaling
from tinyvgpt.bench.train import (
    baseline,
    compared,
    compiling_anew,
    gradient_error,
    in_fresh_process,
    time_gpt,
    time_vqvae,
    timed,
    training,
)
from tinyvgpt.commands.bench import Bench
from tinyvgpt.settings import TrainConfig
from tinyvgpt.train import vqvae_stage

SMALL = VQVAEConfig(
    frames=8, resolution=16, downsample=(4, 2, 2), hidden=8, res_blocks=1, codes=16, code_dim=4
)
GPT = GPTConfig.for_vqvae(SMALL, width=12, heads=2, layers=1, dropout=0.0, attn_dropout=0.0)
CPU = torch.device("cpu")


@pytest.fixture
def eager(monkeypatch):
    """Compiling takes longer than all that is tested here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(settings_module, "lacking", lambda device: None)


def test_gpt(eager):
    found = time_gpt(GPT, SMALL, CPU, 2, 1)
    assert found["tokens a step"] == 2 * 2 * 8 * 8
    for way in ("reference", "plain", "ours"):
        seconds = found[way]["milliseconds"] / 1e3
        assert found[way]["per second"] == pytest.approx(256 / seconds, rel=1e-2)
    assert {"ours against reference", "ours against plain"} <= found.keys()
    assert 0 < found["gradient error"]["bfloat16"] < 0.1


def test_vqvae(eager):
    found = time_vqvae(SMALL, CPU, 2, 1)
    assert found["clips a step"] == 2
    assert {"reference", "ours", "ours against reference"} <= found.keys()
    assert 0 < found["gradient error"]["bfloat16"] < 0.2


def test_training(eager, monkeypatch):
    """Given a GPT, its number of heads is timed alone; not given one, the released 9 and 4."""
    jobs = []
    monkeypatch.setattr(bench_train, "in_fresh_process", lambda job: jobs.append(job) or job.func)
    assert training(SMALL, GPT, device="cpu").keys() == {"gpt, 2 heads", "vqvae"}
    assert training(SMALL, device="cpu").keys() == {"gpt, 9 heads", "gpt, 4 heads", "vqvae"}
    assert [job.func for job in jobs] == [time_gpt, time_vqvae, time_gpt, time_gpt, time_vqvae]
    assert [job.args[0].heads for job in jobs if job.func == time_gpt] == [2, 9, 4]
    assert [job.keywords["plain"] for job in jobs if job.func == time_gpt] == [True, True, False]


def test_kinds_of_kernels(monkeypatch):
    """Each kernel's time counts once: with what launches it, or, of the package's, with itself."""
    host, gpu = DeviceType.CPU, DeviceType.CUDA
    names = [
        (host, "aten::cudnn_convolution", 3), (gpu, "sm90_xmma_fprop", 3),
        (host, "aten::_flash_attention_forward", 2), (gpu, "void flash_fwd_kernel<>", 2),
        (host, "tinyvgpt::axial_block", 0), (gpu, "void axial_forward<128, 4>(int)", 4),
        (gpu, "void at::native::index_kernel", 1),
    ]  # fmt: skip
    events = [
        SimpleNamespace(
            device_type=where, key=key, self_device_time_total=1e3 * PROFILED * ms,
            is_user_annotation=False,
        )
        for where, key, ms in names
    ]  # fmt: skip
    monkeypatch.setattr(bench_profile, "profiled", lambda step: events)
    found = bench_profile.kinds_of_kernels(lambda: None)
    assert found == {"convolutions": 3, "attention": 6, "codebook, loss and the rest": 1}


def test_one_stage_is_added_to_the_record(monkeypatch, tmp_path):
    """The other stage's figures stay, if they were measured alike."""
    monkeypatch.setattr(bench_train, "in_fresh_process", lambda job: jobs.append(job) or len(jobs))
    jobs = []

    def recorded(stage):
        Bench("train", stage=stage, device="cpu", out=tmp_path).run()
        return json.loads(path.read_text())

    name = f"train-cpu-{torch.get_num_threads()}-threads.json"
    path = tmp_path / name
    assert recorded(None)["vqvae"] == 3
    old = json.loads(path.read_text()) | {"date": "2020-01-01"}
    path.write_text(json.dumps(old))
    new = recorded("vqvae")
    assert new["date"] != old["date"]
    assert new == old | {"vqvae": 4, "date": new["date"]}
    assert recorded("gpt") == new | {"gpt, 9 heads": 5, "gpt, 4 heads": 6}
    path.write_text(json.dumps(old | {"torch": "1.0"}))
    assert "vqvae" not in recorded("gpt")
    with pytest.raises(ValueError, match="no stage 'both'; there are gpt and vqvae"):
        recorded("both")


def test_each_stage_has_a_process_of_its_own():
    pids = [in_fresh_process(os.getpid) for _ in range(2)]
    assert len({os.getpid(), *pids}) == 3


def test_timed(monkeypatch):
    """The median of repeats of so many steps, warm-up left out."""
    monkeypatch.setattr(bench_train, "REPEATS", 3)
    clock, calls, lasts = [0.0], [0], [50.0] * 5 + [1.0] * 2 + [2.0] * 2 + [9.0] * 2

    def step():
        clock[0] += lasts[calls[0]]
        calls[0] += 1

    monkeypatch.setattr(bench_train.time, "perf_counter", lambda: clock[0])
    found = timed(step, CPU, 2, 10)
    assert calls[0] == len(lasts)
    assert found == {"milliseconds": 2000.0, "per second": 5.0, "first step, seconds": 50.0}


def test_compared():
    ways = {"reference": {"milliseconds": 30.0}, "ours": {"milliseconds": 20.0}}
    assert compared(ways) == {**ways, "ours against reference": 1.5}


def test_baseline_is_a_step_of_training():
    model = nn.Linear(3, 1, bias=False)
    step = baseline(model, lambda x: model(x).square().mean(), torch.randn(8, 3))
    before = model.weight.detach().clone()
    step()
    assert torch.allclose((model.weight - before).abs(), torch.full((1, 3), 3e-4), rtol=1e-2)
    assert model.weight.grad is None


def test_gradient_error_notices(eager, monkeypatch):
    """A compiler that leaves a tenth of the loss out."""
    torch.manual_seed(0)
    stage = vqvae_stage(bench_train.VQVAE(SMALL), "")
    batch = {"video": torch.randint(256, (2, 8, 16, 16, 3), dtype=torch.uint8)}
    config = TrainConfig(precision="bfloat16")
    right = gradient_error(stage, config, batch, CPU)
    assert right["bfloat16"] == right["bfloat16, compiled"]

    def wrong(function, **options):
        return lambda *given: {"loss": 0.9 * function(*given)["loss"]}

    monkeypatch.setattr(torch, "compile", wrong)
    found = gradient_error(stage, config, batch, CPU)
    assert found["bfloat16"] == right["bfloat16"]
    assert found["bfloat16, compiled"] == pytest.approx(0.1, abs=0.05)


def test_scaling():
    found = scaling(SMALL, GPT, device="cpu", processes=(1, 2), vqvae_batch=2, gpt_batch=2, steps=1)
    for stage, units in (("gpt", 256), ("vqvae", 2)):
        for count in (1, 2):
            way = found[stage][str(count)]
            assert way["per second"] == pytest.approx(
                count * units / way["milliseconds"] * 1e3, rel=1e-2
            )
        ratio = found[stage]["2"]["per second"] / found[stage]["1"]["per second"]
        assert found[stage]["2 against 1"] == pytest.approx(ratio, abs=1e-3)


def test_window_means(tmp_path):
    """Steps 51 to 70, 71 to 90; lines of other kinds and a last window cut short are left out."""
    lines = [{"step": step, "loss": float(step)} for step in range(10, 101, 10)]
    lines.insert(6, {"step": 60, "val_loss": 0.0})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert window_means(tmp_path) == [65.0, 85.0]


def test_learning(monkeypatch):
    """On a CPU both paths are the same, so the curves are; noise in one of them shows."""
    preset = bench_learning.moving_mnist()
    size = {"hidden": 8, "res_blocks": 1, "codes": 16, "code_dim": 4, "downsample": (4, 8, 8)}
    clips = {"frames": 8, "resolution": 32}
    small = VQVAEConfig(channels=1, causal_time=True, **clips, **size)
    gpt = GPTConfig.for_vqvae(small, width=12, heads=2, layers=1, classes=55, label_dropout=0.2)
    changed = bench_learning.replace(preset, vqvae=small, gpt=gpt)
    monkeypatch.setattr(bench_learning, "moving_mnist", lambda: changed)
    monkeypatch.setattr(bench_learning, "MOVED", 1e-4)  # so that it shows after few steps
    monkeypatch.setattr(bench_learning, "open_dataset", partial(open_dataset, **clips))
    original, seeds, factor = bench_learning.curve, [], 1.0

    def curve(train, config, name):
        seeds.append(config.seed)
        return [(factor if name == "fast" else 1.0) * x for x in original(train, config, name)]

    monkeypatch.setattr(bench_learning, "curve", curve)
    found = learning(device="cpu", steps=70, batch=2, seeds=2)
    assert seeds == [0, 0, 0, 1, 1, 1, 0, 0]
    assert len(found["vqvae"]["curves"]) == 2
    assert found["vqvae"]["curves"][0] != found["vqvae"]["curves"][1]
    for stage in ("vqvae", "gpt"):
        assert found[stage]["fast"]["largest"] == found[stage]["fast"]["largest of one seed"] == 0
        for values in found[stage]["curves"][0].values():
            assert len(values) == 1
            assert math.isfinite(values[0])
    assert 0 < found["vqvae"]["float32, moved"]["largest"] < 0.05
    factor = 1.1
    found = learning(device="cpu", steps=70, batch=2, seeds=1)
    for stage in ("vqvae", "gpt"):
        assert found[stage]["fast"]["largest"] == pytest.approx(0.1, rel=1e-2)


def test_paths():
    """What `learning` compares on a GPU."""
    config = TrainConfig(device="cuda")
    fast, exact = settings(config, "fast"), settings(config, "float32, moved")
    assert (fast.precision, fast.compile) == ("auto", "on")
    assert (exact.precision, exact.compile) == ("float32", "off")


def test_compiling_anew():
    """Each way has a cache of its own, and none afterwards."""
    former = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folders = []
    for _ in range(2):
        with compiling_anew():
            folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
            assert not os.listdir(folders[-1])
    assert len({former, *folders}) == 3
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == former


def test_differences_are_averaged_over_seeds():
    up = {"float32": [1.0, 2.0], "fast": [1.03, 2.0]}
    down = {"float32": [2.0, 1.0], "fast": [1.98, 1.0]}
    found = averaged([up, down])
    assert found["fast"] == {
        "differences": [0.01, 0.0], "largest": 0.01, "largest of one seed": 0.03
    }  # fmt: skip


def test_kernel_steps(eager, monkeypatch):
    """On a CPU both ways are PyTorch's."""
    monkeypatch.setattr(kernel_steps, "in_fresh_process", lambda job: job())
    monkeypatch.setattr(kernel_steps, "compiling_anew", nullcontext)
    found = training_steps(SMALL, replace(GPT, attention="strided"), device="cpu", steps=1)
    assert found.keys() == {"vqvae", "gpt, strided, 2 heads"}
    for way in found.values():
        assert way["loss"]["kernels"] == way["loss"]["PyTorch's attention"]
        assert way["loss"]["kernels"] == pytest.approx(way["loss"]["float32"], rel=1e-2)
        assert 0 < way["gradient error"]["kernels"] < 0.2
        times = [way[name]["milliseconds"] for name in ("PyTorch's attention", "kernels")]
        assert way["kernels against PyTorch's"] == pytest.approx(times[0] / times[1], abs=1e-2)
    assert found["vqvae"]["clips a step"] == 16
