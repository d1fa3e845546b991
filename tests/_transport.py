"""Problems and independent answers for the tests of transport."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlpfast.ops._dispatch import Op
from vlpfast.testing import routes


def routes_of(op: Op, *without: str) -> list:
    """`routes` of all implementations the op lists; what is missing is skipped with its reason."""
    params = routes(*(name for name in op.implementations if name not in without))
    for i, param in enumerate(params):
        reason = op.implementations[param.values[0]].missing()
        if reason is not None and not any(mark.name == "skip" for mark in param.marks):
            skip = pytest.mark.skip(reason=f"{param.values[0]}: {reason}")
            params[i] = pytest.param(*param.values, id=param.id, marks=[*param.marks, skip])
    return params


def skip_interpreted(impl: str, device: torch.device) -> None:
    """Triton's interpreter takes minutes for real sizes."""
    if impl == "triton" and device.type == "cpu":
        pytest.skip("too large for the interpreter")


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(
    dtype: torch.dtype = torch.float64, B: int = 4, M: int = 6, N: int = 9, D: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features that share prototypes, as tokens of one picture do, and masks with holes."""
    prototypes = make(4, D, seed=0)
    x = prototypes[torch.arange(B * M).reshape(B, M) % 4] + 0.5 * make(B, M, D, seed=1)
    y = prototypes[torch.arange(B * N).reshape(B, N) % 3] + 0.5 * make(B, N, D, seed=2)
    x_mask, y_mask = make(B, M, seed=3) > -0.8, make(B, N, seed=4) > -0.8
    x_mask[:, 0] = y_mask[:, N // 4] = True
    x_mask[B // 3] = y_mask[B // 3] = True
    return x.to(dtype), y.to(dtype), x_mask, y_mask


def uniter(
    x: Tensor, y: Tensor, beta: float = 0.5, iters: int = 50, inner: int = 1
) -> tuple[Tensor, Tensor]:
    """Distance and plan of one sample without padding, scalar by scalar over rows and columns."""
    n, m = len(x), len(y)
    C = torch.stack([torch.stack([1 - (u / u.norm()) @ (v / v.norm()) for v in y]) for u in x])
    A = (-C.detach() / beta).exp()
    T = torch.ones_like(A)
    sigma = torch.full((n,), 1 / n, dtype=A.dtype)
    for _ in range(iters):
        Q = A * T
        for _ in range(inner):
            delta = torch.stack([1 / (m * (Q[:, j] * sigma).sum()) for j in range(m)])
            sigma = torch.stack([1 / (n * (Q[i] * delta).sum()) for i in range(n)])
        T = torch.outer(sigma, delta) * Q
    return (C * T).sum(), T.detach()


def exact(
    x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor, beta: float, iters: int, inner: int = 1
) -> tuple[Tensor, Tensor]:
    """The same in fp64 for each sample of a batch, as matrices: distances (B,), plans (B, M, N).

    fp64 holds the scaling form down to beta = 0.005.
    """
    plans = x.new_zeros(*x.shape[:2], y.shape[1], dtype=torch.float64)
    distances = []
    for b in range(len(x)):
        u, v = x[b][x_mask[b]].double(), y[b][y_mask[b]].double()
        C = 1 - (u / u.norm(dim=1, keepdim=True)) @ (v / v.norm(dim=1, keepdim=True)).T
        m, n = C.shape
        A, T = (-C / beta).exp(), torch.ones_like(C)
        sigma = torch.full((m,), 1 / m, dtype=torch.float64)
        for _ in range(iters):
            Q = A * T
            for _ in range(inner):
                delta = 1 / (n * (sigma @ Q))
                sigma = 1 / (m * (Q @ delta))
            T = sigma[:, None] * Q * delta
        distances.append((C * T).sum())
        plans[b][x_mask[b][:, None] & y_mask[b]] = T.flatten()
    return torch.stack(distances), plans


def masses(seed: int, B: int = 3, M: int = 5, N: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """cost, a, b with sum(a) = sum(b) = 1."""
    weights = [make(B, n, seed=seed + n).softmax(1) for n in (M, N)]
    return make(B, M, N, seed=seed).abs(), *weights
