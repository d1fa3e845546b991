"""Counter-based random numbers: each is a function of (seed, sample id, position) alone, the same
in every implementation.

`mix32` is a bijection of 32-bit integers with low bias (constants: C. Wellons, "hash-prospector",
lowbias32, public domain). Values live in int64 tensors with the upper half zero, because torch has
no full uint32 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """Scrambles 32-bit integers held in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    # The product of two 32-bit numbers may wrap the int64 sign; its low 32 bits stay exact.
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def stream(seed: int | Tensor, ids: Tensor) -> Tensor:
    """One 32-bit stream key for each 64-bit id (any shape), int64.

    h = mix32(seed_lo); h = mix32(h ^ seed_hi); h = mix32(h ^ id_lo); h = mix32(h ^ id_hi).
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=ids.device)
    h = mix32(seed & _MASK)
    h = mix32(h ^ ((seed >> 32) & _MASK))
    ids = ids.to(torch.int64)
    h = mix32(h ^ (ids & _MASK))
    return mix32(h ^ ((ids >> 32) & _MASK))


def draw(key: Tensor, position: Tensor) -> Tensor:
    """32 random bits at `position` of the stream `key` (broadcast), int64: mix32(key ^
    mix32(position)).
    """
    return mix32(key ^ mix32(position.to(torch.int64) & _MASK))


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1) from 32 random bits, by the top 24 so that every implementation agrees to
    the bit.
    """
    return (bits >> 8).to(torch.float32) * 2.0**-24


def keep_mask(bits: Tensor, dropout_p: float) -> Tensor:
    """bool:

    True where an element is kept under dropout probability `dropout_p`: top 24 bits >= p * 2**24,
    rounded.
    """
    return (bits >> 8) >= round(dropout_p * 2**24)
