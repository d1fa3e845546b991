"""The exact quantile of any number of float32 values, as a stream in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil

import numpy as np


def top_share(chunks: Callable[[], Iterator[np.ndarray]], fraction: float) -> tuple[float, int]:
    """The lowest score that is among the highest ceil(fraction * n) of n scores, and n.

    Exact at any n, in two passes over the chunks and constant memory: a float's bits order as its
    value, so counts by the high half find the low half to count.

    Args:
        chunks: begins a pass: float32 arrays, whose NaNs do not count.
        fraction: in (0, 1], taken as its decimal digits are written.

    Raises:
        ValueError: there is no score.
    """
    high = sum((_counts(_order(c) >> 16) for c in chunks()), np.zeros(1 << 16, np.int64))
    total = int(high.sum())
    if not total:
        raise ValueError("keep_fraction: there is no score to keep by")
    left = ceil(Fraction(repr(fraction)) * total)
    bucket, left = _descend(high, left)
    low = np.zeros(1 << 16, np.int64)
    for chunk in chunks():
        order = _order(chunk)
        low += _counts(order[order >> 16 == bucket] & 0xFFFF)
    order = np.array([bucket << 16 | _descend(low, left)[0]], np.uint32)
    bits = np.where(order >> 31, order ^ 0x80000000, ~order).astype(np.uint32)
    return float(bits.view(np.float32)[0]), total


def _order(scores: np.ndarray) -> np.ndarray:
    """uint32 that order as the scores, without NaNs; -0 becomes 0."""
    bits = (scores[~np.isnan(scores)] + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | 0x80000000).astype(np.uint32)


def _counts(halves: np.ndarray) -> np.ndarray:
    return np.bincount(halves, minlength=1 << 16)


def _descend(counts: np.ndarray, place: int) -> tuple[int, int]:
    """The bin of the `place`-th item from the top, from 1, and its place within the bin."""
    above = counts[::-1].cumsum()
    at = int(np.searchsorted(above, place))
    return len(counts) - 1 - at, place - int(above[at] - counts[::-1][at])
