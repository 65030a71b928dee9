"""The original's checkpoint files: settings, names, and what is said about files that don't fit."""

import argparse
import collections
from pathlib import Path

import pytest
import torch
from test_upstream_parity import GPTS, VQVAES, Case

from tinyvgpt import VideoGPT, upstream
from tinyvgpt.unpickle import UnsafeCheckpoint


@pytest.fixture(scope="module")
def case():
    cache = {}
    return lambda name: cache.setdefault(name, Case(name))


class ModelCheckpoint:
    """Stands for a class of Lightning's, which is a key in older files."""


def write(path, args, state, **more):
    content = {
        "epoch": 3,
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}},
        "state_dict": collections.OrderedDict(state),
        "hyper_parameters": {"args": argparse.Namespace(**args)},
        **more,
    }
    torch.save(content, path)
    return path


def refusal(path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, callers look at the message
        upstream.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# What is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPTS)
def test_gpt_file(case, tmp_path, name):
    """All four kinds, the VQ-VAE's settings inferred; the original's masks are ignored."""
    c = case(name)
    masks = {
        f"attn_stack.attn_nets.{layer}.attn.attn.mask": torch.ones(4, 4)
        for layer in range(c.args["layers"])
    }
    model = upstream.load(write(tmp_path / "a.ckpt", c.args, {**c.state, **masks}))
    expected = c.gpt()
    assert model.vqvae.config == expected.vqvae.config
    assert model.gpt.config == expected.gpt.config
    assert not model.training
    with torch.no_grad():
        logits = model.logits(c.codes, **c.condition())
    assert torch.allclose(logits, c.logits, rtol=0, atol=5e-5)
    assert torch.equal(model.vqvae.encode(c.x), c.codes)


@pytest.mark.parametrize("name", VQVAES)
def test_vqvae_file(case, tmp_path, name):
    c = case(name)
    vqvae = upstream.load(write(tmp_path / "a.ckpt", c.args, c.state))
    assert torch.equal(vqvae.encode(c.x), c.codes)
    assert torch.allclose(vqvae.decode(c.codes), c.decoded, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        lambda args: {"args": args},  # a dict for the Namespace
        lambda args: args,  # all settings side by side
        lambda args: argparse.Namespace(**args),
        lambda args: argparse.Namespace(args=argparse.Namespace(**args)),
    ],
)
def test_forms_of_settings(case, tmp_path, settings):
    c = case("vqvae_444")
    path = write(tmp_path / "a.ckpt", {}, c.state, hyper_parameters=settings(c.args))
    assert torch.equal(upstream.load(path).encode(c.x), c.codes)


def test_double_precision_tensors(case, tmp_path):
    c = case("gpt_uncond")
    state = {n: t.double() if t.is_floating_point() else t for n, t in c.state.items()}
    model = upstream.load(write(tmp_path / "a.ckpt", c.args, state))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.allclose(model.logits(c.codes), c.logits, rtol=0, atol=5e-5)


def test_model_shares_nothing_with_the_state_dict(case):
    c = case("gpt_uncond")
    model = c.gpt()
    before = {name: tensor.clone() for name, tensor in c.state.items()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(3)
    assert all(torch.equal(before[name], c.state[name]) for name in before)


def test_loaded_twice_is_the_same(case):
    """Fused biases are sums: loading must not add to what the fresh model drew."""
    c = case("vqvae_444")
    first, second = (upstream.vqvae_from(c.args, c.state).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saved_again(case, tmp_path):
    c = case("gpt_class")
    c.gpt().save(tmp_path / "model")
    model = VideoGPT.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.allclose(model.logits(c.codes, labels=c.label), c.logits, rtol=0, atol=5e-5)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case_name", "tensor"),
    [
        ("vqvae_444", "encoder.convs.0.conv.weight"),
        ("vqvae_444", "encoder.res_stack.0.block.8.attn_h.w_ks.weight"),
        ("vqvae_444", "encoder.res_stack.0.block.8.attn_t.fc.bias"),
        ("vqvae_444", "decoder.res_stack.0.block.8.attn_w.fc.weight"),
        ("vqvae_444", "codebook.z_avg"),
        ("gpt_uncond", "fc_in.weight"),
        ("gpt_uncond", "attn_stack.attn_nets.1.attn.w_vs.weight"),
        ("gpt_uncond", "attn_stack.pos_embd.emb.d_1"),
        ("gpt_uncond", "vqvae.codebook.embeddings"),
        ("gpt_uncond", "vqvae.encoder.conv_last.conv.weight"),
        ("gpt_uncond", "vqvae.pre_vq_conv.conv.bias"),
        ("gpt_class", "norm.w.weight"),
        ("gpt_frame", "resnet.group2.blocks.1.bnr2.norm.norm.weight"),
        ("gpt_frame", "cond_pos_embd.emb.d_2"),
    ],
)
def test_tensors_that_do_not_fit(case, tmp_path, case_name, tensor):
    """Missing, misshapen and extra ones are called what the checkpoint calls them."""
    c = case(case_name)
    name = tensor.removeprefix("vqvae.") if "codebook.emb" not in tensor else tensor
    without = {n: t for n, t in c.state.items() if n != tensor}
    message = refusal(write(tmp_path / "a.ckpt", c.args, without))
    assert "missing" in message or "has no tensor" in message
    assert name in message
    shape = tuple(c.state[tensor].shape)
    wrong = torch.zeros(*shape[:-1], shape[-1] + 1)
    message = refusal(write(tmp_path / "a.ckpt", c.args, {**c.state, tensor: wrong}))
    if not any(part in tensor for part in ("embeddings", "d_1")):  # from which settings follow
        assert name in message
        assert str(tuple(wrong.shape)) in message
        assert str(shape) in message
    message = refusal(
        write(tmp_path / "a.ckpt", c.args, {**without, tensor: torch.zeros(1, 1, 1, 1)})
    )
    assert "shape" in message
    message = refusal(write(tmp_path / "a.ckpt", c.args, {**c.state, "extra." + tensor: wrong}))
    assert "not part of the model" in message
    assert "extra." + tensor in message


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("n_hiddens", 2_000_000, "of another shape"),
        ("n_codes", 10**15, "of another shape"),
        ("n_codes", 2**70, "can't be built of its settings: "),
        ("n_res_layers", 10**9, "has 1000000000 blocks by its settings, and "),
    ],
)
def test_no_memory_is_taken_for_sizes_that_only_settings_claim(
    case, tmp_path, monkeypatch, setting, value, says
):
    c = case(VQVAES[0])

    def only_without_values(self, config):
        assert torch.empty(0).device.type == "meta"
        return make(self, config)

    make = upstream.VQVAE.__init__
    monkeypatch.setattr(upstream.VQVAE, "__init__", only_without_values)
    path = write(tmp_path / "a.ckpt", {**c.args, setting: value}, c.state)
    assert says in refusal(path)


