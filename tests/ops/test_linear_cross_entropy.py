"""linear_cross_entropy against torch's cross-entropy on whole logits and ALBEF's distillation, and
what every implementation promises; precision and the chunked driver are tested beside this file.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlpfast.ops.linear_cross_entropy import linear_cross_entropy
from vlpfast.testing import assert_compiles, assert_same, routes, with_gradients

N, D, V = 9, 5, 13  # V odd, as 30522 + 1 would be
ROUTES = routes("reference", "cpp", "triton")
TARGET = torch.tensor([3, -100, 0, 12, -100, 3, -100, 7, 1])


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, bias."""
    return tuple(make(*s, seed=i, dtype=dtype) for i, s in enumerate([(N, D), (V, D), (V,)]))


def teacher() -> tuple[Tensor, Tensor, Tensor]:
    """Of another width than the student."""
    return make(N, D + 2, seed=3), make(V, D + 2, seed=4), make(V, seed=5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 3], ids=["outside", "in-vocabulary"])
def test_matches_torch(reduction: str, label_smoothing: float, ignore_index: int) -> None:
    target = TARGET if ignore_index == -100 else TARGET.clamp(min=0)
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    grad = make(N, seed=9) if reduction == "none" else None
    ours = with_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, target, b, **options), inputs(), grad
    )
    theirs = with_gradients(
        lambda h, w, b: F.cross_entropy(h @ w.T + b, target, **options), inputs(), grad
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def albef_mlm(logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """The masked-language loss of ALBEF's xbert."""
    soft_labels = F.softmax(teacher_logits, dim=-1)
    loss = F.cross_entropy(logits, labels)
    loss_distill = -torch.sum(F.log_softmax(logits, dim=-1) * soft_labels, dim=-1)
    return (1 - alpha) * loss + alpha * loss_distill[labels != -100].mean()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_matches_albef_distillation(alpha: float) -> None:
    hidden_m, weight_m, bias_m = teacher()
    ours = with_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, TARGET, b, teacher=teacher(), alpha=alpha),
        inputs(),
    )
    logits_m = hidden_m @ weight_m.T + bias_m
    theirs = with_gradients(
        lambda h, w, b: albef_mlm(h @ w.T + b, logits_m, TARGET, alpha), inputs()
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str) -> None:
    options = {"teacher": teacher(), "alpha": 0.3, "label_smoothing": 0.1, "reduction": reduction}
    leaves = [x.requires_grad_() for x in inputs()]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, TARGET, b, **options), leaves
    )


def test_teacher_has_no_gradient() -> None:
    hidden, weight, bias = inputs()
    parts = [x.requires_grad_() for x in teacher()]
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, TARGET, bias, teacher=tuple(parts), alpha=0.5).backward()
    assert all(part.grad is None for part in parts)
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("max_rows", [None, 0, 3, 9])
def test_all_ignored_is_zero(impl, device, reduction: str, max_rows: int | None) -> None:
    for rows in (0, 4):
        hidden, weight, bias = (x.to(device).requires_grad_() for x in inputs(torch.float32))
        target = torch.full((rows,), -100, device=device)
        loss = linear_cross_entropy(
            hidden[:rows], weight, target, bias, reduction=reduction, max_rows=max_rows, impl=impl
        )
        loss.backward()
        assert loss == 0
        for x in (hidden, weight, bias):
            assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("max_rows", [None, 6, 8, 9, 20])
