"""Eager optimal transport of a batch of small problems: IPOT as UNITER runs it, and Sinkhorn.

Letters: M = sources (text tokens), N = targets (image tokens) of one problem.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this the fp32 scaling form flushes entries of the plan to 0, from which none returns.
LOG_DOMAIN_BETA = 0.1
_NORM_EPS = 1e-5


class Solution(NamedTuple):
    """Plan (B, M, N), potentials f (B, M) and g (B, N), iterations done (B,) int64.

    plan_ij = a_i b_j exp((f_i + g_j - C_ij) / eps); f and g are 0 where there is no mass.
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    num_iters: Tensor


def cosine_cost(x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor) -> Tensor:
    """C_ij = 1 - cos(x_i, y_j) (B, M, N), 0 where either side is padding."""
    # Padding may hold anything, NaN included, and must send nothing back.
    x = F.normalize(x.masked_fill(~x_mask[..., None], 0), dim=-1, eps=_NORM_EPS)
    y = F.normalize(y.masked_fill(~y_mask[..., None], 0), dim=-1, eps=_NORM_EPS)
    valid = x_mask[:, :, None] & y_mask[:, None, :]
    return (1 - x @ y.mT).masked_fill(~valid, 0)


@torch.no_grad()
def ipot(
    cost: Tensor,
    x_mask: Tensor,
    y_mask: Tensor,
    *,
    beta: float,
    iters: int,
    inner: int,
    tol: float | None,
    in_logs: bool,
) -> Solution:
    """The inexact proximal point iteration with uniform marginals; eps = beta / iterations.

    On logarithms for costs of any size, or in the scaling form, which is UNITER's.
    """
    valid = x_mask[:, :, None] & y_mask[:, None, :]
    # A problem with an empty side has no valid pair, and rows or columns are then empty too.
    x_valid, y_valid = valid.any(2), valid.any(1)
    log_m = x_mask.sum(1, keepdim=True).clamp(min=1).to(cost.dtype).log()
    log_n = y_mask.sum(1, keepdim=True).clamp(min=1).to(cost.dtype).log()
    step = _log_step if in_logs else _scaling_step
    log_of = lambda v, on: (v if in_logs else v.log()).masked_fill(~on, 0)
    # Either all of these are logarithms or none is.
    kernel = (-cost / beta).masked_fill(~valid, -torch.inf)
    plan = torch.zeros_like(cost).masked_fill(~valid, -torch.inf)
    sigma = (-log_m).masked_fill(~x_valid, -torch.inf)
    if not in_logs:
        kernel, plan, sigma = kernel.exp(), plan.exp(), sigma.exp()
    sum_f, sum_g = cost.new_zeros(x_valid.shape), cost.new_zeros(y_valid.shape)
    num_iters = torch.zeros(cost.shape[0], dtype=torch.int64, device=cost.device)
    running = x_valid.any(1)
    for _ in range(iters):
        new_plan, new_sigma, delta = step(plan, kernel, sigma, valid, log_m, log_n, inner)
        moved = (log_of(new_sigma, x_valid) - log_of(sigma, x_valid)).abs() * beta
        sum_f = sum_f + log_of(new_sigma, x_valid) * running[:, None]
        sum_g = sum_g + log_of(delta, y_valid) * running[:, None]
        plan = torch.where(running[:, None, None], new_plan, plan)
        sigma = torch.where(running[:, None], new_sigma, sigma)
        num_iters = num_iters + running
        if tol is not None:
            running = running & ~(moved <= tol).all(1)
            if not running.any():
                break
    eps = beta / num_iters.clamp(min=1)[:, None].to(cost.dtype)
    f = (eps * (sum_f + log_m)).masked_fill(~x_valid, 0)
    g = (eps * (sum_g + log_n)).masked_fill(~y_valid, 0)
    return Solution(plan.exp() if in_logs else plan, f, g, num_iters)


