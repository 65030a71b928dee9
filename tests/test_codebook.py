"""The codebook: moving averages by hand, its start, its restarts, and what a resumed run keeps."""

import math

import pytest
import torch
from processes import run_processes
from torch.testing import assert_close

from tinyvgpt import codebook as module
from tinyvgpt.codebook import Codebook
from tinyvgpt.distributed import rank, world_size


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def as_video(rows):
    """Vectors (M, D) as encoder output (1, D, 1, 1, M)."""
    return torch.as_tensor(rows).float().T[None, :, None, None]


def example():
    """Two codes, 1 and 10, to which lately 4 and 2 vectors were assigned; decay 0.5."""
    book = Codebook(2, 1, decay=0.5)
    book.codes.copy_(torch.tensor([[1.0], [10.0]]))
    book.count.copy_(torch.tensor([4.0, 2.0]))
    book.total.copy_(torch.tensor([[4.0], [20.0]]))
    return book


def test_one_update_by_hand():
    book = example()
    out = book(as_video([[1.0], [3.0], [9.0]]))
    assert out.tokens.flatten().tolist() == [0, 0, 1]
    assert out.vectors.flatten().tolist() == [1, 1, 10]  # the codes from before the update
    assert_close(out.commitment_loss.item(), 0.25 * (0 + 4 + 1) / 3)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert_close(out.perplexity.item(), math.exp(entropy))
    assert out.used == 1
    assert_close(book.count, torch.tensor([(4 + 2) / 2, (2 + 1) / 2]))
    assert_close(book.total, torch.tensor([[(4 + 4) / 2], [(20 + 9) / 2]]))
    assert_close(book.codes, torch.tensor([[4 / 3], [14.5 / 1.5]]))


def test_evaluation_changes_nothing():
    book = example().eval()
    before = {name: value.clone() for name, value in book.state_dict().items()}
    book(as_video([[1.0], [3.0], [9.0]]))
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())


def test_gradients():
    """Straight through the codes to z, and from the commitment loss; none to the codes."""
    book = example().eval()
    z = as_video([[1.0], [3.0], [9.0]]).requires_grad_()
    out = book(z)
    g = torch.randn_like(z)
    assert_close(torch.autograd.grad(out.vectors, z, g, retain_graph=True)[0], g)
    (grad,) = torch.autograd.grad(out.commitment_loss, z)
    assert_close(grad.flatten(), 0.25 * 2 / 3 * torch.tensor([0.0, 2.0, -1.0]))
    assert not list(book.parameters())


def test_nearest_code_in_chunks(monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 7)
    book = Codebook(50, 8)
    z = torch.randn(2, 8, 3, 4, 5)
    rows = z.movedim(1, -1).reshape(-1, 8)
    nearest = (rows[:, None] - book.codes[None]).square().sum(-1).argmin(1)
    assert torch.equal(book.encode(z).flatten(), nearest)
    assert torch.equal(book.eval()(z).tokens.flatten(), nearest)
    assert torch.equal(book.lookup(book.encode(z)), book.codes[nearest].view(2, 3, 4, 5, 8))


def test_no_matrix_of_vectors_and_codes_is_kept():
    """What is saved for the backward pass is a few times z, whatever the number of codes."""
    book, saved = Codebook(256, 4), []
    z = torch.randn(1, 4, 4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.numel() * t.element_size()), t)[1], lambda t: t
    ):
        out = book(z)
        (out.vectors.square().sum() + out.commitment_loss).backward()
    size = z.numel() * z.element_size()
    assert size <= sum(saved) <= 4 * size < 1024 * 256 * 4


def test_first_batch_gives_the_codes():
    book = Codebook(20, 4, decay=1.0)  # no update to blur what initialisation does
    rows = torch.randn(100, 4)
    book(as_video(rows))
    source = (book.codes[:, None] == rows[None]).all(-1)  # (codes, rows)
    assert source.sum(1).tolist() == [1] * 20, "every code is one of the batch's vectors"
    assert source.sum(0).max() == 1, "no vector is taken twice"
    assert torch.equal(book.count, torch.ones(20))
    assert torch.equal(book.total, book.codes)


def test_first_batch_also_updates():
    book = Codebook(1, 1, decay=0.5)
    out = book(as_video([[0.0], [8.0]]))
    start = out.vectors[0, 0, 0, 0, 0]  # the first of the two vectors, or the second
    assert start in (0, 8)
    assert_close(book.count, torch.tensor([1.5]))
    assert_close(book.codes.squeeze(), (start / 2 + 8 / 2) / 1.5)


def test_first_batch_smaller_than_the_codebook():
    book = Codebook(899, 16, decay=1.0)
    rows = 10 * torch.randn(300, 16)
    book(as_video(rows))
    source = torch.cdist(book.codes, rows).argmin(1)
    times = source.bincount(minlength=300)  # of 3 · 300 tiled vectors all but one are taken
    assert times.min() == 2
    assert times.max() == 3
    noise = book.codes - rows[source]
    assert abs(noise.std() / (0.01 / 4) - 1) < 0.05
    assert noise.norm(dim=1).min() > 0, "every copy has noise"
    assert len(book.codes.unique(dim=0)) == 899


