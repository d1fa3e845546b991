"""The iterations of IPOT alone, on a given cost, against UNITER's in eager PyTorch."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.ops.bench_transport import setup as _features
from benchmarks.ops.transport_peers import num_pairs, uniter_plan
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import Transport

OP = "transport_cost"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32",)
DIRECTIONS = ("fwd",)
BASELINE = "uniter"


def setup(shape: Transport, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The cosine cost of the features of bench_transport.py."""
    inputs = _features(shape, dtype, device)
    text, image = (
        torch.nn.functional.normalize(inputs[side].detach(), dim=-1) for side in ("text", "image")
    )
    cost = (1 - text @ image.mT).contiguous()
    masks = [inputs["text_mask"], inputs["image_mask"]]
    pads = [
        torch.zeros(f.shape[:2], dtype=torch.bool, device=device) if mask is None else ~mask
        for f, mask in zip((text, image), masks, strict=True)
    ]
    return {"shape": shape, "cost": cost, "masks": masks, "pads": pads}


def _uniter(inputs: Inputs) -> Tensor:
    """The loop of ChenRocks/UNITER, model/ot.py, from its definition."""
    return uniter_plan(inputs["cost"], *inputs["pads"], 0.5, inputs["shape"].iters)


def _own(name: str) -> Run:
    ipot_from_cost = importlib.import_module("vlpfast.ops.transport").ipot_from_cost

    def run(inputs: Inputs) -> object:
        iters = inputs["shape"].iters
        return ipot_from_cost(
            inputs["cost"], *inputs["masks"], iters=iters, return_plan=True, impl=name
        )

    return run


def impls(device: torch.device) -> dict[str, Run]:
    """Ours and UNITER's."""
    op = importlib.import_module("vlpfast.ops.transport")._IPOT_FROM_COST
    ours: dict[str, Run] = {name: _own(name) for name in own_impls(op, device)}
    return {**ours, "uniter": _uniter}


def bytes(shape: Transport, dtype: torch.dtype, direction: str) -> int:
    """Cost read and plan written once, valid pairs only."""
    return 2 * num_pairs(shape) * dtype.itemsize


def flops(shape: Transport, direction: str) -> int:
    """7 operations a pair and step: Q = A T, a product and a sum for each of delta and sigma, two
    products for T."""
    return 7 * num_pairs(shape) * shape.iters
