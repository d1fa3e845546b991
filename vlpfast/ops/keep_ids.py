"""Which patches of each image are kept when the others are dropped (FLIP, MAE, PatchDropout)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlpfast import _ext
from vlpfast.ops._checks import check_integers
from vlpfast.ops._dispatch import Implementation, Op
from vlpfast.ops.reference.keep_ids import keep_ids as _reference

# A key's low bits hold its patch's index; at this many patches 16 random bits are left.
_MAX_PATCHES = 1 << 16
# What one program's registers (kernels/keep_ids.py) and one warp's shared memory (csrc/cuda) hold.
_TRITON_MAX_PATCHES = 8192
_CUDA_MAX_PATCHES = 12288


class KeepIds(NamedTuple):
    """The kept patches of B samples.

    Attributes:
        ids (B, K): int64, kept patches of each sample, ascending.
        inverse (B, P): int64, place of each patch in `ids`, or -1 where it was dropped.
    """

    ids: Tensor
    inverse: Tensor


torch.library.define(
    "vlpfast::keep_ids",
    "(Tensor seed, Tensor sample_ids, int num_patches, int num_keep, Tensor? valid)"
    " -> (Tensor, Tensor)",
)


@torch.library.register_fake("vlpfast::keep_ids")
def _fake(
    seed: Tensor, sample_ids: Tensor, num_patches: int, num_keep: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_samples = sample_ids.shape[0]
    return (
        sample_ids.new_empty(num_samples, num_keep),
        sample_ids.new_empty(num_samples, num_patches),
    )


# C++ and CUDA: the dispatcher picks by the tensors' device.
_registered = torch.ops.vlpfast.keep_ids.default


def _triton(
    seed: Tensor, sample_ids: Tensor, num_patches: int, num_keep: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    from vlpfast.kernels.keep_ids import keep_ids

    return keep_ids(seed, sample_ids, num_patches, num_keep, valid)


def _cpp_rejects(*, device: torch.device, num_patches: int) -> str | None:
    return _ext.cpp_rejects(device)


def _triton_rejects(*, device: torch.device, num_patches: int) -> str | None:
    return _ext.triton_rejects(device) or _too_many(num_patches, _TRITON_MAX_PATCHES)


def _cuda_rejects(*, device: torch.device, num_patches: int) -> str | None:
    return _ext.cuda_rejects(device) or _too_many(num_patches, _CUDA_MAX_PATCHES)


def _too_many(num_patches: int, most: int) -> str | None:
    return f"takes up to {most} patches, got {num_patches}" if num_patches > most else None


_OP = Op(
    "keep_ids",
    {
        "reference": Implementation(_reference),
        "cpp": Implementation(_registered, _ext.cpp_missing, _cpp_rejects),
        "triton": Implementation(_triton, _ext.triton_missing, _triton_rejects),
        "cuda": Implementation(_registered, _ext.cuda_missing, _cuda_rejects),
    },
    auto={"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
)


def keep_ids(
    num_samples: int,
    num_patches: int,
    num_keep: int,
    *,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> KeepIds:
    """Draws `num_keep` of the P = `num_patches` patches of each sample, uniformly, without a sort.

    key(b, p) = draw(stream(seed, sample_ids[b]), p) with its low ceil(log2 P) bits replaced by p
    kept(b)   = the num_keep patches with the smallest keys

    What a sample keeps depends on `seed` and its id alone: not on the batch it is in, the number
    of processes or the implementation. All implementations agree to the bit. Keeping every patch
    is the identity.

    Args:
        num_samples: B.
        num_patches: P, 1 to 65536.
        num_keep: K, 1 to P.
        seed: int or 0-d int64 tensor; change it every step or epoch.
        sample_ids (B,): int64, global ids of the samples; 0..B-1 by default.
        valid (B, P): bool, False on patches to avoid (padding of an image smaller than the grid).
            They are kept only where fewer than K patches are valid, the lowest index first.
        device: where the result lies; by default that of `sample_ids`, else `valid`, else `seed`,
            else torch's default device.
        impl: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        ids (B, K) and inverse (B, P), int64. With it MAE's unshuffle needs no argsort:
        `out[b, p] = x[b, inverse[b, p]]` where `inverse >= 0`, else the mask token.

    Source: Li et al. 2022 (FLIP), section 3.1, arXiv:2212.00794; He et al. 2021 (MAE), section 3,
    arXiv:2111.06377. Both sort noise; the order of the kept patches is theirs to choose, here it is
    that of the image.
    """
    integers = {"num_samples": num_samples, "num_patches": num_patches, "num_keep": num_keep}
    check_integers(prefix="keep_ids: ", **integers, seed=None if isinstance(seed, Tensor) else seed)
    if num_samples < 0:
        raise ValueError(f"keep_ids: num_samples must be >= 0, got {num_samples}")
    if not 1 <= num_patches <= _MAX_PATCHES:
        raise ValueError(f"keep_ids: num_patches must be in 1..{_MAX_PATCHES}, got {num_patches}")
    if not 1 <= num_keep <= num_patches:
        raise ValueError(
            f"keep_ids: num_keep must be in 1..num_patches = {num_patches}, got {num_keep}"
        )
    device = _device_of(device, sample_ids, valid, seed)
    seed = _seed_tensor(seed, device)
    if sample_ids is None:
        sample_ids = torch.arange(num_samples, dtype=torch.int64, device=device)
    _check("sample_ids", sample_ids, (num_samples,), torch.int64, device)
    if valid is not None:
        _check("valid", valid, (num_samples, num_patches), torch.bool, device)
        valid = valid.contiguous()
    run = _OP.choose(impl, device, num_patches=num_patches)
    return KeepIds(*run(seed, sample_ids.contiguous(), num_patches, num_keep, valid))


def _device_of(device: torch.device | str | None, *candidates: Tensor | int | None) -> torch.device:
    if device is None:
        tensors = [x for x in candidates if isinstance(x, Tensor)]
        return tensors[0].device if tensors else torch.get_default_device()
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor):
        # A fill, so that nothing is copied from the host.
        return torch.full((), seed, dtype=torch.int64, device=device)
    _check("seed", seed, (), torch.int64, seed.device)
    return seed.to(device, non_blocking=True)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"keep_ids: {name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"keep_ids: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"keep_ids: {name} must be on {device}, got {tensor.device}")
