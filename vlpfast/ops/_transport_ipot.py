"""How `ipot`, `ipot_from_cost` and `wra_loss` run: schemas, autograd and implementations.

What is passed here has been checked by the public functions (transport.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from vlpfast.ops._once import CONSTANT_PLAN, once_differentiable
from vlpfast.ops._transport_op import kernel, transport_op
from vlpfast.ops.reference import transport as reference

torch.library.define(
    "vlpfast::ipot_fwd",
    "(Tensor x, Tensor y, Tensor? x_mask, Tensor? y_mask, float beta, int iters, int inner,"
    " float? tol) -> (Tensor distance, Tensor plan, Tensor f, Tensor g, Tensor num_iters)",
)
torch.library.define(
    "vlpfast::ipot_bwd",
    "(Tensor grad_distance, Tensor x, Tensor y, Tensor? x_mask, Tensor? y_mask, Tensor plan,"
    " bool need_x, bool need_y) -> (Tensor grad_x, Tensor grad_y)",
)
torch.library.define(
    "vlpfast::ipot_cost_fwd",
    "(Tensor cost, Tensor? x_mask, Tensor? y_mask, float beta, int iters, int inner, float? tol)"
    " -> (Tensor distance, Tensor plan, Tensor f, Tensor g, Tensor num_iters)",
)
torch.library.define(
    "vlpfast::wra_fwd",
    "(Tensor text, Tensor image, Tensor? text_mask, Tensor? image_mask, Tensor matched, float beta,"
    " int iters, float weight, bool need_text, bool need_image)"
    " -> (Tensor loss, Tensor distance, Tensor grad_text, Tensor grad_image)",
)

Solved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_solution(like: Tensor, B: int, M: int, N: int) -> Solved:
    new = functools.partial(like.new_empty, dtype=torch.float32)
    return (
        new((B,)),
        new((B, M, N)),
        new((B, M)),
        new((B, N)),
        like.new_empty((B,), dtype=torch.int64),
    )


@torch.library.register_fake("vlpfast::ipot_fwd")
def _(x, y, x_mask, y_mask, beta, iters, inner, tol):
    return _empty_solution(x, *x.shape[:2], y.shape[1])


@torch.library.register_fake("vlpfast::ipot_cost_fwd")
def _(cost, x_mask, y_mask, beta, iters, inner, tol):
    return _empty_solution(cost, *cost.shape)


def _empty_gradient(features: Tensor, needed: bool) -> Tensor:
    return features.new_empty(features.shape if needed else (0,))


@torch.library.register_fake("vlpfast::ipot_bwd")
def _(grad_distance, x, y, x_mask, y_mask, plan, need_x, need_y):
    return _empty_gradient(x, need_x), _empty_gradient(y, need_y)


@torch.library.register_fake("vlpfast::wra_fwd")
def _(text, image, text_mask, image_mask, matched, beta, iters, weight, need_text, need_image):
    loss = text.new_empty((), dtype=torch.float32)
    distance = text.new_empty((text.shape[0],), dtype=torch.float32)
    return loss, distance, _empty_gradient(text, need_text), _empty_gradient(image, need_image)


class _Ipot(torch.autograd.Function):
    """The plan is a constant; what the backward needs of it is the plan itself."""

    @staticmethod
    def forward(ctx: FunctionCtx, impl, x, y, x_mask, y_mask, beta, iters, inner, tol) -> Solved:
        solved = kernel(impl, "ipot_fwd")(x, y, x_mask, y_mask, beta, iters, inner, tol)
        ctx.impl = impl
        ctx.save_for_backward(x, y, x_mask, y_mask, solved[1])
        ctx.mark_non_differentiable(*solved[1:])
        return solved

    @staticmethod
    @once_differentiable("ipot", CONSTANT_PLAN)
    def backward(ctx: FunctionCtx, grad_distance, *_):
        need_x, need_y = ctx.needs_input_grad[1:3]
        grad_x, grad_y = kernel(ctx.impl, "ipot_bwd")(
            grad_distance.contiguous(), *ctx.saved_tensors, need_x, need_y
        )
        grads = (grad_x if need_x else None, grad_y if need_y else None)
        return (None, *grads, None, None, None, None, None, None)


class _IpotFromCost(torch.autograd.Function):
    """The gradient in the cost is the plan."""

    @staticmethod
    def forward(ctx: FunctionCtx, impl, cost, x_mask, y_mask, beta, iters, inner, tol) -> Solved:
        solved = kernel(impl, "ipot_cost_fwd")(cost, x_mask, y_mask, beta, iters, inner, tol)
        ctx.save_for_backward(solved[1])
        ctx.mark_non_differentiable(*solved[1:])
        return solved

    @staticmethod
    @once_differentiable("ipot_from_cost", CONSTANT_PLAN)
    def backward(ctx: FunctionCtx, grad_distance, *_):
        (plan,) = ctx.saved_tensors
        grad_cost = plan * grad_distance[:, None, None]
        return None, grad_cost, None, None, None, None, None, None


class _Wra(torch.autograd.Function):
    """The features' gradients are written in the forward, while features and plan are in cache."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, impl, text, image, text_mask, image_mask, matched, beta, iters, weight,
        need_text, need_image,
    ) -> Tensor:  # fmt: skip
        problem = (text, image, text_mask, image_mask, matched)
        options = (beta, iters, weight, need_text, need_image)
        loss, _, *gradients = kernel(impl, "wra_fwd")(*problem, *options)
        ctx.impl, ctx.options = impl, options
        # A compiled backward must get them as saved tensors; an eager one takes them over.
        ctx.compiled = torch.compiler.is_compiling()
        if ctx.compiled:
            ctx.save_for_backward(*gradients)
        else:
            ctx.gradients = gradients
            ctx.save_for_backward(*problem)
        return loss

    @staticmethod
    @once_differentiable("wra_loss", CONSTANT_PLAN)
    def backward(ctx: FunctionCtx, grad_loss):
        if ctx.compiled:
            grads = [gradient * grad_loss for gradient in ctx.saved_tensors]
        else:
            grads, ctx.gradients = ctx.gradients, None
            if grads is None:  # a second backward through this graph
                grads = kernel(ctx.impl, "wra_fwd")(*ctx.saved_tensors, *ctx.options)[2:]
            # Passing over large gradients to multiply them by 1 is worth a look at it, where the
            # look waits for nothing.
            if grad_loss.device.type != "cpu" or grad_loss != 1:
                for gradient in grads:
                    gradient.mul_(grad_loss)
        need_text, need_image = ctx.options[3:]
        grads = (grads[0] if need_text else None, grads[1] if need_image else None)
        return (None, *grads, None, None, None, None, None, None, None, None)


