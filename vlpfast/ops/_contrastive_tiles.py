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
from vlpfast.ops._contrastive_products import row_dots

# Tiles of up to this size stay in the last-level cache between the product and the pass.
_TILE_BYTES = 8 << 20
# Fewer rows make the matrix products slow, more are no faster.
_MIN_TILE_ROWS, _MAX_TILE_ROWS = 256, 1024


class Tile(NamedTuple):
    """Similarities (M, N) of `rows` with `block`, and which pairs are positives of each other.

    Attributes:
        sims, teacher_sims (M, N): raw similarities; the teacher's may be None.
        pairs: row_ids, col_ids, diag, diag_offset as the passes take them.
        is_batch: the candidates are of the batch, not keys.
        is_own: the candidates are this rank's own pairs.
    """

    sims: Tensor
    teacher_sims: Tensor | None
    rows: slice
    block: Block
    pairs: tuple[Tensor | None, Tensor | None, Tensor | None, int]
    is_batch: bool
    is_own: bool

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
        keep: tiles are kept until they are asked for a second time.
    """

    query: Tensor
    teacher: Tensor | None
    batch: Candidates | None
    keys: Tensor | None
    ids: Tensor | None
    batch_ids: Tensor | None
    key_ids: Tensor | None
    first_row: int
    keep: bool = False
    _kept: dict[tuple[bool, int, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def row_bytes(self, num_batch: int) -> int:
        """Bytes of one row's similarities, `num_batch` of them in the batch."""
        num_batch = 0 if self.batch is None else num_batch
        num_keys = 0 if self.keys is None else self.keys.shape[0]
        copies = 1 if self.teacher is None else 2
        return copies * (num_batch + num_keys) * self.query.element_size()

    def tiles(self, rows: slice, with_grad: bool) -> Iterator[Tile]:
        """Every tile of `rows`; `with_grad` as often as gradients of the candidates are added up,
        which a caller does before it asks for the next tile.
        """
        if self.batch is not None:
            for block in self.batch.grad_blocks() if with_grad else self.batch.blocks():
                yield from self._tiles_of(block, rows, is_batch=True)
        if self.keys is not None:
            yield from self._tiles_of(Block(self.keys, 0), rows, is_batch=False)

    def _tiles_of(self, block: Block, rows: slice, is_batch: bool) -> Iterator[Tile]:
        N = block.features.shape[0]
        if N == 0:
            return
        most = _TILE_BYTES // (N * self.query.element_size()) // 8 * 8
        most = min(max(most, _MIN_TILE_ROWS), _MAX_TILE_ROWS)
        buffers: list[Tensor] = []
        for start in range(rows.start, rows.stop, most):
            chunk = slice(start, min(start + most, rows.stop))
            sims, teacher_sims = self._similarities(block, chunk, is_batch, buffers)
            is_own = is_batch and block.first == self.first_row
            pairs = self._pairs(block, chunk, is_batch, is_own)
            yield Tile(sims, teacher_sims, chunk, block, pairs, is_batch, is_own)

    def _similarities(
        self, block: Block, rows: slice, is_batch: bool, buffers: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        place = (is_batch, block.first, rows.start)
        if place in self._kept:
            return self._kept.pop(place)
        queries = [self.query] if self.teacher is None else [self.query, self.teacher]
        shape = (rows.stop - rows.start, block.features.shape[0])
        if self.keep or not buffers:
            # The first chunk is the largest: the others of the block reuse its memory.
            buffers[:] = [query.new_empty(shape) for query in queries]
        sims = [
            torch.mm(query[rows], block.features.T, out=buffer[: shape[0]])
            for query, buffer in zip(queries, buffers, strict=True)
        ]
        result = (sims[0], sims[1] if len(sims) > 1 else None)
        if self.keep:
            self._kept[place] = result
        return result

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
            diag = row_dots(self.query[rows], block.features[rows])
        return (None if ids is None else self.ids[rows], ids, diag, offset)
