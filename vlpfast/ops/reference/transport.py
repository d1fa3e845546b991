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
    cost: Tensor, x_mask: Tensor, y_mask: Tensor, *, beta: float, iters: int, inner: int
) -> Solution:
    """The inexact proximal point iteration with uniform marginals; eps = beta / iters."""
    valid = x_mask[:, :, None] & y_mask[:, None, :]
    # A problem with an empty side has no valid pair, and rows or columns are then empty too.
    x_valid, y_valid = valid.any(2), valid.any(1)
    log_m = x_mask.sum(1, keepdim=True).clamp(min=1).to(cost.dtype).log()
    log_n = y_mask.sum(1, keepdim=True).clamp(min=1).to(cost.dtype).log()
    solve = _ipot_log if beta < LOG_DOMAIN_BETA else _ipot_scaling
    plan, log_sigma, log_delta = solve(cost, valid, log_m, log_n, beta, iters, inner)
    eps = beta / iters
    f = (eps * (log_sigma + log_m)).masked_fill(~x_valid, 0)
    g = (eps * (log_delta + log_n)).masked_fill(~y_valid, 0)
    return Solution(plan, f, g, x_mask.new_full(x_mask.shape[:1], iters, dtype=torch.int64))


def _ipot_scaling(
    cost: Tensor, valid: Tensor, log_m: Tensor, log_n: Tensor, beta: float, iters: int, inner: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan and the summed logarithms of sigma (B, M) and delta (B, N)."""
    x_valid, y_valid = valid.any(2), valid.any(1)
    kernel = (-cost / beta).exp() * valid
    plan = valid.to(cost.dtype)
    sigma = (-log_m).exp() * x_valid
    log_sigma, log_delta = torch.zeros_like(sigma), cost.new_zeros(y_valid.shape)
    for _ in range(iters):
        q = kernel * plan
        for _ in range(inner):
            delta = 1 / (log_n.exp() * (q * sigma[:, :, None]).sum(1))
            delta = delta.masked_fill(~y_valid, 0)
            sigma = 1 / (log_m.exp() * (q * delta[:, None, :]).sum(2))
            sigma = sigma.masked_fill(~x_valid, 0)
        plan = sigma[:, :, None] * q * delta[:, None, :]
        log_sigma, log_delta = log_sigma + sigma.log(), log_delta + delta.log()
    return plan, log_sigma, log_delta


def _ipot_log(
    cost: Tensor, valid: Tensor, log_m: Tensor, log_n: Tensor, beta: float, iters: int, inner: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same recurrence on logarithms."""
    x_valid, y_valid = valid.any(2), valid.any(1)
    log_plan = torch.zeros_like(cost).masked_fill(~valid, -torch.inf)
    sigma = (-log_m).expand(cost.shape[:2]).masked_fill(~x_valid, -torch.inf)
    log_sigma, log_delta = torch.zeros_like(sigma), cost.new_zeros(y_valid.shape)
    for _ in range(iters):
        log_q = log_plan - cost / beta
        for _ in range(inner):
            delta = -log_n - (log_q + sigma[:, :, None]).logsumexp(1)
            delta = delta.masked_fill(~y_valid, -torch.inf)
            sigma = -log_m - (log_q + delta[:, None, :]).logsumexp(2)
            sigma = sigma.masked_fill(~x_valid, -torch.inf)
        log_plan = sigma[:, :, None] + log_q + delta[:, None, :]
        log_sigma, log_delta = log_sigma + sigma, log_delta + delta
    return log_plan.exp(), log_sigma, log_delta


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
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
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    num_iters = a.new_zeros(a.shape[:1], dtype=torch.int64)
    running = torch.ones_like(num_iters, dtype=torch.bool)
    for _ in range(iters):
        new_g = -damp_b * eps * ((f / eps + log_a)[:, :, None] - cost / eps).logsumexp(1)
        new_g = new_g.masked_fill(~active_b, 0)
        new_f = -damp_a * eps * ((new_g / eps + log_b)[:, None, :] - cost / eps).logsumexp(2)
        new_f = new_f.masked_fill(~active_a, 0)
        moving = None if tol is None else ((new_f - f).abs() > tol).any(1)
        f = torch.where(running[:, None], new_f, f)
        g = torch.where(running[:, None], new_g, g)
        num_iters = num_iters + running
        if moving is not None:
            running = running & moving
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
    phi = lambda p, tau: p if tau is None else -tau * torch.expm1(-p / tau)
    excess = _plan(cost, a, b, f, g, eps).sum((1, 2)) - a.sum(1) * b.sum(1)
    return (a * phi(f, tau_a)).sum(1) + (b * phi(g, tau_b)).sum(1) - eps * excess


def _plan(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    mass = a[:, :, None] * b[:, None, :]
    exponent = (f[:, :, None] + g[:, None, :] - cost) / eps
    # Where there is no mass the exponent is arbitrary and may overflow.
    return mass * exponent.masked_fill(mass == 0, 0).exp()
