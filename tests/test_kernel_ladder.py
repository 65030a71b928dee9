"""The ladder of kernels: each rung on a CPU, what it compiles to, and what it refuses."""

import io
import re

import cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F

from tinyvgpt.kernels import build, ladder, why_not

NEW = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_120": 99}  # KB a block
OLD = {"sm_75": 64}
RUNGS = {rung.name: rung for rung in ladder.rungs()}
OURS = [name for name in RUNGS if name != "flash"]  # flash has tests of its own
ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.fixture
def run(kernel_folder, monkeypatch):
    """Return a function that runs a rung on the CPU and compares it to float64.

    Its result is allocated as NaN. The function returns how many rows met in banks, and how many
    8 × 8 matrices were loaded.
    """

    def source(rung):
        parts = [build.HERE / "tile.cuh", build.HERE / rung.file]
        return "\n".join(part.read_text() for part in parts)

    def launched(name, q, k, v, *, causal):
        rung = RUNGS[name]

        def emulate(file, kernel, grid, threads, shared_bytes, device, *args):
            assert file == rung.file
            text = source(rung)
            cuda_on_cpu.launch(text, kernel, kernel_folder, grid, (threads,), shared_bytes, *args)

        monkeypatch.setattr(build, "launch", emulate)
        ladder.check(q, k, v)
        ladder.check_for_kernel(rung, q)
        counter = source(rung), rung.cut(q.dtype, *q.shape[2:]).kernel, kernel_folder
        before = cuda_on_cpu.conflicts(*counter)
        torch.use_deterministic_algorithms(True)  # new tensors start as NaN
        try:
            o = ladder.launch(rung, q, k, v, causal)
        finally:
            torch.use_deterministic_algorithms(False)
        wanted = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=causal)
        error = ((o.double() - wanted).norm() / wanted.norm()).item()
        assert error < ERROR[q.dtype], error
        after = cuda_on_cpu.conflicts(*counter)
        return tuple(x - y for x, y in zip(after, before, strict=True))

    torch.manual_seed(0)
    return launched


def inputs(batch, heads, tokens, d, dtype):
    """Contiguous q, k and v (B, nh, S, d), followed in memory by NaN."""
    count = batch * heads * tokens * d
    whole = [torch.full((count + 64 * d,), torch.nan, dtype=dtype) for _ in range(3)]
    return [x[:count].view(batch, heads, tokens, d).normal_() for x in whole]


