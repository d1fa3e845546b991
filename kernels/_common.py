"""Shared by all Triton kernels: random bits, autotune choice, cases of the ahead-of-time gate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class AotCase(NamedTuple):
    """One specialisation of a kernel that the ahead-of-time gate compiles, and its limits.

    A kernel file lists its own in `AOT_CASES`; nothing else needs to know of them.

    Attributes:
        name: op and block sizes, "keep_ids-P256".
        kernel: the `@triton.jit` function.
        types: Triton type of each run-time argument in order: {"x_ptr": "*bf16", "M": "i32"}.
            Pointers are compiled as 16-byte aligned.
        constants: value of each constexpr argument.
        divisible: integer arguments compiled as divisible by 16.
        max_registers: registers per thread that are accepted.
        max_shared_bytes: shared memory that is accepted; a block has 166,912 on sm_80.
        instructions: for a capability, words of SASS that must occur: {90: ("HGMMA",)}.
        maxnreg: the launch option of that name, None to leave registers to the assembler.
        capabilities: the generations it is compiled for.
    """

    name: str
    kernel: triton.JITFunction
    types: Mapping[str, str]
    constants: Mapping[str, int | bool | float]
    divisible: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int = 255
    max_shared_bytes: int = 166_912
    instructions: Mapping[int, Sequence[str]] = {}
    maxnreg: int | None = None
    capabilities: Sequence[int] = (80, 90)


def configs(*choices: triton.Config) -> list[triton.Config]:
    """Autotuner configurations: all of them compiled, only the first interpreted."""
    return list(choices[:1] if INTERPRETED else choices)


@triton.jit
def mix32(x):
    """A bijection of uint32 with low bias (lowbias32); the bits of ops/reference/counter.py."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def stream_key(seed, sample_id):
    """uint32 key of a sample's random numbers, from int64 `seed` and `sample_id`."""
    h = mix32(seed.to(tl.uint32))
    h = mix32(h ^ (seed >> 32).to(tl.uint32))
    h = mix32(h ^ sample_id.to(tl.uint32))
    return mix32(h ^ (sample_id >> 32).to(tl.uint32))


@triton.jit
def draw(key, position):
    """32 random bits at `position` (int32 or uint32, below 2**32) of the stream `key`."""
    return mix32(key ^ mix32(position.to(tl.uint32)))
