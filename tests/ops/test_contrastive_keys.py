"""The walk over keys that have no gradient (a queue): its sums and gradient against fp64.

Features are small multiples of 1/8, so that similarities are exact and bf16 rounds the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.ops.test_contrastive_chunked import CASES, make_inputs, make_options
from vlpfast.ops import _contrastive_chunked, _contrastive_passes, contrastive_loss
from vlpfast.ops._contrastive_tiles import num_kept
from vlpfast.testing import assert_same, with_gradients

CPP = _contrastive_passes.passes_of("cpp")
BF16 = torch.bfloat16
SCALE, SMOOTHING, ALPHA = 3.0, 0.001, 0.4
# M, N, D: one of all; around a panel (64), a chunk (192) and a vector of columns (32); more chunks
# than tasks (32), whose segments then differ in size; more panels than tasks.
SHAPES = [
    (1, 1, 1), (63, 191, 31), (64, 192, 32), (65, 193, 33), (17, 33 * 192 + 5, 16), (2100, 400, 8),
]  # fmt: skip


def features(rows: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, (rows, width), generator=generator) / 8).to(dtype)


class Case(NamedTuple):
    query: Tensor
    teacher: Tensor | None
    keys: Tensor
    row_ids: Tensor | None
    key_ids: Tensor | None
    sims: Tensor | None

    def arguments(self) -> tuple[Tensor | None, ...]:
        return (*self[:3], torch.tensor(SCALE), *self[3:])


def make_case(
    M: int, N: int, D: int, dtype: torch.dtype, teacher: bool, ids: bool, keep: bool
) -> Case:
    return Case(
        features(M, D, 1, dtype),
        features(M, D, 2, dtype) if teacher else None,
        features(N, D, 3, dtype),
        # Also equal ones, and ids of which only the high or the low half agrees.
        torch.arange(M) % 50 + (1 << 40) if ids else None,
        torch.where(torch.arange(N) % 7 < 5, torch.arange(N) % 60 + (1 << 40), 7) if ids else None,
        torch.full((num_kept(M, N, 1 + teacher),), torch.nan, dtype=dtype) if keep else None,
    )


def run(case: Case, start: float = -torch.inf) -> dict[str, Tensor]:
    """Both walks, after sums that have seen one candidate with z = `start`, s = 0, if finite."""
    M, D = case.query.shape
    vector = lambda value=0.0: torch.full((M,), float(value))
    seen = float(start > -torch.inf)
    sums = {"max": vector(start), "sum": vector(seen), "positive": vector()}
    of_teacher = {"max_m": vector(start), "sum_m": vector(seen), "dot_m": vector()}
    out = sums | (of_teacher if case.teacher is not None else {})
    given = tuple(out.get(name) for name in ("max_m", "sum_m", "dot_m"))
    CPP.keys_stats(*case.arguments(), *sums.values(), *given)
    out |= {"dot": vector(), "grad": torch.zeros(M, D)}
    weight = torch.linspace(0.1, 0.5, M)
    CPP.keys_grad(
        *case.arguments(), sums["max"], sums["sum"], weight, SMOOTHING, *given[:2], ALPHA,
        out["dot"], out["grad"],
    )  # fmt: skip
    return out


def expected(case: Case, start: float = -torch.inf) -> dict[str, Tensor]:
    dtype, wide = case.query.dtype, lambda x: x.double()
    sims = (wide(case.query) @ wide(case.keys).T).to(dtype).double()
    positive = torch.zeros_like(sims, dtype=torch.bool)
    if case.row_ids is not None:
        positive = case.row_ids[:, None] == case.key_ids
    before = torch.full((sims.shape[0], 1), start, dtype=torch.float64)

    def softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top = torch.cat([before, z], 1).max(1).values
        e = (z - top[:, None]).exp()
        return top, e.sum(1) + (before[:, 0] - top).exp(), e

    top, total, e = softmax(SCALE * sims)
    out = {"max": top, "sum": total, "positive": (positive * sims).sum(1)}
    g = e / total[:, None] - SMOOTHING
    g -= positive * torch.linspace(0.1, 0.5, len(sims)).double()[:, None]
    if case.teacher is not None:
        sims_m = (wide(case.teacher) @ wide(case.keys).T).to(dtype).double()
        top, total, e = softmax(SCALE * sims_m)
        out |= {"max_m": top, "sum_m": total, "dot_m": (e * sims).sum(1)}
        g -= ALPHA * e / total[:, None]
    return out | {"dot": (g * sims).sum(1), "grad": g @ wide(case.keys), "size": g.abs()}


def check(case: Case, start: float = -torch.inf) -> None:
    actual, truth = run(case, start), expected(case, start)
    size, wide_keys = truth.pop("size"), case.keys.double().abs()
    assert actual.keys() == truth.keys()
    eps = torch.finfo(torch.float32).eps
    # Sums of terms of one sign lose some roundings; those of g, which cancel, that of their terms.
    terms = {"dot": size.sum(1), "grad": size @ wide_keys}
    for name, value in actual.items():
        band = 16 * eps * terms.get(name, 1 + truth[name].abs())
        if name == "grad" and case.query.dtype == BF16:
            # g is rounded for the product.
            band = band + torch.finfo(BF16).eps / 2 * terms[name]
        error = (value.double() - truth[name]).abs()
        assert (error <= band).all(), f"{name}: {(error - band).max()} over the band"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("ids", [False, True], ids=["no-ids", "ids"])
def test_matches_fp64(shape, dtype: torch.dtype, teacher: bool, ids: bool) -> None:
    check(make_case(*shape, dtype, teacher, ids, keep=True))


@pytest.mark.parametrize("start", [-2.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_goes_on_from_earlier_sums(dtype: torch.dtype, start: float) -> None:
    check(make_case(20, 400, 32, dtype, teacher=True, ids=True, keep=True), start)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
def test_kept_similarities_change_no_bit(dtype: torch.dtype, teacher: bool) -> None:
    options = {"dtype": dtype, "teacher": teacher, "ids": True}
    kept = run(make_case(70, 500, 40, keep=True, **options))
    assert_same(list(run(make_case(70, 500, 40, keep=False, **options)).values()),
                list(kept.values()))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    case, results = make_case(70, 7000, 32, dtype, True, True, True), []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(list(run(case).values()))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_unaligned_keys(dtype: torch.dtype) -> None:
    """Keys may begin anywhere in memory: pairs are then copied."""
    case = make_case(9, 300, 32, dtype, True, True, True)
    odd = torch.empty(300 * 32 + 1, dtype=dtype)[1:].view(300, 32).copy_(case.keys)
    assert_same(list(run(case._replace(keys=odd)).values()), list(run(case).values()))


def test_nan_reaches_the_sums() -> None:
    case = make_case(5, 300, 32, torch.float32, True, True, True)
    case.keys[250, 3] = torch.nan
    assert all(value.isnan().all() for name, value in run(case).items() if "max" not in name
               and name not in ("positive", "grad"))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["queue", "albef"])
def test_losses_walk(monkeypatch, name: str, dtype: torch.dtype) -> None:
    """The losses go this way, and find what they find tile by tile."""
    inputs, options = make_inputs(20, 32, dtype), make_options(CASES[name], 20, 32, dtype)
    calls = []
    spies = CPP._replace(
        keys_stats=lambda *x: (calls.append("stats"), CPP.keys_stats(*x)),
        keys_grad=lambda *x: (calls.append("grad"), CPP.keys_grad(*x)),
    )
    monkeypatch.setattr(_contrastive_passes, "_CPP", spies)
    loss = lambda *x: contrastive_loss(*x, impl="cpp", **options).loss
    walked, walked_grads = with_gradients(loss, inputs)
    assert sorted(calls) == ["grad", "grad", "stats", "stats"]
    monkeypatch.setattr(_contrastive_chunked, "walks_keys", lambda features: False)
    tiled, tiled_grads = with_gradients(loss, inputs)
    assert len(calls) == 4
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(walked, tiled)
    torch.testing.assert_close(walked_grads, tiled_grads, **tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(40, 8)}, r"keys must be \(., D\) as query is"),
        ({"keys": torch.zeros(40, 16, dtype=BF16)}, "keys must be Float, got BFloat16"),
        ({"keys": torch.zeros(16, 40).T}, "keys must be contiguous"),
        ({"teacher": torch.zeros(4, 16)}, "teacher must have query's shape"),
        ({"key_ids": None}, "row_ids and key_ids must be given together"),
        ({"key_ids": torch.zeros(39, dtype=torch.int64)}, "must have one element for each"),
        ({"sims": torch.zeros(7)}, "sims must have 1280 elements, got 7"),
    ],
)
def test_errors(change: dict[str, Tensor], message: str) -> None:
    case = make_case(5, 40, 16, torch.float32, True, True, True)
    with pytest.raises(RuntimeError, match=message):
        run(case._replace(**change))


def test_what_goes_together() -> None:
    case = make_case(5, 40, 16, torch.float32, False, True, True)
    vector = lambda: torch.ones(5)
    with pytest.raises(RuntimeError, match="teacher and its max, sum and dot"):
        CPP.keys_stats(*case.arguments(), *(vector() for _ in range(6)))
    with pytest.raises(RuntimeError, match="teacher, teacher_max and teacher_sum"):
        CPP.keys_grad(
            *case.arguments(), vector(), vector(), vector(), 0.0, vector(), None, 0.4, vector(),
            None,
        )  # fmt: skip
