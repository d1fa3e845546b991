"""Chunked linear + cross-entropy: matrix products by torch, and one pass over each chunk of logits
that makes the loss and the gradient in the logits' place. C++ and Triton share all of this.

Which rows are kept is decided here; formulas are in docs/ops.md. Letters: N rows, C rows computed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Logits of one chunk: 2,198 rows of BERT's vocabulary in fp32, more than a batch has masked.
CHUNK_BYTES = 1 << 28
# Columns of one product. MKL needs 1.4 times as long for 154 x 30522 at once as in such blocks.
_CPU_COLUMNS = 1024

torch.library.define(
    "vlpfast::linear_cross_entropy_pass",
    "(Tensor(a!) logits, Tensor? bias, Tensor target, Tensor? exact, Tensor? teacher_logits,"
    " Tensor? teacher_bias, float label_smoothing, float alpha, int ignore_index, bool write_grad,"
    " Tensor(b!) loss) -> ()",
)
torch.library.define(
    "vlpfast::linear_cross_entropy_bias_grad",
    "(Tensor dlogits, Tensor scale, Tensor(a!) out) -> ()",
)
# They write into their arguments and return nothing.
torch.library.register_fake("vlpfast::linear_cross_entropy_pass", lambda *_: None)
torch.library.register_fake("vlpfast::linear_cross_entropy_bias_grad", lambda *_: None)


class Passes(NamedTuple):
    """What a back end does to a chunk of logits (C, V) of unit column stride.

    Attributes:
        softmax: (logits!, bias, target, exact, teacher_logits, teacher_bias, label_smoothing,
            alpha, ignore_index, write_grad, loss!). z = logits + bias, with `exact` (C,) + bias at
            the target; writes the rows' losses (0 for ignored rows) and, if `write_grad`,
            overwrites logits with softmax(z) - t (0 in ignored rows).
        bias_grad: (dlogits, scale (C,), out!): out_v = sum_i scale_i dlogits_iv, rows in order.
        forward: (hidden, weight, bias, target, label_smoothing, ignore_index) -> losses (C,)
            without logits in memory, or None where the back end has no such kernel.
    """

    softmax: Callable[..., None]
    bias_grad: Callable[..., None]
    forward: Callable[..., Tensor] | None = None


_CPP = Passes(
    torch.ops.vlpfast.linear_cross_entropy_pass.default,
    torch.ops.vlpfast.linear_cross_entropy_bias_grad.default,
)


def passes_of(name: str) -> Passes:
    """The passes of back end "cpp" or "triton"."""
    if name == "cpp":
        return _CPP
    kernels = importlib.import_module("vlpfast.kernels.linear_cross_entropy")
    return Passes(
        kernels.linear_cross_entropy_pass,
        kernels.linear_cross_entropy_bias_grad,
        kernels.linear_cross_entropy_fwd,
    )


class Options(NamedTuple):
    """What is not a tensor.

    Attributes:
        impl: the back end, "cpp" or "triton".
        label_smoothing: as in `ops.linear_cross_entropy`, as are ignore_index and max_rows.
        alpha: the teacher's share.
        uniform: whether all rows have the same upstream gradient (reductions "mean" and "sum").
    """

    impl: str
    label_smoothing: float
    alpha: float
    ignore_index: int
    max_rows: int | None
    uniform: bool

    @property
    def passes(self) -> Passes:
        """The back end's passes."""
        return passes_of(self.impl)