def _fused_ipot(impl: str) -> Callable:
    return lambda *problem: _Ipot.apply(impl, *problem)


def _fused_ipot_from_cost(impl: str) -> Callable:
    return lambda *problem: _IpotFromCost.apply(impl, *problem)


def _fused_wra(impl: str) -> Callable:
    def run(text: Tensor, image: Tensor, *problem: object) -> Tensor:
        enabled = torch.is_grad_enabled()
        needs = (enabled and text.requires_grad, enabled and image.requires_grad)
        return _Wra.apply(impl, text, image, *problem, *needs)

    return run


def _masks(
    shape: tuple[int, int, int], x_mask: Tensor | None, y_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The masks, or ones that are True everywhere."""
    B, M, N = shape
    every = functools.partial(torch.ones, dtype=torch.bool, device=device)
    return every(B, M) if x_mask is None else x_mask, every(B, N) if y_mask is None else y_mask


def _reference_from_cost(
    cost: Tensor, x_mask: Tensor | None, y_mask: Tensor | None,
    beta: float, iters: int, inner: int, tol: float | None, in_logs: bool = True,
) -> Solved:  # fmt: skip
    x_mask, y_mask = _masks(cost.shape, x_mask, y_mask, cost.device)
    valid = x_mask[:, :, None] & y_mask[:, None, :]
    cost = cost.masked_fill(~valid, 0)
    options = {"beta": beta, "iters": iters, "inner": inner, "tol": tol, "in_logs": in_logs}
    plan, *rest = reference.ipot(cost.detach(), x_mask, y_mask, **options)
    return (cost * plan).sum((1, 2)), plan, *rest


def _reference_ipot(
    x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None,
    beta: float, iters: int, inner: int, tol: float | None,
) -> Solved:  # fmt: skip
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_mask, y_mask = _masks((*x.shape[:2], y.shape[1]), x_mask, y_mask, x.device)
    in_logs = beta < reference.LOG_DOMAIN_BETA
    with torch.autocast(x.device.type, enabled=False):
        cost = reference.cosine_cost(x.to(dtype), y.to(dtype), x_mask, y_mask)
        return _reference_from_cost(cost, x_mask, y_mask, beta, iters, inner, tol, in_logs)


def _reference_wra(
    text: Tensor, image: Tensor, text_mask: Tensor | None, image_mask: Tensor | None,
    matched: Tensor, beta: float, iters: int, weight: float,
) -> Tensor:  # fmt: skip
    distance = _reference_ipot(text, image, text_mask, image_mask, beta, iters, 1, None)[0]
    return signed_sum(distance, matched) * (weight / max(1, matched.shape[0]))


def signed_sum(distance: Tensor, matched: Tensor) -> Tensor:
    """sum over matched - sum over unmatched."""
    return torch.where(matched, distance, -distance).sum()


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

IPOT = transport_op("ipot", ("ipot_fwd", "ipot_bwd"), _reference_ipot, _fused_ipot, _FLOATS)
IPOT_FROM_COST = transport_op(
    "ipot_from_cost",
    ("ipot_cost_fwd",),
    _reference_from_cost,
    _fused_ipot_from_cost,
    (torch.float32,),
)
# fp16 goes through ipot: written in the forward, its gradients would underflow before they meet
# the loss scale.
WRA = transport_op(
    "wra_loss", ("wra_fwd",), _reference_wra, _fused_wra, (torch.float32, torch.bfloat16)
)
