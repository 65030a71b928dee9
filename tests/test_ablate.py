"""The ablations: what a run changes, what is not done twice, and what is written."""

import json
import sys
from dataclasses import asdict, replace

import ablate
import pytest
import torch

from tinyvgpt import VQVAE, VideoGPT, open_dataset, video


class Interrupted(Exception):
    pass


@pytest.fixture
def few(monkeypatch):
    """Two tokenizers and a GPT on each."""
    names = [ablate.BASE, "128 codes"]
    monkeypatch.setattr(ablate, "TOKENIZERS", {name: ablate.TOKENIZERS[name] for name in names})
    gpts = {"2 layers": (ablate.BASE, {"layers": 2}), "on 128 codes": ("128 codes", {"layers": 1})}
    monkeypatch.setattr(ablate, "GPTS", gpts)


@pytest.fixture(scope="module")
def data():
    return open_dataset("moving-mnist"), open_dataset("moving-mnist", "test")


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, words)])
    ablate.main()


def test_smoke(tmp_path, monkeypatch, capsys):
    """All runs, tiny; its record and plot don't take the place of the real ones."""
    runs, out = tmp_path / "runs", tmp_path / "results"
    main(monkeypatch, "--runs", runs, "--smoke", "--out", out)
    assert not out.exists()
    found = json.loads((runs / "ablations.json").read_text())
    assert found["smoke"]
    assert found["command"] == "python data_recipes/ablate.py --runs RUNS --smoke"
    assert list(found["runs"]) == [*ablate.TOKENIZERS, *ablate.GPTS]
    for name, figures in found["runs"].items():
        of_tokenizers = ["psnr", "ssim", "codes_in_use", "right_digits"]
        of_gpts = ["bits_per_token", "bits_per_clip"]
        assert list(figures) == (of_tokenizers if name in ablate.TOKENIZERS else of_gpts)
        assert all(len(values) == 1 for values in figures.values())
    assert (runs / "ablations.png").read_bytes().startswith(b"\x89PNG")
    assert not list(runs.rglob("checkpoint-*"))
    configs = {name: VQVAE.from_pretrained(ablate.folder_of(runs, name, 0)).config
               for name in ablate.TOKENIZERS}  # fmt: skip
    base = configs[ablate.BASE]
    for name, changes in ablate.TOKENIZERS.items():
        assert configs[name] == replace(base, **changes)
    models = {name: VideoGPT.from_pretrained(ablate.folder_of(runs, name, 0))
              for name in ablate.GPTS}  # fmt: skip
    for name, (tokenizer, _) in ablate.GPTS.items():
        assert models[name].vqvae.config == configs[tokenizer]
    of = {name: asdict(model.gpt.config) for name, model in models.items()}
    changed = {n: {k: v for k, v in c.items() if v != of["8 layers"][k]} for n, c in of.items()}
    assert changed == {
        "8 layers": {},
        "4 layers": {"layers": 4},
        "2 layers": {"layers": 2},
        "strided attention": {"attention": "strided"},
        "on wide encoder": {},
        "on wide encoder, axial": {},
        "on 128 codes": {"codes": 128},
        "on 2048 codes": {"codes": 2048},
    }
    capsys.readouterr()
    for stage in ("train_vqvae", "train_gpt"):
        monkeypatch.setattr(ablate, stage, None)  # nothing is trained again
    main(monkeypatch, "--runs", runs, "--smoke")
    assert json.loads((runs / "ablations.json").read_text())["runs"] == found["runs"]
    assert capsys.readouterr().out.splitlines()[0].startswith("512 codes")


def test_it_goes_on_where_it_was_interrupted(tmp_path, few, data, monkeypatch):
    plan = replace(ablate.smoke(), seeds=2)
    whole = ablate.ablate(plan, tmp_path / "whole", *data)
    assert [len(x) for of in whole.values() for x in of.values()] == [2] * 12
    assert whole["2 layers"]["bits_per_clip"][0] != whole["2 layers"]["bits_per_clip"][1]
    train, started = ablate.train_gpt, []

    def interrupted(*words):
        started.append(words)
        if len(started) == 2:
            raise Interrupted
        return train(*words)

    monkeypatch.setattr(ablate, "train_gpt", interrupted)
    with pytest.raises(Interrupted):
        ablate.ablate(plan, tmp_path / "parts", *data)
    assert ablate.ablate(plan, tmp_path / "parts", *data) == whole
    assert len(started) == 5  # one of the four GPTs was started twice


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path, few, data):
    plan = ablate.smoke()
    ablate.ablate(plan, tmp_path, *data)
    with pytest.raises(ValueError, match="has a run with another data; give another --runs"):
        ablate.ablate(plan, tmp_path, open_dataset("moving-mnist", seed=1), data[1])
    other = replace(plan, train_vqvae=replace(plan.train_vqvae, lr=1e-4))
    with pytest.raises(ValueError, match=r"512-codes-seed-0 has a run with another lr; give"):
        ablate.ablate(other, tmp_path, *data)


def test_without_restarts_an_unused_code_stays(tmp_path, data, monkeypatch):
    trained = {}

    def train(vqvae, data, config, folder):
        vqvae.train()
        z = torch.randn(4, 8, 2, 4, 4) * 0.01
        for _ in range(80):
            vqvae.codebook(z)
        trained[folder.name] = (vqvae.codebook.count < 0.5).sum().item()
        vqvae.save(folder)

    monkeypatch.setattr(ablate, "train_vqvae", train)
    for name in (ablate.BASE, "no restarts"):
        ablate.tokenizer_run(ablate.smoke(), name, 0, tmp_path / name, *data)
    assert trained[ablate.BASE] == 0
    assert trained["no restarts"] > 300


@pytest.mark.parametrize(("kept", "share"), [(slice(None), 1.0), (slice(2), 0.5)])
def test_right_digits_are_a_share_of_real_clips(tmp_path, data, monkeypatch, kept, share):
    """A tokenizer that loses nothing has all of them, one that keeps two clips of four has half."""
    real = video.to_model(data[1].batch(range(4))["video"])
    decoded = torch.full_like(real, -0.5)
    decoded[kept] = real[kept]
    monkeypatch.setattr(
        ablate, "train_vqvae", lambda vqvae, data, config, folder: vqvae.save(folder)
    )
    monkeypatch.setattr(VQVAE, "decode", lambda self, tokens: decoded)
    figures = ablate.tokenizer_run(ablate.smoke(), ablate.BASE, 0, tmp_path, *data)
    assert figures["right_digits"] == pytest.approx(share, abs=0.1)


def test_the_preset_s_settings_but_for_the_base_s_and_the_length():
    plan, preset = ablate.plan(steps=1000, seeds=2, clips=512), ablate.moving_mnist().vqvae
    assert plan.vqvae == replace(preset, codes=512, axial=False, local_encoder=True)
    assert plan.gpt.codes == plan.vqvae.codes
    assert (plan.gpt.layers, plan.gpt.attention) == (8, "full")
    assert plan.train_gpt.encode_once == plan.train_gpt.steps * plan.train_gpt.batch_size
    assert plan.train_vqvae.steps == plan.train_gpt.steps == 1000
    assert plan.train_gpt.openings == 0


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("seeds", 0), ("clips", 1)])
def test_refusals(name, value, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"--{name} is {value}, it is too small"):
        main(monkeypatch, "--runs", tmp_path, f"--{name}", value)
