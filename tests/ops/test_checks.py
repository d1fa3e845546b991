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
