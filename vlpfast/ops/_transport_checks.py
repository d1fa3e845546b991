"""What the ops of transport ask of their arguments; a wrong one is named with what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlpfast.ops._checks import check_devices, check_integers

# Sums that differ by less are taken to differ by rounding.
_MASS_SLACK = 1e-3


def checked_features(x_name: str, x: Tensor, y_name: str, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype and contiguous in their last dimension."""
    for name, features in ((x_name, x), (y_name, y)):
        if features.dim() != 3:
            raise ValueError(f"{name} must be 3-d (B, tokens, D), got {tuple(features.shape)}")
        if not features.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {features.dtype}")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"{x_name} and {y_name} must share B and D, got {shapes}")
    if x.shape[2] == 0:
        raise ValueError(f"{x_name} and {y_name} must have D >= 1, got {tuple(x.shape)}")
    check_devices(x.device, **{y_name: y})
    if x.dtype != y.dtype:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    x, y = (f if f.stride(2) == 1 else f.contiguous() for f in (x, y))
    return x, y


def checked_mask(
    name: str, mask: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """The mask, contiguous; None stays None."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = valid), got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"{name} must be (B, tokens) = {tuple(shape)}, got {tuple(mask.shape)}")
    check_devices(device, **{name: mask})
    return mask.contiguous()


def check_cost(cost: Tensor) -> None:
    """A floating-point (B, M, N)."""
    if cost.dim() != 3:
        raise ValueError(f"cost must be (B, M, N), got {tuple(cost.shape)}")
    if not cost.is_floating_point():
        raise TypeError(f"cost must be floating point, got {cost.dtype}")


def computed(cost: Tensor) -> Tensor:
    """Contiguous and in the dtype of the computation."""
    return cost.to(torch.float64 if cost.dtype == torch.float64 else torch.float32).contiguous()


def checked_weights(
    name: str, weights: Tensor | None, cost: Tensor, dim: int, default: float
) -> Tensor:
    """The weights in the dtype of the computation, or `default` everywhere."""
    shape = (cost.shape[0], cost.shape[dim])
    if weights is None:
        return torch.full(shape, default, dtype=cost.dtype, device=cost.device)
    if weights.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(weights.shape)}")
    check_devices(cost.device, **{name: weights})
    return weights.to(cost.dtype).contiguous()


def check_masses(a: Tensor, b: Tensor, coarsest: torch.dtype, *, balanced: bool) -> None:
    """No negative weights; one sum on both sides of a balanced problem.

    On a CPU alone: of a GPU nobody waits for the answer. A problem with one side all 0 is no
    problem, and allowed.

    Args:
        a (B, M), b (B, N): as they are computed with.
        coarsest: dtype in which they were given, whose rounding their sums show.
        balanced: whether both marginals are enforced.
    """
    if a.device.type != "cpu" or torch.compiler.is_compiling():
        return
    a, b = a.detach(), b.detach()
    for name, weights in (("a", a), ("b", b)):
        if (weights < 0).any():
            raise ValueError(f"{name} must be >= 0, got {weights.min().item()}")
    if not balanced:
        return
    of_a, of_b = a.sum(1), b.sum(1)
    slack = max(_MASS_SLACK, 8 * torch.finfo(coarsest).eps)
    apart = ((of_a - of_b).abs() > slack * torch.maximum(of_a, of_b)) & (of_a > 0) & (of_b > 0)
    if apart.any():
        which = apart.nonzero()[0].item()
        sums = f"{of_a[which].item():.6g} and {of_b[which].item():.6g} in problem {which}"
        raise ValueError(
            f"a and b must have one sum where tau_a, tau_b and dustbin are None, got {sums}"
        )


def check_ipot(beta: float, iters: int, inner: int, tol: float | None) -> None:
    """The options of `ops.ipot`."""
    check_positive("beta", beta)
    check_count("iters", iters)
    check_count("inner", inner)
    if tol is not None:
        check_positive("tol", tol)


def check_positive(name: str, value: float) -> None:
    """Positive and finite."""
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    if value == math.inf:
        raise ValueError(f"{name} must be finite, got inf")


def check_count(name: str, value: int) -> None:
    """An int, at least 1."""
    check_integers(**{name: value})
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
