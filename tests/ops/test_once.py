"""What holds for the derivatives of every fused op: gradients of gradients are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlpfast import _ext, ops
from vlpfast.testing import assert_compiles

pytestmark = pytest.mark.skipif(_ext.cpp_missing() is not None, reason=f"cpp: {_ext.cpp_missing()}")


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.1


OTHER, VECTOR, VOCABULARY, TARGETS = draw(4, 8), draw(8), draw(5, 8), draw(2, 4, 8)
IMAGES = (draw(2, 8, 8, 3) * 255).to(torch.uint8)
TARGET = torch.tensor([1, 0, 4])
MATCHED = torch.tensor([True, False])
PIXELS = {"patch_size": 4, "mean": [0.5] * 3, "std": [0.5] * 3}

# A scalar of one floating tensor by an implementation, and that tensor.
CASES: dict[str, tuple[Callable[[Tensor, str], Tensor], Tensor]] = {
    "contrastive_loss": (
        lambda x, impl: ops.contrastive_loss(x, OTHER, 2.0, impl=impl).loss,
        draw(4, 8),
    ),
    "hinge_loss": (lambda x, impl: ops.hinge_loss(x, OTHER, impl=impl), draw(4, 8)),
    "attention": (
        lambda x, impl: ops.attention(x, x, x, impl=impl).square().sum(),
        draw(2, 3, 2, 8),
    ),
    "bias_gelu": (lambda x, impl: ops.bias_gelu(x, VECTOR, impl=impl).square().sum(), draw(4, 8)),
    "residual_norm": (
        lambda x, impl: ops.residual_norm(x, weight=VECTOR, impl=impl).normed.square().sum(),
        draw(4, 8),
    ),
    "linear_cross_entropy": (
        lambda x, impl: ops.linear_cross_entropy(x, VOCABULARY, TARGET, impl=impl),
        draw(3, 8),
    ),
    "patch_embed": (
        lambda x, impl: ops.patch_embed(IMAGES, x, None, impl=impl, **PIXELS).square().sum(),
        draw(8, 3, 4, 4),
    ),
    "ipot": (
        lambda x, impl: ops.ipot(x, TARGETS, impl=impl).distance.sum(),
        draw(2, 3, 8),
    ),
    "ipot_from_cost": (
        lambda x, impl: ops.ipot_from_cost(x, impl=impl).distance.square().sum(),
        draw(2, 3, 4),
    ),
    "sinkhorn": (
        lambda x, impl: ops.sinkhorn(x, eps=0.5, impl=impl).value.square().sum(),
        draw(2, 3, 4),
    ),
    "wra_loss": (
        lambda x, impl: ops.wra_loss(x, TARGETS, None, None, MATCHED, impl=impl),
        draw(2, 3, 8),
    ),
}
each = pytest.mark.parametrize("name", CASES)


def gradient(name: str, impl: str, **options: object) -> tuple[Tensor, Tensor]:
    """The case's tensor, and the gradient in it."""
    function, x = CASES[name]
    x = x.clone().requires_grad_()
    return x, torch.autograd.grad(function(x, impl), x, **options)[0]


@each
def test_gradients_of_gradients_are_refused(name):
    with pytest.raises(RuntimeError, match=rf"vlpfast\.ops\.{name}: gradients of gradients"):
        gradient(name, "cpp", create_graph=True)


@each
def test_the_reference_has_gradients_of_gradients(name):
    _, first = gradient(name, "reference", create_graph=True)
    torch.testing.assert_close(first, gradient(name, "cpp")[1], rtol=1e-3, atol=1e-4)
    if name != "hinge_loss":  # piecewise linear: its gradient is a constant
        assert first.requires_grad


def test_the_plan_of_sinkhorn_is_differentiated_once():
    cost = draw(1, 3, 4).requires_grad_()
    plan = ops.sinkhorn(cost, eps=0.5, return_plan=True, impl="reference").plan
    with pytest.raises(RuntimeError, match="its plan is differentiated once"):
        torch.autograd.grad(plan.square().sum(), cost, create_graph=True)


@each
def test_compiled_and_checkpointed_gradients(name):
    function, x = CASES[name]
    assert_compiles(lambda x: function(x, "cpp"), x.clone().requires_grad_())
    _, plain = gradient(name, "cpp")
    for reentrant in (False, True):
        again = x.clone().requires_grad_()
        checkpoint(function, again, "cpp", use_reentrant=reentrant).backward()
        torch.testing.assert_close(again.grad, plain)


@pytest.mark.parametrize("name", ["bias_gelu", "residual_norm", "contrastive_loss"])
def test_the_reference_takes_function_transforms(name):
    function, x = CASES[name]
    got = torch.func.grad(lambda x: function(x, "reference"))(x)
    torch.testing.assert_close(got, gradient(name, "reference")[1])
