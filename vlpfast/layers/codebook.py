"""Codebooks: patches to codes and back, by unit vectors learned by moving averages, or by k-means
centres.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.ops.reference.counter import draw, stream

# Similarities held at once: 64 MiB of fp32.
_MOST_SIMILARITIES = 1 << 24


class Quantized(NamedTuple):
    """codes (n,) int64; vectors (n, d): theirs, with the gradient of what was quantized;
    commitment: 0-d sum over rows of the mean square of the difference.
    """

    codes: Tensor
    vectors: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """K unit vectors of width d, each the moving average of the unit inputs that are nearest to it.

        code(z) = argmax_k <z, e_k>;   e_k <- unit(decay e_k + (1 - decay) unit(sum of its z))

    A code without an input keeps its vector. All begin as inputs of the first step; one whose share
    of the inputs, averaged likewise, falls below `revive_below` / K becomes an input of the step.

    Args:
        size, dim: K and d.
        decay: of the averages, for each step.
        revive_below: 0 leaves unused codes where they are.

    Source: Peng et al. 2022 (BEiT v2), section 2.1, arXiv:2208.06366; microsoft/unilm
    beit2/norm_ema_quantizer.py. Deviations: no k-means on the first batch; codes are revived.
    """

    def __init__(self, size: int, dim: int, *, decay: float, revive_below: float) -> None:
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("vectors", F.normalize(torch.randn(size, dim), dim=-1))
        self.register_buffer("shares", torch.zeros(size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Of the codes, those that some input of the last step was nearest to.
        self.register_buffer("in_use", torch.zeros(()), persistent=False)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def codes(self, z: Tensor) -> Tensor:
        """Nearest codes (n,) of z (n, d), unit or not; of equally near ones the first."""
        rows = max(1, _MOST_SIMILARITIES // len(self.vectors))
        z = z.to(self.vectors.dtype)
        # In bf16 many codes would be equally near.
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([(part @ self.vectors.T).argmax(1) for part in z.split(rows)])

    def forward(self, z: Tensor) -> Quantized:
        """Quantizes z (n, d), scaled to unit length; in training remembers it for `update`."""
        z = F.normalize(z.to(self.vectors.dtype), dim=-1)
        with torch.no_grad():
            codes = self.codes(z)
        nearest = self.vectors[codes]
        if self.training:
            self._pending.append((z.detach(), codes))
        commitment = (z - nearest).square().mean(1).sum()
        return Quantized(codes, z + (nearest - z).detach(), commitment)

    @torch.no_grad()
    def update(self, seed: int, group: dist.ProcessGroup | None) -> None:
        """Moves the vectors by what was quantized since the last update, on all ranks of `group`.

        Args:
            seed: chooses the inputs that revived codes become; each rank offers some of its own.
            group: ranks, or None.
        """
        if not self._pending:
            return
        z, codes = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        sums, counts = sums_by_code(z, codes, len(self.vectors))
        total = torch.cat([sums, counts[:, None]], 1)
        if group is not None:
            dist.all_reduce(total, group=group)
        sums, counts = total[:, :-1], total[:, -1]
        moved = torch.where(counts[:, None] > 0, self._moved(sums, counts), self.vectors)
        self.in_use.copy_((counts > 0).float().mean())
        self.shares.lerp_(counts / counts.sum(), 1 - self.decay)
        size = len(self.vectors)
        revived = (self.shares < self.revive_below / size) | (self.steps == 0)
        self.vectors.copy_(torch.where(revived[:, None], self._inputs(z, seed, group), moved))
        # As if it had been used as often as the others: it has time to find inputs.
        self.shares.masked_fill_(revived, 1 / size)
        self._forget(revived)
        self.steps += 1

    def _moved(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Where the vectors (K, d) go that had inputs, of these sums (K, d) and numbers (K,)."""
        moved = torch.lerp(F.normalize(sums, dim=-1), self.vectors, self.decay)
        return F.normalize(moved, dim=-1)

    def _forget(self, revived: Tensor) -> None:
        """After codes `revived` (K,) bool have become inputs."""

    def _inputs(self, z: Tensor, seed: int, group: dist.ProcessGroup | None) -> Tensor:
        """(K, d) random inputs of the step; K / W of each of W ranks."""
        size, world = len(self.vectors), 1 if group is None else dist.get_world_size(group)
        offered = -(-size // world)
        number = torch.arange(offered, device=z.device)
        chosen = z[(draw(stream(seed, self.steps), number) * len(z)) >> 32]
        if group is not None:
            parts = [torch.empty_like(chosen) for _ in range(world)]
            dist.all_gather(parts, chosen, group=group)
            chosen = torch.stack(parts, 1).flatten(0, 1)
        return chosen[:size]


class KMeans(Codebook):
    """Mini-batch k-means: K centres of width d, each the mean of the inputs nearest to it.

        code(z) = argmin_k |z - e_k|^2;   n_k <- decay n_k + m_k;
        e_k <- ((n_k - m_k) e_k + sum of its z) / n_k        of m_k inputs in the step

    With `decay` 1 a centre is the mean of all it has ever had: for features that stay. Centres
    begin as inputs, and those out of use become inputs again, as in `Codebook`.

    Source: Sculley 2010, "Web-scale k-means clustering", algorithm 1, whose rate for each input is
    1 / n_k: a step of several is this mean.
    """

    def __init__(self, size: int, dim: int, *, decay: float, revive_below: float) -> None:
        super().__init__(size, dim, decay=decay, revive_below=revive_below)
        # fp64: beyond 2**24 inputs a few more would not count in fp32.
        self.register_buffer("counts", torch.zeros(size, dtype=torch.float64))

    def codes(self, z: Tensor) -> Tensor:
        """Nearest codes (n,) of z (n, d); of equally near ones the first."""
        rows = max(1, _MOST_SIMILARITIES // len(self.vectors))
        z, half = z.to(self.vectors.dtype), self.vectors.square().sum(1) / 2
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([(part @ self.vectors.T - half).argmax(1) for part in z.split(rows)])

    @torch.no_grad()
    def forward(self, z: Tensor) -> Quantized:
        """Codes of z (n, d), their centres, and as `commitment` the sum of squared distances; in
        training remembers z for `update`.
        """
        z = z.to(self.vectors.dtype)
        codes = self.codes(z)
        if self.training:
            self._pending.append((z, codes))
        centres = self.vectors[codes]
        return Quantized(codes, centres, (z - centres).square().sum())

    def _moved(self, sums: Tensor, counts: Tensor) -> Tensor:
        kept = self.counts * self.decay
        self.counts.copy_(kept + counts)
        total = self.counts.clamp(min=1e-12)[:, None]
        return ((kept[:, None] * self.vectors + sums) / total).to(self.vectors.dtype)

    def _forget(self, revived: Tensor) -> None:
        self.counts.masked_fill_(revived, 0)


def sums_by_code(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sums (K, d) and numbers (K,) of the rows of z (n, d) of each code, in a fixed order."""
    sorted_codes, order = codes.sort(stable=True)
    ends = torch.searchsorted(sorted_codes, torch.arange(size + 1, device=codes.device))
    sums = torch.segment_reduce(z[order], "sum", offsets=ends, initial=0, unsafe=True)
    return sums, ends.diff().to(z.dtype)
