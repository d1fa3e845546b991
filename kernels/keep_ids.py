"""Random kept patches: one program per sample, bitwise radix selection instead of a sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlpfast.kernels._common import AotCase, draw, stream_key

# A block of 8192 keys is 16 registers a thread at 16 warps; larger ones come near to spilling.
MAX_PATCHES = 8192


@triton.jit
def _keep_ids_kernel(
    seed_ptr, sample_ids_ptr, valid_ptr, ids_ptr, inverse_ptr,
    num_patches, num_keep,
    HAS_VALID: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_patches

    stream = stream_key(tl.load(seed_ptr), tl.load(sample_ids_ptr + pid_b))
    # The index in the low bits makes the keys of a sample unique.
    keys = (draw(stream, offs_p) >> INDEX_BITS << INDEX_BITS) | offs_p.to(tl.uint32)
    valid = mask_p
    if HAS_VALID:
        valid_row = valid_ptr + pid_b * num_patches
        valid = tl.load(valid_row + offs_p, mask=mask_p, other=0).to(tl.int1)

    # From the top bit down: `prefix` is the start of the largest kept key, `wanted` how many of
    # the keys with this start are kept.
    num_valid = tl.sum(valid.to(tl.int32), axis=0)
    num_kept = tl.minimum(num_keep, num_valid)
    wanted = num_kept
    prefix = tl.full([], 0, tl.uint32)
    for i in range(32):
        bit = 31 - i
        prefix = prefix << 1
        zeros = tl.sum((valid & ((keys >> bit) == prefix)).to(tl.int32), axis=0)
        go_right = wanted > zeros
        wanted = tl.where(go_right, wanted - zeros, wanted)
        prefix = tl.where(go_right, prefix | 1, prefix)
    kept = valid & (keys <= prefix)
    if HAS_VALID:
        # Invalid patches fill up what the valid ones leave, the lowest index first.
        invalid = mask_p & (valid == 0)
        rank = tl.cumsum(invalid.to(tl.int32), axis=0)
        kept = kept | (invalid & (rank <= num_keep - num_kept))

    slots = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(ids_ptr + pid_b * num_keep + slots, offs_p.to(tl.int64), mask=kept)
    inverse = tl.where(kept, slots, -1).to(tl.int64)
    tl.store(inverse_ptr + pid_b * num_patches + offs_p, inverse, mask=mask_p)


def _num_warps(block_p: int) -> int:
    return max(1, min(16, block_p // 256))


def keep_ids(
    seed: Tensor, sample_ids: Tensor, num_patches: int, num_keep: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ids (B, num_keep) ascending and inverse (B, num_patches), int64; see ops.keep_ids."""
    num_samples = sample_ids.shape[0]
    ids = torch.empty(num_samples, num_keep, dtype=torch.int64, device=sample_ids.device)
    inverse = torch.empty(num_samples, num_patches, dtype=torch.int64, device=sample_ids.device)
    if num_samples == 0:
        return ids, inverse
    block_p = triton.next_power_of_2(num_patches)
    _keep_ids_kernel[(num_samples,)](
        seed, sample_ids, valid, ids, inverse, num_patches, num_keep,
        HAS_VALID=valid is not None, INDEX_BITS=(num_patches - 1).bit_length(), BLOCK_P=block_p,
        num_warps=_num_warps(block_p),
    )  # fmt: skip
    return ids, inverse


def _aot_case(block_p: int, has_valid: bool, max_registers: int) -> AotCase:
    return AotCase(
        name=f"keep_ids-P{block_p}{'-valid' if has_valid else ''}",
        kernel=_keep_ids_kernel,
        types={
            "seed_ptr": "*i64",
            "sample_ids_ptr": "*i64",
            "valid_ptr": "*i1",
            "ids_ptr": "*i64",
            "inverse_ptr": "*i64",
            "num_patches": "i32",
            "num_keep": "i32",
        },
        constants={
            "HAS_VALID": has_valid,
            "INDEX_BITS": block_p.bit_length() - 1,
            "BLOCK_P": block_p,
        },
        num_warps=_num_warps(block_p),
        max_registers=max_registers,
        max_shared_bytes=1024,
    )


AOT_CASES = [
    _aot_case(256, has_valid=False, max_registers=64),
    _aot_case(256, has_valid=True, max_registers=96),
    _aot_case(1024, has_valid=False, max_registers=64),
    _aot_case(MAX_PATCHES, has_valid=True, max_registers=128),
]
