"""residual_norm against torch's own dropout, sum and LayerNorm, as a BERT or ViT block writes them.

The norm's weight and bias have the dtype of x, which is what torch's kernel takes.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import ResidualNorm

OP = "residual_norm"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("fwd", "bwd", "both")
BASELINE = "torch"


def setup(shape: ResidualNorm, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A branch, the stream it joins, and the norm's parameters."""
    size = (shape.num_tokens, shape.dim)
    tensors = {
        "x": torch.randn(size, dtype=dtype, device=device),
        "residual": torch.randn(size, dtype=dtype, device=device),
        "weight": torch.ones(shape.dim, dtype=dtype, device=device),
        "bias": torch.zeros(shape.dim, dtype=dtype, device=device),
    }
    return {"shape": shape, **{name: t.requires_grad_() for name, t in tensors.items()}}


def _torch(inputs: Inputs) -> tuple[Tensor, Tensor]:
    total = inputs["residual"] + F.dropout(inputs["x"], inputs["shape"].dropout_p)
    dim = inputs["shape"].dim
    return F.layer_norm(total, (dim,), inputs["weight"], inputs["bias"], 1e-6), total


def _apex(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """NVIDIA apex's FusedLayerNorm after torch's dropout and sum."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    total = inputs["residual"] + F.dropout(inputs["x"], inputs["shape"].dropout_p)
    normed = fused_layer_norm_affine(
        total, inputs["weight"], inputs["bias"], (inputs["shape"].dim,), 1e-6
    )
    return normed, total


def _own(name: str) -> Run:
    residual_norm = importlib.import_module("vlpfast.ops.residual_norm").residual_norm

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        tensors = [inputs[k] for k in ("x", "residual", "weight", "bias")]
        return tuple(
            residual_norm(*tensors, dropout_p=inputs["shape"].dropout_p, seed=0, impl=name)
        )

    return run


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, then the peers."""
    op = importlib.import_module("vlpfast.ops.residual_norm")._OP
    ours = {name: _own(name) for name in own_impls(op, device)}
    peers = {"torch": _torch} | ({"apex": _apex} if device.type == "cuda" else {})
    return {**ours, **peers}


def bytes(shape: ResidualNorm, dtype: torch.dtype, direction: str) -> int:
    """Forward: x and residual read, sum and normed written. Backward: the sum and two gradients
    read, one gradient written for x and one for the residual where dropout makes them differ.
    """
    matrix = shape.num_tokens * shape.dim * dtype.itemsize
    forward, backward = 4 * matrix, (4 + (shape.dropout_p > 0)) * matrix
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[direction]


def flops(shape: ResidualNorm, direction: str) -> int:
    """None that counts: it is bound by memory."""
    return 0