# Each costs g++ a few seconds: the last rungs do with types what the third does.
CASES = [
    *((name, dtype) for name in OURS[:3] for dtype in RUNGS[name].dtypes),
    *((name, torch.bfloat16) for name in OURS[3:]),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_lengths(run, name, dtype, causal):
    for batch, heads, tokens in ((1, 2, 1), (2, 1, 64), (1, 1, 130)):
        run(name, *inputs(batch, heads, tokens, 64, dtype), causal=causal)


@pytest.mark.parametrize("name", ["naive", "tensor_cores", "pipeline"])
def test_head_dim_128(run, name):
    for causal in (False, True):
        run(name, *inputs(1, 2, 90, 128, torch.bfloat16), causal=causal)


@pytest.mark.parametrize("name", OURS)
def test_large_scores(run, name):
    """Maxima that grow from tile to tile, and weights that are nearly 0 or 1."""
    q, k, v = inputs(1, 1, 200, 64, torch.bfloat16)
    k *= torch.linspace(0, 20, 200)[:, None]
    for keys in (k, k.flip(2)):
        run(name, q, keys, v, causal=False)
        run(name, q, keys, v, causal=True)


def test_swizzle_ends_conflicts(run):
    """Eight rows of a plain tile meet in one group of banks, those of a swizzled one never do."""
    found = {
        name: run(name, *inputs(1, 1, 128, 64, torch.bfloat16), causal=False)
        for name in ("tensor_cores", "swizzle", "pipeline")
    }
    conflicts, loads = found["tensor_cores"]
    assert conflicts == 7 * loads > 0
    for name in ("swizzle", "pipeline"):
        conflicts, loads = found[name]
        assert conflicts == 0 < loads


@pytest.mark.parametrize("arch", [*OLD, *NEW])
@pytest.mark.parametrize("name", OURS)
def test_compiles(name, arch):
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    rung = RUNGS[name]
    if arch in OLD and rung.oldest > (7, 5):
        pytest.skip(f"{name} is for newer GPUs")
    text = build.source(rung.file)
    cases = [(torch.float16, 64)]
    if arch == "sm_80":
        cases = [(dtype, 64) for dtype in rung.dtypes]
    if arch == "sm_90a":
        cases = [(torch.float16, d) for d in rung.dims]
    for dtype, d in cases:
        log = io.StringIO()
        cut = rung.cut(dtype, 4096, d)
        build.compiled(text, cut.kernel, arch, log)
        registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
        assert not any(map(int, re.findall(r"(\d+) bytes spill", log.getvalue()))), (dtype, d)
        blocks = 3 if d == 64 and rung.oldest == (8, 0) else 2
        assert blocks * registers * cut.threads <= 65536
        assert blocks * cut.shared_bytes <= (OLD | NEW)[arch] * 1024 or d == 128
        assert cut.shared_bytes <= 64 * 1024


def test_rungs():
    rungs = ladder.rungs()
    assert [rung.oldest for rung in rungs] == sorted(rung.oldest for rung in rungs)
    for rung in rungs:
        text = (build.HERE / rung.file).read_text(encoding="utf-8")
        assert text.startswith("// Attention, ")
        assert f"{rung.name}(" in text or rung.name == "flash"
        cut = rung.cut(rung.dtypes[-1], 4096, 64)
        assert cut.kernel.startswith(rung.name)
        assert cut.threads % 32 == 0


@pytest.mark.parametrize("causal", [False, True])
def test_on_a_cpu(causal):
    q, k, v = (torch.randn(2, 3, 20, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    for name in RUNGS:
        torch.testing.assert_close(ladder.attention(q, k, v, name, causal), expected)


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rung": "ladder"}, ValueError, "no rung 'ladder'"),
        ({"q": meta(3, 8, 64)}, ValueError, "must be"),
        ({"q": meta(2, 3, 9, 64)}, ValueError, "alike"),
        ({"v": meta(2, 3, 8, 32)}, ValueError, "alike"),
        (dict.fromkeys("qkv", meta(2, 3, 0, 64)), ValueError, "empty"),
        ({"k": meta(2, 3, 8, 64, dtype=torch.float32)}, TypeError, "alike"),
        ({"k": torch.empty(2, 3, 8, 64, dtype=torch.float16)}, ValueError, "are on"),
        ({"q": meta(2, 8, 3, 64).transpose(1, 2)}, ValueError, "contiguous"),
        ({"k": meta(2, 3, 1, 64).expand(2, 3, 8, 64)}, ValueError, "contiguous"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        ladder.attention(**{**dict.fromkeys("qkv", meta(2, 3, 8, 64)), "rung": "tiled", **change})


@pytest.mark.parametrize(
    ("name", "q", "error", "words"),
    [
        ("swizzle", meta(1, 1, 8, 64, dtype=torch.float32), TypeError, "not torch.float32"),
        ("naive", meta(1, 1, 8, 64, dtype=torch.float64), TypeError, "not torch.float64"),
        ("tiled", meta(1, 1, 8, 128), ValueError, "head dim"),
        ("pipeline", meta(1, 1, 8, 48), ValueError, "head dim"),
        ("naive", meta(1, 1, 20000, 64), ValueError, "20000"),
        ("tiled", meta(256, 256, 8, 64), ValueError, "65535"),
    ],
)
def test_what_a_kernel_refuses(name, q, error, words):
    with pytest.raises(error, match=words):
        ladder.check_for_kernel(RUNGS[name], q)


def test_older_gpus_run_the_rungs_without_tensor_cores(monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    device = torch.device("cuda", 7)
    reasons = {name: why_not.__wrapped__(device, rung.oldest) for name, rung in RUNGS.items()}
    refusal = "T4 has compute capability 7.5, the kernels need 8.0"
    assert reasons == dict.fromkeys(RUNGS, refusal) | {"naive": None, "tiled": None}
