"""Choosing tokens: rules against definitions, draws against probabilities, caches, guidance."""

import math

import pytest
import torch
from torch import nn

from tinyvgpt import GPT, GPTConfig
from tinyvgpt.sampling import (
    Decoder,
    Sampler,
    SamplingRule,
    SplitLinear,
    draw,
    pack,
    sample_tokens,
)

CONFIG = GPTConfig(
    latent_shape=(2, 3, 4), codes=11, code_dim=5, frames=4, resolution=8, channels=1, width=24,
    heads=4, layers=2,
)  # fmt: skip


def build(**fields):
    """A GPT in float64 whose logits are far from uniform."""
    torch.manual_seed(0)
    config = GPTConfig(**{**CONFIG.__dict__, **fields})
    gpt = GPT(config, torch.randn(config.codes, config.code_dim))
    nn.init.normal_(gpt.token_out.weight, std=0.5)
    for name, parameter in gpt.named_parameters():
        if "norm" in name and "bias" in name:
            nn.init.normal_(parameter, std=0.5)  # labels make a difference
    return gpt.double().eval()


@pytest.fixture(scope="module")
def gpt():
    return build()


@pytest.fixture(scope="module")
def labelled():
    return build(classes=3, label_dropout=0.1)


# Rules --------------------------------------------------------------------------------------------


def p_of(logits, **rule):
    return SamplingRule(**rule).probabilities(torch.tensor(logits)[None])[0]


def logs(*p):
    return [math.log(x) for x in p]


def close(a, b):
    return torch.allclose(a, torch.tensor(b), atol=1e-6)


def test_rules_by_definition():
    logits = logs(0.5, 0.1, 0.3, 0.1)
    assert close(p_of(logits), [0.5, 0.1, 0.3, 0.1])
    assert close(p_of(logits, temperature=0.5), [x / 0.36 for x in (0.25, 0.01, 0.09, 0.01)])
    assert close(p_of(logits, temperature=0), [1.0, 0, 0, 0])
    assert close(p_of(logits, top_k=1), [1.0, 0, 0, 0])
    assert close(p_of(logits, top_k=2), [0.625, 0, 0.375, 0])
    assert close(p_of(logits, top_k=4), [0.5, 0.1, 0.3, 0.1])
    assert close(p_of(logits, top_k=99), [0.5, 0.1, 0.3, 0.1])
    assert close(p_of(logits, top_p=0.49), [1.0, 0, 0, 0])
    assert close(p_of(logits, top_p=0.51), [0.625, 0, 0.375, 0])
    assert close(p_of(logits, top_p=0.79), [0.625, 0, 0.375, 0])
    assert close(p_of(logits, top_p=1e-9), [1.0, 0, 0, 0])
    assert close(p_of(logits, top_p=1), [0.5, 0.1, 0.3, 0.1])


def test_top_p_follows_top_k():
    """0.4 of what top-k leaves, 0.5 and 0.3 of 0.8, is reached by the first token alone."""
    logits = logs(0.5, 0.1, 0.3, 0.1)
    assert close(p_of(logits, top_k=2, top_p=0.6), [1.0, 0, 0, 0])
    assert close(p_of(logits, top_p=0.6), [0.625, 0, 0.375, 0])


def test_temperature_comes_before_top_p():
    logits = logs(0.5, 0.1, 0.3, 0.1)  # squared and normalised: 0.69, 0.03, 0.25, 0.03
    assert close(p_of(logits, temperature=0.5, top_p=0.6), [1.0, 0, 0, 0])


