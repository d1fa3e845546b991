"""Tiles of similarities that the chunked contrastive losses look at: a chunk of one modality's rows
against a block of its candidates, made by one matrix product.

Letters: C candidates of a direction, M rows and N columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vlpfast.ops._contrastive_dist import Block, Candidates
from vlpfast.ops._contrastive_products import empty, row_dots

# Tiles of up to this size, by device: a CPU's stay in the last-level cache from the product to the
# pass; a GPU's are large enough not to be bound by launches.
_TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# Fewer rows make the matrix products slow, more are no faster.
_MIN_TILE_ROWS = 256
_MAX_TILE_ROWS = {"cpu": 1024, "cuda": 4096}
# A walk over keys takes queries by so many (csrc/include/vlpfast/contrastive_keys_types.h).
_LANE_STEP = 16


class Tile(NamedTuple):
    """Similarities (M, N) of `rows` with `block`, and which pairs are positives of each other.

    Attributes:
        sims, teacher_sims (M, N): raw similarities; the teacher's may be None, and both are where
            no similarities were asked for.
        pairs: row_ids, col_ids, diag, diag_offset as the passes take them.
        is_batch: the candidates are of the batch, not keys.
        is_own: the candidates are this rank's own pairs.
        is_walked: keys, whose similarities the passes over keys make and, if `sims` is given, keep.
    """

    sims: Tensor | None
    teacher_sims: Tensor | None
    rows: slice
    block: Block
    pairs: tuple[Tensor | None, Tensor | None, Tensor | None, int]
    is_batch: bool
    is_own: bool
    is_walked: bool = False

    @property
    def columns(self) -> slice:
        """The block's place among the candidates of all ranks."""
        return slice(self.block.first, self.block.first + self.block.features.shape[0])


