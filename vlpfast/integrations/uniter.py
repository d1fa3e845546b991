"""UNITER's and ViLT's word-region alignment under their own names, on `ops.ipot`.

Padding is True, as in their code (`ops.ipot` masks the opposite way). Letters: M = text tokens,
N = image tokens of one pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast import ops


def optimal_transport_dist(
    txt_emb: Tensor,
    img_emb: Tensor,
    txt_pad: Tensor,
    img_pad: Tensor,
    beta: float = 0.5,
    iteration: int = 50,
    k: int = 1,
) -> Tensor:
    """Transport distance of each text to its image under cosine cost; the plan is a constant.

    The recurrence is in `ops.ipot`. Where UNITER's function differs: it fails on uint8 pads and for
    k > 1 with current torch, and its small beta loses the plan in fp32; this one does not. A pair
    with nothing but padding on one side has distance 0 in both.

    Args:
        txt_emb (B, M, D): text features after fusion, fp32/bf16/fp16/fp64.
        img_emb (B, N, D): image features.
        txt_pad (B, M): True (or 1) on padding, bool or uint8.
        img_pad (B, N): the same for the image.
        beta: step size, > 0.
        iteration: proximal steps.
        k: scaling steps inside each.

    Returns:
        (B,), fp32 (fp64 for fp64 features).

    Source: Chen et al. 2020 (UNITER), sec. 3.2, arXiv:1909.11740, model/ot.py; Kim et al. 2021
        (ViLT), arXiv:2102.03334, vilt/modules/objectives.py.
    """
    text_mask, image_mask = ~_pad("txt_pad", txt_pad), ~_pad("img_pad", img_pad)
    return ops.ipot(
        txt_emb, img_emb, text_mask, image_mask, beta=beta, iters=iteration, inner=k
    ).distance


def cost_matrix_cosine(x: Tensor, y: Tensor, eps: float = 1e-5) -> Tensor:
    """1 - <x_i, y_j> / (max(|x_i|, eps) max(|y_j|, eps)) of every pair, differentiable.

    Args:
        x (B, M, D): features.
        y (B, N, D): features.
        eps: norms below it count as it, > 0.

    Returns:
        (B, M, N), fp32 (fp64 for fp64 features), also under autocast.

    Source: model/ot.py of UNITER (Chen et al. 2020, arXiv:1909.11740).
    """
    if x.dim() != 3 or y.dim() != 3 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(
            f"x and y must be (B, M, D) and (B, N, D), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, y = F.normalize(x.to(dtype), dim=-1, eps=eps), F.normalize(y.to(dtype), dim=-1, eps=eps)
        return 1 - x @ y.mT


def trace(x: Tensor) -> Tensor:
    """Sum of the diagonal of each matrix: x (B, M, M) to (B,).

    Source: model/ot.py of UNITER (Chen et al. 2020, arXiv:1909.11740).
    """
    if x.dim() != 3 or x.shape[1] != x.shape[2]:
        raise ValueError(f"x must be (B, M, M), got {tuple(x.shape)}")
    return x.diagonal(dim1=1, dim2=2).sum(1)


@torch.no_grad()
def ipot(
    C: Tensor,
    x_len: Tensor,
    x_pad: Tensor,
    y_len: Tensor,
    y_pad: Tensor,
    joint_pad: Tensor,
    beta: float,
    iteration: int,
    k: int,
) -> Tensor:
    """The transport plan of a given cost, TRANSPOSED as UNITER returns it.

    For code that builds its own cost, on `ops.ipot_from_cost`. From features,
    `optimal_transport_dist` and `ops.ipot` need no cost in memory.

    Args:
        C (B, M, N): cost.
        x_len (B,): number of unpadded rows; must be what `x_pad` says, which is what is used.
        x_pad (B, M): True on padding, bool or uint8.
        y_len (B,): number of unpadded columns, likewise.
        y_pad (B, N): True on padding.
        joint_pad (B, M, N): x_pad or y_pad, likewise.
        beta: step size, > 0.
        iteration: proximal steps.
        k: scaling steps inside each.

    Returns:
        (B, N, M): the plan, 0 on padding, without gradient.

    Source: model/ot.py of UNITER (Chen et al. 2020, arXiv:1909.11740); Xie et al. 2018 (IPOT),
        alg. 1, arXiv:1802.04307.
    """
    if C.dim() != 3 or not C.is_floating_point():
        raise ValueError(f"C must be (B, M, N), floating point, got {tuple(C.shape)} {C.dtype}")
    B, M, N = C.shape
    shapes = {
        "x_len": (x_len, (B,)),
        "x_pad": (x_pad, (B, M)),
        "y_len": (y_len, (B,)),
        "y_pad": (y_pad, (B, N)),
        "joint_pad": (joint_pad, (B, M, N)),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor.shape != expected:
            raise ValueError(f"{name} must be {expected} for C's shape, got {tuple(tensor.shape)}")
    for name, value in (("beta", beta), ("iteration", iteration), ("k", k)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    x_mask, y_mask = ~_pad("x_pad", x_pad), ~_pad("y_pad", y_pad)
    return ops.ipot_from_cost(
        C, x_mask, y_mask, beta=beta, iters=iteration, inner=k, return_plan=True
    ).plan.mT


def _pad(name: str, pad: Tensor) -> Tensor:
    """`pad` as bool: old code holds it as uint8, which ~ would turn into 255 and 254."""
    if pad.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{name} must be bool or uint8 (True or 1 on padding), got {pad.dtype}")
    return pad.bool()