class Head(NamedTuple):
    """Rows and the layer they go through: the student's or the teacher's."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def rows(self, index: slice) -> Head:
        """The same layer for some of the rows."""
        return self._replace(hidden=self.hidden[index])

    def ready(self) -> Head:
        """In the dtype of the product; the bias in that of the sums."""
        dtype = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide).contiguous()
        return Head(self.hidden.to(dtype), self.weight.to(dtype), bias)


class Rows(NamedTuple):
    """The rows that are computed.

    Attributes:
        index (C,): their place among all N; None if they are all of them. Filled up with N where
            `max_rows` was given and fewer are kept.
        num_rows: N.
        student: their hidden states, 0 in ignored rows.
        teacher: the teacher's, or None.
        target (C,): ignore_index in what fills up.
    """

    index: Tensor | None
    num_rows: int
    student: Head
    teacher: Head | None
    target: Tensor

    def take(self, per_row: Tensor) -> Tensor:
        """(C,) of a vector of all rows; anything finite in what fills up."""
        if self.index is None:
            return per_row
        return per_row.index_select(0, self.index.clamp(max=self.num_rows - 1))

    def put(self, values: Tensor) -> Tensor:
        """(N, ...) with `values` (C, ...) in their places and 0 elsewhere."""
        if self.index is None:
            return values
        # What fills up has place N, which is cut off.
        whole = values.new_zeros(self.num_rows + 1, *values.shape[1:])
        return whole.index_copy_(0, self.index, values)[: self.num_rows]


class Grads(NamedTuple):
    """Gradients of hidden (C, D), weight and bias, or None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


Wanted = tuple[bool, bool, bool]


def select_rows(student: Head, teacher: Head | None, target: Tensor, options: Options) -> Rows:
    """Leaves out the ignored rows: exactly, which asks the device how many are left, or, given
    `max_rows`, up to that number, which asks nothing.
    """
    kept, size = target != options.ignore_index, target.shape[0]
    if options.max_rows is None:
        index, ignored = kept.nonzero().squeeze(1), None
        if index.shape[0] == size:
            return Rows(None, size, student, teacher, target)
    elif options.max_rows >= size:
        index, ignored = None, ~kept
    else:
        index = _first_rows(kept, options.max_rows)
        ignored = index == size

    def pick(x: Tensor) -> Tensor:
        x = x if index is None else x.index_select(0, index.clamp(max=size - 1))
        # A zero gradient times NaN were NaN.
        return x if ignored is None else x.masked_fill(ignored[:, None], 0)

    if index is not None:
        target = target.index_select(0, index.clamp(max=size - 1))
        if ignored is not None:
            target = target.masked_fill(ignored, options.ignore_index)
    if teacher is not None:
        teacher = teacher._replace(hidden=pick(teacher.hidden))
    return Rows(index, size, student._replace(hidden=pick(student.hidden)), teacher, target)


def _first_rows(kept: Tensor, capacity: int) -> Tensor:
    """Indices (capacity,) of the rows that are `kept` (N,), ascending, then N. No host sync."""
    slots = kept.cumsum(0)
    fits = slots[-1] <= capacity
    torch._assert_async(
        fits, f"linear_cross_entropy: more than max_rows = {capacity} rows are kept"
    )
    size = kept.shape[0]
    index = torch.full((capacity + 1,), size, device=kept.device)
    # Rows that are not kept all write the same to the last slot, which is cut off.
    slots = torch.where(kept, slots - 1, capacity)
    rows = torch.where(kept, torch.arange(size, device=kept.device), size)
    return index.scatter_(0, slots, rows)[:capacity]


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out=logits)
    for start in range(0, weight.shape[0], _CPU_COLUMNS):
        block = slice(start, start + _CPU_COLUMNS)
        torch.mm(hidden, weight[block].T, out=logits[:, block])
    return logits


