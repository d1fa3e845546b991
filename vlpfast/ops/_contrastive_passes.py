"""The passes over one tile of similarities that the chunked contrastive losses are made of: their
schemas, formulas (`Passes`), and which back end runs them.

Letters: M rows (queries) and N columns (candidates) of a tile.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from vlpfast import _ext

# What every pass is told about pairs: positive(i, j) = row_ids[i] == col_ids[j], or, without ids,
# j == i + diag_offset. diag[i] is the exact value of column i + diag_offset of the tile.
_IDS = "Tensor? row_ids, Tensor? col_ids"
_PAIRS = f"{_IDS}, Tensor? diag, int diag_offset"

_SCHEMAS = {
    "contrastive_stats": (
        f"(Tensor sims, Tensor scale, {_PAIRS}, Tensor(a!) row_max, Tensor(b!) row_sum,"
        " Tensor(c!) row_pos, Tensor(d!)? col_max, Tensor(e!)? col_sum, Tensor(f!)? col_pos) -> ()"
    ),
    "contrastive_teacher": (
        "(Tensor sims, Tensor teacher_sims, Tensor scale, Tensor? diag, int diag_offset,"
        " Tensor(a!) row_max, Tensor(b!) row_sum, Tensor(c!) row_dot) -> ()"
    ),
    "contrastive_grad": (
        f"(Tensor(a!) sims, Tensor? teacher_sims, Tensor scale, {_PAIRS}, Tensor row_max,"
        " Tensor row_sum, Tensor? col_max, Tensor? col_sum, Tensor row_weight,"
        " Tensor? col_weight, float smoothing, Tensor? teacher_max, Tensor? teacher_sum,"
        " float alpha, Tensor(b!) row_dot) -> ()"
    ),
    "contrastive_sigmoid": (
        f"(Tensor(a!) sims, Tensor? teacher_sims, Tensor scale, Tensor bias, {_PAIRS},"
        " float positive, float negative, float alpha, bool write_grad, Tensor(b!) row_loss,"
        " Tensor(c!)? col_loss, Tensor(d!) row_dot, Tensor(e!) row_grad) -> ()"
    ),
    "contrastive_negatives": (
        "(Tensor sims, Tensor scale, Tensor? seed, int first_row, int row_offset, int side,"
        f" {_IDS}, int diag_offset, Tensor(a!) row_best, Tensor(b!) row_index,"
        " Tensor(c!)? col_best, Tensor(d!)? col_index) -> ()"
    ),
    "contrastive_hinge": (
        f"(Tensor(a!) sims, {_IDS}, int diag_offset, Tensor row_pair, Tensor col_pair,"
        " float margin, Tensor(b!) row_loss, Tensor(c!) row_count, Tensor(d!) col_count) -> ()"
    ),
}

# Of keys that have no gradient, from features: similarities and all that follows in one walk.
_KEYS = f"Tensor query, Tensor? teacher, Tensor keys, Tensor scale, {_IDS.replace('col', 'key')}"
_KEY_SCHEMAS = {
    "contrastive_keys_stats": (
        f"({_KEYS}, Tensor(a!)? sims, Tensor(b!) row_max, Tensor(c!) row_sum, Tensor(d!) row_pos,"
        " Tensor(e!)? teacher_max, Tensor(f!)? teacher_sum, Tensor(g!)? teacher_dot) -> ()"
    ),
    "contrastive_keys_grad": (
        f"({_KEYS}, Tensor? sims, Tensor row_max, Tensor row_sum, Tensor row_weight,"
        " float smoothing, Tensor? teacher_max, Tensor? teacher_sum, float alpha,"
        " Tensor(a!) row_dot, Tensor(b!)? row_grad) -> ()"
    ),
}

for _name, _schema in (_SCHEMAS | _KEY_SCHEMAS).items():
    torch.library.define(f"vlpfast::{_name}", _schema)
    # They write into their arguments and return nothing.
    torch.library.register_fake(f"vlpfast::{_name}", lambda *_: None)


class Passes(NamedTuple):
    """One back end's passes over a tile `sims` (M, N) of raw similarities, fp32 or bf16, whose row
    stride may be larger than N. z = scale * sims. All write into their arguments, in a fixed order.

    "Running": merged with what is there; start with max = -inf, the rest 0 (index: -1).

    Attributes:
        stats: running log-sum-exp of z (max, and sum of exp(z - max)) and sum of sims over
            positives, of each row and, if given, of each column.
        teacher: the running log-sum-exp of each row of the teacher's z, and
            row_dot = sum_j exp(z_teacher - row_max) * sims.
        grad: overwrites sims with g = exp(z - row_max) / row_sum [+ exp(z - col_max) / col_sum]
            - positive * (row_weight [+ col_weight]) - smoothing
            [- alpha * exp(z_teacher - teacher_max) / teacher_sum]; row_dot += sum_j g * sims.
            (A log-sum-exp rounded to fp32 would cost digits where softmax is close to 1.)
        sigmoid: z also + bias; t = (positive or negative) + alpha * sigmoid(z_teacher). row_loss
            and col_loss += softplus(z) - t z; g = sigmoid(z) - t overwrites sims if `write_grad`;
            row_dot += sum_j g * sims; row_grad += sum_j g.
        negatives: running k best, best first, of z + Gumbel noise (none without a seed) over pairs
            that are not positives. Streams: ops/reference/contrastive.py.
        hinge: over pairs that are not positives, a = margin + sims - row_pair, b with col_pair:
            row_loss += sum_j max(a, 0) + max(b, 0); row_count += sum_j [a > 0]; col_count +=
            sum_i [b > 0]; [a > 0] + [b > 0] overwrites sims.
        fused_stats: what `stats` and, for k = 1, `negatives` find, from the features of rows and
            columns in place of sims, in one matrix product that stores none; None: not there.
        keys_stats: what `stats` and `teacher` find of keys without a gradient, from features.
            `sims`, if given, keeps similarities for `keys_grad` in an order of its own
            (`_contrastive_tiles.num_kept`). None: not there, as `keys_grad`.
        keys_grad: what `grad` finds, and row_grad (M, D) += g @ keys, if given. `sims` are those
            that `keys_stats` kept; without, they are made again.
    """

    stats: Callable[..., None]
    teacher: Callable[..., None]
    grad: Callable[..., None]
    sigmoid: Callable[..., None]
    negatives: Callable[..., None]
    hinge: Callable[..., None]
    fused_stats: Callable[..., None] | None = None
    keys_stats: Callable[..., None] | None = None
    keys_grad: Callable[..., None] | None = None


_bound = lambda names: (getattr(torch.ops.vlpfast, name).default for name in names)
_CPP = Passes(*_bound(_SCHEMAS), None, *_bound(_KEY_SCHEMAS))


def passes_of(name: str) -> Passes:
    """The passes of back end "cpp" or "triton"."""
    if name == "cpp":
        return _CPP
    kernels = importlib.import_module("vlpfast.kernels.contrastive")
    return Passes(*(getattr(kernels, name) for name in _SCHEMAS), kernels.contrastive_fused_stats)


def triton_missing() -> str | None:
    """Why the Triton passes cannot run, or None."""
    reason = _ext.triton_missing()
    if reason is None and importlib.util.find_spec("vlpfast.kernels.contrastive") is None:
        return "vlpfast.kernels.contrastive is not installed"
    return reason


def cpp_rejects(*, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the C++ passes cannot take these features, or None."""
    return _ext.cpp_rejects(device) or _dtype_rejected(dtype, (torch.float32, torch.bfloat16))


def triton_rejects(*, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton passes cannot take these features, or None."""
    takes = (torch.float32, torch.bfloat16, torch.float16)
    return _ext.triton_rejects(device) or _dtype_rejected(dtype, takes)


def _dtype_rejected(dtype: torch.dtype, takes: tuple[torch.dtype, ...]) -> str | None:
    return None if dtype in takes else f"takes {', '.join(map(str, takes))}, got {dtype}"
