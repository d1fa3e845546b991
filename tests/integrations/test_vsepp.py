"""VSE++'s ContrastiveLoss against its formula, written with loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.integrations.vsepp import ContrastiveLoss
from vlpfast.testing import with_gradients


def pair(B: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B)
    x = torch.randn(2, B, 6, generator=generator, dtype=torch.float64)
    # A sentence is near its image, as after some training, so that not every negative violates.
    return F.normalize(x[0], dim=1).to(dtype), F.normalize(x[0] + 0.9 * x[1], dim=1).to(dtype)


def formula(im: Tensor, s: Tensor, margin: float, max_violation: bool, ids: list[int]) -> Tensor:
    """The hinge of each query's negatives: their maximum or sum, summed over the queries."""
    B, total = len(ids), im.new_zeros(())
    for query in range(B):
        own = im[query] @ s[query]
        negatives = [j for j in range(B) if ids[j] != ids[query]]
        for scores in (
            [im[query] @ s[j] for j in negatives],
            [im[j] @ s[query] for j in negatives],
        ):
            costs = [(margin + score - own).clamp(min=0) for score in scores]
            if costs:
                total = total + (max(costs) if max_violation else sum(costs))
    return total


@pytest.mark.parametrize("B", [1, 2, 13])
@pytest.mark.parametrize("margin", [0, 0.2])
@pytest.mark.parametrize("max_violation", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_formula(B: int, margin: float, max_violation: bool, dtype: torch.dtype) -> None:
    inputs = pair(B)
    truth, grads = with_gradients(
        lambda im, s: formula(im, s, margin, max_violation, list(range(B))), inputs
    )
    loss = ContrastiveLoss(margin, "cosine", max_violation)
    ours, our_grads = with_gradients(loss, pair(B, dtype))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    assert truth[0] > 0 or B < 13
    torch.testing.assert_close(ours[0].double(), truth[0], **tolerance)
    for one, other in zip(our_grads, grads, strict=True):
        other = torch.zeros_like(inputs[0]) if other is None else other
        torch.testing.assert_close(one.double(), other, **tolerance)


def test_defaults() -> None:
    """VSE++'s class defaults: margin 0, cosine, all negatives; summed over the batch."""
    im, s = pair(13)
    expected = formula(im, s, 0, False, list(range(13)))
    torch.testing.assert_close(ContrastiveLoss()(im, s), expected)


def test_captions_of_one_image_are_no_negatives() -> None:
    im, s = pair(13)
    ids = [0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9]
    ours = ContrastiveLoss(0.2, max_violation=True)(im, s, torch.tensor(ids))
    torch.testing.assert_close(ours, formula(im, s, 0.2, True, ids))


def test_bad_input() -> None:
    with pytest.raises(NotImplementedError, match="measure='order'"):
        ContrastiveLoss(measure="order")
    with pytest.raises(ValueError, match="measure must be"):
        ContrastiveLoss(measure="euclidean")
    with pytest.raises(ValueError, match="one shape"):
        ContrastiveLoss()(torch.ones(3, 2), torch.ones(4, 2))
