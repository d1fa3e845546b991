"""Word-region alignment, the whole loss on features, against UNITER's recurrence in eager PyTorch.

Our forward writes the features' gradients, so that its backward has next to nothing to do: `both`
is the row to compare.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.ops.transport_peers import masks, num_pairs, uniter_distance
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import Transport

OP = "transport"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("fwd", "bwd", "both")
BASELINE = "uniter"


def setup(shape: Transport, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Features around 12 prototypes, as tokens of pictures are; half of the pairs match."""
    B, T, R, D = shape.batch, shape.text_len, shape.num_regions, shape.dim
    prototypes = torch.randn(12, D)
    features = [
        prototypes[torch.randint(0, 12, (B, length))] + torch.randn(B, length, D)
        for length in (T, R)
    ]
    text, image = (f.to(device, dtype).requires_grad_() for f in features)
    text_mask, image_mask = masks(shape, device)
    return {
        "shape": shape,
        "text": text,
        "image": image,
        "text_mask": text_mask,
        "image_mask": image_mask,
        "matched": (torch.arange(B) % 2 == 0).to(device),
    }


def _uniter(inputs: Inputs) -> Tensor:
    """ChenRocks/UNITER, model/ot.py and pretrain.py, from the definition: pads as there, the
    distance as a sum of products (a trace of a matrix product there)."""
    text, image, matched = inputs["text"], inputs["image"], inputs["matched"]
    pads = [
        torch.zeros(f.shape[:2], dtype=torch.bool, device=f.device) if mask is None else ~mask
        for f, mask in ((text, inputs["text_mask"]), (image, inputs["image_mask"]))
    ]
    distance = uniter_distance(text, image, *pads, 0.5, inputs["shape"].iters)
    return torch.where(matched, distance, -distance).sum() * (0.1 / len(matched))


def _own(name: str) -> Run:
    wra_loss = importlib.import_module("vlpfast.ops.transport").wra_loss

    def run(inputs: Inputs) -> object:
        return wra_loss(
            inputs["text"],
            inputs["image"],
            inputs["text_mask"],
            inputs["image_mask"],
            inputs["matched"],
            iters=inputs["shape"].iters,
            impl=name,
        )

    return run


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, then UNITER's, also compiled on a GPU."""
    op = importlib.import_module("vlpfast.ops.transport")._WRA
    ours: dict[str, Run] = {name: _own(name) for name in own_impls(op, device)}
    peers: dict[str, Run] = {"uniter": _uniter}
    if device.type == "cuda":
        peers["uniter_compiled"] = torch.compile(_uniter)
    return {**ours, **peers}


def bytes(shape: Transport, dtype: torch.dtype, direction: str) -> int:
    """Features read once; the backward reads them and writes as much."""
    features = shape.batch * (shape.text_len + shape.num_regions) * shape.dim * dtype.itemsize
    return features * (1 if direction == "fwd" else 2)


def flops(shape: Transport, direction: str) -> int:
    """The cost's product and, a step, 7 operations a pair (Q, two sums, the plan); twice the
    product for the gradients. Valid pairs only."""
    product = 2 * num_pairs(shape) * shape.dim
    forward = product + 7 * num_pairs(shape) * shape.iters
    return {"fwd": forward, "bwd": 2 * product, "both": forward + 2 * product}[direction]