def _scaling_step(
    plan: Tensor,
    kernel: Tensor,
    sigma: Tensor,
    valid: Tensor,
    log_m: Tensor,
    log_n: Tensor,
    inner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One proximal step: plan, sigma (B, M) and delta (B, N); 0 on padding."""
    q = kernel * plan
    for _ in range(inner):
        delta = 1 / (log_n.exp() * (q * sigma[:, :, None]).sum(1))
        delta = delta.masked_fill(~valid.any(1), 0)
        sigma = 1 / (log_m.exp() * (q * delta[:, None, :]).sum(2))
        sigma = sigma.masked_fill(~valid.any(2), 0)
    return sigma[:, :, None] * q * delta[:, None, :], sigma, delta


def _log_step(
    plan: Tensor,
    kernel: Tensor,
    sigma: Tensor,
    valid: Tensor,
    log_m: Tensor,
    log_n: Tensor,
    inner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, all on logarithms; -inf on padding."""
    q = kernel + plan
    for _ in range(inner):
        delta = -log_n - (q + sigma[:, :, None]).logsumexp(1)
        delta = delta.masked_fill(~valid.any(1), -torch.inf)
        sigma = -log_m - (q + delta[:, None, :]).logsumexp(2)
        sigma = sigma.masked_fill(~valid.any(2), -torch.inf)
    return sigma[:, :, None] + q + delta[:, None, :], sigma, delta


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f_init: Tensor | None = None,
    *,
    eps: float,
    iters: int,
    tol: float | None,
    tau_a: float | None,
    tau_b: float | None,
) -> Solution:
    """Sinkhorn on potentials, targets first; a problem stops alone once f moves less than `tol`."""
    active_a = (a > 0) & (b > 0).any(1, keepdim=True)
    active_b = (b > 0) & (a > 0).any(1, keepdim=True)
    log_a, log_b = a.log(), b.log()
    # tau / (tau + eps) relaxes a marginal; it tends to 1 as the penalty tau grows.
    damp_a = 1.0 if tau_a is None else tau_a / (tau_a + eps)
    damp_b = 1.0 if tau_b is None else tau_b / (tau_b + eps)
    f = torch.zeros_like(a) if f_init is None else f_init.masked_fill(~active_a, 0)
    g = torch.zeros_like(b)
    num_iters = a.new_zeros(a.shape[:1], dtype=torch.int64)
    running = active_a.any(1)
    for _ in range(iters):
        new_g = -damp_b * eps * ((f / eps + log_a)[:, :, None] - cost / eps).logsumexp(1)
        new_g = new_g.masked_fill(~active_b, 0)
        new_f = -damp_a * eps * ((new_g / eps + log_b)[:, None, :] - cost / eps).logsumexp(2)
        new_f = new_f.masked_fill(~active_a, 0)
        moved = (new_f - f).abs()
        f = torch.where(running[:, None], new_f, f)
        g = torch.where(running[:, None], new_g, g)
        num_iters = num_iters + running
        if tol is not None:
            running = running & ~(moved <= tol).all(1)
            if not running.any():
                break
    return Solution(_plan(cost, a, b, f, g, eps), f, g, num_iters)


def sinkhorn_value(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    *,
    eps: float,
    tau_a: float | None,
    tau_b: float | None,
) -> Tensor:
    """The dual objective (B,) at potentials f, g: its partial derivative in the cost is the plan.

    sum_i a_i phi(f_i; tau_a) + sum_j b_j phi(g_j; tau_b) - eps * (sum_ij plan_ij - sum_ij a_i b_j),
    phi(f; tau) = tau * (1 - exp(-f / tau)), and f itself for tau = None.
    """
    excess = _plan(cost, a, b, f, g, eps).sum((1, 2)) - a.sum(1) * b.sum(1)
    return (
        (a * marginal_term(f, tau_a)).sum(1) + (b * marginal_term(g, tau_b)).sum(1) - eps * excess
    )


def marginal_term(potential: Tensor, tau: float | None) -> Tensor:
    """phi of `sinkhorn_value`."""
    return potential if tau is None else -tau * torch.expm1(-potential / tau)


def _plan(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    mass = a[:, :, None] * b[:, None, :]
    exponent = (f[:, :, None] + g[:, None, :] - cost) / eps
    # Where there is no mass the exponent is arbitrary and may overflow.
    return mass * exponent.masked_fill(mass == 0, 0).exp()