def test_ties():
    """Equal logits fare equally, wherever they stand; greedily the first of them is taken."""
    assert close(p_of([1.0, 3.0, 3.0, 0.0], temperature=0), [0, 1.0, 0, 0])
    assert close(p_of([1.0, 3.0, 3.0, 0.0], top_k=1), [0, 0.5, 0.5, 0])
    assert close(p_of([2.0, 2.0, 2.0, 2.0], top_p=0.3), [0.25] * 4)
    for order in torch.tensor([[0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [3, 4, 1, 2, 0]]):
        logits = torch.tensor([1.0, 0.5, 0.5, 0.5, -1.0])[order]
        for rule in (SamplingRule(top_k=2), SamplingRule(top_p=0.4), SamplingRule(top_p=0.9)):
            p = rule.probabilities(logits[None])[0]
            assert len({round(x, 6) for x in p[logits == 0.5].tolist()}) == 1


def test_a_temperature_that_float32_has_no_number_for_is_0():
    assert SamplingRule(1e-46) == SamplingRule(0.0)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 1e6, 3e38])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_temperatures(temperature, scale):
    logits = scale * torch.tensor([[1.0, 2.0, -3.0, 2.0 - 1e-3]])
    p = SamplingRule(temperature).probabilities(logits)
    assert p.isfinite().all()
    assert p.sum() == pytest.approx(1)
    expected = ((logits - logits.max()).double() / temperature).softmax(-1)
    assert torch.allclose(p.double(), expected, atol=1e-5)


def test_everything_is_kept_by_top_p_1():
    """However long the tail: rounding must not cut what together reaches one."""
    body = torch.randn(50, 2000, generator=torch.manual_seed(0))
    logits = torch.cat([body, torch.full((50, 96), -25.0)], dim=1)
    assert (SamplingRule(top_p=1.0).probabilities(logits) > 0).all()
    flat = torch.linspace(0, 1e-3, 2048)[None]
    kept = (SamplingRule(top_p=0.5).probabilities(flat) > 0).sum()
    assert abs(kept.item() - 1024) <= 2


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"guidance": -1e39}, "guidance is -1e"),
    ],
)
def test_rules_that_make_no_sense(rule, says):
    with pytest.raises(ValueError, match=says):
        SamplingRule(**rule)


# Draws --------------------------------------------------------------------------------------------


def test_draw_inverts_the_cumulative_sum():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    tokens = draw(p.expand(len(u), -1), u)
    assert tokens.tolist() == [1, 1, 3, 3, 3, 4, 4], "never one without probability"


def chi_square(counts, p):
    """Pearson's statistic over the tokens that can come, and its degrees of freedom."""
    expected = counts.sum() * p
    possible = p > 0
    assert not counts[~possible].any()
    return ((counts - expected)[possible] ** 2 / expected[possible]).sum(), possible.sum() - 1


@pytest.mark.parametrize("rule", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}])
def test_frequencies_are_the_probabilities(gpt, rule):
    """First tokens of 20,000 clips, and second ones after the commonest first, by chi-square."""
    short = build(latent_shape=(1, 1, 2), frames=1, resolution=2, layers=1)
    rule = SamplingRule(**rule)
    tokens = sample_tokens(short, 20_000, seed=1, rule=rule).flatten(1)
    first = tokens[:, 0].mode()[0]
    with torch.no_grad():
        logits = short(torch.tensor([[[[first.item(), 0]]]])).flatten(0, -2)  # (2, K)
    p = rule.probabilities(logits).double()
    for i, drawn in enumerate((tokens[:, 0], tokens[tokens[:, 0] == first, 1])):
        statistic, freedom = chi_square(torch.bincount(drawn, minlength=11).double(), p[i])
        if freedom:  # mean k, variance 2k: five standard deviations
            assert statistic < freedom + 5 * (2 * freedom) ** 0.5
        wrong, freedom = chi_square(
            torch.bincount(drawn, minlength=11).double(), (p[i] ** 1.3) / (p[i] ** 1.3).sum()
        )
        if freedom:
            assert wrong > freedom + 5 * (2 * freedom) ** 0.5, "another temperature shows"


def test_greedy_takes_the_likeliest(gpt):
    tokens = sample_tokens(gpt, 2, seed=0, rule=SamplingRule(temperature=0))
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens, sample_tokens(gpt, 2, seed=5, rule=SamplingRule(temperature=0)))
    with torch.no_grad():
        assert torch.equal(gpt(tokens).argmax(-1), tokens)


