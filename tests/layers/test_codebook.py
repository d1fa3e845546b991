"""The codebook by loops: nearest codes, gradients, moving averages, codes that are revived."""

import pytest
import torch
import torch.nn.functional as F

from vlpfast.layers import codebook as module
from vlpfast.layers.codebook import Codebook, KMeans, sums_by_code


def make(size: int = 6, dim: int = 3, *, decay: float = 0.8, revive_below: float = 0.0) -> Codebook:
    torch.manual_seed(0)
    return Codebook(size, dim, decay=decay, revive_below=revive_below)


def started(**options: object) -> Codebook:
    """After its first step, whose inputs its codes are."""
    book = make(**options)
    book(torch.randn(20, 3))
    book.update(5, None)
    return book


@pytest.mark.parametrize(("n", "size"), [(0, 4), (1, 1), (7, 5), (64, 3)])
def test_sums_by_loops(n, size):
    torch.manual_seed(0)
    z, codes = torch.randn(n, 2), torch.randint(0, size, (n,))
    sums, counts = sums_by_code(z, codes, size)
    for code in range(size):
        torch.testing.assert_close(sums[code], z[codes == code].sum(0))
        assert counts[code] == (codes == code).sum()


def test_nearest_codes_and_gradients(monkeypatch):
    monkeypatch.setattr(module, "_MOST_SIMILARITIES", 20)
    book = started()
    z = torch.randn(11, 3, requires_grad=True)
    out = book(z)
    unit = z / z.norm(dim=1, keepdim=True)
    distance = torch.cdist(unit, book.vectors)
    assert out.codes.equal(distance.argmin(1))
    assert out.codes.equal(book.codes(7 * z))
    torch.testing.assert_close(out.vectors, book.vectors[out.codes])
    torch.testing.assert_close(
        out.commitment, F.mse_loss(unit, book.vectors[out.codes], reduction="sum") / 3
    )
    grad = torch.randn(11, 3)
    # Straight through: the gradient of the codes' vectors is that of the unit inputs.
    ours = torch.autograd.grad((out.vectors * grad).sum(), z, retain_graph=True)
    theirs = torch.autograd.grad((unit * grad).sum(), z)
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.grad(out.commitment, z)[0].abs().max() > 0
    assert list(book.parameters()) == []


def test_the_first_step_begins_with_its_inputs():
    book = make(size=40)
    z = torch.randn(9, 3)
    before = book.vectors.clone()
    book(z)
    assert book.vectors.equal(before)
    book.update(5, None)
    nearest = torch.cdist(book.vectors, F.normalize(z, dim=1)).min(1)
    assert nearest.values.max() < 1e-6
    assert len(nearest.indices.unique()) > 5
    torch.testing.assert_close(book.shares, torch.full((40,), 1 / 40))


def test_averages_by_loops():
    book = started()
    before, shares = book.vectors.clone(), book.shares.clone()
    parts = [torch.randn(4, 3), torch.randn(5, 3)]
    codes = torch.cat([book(part).codes for part in parts])
    book.update(5, None)
    z = F.normalize(torch.cat(parts), dim=1)
    for code in range(6):
        mine = z[codes == code]
        expected = before[code]
        if len(mine):
            mean = mine.mean(0)
            expected = 0.8 * before[code] + 0.2 * mean / mean.norm()
        torch.testing.assert_close(book.vectors[code], expected / expected.norm())
        torch.testing.assert_close(book.shares[code], 0.8 * shares[code] + 0.2 * len(mine) / 9)
    torch.testing.assert_close(book.in_use, torch.tensor(len(codes.unique()) / 6))
    # Nothing was quantized since: nothing moves.
    moved = book.vectors.clone()
    book.update(5, None)
    assert book.vectors.equal(moved)


def test_unused_codes_are_revived():
    book = started(revive_below=0.5)
    far = -book.vectors.sum(0)
    book.vectors[2] = far / far.norm()
    # One direction: the others lose their inputs, within a few steps their share too.
    z = book.vectors[0] + 0.3 * torch.randn(50, 3)
    revived = 0
    for _ in range(10):
        book(z)
        book.update(5, None)
        moved = book.shares == torch.tensor(1 / 6)
        revived += int(moved.sum())
        distances = (book.vectors[moved, None] - F.normalize(z, dim=1)).abs().amax(2)
        assert (distances.amin(1) < 1e-6).all()
    assert revived > 2
    codes = book.codes(z)
    assert len(codes.unique()) >= 5
    kept = started(revive_below=0.0)
    vectors = kept.vectors.clone()
    for _ in range(10):
        kept(z)
        kept.update(5, None)
    unused = kept.shares < 1.01 * 0.8**10 / 6
    assert unused.any()
    assert kept.vectors[unused].equal(vectors[unused])


def test_evaluation_remembers_nothing_and_state_is_kept():
    book = started().eval()
    before = book.vectors.clone()
    book(torch.randn(5, 3))
    book.update(5, None)
    assert book.vectors.equal(before)
    other = make()
    other.load_state_dict(book.state_dict())
    assert other.steps == 1


def test_full_precision_under_autocast():
    book = make(size=200)
    z = book.vectors.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert book.codes(z).equal(torch.arange(200))


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_centres_by_loops(decay, monkeypatch):
    """Each input draws its centre by 1 / (inputs it has had): Sculley's steps, one by one."""
    monkeypatch.setattr(module, "_MOST_SIMILARITIES", 20)
    torch.manual_seed(0)
    book = KMeans(4, 3, decay=decay, revive_below=0.0).double()
    book.steps += 1
    centres, had = book.vectors.clone(), [0.0] * 4
    for number in range(4):
        z = 2 * torch.randn(9, 3).double() + number
        out = book(z)
        distance = torch.cdist(z, centres).square()
        assert out.codes.tolist() == distance.argmin(1).tolist()
        assert out.vectors.equal(book.vectors[out.codes])
        torch.testing.assert_close(out.commitment, distance.min(1).values.sum())
        had = [decay * n for n in had]
        for row, code in zip(z, out.codes.tolist(), strict=True):
            had[code] += 1
            centres[code] += (row - centres[code]) / had[code]
        book.update(number, None)
        torch.testing.assert_close(book.vectors, centres)
        torch.testing.assert_close(book.counts, torch.tensor(had).double())


def test_centres_find_clusters():
    """Of five clusters far apart each has some of twenty centres, which all lie in one."""
    torch.manual_seed(0)
    true = 20 * torch.randn(5, 6)
    book = KMeans(20, 6, decay=1.0, revive_below=0.1)
    for number in range(40):
        labels = torch.randint(0, 5, (64,))
        book(true[labels] + torch.randn(64, 6))
        book.update(number, None)
    distance = torch.cdist(true, book.vectors)
    assert distance.min(1).values.max() < 2.5
    assert distance.min(0).values.max() < 4.0
    # Nearer than one centre a cluster could be: 6 is the variance of an input.
    z = true[torch.arange(5).repeat(40)] + torch.randn(200, 6)
    assert book.eval()(z).commitment / 200 < 6


def test_centres_learn_in_training_alone():
    book = KMeans(3, 2, decay=1.0, revive_below=0.0).eval()
    before = book.vectors.clone()
    out = book(torch.randn(5, 2, requires_grad=True))
    book.update(0, None)
    assert book.vectors.equal(before)
    assert not out.commitment.requires_grad
