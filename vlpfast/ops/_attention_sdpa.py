"""The "sdpa" implementation of `attention`: torch's fused kernels over padded sequences.

Packed sequences are padded to the host-side bound, and keys are copied for each reader: for dense
inputs on a GPU it is torch's best kernel and no more, for the rest a fallback.

Letters: R query sequences, B_k key sequences, T tokens of a packed tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class _Keys(NamedTuple):
    """Padded key sequences: k, v (B_k, N, H, E), lens (B_k,) and block (B_k, N) or None."""

    k: Tensor
    v: Tensor
    lens: Tensor | None
    block: Tensor | None

    def rows(self, index: Tensor | None) -> _Keys:
        return _Keys(*(x if x is None or index is None else x.index_select(0, index) for x in self))


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    dropout_p: float,
    seed: int | Tensor | None,
) -> Tensor:
    """`vlpfast.ops.attention`, same arguments; `rejects` has refused dropout."""
    del dropout_p, seed
    if cu_q is not None and q.shape[0] == 0:
        return q.clone()
    # A causal mask hides the padding of packed keys, which follows every valid query.
    hidden = causal and cu_k is cu_q and kv_index is None
    if cu_k is not None:
        k_lens = None if hidden else cu_k.diff()
    keys = _Keys(*(_pad(x, cu_k, max_k) for x in (k, v)), k_lens, _pad(k_block, cu_k, max_k))
    padded = _pad(q, cu_q, max_q)
    out = _attend(padded, keys.rows(kv_index), _pad(q_block, cu_q, max_q), causal, bias, scale)
    if cu_q is not None:
        return out.flatten(0, 1).index_select(0, _slots(cu_q, max_q, q.shape[0]))
    if q_lens is None:
        return out
    valid = torch.arange(max_q, device=q.device) < q_lens[:, None]
    return out.masked_fill(~valid[..., None, None], 0)


def rejects(*, dropout_p: float, **_: object) -> str | None:
    """Why "sdpa" cannot take these arguments, or None."""
    if dropout_p > 0:
        return "torch's dropout draws from a generator, not from the counter; dropout_p must be 0"
    return None


def _attend(
    q: Tensor, keys: _Keys, q_block: Tensor | None, causal: bool, bias: Tensor | None, scale: float
) -> Tensor:
    """Padded attention, all (R, L, H, E); a mask only where lengths or blocks ask for one."""
    is_causal = causal and bias is None and keys.lens is None
    mask = None if is_causal else _visible(keys, q.shape[1], q_block, causal)
    if bias is not None:
        mask = (bias if mask is None else bias.masked_fill(~mask, -torch.inf)).to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, keys.k, keys.v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2)


def _visible(keys: _Keys, max_q: int, q_block: Tensor | None, causal: bool) -> Tensor | None:
    """bool mask that broadcasts to (R, H, M, N), or None where every key is visible."""
    mask = None
    n = torch.arange(keys.k.shape[1], device=keys.k.device)
    if keys.lens is not None:
        mask = (n < keys.lens[:, None])[:, None, None, :]
    order = None
    if causal:
        order = n <= torch.arange(max_q, device=n.device)[:, None]
    elif q_block is not None:
        order = (keys.block[:, None, :] <= q_block[:, :, None])[:, None]
    if order is None or mask is None:
        return mask if order is None else order
    return mask & order


def _pad(x: Tensor | None, cu: Tensor | None, max_len: int) -> Tensor | None:
    """Packed (T, ...) to zero-padded (sequences, max_len, ...); dense input passes."""
    if x is None or cu is None:
        return x
    # In place on fresh zeros: half the time of the functional form.
    flat = x.new_zeros((cu.shape[0] - 1) * max_len, *x.shape[1:])
    flat = flat.index_copy_(0, _slots(cu, max_len, x.shape[0]), x)
    return flat.view(cu.shape[0] - 1, max_len, *x.shape[1:])


def _slots(cu: Tensor, max_len: int, num_tokens: int) -> Tensor:
    """(T,) int64: place of each token among padded ones."""
    starts = torch.arange(cu.shape[0] - 1, device=cu.device) * max_len
    shift = (starts - cu[:-1]).repeat_interleave(cu.diff(), output_size=num_tokens)
    return torch.arange(num_tokens, device=cu.device) + shift
