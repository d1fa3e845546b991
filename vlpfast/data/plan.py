"""Which samples a step reads: functions of (seed, step) whose memory does not grow with N."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlpfast.ops.reference.counter import draw, mix32, stream

_ROUNDS = 8


def permute(
    num_items: int | Tensor, seed: int, keys: Tensor, items: Tensor, *, purpose: int = 0
) -> Tensor:
    """Keyed permutations of 0..num_items-1, evaluated at `items` without making a table.

    A Feistel network permutes the next power of two; results outside the range are permuted again
    ("cycle walking", fewer than two rounds on average), which leaves a permutation of the range.

    Args:
        num_items: size of the range, 1..2**62; one number, or one for each item.
        seed, purpose: what all permutations of one use share.
        keys (n,): which permutation each item is taken from, int64.
        items (n,): int64 in 0..num_items-1.

    Returns: (n,) int64.

    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", methods 2 and 3.
    """
    num_items = torch.as_tensor(num_items).expand(items.shape)
    bits = _bit_length(num_items - 1)
    low_bits = bits // 2
    streams = stream(seed, keys)
    rounds = [draw(streams, torch.tensor(purpose * _ROUNDS + r)) for r in range(_ROUNDS)]

    result = items.clone()
    active = torch.arange(len(items))
    while len(active):
        low_size = low_bits[active]
        high_size = bits[active] - low_size
        low = result[active] & ((1 << low_size) - 1)
        high = result[active] >> low_size
        for r in range(0, _ROUNDS, 2):
            high = high ^ (mix32(low ^ rounds[r][active]) & ((1 << high_size) - 1))
            low = low ^ (mix32(high ^ rounds[r + 1][active]) & ((1 << low_size) - 1))
        result[active] = (high << low_size) | low
        active = active[result[active] >= num_items[active]]
    return result


@dataclass(frozen=True)
class StreamPlan:
    """The endless training stream of one rank.

    Position p of the stream holds sample permutation(seed, p // N)[p % N]; step s of rank r reads
    positions (s * W + r) * B + i for i in 0..B-1. So each epoch reads each sample once over all
    ranks, the global batch of a step does not depend on the world size, and a run is resumed by its
    step number alone.

    Attributes:
        num_samples: N.
        batch_size: B, per rank.
        seed: chooses the permutations.
        rank, world: this rank and the number of ranks W.
        window: 0 shuffles all samples; else blocks of `window` neighbours are shuffled, and samples
            within each block, so that a cold disk reads one stretch at a time. Where it divides N
            and B, every rank's batch consists of whole blocks: such as a scene and its sibling.
    """

    num_samples: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    window: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= 2**62:
            raise ValueError(f"num_samples must be in 1..2**62, got {self.num_samples}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank must be in 0..{self.world - 1}, got {self.rank}")
        if self.window < 0:
            raise ValueError(f"window must be >= 0, got {self.window}")

    def positions(self, step: int) -> np.ndarray:
        """(B,) int64 places in the stream that step `step` reads."""
        first = (step * self.world + self.rank) * self.batch_size
        return first + np.arange(self.batch_size, dtype=np.int64)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """(n,) int64 samples at `positions` (n,)."""
        places = torch.from_numpy(np.asarray(positions, np.int64))
        epochs, places = places // self.num_samples, places % self.num_samples
        if not self.window or self.window >= self.num_samples:
            return permute(self.num_samples, self.seed, epochs, places).numpy()
        return self._windowed(epochs, places).numpy()

    def _windowed(self, epochs: Tensor, places: Tensor) -> Tensor:
        """Blocks in permuted order, each permuted; the short last block at a drawn place."""
        num_full, tail = divmod(self.num_samples, self.window)
        tail_start = (
            draw(stream(self.seed, epochs), torch.tensor(3 * _ROUNDS)) * (num_full + 1)
        ) >> 32
        tail_start = tail_start * self.window
        in_tail = (places >= tail_start) & (places < tail_start + tail)
        places = places - torch.where(places >= tail_start + tail, tail, 0)
        within = torch.where(in_tail, places - tail_start, places % self.window)
        slot = torch.where(in_tail, 0, places // self.window)
        block = permute(num_full, self.seed, epochs, slot, purpose=1)
        block = torch.where(in_tail, num_full, block)
        sizes = torch.where(in_tail, tail, self.window)
        # One permutation for each (epoch, block).
        keys = epochs * (num_full + 1) + block
        return block * self.window + permute(sizes, self.seed, keys, within, purpose=2)


def share(num_samples: int, rank: int, world: int) -> np.ndarray:
    """Samples that `rank` evaluates: every `world`-th, in order."""
    return np.arange(rank, num_samples, world, dtype=np.int64)


def _bit_length(x: Tensor) -> Tensor:
    """Number of bits of each non-negative int64, at least 1."""
    bits = torch.ones_like(x)
    for shift in (32, 16, 8, 4, 2, 1):
        wide = (x >> shift) > 0
        bits = bits + torch.where(wide, shift, 0)
        x = torch.where(wide, x >> shift, x)
    return bits
