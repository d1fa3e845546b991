"""Stochastic depth: in training, a branch of a block is left out for some samples."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops.reference.counter import draw, keep_mask, stream


def path_rates(rate: float, depth: int, first: int = 0, of: int = 0) -> list[float]:
    """Rates of `depth` blocks, the first of which is block `first` of a stack of `of` (0: of these
    alone), in which they rise linearly from 0 to `rate`.

    Source: Huang et al. 2016, section 3, arXiv:1603.09382; for 0 at the first block microsoft/unilm
    beit2/modeling_pretrain.py.
    """
    last = max((of or depth) - 1, 1)
    return [rate * (first + number) / last for number in range(depth)]


def path_scale(cu_seqlens: Tensor | None, tokens: Tensor, rate: float, seed: int) -> Tensor:
    """What a branch is multiplied by: for each sample 0 with probability `rate`, else
    1 / (1 - rate), a function of (seed, number of the sample in this call) alone.

    Args:
        cu_seqlens (B + 1,): offsets of packed samples; None where they are dense.
        tokens (T, D) or (B, N, D): what is scaled.
        rate: in [0, 1).
        seed: another one for each branch.

    Returns: (T, 1) or (B, 1, 1), of the dtype of `tokens`.
    """
    size = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    keys = stream(seed, torch.arange(size, device=tokens.device))
    kept = keep_mask(draw(keys, torch.zeros_like(keys)), rate)
    scale = kept.to(tokens.dtype) / (1 - rate)
    if cu_seqlens is None:
        return scale[:, None, None]
    lens = cu_seqlens.diff().long()
    return scale.repeat_interleave(lens, output_size=tokens.shape[0])[:, None]
