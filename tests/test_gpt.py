"""The transformer: what sees what, what conditions it, what it refuses, one batch learnt."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tinyvgpt import GPT, GPTConfig, VQVAEConfig
from tinyvgpt.sampling import Decoder

CONDITIONS = {
    "classes": 5,
    "label_dropout": 0.5,
    "cond_frames": 1,
    "cond_depth": 10,
    "cond_width": 8,
    "frame_dropout": 0.5,
    "action_dim": 3,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config(**fields):
    defaults = {
        "latent_shape": (4, 4, 4),
        "codes": 16,
        "code_dim": 6,
        "frames": 8,
        "resolution": 8,
        "channels": 1,
        "width": 24,
        "heads": 2,
        "layers": 2,
        "dropout": 0.0,
        "attn_dropout": 0.0,
    }
    return GPTConfig(**{**defaults, **fields})


def small(**fields):
    """A model in evaluation mode, with every weight drawn anew so that all of it has an effect."""
    gpt = GPT(config(**fields), torch.randn(16, 6))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gpt.eval()


def tokens_of(gpt, batch):
    return torch.randint(gpt.config.codes, (batch, *gpt.config.latent_shape))


def given(batch):
    """Everything that a model with CONDITIONS takes."""
    return {
        "labels": torch.arange(batch) % 5,
        "frames": torch.rand(batch, 1, 1, 8, 8) - 0.5,
        "actions": torch.randn(batch, 8, 3),
    }


def test_forward_step_by_step():
    """The whole model written out once more, from the order in which the original does things."""
    gpt = small(mlp_ratio=1.5)
    tokens = tokens_of(gpt, 2)
    norm = lambda x, m: F.layer_norm(x, (24,), m.gain, m.bias, eps=0)  # noqa: E731
    x = gpt.codes[tokens.flatten(1)] @ gpt.token_in.weight.T
    x = torch.cat([gpt.start.expand(2, 1, 24), x[:, :-1]], 1)
    x = x + gpt.positions().flatten(0, 2)
    for block in gpt.blocks:
        x = x + block.attn(norm(x, block.norm_attn))
        h = block.mlp.up(norm(x, block.norm_mlp))
        assert h.shape[-1] == 36
        x = x + block.mlp.down(h * torch.sigmoid(1.702 * h))
    logits = norm(x, gpt.norm) @ gpt.token_out.weight.T
    assert_close(gpt(tokens).flatten(1, 3), logits, rtol=1e-3, atol=1e-3)
    assert_close(gpt.loss(tokens), F.cross_entropy(logits.mT, tokens.flatten(1)), rtol=1e-3, atol=0)


@torch.no_grad()
def test_a_clip_may_end_early():
    """Its first latent frames have the logits that they have in the whole clip."""
    gpt = small(**CONDITIONS)
    tokens, told = tokens_of(gpt, 2), given(2)
    whole = gpt(tokens, **told)
    for t in (1, 3):
        assert_close(gpt(tokens[:, :t], **told), whole[:, :t])


def test_starts_as_the_original():
    gpt = GPT(config(width=240, layers=3, codes=16), torch.randn(16, 6))
    tokens = tokens_of(gpt, 2)
    assert_close(gpt.loss(tokens).item(), math.log(16))  # no code is likelier than another
    about = lambda weight, std: abs(weight.std() / std - 1) < 0.15  # noqa: E731
    assert about(gpt.token_in.weight, 0.02)
    assert about(gpt.start, 0.02)
    assert about(torch.cat([*gpt.positions.tables]), 0.01)
    assert about(gpt.blocks[0].attn.qkv.weight, 240**-0.5)
    assert about(gpt.blocks[0].attn.out.weight, (3 * 240) ** -0.5)
    assert not gpt.token_out.weight.any()
    assert gpt.token_in.bias is None
    assert gpt.token_out.bias is None


@pytest.mark.parametrize("attention", ["full", "strided"])
@pytest.mark.parametrize("conditions", [{}, CONDITIONS])
def test_a_token_sees_earlier_ones_only(attention, conditions):
    """By changing tokens: logits stay the same up to the changed one, itself included."""
    gpt = small(attention=attention, latent_shape=(4, 4, 4), **conditions)
    tokens, condition = tokens_of(gpt, 1), given(1) if conditions else {}
    logits = gpt(tokens, **condition).flatten(1, 3)
    for i in [0, 1, 15, 16, 40, 62]:
        changed = tokens.clone().flatten(1)
        changed[:, i] = (changed[:, i] + 1) % 16
        moved = gpt(changed.view(tokens.shape), **condition).flatten(1, 3) - logits
        moved = moved.abs().amax(-1)[0]
        assert moved[: i + 1].max() < 1e-6
        assert moved[i + 1] > 1e-4


@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 4, 32)])
def test_strided_cached_decoding(shape):
    """From a prefix of any length, step by step, as the full forward has it."""
    gpt = small(attention="strided", latent_shape=shape)
    tokens = tokens_of(gpt, 2)
    flat = tokens.flatten(1)
    with torch.no_grad():
        full = gpt(tokens).flatten(1, 3)
        for prefix in torch.randint(1, 250, (3,)).tolist():
            decoder = Decoder(gpt, 2, gpt.condition(2))
            steps = [decoder.step(flat[:, :prefix])]
            steps += [decoder.step(flat[:, i : i + 1]) for i in range(prefix, min(prefix + 5, 255))]
            expected = full[:, prefix : prefix + len(steps)]
            assert_close(torch.stack(steps, 1), expected, rtol=1e-4, atol=1e-4)


def test_actions_reach_the_frames_they_lead_to():
    """By gradients: latent frame j (frames 2j and 2j + 1) moves with actions 0 to 2j only."""
    gpt = small(action_dim=3)
    actions = torch.randn(1, 8, 3, requires_grad=True)
    logits = gpt(tokens_of(gpt, 1), actions=actions)
    for j in range(4):
        (grad,) = torch.autograd.grad(logits[:, j].square().sum(), actions, retain_graph=True)
        moves = grad[0].abs().sum(-1) > 0
        assert moves.tolist() == [i <= 2 * j for i in range(8)]


def test_new_actions_change_nothing():
    """Zero-initialised: a model that gains actions gives what it gave."""
    plain, acting = small(), GPT(config(action_dim=3), torch.randn(16, 6)).eval()
    acting.load_state_dict(plain.state_dict(), strict=False)
    tokens = tokens_of(plain, 2)
    assert torch.equal(plain(tokens), acting(tokens, actions=torch.randn(2, 8, 3)))


def test_labels_matter_each_to_its_own_clip():
    gpt = small(classes=5)
    tokens = tokens_of(gpt, 1).expand(3, -1, -1, -1)
    logits = gpt(tokens, labels=torch.tensor([4, 1, 4]))
    assert_close(logits[0], logits[2])
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_no_label_is_the_null_label():
    gpt = small(classes=5, label_dropout=0.1)
    assert gpt.norm.classes == gpt.blocks[0].norm_attn.classes == 6
    tokens = tokens_of(gpt, 2)
    assert torch.equal(gpt(tokens), gpt(tokens, labels=torch.tensor([5, 5])))
    assert (gpt(tokens) - gpt(tokens, labels=torch.tensor([0, 4]))).abs().amax((1, 2, 3, 4)).all()


def test_no_frames_is_a_memory_of_null_frames():
    gpt = small(cond_frames=1, cond_depth=10, cond_width=8, frame_dropout=0.1)
    frames = torch.rand(2, 1, 1, 8, 8) - 0.5
    memory = gpt.condition(2, frames=frames).memory
    assert memory.shape == (2, 4, 30)
    tokens = tokens_of(gpt, 2)
    without = gpt(tokens)
    assert (gpt(tokens, frames=frames) - without).abs().max() > 0.01
    gpt.frame_encoder.forward = lambda x: gpt.null_frames.expand_as(memory)
    assert_close(gpt(tokens, frames=frames), without, rtol=1e-4, atol=1e-4)


def test_frames_matter_each_to_its_own_clip():
    gpt = small(cond_frames=1, cond_depth=10, cond_width=8)
    tokens, frames = tokens_of(gpt, 1).expand(3, -1, -1, -1), torch.rand(3, 1, 1, 8, 8) - 0.5
    frames[2] = frames[0]
    logits = gpt(tokens, frames=frames)
    assert_close(logits[0], logits[2], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[1]).abs().max() > 0.01


@pytest.mark.parametrize("what", ["labels", "frames"])
def test_conditions_are_hidden_while_training(what):
    """Of 200 clips, about 30 % lose theirs; the others keep it; in evaluation all do."""
    fields = {"classes": 5} if what == "labels" else {"cond_frames": 1, "cond_depth": 10}
    gpt = small(**fields, cond_width=8, label_dropout=0.3, frame_dropout=0.3)
    value = given(200)[what]

    def read():
        condition = gpt.condition(200, **{what: value})
        return condition.labels if what == "labels" else condition.memory

    kept = read()
    null = torch.tensor(5) if what == "labels" else gpt.null_frames
    gpt.train()
    seen = read()
    same = lambda a, b: (a == b).view(200, -1).all(1)  # noqa: E731
    hidden = same(seen, null.expand_as(seen))
    assert 35 < hidden.sum() < 90
    assert torch.equal(same(seen, kept), ~hidden)


def test_dropout_is_on_what_is_added():
    """Not on the residual stream nor on embeddings: with nearly all dropped, x passes unchanged."""
    gpt = small(dropout=0.999, cond_frames=1, cond_depth=10, cond_width=8).train()
    tokens, frames = tokens_of(gpt, 2), given(2)["frames"]
    seen = []
    for block in gpt.blocks:
        block.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    gpt(tokens, frames=frames)
    embedded = seen[0][0]
    for x, y in seen:
        assert (x == y).float().mean() > 0.95
    gpt.eval()
    gpt(tokens, frames=frames)
    assert torch.equal(seen[2][0], embedded)
    assert (seen[2][0] == seen[2][1]).float().mean() < 0.05
    assert seen[2][1].isfinite().all()


def test_strided_attention_has_no_dropout_on_weights():
    for attention, expected in [("full", 0.5), ("strided", 0.0)]:
        gpt = small(attention=attention, attn_dropout=0.5, latent_shape=(2, 4, 8))
        assert {block.attn.dropout for block in gpt.blocks} == {expected}


@pytest.mark.parametrize("attention", ["full", "strided"])
def test_checkpointing_changes_nothing_but_memory(attention):
    fields = {**CONDITIONS, "attention": attention, "dropout": 0.2, "attn_dropout": 0.2}
    plain = small(**fields).train()
    sparing = GPT(config(**fields, checkpointing=True), plain.codes).train()
    sparing.load_state_dict(plain.state_dict())
    tokens, condition, saved = tokens_of(plain, 3), given(3), []
    for gpt in (plain, sparing):
        torch.manual_seed(1)  # the same dropout
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            loss = gpt.loss(tokens, **condition)
        loss.backward()
        saved.append(sum(sizes))
    for (name, a), b in zip(plain.named_parameters(), sparing.parameters(), strict=True):
        assert a.grad.abs().sum() > 0, name
        assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert saved[1] < 0.9 * saved[0]


def convolves_one_frame():
    """Whether a convolution over a single frame is right in bfloat16.

    On CPUs with AMX much of it is 0, in PyTorch 2.10 to 2.14 at least.
    """
    x, weight = torch.ones(1, 1, 1, 8, 8), torch.ones(8, 1, 3, 3, 3)
    found = F.conv3d(x.bfloat16(), weight.bfloat16(), padding=1)
    return torch.equal(found.float(), F.conv3d(x, weight, padding=1))  # whole numbers up to 9


@pytest.mark.parametrize("attention", ["full", "strided"])
def test_autocast(attention):
    if not convolves_one_frame():
        pytest.skip("PyTorch's bfloat16 convolution of one frame is wrong on this CPU")
    gpt = GPT(config(**CONDITIONS, attention=attention), torch.randn(16, 6)).eval()
    torch.nn.init.normal_(gpt.token_out.weight, std=0.1)
    tokens, condition = tokens_of(gpt, 3), given(3)
    exact = gpt(tokens, **condition)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gpt(tokens, **condition)
        loss = gpt.train().loss(tokens, **condition)
    assert loss.dtype == torch.float32
    assert (rounded - exact).square().mean() < 1e-3 * exact.var()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in gpt.parameters())


def test_codes_are_a_frozen_copy():
    codes = torch.randn(16, 6)
    gpt = GPT(config(), codes)
    codes.zero_()
    assert gpt.codes.abs().min() > 0
    assert "codes" in gpt.state_dict()
    assert "codes" not in dict(gpt.named_parameters())


def test_configuration_for_a_tokenizer():
    vqvae = VQVAEConfig(channels=1, frames=8, resolution=32, downsample=(2, 8, 4), codes=9)
    gpt = GPTConfig.for_vqvae(vqvae, width=12, heads=3)
    assert gpt.latent_shape == vqvae.latent_shape == (4, 4, 8)
    assert (gpt.codes, gpt.code_dim, gpt.frames, gpt.resolution, gpt.channels) == (9, 256, 8, 32, 1)
    assert (gpt.width, gpt.heads, gpt.tokens) == (12, 3, 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 20}, "width 20 is not divisible by the 3 axes"),
        ({"width": 21}, "width 21 is not divisible by 2 heads"),
        ({"heads": 0}, "0 heads"),
        ({"latent_shape": (4, 4)}, "must be three positive sizes"),
        ({"latent_shape": (4, 0, 4)}, "must be three positive sizes"),
        ({"latent_shape": (3, 4, 4)}, "8 frames don't divide into 3 latent frames"),
        ({"attention": "sparse"}, "must be 'full' or 'strided'"),
        ({"attention": "strided", "latent_shape": (4, 3, 4)}, "48 tokens"),
        ({"attention": "strided", "latent_shape": (8, 5, 8)}, "trailing product 40"),
        ({"cond_frames": 9}, "cond_frames is 9, must be 0 to 8"),
        ({"cond_frames": 1, "cond_width": 12}, "width 45 is not divisible by 2 heads"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"label_dropout": -0.1}, "label_dropout is -0.1"),
        ({"layers": 0}, "layers is 0, must be at least 1"),
        ({"codes": 0}, "codes is 0"),
        ({"classes": -1}, "classes is -1, must be at least 0"),
        (
            {"action_dim": 3, "action_std": (1, 1)},
            "action_std is (1, 1), must be () or 3 (action_dim)",
        ),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"mlp_ratio": math.inf}, "mlp_ratio is inf"),
        ({"mlp_ratio": math.nan}, "mlp_ratio is nan"),
    ],
)
def test_settings_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**fields)


def test_another_codebook():
    with pytest.raises(ValueError, match=r"codebook has shape \(16, 5\), .* \(16, 6\)"):
        GPT(config(), torch.zeros(16, 5))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            torch.full((2, 4, 4, 4), 16),
            "tokens range from 16 to 16, the codebook has codes 0 to 15",
        ),
        (torch.full((2, 4, 4, 4), -1), "tokens range from -1"),
        (torch.zeros(2, 4, 4, 4), "must be int64"),
        (torch.zeros(2, 4, 4, 5, dtype=torch.int64), "(t, h, w) = (4, 4, 4)"),
        (torch.zeros(2, 64, dtype=torch.int64), "(t, h, w) = (4, 4, 4)"),
        (torch.zeros(2, 0, 4, 4, dtype=torch.int64), "or fewer latent frames"),
        (torch.zeros(2, 5, 4, 4, dtype=torch.int64), "or fewer latent frames"),
    ],
)
def test_tokens_that_do_not_fit(tokens, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small()(tokens)


def test_parts_of_clips_do_not_fit_strided_attention():
    gpt = small(latent_shape=(4, 8, 8), attention="strided")
    with pytest.raises(ValueError, match="2 latent frames; strided attention needs all 4"):
        gpt(tokens_of(gpt, 2)[:, :2])


CLASS, FRAME, ACTION = {"classes": 5}, {"cond_frames": 1, "cond_depth": 10}, {"action_dim": 3}


@pytest.mark.parametrize(
    ("fields", "condition", "message"),
    [
        ({}, {"labels": torch.tensor([0, 1])}, "labels are given, but the model is not"),
        ({}, {"frames": torch.zeros(2, 1, 1, 8, 8)}, "frames are given, but the model has no"),
        ({}, {"actions": torch.zeros(2, 8, 3)}, "actions are given, but the model is not"),
        (CLASS, {}, "class-conditional and has no null label: give labels 0 to 4"),
        (CLASS, {"labels": torch.tensor([0, 5])}, "labels range from 0 to 5, the model has 0 to 4"),
        (CLASS, {"labels": torch.tensor([0, -1])}, "labels range from -1 to 0"),
        (
            {**CLASS, "label_dropout": 0.1},
            {"labels": torch.tensor([0, 6])},
            "labels range from 0 to 6, the model has 0 to 5",
        ),
        (CLASS, {"labels": torch.tensor([0])}, "labels are torch.int64 (1,), must be int64 (2,)"),
        (CLASS, {"labels": torch.tensor([0.0, 1.0])}, "labels are torch.float32 (2,)"),
        (FRAME, {}, "frame-conditional: give the first 1 frames"),
        (FRAME, {"frames": torch.zeros(3, 1, 1, 8, 8)}, "of 3 clips are given for 2 clips"),
        (FRAME, {"frames": torch.zeros(2, 1, 2, 8, 8)}, "(C, n, H, W) = (1, 1, 8, 8)"),
        (ACTION, {}, "action-conditional: give actions (B, 8, 3)"),
        (ACTION, {"actions": torch.zeros(3, 8, 3)}, "of 3 clips are given for 2 clips"),
        (ACTION, {"actions": torch.zeros(2, 7, 3)}, "(T, A) = (8, 3)"),
    ],
)
def test_conditions_that_do_not_fit(fields, condition, message):
    gpt = small(**fields, cond_width=8)
    with pytest.raises(ValueError, match=re.escape(message)):
        gpt(tokens_of(gpt, 2), **condition)


@pytest.mark.parametrize("attention", ["full", "strided"])
def test_learns_one_batch(attention):
    """Four clips of random tokens, told apart by their labels, to under 0.1 nats a token."""
    gpt = GPT(config(attention=attention, width=48, classes=4), torch.randn(16, 6))
    tokens, labels = tokens_of(gpt, 4), torch.arange(4)
    assert gpt.loss(tokens, labels=labels) > 2.7
    optimizer = torch.optim.Adam(gpt.parameters(), 5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        gpt.loss(tokens, labels=labels).backward()
        optimizer.step()
    assert gpt.eval().loss(tokens, labels=labels) < 0.1
