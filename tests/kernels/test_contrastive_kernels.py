"""The contrastive kernels one by one against eager fp64 maths, which is written out here."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from vlpfast.kernels import _contrastive, _contrastive_fused, contrastive
from vlpfast.ops import _contrastive_chunked
from vlpfast.ops.contrastive import contrastive_loss
from vlpfast.ops.reference import counter
from vlpfast.testing import assert_same, routes, with_gradients

ROUTES = routes("triton")
on_routes = pytest.mark.parametrize(("impl", "device"), ROUTES)
# One pair; primes; below, at and above a block of 8 x 256 (two of each at the last).
SHAPES = [(1, 1), (5, 13), (7, 255), (8, 256), (9, 257)]
CASES = [(*s, torch.float32) for s in SHAPES] + [(5, 13, torch.bfloat16), (9, 257, torch.bfloat16)]
on_cases = pytest.mark.parametrize(
    ("shape", "dtype"),
    [pytest.param((M, N), dtype, id=f"M{M}-N{N}-{str(dtype)[6:]}") for M, N, dtype in CASES],
)


class Tile:
    """A tile of similarities in a larger buffer, and what the passes are told of it."""

    def __init__(self, shape, device, dtype=torch.float32, scale=20.0, ids=True, offset=0, seed=0):
        M, N = shape
        g = torch.Generator().manual_seed(seed)
        rand = lambda *size: torch.rand(*size, generator=g) * 2 - 1
        self.buffer = rand(M, N + 3).to(device, dtype)
        self.sims = self.buffer[:, :N]
        self.teacher = rand(M, N + 5).to(device, dtype)[:, 5:]
        self.scale = torch.tensor(scale, device=device)
        self.bias = torch.tensor(-3.0, device=device)
        self.row_ids = torch.randint(0, 5, (M,), generator=g).to(device) if ids else None
        self.col_ids = torch.randint(0, 5, (N,), generator=g).to(device) if ids else None
        self.diag, self.offset = rand(M).to(device), offset
        self.ids = (self.row_ids, self.col_ids)

        self.on_diagonal = torch.arange(N) == torch.arange(M)[:, None] + offset
        self.on_diagonal = self.on_diagonal.to(device)
        self.positive = self.row_ids[:, None] == self.col_ids if ids else self.on_diagonal
        # Read here, before a pass overwrites it.
        self.s = torch.where(self.on_diagonal, self.diag[:, None].double(), self.sims.double())
        self.t = self.teacher.double()
        self.z, self.z_teacher = self.s * scale, self.t * scale

    def start(self, size: int, value: float = 0.0, count: int = 1) -> list[Tensor]:
        return [torch.full((size,), value, device=self.sims.device) for _ in range(count)]

    def assert_padding_untouched(self) -> None:
        fresh = torch.rand(self.buffer.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        N = self.sims.shape[1]
        assert_same(self.buffer[:, N:].cpu(), fresh.to(self.buffer.dtype)[:, N:])


def close(actual: Tensor, expected: Tensor, *, rtol: float = 2e-5, atol: float = 2e-5) -> None:
    """fp32 sums of a few hundred terms; the kernels' exp and log are exact to 2 ulp."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def run_stats(tile: Tile, with_cols: bool = True, diag: bool = True) -> list[Tensor]:
    M, N = tile.sims.shape
    rows = tile.start(M, -torch.inf) + tile.start(M, count=2)
    cols = tile.start(N, -torch.inf) + tile.start(N, count=2) if with_cols else [None] * 3
    contrastive.contrastive_stats(
        tile.sims, tile.scale, *tile.ids, tile.diag if diag else None, tile.offset, *rows, *cols
    )
    return rows + cols


def check_stats(tile: Tile, state: list[Tensor], exact_max: bool = True) -> None:
    kept = torch.where(tile.positive, tile.s, 0)
    for dim, (top, total, pos) in ((1, state[:3]), (0, state[3:])):
        if top is not None:
            if exact_max:
                close(top, tile.z.amax(dim))
            close(top.double() + total.double().log(), tile.z.logsumexp(dim))
            close(pos, kept.sum(dim))


