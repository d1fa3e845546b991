"""Optimal transport of batches of small problems: word-region alignment by IPOT, and Sinkhorn.

Letters: M = sources (text tokens), N = targets (image tokens) of one problem.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlpfast.ops._dispatch import reference_only
from vlpfast.ops.reference import transport as reference

_IPOT = reference_only("ipot", reference.ipot)
_SINKHORN = reference_only("sinkhorn", reference.sinkhorn)


class TransportOutput(NamedTuple):
    """Result of `ipot` and `sinkhorn`. Gradients flow through `distance` and `value` only.

    Attributes:
        distance (B,): sum_ij C_ij plan_ij; differentiated with the plan held constant.
        value (B,): for `sinkhorn` the regularised objective, whose derivative in the cost is
            exactly the plan (envelope theorem); for `ipot` the distance.
        plan (B, M, N): the transport plan if `return_plan`, else None.
        f (B, M), g (B, N): potentials, plan_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), with
            uniform a, b and eps = beta / iters for `ipot`; 0 where there is no mass.
        num_iters (B,): int64, iterations each problem took.
    """

    distance: Tensor
    value: Tensor
    plan: Tensor | None
    f: Tensor
    g: Tensor
    num_iters: Tensor


def ipot(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    iters: int = 50,
    inner: int = 1,
    return_plan: bool = False,
    impl: str = "auto",
) -> TransportOutput:
    """Transport distance between two sets of features under cosine cost, by proximal point steps.

    Over the m valid rows of x and the n valid rows of y of one problem:

        C_ij = 1 - <x_i, y_j> / (max(|x_i|, 1e-5) max(|y_j|, 1e-5))
        A = exp(-C / beta);  T = 1;  sigma = 1 / m
        repeat iters:   Q = A * T
            repeat inner:   delta_j = 1 / (n sum_i Q_ij sigma_i)
                            sigma_i = 1 / (m sum_j Q_ij delta_j)
            T = sigma_i Q_ij delta_j                             sigma is kept between iterations
        distance = sum_ij C_ij T_ij

    This is UNITER's recurrence to its truncation: at 50 iterations the marginal of x is exact, that
    of y approximate, and the distance 1-2 % above the optimum. Below beta = 0.1 it runs on
    logarithms, since fp32 loses the plan there. The plan is a constant for the gradient.

    Args:
        x (B, M, D): features (UNITER: text), fp32/bf16/fp16/fp64.
        y (B, N, D): features (UNITER: image).
        x_mask (B, M): bool, True on valid rows, any pattern (UNITER's pads are the opposite).
        y_mask (B, N): the same for y. None: all valid.
        beta: step size, > 0; the smaller, the faster the plan sharpens per iteration.
        iters: proximal steps, >= 1.
        inner: scaling steps inside each, >= 1.
        return_plan: also return the plan.
        impl: "auto" or "reference".

    Returns:
        TransportOutput, fp32 (fp64 for fp64 inputs). A problem with an empty side has distance,
        plan and gradients 0.

    Source: Chen et al. 2020 (UNITER), sec. 3.2, arXiv:1909.11740, as in its code and ViLT's;
        Xie et al. 2018 (IPOT), alg. 1, arXiv:1802.04307.
    """
    for name, features in (("x", x), ("y", y)):
        if features.dim() != 3:
            raise ValueError(f"{name} must be 3-d (B, tokens, D), got {tuple(features.shape)}")
        if not features.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {features.dtype}")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"x and y must share B and D, got {tuple(x.shape)} and {tuple(y.shape)}")
    x_mask = _checked_mask("x_mask", x_mask, x)
    y_mask = _checked_mask("y_mask", y_mask, y)
    _check_positive("beta", beta)
    _check_count("iters", iters)
    _check_count("inner", inner)
    run = _IPOT.choose(impl, x.device, dtype=x.dtype, shape=(*x.shape[:2], *y.shape[1:]))

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        cost = reference.cosine_cost(x.to(dtype), y.to(dtype), x_mask, y_mask)
        solved = run(cost.detach(), x_mask, y_mask, beta=beta, iters=iters, inner=inner)
        distance = (cost * solved.plan).sum((1, 2))
    plan = solved.plan if return_plan else None
    return TransportOutput(distance, distance, plan, solved.f, solved.g, solved.num_iters)


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float,
    iters: int = 100,
    tol: float | None = None,
    tau_a: float | None = None,
    tau_b: float | None = None,
    return_plan: bool = False,
    impl: str = "auto",
) -> TransportOutput:
    """Entropic optimal transport of a batch of problems, balanced or unbalanced, on potentials.

        min_P <C, P> + eps KL(P | a b^T) + tau_a KL(P 1 | a) + tau_b KL(P^T 1 | b)
        g_j = -w_b eps log sum_i a_i exp((f_i - C_ij) / eps),    w_b = tau_b / (tau_b + eps)
        f_i = -w_a eps log sum_j b_j exp((g_j - C_ij) / eps),    w_a = tau_a / (tau_a + eps)

    tau = None enforces the marginal (w = 1); KL(p | q) = sum p log(p / q) - p + q.
    `value` is the dual objective: equal to the minimum at convergence, below it before; its
    gradients in cost, a and b are taken at fixed potentials.

    Args:
        cost (B, M, N): finite, fp32/bf16/fp16/fp64.
        a (B, M): weights >= 0 of the sources; 0 leaves one out (padding). None: 1 / M.
        b (B, N): weights of the targets; balanced problems need sum(b) = sum(a). None: 1 / N.
        eps: strength of the entropy, in units of cost, > 0.
        iters: at most that many iterations, >= 1.
        tol: stop a problem once no f_i moves by more than this, in units of cost. None: never. The
            host looks at it after each iteration; a problem's result does not depend on the others.
        tau_a: strength of the penalty on the marginal a (POT's reg_m), in units of cost.
        tau_b: the same for b.
        return_plan: also return the plan.
        impl: "auto" or "reference".

    Returns:
        TransportOutput, fp32 (fp64 for fp64 cost). A problem whose a or b is all 0 gives 0.

    Source: Cuturi 2013, arXiv:1306.0895; unbalanced: Chizat et al. 2018, alg. 1-2, and
        Sejourne et al. 2019, arXiv:1910.12958. Entropy relative to a b^T, as POT's reg_type="kl".
    """
    if cost.dim() != 3:
        raise ValueError(f"cost must be (B, M, N), got {tuple(cost.shape)}")
    if not cost.is_floating_point():
        raise TypeError(f"cost must be floating point, got {cost.dtype}")
    dtype = torch.float64 if cost.dtype == torch.float64 else torch.float32
    a = _checked_weights("a", a, cost, 1, dtype)
    b = _checked_weights("b", b, cost, 2, dtype)
    _check_positive("eps", eps)
    _check_count("iters", iters)
    for name, value in (("tol", tol), ("tau_a", tau_a), ("tau_b", tau_b)):
        if value is not None:
            _check_positive(name, value)
    run = _SINKHORN.choose(impl, cost.device, dtype=cost.dtype, shape=cost.shape)

    with torch.autocast(cost.device.type, enabled=False):
        cost = cost.to(dtype)
        problem = {"eps": eps, "tau_a": tau_a, "tau_b": tau_b}
        solved = run(cost.detach(), a.detach(), b.detach(), iters=iters, tol=tol, **problem)
        distance = (cost * solved.plan).sum((1, 2))
        value = reference.sinkhorn_value(cost, a, b, solved.f, solved.g, **problem)
    plan = solved.plan if return_plan else None
    return TransportOutput(distance, value, plan, solved.f, solved.g, solved.num_iters)


def wra_loss(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    matched: Tensor,
    *,
    beta: float = 0.5,
    iters: int = 50,
    weight: float = 0.1,
    impl: str = "auto",
) -> Tensor:
    """Word-region alignment: small transport distance for matched pairs, large for the others.

        loss = weight / B * (sum over matched d_b - sum over unmatched d_b),   d = ipot's distance

    Args:
        text (B, M, D): text token features after fusion.
        image (B, N, D): image token features after fusion.
        text_mask (B, M): bool, True on tokens that take part, or None for all. UNITER keeps [CLS]
            and [SEP]; ViLT leaves them and the image's class token out: clear their bits.
        image_mask (B, N): the same for the image.
        matched (B,): bool, True where text and image belong together.
        beta, iters: see `ipot`.
        weight: UNITER's itm_ot_lambda.
        impl: "auto" or "reference".

    Returns:
        scalar, fp32 (fp64 for fp64 inputs); 0 for an empty batch.

    Source: Chen et al. 2020 (UNITER), eq. 6, arXiv:1909.11740, as in its code, where unmatched
        pairs enter with a minus sign; Kim et al. 2021 (ViLT), arXiv:2102.03334.
    """
    if matched.dtype != torch.bool:
        raise TypeError(f"matched must be bool, got {matched.dtype}")
    if matched.shape != text.shape[:1]:
        raise ValueError(f"matched must be (B,) = ({text.shape[0]},), got {tuple(matched.shape)}")
    distance = ipot(text, image, text_mask, image_mask, beta=beta, iters=iters, impl=impl).distance
    signed = torch.where(matched, distance, -distance)
    return signed.sum() * (weight / max(1, matched.shape[0]))


def _checked_mask(name: str, mask: Tensor | None, features: Tensor) -> Tensor:
    """The mask, or one that is True everywhere."""
    if mask is None:
        return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = valid), got {mask.dtype}")
    if mask.shape != features.shape[:2]:
        raise ValueError(
            f"{name} must be (B, tokens) = {tuple(features.shape[:2])}, got {tuple(mask.shape)}"
        )
    return mask


def _checked_weights(
    name: str, weights: Tensor | None, cost: Tensor, dim: int, dtype: torch.dtype
) -> Tensor:
    """The weights, or uniform ones, in the dtype of the computation."""
    shape = (cost.shape[0], cost.shape[dim])
    if weights is None:
        return torch.full(shape, 1 / max(1, shape[1]), dtype=dtype, device=cost.device)
    if weights.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(weights.shape)}")
    return weights.to(dtype)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