def batches(count, vectors=64):
    return [as_video(torch.randn(vectors, 4)) for _ in range(count)]


def test_resuming_does_not_redraw_the_codebook():
    book, stream = Codebook(16, 4), batches(6)
    for z in stream[:5]:
        book(z)
    state = {name: value.clone() for name, value in book.state_dict().items()}
    codes = state["codes"]

    def resumed(redraws):
        fresh = Codebook(16, 4)
        fresh.load_state_dict(state)
        if redraws:  # as in the original, whose flag is not part of the state
            fresh._initialise(stream[5].movedim(1, -1).reshape(-1, 4))
        torch.manual_seed(1)
        fresh(stream[5])
        return fresh.codes

    torch.manual_seed(1)
    book(stream[5])
    kept = lambda new: (new - codes).norm(dim=1) < 0.2  # noqa: E731
    assert torch.equal(resumed(redraws=False), book.codes)
    assert kept(resumed(redraws=False)).float().mean() > 0.5
    assert kept(resumed(redraws=True)).float().mean() < 0.2


def dying():
    """A codebook whose last code is about to be restarted, and a batch near the first three."""
    book = Codebook(4, 2)
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [500.0, 500.0]])
    book.codes.copy_(places)
    book.count.copy_(torch.tensor([50.0, 50.0, 50.0, 0.5]))
    book.total.copy_(places * book.count[:, None])
    return book, places[:3].repeat(40, 1) + torch.randn(120, 2)


def test_restarted_code_is_a_vector_of_the_batch():
    book, rows = dying()
    book(as_video(rows))
    assert (book.codes[3] == rows).all(1).any()
    assert book.count[:3].min() > 40, "codes in use stay as they are"
    assert_close(book.total[3] / book.count[3], book.codes[3])


@pytest.mark.parametrize("original", [False, True])
def test_restarted_code_survives_the_next_update(original):
    book, rows = dying()
    book(as_video(rows))
    restarted = book.codes[3].clone()
    if original:  # leaves count and sum as the update made them
        book.count[3], book.total[3] = 0.99 * 0.5, torch.full((2,), 0.99 * 0.5 * 500)
    elsewhere = rows[(rows - restarted).norm(dim=1) > 3]  # near other codes only
    nobody = book.encode(as_video(elsewhere)).ne(3).flatten()
    book(as_video(elsewhere[nobody]))
    survived = torch.allclose(book.codes[3], restarted, atol=1e-4)
    assert survived is not original


def test_codes_restarted_together_differ():
    book, rows = dying()
    book.count[1:] = 0.5
    book(as_video(rows))
    assert len(book.codes[1:].unique(dim=0)) == 3


def test_every_code_comes_into_use():
    """All vectors at first go to one code; restarts bring the others to where vectors are."""
    book = Codebook(32, 2)
    book.codes.copy_(torch.cat([torch.zeros(1, 2), torch.full((31, 2), 1e3)]))
    book.count.fill_(1.0)
    book.total.copy_(book.codes)
    for z in (as_video(torch.randn(512, 2)) for _ in range(3)):
        out = book(z)
    assert out.used > 0.9
    assert out.perplexity > 16


@pytest.mark.parametrize(("used", "of"), [(1, 8), (2, 8), (8, 8)])
def test_perplexity_and_share_in_use(used, of):
    book = Codebook(of, 1).eval()
    book.codes.copy_(torch.arange(of)[:, None].float())
    out = book(as_video([[float(i % used)] for i in range(24)]))
    assert_close(out.perplexity, torch.tensor(float(used)))
    assert_close(out.used.item(), used / of)


def test_autocast_leaves_it_in_float32():
    book = Codebook(64, 8)
    z = torch.randn(1, 8, 2, 8, 8)
    expected = book.encode(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.encode(z), expected)
        out = book.train()(z.bfloat16())
    assert out.vectors.dtype == out.commitment_loss.dtype == book.codes.dtype == torch.float32
    assert book.codes.isfinite().all()


