"""Optimal transport of batches of small problems: word-region alignment by IPOT, and Sinkhorn.

Letters: M = sources (text tokens), N = targets (image tokens) of one problem. How they run is in
_transport_ipot.py and _transport_sinkhorn.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlpfast.ops._checks import check_devices
from vlpfast.ops._dispatch import Op
from vlpfast.ops._transport_checks import (
    check_cost,
    check_count,
    check_ipot,
    check_masses,
    check_positive,
    checked_features,
    checked_mask,
    checked_weights,
    computed,
)
from vlpfast.ops._transport_ipot import IPOT as _IPOT
from vlpfast.ops._transport_ipot import IPOT_FROM_COST as _IPOT_FROM_COST
from vlpfast.ops._transport_ipot import WRA as _WRA
from vlpfast.ops._transport_ipot import signed_sum
from vlpfast.ops._transport_sinkhorn import SINKHORN as _SINKHORN
from vlpfast.ops._transport_sinkhorn import ImplicitPlan


class TransportOutput(NamedTuple):
    """Result of `ipot`, `ipot_from_cost` and `sinkhorn`.

    Attributes:
        distance (B,): sum_ij C_ij plan_ij; differentiated with the plan held constant.
        value (B,): for `sinkhorn` the regularised objective, whose derivative in the cost is
            exactly the plan (envelope theorem); for IPOT the distance.
        plan (B, M, N): the transport plan if `return_plan`, else None. `sinkhorn`'s is
            differentiable, IPOT's a constant.
        f (B, M), g (B, N): potentials, plan_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), with
            uniform a, b and eps = beta / num_iters for IPOT; 0 where there is no mass. Constants.
        num_iters (B,): int64, iterations each problem took; 0 for one with an empty side.
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
    tol: float | None = None,
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

    A problem's result depends on its valid rows alone, to the bit: not on padding, on the rest of
    the batch or on the number of threads. A NaN or infinity in a valid row makes that problem NaN
    and no other.

    Args:
        x (B, M, D): features (UNITER: text), fp32/bf16/fp16/fp64 (fp64: reference only). Read in
            place whatever the strides of B and M.
        y (B, N, D): features (UNITER: image). x and y may be one packed tensor with two masks.
        x_mask (B, M): bool, True on valid rows, any pattern (UNITER's pads are the opposite).
        y_mask (B, N): the same for y. None: all valid.
        beta: step size, > 0; the smaller, the faster the plan sharpens per iteration.
        iters: proximal steps, >= 1.
        inner: scaling steps inside each, >= 1.
        tol: stop a problem after the first step in which no beta * log sigma_i moves by more than
            this, in units of cost. None: never, as UNITER.
        return_plan: also return the plan.
        impl: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        TransportOutput, fp32 (fp64 for fp64 inputs). A problem with an empty side has distance,
        plan and gradients 0.

    Source: Chen et al. 2020 (UNITER), sec. 3.2, arXiv:1909.11740, as in its code and ViLT's;
        Xie et al. 2018 (IPOT), alg. 1, arXiv:1802.04307.
    """
    x, y = checked_features("x", x, "y", y)
    x_mask = checked_mask("x_mask", x_mask, x.shape[:2], x.device)
    y_mask = checked_mask("y_mask", y_mask, y.shape[:2], x.device)
    check_ipot(beta, iters, inner, tol)
    run = _choose(_IPOT, impl, x, (*x.shape[:2], *y.shape[1:]))
    solved = run(x, y, x_mask, y_mask, beta, iters, inner, tol)
    return _ipot_output(solved, return_plan)


def ipot_from_cost(
    cost: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    iters: int = 50,
    inner: int = 1,
    tol: float | None = None,
    return_plan: bool = False,
    impl: str = "auto",
) -> TransportOutput:
    """`ipot` on a given cost: C of its formula is `cost`, and the gradient in it is the plan.

    Args:
        cost (B, M, N): finite on valid pairs, fp32/bf16/fp16/fp64 (fp64: reference only).
        x_mask (B, M): bool, True on valid rows. None: all.
        y_mask (B, N): bool, True on valid columns. None: all.
        beta, iters, inner, tol, return_plan, impl: see `ipot`.

    Returns:
        TransportOutput, fp32 (fp64 for fp64 cost).

    Source: Xie et al. 2018 (IPOT), alg. 1, arXiv:1802.04307, with uniform marginals.
    """
    check_cost(cost)
    x_mask = checked_mask("x_mask", x_mask, cost.shape[:2], cost.device)
    y_mask = checked_mask("y_mask", y_mask, cost.shape[::2], cost.device)
    check_ipot(beta, iters, inner, tol)
    cost = computed(cost)
    run = _choose(_IPOT_FROM_COST, impl, cost, cost.shape)
    solved = run(cost, x_mask, y_mask, beta, iters, inner, tol)
    return _ipot_output(solved, return_plan)


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
    dustbin: float | Tensor | None = None,
    f: Tensor | None = None,
    return_plan: bool = False,
    impl: str = "auto",
) -> TransportOutput:
    """Entropic optimal transport of a batch of problems, balanced or unbalanced, on potentials.

        min_P <C, P> + eps KL(P | a b^T) + tau_a KL(P 1 | a) + tau_b KL(P^T 1 | b)
        g_j = -w_b eps log sum_i a_i exp((f_i - C_ij) / eps),    w_b = tau_b / (tau_b + eps)
        f_i = -w_a eps log sum_j b_j exp((g_j - C_ij) / eps),    w_a = tau_a / (tau_a + eps)

    tau = None enforces the marginal (w = 1); KL(p | q) = sum p log(p / q) - p + q.
    `value` is the dual objective: equal to the minimum at convergence, below it before; its
    gradients in cost, a and b are taken at fixed potentials. The gradient of the plan is that of
    the converged plan (implicit differentiation, docs/ops.md): iterate until it is.

    Args:
        cost (B, M, N): finite, fp32/bf16/fp16/fp64 (fp64: reference only).
        a (B, M): weights >= 0 of the sources; 0 leaves one out (padding). None: 1 / M, or 1 with a
            dustbin.
        b (B, N): weights of the targets; balanced problems need sum(b) = sum(a), but for those with
            a dustbin. None: 1 / N, or 1 with a dustbin.
        eps: strength of the entropy, in units of cost, > 0.
        iters: at most that many iterations, >= 1.
        tol: stop a problem once no f_i moves by more than this, in units of cost. None: never. A
            problem's result does not depend on the others.
        tau_a: strength of the penalty on the marginal a (POT's reg_m), in units of cost.
        tau_b: the same for b.
        dustbin: cost of leaving a source or a target unmatched, a number or a 0-d tensor, which may
            require grad. Appends a source of weight sum(b) and a target of weight sum(a) with this
            cost to everything: plan, f and g are one longer, the last entries the dustbins'.
            SuperGlue's matching is cost = -scores, dustbin = -alpha, eps = 1.
        f (B, M): potential to start from, that of a similar problem say. None: 0. The first g
            follows from it. A constant.
        return_plan: also return the plan.
        impl: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        TransportOutput, fp32 (fp64 for fp64 cost). A problem whose a or b is all 0 gives 0.

    Source: Cuturi 2013, arXiv:1306.0895; unbalanced: Chizat et al. 2018, alg. 1-2, and
        Sejourne et al. 2019, arXiv:1910.12958; dustbin: Sarlin et al. 2020 (SuperGlue), sec. 3.2,
        arXiv:1911.11763. Entropy relative to a b^T, as POT's reg_type="kl".
    """
    check_cost(cost)
    cost = computed(cost)
    given = [x.dtype for x in (a, b) if x is not None]
    default = (1, 1) if dustbin is not None else [1 / max(1, n) for n in cost.shape[1:]]
    a = checked_weights("a", a, cost, 1, default[0])
    b = checked_weights("b", b, cost, 2, default[1])
    check_positive("eps", eps)
    check_count("iters", iters)
    for name, option in (("tol", tol), ("tau_a", tau_a), ("tau_b", tau_b)):
        if option is not None:
            check_positive(name, option)
    if given:
        coarsest = max(given, key=lambda dtype: torch.finfo(dtype).eps)
        balanced = tau_a is None and tau_b is None and dustbin is None
        check_masses(a, b, coarsest, balanced=balanced)
    if dustbin is not None:
        cost, a, b = _with_dustbin(cost, a, b, dustbin)
    if f is not None:
        f = checked_weights("f", f.detach(), cost, 1, 0)
    run = _choose(_SINKHORN, impl, cost, cost.shape)

    with torch.autocast(cost.device.type, enabled=False):
        distance, value, plan, f, g, num_iters = run(cost, a, b, f, eps, iters, tol, tau_a, tau_b)
        if return_plan:
            plan = ImplicitPlan.apply(cost, a, b, plan, eps, tau_a, tau_b)
    return TransportOutput(distance, value, plan if return_plan else None, f, g, num_iters)


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

    The gradients of the features are written in the forward, and none is computed for an input that
    does not require one.

    Args:
        text (B, M, D): text token features after fusion.
        image (B, N, D): image token features after fusion; text and image may be one packed tensor.
        text_mask (B, M): bool, True on tokens that take part, or None for all. UNITER keeps [CLS]
            and [SEP]; ViLT leaves them and the image's class token out: clear their bits.
        image_mask (B, N): the same for the image.
        matched (B,): bool, True where text and image belong together.
        beta, iters: see `ipot`.
        weight: UNITER's itm_ot_lambda.
        impl: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        scalar, fp32 (fp64 for fp64 inputs); 0 for an empty batch.

    Source: Chen et al. 2020 (UNITER), eq. 6, arXiv:1909.11740, as in its code, where unmatched
        pairs enter with a minus sign; Kim et al. 2021 (ViLT), arXiv:2102.03334.
    """
    text, image = checked_features("text", text, "image", image)
    text_mask = checked_mask("text_mask", text_mask, text.shape[:2], text.device)
    image_mask = checked_mask("image_mask", image_mask, image.shape[:2], text.device)
    if matched.dtype != torch.bool:
        raise TypeError(f"matched must be bool, got {matched.dtype}")
    if matched.shape != text.shape[:1]:
        raise ValueError(f"matched must be (B,) = ({text.shape[0]},), got {tuple(matched.shape)}")
    check_devices(text.device, matched=matched)
    check_ipot(beta, iters, 1, None)
    if text.dtype == torch.float16:
        # Gradients written in the forward would underflow before they meet a loss scale.
        distance = ipot(text, image, text_mask, image_mask, beta=beta, iters=iters, impl=impl)[0]
        return signed_sum(distance, matched) * (weight / max(1, matched.shape[0]))
    run = _choose(_WRA, impl, text, (*text.shape[:2], *image.shape[1:]))
    return run(text, image, text_mask, image_mask, matched.contiguous(), beta, iters, weight)


def _choose(op: Op, impl: str, like: Tensor, shape: tuple[int, ...]) -> Callable:
    """The implementation; where there is nothing to compute, the reference says so."""
    run = op.choose(impl, like.device, dtype=like.dtype, shape=tuple(shape))
    return op.implementations["reference"].run if 0 in shape else run


def _ipot_output(solved: tuple[Tensor, ...], return_plan: bool) -> TransportOutput:
    distance, plan, f, g, num_iters = solved
    return TransportOutput(distance, distance, plan if return_plan else None, f, g, num_iters)


def _with_dustbin(
    cost: Tensor, a: Tensor, b: Tensor, dustbin: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dustbin = torch.as_tensor(dustbin, dtype=cost.dtype, device=cost.device)
    if dustbin.dim() != 0:
        raise ValueError(f"dustbin must be a number or 0-d, got {tuple(dustbin.shape)}")
    B, M, N = cost.shape
    cost = torch.cat([cost, dustbin.expand(B, M, 1)], 2)
    cost = torch.cat([cost, dustbin.expand(B, 1, N + 1)], 1)
    sums = [weights.sum(1, keepdim=True) for weights in (b, a)]
    return cost, torch.cat([a, sums[0]], 1), torch.cat([b, sums[1]], 1)
