"""What tests and benchmarks share: error budgets, gradients, registration and compile checks.

Nothing here is used by the library itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def routes(*impls: str) -> list:
    """pytest parameters (impl, device) for the implementations that this machine may run.

    "triton" runs compiled where there is a GPU and interpreted on the CPU elsewhere, by one test
    body; what is missing is skipped with its reason.
    """
    import pytest

    from vlpfast import _ext

    missing = {
        "cpp": _ext.cpp_missing,
        "triton": _ext.triton_missing,
        "cuda": _ext.cuda_missing,
    }
    params = []
    for impl in impls:
        on_gpu = impl == "cuda" or (impl == "triton" and torch.cuda.is_available())
        reason = missing[impl]() if impl in missing else None
        marks = [pytest.mark.gpu] if on_gpu else []
        if reason is not None:
            marks.append(pytest.mark.skip(reason=f"{impl}: {reason}"))
        device = torch.device("cuda" if on_gpu else "cpu")
        params.append(pytest.param(impl, device, marks=marks, id=f"{impl}-{device}"))
    return params


def assert_within_budget(
    actual: Tensor, reference_fp64: Tensor, eager: Tensor, *, factor: float = 2.0, name: str = ""
) -> None:
    """Fails if `actual` is further from the truth than `factor` times what eager code is.

    max|actual - truth| <= factor * (max|eager - truth| + eps(dtype) * max|truth|), over finite
    entries; infinities must agree, and a NaN is allowed only where the truth has one.

    Args:
        actual: result under test, any floating dtype.
        reference_fp64: the eager reference's result on the same inputs widened to fp64.
        eager: the eager reference's result in the dtype under test, which gives the rounding band.
        factor: how many times the eager error is accepted.
        name: what is compared, for the message.
    """
    label = name or "result"
    truth = reference_fp64.detach()
    assert truth.dtype == torch.float64, f"{label}: the truth must be fp64, got {truth.dtype}"
    assert actual.dtype == eager.dtype, f"{label}: dtype {actual.dtype}, eager has {eager.dtype}"
    shapes = [tuple(x.shape) for x in (actual, truth, eager)]
    assert shapes[0] == shapes[1] == shapes[2], f"{label}: shapes (actual, truth, eager) {shapes}"
    value, plain = actual.detach().double(), eager.detach().double()
    finite = truth.isfinite()
    torch.testing.assert_close(
        value[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True,
        msg=lambda m: f"{label}, where the truth is not finite: {m}",
    )  # fmt: skip
    if not finite.any():
        return
    truth, value, plain = truth[finite], value[finite], plain[finite]
    eager_error = (plain - truth).abs().max()
    band = torch.finfo(eager.dtype).eps * truth.abs().max()
    error = (value - truth).abs().max()
    # A NaN in either error makes the comparison false, so it fails.
    assert error <= factor * (eager_error + band), (
        f"{label}: error {error:.3e} over {factor} * (eager {eager_error:.3e} + band {band:.3e})"
    )


def with_gradients(
    function: Callable,
    inputs: Sequence[Tensor],
    grad_output: Tensor | Sequence[Tensor] | None = None,
) -> tuple[tuple, tuple[Tensor | None, ...]]:
    """Outputs of `function(*inputs)` and the gradients of its floating inputs.

    Args:
        function: returns a tensor or a (named) tuple; entries without gradient are passed through.
        inputs: tensors; floating ones are detached, cloned and differentiated.
        grad_output: gradient of each differentiable output; ones by default.

    Returns:
        The outputs, and one gradient per floating input (None where no output depends on it).
    """
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = pytree.tree_leaves(function(*inputs))
    roots = _differentiable(outputs)
    if grad_output is None:
        grad_output = [torch.ones_like(root) for root in roots]
    elif isinstance(grad_output, Tensor):
        grad_output = [grad_output]
    grad_output = [g.to(root) for g, root in zip(grad_output, roots, strict=True)]
    grads = torch.autograd.grad(roots, _differentiable(inputs), grad_output, allow_unused=True)
    return tuple(pytree.tree_map_only(Tensor, Tensor.detach, outputs)), grads


def assert_same(actual: object, expected: object, *, exact: bool = True) -> None:
    """Compares two results of one structure: to the bit if `exact`, else by dtype defaults."""
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert actual_spec == expected_spec, f"structure {actual_spec}, expected {expected_spec}"
    for i, (a, e) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        if isinstance(e, Tensor):
            torch.testing.assert_close(
                a, e, equal_nan=True, msg=lambda m, i=i: f"leaf {i}: {m}", **tolerance
            )
        else:
            assert a == e, f"leaf {i}: {a!r}, expected {e!r}"


def assert_compiles(
    function: Callable, *args: object, backend: str = "aot_eager", **kwargs: object
) -> None:
    """`torch.compile(function, fullgraph=True)` gives eager's outputs and input gradients."""
    torch._dynamo.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
        run_args, run_kwargs = pytree.tree_map_only(Tensor, _fresh_leaf, (args, kwargs))
        outputs = run(*run_args, **run_kwargs)
        roots = _differentiable(pytree.tree_leaves(outputs))
        sources = _differentiable(pytree.tree_leaves((run_args, run_kwargs)))
        grads = ()
        if roots and sources:
            total = sum(root.float().sum() for root in roots)
            grads = torch.autograd.grad(total, sources, allow_unused=True)
        results.append((pytree.tree_map_only(Tensor, Tensor.detach, outputs), grads))
    assert_same(results[1], results[0], exact=False)


def opcheck(op: torch._ops.OpOverload, *args: object, **kwargs: object) -> None:
    """`torch.library.opcheck` for an op whose autograd lives outside: inputs are detached first."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    torch.library.opcheck(op, args, kwargs)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, all uninitialised memory is NaN (or the largest integer), in C++ as well.

    It switches on torch's deterministic algorithms, so wrap the op under test and nothing else.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _fresh_leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _differentiable(values: Sequence[object]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and x.requires_grad]