def test_ignored_rows_may_hold_anything(impl, device, max_rows: int | None) -> None:
    hidden, weight, bias = (x.to(device) for x in inputs(torch.float32))
    hidden_m, weight_m, bias_m = (x.to(device, torch.float32) for x in teacher())
    target = TARGET.to(device)
    poison = (target == -100)[:, None]
    options = {"impl": impl, "max_rows": max_rows, "alpha": 0.4}
    losses, grads = [], []
    for fill in (0.0, torch.nan):
        loss, grad = with_gradients(
            lambda h, w, b, fill=fill: linear_cross_entropy(
                h, w, target, b,
                teacher=(hidden_m.masked_fill(poison, fill), weight_m, bias_m), **options,
            ),
            (hidden.masked_fill(poison, fill), weight, bias),
        )  # fmt: skip
        losses.append(loss)
        grads.append(grad)
    assert losses[0][0].isfinite()
    assert_same(losses[1], losses[0])
    assert_same(grads[1], grads[0])


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(st.integers(-1, V - 1), max_size=8), seed=st.integers(0, 50))
def test_ignoring_is_dropping(rows: list[int], seed: int) -> None:
    target = torch.tensor(rows, dtype=torch.int64)
    hidden, (_, weight, bias) = make(len(rows), D, seed=seed), inputs()
    kept = target != -1
    whole = linear_cross_entropy(hidden, weight, target, bias, ignore_index=-1, reduction="none")
    part = linear_cross_entropy(hidden[kept], weight, target[kept], bias, reduction="none")
    torch.testing.assert_close(whole[kept], part, rtol=1e-13, atol=1e-13)
    assert (whole[~kept] == 0).all()


def test_leading_dimensions() -> None:
    hidden, weight, bias = inputs()
    hidden_m, weight_m, bias_m = teacher()
    options = {"alpha": 0.3, "reduction": "none"}
    flat = linear_cross_entropy(hidden, weight, TARGET, bias, teacher=teacher(), **options)
    cube = linear_cross_entropy(
        hidden.reshape(3, 3, D), weight, TARGET.reshape(3, 3), bias,
        teacher=(hidden_m.reshape(3, 3, -1), weight_m, bias_m), **options,
    )  # fmt: skip
    assert torch.equal(cube, flat.reshape(3, 3))


@pytest.mark.parametrize(("impl", "device"), ROUTES)
def test_autocast_changes_nothing(impl, device) -> None:
    hidden, weight, bias = (x.to(device).requires_grad_() for x in inputs(torch.float32))
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(hidden, weight, TARGET.to(device), bias, impl=impl)
            # Eager's backward is torch's own: it is taken outside.
            with torch.autocast(device.type, enabled=enabled and impl != "reference"):
                grads = torch.autograd.grad(loss, (hidden, weight, bias))
        results.append((loss.detach(), grads))
    assert_same(results[1], results[0])


@pytest.mark.parametrize(("impl", "device"), ROUTES)
def test_extreme_logits(impl, device) -> None:
    hidden, weight, bias = (x.to(device) for x in inputs(torch.float32))
    target = TARGET.to(device)
    run = lambda impl: with_gradients(
        lambda h, w, b: linear_cross_entropy(h * 1e4, w, target, b, impl=impl),
        (hidden, weight, bias),
    )
    result = run(impl)
    assert all(x.isfinite().all() for x in (*result[0], *result[1]))
    torch.testing.assert_close(result, run("reference"))


@pytest.mark.parametrize(("impl", "device"), ROUTES)
def test_words_may_be_ruled_out_by_the_bias(impl, device) -> None:
    """A bias of -inf, except at a target."""
    hidden, weight, bias = (x.to(device) for x in inputs(torch.float32))
    target = TARGET.to(device)
    kept = torch.isin(torch.arange(V, device=device), target)
    expected = linear_cross_entropy(
        hidden, weight[kept], (kept.cumsum(0) - 1)[target.clamp(min=0)].where(target >= 0, -100),
        bias[kept], impl="reference",
    )  # fmt: skip
    loss = linear_cross_entropy(
        hidden.requires_grad_(), weight, target, bias.masked_fill(~kept, -torch.inf), impl=impl
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(("impl", "device"), ROUTES)
def test_non_contiguous_not_mutated_repeatable(impl, device) -> None:
    hidden, weight, bias = (x.to(device) for x in inputs(torch.float32))
    target = TARGET.to(device)
    strided = (
        hidden.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2],
        target.repeat_interleave(3)[::3],
    )  # fmt: skip
    before = [x.clone() for x in strided]
    call = lambda h, w, b, t: with_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, t, b, impl=impl), (h, w, b)
    )
    first = call(*strided)
    assert_same(call(*strided), first)
    torch.testing.assert_close(first, call(hidden, weight, bias, target))
    assert_same(list(strided), before)


