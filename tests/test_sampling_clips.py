"""The clips of chapter 10's widget are what the shipped model draws at the listed settings."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyvgpt import VideoGPT, counter
from tinyvgpt.sampling import SamplingRule, draw

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "book" / "pregenerate_sampling.py"))
RECORD = json.loads(SCRIPT["RECORD"].read_text(encoding="utf-8"))
AGAIN = "run: python book/pregenerate_sampling.py"


@pytest.fixture(scope="module")
def tokens():
    return torch.from_numpy(SCRIPT["unpack"](RECORD["tokens"], RECORD["shape"]))


@pytest.fixture(scope="module")
def gpt():
    return VideoGPT.from_pretrained(RECORD["model"]).gpt


def test_the_record_lists_the_settings_of_the_script():
    assert RECORD["temperatures"] == list(SCRIPT["TEMPERATURES"]), AGAIN
    assert RECORD["rules"] == SCRIPT["RULES"], AGAIN
    assert RECORD["model"] == SCRIPT["MODEL"], AGAIN
    assert RECORD["seed"] == SCRIPT["SEED"], AGAIN
    settings = [len(RECORD["temperatures"]), len(RECORD["rules"]), SCRIPT["CLIPS"]]
    assert RECORD["shape"][:3] == settings, AGAIN


def test_the_record_is_of_the_shipped_weights():
    assert RECORD["fingerprint"] == SCRIPT["fingerprint"](SCRIPT["MODEL"]), AGAIN


@pytest.mark.parametrize("setting", [(0, 0), (4, 0), (4, 1), (6, 3)])
@torch.no_grad()
def test_the_model_draws_these_tokens(gpt, tokens, setting):
    """Each token follows from those before it, but for draws within rounding of an edge."""
    temperature = RECORD["temperatures"][setting[0]]
    fields = list(RECORD["rules"].values())[setting[1]]
    clip = tokens[setting][:1]  # (1, t, h, w)
    logits = gpt(clip).flatten(0, 3)
    p = SamplingRule(temperature=temperature, **fields).probabilities(logits)
    u = counter.uniform(RECORD["seed"], 0, np.arange(len(p)))
    agree = (draw(p, torch.from_numpy(u)) == clip.flatten()).float().mean()
    assert agree > 0.99, AGAIN


def test_packing_loses_nothing():
    tokens = np.random.default_rng(0).integers(0, 2**16, (2, 3, 4))
    text = SCRIPT["pack"](tokens)
    assert np.array_equal(SCRIPT["unpack"](text, [2, 3, 4]), tokens)