@on_routes
@on_cases
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
def test_stats(impl, device, shape, dtype, ids):
    tile = Tile(shape, device, dtype, ids=ids, offset=shape[1] // 3)
    check_stats(tile, run_stats(tile))
    check_stats(tile, run_stats(tile, with_cols=False))
    tile.assert_padding_untouched()


@on_routes
@pytest.mark.parametrize("scale", [-30.0, 0.0, 1e4])
def test_stats_of_any_range(impl, device, scale):
    tile = Tile((9, 257), device, scale=scale)
    check_stats(tile, run_stats(tile))


@on_routes
def test_stats_by_long_walks(impl, device, monkeypatch):
    """A program that walks down many tiles, and takes a shorter walk at the end."""
    monkeypatch.setattr(_contrastive, "_MOST_ROWS", 32)
    monkeypatch.setattr(_contrastive, "_MANY_PROGRAMS", 1)
    for scale in (20.0, 1e4):
        tile = Tile((70, 20), device, scale=scale)
        check_stats(tile, run_stats(tile))


@on_routes
def test_stats_tile_after_tile(impl, device):
    """Four tiles merge to the statistics of the whole; the last one has no positive."""
    whole = Tile((20, 300), device, ids=False, offset=7)
    rows = [*whole.start(20, -torch.inf), *whole.start(20, count=2)]
    cols = [*whole.start(300, -torch.inf), *whole.start(300, count=2)]
    for i in (slice(0, 9), slice(9, 20)):
        for j in (slice(0, 100), slice(100, 300)):
            contrastive.contrastive_stats(
                whole.sims[i, j], whole.scale, None, None, whole.diag[i],
                whole.offset + i.start - j.start, *[x[i] for x in rows], *[x[j] for x in cols],
            )  # fmt: skip
    check_stats(whole, rows + cols)


@on_routes
def test_nan_reaches_the_sums(impl, device):
    tile = Tile((20, 40), device, ids=False, offset=40)
    tile.sims[3, 5] = torch.nan
    state = run_stats(tile, diag=False)
    for total, at in ((state[1], 3), (state[4], 5)):
        assert total.isnan().nonzero().flatten().tolist() == [at]


@on_routes
@on_cases
def test_teacher(impl, device, shape, dtype):
    tile = Tile(shape, device, dtype, offset=-2)
    M, N = shape
    top, total, dot = tile.start(M, -torch.inf) + tile.start(M, count=2)
    for j in (slice(0, N // 2), slice(N // 2, N)):
        if j.stop > j.start:
            contrastive.contrastive_teacher(
                tile.sims[:, j], tile.teacher[:, j], tile.scale, tile.diag,
                tile.offset - j.start, top, total, dot,
            )  # fmt: skip
    close(top.double() + total.double().log(), tile.z_teacher.logsumexp(1))
    close(dot / total, (tile.z_teacher.softmax(1) * tile.s).sum(1))


def low_precision(dtype: torch.dtype) -> dict[str, float]:
    """What storing a gradient in `dtype` costs: Triton's interpreter cuts bf16, a GPU rounds it."""
    return {"rtol": 2**-7, "atol": 1e-5} if dtype == torch.bfloat16 else {}


@on_routes
@on_cases
@pytest.mark.parametrize("sides", ["rows", "both", "teacher"])
def test_grad(impl, device, shape, dtype, sides):
    tile = Tile(shape, device, dtype, ids=sides != "both", offset=1)
    M, N = shape
    softmax = lambda z, dim: (
        z.max(dim).values.float(),
        (z - z.amax(dim, True)).exp().sum(dim).float(),
    )
    rows, cols, teacher = softmax(tile.z, 1), softmax(tile.z, 0), softmax(tile.z_teacher, 1)
    row_weight = torch.rand(M, device=device)
    col_weight = torch.rand(N, device=device)
    g = tile.z.softmax(1) - 1e-3
    weight = row_weight[:, None].double()
    if sides == "both":
        g = g + tile.z.softmax(0)
        weight = weight + col_weight
    else:
        cols, col_weight = (None, None), None
    if sides == "teacher":
        g = g - 0.4 * tile.z_teacher.softmax(1)
    else:
        teacher = (None, None)
    g = g - torch.where(tile.positive, weight, 0)
    row_dot = torch.ones(M, device=device)
    contrastive.contrastive_grad(
        tile.sims, tile.teacher if sides == "teacher" else None, tile.scale, *tile.ids, tile.diag,
        tile.offset, *rows, *cols, row_weight, col_weight, 1e-3, *teacher, 0.4, row_dot,
    )  # fmt: skip
    close(tile.sims, g, **low_precision(dtype))
    close(row_dot, 1 + (g * tile.s).sum(1), atol=1e-4)
    tile.assert_padding_untouched()


@on_routes
@on_cases
@pytest.mark.parametrize("full", [False, True], ids=["plain", "teacher"])
def test_sigmoid(impl, device, shape, dtype, full):
    tile = Tile(shape, device, dtype, ids=full, offset=1)
    M, N = shape
    z = tile.z - 3
    t = torch.where(tile.positive, 0.9, 0.1).double()
    if full:
        t = t + 0.4 * (tile.z_teacher - 3).sigmoid()
    loss, g = F.softplus(z) - t * z, z.sigmoid() - t
    row_loss, row_dot, row_grad, *rest = tile.start(M, 2.0, count=3) + tile.start(N, 2.0)
    contrastive.contrastive_sigmoid(
        tile.sims, tile.teacher if full else None, tile.scale, tile.bias, *tile.ids, tile.diag,
        tile.offset, 0.9, 0.1, 0.4, full, row_loss, None if full else rest[0], row_dot, row_grad,
    )  # fmt: skip
    close(row_loss, 2 + loss.sum(1))
    close(row_dot, 2 + (g * tile.s).sum(1), atol=1e-4)
    close(row_grad, 2 + g.sum(1), atol=1e-4)
    if full:
        close(tile.sims, g, **low_precision(dtype))
    else:
        close(rest[0], 2 + loss.sum(0))
        assert_same(tile.sims, Tile(shape, device, dtype, ids=full).sims)
    tile.assert_padding_untouched()


@on_routes
def test_sigmoid_of_far_logits(impl, device):
    """Small losses keep their relative precision; large ones do not overflow."""
    tile = Tile((3, 5), device, ids=False, offset=5)
    tile.sims.copy_(torch.tensor([[-90, -30, -15, -10, -5], [0, 1, 5, 30, 90], [0] * 5]) / 10)
    z = tile.sims.double() * 10
    tile.scale.fill_(10.0)
    tile.bias.fill_(0.0)
    row_loss, row_dot, row_grad, col_loss = tile.start(3, count=3) + tile.start(5)
    contrastive.contrastive_sigmoid(
        tile.sims, None, tile.scale, tile.bias, None, None, None, 5, 1.0, 0.0, 0.0, True,
        row_loss, col_loss, row_dot, row_grad,
    )  # fmt: skip
    close(row_loss, F.softplus(z).sum(1), rtol=1e-6, atol=0)
    close(tile.sims, z.sigmoid(), rtol=1e-6, atol=1e-38)


def eager_negatives(
    tile: Tile, seed: int | None, first_row: int, row_offset: int, side: int, k: int
) -> list[Tensor]:
    """Scores and indices of the k best of each row and column, -inf and -1 where none is left."""
    M, N = tile.sims.shape
    device = tile.sims.device
    rows, cols = torch.arange(M, device=device) + row_offset, torch.arange(N, device=device)
    results = []
    for ids, positions, z, positive, base in (
        (2 * (first_row + rows) + side, cols, tile.sims, tile.positive, 0),
        (2 * (first_row + cols) + 1 - side, rows, tile.sims.T, tile.positive.T, row_offset),
    ):
        score = tile.scale * z.float()
        if seed is not None:
            bits = counter.draw(counter.stream(seed, ids)[:, None], positions)
            u = ((bits >> 9).float() + 0.5) * 2.0**-23
            score = score - (-u.log()).log()
        score = score.masked_fill(positive, -torch.inf)
        best, index = score.sort(dim=1, descending=True, stable=True)
        index = torch.where(best == -torch.inf, -1, index + base)
        results += [F.pad(best, (0, k), value=-torch.inf)[:, :k], F.pad(index, (0, k), value=-1)]
        results[-1] = results[-1][:, :k]
    return results


def run_negatives(tile, seed, first_row, row_offset, side, k, with_cols=True, chunks=1):
    M, N = tile.sims.shape
    device = tile.sims.device
    seed = None if seed is None else torch.tensor(seed, device=device)
    state = [
        torch.full((size, k), value, device=device) for size in (M, N) for value in (-torch.inf, -1)
    ]
    starts = torch.arange(M).chunk(chunks)
    for i in (slice(int(c[0]), int(c[-1]) + 1) for c in starts):
        ids = (None, None) if tile.row_ids is None else (tile.row_ids[i], tile.col_ids)
        contrastive.contrastive_negatives(
            tile.sims[i], tile.scale, seed, first_row, row_offset + i.start, side, *ids,
            tile.offset + i.start, state[0][i], state[1][i],
            *(state[2:] if with_cols else (None, None)),
        )  # fmt: skip
    return state


@on_routes
@on_cases
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
def test_negatives(impl, device, shape, dtype, ids):
    tile = Tile(shape, device, dtype, ids=ids, offset=1)
    k = 2 if shape[1] < 20 else 1
    numbers = (-(2**40) - 3, 1000, 5, 1)
    actual = run_negatives(tile, *numbers, k)
    for a, e in zip(actual, eager_negatives(tile, *numbers, k), strict=True):
        (assert_same if a.dtype == torch.int64 else close)(a, e)
    only_rows = run_negatives(tile, *numbers, k, with_cols=False)
    assert_same(only_rows[:2], actual[:2])


@on_routes
@pytest.mark.parametrize("k", [1, 2])
def test_negatives_tile_after_tile(impl, device, k):
    tile = Tile((9, 30), device)
    whole = run_negatives(tile, 9, 0, 0, 0, k)
    assert_same(run_negatives(tile, 9, 0, 0, 0, k, chunks=2), whole)


@on_routes
def test_negatives_without_noise_prefer_the_lower_index(impl, device):
    tile = Tile((9, 40), device)
    tile.sims.copy_((tile.sims * 3).round())
    assert_same(run_negatives(tile, None, 0, 0, 0, 3), eager_negatives(tile, None, 0, 0, 0, 3))


@on_routes
def test_negatives_where_none_is_left(impl, device):
    tile = Tile((20, 40), device)
    tile.row_ids.fill_(7)
    tile.col_ids.fill_(7)
    best, index, col_best, col_index = run_negatives(tile, 1, 0, 0, 0, 2)
    assert (index == -1).all()
    assert (col_index == -1).all()
    assert (best == -torch.inf).all()
    assert (col_best == -torch.inf).all()


@on_routes
@on_cases
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
def test_hinge(impl, device, shape, dtype, ids):
    tile = Tile(shape, device, dtype, ids=ids, offset=2)
    M, N = shape
    s = tile.sims.double()
    row_pair, col_pair = torch.rand(M, device=device), torch.rand(N, device=device)
    a = (0.2 + s - row_pair[:, None]).clamp(min=0).masked_fill(tile.positive, 0)
    b = (0.2 + s - col_pair).clamp(min=0).masked_fill(tile.positive, 0)
    row_loss, row_count, col_count = tile.start(M, 1.0, count=2) + tile.start(N, 1.0)
    contrastive.contrastive_hinge(
        tile.sims, *tile.ids, tile.offset, row_pair, col_pair, 0.2, row_loss, row_count, col_count
    )
    close(row_loss, 1 + (a + b).sum(1))
    assert_same(row_count, 1 + (a > 0).sum(1).float())
    assert_same(col_count, 1 + (b > 0).sum(0).float())
    assert_same(tile.sims.float(), (a > 0).float() + (b > 0).float())
    tile.assert_padding_untouched()


@on_routes
def test_repeat_is_bit_equal(impl, device):
    make = functools.partial(Tile, (9, 30), device)
    assert_same(run_stats(make()), run_stats(make()))
    assert_same(run_negatives(make(), 3, 0, 0, 0, 1), run_negatives(make(), 3, 0, 0, 0, 1))


# (M, N, D): one pair; below and at a block of 16; three blocks with ends; D odd and even blocks.
FUSED_SHAPES = [(1, 1, 5), (15, 17, 13), (16, 16, 16), (33, 47, 32)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Interpreted tiles of 16, and programs that own several of them."""
    if not torch.cuda.is_available():
        blocks = _contrastive_fused.Blocks(16, 16, 16, 4, 2)
        monkeypatch.setattr(_contrastive_fused, "blocks_for", lambda *_, **__: blocks)
    monkeypatch.setattr(_contrastive_fused, "_GROUPS", 2)
    monkeypatch.setattr(_contrastive_fused, "_MANY_PROGRAMS", 1)


def fused_problem(shape, device, scale=20.0, ids=True, offset=0) -> tuple[Tile, Tensor, Tensor]:
    """Features, and the tile of their similarities."""
    M, N, D = shape
    tile = Tile((M, N), device, scale=scale, ids=ids, offset=offset)
    generator = torch.Generator().manual_seed(1)
    x, y = (
        F.normalize(torch.randn(size, D + 1, generator=generator), dim=1).to(device)[:, :D]
        for size in (M, N)
    )
    tile.sims.copy_(x @ y.T)
    tile.s = x.double() @ y.double().T
    tile.z = tile.s * scale
    return tile, x, y


def run_fused(tile, x, y, with_cols=True, **draws) -> list[Tensor]:
    M, N = tile.sims.shape
    rows = tile.start(M, -torch.inf) + tile.start(M, count=2)
    cols = tile.start(N, -torch.inf) + tile.start(N, count=2) if with_cols else [None] * 3
    contrastive.contrastive_fused_stats(
        x, y, tile.scale, *tile.ids, tile.offset, *rows, *cols, **draws
    )
    return rows + cols


@on_routes
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=lambda s: "M{}-N{}-D{}".format(*s))
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
def test_fused_stats(impl, device, small_blocks, shape, ids):
    problem = fused_problem(shape, device, ids=ids, offset=-shape[1] // 3)
    check_stats(problem[0], run_fused(*problem), exact_max=False)
    check_stats(problem[0], run_fused(*problem, with_cols=False), exact_max=False)


@on_routes
@pytest.mark.parametrize("scale", [-30.0, 1e4])
def test_fused_stats_of_any_range(impl, device, small_blocks, scale):
    """At 1e4 one exponential no longer serves rows and columns."""
    problem = fused_problem((33, 47, 16), device, scale=scale)
    check_stats(problem[0], run_fused(*problem), exact_max=False)


@on_routes
@pytest.mark.parametrize("with_cols", [False, True], ids=["rows", "both"])
def test_fused_negatives_are_those_of_the_pass(impl, device, small_blocks, with_cols):
    """This rank's columns are 10 to 39 of 47."""
    tile, x, y = fused_problem((33, 47, 16), device, offset=10)
    own = slice(10, 40)
    state = [
        torch.full((size, 1), value, device=device)
        for size in (33, 47)
        for value in (-torch.inf, -1)
    ]
    expected = [state[0].clone(), state[1].clone(), state[2][own].clone(), state[3][own].clone()]
    names = ["row_best", "row_index", "col_best", "col_index"]
    seed = torch.tensor(5, device=device)
    run_fused(
        tile, x, y, with_cols=with_cols, seed=seed, first_row=10, row_offset=3, first_col=10,
        num_local=30, side=1, **dict(zip(names[: 2 + 2 * with_cols], state, strict=False)),
    )  # fmt: skip
    contrastive.contrastive_negatives(
        tile.sims[:, own], tile.scale, seed, 10, 3, 1, tile.row_ids, tile.col_ids[own], 0, *expected
    )
    assert_same(state[1], expected[1])
    close(state[0], expected[0])
    if with_cols:
        assert_same(state[3][own], expected[3])
        close(state[2][own], expected[2])
        assert (state[3][:10] == -1).all()
        assert (state[3][40:] == -1).all()


@on_routes
def test_fused_draws_one_negative(impl, device):
    tile, x, y = fused_problem((3, 3, 4), device)
    two = torch.zeros(3, 2, device=device)
    with pytest.raises(NotImplementedError, match="draw one negative, got k=2"):
        run_fused(tile, x, y, seed=torch.tensor(0, device=device), row_best=two, row_index=two)


@on_routes
@pytest.mark.parametrize("name", ["plain", "ids-draws", "queue"])
def test_the_driver_looks_fused(impl, device, monkeypatch, small_blocks, name):
    """In fp32, as the interpreter must; the driver itself looks so at bf16 and fp16 features."""
    calls = []
    kernel = contrastive.contrastive_fused_stats
    spy = lambda *args, **draws: (calls.append(len(draws)), kernel(*args, **draws))
    monkeypatch.setattr(contrastive, "contrastive_fused_stats", spy)
    monkeypatch.setattr(_contrastive_chunked, "_FUSED_DTYPES", (torch.float32,))
    monkeypatch.setattr(_contrastive_chunked, "_KEEP_BYTES", {"cpu": 0, "cuda": 0})
    _, image, text = fused_problem((19, 19, 16), device)
    options = {}
    if name == "ids-draws":
        ids = torch.arange(19, device=device) // 2
        options = {"ids": ids, "hard_negatives": 1, "seed": 3, "label_smoothing": 0.1}
    if name == "queue":
        options = {"image_keys": text[:5] + 0.1, "text_keys": image[:5] - 0.1}
    scale = torch.tensor(12.0, device=device)
    results = [
        with_gradients(
            lambda *x, impl=impl: contrastive_loss(*x, impl=impl, **options), [image, text, scale]
        )
        for impl in (impl, "reference")
    ]
    assert calls == {"plain": [0], "ids-draws": [8], "queue": [0, 0, 0]}[name]
    (outputs, grads), (expected, expected_grads) = results
    for actual, e in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
        (assert_same if e.dtype == torch.int64 else close)(actual, e)
