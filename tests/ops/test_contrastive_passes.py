"""The passes over one tile: registration, accuracy, strides, threads. Their sums are tested through
the losses.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlpfast.ops import _contrastive_autograd, _contrastive_passes, _contrastive_products
from vlpfast.ops._contrastive_tiles import num_kept
from vlpfast.testing import assert_same, opcheck

OPS = torch.ops.vlpfast
CPP = _contrastive_passes.passes_of("cpp")
# What C++ has: the fused look is for GPUs alone.
NAMES = [name for name in CPP._fields if getattr(CPP, name) is not None]
TILE_NAMES = [name for name in NAMES if not name.startswith("keys_")]
NONE = (None, None, None)


def vector(size: int, value: float = 0.0) -> Tensor:
    return torch.full((size,), value)


def tile(M: int, N: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(M, N, generator=generator) * 2 - 1).to(dtype)


def arguments(name: str, M: int = 5, N: int = 19, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of a pass with every optional one given."""
    sims, teacher, scale = tile(M, N, dtype), tile(M, N, dtype, 1), torch.tensor(7.0)
    ids = torch.arange(M) % 3, torch.arange(N) % 5
    pairs = (*ids, vector(M, 0.5), 2)
    low = lambda n: vector(n, -torch.inf)
    best = lambda n: (torch.full((n, 2), -torch.inf), torch.full((n, 2), -1))
    # 24: whole pairs and no whole vector.
    features = (tile(M, 24, dtype), tile(M, 24, dtype, 1), tile(N, 24, dtype, 2), scale, *ids)
    kept = torch.zeros(num_kept(M, N, 2), dtype=dtype)
    return {
        "stats": (sims, scale, *pairs, low(M), vector(M), vector(M), low(N), vector(N), vector(N)),
        "teacher": (sims, teacher, scale, *pairs[2:], low(M), vector(M), vector(M)),
        "grad": (
            sims, teacher, scale, *pairs, vector(M, 7.0), vector(M, 2.0), vector(N, 7.0),
            vector(N, 3.0), vector(M, 0.3), vector(N, 0.2), 0.01, vector(M, 7.0), vector(M, 2.0),
            0.4, vector(M),
        ),
        "sigmoid": (
            sims, teacher, scale, torch.tensor(-3.0), *pairs, 0.9, 0.1, 0.3, True, vector(M),
            vector(N), vector(M), vector(M),
        ),
        "negatives": (sims, scale, torch.tensor(3), 0, 0, 0, *ids, 0, *best(M), *best(N)),
        "keys_stats": (*features, kept, low(M), vector(M), vector(M), low(M), vector(M), vector(M)),
        "keys_grad": (
            *features, None, vector(M, 7.0), vector(M, 2.0), vector(M, 0.3), 0.01, vector(M, 7.0),
            vector(M, 2.0), 0.4, vector(M), torch.zeros(M, 24),
        ),
        "hinge": (sims, *ids, 0, vector(M, 0.1), vector(N, 0.2), 0.2, vector(M), vector(M),
                  vector(N)),
    }[name]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    opcheck(getattr(CPP, name), *arguments(name, dtype=dtype))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("wants", [(True, True, True), (False, True, False)])
