"""Patch embedding from raw pixels: kept patches are gathered, centred and multiplied in one kernel.

Letters beside the usual ones: R rows, the kept patches of all images; C = 3 P P, the pixels of a
patch and their channels, in the order in which they lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.kernels._common import AotCase

# Programs that fill 132 SMs twice; more splits of the rows than that only add partial sums.
_PROGRAMS = 264


@triton.jit
def _pixel_offsets(offs_c, stride_plane, stride_row, HWC: tl.constexpr, P: tl.constexpr):
    """Where pixel c of a patch lies, from the patch's first on."""
    if HWC:
        return (offs_c // (3 * P)) * stride_row + offs_c % (3 * P)
    else:
        in_plane = offs_c % (P * P)
        return (offs_c // (P * P)) * stride_plane + (in_plane // P) * stride_row + in_plane % P


@triton.jit
def _patch_offsets(
    rows, patch, K, columns, stride_image, stride_row, HWC: tl.constexpr, P: tl.constexpr
):
    """Where the first pixel of each row's patch lies, int64."""
    step = 3 * P if HWC else P
    in_image = (patch // columns).to(tl.int64) * P * stride_row + (patch % columns) * step
    return (rows // K).to(tl.int64) * stride_image + in_image


@triton.jit
def _patch_of(ids_ptr, rows, mask, K, HAS_IDS: tl.constexpr):
    """Patch of each row, int32."""
    if HAS_IDS:
        return tl.load(ids_ptr + rows, mask=mask, other=0).to(tl.int32)
    else:
        return rows % K


@triton.jit
def _of_channel(channel, red, green, blue):
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def _patch_embed_fold_kernel(
    weight_ptr, bias_ptr, folded_ptr, shift_ptr,
    C, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    HWC: tl.constexpr, P: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_C], tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        channel, source = offs_c // (P * P), offs_c
        if HWC:
            channel = offs_c % 3
            source = channel * P * P + offs_c // 3
        w = tl.load(weight_ptr + d * C + source, mask=mask_c, other=0.0).to(tl.float32)
        w = (w * _of_channel(channel, scale_r, scale_g, scale_b)).to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + d * C + offs_c, w, mask=mask_c)
        # Of the weight as rounded: the shift gives back exactly what the centre takes away.
        total += w.to(tl.float32) * _of_channel(channel, shift_r, shift_g, shift_b)
    shift = tl.sum(total, axis=0)
    if HAS_BIAS:
        shift += tl.load(bias_ptr + d)
    tl.store(shift_ptr + d, shift)


@triton.jit
def _patch_embed_fwd_kernel(
    images_ptr, folded_ptr, shift_ptr, pos_ptr, ids_ptr, out_ptr,
    R, K, C, D, columns, stride_image, stride_plane, stride_row,
    HWC: tl.constexpr, P: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Programs that share pixels follow each other: the weights stay in the L2 anyway.
    num_d = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    rows = (pid // num_d) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = (pid % num_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r, mask_d = rows < R, offs_d < D
    patch = _patch_of(ids_ptr, rows, mask_r, K, HAS_IDS)
    first = _patch_offsets(rows, patch, K, columns, stride_image, stride_row, HWC, P)

    dtype = folded_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        at = first[:, None] + _pixel_offsets(offs_c, stride_plane, stride_row, HWC, P)[None, :]
        x = tl.load(images_ptr + at, mask=mask_r[:, None] & mask_c[None, :], other=0)
        w = tl.load(
            folded_ptr + offs_d[None, :] * C + offs_c[:, None],
            mask=mask_c[:, None] & mask_d[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot((x.to(tl.float32) - 128.0).to(dtype), w, acc, input_precision="ieee")

    acc += tl.load(shift_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
    mask = mask_r[:, None] & mask_d[None, :]
    if HAS_POS:
        at = patch[:, None] * D + offs_d[None, :]
        acc += tl.load(pos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = rows[:, None].to(tl.int64) * D + offs_d[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_bwd_weight_kernel(
    grad_ptr, images_ptr, ids_ptr, partial_ptr,
    R, K, C, D, columns, stride_image, stride_plane, stride_row, rows_per_split,
    HWC: tl.constexpr, P: tl.constexpr, HAS_IDS: tl.constexpr, BF16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_c = tl.cdiv(C, BLOCK_C)
    offs_d = (tl.program_id(0) // num_c) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_c = (tl.program_id(0) % num_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_d, mask_c = offs_d < D, offs_c < C
    pixels = _pixel_offsets(offs_c, stride_plane, stride_row, HWC, P)
    start = tl.program_id(1) * rows_per_split
    end = tl.minimum(start + rows_per_split, R)

    dtype = tl.bfloat16 if BF16 else tl.float32
    acc = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for r in range(start, end, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R)
        mask_r = rows < end
        patch = _patch_of(ids_ptr, rows, mask_r, K, HAS_IDS)
        first = _patch_offsets(rows, patch, K, columns, stride_image, stride_row, HWC, P)
        x = tl.load(
            images_ptr + first[:, None] + pixels[None, :],
            mask=mask_r[:, None] & mask_c[None, :], other=0,
        )  # fmt: skip
        grad = tl.load(
            grad_ptr + rows[:, None].to(tl.int64) * D + offs_d[None, :],
            mask=mask_r[:, None] & mask_d[None, :], other=0.0,
        )  # fmt: skip
        x = (x.to(tl.float32) - 128.0).to(dtype)
        acc = tl.dot(tl.trans(grad.to(dtype)), x, acc, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * D + offs_d[:, None]) * C + offs_c[None, :]
    tl.store(partial_ptr + at, acc, mask=mask_d[:, None] & mask_c[None, :])


@triton.jit
def _patch_embed_unfold_kernel(
    partial_ptr, grad_bias_ptr, grad_weight_ptr,
    num_splits, C, D, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    HWC: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    channel, target = offs_c // (P * P), offs_c
    if HWC:
        channel = offs_c % 3
        target = channel * P * P + offs_c // 3
    total = tl.zeros([BLOCK_C], tl.float32)
    at = d * C + offs_c
    for _ in range(num_splits):
        total += tl.load(partial_ptr + at, mask=mask_c, other=0.0)
        at += D * C
    total += tl.load(grad_bias_ptr + d) * _of_channel(channel, shift_r, shift_g, shift_b)
    total *= _of_channel(channel, scale_r, scale_g, scale_b)
    out = total.to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + d * C + target, out, mask=mask_c)


@triton.jit
def _patch_embed_bwd_pos_kernel(
    grad_ptr, order_ptr, starts_ptr, out_ptr,
    batch, num_patches, D,
    HAS_IDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of the gradients of a patch, in the order of the images."""
    p = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    if HAS_IDS:
        start = tl.load(starts_ptr + p).to(tl.int32)
        end = tl.load(starts_ptr + p + 1).to(tl.int32)
    else:
        start = 0
        end = batch
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in range(start, end, BLOCK_R):
        offs = i + tl.arange(0, BLOCK_R)
        mask = offs < end
        if HAS_IDS:
            rows = tl.load(order_ptr + offs, mask=mask, other=0)
        else:
            rows = offs.to(tl.int64) * num_patches + p
        grad = tl.load(
            grad_ptr + rows[:, None] * D + offs_d[None, :],
            mask=mask[:, None] & mask_d[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(grad.to(tl.float32), axis=0)
    tl.store(out_ptr + p.to(tl.int64) * D + offs_d, total, mask=mask_d)


class _Images(NamedTuple):
    """Sizes and strides of images as the kernels take them; K is that of `ids` or all patches."""

    num_rows: int
    num_kept: int
    num_patches: int
    columns: int
    strides: tuple[int, int, int]
    patch_size: int


def _images_of(images: Tensor, weight: Tensor, ids: Tensor | None, hwc: bool) -> _Images:
    p = weight.shape[3]
    height, width = images.shape[1:3] if hwc else images.shape[2:4]
    num_patches = (height // p) * (width // p)
    kept = num_patches if ids is None else ids.shape[1]
    image, *others = images.stride()
    strides = (image, 0, others[0]) if hwc else (image, others[0], others[1])
    return _Images(images.shape[0] * kept, kept, num_patches, width // p, strides, p)


def _norm_scalars(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """(x / 255 - mean) / std = (x - 128) scale + shift scale, by channel."""
    return (*(1 / (255 * s) for s in std), *(128 - 255 * m for m in mean))


def _blocks(bf16: bool) -> dict[str, int]:
    # fp32 is multiplied without tensor cores, from registers: smaller tiles.
    if bf16:
        return {"BLOCK_R": 128, "BLOCK_D": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_R": 64, "BLOCK_D": 64, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}


def _weight_blocks(bf16: bool) -> dict[str, int]:
    if bf16:
        return {"BLOCK_R": 64, "BLOCK_D": 128, "BLOCK_C": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_R": 16, "BLOCK_D": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}


def patch_embed_fwd(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    ids: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    hwc: bool,
    bf16: bool,
) -> Tensor:
    """Tokens (R, D) of the kept patches; see ops.patch_embed. bias is fp32, the product bf16 or
    fp32; the pixels of a row of `images` lie together.
    """
    shape = _images_of(images, weight, ids, hwc)
    dim, area = weight.shape[0], weight[0].numel()
    narrow = bf16 and (pos_embed is None or pos_embed.dtype == torch.bfloat16)
    dtypes = {True: torch.bfloat16, False: torch.float32}
    out = weight.new_empty(shape.num_rows, dim, dtype=dtypes[narrow])
    if shape.num_rows == 0:
        return out
    folded = weight.new_empty(dim, area, dtype=dtypes[bf16])
    shift = weight.new_empty(dim, dtype=torch.float32)
    _patch_embed_fold_kernel[(dim,)](
        weight, bias, folded, shift, area, *_norm_scalars(mean, std),
        HWC=hwc, P=shape.patch_size, HAS_BIAS=bias is not None, BLOCK_C=512,
    )  # fmt: skip
    blocks = _blocks(bf16)
    grid = triton.cdiv(shape.num_rows, blocks["BLOCK_R"]) * triton.cdiv(dim, blocks["BLOCK_D"])
    _patch_embed_fwd_kernel[(grid,)](
        images, folded, shift, pos_embed, ids, out,
        shape.num_rows, shape.num_kept, area, dim, shape.columns, *shape.strides,
        HWC=hwc, P=shape.patch_size, HAS_IDS=ids is not None, HAS_POS=pos_embed is not None,
        **blocks,
    )  # fmt: skip
    return out


def patch_embed_bwd(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    hwc: bool,
    bf16: bool,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight (as it, or empty), of bias (D,) and of positions (patches, D), fp32."""
    shape = _images_of(images, weight, ids, hwc)
    grad_pos = _sum_patches(grad, ids, images.shape[0], shape.num_patches)
    # Every row is of one patch, so the sum over patches is that over rows.
    grad_bias = grad_pos.sum(0)
    if not weight_wanted:
        return weight.new_empty(0, *weight.shape[1:]), grad_bias, grad_pos
    if shape.num_rows == 0:
        return torch.zeros_like(weight), grad_bias, grad_pos
    dim, area = weight.shape[0], weight[0].numel()
    blocks = _weight_blocks(bf16)
    tiles = triton.cdiv(dim, blocks["BLOCK_D"]) * triton.cdiv(area, blocks["BLOCK_C"])
    # By the shapes alone, so that the order of the sum is too.
    most = triton.cdiv(shape.num_rows, 8 * blocks["BLOCK_R"])
    splits = max(1, min(_PROGRAMS // tiles, most))
    rows = triton.cdiv(shape.num_rows, splits * blocks["BLOCK_R"]) * blocks["BLOCK_R"]
    splits = triton.cdiv(shape.num_rows, rows)
    partial = torch.empty(splits, dim, area, dtype=torch.float32, device=grad.device)
    _patch_embed_bwd_weight_kernel[(tiles, splits)](
        grad, images, ids, partial,
        shape.num_rows, shape.num_kept, area, dim, shape.columns, *shape.strides, rows,
        HWC=hwc, P=shape.patch_size, HAS_IDS=ids is not None, BF16=bf16, **blocks,
    )  # fmt: skip
    grad_weight = torch.empty_like(weight)
    _patch_embed_unfold_kernel[(dim, triton.cdiv(area, 512))](
        partial, grad_bias, grad_weight, splits, area, dim, *_norm_scalars(mean, std),
        HWC=hwc, P=shape.patch_size, BLOCK_C=512,
    )  # fmt: skip
    return grad_weight, grad_bias, grad_pos


def _sum_patches(grad: Tensor, ids: Tensor | None, batch: int, num_patches: int) -> Tensor:
    """(patches, D) fp32; the rows of each patch are found by a stable sort, without a wait."""
    dim = grad.shape[1]
    order = starts = None
    if ids is not None:
        patch, order = torch.sort(ids.flatten().int(), stable=True)
        bounds = torch.arange(num_patches + 1, dtype=torch.int32, device=ids.device)
        starts = torch.searchsorted(patch, bounds)
    out = torch.empty(num_patches, dim, dtype=torch.float32, device=grad.device)
    if out.numel():
        _patch_embed_bwd_pos_kernel[(num_patches, triton.cdiv(dim, 128))](
            grad, order, starts, out, batch, num_patches, dim,
            HAS_IDS=ids is not None, BLOCK_R=16, BLOCK_D=128,
        )  # fmt: skip
    return out


def _aot_case(name: str, p: int, hwc: bool, bf16: bool, max_registers: int) -> AotCase:
    """uint8 images of whole 16-byte rows, kept ids, as FLIP's."""
    flags = {"HWC": hwc, "P": p, "HAS_IDS": True}
    sizes = {"R": "i32", "K": "i32", "C": "i32", "D": "i32", "columns": "i32",
             "stride_image": "i32", "stride_plane": "i32", "stride_row": "i32"}  # fmt: skip
    value = "*bf16" if bf16 else "*fp32"
    if name == "fwd":
        kernel, blocks = _patch_embed_fwd_kernel, _blocks(bf16)
        types = {"images_ptr": "*u8", "folded_ptr": value, "shift_ptr": "*fp32", "pos_ptr": value,
                 "ids_ptr": "*i64", "out_ptr": value, **sizes}  # fmt: skip
        flags |= {"HAS_POS": True}
    else:
        kernel, blocks = _patch_embed_bwd_weight_kernel, _weight_blocks(bf16)
        types = {"grad_ptr": value, "images_ptr": "*u8", "ids_ptr": "*i64", "partial_ptr": "*fp32",
                 **sizes, "rows_per_split": "i32"}  # fmt: skip
        flags |= {"BF16": bf16}
    launch = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
    layout, dtype = "hwc" if hwc else "chw", "bf16" if bf16 else "fp32"
    return AotCase(
        name=f"patch_embed-{name}-P{p}-{layout}-{dtype}",
        kernel=kernel,
        types=types,
        constants={**flags, **blocks},
        divisible=("C", "D", "stride_image", "stride_plane", "stride_row", "rows_per_split"),
        max_registers=max_registers,
        instructions={80: ("HMMA",), 90: ("HGMMA",)} if bf16 else {},
        **launch,
    )


def _small_case(name: str, kernel: object, constants: dict, **types: str) -> AotCase:
    return AotCase(
        name=f"patch_embed-{name}-bf16",
        kernel=kernel,
        types=types,
        constants=constants,
        divisible=("C", "D"),
        max_registers=64,
        max_shared_bytes=4096,
    )


_NORM = {f"{kind}_{c}": "fp32" for kind in ("scale", "shift") for c in "rgb"}

AOT_CASES = [
    *(
        _aot_case(name, p, hwc, True, max_registers=255)
        for name in ("fwd", "bwd")
        for p in (14, 16, 32)
        for hwc in (True, False)
    ),
    _aot_case("fwd", 16, True, False, max_registers=255),
    _aot_case("bwd", 16, True, False, max_registers=255),
    _small_case(
        "pos", _patch_embed_bwd_pos_kernel, {"HAS_IDS": True, "BLOCK_R": 16, "BLOCK_D": 128},
        grad_ptr="*bf16", order_ptr="*i64", starts_ptr="*i64", out_ptr="*fp32",
        batch="i32", num_patches="i32", D="i32",
    ),
    _small_case(
        "fold", _patch_embed_fold_kernel, {"HWC": True, "P": 16, "HAS_BIAS": True, "BLOCK_C": 512},
        weight_ptr="*bf16", bias_ptr="*fp32", folded_ptr="*bf16", shift_ptr="*fp32", C="i32",
        **_NORM,
    ),
    _small_case(
        "unfold", _patch_embed_unfold_kernel, {"HWC": True, "P": 16, "BLOCK_C": 512},
        partial_ptr="*fp32", grad_bias_ptr="*fp32", grad_weight_ptr="*bf16", num_splits="i32",
        C="i32", D="i32", **_NORM,
    ),
]  # fmt: skip
