"""Clips of any length: each window is what its beginning gives by hand, a stream is the same."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from test_videogpt import FRAME_ENCODER, clips
from test_videogpt import build as build_dull

from tinyvgpt import VQVAE, VideoGPT, rollout, video
from tinyvgpt.sampling import Sampler, SamplingRule, sample_tokens
from tinyvgpt.videogpt import evaluating

T, F = 8, 2  # frames of a window and of a latent frame, of the models below
ROW = 4  # tokens of a latent frame


@torch.no_grad()
def build(names=None, causal=True, **fields):
    """A model whose frames differ by more than a few grey levels, and by their tokens."""
    model = build_dull(names, causal, **fields)
    for conv in (*model.vqvae.encoder.convs, model.vqvae.encoder.conv_last):
        conv.weight *= 5
    model.vqvae.to_code.weight *= 20
    model.vqvae.decoder.convs[-1].weight *= 20
    if fields.get("action_dim"):
        torch.nn.init.normal_(model.gpt.action_embedding.project.weight)
    return model


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture(scope="module")
def digits():
    return build(("00", "01", "11"), classes=3, label_dropout=0.2)


@pytest.fixture(scope="module")
def actor():
    return build(action_dim=3)


def course(n, length):
    return torch.randn(n, length, 3, generator=torch.manual_seed(2))


def same(a, b):
    assert a.shape == b.shape
    assert torch.equal(a, b)


@torch.no_grad()
def window_by_hand(model, known, start, **condition):
    """A window's pixels (B, T, H, W, C), of the frames known at its beginning."""
    with evaluating(model):
        x = video.to_model(known)
        cond = model.gpt.config.cond_frames
        whole = model.vqvae.config.causal_time and known.shape[1] % F == 0
        sampler = Sampler(
            model.gpt,
            len(known),
            prefix=model.vqvae.encode(x).flatten(1) if whole else None,
            frames=x if cond else None,
            first_position=-(-start // F) * ROW,
            **condition,
        )
        sampler.draw(model.gpt.config.tokens - sampler.position)
        tokens = sampler.tokens.view(len(known), *model.gpt.config.latent_shape)
        return video.to_uint8(model.vqvae.decode(tokens))


# Windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [2, 4, 6])
def test_a_window_goes_on_from_the_end_of_the_one_before(plain, overlap):
    made = plain.sample(2, length=20, overlap=overlap, seed=0)
    assert made.shape == (2, 20, 16, 16, 1)
    same(made[:, :T], plain.sample(2, seed=0))
    step = T - overlap
    for start in range(step, 20 - overlap, step):
        window = window_by_hand(plain, made[:, start : start + overlap], start, seed=0)
        new = made[:, start + overlap : start + T]
        same(new, window[:, overlap : overlap + new.shape[1]])


@torch.no_grad()
def local():
    """A model whose tokens tell of their own pixels only."""
    model = build()
    vqvae = VQVAE(replace(model.vqvae.config, local_encoder=True))
    vqvae.codebook.codes.copy_(model.gpt.codes)
    return VideoGPT(vqvae, model.gpt).eval()


@pytest.mark.parametrize("given", [0, 4, T])
@pytest.mark.parametrize("overlap", [2, 6])
@torch.no_grad()
def test_a_local_encoders_tokens_are_kept(given, overlap):
    """A window begins with the tokens that were drawn, not with those of their pixels."""
    model, step = local(), T - overlap
    begun = clips(2, given) if given else None
    made = model.sample(2, frames=begun, length=T + 3 * step, overlap=overlap, seed=0)
    tokens = model.vqvae.encode(video.to_model(begun)).flatten(1) if given else None
    if given < T:
        tokens = sample_tokens(model.gpt, 2, prefix=tokens, seed=0).flatten(1)
    kept = 0
    for start in range(step, 4 * step, step):
        prefix = tokens[:, -overlap // F * ROW :]
        anew = model.vqvae.encode(video.to_model(made[:, start : start + overlap])).flatten(1)
        kept += not torch.equal(prefix, anew)
        position = start // F * ROW
        sampler = Sampler(model.gpt, 2, seed=0, prefix=prefix, first_position=position)
        sampler.draw(model.gpt.config.tokens - sampler.position)
        tokens = sampler.tokens
        window = model.vqvae.decode(tokens.view(2, *model.gpt.config.latent_shape))
        same(made[:, start + overlap : start + T], video.to_uint8(window)[:, overlap:])
    assert kept, "the pixels give the same tokens: nothing was tested"


@torch.no_grad()
def test_a_stream_of_a_local_encoder():
    model, begun = local(), clips(2, 4)
    made = model.sample(frames=begun, length=18, seed=0)
    same(torch.cat(list(model.stream(frames=begun, length=18, seed=0)), 1), made)


def test_half_a_window_is_the_default(plain):
    same(plain.sample(length=20, seed=0), plain.sample(length=20, overlap=4, seed=0))


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 12, 13, 23])
def test_any_length_is_the_beginning_of_a_longer_one(plain, length):
    same(plain.sample(2, length=length, seed=3), plain.sample(2, length=24, seed=3)[:, :length])


