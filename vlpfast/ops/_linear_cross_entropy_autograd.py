"""Derivatives of the chunked linear + cross-entropy: an autograd function for eager code, and for
compiled code another over one registered operator, which hides the number of kept rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from vlpfast.ops._linear_cross_entropy_chunked import (
    Grads,
    Head,
    Options,
    Rows,
    Wanted,
    chunk_grads,
    chunks_of,
    losses_and_grads,
    losses_only,
    new_losses,
    select_rows,
    softmax_chunk,
)
from vlpfast.ops._once import once_differentiable


def row_losses(student: Head, teacher: Head | None, target: Tensor, options: Options) -> Tensor:
    """Losses (N,), differentiable in the student's tensors; 0 in ignored rows."""
    teacher = teacher or Head(None, None, None)
    if torch.compiler.is_compiling():
        return _Compiled.apply(*student, *teacher, target, options)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in student):
        return _Eager.apply(*student, *teacher, target, options)
    with torch.no_grad():
        rows = _select(student, teacher, target, options)
        return rows.put(losses_only(rows, options))


def _select(student: Head, teacher: Head, target: Tensor, options: Options) -> Rows:
    teacher = None if teacher.hidden is None else teacher.ready()
    return select_rows(student.ready(), teacher, target, options)


class _Eager(torch.autograd.Function):
    """Keeps whatever is cheapest.

    One chunk: the gradient of its logits, which is smaller than the weight's where fewer rows
    than D are kept, and takes any upstream gradient without a pass over the weight's. Several
    chunks and one upstream gradient for all rows: the gradients. Several chunks, one for each row:
    the inputs, and computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_m: Tensor | None,
        weight_m: Tensor | None,
        bias_m: Tensor | None,
        target: Tensor,
        options: Options,
    ) -> Tensor:
        inputs = Head(hidden, weight, bias)
        rows = _select(inputs, Head(hidden_m, weight_m, bias_m), target, options)
        ctx.options, ctx.num_rows = options, rows.num_rows
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.wanted = ctx.needs_input_grad[:3]
        chunks = chunks_of(rows)
        dlogits, grads = None, Grads(None, None, None)
        if len(chunks) == 1:
            loss = new_losses(rows)
            dlogits = softmax_chunk(rows, chunks[0], options, loss, write_grad=True)
            rows = rows._replace(teacher=None)
        elif options.uniform:
            loss, grads = losses_and_grads(rows, options, ctx.wanted)
        else:
            loss = losses_only(rows, options)
        ctx.made = any(x is not None for x in grads)
        teacher = rows.teacher or Head(None, None, None)
        kept = (None,) * 7 if ctx.made else (*rows.student, *teacher, rows.target)
        ctx.save_for_backward(rows.index, dlogits, *grads, *kept)
        return rows.put(loss)

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, dlogits, made_h, made_w, made_b, *kept = ctx.saved_tensors
        student, teacher, target = Head(*kept[:3]), Head(*kept[3:6]), kept[6]
        rows = Rows(
            index, ctx.num_rows, student, None if teacher.hidden is None else teacher, target
        )
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.made:
                grads = Grads(
                    *(None if x is None else x * grad[0] for x in (made_h, made_w, made_b))
                )
            elif dlogits is not None:
                grads = chunk_grads(dlogits, student, rows.take(grad), ctx.wanted, ctx.options)
            else:
                _, grads = losses_and_grads(rows, ctx.options, ctx.wanted, rows.take(grad))
        if grads.hidden is not None:
            grads = grads._replace(hidden=rows.put(grads.hidden))
        return (*_cast(grads, ctx.dtypes), None, None, None, None, None)


def _cast(grads: Grads, dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype) for x, dtype in zip(grads, dtypes, strict=True)]


torch.library.define(
    "vlpfast::linear_cross_entropy",
    "(Tensor? grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor? hidden_m, Tensor? weight_m,"
    " Tensor? bias_m, Tensor target, str impl, float label_smoothing, float alpha,"
    " int ignore_index, int? max_rows, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("vlpfast::linear_cross_entropy", ("cpu", "cuda"))
def _operator(
    grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_m: Tensor | None,
    weight_m: Tensor | None,
    bias_m: Tensor | None,
    target: Tensor,
    impl: str,
    label_smoothing: float,
    alpha: float,
    ignore_index: int,
    max_rows: int | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (N,) and the wanted gradients of sum_i grad_i loss_i, empty tensors for others.

    Tensors in, tensors out, all of known shape; everything else as in `row_losses`.
    """
    options = Options(impl, label_smoothing, alpha, ignore_index, max_rows, uniform=grad is None)
    inputs = Head(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = _select(inputs, Head(hidden_m, weight_m, bias_m), target, options)
        if not any(wanted):
            return (rows.put(losses_only(rows, options)), *(hidden.new_empty(0) for _ in range(3)))
        scale = None if grad is None else rows.take(grad)
        loss, grads = losses_and_grads(rows, options, tuple(wanted), scale)
        if grads.hidden is not None:
            grads = grads._replace(hidden=rows.put(grads.hidden))
    dtypes = [None if x is None else x.dtype for x in inputs]
    cast = [hidden.new_empty(0) if x is None else x for x in _cast(grads, dtypes)]
    return (rows.put(loss), *cast)


@torch.library.register_fake("vlpfast::linear_cross_entropy")
def _fake(
    grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_m: Tensor | None,
    weight_m: Tensor | None,
    bias_m: Tensor | None,
    target: Tensor,
    impl: str,
    label_smoothing: float,
    alpha: float,
    ignore_index: int,
    max_rows: int | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    grads = [
        x.new_empty(x.shape) if want else hidden.new_empty(0)
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    ]
    return (hidden.new_empty(target.shape, dtype=dtype), *grads)


_registered = torch.ops.vlpfast.linear_cross_entropy.default


class _Compiled(torch.autograd.Function):
    """As `_Eager` with several chunks: shapes that a compiler knows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_m: Tensor | None,
        weight_m: Tensor | None,
        bias_m: Tensor | None,
        target: Tensor,
        options: Options,
    ) -> Tensor:
        tensors = (hidden, weight, bias, hidden_m, weight_m, bias_m, target)
        ctx.wanted = list(ctx.needs_input_grad[:3])
        ctx.options = options[:5]
        ctx.uniform = options.uniform
        made = ctx.wanted if options.uniform else [False] * 3
        loss, *grads = _registered(None, *tensors, *ctx.options, made)
        ctx.save_for_backward(*(grads if options.uniform else tensors))
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.uniform:
            grads = [x * grad[:1].sum() for x in ctx.saved_tensors]
        else:
            _, *grads = _registered(grad, *ctx.saved_tensors, *ctx.options, ctx.wanted)
        grads = [x if want else None for x, want in zip(grads, ctx.wanted, strict=True)]
        return (*grads, None, None, None, None, None)
