"""How `sinkhorn` runs: schema, autograd and implementations.

What is passed here has been checked by the public function (transport.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from vlpfast.ops._once import CONSTANT_PLAN, once_differentiable
from vlpfast.ops._transport_op import kernel, transport_op
from vlpfast.ops.reference import transport as reference

torch.library.define(
    "vlpfast::sinkhorn_fwd",
    "(Tensor cost, Tensor a, Tensor b, Tensor? f_init, float eps, int iters, float? tol,"
    " float? tau_a, float? tau_b)"
    " -> (Tensor distance, Tensor value, Tensor plan, Tensor f, Tensor g, Tensor num_iters)",
)

Solved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.register_fake("vlpfast::sinkhorn_fwd")
def _(cost, a, b, f_init, eps, iters, tol, tau_a, tau_b):
    new = cost.new_empty
    B, M, N = cost.shape
    num_iters = new((B,), dtype=torch.int64)
    return new((B,)), new((B,)), new((B, M, N)), new((B, M)), new((B, N)), num_iters


class _Sinkhorn(torch.autograd.Function):
    """`distance` differentiated at a constant plan, `value` at constant potentials."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, impl, cost, a, b, f_init, eps, iters, tol, tau_a, tau_b
    ) -> Solved:
        solved = kernel(impl, "sinkhorn_fwd")(cost, a, b, f_init, eps, iters, tol, tau_a, tau_b)
        ctx.options = (eps, tau_a, tau_b)
        ctx.save_for_backward(a, b, *solved[2:5])
        ctx.mark_non_differentiable(*solved[2:])
        return solved

    @staticmethod
    @once_differentiable("sinkhorn", CONSTANT_PLAN)
    def backward(ctx: FunctionCtx, grad_distance, grad_value, *_):
        a, b, plan, f, g = ctx.saved_tensors
        eps, tau_a, tau_b = ctx.options
        need_cost, need_a, need_b = ctx.needs_input_grad[1:4]
        grad_cost = plan * (grad_distance + grad_value)[:, None, None] if need_cost else None
        weigh = lambda weights, potential, tau, mass, others: (
            grad_value[:, None]
            * torch.where(
                weights > 0,
                reference.marginal_term(potential, tau)
                - eps * (mass / weights - others.sum(1, keepdim=True)),
                0,
            )
        )
        grad_a = weigh(a, f, tau_a, plan.sum(2), b) if need_a else None
        grad_b = weigh(b, g, tau_b, plan.sum(1), a) if need_b else None
        return None, grad_cost, grad_a, grad_b, None, None, None, None, None, None


class ImplicitPlan(torch.autograd.Function):
    """The plan as a function of cost and weights, by the implicit function theorem at convergence.

    Formulas: docs/ops.md, transport. The backward solves one system of min(M, N) unknowns a
    problem, in fp64.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, cost, a, b, plan, eps, tau_a, tau_b) -> Tensor:
        ctx.options = (eps, tau_a, tau_b)
        ctx.save_for_backward(a, b, plan)
        return plan.clone()

    @staticmethod
    @once_differentiable("sinkhorn", "its plan is differentiated once")
    def backward(ctx: FunctionCtx, grad_plan):
        a, b, plan = ctx.saved_tensors
        eps, tau_a, tau_b = ctx.options
        P = plan.double()
        weighted = P * grad_plan.double() / eps
        relax_a, relax_b = (1 + (0 if tau is None else eps / tau) for tau in (tau_a, tau_b))
        r, c = P.sum(2) * relax_a, P.sum(1) * relax_b
        system = (P, r, c, weighted.sum(2), weighted.sum(1))
        balanced = tau_a is None and tau_b is None
        if plan.shape[1] <= plan.shape[2]:
            alpha, beta = _solve(*system, balanced)
        else:
            beta, alpha = _solve(P.mT, c, r, system[4], system[3], balanced)
        grad_cost = P * (alpha[:, :, None] + beta[:, None, :]) - weighted
        per_weight = lambda weights, total, dual: torch.where(
            weights > 0, eps * dual * total / weights, 0
        ).to(weights.dtype)
        grad_a, grad_b = per_weight(a, r, alpha), per_weight(b, c, beta)
        return grad_cost.to(plan.dtype), grad_a, grad_b, None, None, None, None


def _solve(
    P: Tensor, r: Tensor, c: Tensor, u: Tensor, v: Tensor, balanced: bool
) -> tuple[Tensor, Tensor]:
    """alpha (B, M), beta (B, N) with diag(r) alpha + P beta = u and P^T alpha + diag(c) beta = v.

    Rows and columns without mass get 0.
    """
    r, c = (torch.where(mass > 0, mass, 1) for mass in (r, c))
    schur = torch.diag_embed(r) - (P / c[:, None, :]) @ P.mT
    if balanced:
        # Adding to alpha what is taken from beta changes nothing; this fixes the sum of alpha.
        on = (P.sum(2) > 0).to(P.dtype)
        scale = (r * on).sum(1) / on.sum(1).clamp(min=1) ** 2
        schur = schur + scale[:, None, None] * on[:, :, None] * on[:, None, :]
    alpha = torch.linalg.solve(schur, u - ((P / c[:, None, :]) @ v[:, :, None]).squeeze(2))
    return alpha, (v - (P.mT @ alpha[:, :, None]).squeeze(2)) / c


def _fused(impl: str) -> Callable:
    return lambda *problem: _Sinkhorn.apply(impl, *problem)


def _reference(
    cost: Tensor, a: Tensor, b: Tensor, f_init: Tensor | None,
    eps: float, iters: int, tol: float | None, tau_a: float | None, tau_b: float | None,
) -> Solved:  # fmt: skip
    entropy = {"eps": eps, "tau_a": tau_a, "tau_b": tau_b}
    start = None if f_init is None else f_init.detach()
    plan, f, g, num_iters = reference.sinkhorn(
        cost.detach(), a.detach(), b.detach(), start, iters=iters, tol=tol, **entropy
    )
    distance = (cost * plan).sum((1, 2))
    return distance, reference.sinkhorn_value(cost, a, b, f, g, **entropy), plan, f, g, num_iters


SINKHORN = transport_op("sinkhorn", ("sinkhorn_fwd",), _reference, _fused, (torch.float32,))
