"""What training refuses: data and conditions that don't fit, settings without sense, bad losses."""

import math
from dataclasses import replace

import pytest
import torch
from test_train import QUICK, SMALL, Clips, fresh_gpt, fresh_vqvae

from tinyvgpt import VQVAE
from tinyvgpt.train import TrainConfig, train_gpt, train_vqvae


def data_with(**attributes):
    data = Clips()
    for name, value in attributes.items():
        setattr(data, name, value)
    return data


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"channels": 3}, "channels 3, the model needs 1"),
        ({"frames": 8}, "frames 8, the model needs 4"),
        ({"resolution": 64}, "resolution 64, the model needs 32"),
    ],
)
def test_data_that_does_not_fit(tmp_path, attributes, says):
    data = data_with(**attributes)
    for call in (
        lambda: train_vqvae(fresh_vqvae(), data, QUICK, tmp_path),
        lambda: train_vqvae(fresh_vqvae(), Clips(), QUICK, tmp_path, validation=data),
        lambda: train_gpt(fresh_gpt(), data, QUICK, tmp_path),
        lambda: train_gpt(fresh_gpt(), Clips(), QUICK, tmp_path, validation=data),
    ):
        with pytest.raises(ValueError, match=says):
            call()


@pytest.mark.parametrize(
    ("fields", "data", "says"),
    [
        ({"classes": 7}, {}, "7 classes, the data 10 labels"),
        ({"classes": 10}, {"labels": False}, "10 classes, the data 0 labels"),
        ({"action_dim": 3}, {}, "no actions"),
        ({"action_dim": 3}, {"actions": 2}, r"\(4, 2\), the model needs \(4, 3\)"),
    ],
)
def test_conditions_that_the_data_lacks(tmp_path, fields, data, says):
    with pytest.raises(ValueError, match=says):
        train_gpt(fresh_gpt(**fields), Clips(**data), QUICK, tmp_path)


def test_labels_in_another_order(tmp_path):
    model = fresh_gpt(classes=10)
    model.label_names = tuple("9876543210")
    with pytest.raises(ValueError, match="another order"):
        train_gpt(model, Clips(), QUICK, tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"openings": 1.0}, "openings is 1.0, must be at least 0 and below 1"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"final_lr": math.nan}, "final_lr is nan"),
        ({"final_lr": -1.0}, "final_lr is -1.0"),
        ({"precision": "float8"}, "float8"),
        ({"compile": "maybe"}, "compile is 'maybe', must be auto or on or off"),
        ({"non_finite": "ignore"}, "non_finite"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"log_every": 0}, "log_every is 0"),
    ],
)
def test_settings_that_make_no_sense(fields, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(**fields)


def test_unknown_device():
    with pytest.raises(ValueError, match="gpu"):
        TrainConfig(device="gpu").torch_device()
    with pytest.raises(ValueError, match="'meta', must be auto, cpu or cuda"):
        TrainConfig(device="meta").torch_device()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            TrainConfig(device="cuda").torch_device()


class Poisoned(VQVAE):
    """A tokenizer whose loss, or only whose gradient, turns bad at one step."""

    at, only_gradient, calls = 5, False, 0

    def forward(self, x):
        out = super().forward(x)
        self.calls += 1
        if self.calls < self.at:
            return out
        bad = (self.to_code.bias.sum() * 0).abs().sqrt()  # 0, and its gradient is 0 · ∞
        return out._replace(loss=out.loss + (bad if self.only_gradient else math.inf))


@pytest.mark.parametrize("only_gradient", [False, True])
@pytest.mark.parametrize(("at", "checkpointed", "logged"), [(5, 4, 10), (2, 0, 10), (3, 2, 1)])
def test_divergence_stops(tmp_path, at, checkpointed, logged, only_gradient):
    torch.manual_seed(0)
    vqvae = Poisoned(SMALL)
    vqvae.at, vqvae.only_gradient = at, only_gradient
    config = replace(QUICK, log_every=logged)
    with pytest.raises(
        ValueError, match=rf"not finite at step {at} \(batch {at - 1} of seed 0\)"
    ) as caught:
        train_vqvae(vqvae, Clips(), config, tmp_path)
    assert "\n" not in str(caught.value)
    if checkpointed:
        saved = tmp_path / f"checkpoint-{checkpointed:07d}.pt"
        assert str(saved) in str(caught.value)
        content = torch.load(saved)
        assert content["step"] == checkpointed
        floats = [t for t in content["module"].values() if t.is_floating_point()]
        assert all(t.isfinite().all() for t in floats), "the last good checkpoint is good"
    else:
        assert "no checkpoint" in str(caught.value)
    assert not (tmp_path / "vqvae.safetensors").exists()
    if (tmp_path / "log.jsonl").exists():
        assert "NaN" not in (tmp_path / "log.jsonl").read_text()
