"""What open_clip's tests of its chunked SigLIP loss check, in our own words.

Its chunk is an argument, ours is the op's own business: batches are chosen on both sides of every
power of two that a chunk may have. A block of texts without a positive ("negative only"), which
its ranks exchange, is a queue to ours.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests._peers import open_clip_losses
from vlpfast.ops.contrastive import contrastive_loss
from vlpfast.testing import with_gradients

D = 32
# 70: its uneven case, no multiple of 64, 32 or 8.
BATCHES = [1, 7, 8, 9, 31, 33, 63, 64, 65, 70, 128, 129, 257]
FP32 = {"rtol": 1e-5, "atol": 1e-5}


def unit(B: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(B, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def inputs(B: int) -> tuple[Tensor, ...]:
    return unit(B, 1), unit(B, 2), torch.tensor(10.0), torch.tensor(-10.0)


def ours(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return contrastive_loss(image, text, scale, bias, kind="sigmoid").loss


@pytest.mark.parametrize("B", BATCHES)
def test_forward_and_backward(B: int) -> None:
    loss, grads = with_gradients(ours, inputs(B))
    peer, peer_grads = with_gradients(open_clip_losses().SigLipLoss(), inputs(B))
    torch.testing.assert_close(loss, peer, **FP32)
    torch.testing.assert_close(grads, peer_grads, **FP32)


@pytest.mark.parametrize(("B", "K"), [(70, 70), (64, 1), (33, 129), (1, 65)])
def test_negative_only_block(B: int, K: int) -> None:
    """Images against their own texts and a block of others: the sum of both parts, and of their
    gradients (the block is a constant, as what another rank sent is until the backward)."""
    peer = open_clip_losses().SigLipLoss()
    block = unit(K, 3)

    def theirs(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        negatives = F.softplus(scale * image @ block.T + bias).sum() / B
        if K == B:
            part = peer._loss(image, block, scale, bias, negative_only=True)
            torch.testing.assert_close(part, negatives)
        mean = peer._loss(image, text, scale, bias)
        # The op's loss is the mean of both directions; the other has no block here.
        return mean + negatives / 2

    def mine(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return contrastive_loss(image, text, scale, bias, kind="sigmoid", text_keys=block).loss

    loss, grads = with_gradients(mine, inputs(B))
    peer_loss, peer_grads = with_gradients(theirs, inputs(B))
    torch.testing.assert_close(loss, peer_loss, **FP32)
    torch.testing.assert_close(grads, peer_grads, **FP32)


@pytest.mark.parametrize("B", [64, 70])
def test_same_input_same_bits(B: int) -> None:
    one, other = (with_gradients(ours, inputs(B)) for _ in range(2))
    assert torch.equal(one[0][0], other[0][0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_no_gradient_asked_for() -> None:
    """Evaluation, and a frozen tower."""
    image, text, scale, bias = inputs(70)
    loss, grads = with_gradients(ours, inputs(70))
    with torch.no_grad():
        assert torch.equal(ours(image, text, scale, bias), loss[0])
    text.requires_grad_()
    (grad,) = torch.autograd.grad(ours(image, text, scale, bias), text)
    torch.testing.assert_close(grad, grads[1], **FP32)
