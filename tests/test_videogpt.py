"""Both stages as one model: what is given comes back, and what doesn't fit is refused by name."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tinyvgpt import GPT, VQVAE, GPTConfig, VideoGPT, VQVAEConfig, video
from tinyvgpt.videogpt import evaluating

TOKENIZER = VQVAEConfig(
    channels=1, frames=8, resolution=16, downsample=(2, 8, 8), hidden=8, res_blocks=1, codes=12,
    code_dim=4, axial=False, causal_time=True,
)  # fmt: skip


def build(names=None, causal=True, **fields):
    torch.manual_seed(0)
    vqvae = VQVAE(replace(TOKENIZER, causal_time=causal))
    config = GPTConfig.for_vqvae(
        vqvae.config, **{"width": 24, "heads": 2, "layers": 2, "dropout": 0.3, **fields}
    )
    gpt = GPT(config, vqvae.codebook.codes)
    torch.nn.init.normal_(gpt.token_out.weight, std=0.5)
    return VideoGPT(vqvae, gpt, names)  # in training mode, with dropout


def clips(n, frames, resolution=16, channels=1):
    size = (n, frames, resolution, resolution, channels)
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.manual_seed(1))


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture(scope="module")
def digits():
    """Pairs of digits 0 and 1 … as Moving MNIST names them, and a null label."""
    return build(("00", "01", "11"), classes=3, label_dropout=0.2)


@pytest.fixture(scope="module")
def actor():
    return build(action_dim=3)


FRAME_ENCODER = {"cond_frames": 2, "cond_depth": 10, "cond_width": 8}


# Sampling -----------------------------------------------------------------------------------------


def test_sample(plain):
    made = plain.sample(3, seed=0)
    assert made.shape == (3, 8, 16, 16, 1)
    assert made.dtype == torch.uint8
    assert plain.sample(seed=0).shape == (1, 8, 16, 16, 1)
    assert torch.equal(plain.sample(3, seed=0), made), "dropout is off while sampling"
    assert plain.training, "and on again afterwards"
    assert not torch.equal(plain.sample(3, seed=1), made)
    assert not torch.equal(plain.sample(3), plain.sample(3)), "a new seed every time"
    assert torch.equal(plain.sample(3, seed=0, batch_size=2), made)
    assert len(made.flatten(1).unique(dim=0)) == 3
    assert torch.equal(plain.sample(3, seed=0, progress=True), made)


def test_samples_are_the_decoded_tokens(plain):
    """The whole chain by hand, greedily: the decoded clip's tokens are the likeliest ones."""
    made = plain.sample(seed=0, temperature=0)
    tokens = torch.zeros(1, *plain.gpt.config.latent_shape, dtype=torch.int64)
    with torch.no_grad(), evaluating(plain):
        for i in range(plain.gpt.config.tokens):
            tokens.view(-1)[i] = plain.logits(tokens).flatten(0, -2)[i].argmax()
        assert torch.equal(video.to_uint8(plain.vqvae.decode(tokens)), made)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_frames_as_a_prefix(plain, count, batch_size):
    """They come back as given, their tokens are kept, and what follows depends on them."""
    given = clips(3, count)
    made = plain.sample(frames=given, seed=0, batch_size=batch_size)
    assert made.shape == (3, 8, 16, 16, 1)
    assert torch.equal(made[:, :count], given)
    for form in (given[0], given[:1], given[0].numpy()):  # one beginning for all clips
        made_of_one = plain.sample(2, frames=form, seed=0)
        assert torch.equal(made_of_one[:, :count], given[:1].expand(2, -1, -1, -1, -1))
    if count == 8:
        return
    other = plain.sample(frames=255 - given, seed=0, batch_size=batch_size)
    assert not torch.equal(other[:, count:], made[:, count:])
    with torch.no_grad(), evaluating(plain):
        seen = []
        decode = plain.vqvae.decode
        plain.vqvae.decode = lambda tokens: (seen.append(tokens), decode(tokens))[1]
        try:
            plain.sample(frames=given, seed=0)
        finally:
            del plain.vqvae.decode
        kept = plain.vqvae.encode(video.to_model(given))
        assert torch.equal(seen[0][:, : count // 2], kept)


@pytest.mark.parametrize("causal", [True, False])
def test_frames_through_the_encoder(causal):
    model = build(causal=causal, **FRAME_ENCODER)
    given = clips(3, 2)
    made = model.sample(frames=given, seed=0, batch_size=2)
    assert torch.equal(made[:, :2], given)
    assert torch.equal(model.sample(2, frames=given[1], seed=0)[:, :2], given[[1, 1]])
    other = model.sample(frames=255 - given, seed=0, batch_size=2)
    assert not torch.equal(other[:, 2:], made[:, 2:])


def test_frame_encoder_with_null():
    model = build(frame_dropout=0.5, **FRAME_ENCODER)
    assert model.sample(2, seed=0).shape == (2, 8, 16, 16, 1)


def test_labels(digits):
    first = digits.sample(labels=[0, 1, 2, 1], seed=0)
    assert torch.equal(digits.sample(labels=["00", "01", "11", "10"], seed=0), first)
    assert torch.equal(digits.sample(labels=torch.tensor([0, 1, 2, 1]), seed=0), first)
    assert torch.equal(digits.sample(labels=np.array([0, 1, 2, 1]), seed=0), first)
    assert torch.equal(digits.sample(labels=(np.int64(0), "01", 2, 1), seed=0), first)
    assert torch.equal(digits.sample(4, labels=1, seed=0)[1], first[1]), "one label for all"
    assert torch.equal(digits.sample(4, labels=torch.tensor(1), seed=0)[1], first[1])
    assert torch.equal(digits.sample(4, labels="10", seed=0)[3], first[3])
    null = digits.sample(4, labels=3, seed=0)
    assert torch.equal(digits.sample(4, seed=0), null)
    assert not torch.equal(null, first)
    assert torch.equal(digits.sample(4, labels=[0, 1, 2, 1], guidance=1.0, seed=0), first)
    guided = digits.sample(4, labels=[0, 1, 2, 1], guidance=4.0, seed=0)
    assert not torch.equal(guided, first)


def test_labels_in_other_containers():
    model = build(("cat", "dog"), classes=2)
    assert model.label_indices(np.array(["dog", "cat"])).tolist() == [1, 0]
    assert model.label_indices({"dog"}).tolist() == [1]
    with pytest.raises(ValueError, match=r"no class named 'cow'; give one of cat, dog$"):
        model.label_indices("cow")


def test_names_of_many_digits():
    model = build(("012", "111", "123"), classes=3)
    assert model.label_indices(["210", "120", 1, "312"]).tolist() == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="no class named '221'"):
        model.label_indices("221")


@pytest.mark.parametrize("names", [("9", "12", "19"), ("19", "91", "12"), ("012", "cat", "111")])
def test_names_that_are_numbers_have_one_spelling(names):
    model = build(names, classes=3)
    assert model.label_indices(list(names)).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no class named '21'"):
        model.label_indices("21")


def test_actions(actor):
    actions = torch.randn(2, 8, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    torch.nn.init.normal_(actor.gpt.action_embedding.project.weight)
    made = actor.sample(actions=actions, seed=0)
    assert len(made) == 2
    assert torch.equal(actor.sample(2, actions=actions.numpy(), seed=0), made)
    assert torch.equal(actor.sample(2, actions=actions[0], seed=0)[0], made[0])
    assert not torch.equal(actor.sample(actions=-actions, seed=0), made)
    mixed = actor.sample(actions=actions, frames=clips(1, 2), seed=0)
    assert torch.equal(mixed[:, :2], clips(1, 2).expand(2, -1, -1, -1, -1))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.sample(0), "n is 0"),
        (lambda m: m.sample(-3), "n is -3"),
        (lambda m: m.sample(2, batch_size=0), "batch_size is 0"),
        (lambda m: m.sample(3, frames=clips(2, 2)), "frames are given for 2 clips, 3 are asked"),
        (lambda m: m.sample(frames=clips(2, 3)), "3 first frames .* multiple of 2"),
        (lambda m: m.sample(frames=clips(2, 10)), "10 × 16 × 16 × 1 .* 8 × 16 × 16 × 1"),
        (lambda m: m.sample(frames=clips(2, 0)), "0"),
        (lambda m: m.sample(frames=clips(2, 2, 32)), "2 × 32 × 32 × 1 .* 8 × 16 × 16 × 1"),
        (lambda m: m.sample(frames=clips(2, 2, 16, 3)), "2 × 16 × 16 × 3 .* 8 × 16 × 16 × 1"),
        (lambda m: m.sample(frames=clips(2, 2).float()), "float32"),
        (lambda m: m.sample(frames=clips(2, 2)[0, 0]), r"frames have shape \(16, 16, 1\)"),
        (lambda m: m.sample(labels=1), "not class-conditional"),
        (lambda m: m.sample(labels="1"), "no class named '1'|not class-conditional"),
        (lambda m: m.sample(actions=torch.zeros(8, 3)), "not action-conditional"),
        (lambda m: m.sample(guidance=2.0), "guidance needs labels"),
        (lambda m: m.sample(temperature=-1), "temperature is -1"),
        (lambda m: m.sample(top_k=13), "top_k is 13, the model has 12"),
        (lambda m: m.sample(top_p=2), "top_p is 2"),
        (lambda m: m.sample(seed=2**70), "seed"),
        (lambda m: m.reconstruct(clips(2, 8, 32, 3)), "3"),
        (lambda m: m.reconstruct(clips(2, 7)), "7 frames"),
    ],
)
def test_refusals(plain, call, says):
    with pytest.raises(ValueError, match=says):
        call(plain)
    assert plain.training


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (4, "label 4 is out of range, the model has 0 to 3"),
        (-1, "label -1"),
        ([0, 9], "label 9"),
        ("02", "no class named '02'; give one of 00, 01"),
        (["00", "x"], "no class named 'x'"),
        (1.5, "label is 1.5"),
        ([None], "label is None"),
        (torch.tensor([0.5]), "label is 0.5"),
        ([], "labels are given for 0 clips"),
        ([0, 1, 2], "labels are given for 3 clips, 2 are asked for; give 1 or 2"),
    ],
)
def test_labels_that_are_refused(digits, labels, says):
    with pytest.raises(ValueError, match=says):
        digits.sample(2, labels=labels)