def test_seed_decides_whatever_the_batch(gpt):
    whole = sample_tokens(gpt, 6, seed=3)
    assert whole.shape == (6, 2, 3, 4)
    assert whole.dtype == torch.int64
    for size in (1, 2, 5):
        parts = [
            sample_tokens(gpt, min(size, 6 - start), seed=3, first_clip=start)
            for start in range(0, 6, size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(sample_tokens(gpt, 6, seed=4), whole)
    assert len(whole.flatten(1).unique(dim=0)) == 6, "clips differ"
    torch.manual_seed(1)
    assert torch.equal(sample_tokens(gpt, 6, seed=3), whole), "torch's generator has no say"


@pytest.mark.parametrize("given", [0, 1, 7, 12, 23, 24])
@pytest.mark.parametrize("attention", ["full", "strided"])
def test_prefix_is_kept(given, attention):
    fields = {"latent_shape": (2, 4, 8), "resolution": 16} if attention == "strided" else {}
    gpt = build(attention=attention, **fields)
    tokens = torch.randint(11, (3, gpt.config.tokens), generator=torch.manual_seed(0))
    drawn = sample_tokens(gpt, 3, seed=0, prefix=tokens[:, :given]).flatten(1)
    assert torch.equal(drawn[:, :given], tokens[:, :given])
    # What follows is what the draws of a whole clip would have been behind that prefix.
    again = sample_tokens(gpt, 3, seed=0, prefix=drawn[:, : given + 1]).flatten(1)
    assert torch.equal(again, drawn)
    assert torch.equal(sample_tokens(gpt, 3, seed=0, prefix=drawn).flatten(1), drawn)


# Guidance -----------------------------------------------------------------------------------------


def test_guidance_identities(labelled):
    """1 is plain sampling; 0 is the null label; between logits it is a straight line."""
    labels = torch.tensor([0, 1, 2])
    null = torch.full((3,), 3)
    options = {"seed": 2}
    plain = sample_tokens(labelled, 3, labels=labels, **options)
    one = sample_tokens(labelled, 3, labels=labels, rule=SamplingRule(guidance=1.0), **options)
    assert torch.equal(one, plain)
    zero = sample_tokens(labelled, 3, labels=labels, rule=SamplingRule(guidance=0.0), **options)
    without = sample_tokens(labelled, 3, labels=null, **options)
    assert torch.equal(zero, without)
    assert torch.equal(sample_tokens(labelled, 3, **options), without), "no label: the null one"
    assert not torch.equal(plain, without)


@pytest.mark.parametrize("guidance", [2.5, -1.0, 0.5])
def test_guidance_by_definition(labelled, guidance):
    """Token by token what the formula gives with two full forwards."""
    labels, rule = torch.tensor([0, 2]), SamplingRule(temperature=0, guidance=guidance)
    tokens = sample_tokens(labelled, 2, seed=0, labels=labels, rule=rule)
    with torch.no_grad():
        given = labelled(tokens, labels=labels)
        null = labelled(tokens, labels=torch.full_like(labels, 3))
    assert torch.equal((null + guidance * (given - null)).argmax(-1), tokens)
    assert not torch.equal(given.argmax(-1), tokens)


# Caches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (7, 6), (5, 9), (24, 72), (6, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_split_linear_is_the_plain_one(threads, size, bias):
    torch.manual_seed(0)
    linear = nn.Linear(*size, bias=bias).double()
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        split = SplitLinear(linear)
        assert len(split.weight) == (threads if size[1] % threads == 0 else 1)
        for shape in ((3, size[0]), (2, 5, size[0]), (size[0],), (1, 1, size[0])):
            x = torch.randn(shape, dtype=torch.float64)
            assert torch.allclose(split(x), linear(x), rtol=0, atol=1e-12)
            assert split(x).shape == linear(x).shape
    finally:
        torch.set_num_threads(former)


def test_pack(labelled):
    """A packed model gives the same numbers; the model itself is left as it was."""
    tokens = torch.randint(11, (2, 2, 3, 4), generator=torch.manual_seed(0))
    labels = torch.tensor([1, 2])
    before = dict(labelled.named_modules())
    packed = pack(labelled)
    kinds = {type(m) for m in packed.modules()}
    assert SplitLinear in kinds
    assert nn.Linear not in kinds
    with torch.no_grad():
        assert torch.allclose(packed(tokens, labels=labels), labelled(tokens, labels=labels))
    after = dict(labelled.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert packed.positions.tables[0] is labelled.positions.tables[0], "the rest is shared"


def test_steps_do_one_tokens_work(gpt, monkeypatch):
    """Every linear map and norm sees one position a step; tables are made beforehand."""
    seen = []
    decoder = Decoder(gpt, 2, gpt.condition(2))
    for module in decoder.gpt.modules():
        if not list(module.children()) and not isinstance(module, (nn.Dropout, nn.ParameterList)):
            module.register_forward_hook(lambda m, x, y: seen.append(x[0].shape[-2]))
    step = decoder.step(torch.zeros(2, 0, dtype=torch.int64))
    assert step.shape == (2, 11)
    monkeypatch.setattr(type(gpt), "offsets", None)  # looked up once, before the first step
    monkeypatch.setattr(type(gpt.positions), "forward", None)
    for i in range(1, 24):
        seen.clear()
        assert decoder.step(torch.full((2, 1), i % 11)).shape == (2, 11)
        assert set(seen) == {1}
        assert [cache.length for cache in decoder.caches] == [i + 1] * 2


# Refusals -----------------------------------------------------------------------------------------


def test_refusals(gpt, labelled):
    one = torch.zeros(2, 1, dtype=torch.int64)
    for call, says in [
        (
            lambda: sample_tokens(gpt, 2, seed=0, prefix=one.expand(2, 25)),
            "25 tokens, a clip has 24",
        ),
        (lambda: sample_tokens(gpt, 3, seed=0, prefix=one), "prefixes of 2 clips .* for 3"),
        (lambda: sample_tokens(gpt, 2, seed=0, prefix=one + 11), "0 to 10"),
        (lambda: sample_tokens(gpt, 2, seed=0, prefix=one - 1), "0 to 10"),
        (lambda: sample_tokens(gpt, 2, seed=0, prefix=one.float()), "int64"),
        (lambda: sample_tokens(gpt, 2, seed=0, rule=SamplingRule(top_k=12)), "top_k is 12.* 11"),
        (lambda: sample_tokens(gpt, 2, seed=0, rule=SamplingRule(guidance=2)), "null label"),
        (lambda: sample_tokens(labelled, 2, seed=0, rule=SamplingRule(guidance=2)), "labels"),
        (lambda: sample_tokens(labelled, 2, seed=0, labels=torch.tensor([0])), "labels"),
        (lambda: sample_tokens(labelled, 1, seed=0, labels=torch.tensor([4])), "0 to 3"),
        (lambda: sample_tokens(gpt, 1, seed=0, labels=torch.tensor([0])), "class-conditional"),
        (lambda: sample_tokens(gpt, 1, seed=2**64), "seed"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    without_null = build(classes=3)
    with pytest.raises(ValueError, match="label_dropout"):
        sample_tokens(
            without_null, 1, seed=0, labels=torch.tensor([0]), rule=SamplingRule(guidance=2)
        )


def test_tokens_drawn_some_at_a_time(gpt):
    whole = sample_tokens(gpt, 2, seed=3).flatten(1)
    sampler = Sampler(gpt, 2, seed=3, prefix=whole[:, :5])
    parts = [sampler.draw(count) for count in (1, 0, 7, whole.shape[1] - 13)]
    assert torch.cat([whole[:, :5], *parts], dim=1).equal(whole)
    assert sampler.tokens.equal(whole)


def test_random_numbers_of_longer_clips(gpt):
    early, late = Sampler(gpt, 2, seed=3), Sampler(gpt, 2, seed=3, first_position=6)
    assert late.u[:, :-6].equal(early.u[:, 6:])