@pytest.mark.parametrize("given", [2, 6, 8])
@pytest.mark.parametrize("overlap", [2, 6])
def test_given_frames_of_a_long_clip(plain, given, overlap):
    begun = clips(2, given)
    made = plain.sample(frames=begun, length=17, overlap=overlap, seed=0)
    same(made[:, :given], begun)
    if given < T:
        same(made[:, :T], plain.sample(frames=begun, seed=0))
    start = T - overlap
    window = window_by_hand(plain, made[:, start:T], start, seed=0)
    new = made[:, T : start + T]
    same(new, window[:, overlap : overlap + new.shape[1]])


def test_windows_differ(plain):
    """Each window has its own random numbers, and so has each clip, whatever the batch."""
    made = plain.sample(3, length=21, seed=0)
    stretches = made[:, :20].unflatten(1, (5, 4)).flatten(0, 1).flatten(1)
    assert len(stretches.unique(dim=0)) == 15
    same(plain.sample(3, length=21, seed=0, batch_size=2), made)
    assert not torch.equal(plain.sample(3, length=21, seed=1), made)


def test_labels_and_guidance_hold_in_all_windows(digits):
    labels = torch.tensor([0, 2])
    how = {"temperature": 0.9, "top_k": 7, "top_p": 0.9, "guidance": 2.0}
    made = digits.sample(labels=labels, length=12, seed=0, **how)
    rule = SamplingRule(**how)
    window = window_by_hand(digits, made[:, 4:8], 4, seed=0, labels=labels, rule=rule)
    same(made[:, 8:], window[:, 4:])
    assert not torch.equal(digits.sample(labels=[1, 2], length=12, seed=0, **how)[0], made[0])


def test_each_window_takes_its_part_of_the_actions(actor):
    actions = course(2, 14)
    made = actor.sample(actions=actions, length=14, seed=0)
    padded = torch.cat([actions, torch.zeros(2, 4, 3)], 1)
    for start in (4, 8):
        part = padded[:, start : start + T]
        window = window_by_hand(actor, made[:, start : start + 4], start, seed=0, actions=part)
        new = made[:, start + 4 : start + T]
        same(new, window[:, 4 : 4 + new.shape[1]])
    same(made[:, :T], actor.sample(actions=actions[:, :T], seed=0))
    last = actions.clone()
    last[:, 13:] = 9  # leads out of the clip
    same(actor.sample(actions=last, length=14, seed=0), made)
    last[:, 11:12] = 9  # leads to frame 12
    other = actor.sample(actions=last, length=14, seed=0)
    same(other[:, :12], made[:, :12])
    assert not torch.equal(other, made)
    same(actor.sample(2, actions=actions[0], length=14, seed=0)[0], made[0])
    short = actor.sample(actions=actions[:, :3], length=3, seed=0)
    same(short[:, :2], made[:, :2])  # what leads to frame 3, of the same latent frame, is missing


@pytest.mark.parametrize(("count", "causal"), [(2, True), (2, False), (3, True), (3, False)])
def test_windows_of_a_frame_encoder(count, causal):
    model = build(causal=causal, **{**FRAME_ENCODER, "cond_frames": count})
    begun = clips(2, count)
    made = model.sample(frames=begun, length=21, seed=0)
    same(made[:, :T], model.sample(frames=begun, seed=0))
    step = T - count
    for start in range(step, 21 - count, step):
        window = window_by_hand(model, made[:, start : start + count], start, seed=0)
        new = made[:, start + count : start + T]
        same(new, window[:, count : count + new.shape[1]])
    same(model.sample(frames=begun, length=21, overlap=count, seed=0), made)
    same(model.sample(frames=begun, length=5, seed=0), made[:, :5])


def test_actions_of_a_frame_encoder():
    """Windows that don't begin with a latent frame take their actions, too."""
    model = build(causal=False, action_dim=3, **{**FRAME_ENCODER, "cond_frames": 3})
    begun, actions = clips(2, 3), course(2, 13)
    made = model.sample(frames=begun, actions=actions, length=13, seed=0)
    window = window_by_hand(model, made[:, 5:8], 5, seed=0, actions=actions[:, 5:])
    same(made[:, 8:], window[:, 3:])


