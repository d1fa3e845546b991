"""Patch embedding in one operator forward and one backward: what the C++ and Triton kernels share.

C++ is registered; its pixels are gathered again in the backward and never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlpfast import _ext
from vlpfast.ops._once import once_differentiable
from vlpfast.ops._rows import wide

_FLOATS = (torch.float32, torch.bfloat16)

torch.library.define(
    "vlpfast::patch_embed_fwd",
    "(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? ids, float[] mean,"
    " float[] std, bool hwc, bool bf16) -> Tensor",
)
torch.library.define(
    "vlpfast::patch_embed_bwd",
    "(Tensor grad, Tensor images, Tensor weight, Tensor? ids, float[] mean, float[] std, bool hwc,"
    " bool bf16, bool weight_wanted) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("vlpfast::patch_embed_fwd")
def _fake_fwd(images, weight, bias, pos_embed, ids, mean, std, hwc, bf16):
    rows = images.shape[0] * _num_patches(images, weight, hwc) if ids is None else ids.numel()
    narrow = bf16 and (pos_embed is None or pos_embed.dtype == torch.bfloat16)
    dtype = torch.bfloat16 if narrow else torch.float32
    return weight.new_empty(rows, weight.shape[0], dtype=dtype)


@torch.library.register_fake("vlpfast::patch_embed_bwd")
def _fake_bwd(grad, images, weight, ids, mean, std, hwc, bf16, weight_wanted):
    dim, num_patches = weight.shape[0], _num_patches(images, weight, hwc)
    return (
        weight.new_empty(dim if weight_wanted else 0, *weight.shape[1:]),
        weight.new_empty(dim, dtype=torch.float32),
        weight.new_empty(num_patches, dim, dtype=torch.float32),
    )


def _num_patches(images: Tensor, weight: Tensor, hwc: bool) -> int:
    height, width = images.shape[1:3] if hwc else images.shape[2:4]
    return (height // weight.shape[3]) * (width // weight.shape[3])


_cpp_fwd = torch.ops.vlpfast.patch_embed_fwd.default
_cpp_bwd = torch.ops.vlpfast.patch_embed_bwd.default


class _Options(NamedTuple):
    """mean, std; order of the images; whether the product is in bf16."""

    mean: list[float]
    std: list[float]
    hwc: bool
    bf16: bool


class _PatchEmbed(torch.autograd.Function):
    """Tokens (rows, D) of the kept patches of all images."""

    @staticmethod
    def forward(ctx, backend, images, weight, bias, pos_embed, ids, options):
        fwd = _cpp_fwd if backend == "cpp" else _triton("patch_embed_fwd")
        ctx.save_for_backward(images, weight, ids)
        ctx.backend, ctx.options = backend, options
        ctx.dtypes = [None if x is None else x.dtype for x in (bias, pos_embed)]
        return fwd(images, weight, wide(bias), pos_embed, ids, *options)

    @staticmethod
    @once_differentiable("patch_embed")
    def backward(ctx, grad):
        images, weight, ids = ctx.saved_tensors
        bwd = _cpp_bwd if ctx.backend == "cpp" else _triton("patch_embed_bwd")
        _, _, weight_wanted, bias_wanted, pos_wanted, _, _ = ctx.needs_input_grad
        grad_weight, grad_bias, grad_pos = bwd(
            grad.contiguous(), images, weight, ids, *ctx.options, weight_wanted
        )
        return (
            None,
            None,
            grad_weight if weight_wanted else None,
            grad_bias.to(ctx.dtypes[0]) if bias_wanted else None,
            grad_pos.to(ctx.dtypes[1]) if pos_wanted else None,
            None,
            None,
        )


def _triton(name: str) -> Callable:
    from vlpfast.kernels import patch_embed

    return getattr(patch_embed, name)


def fused(
    backend: str,
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
    """`vlpfast.ops.patch_embed` by the kernels of `backend`, "cpp" or "triton"."""
    bf16 = product_dtype(images.device, weight) == torch.bfloat16
    contiguous = lambda x: None if x is None else x.contiguous()
    tokens = _PatchEmbed.apply(
        backend, _with_whole_rows(images, layout), contiguous(weight), bias, contiguous(pos_embed),
        contiguous(ids), _Options(list(mean), list(std), layout == "hwc", bf16),
    )  # fmt: skip
    height, width = images.shape[1:3] if layout == "hwc" else images.shape[2:4]
    num_patches = (height // patch_size) * (width // patch_size)
    num_kept = num_patches if ids is None else ids.shape[1]
    return tokens.view(images.shape[0], num_kept, weight.shape[0])


def _with_whole_rows(images: Tensor, layout: str) -> Tensor:
    """The images, copied only if the pixels of a row do not lie together: a crop is not."""
    inner = (3, 1) if layout == "hwc" else (1,)
    return images if images.stride()[-len(inner) :] == inner else images.contiguous()


def product_dtype(device: torch.device, weight: Tensor) -> torch.dtype:
    """What the product is computed in: the weight's dtype, or that of autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weight.dtype


def fused_rejects(backend: str) -> Callable[..., str | None]:
    """Why `backend` cannot take these arguments, as a function for `Implementation.rejects`."""
    on_device = _ext.cpp_rejects if backend == "cpp" else _ext.triton_rejects

    def rejects(
        *, device: torch.device, images: Tensor, weight: Tensor, pos_embed: Tensor | None
    ) -> str | None:
        if images.dtype not in (torch.uint8, *_FLOATS):
            return f"takes uint8, fp32 and bf16 images, got {images.dtype}"
        dtypes = [weight.dtype, product_dtype(device, weight)]
        dtypes += [] if pos_embed is None else [pos_embed.dtype]
        other = [d for d in dtypes if d not in _FLOATS]
        if other:
            return f"takes fp32 and bf16, got {other[0]}"
        if images.requires_grad and torch.is_grad_enabled():
            return "has no gradient of images, which require one"
        return on_device(device)

    return rejects
