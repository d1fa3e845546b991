"""linear_cross_entropy against torch's cross-entropy on whole logits and ALBEF's distillation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlpfast.ops.linear_cross_entropy import linear_cross_entropy
from vlpfast.testing import assert_compiles, assert_same, assert_within_budget, with_gradients

N, D, V = 9, 5, 13  # V odd, as 30522 + 1 would be
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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored_is_zero(reduction: str) -> None:
    for rows in (0, 4):
        hidden, weight, bias = (x.requires_grad_() for x in inputs())
        target = torch.full((rows,), -100)
        loss = linear_cross_entropy(hidden[:rows], weight, target, bias, reduction=reduction)
        loss.backward()
        assert loss == 0
        for x in (hidden, weight, bias):
            assert torch.equal(x.grad, torch.zeros_like(x))


def test_ignored_rows_may_hold_anything() -> None:
    hidden, weight, bias = inputs()
    expected = linear_cross_entropy(hidden, weight, TARGET, bias)
    poisoned = hidden.masked_fill((TARGET == -100)[:, None], torch.nan).requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, TARGET, bias)
    loss.backward()
    assert loss == expected
    assert poisoned.grad.isfinite().all()


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


def test_bfloat16_and_autocast() -> None:
    hidden, weight, bias = inputs(torch.bfloat16)
    loss = lambda h, w, b: linear_cross_entropy(h, w, TARGET, b)
    (output,), grads = with_gradients(loss, (hidden, weight, bias))
    (truth,), exact = with_gradients(loss, [x.double() for x in (hidden, weight, bias)])
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), truth, rtol=1e-6, atol=0)
    for grad, true_grad in zip(grads, exact, strict=True):
        assert_within_budget(grad, true_grad, true_grad.to(torch.bfloat16))
    single = [x.float() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_cross_entropy(single[0], single[1], TARGET, single[2])
    assert inside == linear_cross_entropy(single[0], single[1], TARGET, single[2])


def test_extreme_logits() -> None:
    hidden, weight, bias = (x.requires_grad_() for x in inputs(torch.float32))
    loss = linear_cross_entropy(hidden * 1e4, weight, TARGET, bias)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


def test_non_contiguous_not_mutated_repeatable() -> None:
    hidden, weight, bias = inputs(torch.float32)
    strided = (hidden.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2])
    before = [x.clone() for x in strided]
    call = lambda: linear_cross_entropy(strided[0], strided[1], TARGET, strided[2])
    assert_same(call(), call())
    torch.testing.assert_close(call(), linear_cross_entropy(hidden, weight, TARGET, bias))
    assert_same(list(strided), before)


def test_compiles() -> None:
    """The number of kept rows depends on the data, which a compiler must be told to expect."""
    hidden, weight, bias = (x.requires_grad_() for x in inputs(torch.float32))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_compiles(linear_cross_entropy, hidden, weight, TARGET, bias, label_smoothing=0.1)


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
        ({"impl": "apex"}, ValueError, "linear_cross_entropy: impl must be 'auto' or one of"),
    ],
)
def test_errors(change: dict, error: type, message: str) -> None:
    hidden, weight, bias = inputs()
    arguments = {"hidden": hidden, "weight": weight, "target": TARGET, "bias": bias} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_target_out_of_range_is_an_error() -> None:
    hidden, weight, _ = inputs()
    for bad in (V, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, torch.full((N,), bad))
