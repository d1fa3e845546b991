"""patch_embed against plain PyTorch: pixels normalised as torchvision does it, a convolution, its
positions added, then the kept tokens chosen, as FLIP's ViT drops them.

The parameters have the benchmark's dtype. Images come as uint8 (B, H, W, 3), as they are decoded:
the baseline makes contiguous fp32 planes of them (ToTensor, Normalize), then casts.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import PatchEmbed

OP = "patch_embed"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("fwd", "bwd", "both")
BASELINE = "torch"

# ImageNet's, as ViT is trained.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _num_patches(shape: PatchEmbed) -> int:
    return (shape.image_size // shape.patch_size) ** 2


def setup(shape: PatchEmbed, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Images, kept ids (None where all are kept) and the embedding's parameters."""
    side, p, patches = shape.image_size, shape.patch_size, _num_patches(shape)
    images = torch.randint(0, 256, (shape.batch, side, side, 3), dtype=torch.uint8, device=device)
    ids = None
    if shape.num_keep < patches:
        noise = torch.rand(shape.batch, patches, device=device)
        ids = noise.topk(shape.num_keep).indices.sort().values
    params = {
        "weight": torch.randn(shape.dim, 3, p, p, dtype=dtype, device=device) * 0.02,
        "bias": torch.zeros(shape.dim, dtype=dtype, device=device),
        "pos_embed": torch.randn(patches, shape.dim, dtype=dtype, device=device) * 0.02,
    }
    params = {name: x.requires_grad_() for name, x in params.items()}
    return {"shape": shape, "images": images, "ids": ids, **params}


def _torch(inputs: Inputs) -> Tensor:
    images, weight, ids = inputs["images"], inputs["weight"], inputs["ids"]
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (_MEAN, _STD))
    pixels = images.permute(0, 3, 1, 2).contiguous().float().div(255).sub_(mean).div_(std)
    p = inputs["shape"].patch_size
    tokens = F.conv2d(pixels.to(weight.dtype), weight, inputs["bias"], stride=p)
    tokens = tokens.flatten(2).transpose(1, 2) + inputs["pos_embed"]
    if ids is None:
        return tokens
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def _own(name: str) -> Run:
    patch_embed = importlib.import_module("vlpfast.ops.patch_embed").patch_embed

    def run(inputs: Inputs) -> Tensor:
        tensors = [inputs[k] for k in ("images", "weight", "bias", "pos_embed", "ids")]
        p = inputs["shape"].patch_size
        return patch_embed(*tensors, patch_size=p, mean=_MEAN, std=_STD, impl=name)

    return run


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, then the peer."""
    op = importlib.import_module("vlpfast.ops.patch_embed")._OP
    return {**{name: _own(name) for name in own_impls(op, device)}, "torch": _torch}


def bytes(shape: PatchEmbed, dtype: torch.dtype, direction: str) -> int:
    """Kept pixels and the weights read in both directions; tokens written, their gradient read,
    positions read and their gradient written."""
    area = 3 * shape.patch_size**2
    rows = shape.batch * shape.num_keep
    values = shape.dim * (area + rows + _num_patches(shape))
    once = rows * area + values * dtype.itemsize
    return 2 * once if direction == "both" else once


def flops(shape: PatchEmbed, direction: str) -> int:
    """One product of kept pixels and weights in each direction."""
    once = 2 * shape.batch * shape.num_keep * shape.dim * 3 * shape.patch_size**2
    return 2 * once if direction == "both" else once