def test_other_refusals(actor):
    for actions, says in [
        (None, "action-conditional: give actions"),
        (torch.zeros(7, 3), r"actions have shape \(2, 7, 3\)"),
        (torch.zeros(1, 8, 4), r"actions have shape \(2, 8, 4\)"),
        (torch.zeros(8), r"actions have shape \(8,\), must be \(B, T, A\) or \(T, A\)"),
        (torch.zeros(3, 8, 3), "actions are given for 3 clips, 2"),
    ]:
        with pytest.raises(ValueError, match=says):
            actor.sample(2, actions=actions)
    framed = build(**FRAME_ENCODER)
    with pytest.raises(ValueError, match="give the first 2 frames"):
        framed.sample()
    with pytest.raises(ValueError, match=r"4 first frames are given, .* takes 2"):
        framed.sample(frames=clips(1, 4))
    with pytest.raises(ValueError, match="can't continue frames"):
        build(causal=False).sample(frames=clips(1, 2))
    always = build(classes=3)
    with pytest.raises(ValueError, match="no null label"):
        always.sample()
    with pytest.raises(ValueError, match="label 3 is out of range, the model has 0 to 2"):
        always.sample(labels=3)
    with pytest.raises(ValueError, match="null label"):
        always.sample(labels=1, guidance=2.0)
    with pytest.raises(ValueError, match="an index: the model has no label names"):
        always.sample(labels="one")


