"""The codebook: moving averages by hand, its start, its restarts, and what a resumed run keeps."""

import math

import pytest
import torch
from torch.testing import assert_close

from tinyvgpt import codebook as module
from tinyvgpt.codebook import Codebook


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


def test_no_assignment_matrix_is_kept():
    """Nothing as large as (vectors, codes) is saved for the backward pass."""
    book, sizes = Codebook(256, 4), []
    z = torch.randn(1, 4, 4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
    ):
        out = book(z)
        (out.vectors.square().sum() + out.commitment_loss).backward()
    assert 0 < max(sizes) <= z.numel() < 1024 * 256


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