@dataclass
class Sweep:
    """The rows of one modality against their candidates.

    Attributes:
        query (B, D): features; teacher (B, D): the teacher's, or None.
        batch: where in-batch candidates come from, or None if this sweep has only keys.
        keys (K, D): further candidates, or None.
        ids (B,), batch_ids (G,), key_ids (K,): or None.
        first_row: place of row 0 in the batch of all ranks.
        walks_keys: the passes make similarities with keys themselves.
        spare: memory of similarities that are done with, by size, for who has such a need next:
            fresh memory costs its page faults.
        keep: a block's similarities are one tile, kept until it is asked for a second time.
    """

    query: Tensor
    teacher: Tensor | None
    batch: Candidates | None
    keys: Tensor | None
    ids: Tensor | None
    batch_ids: Tensor | None
    key_ids: Tensor | None
    first_row: int
    walks_keys: bool = False
    spare: dict[int, Tensor] = field(default_factory=dict)
    keep: bool = False
    _kept: dict[tuple[bool, int], Tensor] = field(default_factory=dict)
    _diag: Tensor | None = None

    def row_bytes(self, num_batch: int) -> int:
        """Bytes of one row's similarities, `num_batch` of them in the batch."""
        num_batch = 0 if self.batch is None else num_batch
        num_keys = 0 if self.keys is None else self.keys.shape[0]
        copies = 1 if self.teacher is None else 2
        return copies * (num_batch + num_keys) * self.query.element_size()

    def tiles(self, rows: slice, with_grad: bool, with_sims: bool = True) -> Iterator[Tile]:
        """Every tile of `rows`; `with_grad` as often as gradients of the candidates are added up,
        which a caller does before it asks for the next tile. Without similarities a tile is all
        `rows` against a block.
        """
        if self.batch is not None:
            for block in self.batch.grad_blocks() if with_grad else self.batch.blocks():
                yield from self._tiles_of(block, rows, True, with_sims)
        if self.keys is None:
            return
        if not self.walks_keys:
            yield from self._tiles_of(Block(self.keys, 0), rows, False, with_sims)
        elif rows.start < rows.stop:
            yield from self._walked_keys(rows)

    def _walked_keys(self, rows: slice) -> Iterator[Tile]:
        place, copies = (False, 0), 1 if self.teacher is None else 2
        size = num_kept(rows.stop - rows.start, self.keys.shape[0], copies)
        block, sims = Block(self.keys, 0), self._kept.pop(place, None)
        is_made = sims is not None
        if self.keep and not is_made:
            sims = self.spare.pop(size, None)
            self.spare.clear()
            self._kept[place] = sims = empty((size,), self.query) if sims is None else sims
        pairs = self._pairs(block, rows, False, False)
        yield Tile(sims, None, rows, block, pairs, False, False, is_walked=True)
        if is_made:
            self.spare[size] = sims

    def _tiles_of(
        self, block: Block, rows: slice, is_batch: bool, with_sims: bool
    ) -> Iterator[Tile]:
        N = block.features.shape[0]
        if N == 0 or rows.start == rows.stop:
            return
        if not with_sims:
            yield self._tile(None, None, rows, block, is_batch)
            return
        num_rows = rows.stop - rows.start
        most = num_rows if self.keep else min(_tile_rows(N, self.query), num_rows)
        place = (is_batch, block.first)
        is_made = place in self._kept
        copies = 1 if self.teacher is None else 2
        memory = self._kept.pop(place) if is_made else empty((copies * most, N), self.query)
        if self.keep and not is_made:
            self._kept[place] = memory
        for start in range(rows.start, rows.stop, most):
            chunk = slice(start, min(start + most, rows.stop))
            # Tiles of a block that are not kept follow each other in the same memory.
            sims = memory[: copies * (chunk.stop - chunk.start)]
            if not is_made:
                torch.mm(self._stacked(chunk), block.features.T, out=sims)
            sims, teacher_sims = (sims, None) if copies == 1 else sims.chunk(2)
            yield self._tile(sims, teacher_sims, chunk, block, is_batch)

    def _tile(
        self, sims: Tensor | None, teacher_sims: Tensor | None, rows: slice, block: Block,
        is_batch: bool,
    ) -> Tile:  # fmt: skip
        is_own = is_batch and block.first == self.first_row
        pairs = self._pairs(block, rows, is_batch, is_own)
        return Tile(sims, teacher_sims, rows, block, pairs, is_batch, is_own)

    def queries(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self.query[rows], None if self.teacher is None else self.teacher[rows]

    def _stacked(self, rows: slice) -> Tensor:
        """Rows of both, so that one product reads the candidates once."""
        query, teacher = self.queries(rows)
        return query if teacher is None else torch.cat([query, teacher])

    def _pairs(
        self, block: Block, rows: slice, is_batch: bool, is_own: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
        N = block.features.shape[0]
        ids = self.batch_ids if is_batch else self.key_ids
        if ids is not None:
            ids = ids[block.first : block.first + N]
        # Keys have no diagonal.
        offset = self.first_row + rows.start - block.first if is_batch else N
        diag = None
        if is_own and block.features.dtype != torch.float32:
            # A pair's own similarity weighs most, so it does not share the others' rounding.
            if self._diag is None:
                self._diag = row_dots(self.query, block.features)
            diag = self._diag[rows]
        return (None if ids is None else self.ids[rows], ids, diag, offset)


def num_kept(num_rows: int, num_keys: int, copies: int) -> int:
    """How many similarities a walk over keys keeps, of `copies` times `num_rows` queries."""
    return copies * -(-num_rows // _LANE_STEP) * _LANE_STEP * num_keys


def walks_keys(features: Tensor) -> bool:
    """Whether one walk over keys is faster than tiles: AMX's products are faster than either."""
    return features.dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()


def _tile_rows(num_columns: int, like: Tensor) -> int:
    most = _TILE_BYTES[like.device.type] // (num_columns * like.element_size()) // 8 * 8
    return min(max(most, _MIN_TILE_ROWS), _MAX_TILE_ROWS[like.device.type])