# Reconstruction, joining, saving ------------------------------------------------------------------


def test_reconstruct(plain):
    given = clips(5, 8)
    made = plain.reconstruct(given)
    assert made.shape == given.shape
    assert made.dtype == torch.uint8
    assert torch.equal(plain.reconstruct(given, batch_size=2), made)
    assert torch.equal(plain.reconstruct(given.numpy()), made)
    # A single clip is cut in no pieces, however small batches are.
    assert torch.equal(plain.reconstruct(given[0], batch_size=2), made[:1])
    with torch.no_grad(), evaluating(plain):
        assert torch.equal(video.to_uint8(plain.vqvae(video.to_model(given)).reconstruction), made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_another_dtype(plain, actor, dtype):
    """Given clips, and the commands that steer, are brought to it."""
    model, arm = (copy.deepcopy(m).to(dtype) for m in (plain, actor))
    assert model.reconstruct(clips(2, 8)).dtype == torch.uint8
    assert model.sample(frames=clips(2, 4), seed=0).shape == clips(2, 8).shape
    config = arm.gpt.config
    actions = torch.randn(2, config.frames, config.action_dim)
    assert len(arm.sample(actions=actions, seed=0)) == 2


def test_stages_must_belong_together(plain):
    for changed, says in [
        ({"codes": 13}, "codes 13, the VQ-VAE has 12"),
        ({"latent_shape": (2, 2, 2)}, r"latent_shape \(2, 2, 2\), the VQ-VAE has \(4, 2, 2\)"),
        ({"channels": 3}, "channels 3, the VQ-VAE has 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            VideoGPT(plain.vqvae, GPT(replace(plain.gpt.config, **changed)))
    with pytest.raises(ValueError, match="another codebook"):
        VideoGPT(plain.vqvae, GPT(plain.gpt.config, plain.vqvae.codebook.codes + 1))
    with pytest.raises(ValueError, match="2 label names are given for 0 classes"):
        VideoGPT(plain.vqvae, plain.gpt, ["a", "b"])


def test_save_and_load(tmp_path, digits):
    digits.save(tmp_path)
    loaded = VideoGPT.from_pretrained(str(tmp_path))
    assert not loaded.training
    assert loaded.vqvae.config == digits.vqvae.config
    assert loaded.gpt.config == digits.gpt.config
    assert loaded.label_names == digits.label_names
    made = digits.sample(2, labels="01", seed=0)
    assert torch.equal(loaded.sample(2, labels="01", seed=0), made)
    alone = VQVAE.from_pretrained(tmp_path)
    x = video.to_model(clips(1, 8))
    assert torch.equal(alone.encode(x), loaded.vqvae.encode(x))
    size = (tmp_path / "gpt.safetensors").stat().st_size
    digits.save(tmp_path, dtype=torch.float16)
    assert (tmp_path / "gpt.safetensors").stat().st_size < 0.7 * size
    half = VideoGPT.from_pretrained(tmp_path)
    assert half.gpt.token_out.weight.dtype == torch.float32
    tokens = half.vqvae.encode(x)
    assert torch.allclose(half.logits(tokens), loaded.logits(tokens), atol=0.05)


def test_damaged_folders(tmp_path, digits):
    def damaged(name, change):
        digits.save(tmp_path)
        path = tmp_path / name
        if name == "config.json":
            config = json.loads(path.read_text())
            change(config)
            path.write_text(json.dumps(config))
        else:
            change(path)
        with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is looked at
            VideoGPT.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds a VQ-VAE only" in damaged("config.json", lambda c: c.pop("gpt"))
    assert "no VQ-VAE" in damaged("config.json", lambda c: c.pop("vqvae"))
    assert "version 3" in damaged("config.json", lambda c: c.update(version=3))
    assert "['colour']" in damaged("config.json", lambda c: c["gpt"].update(colour=1))
    assert "7 heads" in damaged("config.json", lambda c: c["gpt"].update(heads=7))
    assert "can't be built" in damaged("config.json", lambda c: c["gpt"].update(width="24"))
    assert "not a dict" in damaged("config.json", lambda c: c.update(gpt=[1]))
    for stage, name, value in (("gpt", "codes", 10**15), ("vqvae", "hidden", 16.0)):
        change = damaged("config.json", lambda c, of=stage, n=name, v=value: c[of].update({n: v}))
        assert "config.json: no model can be built of these settings: " in change
    assert "label_names" in damaged("config.json", lambda c: c.update(label_names=5))
    assert "2 label names" in damaged("config.json", lambda c: c.update(label_names=["a", "b"]))
    assert "another shape" in damaged("config.json", lambda c: c["gpt"].update(width=12))
    assert "missing" in damaged("config.json", lambda c: c["gpt"].update(layers=3))
    assert "not part of" in damaged("config.json", lambda c: c["gpt"].update(layers=1))
    assert "gpt.safetensors is missing" in damaged("gpt.safetensors", lambda p: p.unlink())
    cut = damaged("vqvae.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9]))
    assert "vqvae.safetensors is not a readable" in cut


def test_another_codebook_in_the_folder(tmp_path, digits):
    """As when saving was cut off between two renames."""
    digits.save(tmp_path)
    torch.manual_seed(5)
    VQVAE(TOKENIZER).save(tmp_path / "other")
    (tmp_path / "other" / "vqvae.safetensors").replace(tmp_path / "vqvae.safetensors")
    with pytest.raises(ValueError, match="another codebook"):
        VideoGPT.from_pretrained(tmp_path)


def test_shipped_model():
    """What the README's first line does."""
    model = VideoGPT.from_pretrained("moving-mnist")
    config = model.vqvae.config
    made = model.sample(1, seed=0, frames=clips(1, config.downsample[0], config.resolution))
    assert made.shape == (1, config.frames, config.resolution, config.resolution, 1)
    assert model.label_indices("73").tolist() == model.label_indices("37").tolist()


def test_evaluating_restores_every_module():
    model = build()
    model.vqvae.eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert model.gpt.blocks[0].training
    assert not any(m.training for m in model.vqvae.modules())
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        raise RuntimeError("stop")
    assert model.gpt.training
