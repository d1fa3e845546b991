"""The test helpers themselves: what must fail does."""

from __future__ import annotations

import pytest
import torch

from vlpfast.testing import (
    assert_compiles,
    assert_same,
    assert_within_budget,
    poisoned_allocations,
    with_gradients,
)


def test_budget_accepts_rounding_and_rejects_more():
    truth = torch.linspace(1, 2, 9, dtype=torch.float64)
    eager = truth.bfloat16()
    worst = (eager.double() - truth).abs().max() + torch.finfo(torch.bfloat16).eps * 2
    assert_within_budget(eager, truth, eager)
    assert_within_budget((truth + 1.7 * worst).bfloat16(), truth, eager)
    with pytest.raises(AssertionError, match=r"loss: error .* over 2\.0"):
        assert_within_budget((truth + 2.6 * worst).bfloat16(), truth, eager, name="loss")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_budget_rejects_what_is_not_finite(bad):
    truth = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1, bad, 1]), truth, torch.ones(3))
    truth[1] = bad
    assert_within_budget(torch.tensor([1, bad, 1]), truth, torch.tensor([1, bad, 1]))
    with pytest.raises(AssertionError, match="where the truth is not finite"):
        assert_within_budget(torch.ones(3), truth, torch.ones(3))


def test_budget_rejects_another_dtype_or_shape():
    truth = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"dtype torch\.float16"):
        assert_within_budget(torch.ones(3).half(), truth, torch.ones(3))
    with pytest.raises(AssertionError, match="shapes"):
        assert_within_budget(torch.ones(2), truth, torch.ones(3))


def test_gradients_come_beside_outputs():
    x, index = torch.tensor([1.0, 2.0]), torch.tensor([0])
    outputs, (grad,) = with_gradients(lambda x, i: (x.square(), i), [x, index], torch.ones(2) * 3)
    assert_same(list(outputs), [x.square(), index])
    assert_same(grad, 6 * x)


def test_compile_check_finds_a_graph_break_and_a_difference():
    def breaks(x):
        print(x.sum().item())
        return x + 1

    def differs(x):
        return x + (1 if torch.compiler.is_compiling() else 2)

    x = torch.randn(3, requires_grad=True)
    assert_compiles(torch.sin, x)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        assert_compiles(breaks, x)
    with pytest.raises(AssertionError, match="leaf 0"):
        assert_compiles(differs, x)


def test_uninitialised_memory_is_poisoned(monkeypatch):
    # The fixture poisons what the library's own modules allocate.
    monkeypatch.setitem(globals(), "__name__", "vlpfast.pretended")
    assert torch.empty(4).isnan().all()
    assert torch.ones(4).new_empty(4).isnan().all()
    assert (torch.empty(4, dtype=torch.int32) > 10**9).all()
    with poisoned_allocations():
        assert torch.ops.aten.empty.memory_format([3], dtype=torch.float32).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