def chunks_of(rows: Rows) -> list[slice]:
    """The rows whose logits are in memory together; at least one chunk, which may be empty."""
    num_rows, vocab = rows.target.shape[0], rows.student.weight.shape[0]
    step = max(1, CHUNK_BYTES // (max(1, vocab) * rows.student.hidden.element_size()))
    return [slice(start, start + step) for start in range(0, max(1, num_rows), step)]


def new_losses(rows: Rows) -> Tensor:
    """Memory for the losses (C,)."""
    hidden = rows.student.hidden
    return hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


def softmax_chunk(
    rows: Rows, chunk: slice, options: Options, loss: Tensor, write_grad: bool
) -> Tensor:
    """Writes the losses of a chunk; returns its logits, or their gradient."""
    student, target = rows.student.rows(chunk), rows.target[chunk]
    logits = _project(student.hidden, student.weight)
    exact = None
    if logits.element_size() < 4:
        # The target's logit is not rounded to the dtype of the others: most of a loss's error.
        picked = student.weight.index_select(0, target.clamp(0, student.weight.shape[0] - 1))
        exact = (student.hidden.float() * picked.float()).sum(1)
    teacher_logits = teacher_bias = None
    if rows.teacher is not None and options.alpha > 0:
        teacher = rows.teacher.rows(chunk)
        teacher_logits, teacher_bias = _project(teacher.hidden, teacher.weight), teacher.bias
    options.passes.softmax(
        logits, student.bias, target, exact, teacher_logits, teacher_bias,
        options.label_smoothing, options.alpha, options.ignore_index, write_grad, loss[chunk],
    )  # fmt: skip
    return logits


def losses_only(rows: Rows, options: Options) -> Tensor:
    """Losses (C,)."""
    forward = options.passes.forward
    if forward is not None and (rows.teacher is None or options.alpha == 0):
        return forward(*rows.student, rows.target, options.label_smoothing, options.ignore_index)
    loss = new_losses(rows)
    for chunk in chunks_of(rows):
        softmax_chunk(rows, chunk, options, loss, write_grad=False)
    return loss


def losses_and_grads(
    rows: Rows, options: Options, wanted: Wanted, scale: Tensor | None = None
) -> tuple[Tensor, Grads]:
    """Losses (C,), and gradients of sum_i scale_i loss_i; scale (C,) is 1 by default."""
    loss, student = new_losses(rows), rows.student
    grad_hidden = torch.empty_like(student.hidden) if wanted[0] else None
    grad_weight = grad_bias = None
    for chunk in chunks_of(rows):
        dlogits = softmax_chunk(rows, chunk, options, loss, write_grad=True)
        part = chunk_grads(
            dlogits,
            student.rows(chunk),
            None if scale is None else scale[chunk],
            wanted,
            options,
            grad_weight,
        )
        grad_weight = part.weight
        if wanted[0]:
            grad_hidden[chunk] = part.hidden
        if wanted[2]:
            grad_bias = part.bias if grad_bias is None else grad_bias.add_(part.bias)
    return loss, Grads(grad_hidden, grad_weight, grad_bias)


def chunk_grads(
    dlogits: Tensor,
    student: Head,
    scale: Tensor | None,
    wanted: Wanted,
    options: Options,
    weight_sum: Tensor | None = None,
) -> Grads:
    """Gradients from those of the logits; `scale` enters by the rows of `hidden`, which are far
    fewer numbers than the logits or the weight.

    Args:
        dlogits (C, V): as `Passes.softmax` leaves it.
        student: with the chunk's rows.
        scale (C,): gradient of each row's loss; 1 by default.
        wanted: which gradients.
        options: the back end.
        weight_sum (V, D): the weight's gradient of the chunks before, in fp32 or wider, added to in
            place; None for the first.
    """
    hidden, weight, bias = student
    grad_hidden = grad_weight = grad_bias = None
    if wanted[0]:
        grad_hidden = torch.mm(dlogits, weight)
        if scale is not None:
            grad_hidden = (grad_hidden * scale[:, None]).to(hidden.dtype)
    if wanted[1]:
        scaled = hidden if scale is None else (hidden * scale[:, None]).to(hidden.dtype)
        grad_weight = _add_product(dlogits.T, scaled, weight_sum)
    if wanted[2]:
        grad_bias = torch.empty_like(bias)
        factor = bias.new_ones(hidden.shape[0]) if scale is None else scale.contiguous()
        options.passes.bias_grad(dlogits, factor, grad_bias)
    return Grads(grad_hidden, grad_weight, grad_bias)


def _add_product(a: Tensor, b: Tensor, total: Tensor | None) -> Tensor:
    """total + a @ b; the sum of bf16 products is kept in fp32 from the second on."""
    if total is None:
        return torch.mm(a, b)
    if total.dtype == a.dtype == torch.float32 or a.dtype == torch.float64:
        return total.addmm_(a, b)
    return total.float().add_(torch.mm(a, b))