def test_opcheck_of_the_losses(kind: str, wants: tuple[bool, ...]) -> None:
    image, text, scale = tile(5, 4), tile(5, 4, seed=1), torch.tensor(7.0)
    ids, key_ids = torch.arange(5) % 3, torch.arange(3)
    keys, teacher = (tile(3, 4, seed=2), tile(3, 4, seed=3)), (tile(5, 4), tile(5, 4, seed=4))
    opcheck(
        _contrastive_autograd._contrastive, image, text, scale, torch.tensor(-1.0), ids, *keys,
        key_ids, *teacher, torch.tensor(3), kind, 0.1, 0.4, 2, "cpp", list(wants),
    )  # fmt: skip
    for hardest in (False, True):
        opcheck(_contrastive_autograd._hinge, image, text, ids, 0.2, hardest, "cpp", wants[:2])
    opcheck(_contrastive_products._huge_pages, torch.empty(5000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TILE_NAMES)
def test_strided_tiles(name: str, dtype: torch.dtype) -> None:
    """A tile may be part of a wider matrix, of which nothing else is touched."""
    # 300: a whole strip and a part of one.
    plain, strided = arguments(name, 9, 300, dtype), arguments(name, 9, 300, dtype)
    wide = torch.full((9, 310), 77.0, dtype=dtype)
    wide[:, 4:304] = strided[0]
    strided = (wide[:, 4:304], *strided[1:])
    getattr(CPP, name)(*plain)
    getattr(CPP, name)(*strided)
    assert_same(strided, plain)
    assert (wide[:, :4] == 77).all()
    assert (wide[:, 304:] == 77).all()


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_matter(name: str) -> None:
    """Large enough for several threads: 260 rows of 1300 columns."""
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(arguments(name, 260, 1300))
            getattr(CPP, name)(*results[-1])
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])


def test_exponential_is_accurate() -> None:
    """The gradient pass without anything but exp(x): within 2 ulp on [-87, 0]."""
    x = torch.linspace(-87, 0, 30_001).reshape(1, -1)
    g, one, zero = x.clone(), torch.ones(()), vector(1)
    CPP.grad(
        g, None, one, *NONE, x.shape[1], zero, vector(1, 1.0), *NONE[:2], zero, None, 0.0,
        *NONE[:2], 0.0, vector(1),
    )  # fmt: skip
    truth = x.double().exp()
    ulp = torch.finfo(torch.float32).eps * truth
    assert ((g.double() - truth).abs() / ulp).max() < 2
    far = torch.tensor([[-1e30, -torch.inf, -88.0]])
    CPP.grad(
        far, None, one, *NONE, 3, zero, vector(1, 1.0), *NONE[:2], zero, None, 0.0,
        *NONE[:2], 0.0, vector(1),
    )  # fmt: skip
    assert (far < 2e-38).all()


def test_softplus_is_accurate() -> None:
    """One column a row, so that a row's loss is one softplus: relative error below 4e-7."""
    z = torch.linspace(-80, 80, 4001).reshape(-1, 1)
    loss, dot, grad, g = vector(4001), vector(4001), vector(4001), z.clone()
    one, nought = torch.ones(()), torch.zeros(())
    CPP.sigmoid(
        g, None, one, nought, *NONE, 1, 1.0, 0.0, 0.0, True, loss, None, dot, grad,
    )  # fmt: skip
    truth = torch.nn.functional.softplus(z.double(), threshold=1e9)[:, 0]
    # PyTorch's own softplus is log1p(exp(z)), which for z < -37 is exp(z) to the last digit.
    assert ((loss.double() - truth).abs() / truth).max() < 4e-7
    assert (g.double() - z.double().sigmoid()).abs().max() < 2e-7
    assert_same(grad, g[:, 0])


def test_bf16_rounds_to_nearest_even() -> None:
    """g = s * 0 + 1 - smoothing for values around ties of bf16."""
    values = 1 + torch.arange(64) * 2.0**-9
    for value in values.tolist():
        sims = torch.zeros(1, 17, dtype=torch.bfloat16)
        CPP.grad(
            sims, None, torch.ones(()), *NONE, 17, vector(1), vector(1, 1.0), *NONE[:2],
            vector(1), None, 1 - value, *NONE[:2], 0.0, vector(1),
        )  # fmt: skip
        assert (sims == torch.tensor(value).to(torch.bfloat16)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 19, dtype=torch.float16)}, "sims must be Float or BFloat16, got Half"),
        ({0: torch.zeros(19, 5).T}, "sims must have unit column stride"),
        ({2: None}, "row_ids and col_ids must be given together"),
        ({6: vector(4)}, "row_max must have 5 elements, got 4"),
        ({9: None}, "col_max, col_sum and col_pos must be given together"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    given = list(arguments("stats"))
    for place, value in change.items():
        given[place] = value
    with pytest.raises(RuntimeError, match=message):
        CPP.stats(*given)
