"""Presets are what they say: the paper's table, stages that fit, and the model that ships."""

import pytest

from tinyvgpt import GPTConfig, VideoGPT
from tinyvgpt.presets import PRESETS, preset

# Latent grid, codes, code dim (the paper's appendix A), and the prior's layers and heads.
PAPER = {
    "paper-moving-mnist": ((4, 16, 16), 512, 64, 8, 4),
    "paper-bair": ((8, 32, 32), 1024, 256, 16, 4),
    "paper-ucf101": ((4, 32, 32), 1024, 256, 20, 8),
}


@pytest.mark.parametrize("name", PRESETS)
def test_stages_fit(name):
    chosen = preset(name)
    of_tokenizer = GPTConfig.for_vqvae(chosen.vqvae)
    for field in ("latent_shape", "codes", "code_dim", "frames", "resolution", "channels"):
        assert getattr(chosen.gpt, field) == getattr(of_tokenizer, field), field


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_settings(name):
    vqvae, gpt = preset(name).vqvae, preset(name).gpt
    found = (vqvae.latent_shape, vqvae.codes, vqvae.code_dim, gpt.layers, gpt.heads)
    assert found == PAPER[name]
    assert preset(name).train_gpt.batch_size == 32


@pytest.mark.parametrize("name", ["moving-mnist", "robot-push"])
def test_the_shipped_model_is_its_preset_s(name):
    shipped, chosen = VideoGPT.from_pretrained(name), preset(name)
    assert shipped.vqvae.config == chosen.vqvae
    assert shipped.gpt.config == chosen.gpt


def test_unknown_preset():
    with pytest.raises(ValueError, match="no preset 'huge'; known are laptop, moving-mnist"):
        preset("huge")