def test_reference_compiles() -> None:
    """The number of kept rows depends on the data, which a compiler must be told to expect."""
    hidden, weight, bias = (x.requires_grad_() for x in inputs(torch.float32))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_compiles(
            linear_cross_entropy, hidden, weight, TARGET, bias, label_smoothing=0.1,
            impl="reference",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": TARGET[:8]}, ValueError, r"target must be hidden's shape .*\(9,\), got \(8,\)"),
        ({"target": TARGET.int()}, TypeError, "target must be int64, got torch.int32"),
        ({"hidden": TARGET[:, None]}, TypeError, "hidden must be floating point"),
        (
            {"weight": torch.zeros(V, D + 1)},
            ValueError,
            r"weight must be \(V, D=5\), got \(13, 6\)",
        ),
        ({"bias": torch.zeros(V + 1)}, ValueError, r"bias must be \(V,\) = \(13,\), got \(14,\)"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"alpha": 0.1}, ValueError, "alpha=0.1 needs a teacher"),
        ({"alpha": 2.0}, ValueError, r"alpha must be in \[0, 1\], got 2.0"),
        (
            {"teacher": (torch.zeros(8, 2), torch.zeros(V, 2), None)},
            ValueError,
            r"teacher\[0\] must be \(9, 'D_m'\), got \(8, 2\)",
        ),
        (
            {"teacher": (torch.zeros(N, 2), torch.zeros(V, 3), None)},
            ValueError,
            r"teacher\[1\] must be \(V, D=2\), got \(13, 3\)",
        ),
        (
            {"teacher": (torch.zeros(N, 2), torch.zeros(V - 1, 2), None)},
            ValueError,
            r"teacher\[1\] must have weight's V=13 rows, got 12",
        ),
        ({"max_rows": -1}, ValueError, "max_rows must be >= 0, got -1"),
        ({"impl": "apex"}, ValueError, "linear_cross_entropy: impl must be 'auto' or one of"),
    ],
)
def test_errors(change: dict, error: type, message: str) -> None:
    hidden, weight, bias = inputs()
    arguments = {"hidden": hidden, "weight": weight, "target": TARGET, "bias": bias} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize(("impl", "device"), routes("reference", "cpp"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_target_out_of_range_is_an_error(impl, device, dtype: torch.dtype) -> None:
    hidden, weight, _ = inputs(dtype)
    for bad in (V, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, torch.full((N,), bad), impl=impl)


@pytest.mark.parametrize(("impl", "device"), routes("triton"))
def test_target_out_of_range_is_nan_where_nobody_waits(impl, device) -> None:
    hidden, weight, bias = (x.to(device) for x in inputs(torch.float32))
    target = torch.tensor([V, 1, -1, 2], device=device)
    for grad in (True, False):
        hidden.requires_grad_(grad)
        loss = linear_cross_entropy(hidden[:4], weight, target, bias, reduction="none", impl=impl)
        assert loss.isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize(("impl", "device"), routes("cpp", "triton"))
def test_more_rows_than_promised_is_an_error(impl, device) -> None:
    if device.type == "cuda":
        pytest.skip("a device-side assertion ends the process's use of the GPU")
    hidden, weight, bias = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="more than max_rows = 5 rows are kept"):
        linear_cross_entropy(hidden, weight, TARGET, bias, max_rows=5, impl=impl)


def test_an_explicit_impl_runs_or_says_why_not() -> None:
    hidden, weight, bias = inputs()
    for impl in ("cpp", "triton"):
        with pytest.raises(NotImplementedError, match=r"got \['torch.float64'\]|no CUDA GPU"):
            linear_cross_entropy(hidden, weight, TARGET, bias, impl=impl)
