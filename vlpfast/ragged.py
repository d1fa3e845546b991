"""Ragged: sequences of different lengths packed end to end, the form in which text travels through
the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """B sequences packed along the first dimension.

    Attributes:
        values (T, ...): the tokens of all sequences, end to end.
        cu_seqlens (B + 1,): int32 offsets, `values[cu_seqlens[b]:cu_seqlens[b + 1]]` is sequence b.
        max_len: host-side upper bound of the lengths, so that nothing downstream waits for the
            device.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_len: int

    @classmethod
    def from_lists(
        cls, sequences: Sequence[Sequence[int]], device: torch.device | str | None = None
    ) -> Ragged:
        """Packs Python sequences of token ids (int64 values)."""
        lens = torch.tensor([0, *(len(s) for s in sequences)])
        values = torch.tensor(
            [token for s in sequences for token in s], dtype=torch.int64, device=device
        )
        return cls(values, lens.cumsum(0).to(device=device, dtype=torch.int32), int(lens.max()))

    @classmethod
    def from_padded(cls, padded: Tensor, lens: Tensor) -> Ragged:
        """Packs `padded` (B, L, ...), whose row b holds `lens[b]` valid tokens first."""
        valid = torch.arange(padded.shape[1], device=padded.device) < lens[:, None]
        cu_seqlens = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
        return cls(padded[valid], cu_seqlens, padded.shape[1])

    @classmethod
    def from_dense(cls, dense: Tensor) -> Ragged:
        """Packs `dense` (B, N, ...), all of whose tokens are valid."""
        size, length = dense.shape[:2]
        cu_seqlens = length * torch.arange(size + 1, dtype=torch.int32, device=dense.device)
        return cls(dense.flatten(0, 1), cu_seqlens, length)

    @classmethod
    def empty(cls, like: Tensor) -> Ragged:
        """One sequence without tokens, of values as `like` (T, ...) has."""
        return cls(like[:0], torch.zeros(2, dtype=torch.int32, device=like.device), 0)

    @classmethod
    def cat(cls, parts: Sequence[Ragged]) -> Ragged:
        """The sequences of all parts, one after the other."""
        offsets, base = [parts[0].cu_seqlens], parts[0].cu_seqlens[-1]
        for part in parts[1:]:
            offsets.append(part.cu_seqlens[1:] + base)
            base = base + part.cu_seqlens[-1]
        return cls(
            torch.cat([p.values for p in parts]), torch.cat(offsets), max(p.max_len for p in parts)
        )

    @classmethod
    def join(cls, first: Ragged, second: Ragged, rows: Tensor | None = None) -> Joined:
        """R sequences: sequence r of `first`, then `rows[r]` (R,) int64 of `second`; None: r.

        With `rows` the device is asked how many tokens these are, without it nothing is.
        """
        size, both = len(first), cls.cat([first, second])
        own = torch.arange(size, device=first.cu_seqlens.device)
        order = torch.stack([own, size + (own if rows is None else rows)], 1).flatten()
        pieces = both.select(order, both.values.shape[0] if rows is None else None)
        totals = first.values.shape[0], pieces.values.shape[0] - first.values.shape[0]
        return Joined(pieces, (first.max_len, second.max_len), totals)

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lens(self) -> Tensor:
        """(B,) int32: length of each sequence."""
        return self.cu_seqlens.diff()

    def with_values(self, values: Tensor) -> Ragged:
        """The same sequences with other per-token values (T, ...)."""
        return replace(self, values=values)

    def to(self, *args, **kwargs) -> Ragged:
        """`Tensor.to` for values and offsets; a dtype applies to values only."""
        values = self.values.to(*args, **kwargs)
        return replace(self, values=values, cu_seqlens=self.cu_seqlens.to(values.device))

    def row_ids(self) -> Tensor:
        """(T,) int64: the sequence each token belongs to."""
        rows = torch.arange(len(self), device=self.cu_seqlens.device)
        return rows.repeat_interleave(self.lens, output_size=self.values.shape[0])

    def positions(self) -> Tensor:
        """(T,) int64: place of each token in its sequence, from 0."""
        return (
            torch.arange(self.values.shape[0], device=self.values.device)
            - self.cu_seqlens.long()[self.row_ids()]
        )

    def first(self) -> Tensor:
        """(B,) int64: packed index of each sequence's first token."""
        return self.cu_seqlens[:-1].long()

    def last(self) -> Tensor:
        """(B,) int64: packed index of each sequence's last token."""
        return self.cu_seqlens[1:].long() - 1

    def but_last(self) -> Tensor:
        """(T - B,) int64: packed indices of all tokens but the last of each sequence."""
        size = self.values.shape[0] - len(self)
        rows = torch.arange(len(self), device=self.cu_seqlens.device)
        ends = rows.repeat_interleave(self.lens - 1, output_size=size)
        return torch.arange(size, device=ends.device) + ends

    def without_last(self) -> Ragged:
        """Each sequence without its last token."""
        rows = torch.arange(len(self) + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return Ragged(self.values[self.but_last()], self.cu_seqlens - rows, self.max_len - 1)

    def append(self, last: Tensor) -> Ragged:
        """Each sequence with one token more, `last` (B, ...), at its end."""
        size, total = len(self), self.values.shape[0]
        rows = torch.arange(size + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        grown = Ragged(self.values, self.cu_seqlens + rows, self.max_len + 1)
        own = torch.arange(total, device=self.values.device)
        source = own.new_empty(total + size)
        source[own + self.row_ids()] = own
        source[grown.last()] = total + rows[:-1].long()
        return grown.with_values(torch.cat([self.values, last])[source])

    def token_ids_of(self, rows: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
        """Packed indices of the tokens of sequences `rows` (R,), and offsets (R + 1,) int32; how
        many tokens these are the device is asked, unless `total` says it.
        """
        lens = self.lens[rows]
        cu_seqlens = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
        shift = (self.cu_seqlens[rows] - cu_seqlens[:-1]).long()
        shift = shift.repeat_interleave(lens, output_size=total)
        return torch.arange(shift.shape[0], device=shift.device) + shift, cu_seqlens

    def select(self, rows: Tensor, total: int | None = None) -> Ragged:
        """Sequences `rows` (R,) int64, in that order; a sequence may be taken several times.
        `total` as in `token_ids_of`.
        """
        token_ids, cu_seqlens = self.token_ids_of(rows, total)
        return Ragged(self.values[token_ids], cu_seqlens, self.max_len)

    def pad(self, value: float = 0) -> tuple[Tensor, Tensor]:
        """(B, max_len, ...) values padded with `value`, and (B, max_len) bool, True on tokens."""
        valid = torch.arange(self.max_len, device=self.values.device) < self.lens[:, None]
        padded = self.values.new_full((len(self), self.max_len, *self.values.shape[1:]), value)
        padded[valid] = self.values
        return padded, valid


class Joined(NamedTuple):
    """What `Ragged.join` made: pieces, 2 R sequences of which 2 r and 2 r + 1 are the two parts of
    one; max_lens, bounds of the parts' lengths; totals, how many tokens they are.
    """

    pieces: Ragged
    max_lens: tuple[int, int]
    totals: tuple[int, int]

    @property
    def whole(self) -> Ragged:
        """The R sequences."""
        # Every other offset: two parts are one sequence.
        bounds = self.pieces.cu_seqlens[::2].contiguous()
        return Ragged(self.pieces.values, bounds, sum(self.max_lens))

    def part(self, number: int, values: Tensor | None = None) -> Ragged:
        """The first (0) or the second (1) part of each sequence, of other `values` (T, ...)."""
        pieces = self.pieces if values is None else self.pieces.with_values(values)
        part = pieces.select(self._rows(number), self.totals[number])
        return replace(part, max_len=self.max_lens[number])

    def token_ids(self, number: int) -> Tensor:
        """Packed indices of the tokens of those parts."""
        return self.pieces.token_ids_of(self._rows(number), self.totals[number])[0]

    def _rows(self, number: int) -> Tensor:
        size, device = len(self.pieces), self.pieces.cu_seqlens.device
        return torch.arange(number, size, 2, device=device)