def state_of(book):
    return {name: value.clone() for name, value in book.state_dict().items()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_batch_that_is_not_finite_moves_nothing(value):
    book, rows = dying()
    before = state_of(book)
    spoilt = rows.clone()
    spoilt[5:7] = value  # two of 3e38 are finite, their sum isn't
    book(as_video(spoilt))
    assert all(torch.equal(new, before[name]) for name, new in state_of(book).items())
    book(as_video(rows))
    assert not torch.equal(book.codes, before["codes"])
    assert all(new.isfinite().all() for new in state_of(book).values())


def test_a_first_batch_that_is_not_finite_initialises_nothing():
    book, rows = Codebook(8, 4), torch.randn(64, 4)
    spoilt = rows.clone()
    spoilt[:, 2] = math.nan
    before = state_of(book)
    book(as_video(spoilt))
    assert all(torch.equal(new, before[name]) for name, new in state_of(book).items())
    book.decay = 1.0
    book(as_video(rows))
    assert (book.codes[:, None] == rows[None]).all(-1).any(1).all()


def test_compiled_graphs_leave_it_out():
    """A compiled function around a codebook moves it as without compiling, itself uncompiled."""
    books, z, graphs = (Codebook(8, 4), Codebook(8, 4)), as_video(torch.randn(64, 4)), []
    books[1].load_state_dict(books[0].state_dict())

    def collect(graph, _):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(lambda x: books[1](2 * x).vectors + 1, backend=collect)
    for step in range(2):
        torch.manual_seed(step)
        expected = books[0](2 * z).vectors + 1
        torch.manual_seed(step)
        assert torch.equal(compiled(z), expected)
    assert torch.equal(books[0].codes, books[1].codes)
    assert len(graphs) == 2, "one before it, one after it"
    assert not any("argmin" in code for code in graphs)


def share(rows):
    """This process's part of (M, D) vectors; the halves differ in length."""
    if world_size() == 1:
        return as_video(rows)
    return as_video(rows[: len(rows) // 3] if rank() == 0 else rows[len(rows) // 3 :])


def settled():
    """A codebook none of whose codes dies soon, and batches for it."""
    book = Codebook(16, 4, decay=0.9)
    book.count.fill_(50.0)
    book.total.copy_(50 * book.codes)
    return book, [torch.randn(300, 4) for _ in range(4)]


def without_chance():
    """Some steps in which nothing is drawn: the state after each, and what each gave."""
    torch.manual_seed(0)
    book, stream = settled()
    steps = []
    for rows in stream:
        out = book(share(rows))
        steps.append((state_of(book), {n: v for n, v in out._asdict().items() if n != "vectors"}))
    return steps


def in_two_processes():
    """What each of two processes gets; their own random numbers differ."""
    found = {"settled": without_chance()}
    torch.manual_seed(rank())
    book = Codebook(16, 4)  # differs between them
    spoilt = torch.full((64, 4), math.nan) if rank() == 0 else torch.randn(64, 4)
    book(as_video(spoilt))
    found["spoilt at first"] = (book._initialised, state_of(book))
    first = torch.randn(64, 4)
    book(as_video(first))
    found["first"], found["start"] = first, state_of(book)
    found["restarts"] = []
    for number in range(4):
        book.count[number::4] = 0.5  # these die
        rows = torch.randn(64, 4)
        if number == 2 and rank() == 1:
            rows[7, 1] = math.inf
        book(as_video(rows))
        found["restarts"].append((rows, state_of(book)))
    book.eval()
    found["alone"] = book(as_video(first)).perplexity if rank() == 0 else None
    return found


@pytest.fixture(scope="module")
def processes():
    return run_processes(in_two_processes, 2)


def test_two_processes_move_it_as_one_with_the_whole_batch(processes):
    first, second = (found["settled"] for found in processes)
    for (state, out), (a, out_a), (b, out_b) in zip(without_chance(), first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in state)
        assert_close(a, state)
        tokens = torch.cat([out_a["tokens"], out_b["tokens"]], -1)
        assert torch.equal(tokens, out["tokens"])
        for name in ("perplexity", "used"):
            assert torch.equal(out_a[name], out_b[name])
            assert_close(out_a[name], out[name])
        losses = out_a["commitment_loss"] / 3 + out_b["commitment_loss"] * 2 / 3
        assert out_a["commitment_loss"] != out_b["commitment_loss"]
        assert_close(losses, out["commitment_loss"])


def same(states):
    first, second = states
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_two_processes_start_with_the_same_codes(processes):
    assert [found["spoilt at first"][0] for found in processes] == [False, False]
    assert same(found["spoilt at first"][1] for found in processes)
    assert processes[0]["spoilt at first"][1]["count"].sum() == 0
    assert same(found["start"] for found in processes)
    codes, rows = processes[0]["start"]["codes"], processes[0]["first"]
    assert torch.cdist(codes, rows).min(1).values.median() < 0.2, "near rank 0's vectors"


def test_two_processes_restart_the_same_codes(processes):
    before = processes[0]["start"]["codes"]
    for number in range(4):
        (rows, state), (_, other) = (found["restarts"][number] for found in processes)
        assert same((state, other))
        restarted = (state["codes"][:, None] == rows[None]).all(-1).any(1)
        spoilt = number == 2  # by rank 1
        assert restarted[number::4].all() != spoilt
        assert torch.equal(state["codes"], before) == spoilt
        before = state["codes"]


def test_evaluation_needs_no_other_process(processes):
    assert processes[0]["alone"] > 1