@pytest.mark.parametrize("case_name", ["vqvae_444", "gpt_class"])
def test_settings_that_do_not_fit(case, tmp_path, case_name):
    c = case(case_name)
    used = ["sequence_length", "resolution"]
    used += (
        ["n_codes", "n_hiddens", "n_res_layers", "embedding_dim", "downsample"]
        if case_name == "vqvae_444"
        else ["hidden_dim", "heads", "layers", "attn_type", "class_cond_dim", "n_cond_frames"]
    )
    for name in used:
        args = {k: v for k, v in c.args.items() if k != name}
        assert name in refusal(write(tmp_path / "a.ckpt", args, c.state))
        for value in (None, [], argparse.Namespace(a=1), {"a": 1}, torch.ones(2)):
            if (name, value) != ("downsample", []):
                message = refusal(write(tmp_path / "a.ckpt", {**c.args, name: value}, c.state))
                assert name in message


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"downsample": [4, "4", 4]}, "downsample"),
        ({"downsample": []}, "downsample"),
        ({"downsample": (3, 4, 4)}, "downsample"),
        ({"n_hiddens": 7}, "hidden"),
        ({"n_codes": 31}, r"codebook\.embeddings"),
        ({"n_res_layers": 3}, r"res_stack\.1\.block"),
        ({"sequence_length": 7}, "divisible"),
    ],
)
def test_vqvae_settings(case, tmp_path, changed, says):
    c = case("vqvae_444")
    path = write(tmp_path / "a.ckpt", {**c.args, **changed}, c.state)
    with pytest.raises(ValueError, match=says):
        upstream.load(path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"attn_type": "axial"}, "'axial'"),
        ({"layers": 3}, r"attn_nets\.2"),
        ({"layers": 1}, r"attn_nets\.1"),
        ({"hidden_dim": 49}, "49"),
        ({"heads": 5}, "5 heads"),
        ({"sequence_length": 9}, "9"),
        ({"resolution": 18}, "18"),
        ({"resolution": 0}, "0"),
        ({"class_cond": True, "class_cond_dim": 3}, r"norm\.w\.weight"),
        ({"n_cond_frames": 1}, "enc_attn"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_gpt_settings(case, tmp_path, changed, says):
    c = case("gpt_uncond")
    path = write(tmp_path / "a.ckpt", {**c.args, **changed}, c.state)
    with pytest.raises(ValueError, match=says):
        upstream.load(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "state_dict"),
        ({"state_dict": [1]}, "state_dict"),
        ({"state_dict": {"a": 1}}, "state_dict"),
        ({"state_dict": {5: torch.ones(1)}}, "state_dict"),
        ({"state_dict": {"a": torch.ones(1)}}, "hyper_parameters"),
        ({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": 3}, "hyper_parameters"),
        ({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": {"args": {}}}, "args|lack"),
    ],
)
def test_files_without_a_model(tmp_path, content, says):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=says):
        upstream.load(tmp_path / "a.ckpt")


def test_hostile_file(tmp_path, case):
    """End to end: a call hidden in the settings of a checkpoint that is whole otherwise."""

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    c = case("vqvae_444")
    path = write(tmp_path / "a.ckpt", {**c.args, "name": Attack()}, c.state)
    with pytest.raises(UnsafeCheckpoint, match=r"pathlib\.Path\.touch|getattr|touch"):
        upstream.load(path)
    assert not (tmp_path / "ran").exists()
