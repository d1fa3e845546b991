"""Random kept patches in eager torch: each patch has a unique random key, the smallest are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops.reference.counter import draw, stream


def keep_ids(
    seed: Tensor, sample_ids: Tensor, num_patches: int, num_keep: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ids (B, num_keep) ascending and inverse (B, num_patches), int64; see ops.keep_ids."""
    positions = torch.arange(num_patches, device=sample_ids.device)
    index_bits = (num_patches - 1).bit_length()
    bits = draw(stream(seed, sample_ids)[:, None], positions)
    keys = (bits >> index_bits << index_bits) | positions  # (B, P)
    if valid is not None:
        # Above every 32-bit key, in the order of the index.
        keys = torch.where(valid, keys, (1 << 32) + positions)
    ids = keys.topk(num_keep, largest=False).indices.sort().values
    slots = torch.arange(num_keep, device=ids.device).expand_as(ids)
    return ids, torch.full_like(keys, -1).scatter_(1, ids, slots)
