"""Backwards that are not differentiable themselves, and say so to whoever differentiates them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_REFERENCE = 'impl="reference" has them'
# For ops of transport, whose references differentiate the plan no more than kernels do.
CONSTANT_PLAN = _REFERENCE + ", at a constant plan"


def once_differentiable(op: str, instead: str = _REFERENCE) -> Callable[[Callable], Callable]:
    """For the `backward` of an autograd function that belongs to `vlpfast.ops.<op>`.

    torch's decorator of this name attaches its error only where the incoming gradient requires one,
    which that of a loss does not: second-order gradients would miss a term without a word.

    Args:
        op: name for the error.
        instead: what has such gradients, for the error.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def once(ctx, *grads):
            # Gradients are enabled in a backward with create_graph=True, and while it is traced.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                message = f"vlpfast.ops.{op}: gradients of gradients are not offered; {instead}"
                raise RuntimeError(message)
            with torch.no_grad():
                return backward(ctx, *grads)

        return once

    return decorate
