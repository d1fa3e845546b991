"""Patch embedding from raw pixels: only kept patches are read, normalising is in the projection.

The "folded" implementation is here, the fused ones are in `_patch_embed_fused.py`; the eager oracle
is `reference/patch_embed.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from vlpfast import _ext
from vlpfast.ops._checks import check_devices, check_integers
from vlpfast.ops._dispatch import Implementation, Op
from vlpfast.ops._patch_embed_fused import fused, fused_rejects, product_dtype
from vlpfast.ops.reference import patch_embed as reference


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    layout: Literal["hwc", "chw"] = "hwc",
    impl: str = "auto",
) -> Tensor:
    """Embeds the patches of images, all or the kept ones: conv((x / 255 - mean) / std) + pos_embed.

    With W' = weight / (255 std) and centred pixels, the same number is

        (x - 128) W' + [bias + sum over the patch of (128 - 255 mean) W'] + pos_embed

    x - 128 is exact in bf16, which a normalised pixel is not; the bracket sums W' as rounded for
    the product.

    Args:
        images (B, H, W, 3) or, with layout "chw", (B, 3, H, W): uint8, or floating point in 0..255.
        weight (D, 3, P, P): kernel of a convolution with stride P.
        bias (D,): its bias, or None.
        pos_embed (patches, D): position of each patch in raster order, or None.
        ids (B, K): int64, patches to keep, numbered in raster order, K up to their number; None
            keeps all. Out of range is an error: here on a CPU, of the device on a GPU.
        patch_size: P in pixels; must divide H and W.
        mean: of R, G, B on the scale 0..1.
        std: of R, G, B on the scale 0..1.
        layout: order of the dimensions of `images`.
        impl: "auto", "reference" (normalise, convolve, then choose), "folded" (choose, then one
            matrix product), "cpp" or "triton" (the same, fused: uint8, fp32 or bf16 images that
            need no gradient, fp32 or bf16 parameters).

    Returns:
        (B, K, D) or (B, patches, D), dtype of `weight` without autocast. Gradients go to weight,
        bias and pos_embed; to images if they are floating point and ask for one.

    Source: Dosovitskiy et al. 2021 (ViT), eq. 1, arXiv:2010.11929; dropped patches: Li et al. 2023
        (FLIP), section 3, arXiv:2212.00794.
    """
    check_integers(prefix="patch_embed: ", patch_size=patch_size)
    if ids is not None and not isinstance(ids, Tensor):
        got = type(ids).__name__
        raise TypeError(f"patch_embed: ids must be a tensor (keep_ids(...).ids), got {got}")
    num_patches = _check_images(images, patch_size, layout)
    dim = weight.shape[0]
    _check("weight", weight, (dim, 3, patch_size, patch_size))
    _check("bias", bias, (dim,))
    _check("pos_embed", pos_embed, (num_patches, dim))
    check_devices(
        images.device,
        prefix="patch_embed: ",
        weight=weight,
        bias=bias,
        pos_embed=pos_embed,
        ids=ids,
    )
    if ids is not None:
        _check_ids(ids, images.shape[0], num_patches)
    if len(mean) != 3 or len(std) != 3:
        got = f"{len(mean)} and {len(std)}"
        raise ValueError(f"patch_embed: mean and std must have 3 values each, got {got}")
    run = _OP.choose(impl, images.device, images=images, weight=weight, pos_embed=pos_embed)
    return run(
        images,
        weight,
        bias,
        pos_embed,
        ids,
        patch_size=patch_size,
        mean=mean,
        std=std,
        layout=layout,
    )


def _check_images(images: Tensor, patch_size: int, layout: str) -> int:
    """Checks the images; returns the number of patches of each."""
    if layout not in ("hwc", "chw"):
        raise ValueError(f"patch_embed: layout must be 'hwc' or 'chw', got {layout!r}")
    got = tuple(images.shape)
    if images.dim() != 4 or images.shape[3 if layout == "hwc" else 1] != 3:
        expected = "(B, H, W, 3)" if layout == "hwc" else "(B, 3, H, W)"
        raise ValueError(f"patch_embed: images must be {expected} for {layout!r}, got {got}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"patch_embed: images must be uint8 or floating, got {images.dtype}")
    height, width = images.shape[1:3] if layout == "hwc" else images.shape[2:4]
    if patch_size < 1:
        raise ValueError(f"patch_embed: patch_size must be >= 1, got {patch_size}")
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_embed: patch_size {patch_size} must divide images, got {got}")
    return (height // patch_size) * (width // patch_size)


def _check_ids(ids: Tensor, batch: int, num_patches: int) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"patch_embed: ids must be int64, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] != batch:
        raise ValueError(f"patch_embed: ids must be ({batch}, K), got {tuple(ids.shape)}")
    if ids.shape[1] > num_patches:
        raise ValueError(
            f"patch_embed: ids must keep at most {num_patches} patches, got {ids.shape[1]}"
        )
    expected = f"patch_embed: ids must be in 0..{num_patches - 1}"
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        # The device checks: the host does not wait for what it finds.
        torch._assert_async(((ids >= 0) & (ids < num_patches)).all(), expected)
    elif ids.numel():
        low, high = (x.item() for x in ids.aminmax())
        if low < 0 or high >= num_patches:
            raise ValueError(f"{expected}, got {low if low < 0 else high}")


def _check(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is None:
        return
    if not x.is_floating_point():
        raise TypeError(f"patch_embed: {name} must be floating point, got {x.dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"patch_embed: {name} must be {shape}, got {tuple(x.shape)}")


def _folded(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    ids: Tensor | None,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    layout: str,
) -> Tensor:
    """Takes the kept patches as bytes, then one matrix product."""
    dtype = product_dtype(images.device, weight)
    # W' is rounded once, for the product; the shift is summed from what was rounded.
    wide = torch.promote_types(weight.dtype, torch.float32)
    mean, std = (torch.tensor(x, dtype=wide, device=images.device) for x in (mean, std))
    folded = (weight.to(wide) / (255 * std)[:, None, None]).to(dtype)
    shift = (folded.to(wide).sum((2, 3)) * (128 - 255 * mean)).sum(1)
    shift = shift if bias is None else shift + bias
    patches = _patches(images, patch_size, layout)
    if ids is not None:
        patches = patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))
    if layout == "hwc":
        folded = folded.permute(0, 2, 3, 1)
    # uint8 - 128 would wrap; a floating pixel loses least when it is centred before it is rounded.
    pixels = (patches - 128.0).to(dtype) if patches.is_floating_point() else patches.to(dtype) - 128
    tokens = linear(pixels, folded.flatten(1), shift.to(dtype))
    if pos_embed is None:
        return tokens
    if ids is not None:
        pos_embed = pos_embed.index_select(0, ids.flatten()).unflatten(0, ids.shape)
    return tokens + pos_embed


def _patches(images: Tensor, patch_size: int, layout: str) -> Tensor:
    """(B, patches, 3 P P) pixels, in the order (row, column, channel) for "hwc", else (c, r, c)."""
    p = patch_size
    if layout == "hwc":
        batch, height, width, _ = images.shape
        grid = images.reshape(batch, height // p, p, width // p, p, 3).transpose(2, 3)
    else:
        batch, _, height, width = images.shape
        grid = images.reshape(batch, 3, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    return grid.flatten(3).flatten(1, 2)


_OP = Op(
    "patch_embed",
    {
        "reference": Implementation(reference.patch_embed),
        "folded": Implementation(_folded),
        "cpp": Implementation(partial(fused, "cpp"), _ext.cpp_missing, fused_rejects("cpp")),
        "triton": Implementation(
            partial(fused, "triton"), _ext.triton_missing, fused_rejects("triton")
        ),
    },
    {"cpu": ("cpp", "folded", "reference"), "cuda": ("triton", "folded", "reference")},
)
