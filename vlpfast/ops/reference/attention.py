"""Attention over dense or packed sequences, spelled out: every score, an explicit softmax.

R query sequences read B_k key sequences; packed inputs are padded first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.ops.reference.counter import draw, keep_mask, stream


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seed: int | Tensor | None,
    dropout_p: float,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    kv_index: Tensor | None,
    max_q: int,
    max_k: int,
    **options,
) -> Tensor:
    """`vlpfast.ops.attention`, same arguments."""
    weights = attention_map(
        q, k, cu_q=cu_q, cu_k=cu_k, kv_index=kv_index, max_q=max_q, max_k=max_k, **options
    )
    if dropout_p > 0:
        weights = weights * dropout_keep(weights, seed, dropout_p) / (1 - dropout_p)
    values = _rows(_pad(v, cu_k, max_k), kv_index)
    return _unpad(torch.einsum("rhmn,rnhe->rmhe", weights, values), cu_q, q.shape[0])


def attention_map(
    q: Tensor,
    k: Tensor,
    *,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    kv_index: Tensor | None,
    q_block: Tensor | None,
    k_block: Tensor | None,
    causal: bool,
    bias: Tensor | None,
    scale: float,
    max_q: int,
    max_k: int,
) -> Tensor:
    """Softmax weights (R, H, max_q, max_k), zero where the query or the key is absent or hidden."""
    q_lens = q_lens if cu_q is None else cu_q.diff()
    k_lens = k_lens if cu_k is None else cu_k.diff()
    queries, keys = _pad(q, cu_q, max_q), _rows(_pad(k, cu_k, max_k), kv_index)
    scores = torch.einsum("rmhe,rnhe->rhmn", queries, keys) * scale
    if bias is not None:
        scores = scores + bias
    m, n = torch.arange(max_q, device=q.device), torch.arange(max_k, device=q.device)
    visible = torch.ones(queries.shape[0], max_q, max_k, dtype=torch.bool, device=q.device)
    if q_lens is not None:
        visible = visible & (m < q_lens[:, None])[:, :, None]
    if k_lens is not None:
        visible = visible & (n < _rows(k_lens, kv_index)[:, None])[:, None, :]
    if causal:
        visible = visible & (n <= m[:, None])
    elif q_block is not None:
        q_ids, k_ids = _pad(q_block, cu_q, max_q), _rows(_pad(k_block, cu_k, max_k), kv_index)
        visible = visible & (k_ids[:, None, :] <= q_ids[:, :, None])
    visible = visible[:, None]
    # A finite fill keeps fully masked rows free of NaN in both directions; the product zeroes them.
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible


def gradcam(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, **options) -> Tensor:
    """P * relu(dP) (R, H, max_q, max_k), dP = grad_out v^T; options as in `attention_map`."""
    weights = attention_map(q, k, **options)
    grads = _pad(grad_out, options["cu_q"], options["max_q"])
    values = _rows(_pad(v, options["cu_k"], options["max_k"]), options["kv_index"])
    return weights * torch.einsum("rmhe,rnhe->rhmn", grads, values).relu()


def dropout_keep(weights: Tensor, seed: int | Tensor, dropout_p: float) -> Tensor:
    """bool (R, H, M, N), True where kept.

    bits = draw(draw(draw(stream(seed, sequence), head), query), key)
    """
    sequence, head, query, key = (
        torch.arange(size, device=weights.device) for size in weights.shape
    )
    bits = draw(stream(seed, sequence)[:, None], head)
    bits = draw(bits[:, :, None], query)
    return keep_mask(draw(bits[..., None], key), dropout_p)


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index]


def _pad(x: Tensor, cu: Tensor | None, max_len: int) -> Tensor:
    """Packed (T, ...) to zero-padded (R, max_len, ...); dense input passes."""
    if cu is None:
        return x
    place = cu[:-1, None] + torch.arange(max_len, device=x.device)
    place = torch.where(place < cu[1:, None], place, x.shape[0])
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[place]


def _unpad(x: Tensor, cu: Tensor | None, num_tokens: int) -> Tensor:
    """The inverse of `_pad`."""
    if cu is None:
        return x
    token = torch.arange(num_tokens, device=x.device)
    row = torch.searchsorted(cu[1:], token, right=True)
    return x[row, token - cu[row]]
