"""bias_gelu against torch's own sum, GELU and dropout."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import BiasGelu

OP = "bias_gelu"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("fwd", "bwd", "both")
BASELINE = "torch"


def setup(shape: BiasGelu, dtype: torch.dtype, device: torch.device) -> Inputs:
    """What the first matrix of an MLP gives, and its bias."""
    x = torch.randn(shape.num_tokens, shape.dim, dtype=dtype, device=device)
    bias = torch.randn(shape.dim, dtype=dtype, device=device)
    return {"shape": shape, "x": x.requires_grad_(), "bias": bias.requires_grad_()}


def _torch(inputs: Inputs) -> Tensor:
    return F.dropout(F.gelu(inputs["x"] + inputs["bias"]), inputs["shape"].dropout_p)


def _own(name: str) -> Run:
    bias_gelu = importlib.import_module("vlpfast.ops.bias_gelu").bias_gelu

    def run(inputs: Inputs) -> Tensor:
        dropout_p = inputs["shape"].dropout_p
        return bias_gelu(inputs["x"], inputs["bias"], dropout_p=dropout_p, seed=0, impl=name)

    return run


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, then torch."""
    op = importlib.import_module("vlpfast.ops.bias_gelu")._OP
    return {**{name: _own(name) for name in own_impls(op, device)}, "torch": _torch}


def bytes(shape: BiasGelu, dtype: torch.dtype, direction: str) -> int:
    """Forward: x read, the result written. Backward: x and a gradient read, one written."""
    matrix = shape.num_tokens * shape.dim * dtype.itemsize
    return {"fwd": 2 * matrix, "bwd": 3 * matrix, "both": 5 * matrix}[direction]


def flops(shape: BiasGelu, direction: str) -> int:
    """None that counts: it is bound by memory."""
    return 0
