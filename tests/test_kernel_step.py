"""Parts of a decoding step: products of few rows and drawing, their kernels on a CPU."""

import io
import re

import cuda_on_cpu
import pytest
import torch

from tinyvgpt.conditioning import LayerNorm
from tinyvgpt.kernels import build, step
from tinyvgpt.kernels.step import ADD, GELU, NARROW, WIDE, Norm, draw, product
from tinyvgpt.sampling import SamplingRule
from tinyvgpt.sampling import draw as draw_in_float64

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")


@pytest.fixture
def on_cpu(kernel_folder, monkeypatch):
    """Kernels are run on the CPU; what they need and is not there starts as NaN."""
    emulate = cuda_on_cpu.in_place_of_launch(kernel_folder, "product.cu", "draw.cu")
    monkeypatch.setattr(build, "launch", emulate)
    torch.manual_seed(0)


def norms(width, rows=None):
    """A layer norm, class-conditional if there are rows, its Norm, and labels."""
    module = LayerNorm(width, 0 if rows is None else 5)
    labels = None if rows is None else torch.randint(5, (rows,))
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    if rows is None:
        return module, Norm(module.gain.detach(), module.bias.detach()), labels
    gain, shift = (1 + module.gain(labels)).detach(), module.bias(labels).detach()
    return module, Norm(gain, shift), labels


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 33, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [8, 16])
def test_products(on_cpu, monkeypatch, rows, dtype, columns):
    width, outputs = 72, 21
    monkeypatch.setattr(step, "MANY", 0 if columns == 16 else 100)
    weight, bias = torch.randn(outputs, width).to(dtype), torch.randn(outputs)
    wide = torch.randn(rows, width + 8)[:, :width]  # rows that lie apart
    x = wide.to(dtype) if rows != 5 else wide.to(dtype).repeat(1, 2)[:, :width]
    s = x.double() @ weight.double().T + bias.double()
    before = torch.randn(rows, outputs)
    for output, wanted, kind in (
        (NARROW, s, dtype),
        (GELU, s * torch.sigmoid(1.702 * s), dtype),
        (ADD, before + s, torch.float32),
        (WIDE, s, torch.float32),
    ):
        y = before.to(kind) if output == ADD else torch.full((rows, outputs), torch.nan, dtype=kind)
        product(x, weight, y, output, bias=bias)
        within = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[kind]
        torch.testing.assert_close(y.double(), wanted, rtol=within, atol=within)


@pytest.mark.parametrize(
    ("rows", "width", "own"),
    [(1, 40, False), (3, 40, True), (16, 72, True), (16, 640, True), (20, 40, True)],
)
def test_products_of_normalised_rows(on_cpu, rows, width, own):
    """`own`: each row has factors and shifts of its class, too many of width 640."""
    module, norm, labels = norms(width, rows if own else None)
    x = 3 * torch.randn(rows, width) + 1
    x[0] = 2.0  # constant: the norm gives its shift
    weight = torch.randn(8, width).bfloat16()
    y = torch.full((rows, 8), torch.nan)
    product(x, weight, y, WIDE, norm=norm)
    normed = module(x[:, None], labels)[:, 0].bfloat16()
    wanted = (normed.float() @ weight.float().T).detach()
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-3 * width**0.5 * 4)


PLAIN = SamplingRule()