def test_a_frame_encoder_without_first_frames():
    model = build(frame_dropout=0.5, **FRAME_ENCODER)
    made = model.sample(2, length=12, seed=0)
    window = window_by_hand(model, made[:, 6:8], 6, seed=0)
    same(made[:, 8:], window[:, 2:6])


@pytest.mark.parametrize(
    ("length", "given", "overlap", "latent_frames"),
    [(3, 0, 0, 2), (8, 0, 0, 4), (8, 4, 0, 2), (9, 0, 4, 5), (16, 0, 4, 8), (16, 8, 6, 4)],
)
def test_no_more_is_drawn_than_needed(plain, monkeypatch, length, given, overlap, latent_frames):
    drawn = []
    draw = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda self, n, p: (drawn.append(n), draw(self, n, p)))
    begun = clips(1, given) if given else None
    plain.sample(frames=begun, length=length, overlap=overlap or None, seed=0)
    assert sum(drawn) == latent_frames * ROW
    request = rollout.Request(1, SamplingRule(), 0, length, overlap, begun)
    assert rollout.tokens_to_draw(plain.vqvae.config, request) == sum(drawn)


# Streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 15, 20])
@pytest.mark.parametrize("given", [0, 4, 8])
def test_a_stream_is_the_sample_in_pieces(plain, length, given):
    if given > length:
        return
    frames = clips(2, given) if given else None
    pieces = list(plain.stream(2, frames=frames, length=length, seed=0))
    assert [piece.shape[1] for piece in pieces] == [F] * (length // F) + [1] * (length % F)
    same(torch.cat(pieces, 1), plain.sample(2, frames=frames, length=length, seed=0))


def test_a_stream_with_everything(digits, actor):
    how = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "guidance": 3.0, "overlap": 2, "seed": 5}
    pieces = list(digits.stream(labels=["01", 2], length=13, **how))
    same(torch.cat(pieces, 1), digits.sample(labels=["01", 2], length=13, **how))
    actions = course(2, 13)
    pieces = list(actor.stream(frames=clips(1, 4), actions=actions, seed=0))
    made = actor.sample(frames=clips(1, 4), actions=actions, length=13, seed=0)
    same(torch.cat(pieces, 1), made)
    one = torch.cat(list(actor.stream(2, actions=actions[0].numpy(), seed=0)), 1)
    same(one, actor.sample(2, actions=actions[0], length=13, seed=0))


def test_a_stream_through_the_frame_encoder():
    model = build(**FRAME_ENCODER)
    pieces = list(model.stream(frames=clips(2, 2), length=17, seed=0))
    same(torch.cat(pieces, 1), model.sample(frames=clips(2, 2), length=17, seed=0))


def test_an_endless_stream(plain):
    stream = plain.stream(2, seed=0)
    first = torch.cat(list(islice(stream, 12)), 1)
    same(first, plain.sample(2, length=24, seed=0))
    assert next(stream).shape == (2, F, 16, 16, 1)


