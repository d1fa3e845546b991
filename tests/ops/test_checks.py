"""What every public op says of arguments that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlpfast import ops


def draw(*shape: int, device: str = "cpu") -> Tensor:
    return torch.rand(shape, device=device)


X, Q, TOKENS = draw(4, 8), draw(2, 3, 2, 8), draw(2, 3, 8)
IMAGES = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
PATCH = {"patch_size": 4, "mean": [0.5] * 3, "std": [0.5] * 3}
KERNEL = draw(8, 3, 4, 4)
TARGET = torch.tensor([1, 0, 4, 2])
IDS = torch.arange(4)
SPANS = torch.tensor([3, 2], dtype=torch.int32)


def lost(x: Tensor) -> Tensor:
    """`x` without its memory."""
    return x.to("meta")


# (name in the message, call with that argument on another device)
DEVICES = [
    ("text", lambda: ops.contrastive_loss(X, lost(X), 2.0)),
    ("text_keys", lambda: ops.contrastive_loss(X, X, 2.0, text_keys=lost(X))),
    ("image_keys", lambda: ops.contrastive_loss(X, X, 2.0, image_keys=lost(X))),
    ("teacher[1]", lambda: ops.contrastive_loss(X, X, 2.0, teacher=(X, lost(X)), alpha=0.5)),
    ("text", lambda: ops.hinge_loss(X, lost(X))),
    ("ids", lambda: ops.hinge_loss(X, X, ids=lost(IDS))),
    ("weight", lambda: ops.linear_cross_entropy(X, lost(X), TARGET % 4)),
    ("target", lambda: ops.linear_cross_entropy(X, X, lost(TARGET % 4))),
    ("bias", lambda: ops.linear_cross_entropy(X, X, TARGET % 4, lost(X[:, 0]))),
    (
        "teacher[1]",
        lambda: ops.linear_cross_entropy(X, X, TARGET % 4, teacher=(X, lost(X), None), alpha=0.5),
    ),
    ("k", lambda: ops.attention(Q, lost(Q), Q)),
    ("v", lambda: ops.attention(Q, Q, lost(Q))),
    ("bias", lambda: ops.attention(Q, Q, Q, bias=draw(2, 3, 3, device="meta"))),
    ("k_lens", lambda: ops.attention(Q, Q, Q, k_lens=lost(SPANS))),
    ("q_block", lambda: ops.attention(Q, Q, Q, q_block=lost(SPANS[:, None].expand(2, 3)))),
    ("residual", lambda: ops.residual_norm(X, lost(X))),
    ("weight", lambda: ops.residual_norm(X, weight=lost(X[0]))),
    ("bias", lambda: ops.bias_gelu(X, lost(X[0]))),
    ("weight", lambda: ops.patch_embed(IMAGES, lost(KERNEL), None, **PATCH)),
    ("pos_embed", lambda: ops.patch_embed(IMAGES, KERNEL, None, lost(X), **PATCH)),
    ("ids", lambda: ops.patch_embed(IMAGES, KERNEL, None, None, lost(IDS.view(2, 2)), **PATCH)),
    ("y", lambda: ops.ipot(TOKENS, lost(TOKENS))),
    ("b", lambda: ops.sinkhorn(TOKENS, None, lost(draw(2, 8)), eps=0.5)),
    (
        "matched",
        lambda: ops.wra_loss(TOKENS, TOKENS, None, None, lost(torch.tensor([True, False]))),
    ),
]


@pytest.mark.parametrize(
    ("name", "call"), DEVICES, ids=[f"{i}-{n}" for i, (n, _) in enumerate(DEVICES)]
)
def test_one_device_for_all(name, call):
    with pytest.raises(ValueError) as error:
        call()
    assert f"{name} must be on cpu as the others, got meta" in str(error.value)


UNIFORM, COST = torch.full((2, 3), 1 / 3), draw(2, 3, 8)
MESSAGES = [
    (ValueError, r"teacher must be \(image, text\), got 3",
     lambda: ops.contrastive_loss(X, X, 2.0, teacher=(X, X, X), alpha=0.5)),
    (ValueError, r"teacher must be \(hidden_m, weight_m\) or .*got 1",
     lambda: ops.linear_cross_entropy(X, X, TARGET % 4, teacher=(X,), alpha=0.5)),
    (TypeError, "num_keep must be an int, got 4.5", lambda: ops.keep_ids(2, 9, 4.5, seed=1)),
    (TypeError, "iters must be an int, got 5.0", lambda: ops.ipot(TOKENS, TOKENS, iters=5.0)),
    (TypeError, "hard_negatives must be an int, got 1.0",
     lambda: ops.contrastive_loss(X, X, 2.0, hard_negatives=1.0, seed=1)),
    (TypeError, "max_rows must be an int, got 2.0",
     lambda: ops.linear_cross_entropy(X, X, TARGET % 4, max_rows=2.0)),
    (TypeError, "seed must be an int, got 1.9", lambda: ops.keep_ids(2, 9, 4, seed=1.9)),
    (TypeError, "seed must be an int, got 1.9",
     lambda: ops.contrastive_loss(X, X, 2.0, hard_negatives=1, seed=1.9)),
    (TypeError, "bias_gelu: seed must be an int, got 1.9",
     lambda: ops.bias_gelu(X, dropout_p=0.5, seed=1.9)),
    (TypeError, "attention: seed must be an int .*float32",
     lambda: ops.attention(Q, Q, Q, dropout_p=0.5, seed=torch.tensor(1.9))),
    (ValueError, "patch_size must be >= 1, got 0",
     lambda: ops.patch_embed(IMAGES, KERNEL, None, **(PATCH | {"patch_size": 0}))),
    (TypeError, "ids must be a tensor .*got KeepIds",
     lambda: ops.patch_embed(IMAGES, KERNEL, None, ids=ops.keep_ids(2, 4, 2, seed=1), **PATCH)),
    (ValueError, "a must be >= 0, got -0.3",
     lambda: ops.sinkhorn(COST, -UNIFORM, eps=0.5)),
    (ValueError, "one sum .*got 3 and 1 in problem 0",
     lambda: ops.sinkhorn(COST, torch.ones(2, 3), eps=0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), MESSAGES)
def test_wrong_arguments_are_named(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_weights_that_sinkhorn_takes():
    for a in (UNIFORM.bfloat16(), UNIFORM.clone().index_fill_(0, torch.tensor([1]), 0)):
        assert ops.sinkhorn(COST, a, eps=0.5).value.isfinite().all()
    for options in ({"tau_a": 1.0}, {"dustbin": 0.5}):
        ops.sinkhorn(COST, torch.ones(2, 3), eps=0.5, **options)


def test_a_teacher_without_bias():
    run = lambda teacher: ops.linear_cross_entropy(X, X, TARGET % 4, teacher=teacher, alpha=0.5)
    assert torch.equal(run((X, X)), run((X, X, None)))


@pytest.mark.parametrize("impl", ["auto", "folded", "reference"])
@pytest.mark.parametrize("ids", [None, torch.zeros(0, 2, dtype=torch.int64)])
def test_patches_of_no_image(impl, ids):
    kernel = KERNEL.clone().requires_grad_()
    tokens = ops.patch_embed(IMAGES[:0], kernel, None, None, ids, impl=impl, **PATCH)
    assert tokens.shape == (0, 4 if ids is None else 2, 8)
    tokens.sum().backward()
    assert torch.equal(kernel.grad, torch.zeros_like(kernel))