def drawn(logits, u, rule=PLAIN, *, width=12, position=3, positions=7):
    """Tokens by the kernel; what else it writes is checked."""
    rows, codes = logits.shape
    clips = rows if rule.guidance == 1 else rows // 2
    tokens = torch.full((clips, positions), -1)
    lengths = torch.full((rows,), position + 1, dtype=torch.int32)
    table, offsets = torch.randn(codes, width), torch.randn(rows, positions, width)
    every = torch.full((clips, positions), torch.nan, dtype=torch.float64)
    every[:, position] = u
    x = torch.full((rows, width), torch.nan)
    draw(
        logits, every, tokens, lengths, table, offsets, x, guidance=rule.guidance,
        temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p,
    )  # fmt: skip
    found = tokens[:, position].clone()
    tokens[:, position] = -1
    assert (tokens == -1).all()
    assert (lengths == position + 2).all()
    if position + 1 < positions:
        torch.testing.assert_close(x, table[found.repeat(rows // clips)] + offsets[:, position + 1])
    else:
        assert x.isnan().all()
    return found


RULES = [
    SamplingRule(),
    SamplingRule(temperature=0.5),
    SamplingRule(temperature=0),
    SamplingRule(temperature=1e-6),
    SamplingRule(top_k=1),
    SamplingRule(top_k=7, temperature=1.5),
    SamplingRule(top_k=300),
    SamplingRule(top_p=0.3),
    SamplingRule(top_p=0.9, top_k=40),
    SamplingRule(top_p=1e-9),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("codes", [300, 5])
def test_draws_are_those_of_the_rule(on_cpu, rule, codes):
    """At the edges of codes, too: u just below and above each sum; ties and spread-out logits."""
    if rule.top_k is not None and rule.top_k > codes:
        pytest.skip("more than there are")
    for spread in (1.0, 30.0):
        logits = (spread * torch.randn(1, codes)).expand(24, -1).clone()
        logits[:, 1::3] = logits[:, :1]  # ties
        p = rule.probabilities(logits)
        sums = p[0].double().cumsum(-1)
        u = torch.rand(24, dtype=torch.float64)
        u[:2] = torch.tensor([0.0, 1 - 2**-53])
        at = sums[torch.randint(codes, (22,))]
        u[2:] = torch.where(torch.arange(22) % 2 == 0, at - 1e-6, at + 1e-6).clamp(0, 1 - 2**-53)
        near = (sums[None] - u[2:, None]).abs().amin(-1) > 1e-7
        found, wanted = drawn(logits, u, rule), draw_in_float64(p, u)
        assert p[0, found].min() > 0
        assert found[2:][near].equal(wanted[2:][near])


def test_guided_draws(on_cpu):
    rule = SamplingRule(guidance=2.5, top_k=20)
    logits = torch.randn(10, 400)
    both = logits[5:] + 2.5 * (logits[:5] - logits[5:])
    u = torch.rand(5, dtype=torch.float64)
    assert drawn(logits, u, rule).equal(draw_in_float64(rule.probabilities(both), u))


def test_the_last_token_of_a_clip(on_cpu):
    drawn(torch.randn(2, 30), torch.rand(2, dtype=torch.float64), position=6)


@pytest.mark.parametrize("codes", [1, 256, 257, 2048, 3000])
def test_any_number_of_codes(on_cpu, codes):
    logits, u = torch.randn(3, codes), torch.rand(3, dtype=torch.float64)
    assert drawn(logits, u).equal(draw_in_float64(SamplingRule().probabilities(logits), u))


def test_too_many_codes(on_cpu):
    with pytest.raises(ValueError, match="more than the kernel draws from"):
        drawn(torch.zeros(1, step.MOST_CODES + 1), torch.rand(1, dtype=torch.float64))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles(arch):
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    products = [
        (576, 1, 2, 1, NARROW), (576, 1, 2, 1, GELU), (2304, 1, 1, 0, ADD), (2304, 4, 1, 0, ADD),
        (576, 2, 2, 0, GELU), (576, 4, 2, 0, GELU), (576, 1, 2, 1, WIDE),
    ]  # fmt: skip
    names = [
        ("product.cu", f"product<bf16, {k}, {m}, {c}, {step.evenly(k, step.WARPS)}, {n}, {o}>")
        for k, m, c, n, o in products
    ]
    names += [("product.cu", "norm<bf16, 576>"), ("draw.cu", "draw<256, 8>")]
    for file, name in names:
        log = io.StringIO()
        build.compiled(build.source(file), name, arch, log)
        assert re.findall(r"(\d+) bytes spill", log.getvalue()) == ["0", "0"], name
