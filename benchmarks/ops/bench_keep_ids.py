"""keep_ids against what the public code does: sort or select noise, anew on every call.

The peers' lines are quoted, because their libraries bury them in a module that gathers patches too.
They draw from torch's generator, so what they keep depends on batch split and world size; `timm`
and `open_clip` give no inverse.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import KeepIds

OP = "keep_ids"
SHAPES = _SHAPES[OP]
DTYPES = ("int64",)
DIRECTIONS = ("fwd",)
# The one peer that gives the same: kept ids and the inverse.
BASELINE = "mae"


def setup(shape: KeepIds, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Global sample ids as a shuffled training stream gives them."""
    ids = torch.randint(0, 5_000_000_000, (shape.batch,), dtype=dtype, device=device)
    return {"shape": shape, "sample_ids": ids}


def _timm(inputs: Inputs) -> Tensor:
    """timm 1.0.31, layers/patch_dropout.py, patch_dropout_forward with its default
    ordered=False."""
    shape, device = inputs["shape"], inputs["sample_ids"].device
    noise = torch.randn(shape.batch, shape.num_patches, device=device)
    return torch.argsort(noise, dim=-1)[:, : shape.num_keep]


def _mae(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """facebookresearch/mae, models_mae.py, random_masking: the kept ids and ids_restore."""
    shape, device = inputs["shape"], inputs["sample_ids"].device
    noise = torch.rand(shape.batch, shape.num_patches, device=device)
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    return ids_shuffle[:, : shape.num_keep], ids_restore


def _open_clip(inputs: Inputs) -> Tensor:
    """open_clip 3.3.0, transformer.py, PatchDropout: drawn and selected on the CPU, then used to
    index on the model's device."""
    shape = inputs["shape"]
    rand = torch.randn(shape.batch, shape.num_patches)
    return rand.topk(shape.num_keep, dim=-1).indices.to(inputs["sample_ids"].device)


def _own(name: str, device: torch.device) -> Run:
    keep_ids = importlib.import_module("vlpfast.ops.keep_ids").keep_ids

    def run(inputs: Inputs) -> object:
        shape = inputs["shape"]
        return keep_ids(
            shape.batch,
            shape.num_patches,
            shape.num_keep,
            seed=0,
            sample_ids=inputs["sample_ids"],
            device=device,
            impl=name,
        )

    return run


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, then the peers."""
    op = importlib.import_module("vlpfast.ops.keep_ids")._OP
    ours = {name: _own(name, device) for name in own_impls(op, device)}
    return {**ours, "mae": _mae, "timm": _timm, "open_clip": _open_clip}


def bytes(shape: KeepIds, dtype: torch.dtype, direction: str) -> int:
    """int64: sample ids (B,) read, ids (B, K) and inverse (B, P) written; the noise never
    exists."""
    return 8 * shape.batch * (1 + shape.num_keep + shape.num_patches)


def flops(shape: KeepIds, direction: str) -> int:
    """None: the work is 32-bit integer hashing and selection."""
    return 0