def test_frames_come_as_soon_as_they_are_final(plain, monkeypatch):
    """The model, its mode and gradients are the caller's in between."""
    drawn = []
    draw = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda self, n, p: (drawn.append(n), draw(self, n, p)))
    stream = plain.stream(frames=clips(1, 4), seed=0)
    for number in range(8):
        same(next(stream), clips(1, 4)[:, F * number :][:, :F]) if number < 2 else next(stream)
        assert sum(drawn) == max(number - 1, 0) * ROW
        assert plain.training
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("given", [0, 2, 8])
@pytest.mark.parametrize("form", ["n f A", "1 f A", "f A", "A", "array"])
def test_actions_that_are_asked_for(actor, given, form):
    """For each latent frame, given ones too, in order, and no earlier than it is drawn."""
    n = 2 if form == "n f A" else 1
    leading = course(n, 18)  # to each frame
    if form == "A":
        leading = leading[:, ::F].repeat_interleave(F, 1)
    asked = []

    def source(frame):
        asked.append(frame)
        part = leading[:, frame : frame + F]
        if form == "array":
            return part[0].numpy().astype(np.float64)
        return {"n f A": part, "1 f A": part, "f A": part[0], "A": part[0, 0]}[form]

    frames = clips(2, given) if given else None
    pieces = []
    for piece in actor.stream(2, frames=frames, actions=source, length=18, seed=0):
        pieces.append(piece)
        assert max(asked, default=0) <= max(F * len(pieces) - F, given - F, 0)
    assert asked == list(range(0, 18, F))
    following = torch.cat([leading[:, 1:], torch.zeros(n, 1, 3)], 1)
    made = actor.sample(2, frames=frames, actions=following, length=18, seed=0)
    same(torch.cat(pieces, 1), made)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"length": 0}, "length is 0, must be at least 1 frame"),
        ({"length": -1}, "length is -1"),
        ({"length": 8.5}, "length is 8.5, must be a whole number"),
        ({"length": 3, "frames": clips(1, 4)}, "length is 3, but 4 first frames are given"),
        ({"length": 9, "overlap": 0}, "overlap is 0, .* multiple of 2 .* from 2 to 6"),
        ({"length": 9, "overlap": 3}, "overlap is 3, .* multiple of 2 .* from 2 to 6"),
        ({"length": 9, "overlap": 8}, "overlap is 8, .* multiple of 2 .* from 2 to 6"),
        ({"length": 9, "overlap": -2}, "overlap is -2"),
        ({"length": 9, "overlap": "x"}, "overlap is 'x', must be a whole number"),
        ({"overlap": 3}, "overlap is 3"),
        ({"length": 9, "actions": torch.zeros(9, 3)}, "not action-conditional"),
    ],
)
def test_refusals(plain, fields, says):
    with pytest.raises(ValueError, match=says):
        plain.sample(seed=0, **fields)
    with pytest.raises(ValueError, match=says):
        plain.stream(seed=0, **fields)  # at once, not with the first frames


def test_actions_that_are_refused(actor, plain):
    for actions, says in [
        (torch.zeros(8, 3), r"\(1, 8, 3\), 12 frames need .* \(12, 3\)"),
        (torch.zeros(2, 13, 3), r"\(2, 13, 3\), 12 frames need .* \(12, 3\)"),
        (torch.zeros(12, 4), r"\(1, 12, 4\), 12 frames need .* \(12, 3\)"),
        (None, r"action-conditional: give actions .* \(12, 3\)"),
    ]:
        for method in (actor.sample, actor.stream):
            with pytest.raises(ValueError, match=says):
                method(actions=actions, length=12)
    with pytest.raises(ValueError, match=r"actions must be numbers here; model\.stream"):
        actor.sample(actions=lambda frame: torch.zeros(3))
    with pytest.raises(ValueError, match="not action-conditional"):
        plain.stream(actions=lambda frame: torch.zeros(3))
    for answer in (torch.zeros(4), torch.zeros(3, 3), torch.zeros(3, 2, 3), torch.zeros(())):
        stream = actor.stream(2, actions=lambda frame, answer=answer: answer)
        with pytest.raises(ValueError, match=r"asked for have shape .* = \(2, 2, 3\)"):
            next(stream)


def test_models_that_cannot_go_on():
    neither = build(causal=False)
    with pytest.raises(ValueError, match=r"clips of 8 frames and can't continue them: .* causal"):
        neither.sample(length=9)
    with pytest.raises(ValueError, match="can't continue them"):
        neither.sample(overlap=4)
    same(neither.sample(length=3, seed=0), neither.sample(seed=0)[:, :3])
    with pytest.raises(ValueError, match="can't be streamed: its tokenizer isn't causal_time"):
        neither.stream()
    with pytest.raises(ValueError, match="isn't causal_time"):
        build(causal=False, **FRAME_ENCODER).stream(frames=clips(1, 2))
    encoder = build(**FRAME_ENCODER)
    with pytest.raises(ValueError, match="overlap is 4, the model's frame encoder takes 2"):
        encoder.sample(frames=clips(1, 2), length=9, overlap=4)
    odd = build(**{**FRAME_ENCODER, "cond_frames": 3})
    with pytest.raises(ValueError, match="takes 3 frames, which isn't a multiple of 2"):
        odd.stream(frames=clips(1, 3))
    full = build(**{**FRAME_ENCODER, "cond_frames": 8})
    with pytest.raises(ValueError, match="8 must be known, and none is left to draw"):
        full.sample(frames=clips(1, 8), length=9)


def test_out_of_memory_says_what_to_lower(plain, monkeypatch):
    def decode(tokens):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(plain.vqvae, "decode", decode)
    with pytest.raises(ValueError, match=r"^out of memory with 2 clips at a time: lower batch_siz"):
        plain.sample(3, batch_size=2)
    with pytest.raises(ValueError, match=r"^out of memory with 3 clips: lower n$"):
        next(plain.stream(3))
    assert plain.training
