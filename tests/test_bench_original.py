"""The reference models of `bench train` are the original's: its stored numbers, and ours."""

import math

import pytest
import torch
from test_upstream_parity import VQVAES, Case
from torch.testing import assert_close

from tinyvgpt import GPTConfig, VQVAEConfig, upstream
from tinyvgpt.bench.original import OriginalGPT, OriginalVQVAE

VQVAE_ARGS = {
    "embedding_dim": 12,
    "n_codes": 20,
    "n_hiddens": 16,
    "n_res_layers": 1,
    "downsample": [4, 2, 1],
    "sequence_length": 8,
    "resolution": 8,
}
SMALL_VQVAE = VQVAEConfig(
    code_dim=12, codes=20, hidden=16, res_blocks=1, downsample=(4, 2, 1), frames=8, resolution=8
)
GPT_ARGS = {
    "hidden_dim": 24,
    "heads": 2,
    "layers": 2,
    "dropout": 0.0,
    "attn_dropout": 0.0,
    "attn_type": "full",
    "class_cond": False,
    "n_cond_frames": 0,
}
SMALL_GPT = GPTConfig.for_vqvae(
    SMALL_VQVAE, width=24, heads=2, layers=2, dropout=0.0, attn_dropout=0.0
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stirred(model):
    """The model with every parameter moved at random, those that start at zero or one too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def original_vqvae(config=SMALL_VQVAE):
    """A VQ-VAE whose codebook is in use: no restart is near, and no first batch awaited."""
    model = stirred(OriginalVQVAE(config))
    book = model.codebook
    book.need_init = False
    book.N.copy_(50 + torch.rand(config.codes))
    book.z_avg.copy_(book.embeddings * book.N[:, None])
    return model


def original_gpt(config=SMALL_GPT, **options):
    return stirred(OriginalGPT(config, torch.randn(config.codes, config.code_dim), **options))


def our_gpt(state, codes):
    """Our GPT with these parameters of the original's."""
    vqvae = OriginalVQVAE(SMALL_VQVAE).state_dict() | {"codebook.embeddings": codes}
    whole = state | {f"vqvae.{name}": tensor for name, tensor in vqvae.items()}
    return upstream.gpt_from(GPT_ARGS, VQVAE_ARGS, whole).gpt


def gradients(model, loss):
    """Gradients by name, in a state dict: of what has none, zeros."""
    loss.backward()
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    return state | {name: p.grad for name, p in model.named_parameters()}


def random_tokens(batch=2):
    return torch.randint(SMALL_GPT.codes, (batch, *SMALL_GPT.latent_shape))


# Against the original's stored numbers ------------------------------------------------------------


def parity_vqvae(case, args):
    config = VQVAEConfig(
        code_dim=args["embedding_dim"],
        codes=args["n_codes"],
        hidden=args["n_hiddens"],
        res_blocks=args["n_res_layers"],
        downsample=args["downsample"],
        frames=args["sequence_length"],
        resolution=args["resolution"],
    )
    model = OriginalVQVAE(config)
    model.load_state_dict(case.state)  # strictly: every name and shape is the original's
    return model


@pytest.mark.parametrize("name", VQVAES)
def test_stored_vqvae(name):
    case = Case(name)
    model = parity_vqvae(case, case.args).eval()
    with torch.no_grad():
        out = model(case.x)
    assert torch.equal(out.tokens, case.codes)
    assert_close(out.reconstruction, case.recon, rtol=0, atol=1e-5)
    assert_close(out.recon_loss, case.recon_loss[0])
    assert_close(out.commitment_loss, case.commitment_loss[0])
    assert_close(out.perplexity, case.perplexity[0], rtol=1e-5, atol=0)
    assert_close(out.loss, case.recon_loss[0] + case.commitment_loss[0])


@pytest.mark.parametrize("name", VQVAES)
def test_stored_codebook_update(name):
    case = Case(name)
    book = parity_vqvae(case, case.args).codebook.train()
    book.need_init = False
    book.N.fill_(50.0)
    book.z_avg.copy_(50.0 * case.embeddings_buffer)
    book(case.z)
    assert_close(book.N, case.ema_N, rtol=1e-5, atol=0)
    assert_close(book.z_avg, case.ema_z_avg, rtol=1e-5, atol=1e-6)
    assert_close(book.embeddings, case.ema_embeddings, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attention", ["mask", "sdpa"])
def test_stored_gpt(attention):
    case = Case("gpt_uncond")
    config = GPTConfig(
        latent_shape=tuple(case.codes.shape[1:]),
        codes=case.vqvae_args["n_codes"],
        code_dim=case.vqvae_args["embedding_dim"],
        width=case.args["hidden_dim"],
        heads=case.args["heads"],
        layers=case.args["layers"],
        frames=case.args["sequence_length"],
    )
    model = OriginalGPT(config, case.embeddings_buffer, attention=attention).eval()
    state = {name: t for name, t in case.state.items() if not name.startswith("vqvae.")}
    model.load_state_dict(state)  # strictly
    with torch.no_grad():
        assert_close(model(case.codes), case.logits, rtol=0, atol=5e-5)
        assert_close(model.loss(case.codes), case.loss[0], rtol=0, atol=1e-5)


# Against ours -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_vqvae_is_ours(training):
    """Outputs, gradients, the codebook's update and the batch statistics, float32."""
    original = original_vqvae().train(training)
    ours = upstream.vqvae_from(VQVAE_ARGS, original.state_dict()).train(training)
    x = torch.rand(3, 3, 8, 8, 8) - 0.5
    count = original.codebook.N.clone()
    out, expected = original(x), ours(x)
    assert torch.equal(out.tokens, expected.tokens)
    assert out.tokens.unique().numel() > 5
    for name in ("reconstruction", "loss", "recon_loss", "commitment_loss", "perplexity", "used"):
        assert_close(getattr(out, name), getattr(expected, name), rtol=1e-5, atol=3e-5)

    found = upstream.vqvae_from(VQVAE_ARGS, gradients(original, out.loss))
    expected.loss.backward()
    for (name, grad), parameter in zip(found.named_parameters(), ours.parameters(), strict=True):
        # One bias of ours stands for three of the original's, which are summed in `found`.
        grad = grad / 3 if name.endswith("axial.out.bias") else grad
        # Before a batch norm a bias has no gradient but what rounding leaves: 3e-5 here.
        atol = 5e-5 + 1e-5 * parameter.grad.abs().max().item()
        assert_close(grad, parameter.grad, rtol=1e-4, atol=atol, msg=name)

    moved = upstream.vqvae_from(VQVAE_ARGS, original.state_dict()).state_dict()
    for name, buffer in ours.named_buffers():
        assert_close(moved[name], buffer, rtol=1e-5, atol=1e-5, msg=name)
    assert torch.all(original.codebook.N >= 1)  # nothing restarted
    assert torch.equal(original.codebook.N, count) != training


@pytest.mark.parametrize("attention", ["mask", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gpt_is_ours(attention, checkpointing):
    """Logits, loss and gradients, float32, in training mode."""
    original = original_gpt(attention=attention, checkpointing=checkpointing).train()
    ours = our_gpt(original.state_dict(), original.codes).train()
    assert torch.equal(ours.codes, original.codes)
    tokens = random_tokens()
    assert_close(original(tokens), ours(tokens), rtol=1e-5, atol=1e-5)
    loss, expected = original.loss(tokens), ours.loss(tokens)
    assert_close(loss, expected, rtol=1e-5, atol=0)
    assert abs(loss.item() - math.log(SMALL_GPT.codes)) > 0.05  # not the loss of uniform logits

    found = our_gpt(gradients(original, loss), original.codes)
    expected.backward()
    for (name, grad), parameter in zip(found.named_parameters(), ours.parameters(), strict=True):
        scale = parameter.grad.abs().max().item()
        assert scale > 0, name
        assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


# What makes it the original's way -----------------------------------------------------------------


def test_gpt_dropout():
    """In training mode only: on each output, and on the softmaxed weights."""
    tokens = random_tokens()
    for fields in ({"dropout": 0.5}, {"attn_dropout": 0.5}):
        config = GPTConfig(**{**SMALL_GPT.__dict__, **fields})
        for attention in ("mask", "sdpa"):
            gpt, calls = original_gpt(config, attention=attention, checkpointing=False), []
            for net in gpt.attn_stack.attn_nets:
                net.dropout.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            gpt(tokens)
            assert len(calls) == 2 * config.layers  # of attentions and MLPs
            assert not torch.equal(gpt(tokens), gpt(tokens))
            assert torch.equal(gpt.eval()(tokens), gpt(tokens))


def saved_elements(gpt):
    """Elements kept for the backward pass, parameters aside, in a training-mode forward pass."""
    kept = {}
    own = {tensor.data_ptr() for tensor in (*gpt.parameters(), *gpt.buffers())}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    tokens = random_tokens(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = gpt.loss(tokens)
    return sum(kept.values()), max(kept.values()), loss


def test_what_is_kept_for_the_backward_pass():
    """All scores with a dense mask; with checkpointing neither they nor the MLP's insides."""
    scores = SMALL_GPT.heads * SMALL_GPT.tokens**2
    kept = {
        (attention, checkpointing): saved_elements(
            original_gpt(attention=attention, checkpointing=checkpointing).train()
        )
        for attention in ("mask", "sdpa")
        for checkpointing in (False, True)
    }
    assert kept["mask", False][1] >= scores
    assert all(kept[key][1] < scores for key in kept if key != ("mask", False))
    assert kept["mask", True][0] == kept["sdpa", True][0] < kept["sdpa", False][0]


def test_nothing_is_recomputed_in_evaluation():
    calls = []
    gpt = original_gpt().eval()
    for net in gpt.attn_stack.attn_nets:
        for part in (net.attn.fc, net.fc_block):
            part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    once = SMALL_GPT.layers * ["Linear", "Sequential"]
    gpt.loss(random_tokens()).backward()
    assert calls == once
    calls.clear()
    gpt.train().loss(random_tokens()).backward()
    assert sorted(calls) == sorted(2 * once)


def test_promotions_under_autocast():
    """Where the original is float32 under autocast: quantised vectors, residual stream, norms."""
    dtypes = {}

    def note(name):
        return lambda _, inputs, __: dtypes.update({name: inputs[0].dtype})

    gpt, vqvae = original_gpt(), original_vqvae()
    gpt.attn_stack.pos_embd.register_forward_hook(note("before positions"))
    gpt.attn_stack.attn_nets[1].register_forward_hook(note("residual"))
    gpt.attn_stack.attn_nets[1].attn.fc.register_forward_hook(note("attention"))
    vqvae.codebook.register_forward_hook(note("encoder"))
    vqvae.post_vq_conv.register_forward_hook(note("quantised"))
    norm, x = gpt.norm, torch.randn(5, 24).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        gpt.loss(random_tokens())
        vqvae(torch.rand(2, 3, 8, 8, 8) - 0.5)
    assert dtypes == {
        "before positions": torch.bfloat16,
        "residual": torch.float32,
        "attention": torch.bfloat16,
        "encoder": torch.bfloat16,
        "quantised": torch.float32,
    }


def test_codebook_starts_and_restarts():
    """Codes become encoder vectors; a restarted one keeps its count, so it is soon undone."""
    book = OriginalVQVAE(SMALL_VQVAE).codebook
    z = torch.randn(1, 12, 2, 4, 8)
    rows = z.movedim(1, -1).reshape(-1, 12)
    book.initialise(rows)
    assert not book.need_init
    same = (book.embeddings[:, None] == rows).all(-1)  # (codes, rows)
    assert torch.equal(same.sum(1), torch.ones(SMALL_VQVAE.codes, dtype=torch.int64))
    assert same.sum(0).max() == 1  # distinct rows
    book.N[:5] = 0.5
    book.train()(z)
    assert torch.all(book.N[:5] < 1)
    assert (book.embeddings[:5, None] == rows).all(-1).any(1).all()
    assert book.candidates(rows[:3]).shape == (SMALL_VQVAE.codes, 12)  # fewer vectors than codes


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"axial": False}, "axial is False"),
        ({"causal_time": True}, "causal_time is True"),
        ({"local_encoder": True}, "local_encoder is True"),
        ({"downsample": (2, 1, 2)}, r"downsample is \(2, 1, 2\)"),
        ({"downsample": (1, 1, 1)}, r"downsample is \(1, 1, 1\)"),
    ],
)
def test_vqvae_refuses(fields, named):
    with pytest.raises(ValueError, match=named):
        OriginalVQVAE(VQVAEConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"classes": 3}, "classes is 3"),
        ({"cond_frames": 1}, "cond_frames is 1"),
        ({"action_dim": 4}, "action_dim is 4"),
        ({"attention": "strided"}, "attention is 'strided'"),
    ],
)
def test_gpt_refuses(fields, named):
    config = GPTConfig(**fields)
    with pytest.raises(ValueError, match=named):
        OriginalGPT(config, torch.zeros(config.codes, config.code_dim))


def test_gpt_refuses_arguments():
    with pytest.raises(ValueError, match="attention is 'flash', must be 'mask' or 'sdpa'"):
        original_gpt(attention="flash")
    with pytest.raises(ValueError, match=r"\(20, 11\).*\(20, 12\)"):
        OriginalGPT(SMALL_GPT, torch.zeros(20, 11))
