"""Contrastive losses and their gradients without a matrix of all pairs: similarities are made for a
chunk of rows at a time by a matrix product, and one pass over that tile does all the rest.

Memory is O(B D + chunk * C). Gradients are made here, in the forward, up to the upstream factor.
The maths is in docs/ops.md, under contrastive.

Letters: C candidates of a direction, M rows and N columns of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops._contrastive_dist import Candidates, OneProcess, Ranks
from vlpfast.ops._contrastive_passes import Passes
from vlpfast.ops._contrastive_products import add_product, row_sums, zeros
from vlpfast.ops._contrastive_state import (
    Direction,
    Problem,
    Result,
    Sums,
    Wants,
    count_equal,
)
from vlpfast.ops._contrastive_tiles import Sweep, Tile, walks_keys

# Similarities of up to this size, by device, are kept from the log-sum-exps to the gradient, which
# saves one of four matrix products (results/*/contrastive.csv: cpp against cpp_recompute); more
# are computed again. The GPU's figure is that of a batch of 32768 in bf16.
_KEEP_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}

# Whose similarities the first look need not store, if they are not kept: it then sees them in fp32,
# and the second look rounded, so p of a confident pair is 1 to about 1e-5 and not to the last bit.
# That is below the rounding of these features; for fp32 features both looks see the same product.
_FUSED_DTYPES = (torch.bfloat16, torch.float16)


def chunked(problem: Problem, passes: Passes, ranks: OneProcess | Ranks, wants: Wants) -> Result:
    """The loss, its statistics and the gradients that are wanted.

    With ranks, each of them must make this call with the same `wants`, and gradients are those of
    the sum of the losses of all ranks: nothing is left to communicate in a backward.
    """
    return _Run(problem, passes, ranks, wants).result()


class _Run:
    """State of one call. Texts' sums are those of the columns of images' tiles, unless a teacher
    gives each direction candidates of its own.
    """

    def __init__(
        self, problem: Problem, passes: Passes, ranks: OneProcess | Ranks, wants: Wants
    ) -> None:
        self.problem, self.passes, self.ranks, self.wants = problem, passes, ranks, wants
        self.G, self.B = sum(ranks.counts), problem.image.shape[0]
        self.keep_bytes = _KEEP_BYTES[problem.image.device.type]
        self.batch_ids = None if problem.ids is None else ranks.gather(problem.ids)
        self.spare: dict[int, Tensor] = {}
        self.row_weights: dict[bool, Tensor] = {}
        own = slice(ranks.first_row, ranks.first_row + self.B)
        image, text, p = problem.image, problem.text, problem
        self.columns = self.column_weight = None
        if p.image_teacher is None:
            self.columns = Sums.start(self.G, image)
            self.column_weight = self._weights(self.batch_ids, self.G, p.image_keys)
            self.batch = ranks.candidates(text, trained=wants.text)
            sides = [
                (image, None, self.batch, p.text_keys, Sums.start(self.B, image)),
                (text, None, None, p.image_keys, self.columns.of(own)),
            ]
        else:
            teachers = (p.image_teacher, p.text_teacher) if p.alpha > 0 else (None, None)
            # Both gathers start before either is needed.
            texts, images = (
                ranks.candidates(x, trained=False) for x in (p.text_teacher, p.image_teacher)
            )
            sides = [
                (image, teachers[0], texts, p.text_keys, Sums.start(self.B, image)),
                (text, teachers[1], images, p.image_keys, Sums.start(self.B, image)),
            ]
        # Texts that are columns have their gradient from `batch`, and from keys only here.
        trained = (wants.image, wants.text and (self.columns is None or p.image_keys is not None))
        self.directions = [
            self._direction(*side, t) for side, t in zip(sides, trained, strict=True)
        ]

    def _direction(
        self,
        query: Tensor,
        teacher: Tensor | None,
        batch: Candidates | None,
        keys: Tensor | None,
        sums: Sums,
        trained: bool,
    ) -> Direction:
        p, k = self.problem, self.problem.hard_negatives
        if keys is not None and keys.shape[0] == 0:
            keys = None
        sweep = Sweep(
            query, teacher, batch, keys, p.ids, self.batch_ids,
            None if keys is None else p.key_ids, self.ranks.first_row,
            walks_keys=self._walks_keys(query), spare=self.spare,
        )  # fmt: skip
        vector = lambda: query.new_zeros(self.B, dtype=torch.float32)
        return Direction(
            sweep=sweep,
            sums=sums,
            weight=self._row_weight(keys),
            num_candidates=self.G + (0 if keys is None else keys.shape[0]),
            grad=zeros(query.shape, query) if trained else None,
            dot=vector(),
            bias_dot=vector(),
            best=query.new_full((self.B, k), -torch.inf, dtype=torch.float32),
            drawn=query.new_full((self.B, k), -1, dtype=torch.int64),
        )

    def _row_weight(self, keys: Tensor | None) -> Tensor:
        """Of this rank's rows: made once for both directions where it is the same."""
        has_keys = keys is not None
        if has_keys not in self.row_weights:
            self.row_weights[has_keys] = self._weights(self.problem.ids, self.B, keys)
        return self.row_weights[has_keys]

    def _weights(self, ids: Tensor | None, size: int, keys: Tensor | None) -> Tensor:
        """(1 - alpha) (1 - smoothing) / number of positives, of each row with these ids."""
        p = self.problem
        weight = (1 - p.alpha) * (1 - p.label_smoothing)
        if ids is None:
            return p.image.new_full((size,), weight, dtype=torch.float32)
        key_ids = None if keys is None else p.key_ids
        return weight / count_equal(ids, self.batch_ids, key_ids).float()

    def _smoothing(self, direction: Direction) -> float:
        """What smoothing adds to every target."""
        p = self.problem
        return (1 - p.alpha) * p.label_smoothing / max(1, direction.num_candidates)

    def result(self) -> Result:
        if self.problem.kind == "softmax":
            self._softmax()
            losses = [self._softmax_losses(direction) for direction in self.directions]
            bias = self.problem.bias
            lses = [direction.sums.lse() + bias for direction in self.directions]
        else:
            self._sigmoid()
            losses = [direction.sums.loss for direction in self.directions]
            lses = [self.problem.scale.new_empty(0) for _ in self.directions]
        share = self.ranks.world_size / max(1, self.G)
        image_to_text, text_to_image = (loss.sum() * share for loss in losses)
        loss = (image_to_text + text_to_image) / 2
        drawn = [direction.drawn for direction in self.directions]
        grads = self._gradients(share / 2)
        return Result(loss, image_to_text, text_to_image, *lses, *drawn, *grads)

    def _softmax(self) -> None:
        if self.columns is not None:
            rows = slice(0, self.B)
            self._plan_keeping(self.directions, rows)
            for direction in self.directions:
                self._look(direction, rows)
            columns = self.columns
            self.ranks.merge(columns.max, columns.exp, columns.positive, columns.total)
            for direction in self.directions if any(self.wants) else ():
                self._differentiate(direction, rows)
            return
        for direction in self.directions:
            # Rows know their sums alone, so a group of rows whose tiles all fit is done at a time.
            for rows in self._groups(direction):
                self._plan_keeping([direction], rows)
                self._look(direction, rows)
                if any(self.wants):
                    self._differentiate(direction, rows)

    def _groups(self, direction: Direction) -> list[slice]:
        size = max(1, self.B)
        if direction.sweep.batch.is_repeatable:
            size = max(64, self.keep_bytes // max(1, direction.sweep.row_bytes(self.G)))
        # Without rows one empty group, so that this rank too takes part in what ranks exchange.
        starts = range(0, max(1, self.B), size)
        return [slice(start, min(start + size, self.B)) for start in starts]

    def _plan_keeping(self, directions: list[Direction], rows: slice) -> None:
        num_bytes = sum(x.sweep.row_bytes(self.G) for x in directions) * (rows.stop - rows.start)
        for direction in directions:
            direction.sweep.keep = any(self.wants) and num_bytes <= self.keep_bytes

    def _look(self, direction: Direction, rows: slice) -> None:
        """First look at every tile: log-sum-exps, positives, the teacher, hard negatives."""
        p, scale = self.problem, self.problem.scale
        fused = self._looks_fused(direction.sweep)
        for tile in direction.sweep.tiles(rows, with_grad=False, with_sims=not fused):
            mine = direction.sums.of(tile.rows)
            shared = self.columns is not None and tile.is_batch
            across = self.columns.of(tile.columns) if shared else None
            sums = (*mine[:3], *(across[:3] if shared else (None,) * 3))
            if tile.is_walked:
                self._look_at_keys(direction, tile)
            elif fused:
                self._look_fused(direction, tile, sums)
            else:
                self.passes.stats(tile.sims, scale, *tile.pairs, *sums)
                self._draw(direction, tile)
            if tile.teacher_sims is not None:
                self.passes.teacher(
                    tile.sims, tile.teacher_sims, scale, *tile.pairs[2:],
                    mine.teacher_max, mine.teacher_exp, mine.teacher_dot,
                )  # fmt: skip
            if p.label_smoothing > 0:
                query, candidates = direction.sweep.query[tile.rows], tile.block.features
                mine.total.add_(row_sums(query, candidates))
                if shared:
                    across.total.add_(row_sums(candidates, query))

    def _walks_keys(self, query: Tensor) -> bool:
        has_walk = self.passes.keys_stats is not None and self.problem.kind == "softmax"
        return has_walk and walks_keys(query)

    def _look_at_keys(self, direction: Direction, tile: Tile) -> None:
        mine, sweep = direction.sums.of(tile.rows), direction.sweep
        of_teacher = (mine.teacher_max, mine.teacher_exp, mine.teacher_dot)
        self.passes.keys_stats(
            *sweep.queries(tile.rows), sweep.keys, self.problem.scale, *tile.pairs[:2], tile.sims,
            *mine[:3], *((None,) * 3 if sweep.teacher is None else of_teacher),
        )  # fmt: skip

    def _differentiate_keys(self, direction: Direction, tile: Tile) -> None:
        mine, sweep, rows = direction.sums.of(tile.rows), direction.sweep, tile.rows
        of_teacher = (mine.teacher_max, mine.teacher_exp)
        self.passes.keys_grad(
            *sweep.queries(rows), sweep.keys, self.problem.scale, *tile.pairs[:2], tile.sims,
            mine.max, mine.exp, direction.weight[rows], self._smoothing(direction),
            *((None,) * 2 if sweep.teacher is None else of_teacher), self.problem.alpha,
            direction.dot[rows], None if direction.grad is None else direction.grad[rows],
        )  # fmt: skip

    def _looks_fused(self, sweep: Sweep) -> bool:
        """Whether the first look makes statistics and draws without storing similarities."""
        can = self.passes.fused_stats is not None and self.problem.hard_negatives <= 1
        fits = sweep.query.dtype in _FUSED_DTYPES and sweep.teacher is None
        return can and fits and not sweep.keep

    def _look_fused(
        self, direction: Direction, tile: Tile, sums: tuple[Tensor | None, ...]
    ) -> None:
        p, draws = self.problem, {}
        if p.hard_negatives > 0 and tile.is_own:
            draws = {
                "seed": p.seed,
                "first_row": self.ranks.first_row,
                "row_offset": tile.rows.start,
                "side": 0 if direction is self.directions[0] else 1,
                "row_best": direction.best[tile.rows],
                "row_index": direction.drawn[tile.rows],
            }
            if self.columns is not None:
                other = self.directions[1]
                draws |= {"col_best": other.best, "col_index": other.drawn}
        row_ids, col_ids, _, offset = tile.pairs
        self.passes.fused_stats(
            direction.sweep.query[tile.rows], tile.block.features, p.scale,
            row_ids, col_ids, offset, *sums, **draws,
        )  # fmt: skip

    def _draw(self, direction: Direction, tile: Tile) -> None:
        p = self.problem
        if p.hard_negatives == 0 or not tile.is_own:
            return
        other = self.directions[1]
        columns = (None, None) if self.columns is None else (other.best, other.drawn)
        row_ids, col_ids, _, offset = tile.pairs
        self.passes.negatives(
            tile.sims, p.scale, p.seed, self.ranks.first_row, tile.rows.start,
            0 if direction is self.directions[0] else 1, row_ids, col_ids, offset,
            direction.best[tile.rows], direction.drawn[tile.rows], *columns,
        )  # fmt: skip

    def _differentiate(self, direction: Direction, rows: slice) -> None:
        """Second look: turns every tile into g, and g into gradients."""
        p = self.problem
        for tile in direction.sweep.tiles(rows, with_grad=True):
            if tile.is_walked:
                self._differentiate_keys(direction, tile)
                continue
            mine, smoothing = direction.sums.of(tile.rows), self._smoothing(direction)
            column_max = column_exp = column_weight = teacher_max = teacher_exp = None
            if self.columns is not None and tile.is_batch:
                smoothing += self._smoothing(self.directions[1])
                column_max, column_exp = self.columns.of(tile.columns)[:2]
                column_weight = self.column_weight[tile.columns]
            if tile.teacher_sims is not None:
                teacher_max, teacher_exp = mine.teacher_max, mine.teacher_exp
            self.passes.grad(
                tile.sims, tile.teacher_sims, p.scale, *tile.pairs, mine.max, mine.exp,
                column_max, column_exp, direction.weight[tile.rows], column_weight, smoothing,
                teacher_max, teacher_exp, p.alpha, direction.dot[tile.rows],
            )  # fmt: skip
            self._multiply(direction, tile, 1)

    def _sigmoid(self) -> None:
        """One look: pairs do not compete, so a tile gives its loss and its gradient at once."""
        p, wanted = self.problem, any(self.wants)
        smoothing = (1 - p.alpha) * p.label_smoothing / 2
        positive = (1 - p.alpha) * (1 - p.label_smoothing) + smoothing
        for direction in self.directions:
            for tile in direction.sweep.tiles(slice(0, self.B), with_grad=wanted):
                self._draw(direction, tile)
                shared = self.columns is not None and tile.is_batch
                dot, bias_dot = torch.zeros_like(direction.dot[tile.rows]).expand(2, -1).clone()
                self.passes.sigmoid(
                    tile.sims, tile.teacher_sims, p.scale, p.bias, *tile.pairs, positive,
                    smoothing, p.alpha, wanted, direction.sums.loss[tile.rows],
                    self.columns.loss[tile.columns] if shared else None, dot, bias_dot,
                )  # fmt: skip
                # A pair of the batch is in both directions with one and the same g.
                times = 2 if shared else 1
                direction.dot[tile.rows] += times * dot
                direction.bias_dot[tile.rows] += times * bias_dot
                if wanted:
                    self._multiply(direction, tile, times)
        if self.columns is not None:
            self.ranks.add(self.columns.loss)

    def _multiply(self, direction: Direction, tile: Tile, times: int) -> None:
        if direction.grad is not None:
            add_product(direction.grad[tile.rows], tile.sims, tile.block.features, times)
        if tile.block.grad is not None:
            add_product(tile.block.grad, tile.sims.T, direction.sweep.query[tile.rows], times)

    def _softmax_losses(self, direction: Direction) -> Tensor:
        """(B,): lse - sum_j t_ij z_ij, the targets' part by the linear-logit identity."""
        p, sums = self.problem, direction.sums
        target = direction.weight * sums.positive + self._smoothing(direction) * sums.total
        if direction.sweep.teacher is not None:
            target = target + p.alpha * sums.teacher_dot / sums.teacher_exp
        # Not from the log-sum-exp, whose rounding would be all there is of a small loss.
        return sums.max - p.scale * target + sums.exp.log()

    def _gradients(self, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p, (image, text) = self.problem, self.directions
        empty = lambda: p.scale.new_empty(0)
        grads = [image.grad, text.grad]
        if self.wants.text and self.columns is not None:
            grads[1] = self.batch.gradient()
            if text.grad is not None:
                grads[1].add_(text.grad)
        factor = p.scale * share
        features = [
            empty() if grad is None else grad.mul_(factor).to(p.image.dtype) for grad in grads
        ]
        if not self.wants.scalars:
            return (*features, empty(), empty())
        total = lambda a, b: ((a.double().sum() + b.double().sum()) * share).float()
        # Softmax does not feel the bias: its g sum to 0.
        return (*features, total(image.dot, text.dot), total(image.bias_dot, text.bias_dot))
