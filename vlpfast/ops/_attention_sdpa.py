"""The "sdpa" implementation of `attention`: torch's fused kernels, with little padding.

On a CPU, short 16-bit attention under autograd is written out as two products: the backward of
torch's fused kernel takes several times as long there. On an eager CPU, packed queries are cut into
chunks of like length, each padded on its own; and the queries that read one key sequence are laid
end to end as one sequence, so that keys are not copied for each reader. Elsewhere that would wait
for the device or break a compiled graph: there is one chunk, padded to the host-side bound.

Letters: R query sequences, B_k key sequences, T tokens of a packed tensor, L padded length.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Forward and backward on one core, 256 captions of ~13 tokens, 4 heads of 48, by number of chunks:
# among themselves 30 ms (1), 18 (2), 13 (4), 12 (8); to 64 images of 65 tokens 23, 20, 18, 21.
NUM_CHUNKS = 4
# Forward and backward on one core, bf16, 6 heads of 32, torch's fused kernel and written out: 128
# sequences of 19 48.8 and 3.9 ms, 64 of 65 62 and 13 ms, 16 of 128 33 and 10 ms, 8 of 257 38 and 33
# ms. Longer ones stay with the kernel, which keeps no scores.
MAX_WRITTEN_OUT = 128


class _Keys(NamedTuple):
    """Padded key sequences: k, v (B_k, N, H, E), lens (B_k,) and block (B_k, N) or None."""

    k: Tensor
    v: Tensor
    lens: Tensor | None
    block: Tensor | None

    def rows(self, index: Tensor | None) -> _Keys:
        return _Keys(*(_take(x, index) for x in self))


class _Layout(NamedTuple):
    """Where packed queries lie in their padded chunks.

    Attributes:
        slots (T,): place of each token in the flattened chunks, int64.
        rows: for each chunk, its sequences (int64), or None for all in order.
        shapes: for each chunk, (sequences, padded length).
    """

    slots: Tensor
    rows: list[Tensor | None]
    shapes: list[tuple[int, int]]

    def pad(self, x: Tensor | None) -> list[Tensor] | list[None]:
        """Packed (T, ...) to one zero-padded (sequences, length, ...) a chunk."""
        if x is None:
            return [None] * len(self.rows)
        sizes = [num * length for num, length in self.shapes]
        # In place on fresh zeros: half the time of the functional form.
        flat = x.new_zeros(sum(sizes), *x.shape[1:]).index_copy_(0, self.slots, x)
        return [
            part.unflatten(0, shape)
            for part, shape in zip(flat.split(sizes), self.shapes, strict=True)
        ]

    def keys(self, k: Tensor, v: Tensor, block: Tensor | None, lens: Tensor | None) -> list[_Keys]:
        """The keys of each chunk, for packed self-attention.

        `lens` is None where a causal mask hides the padding, which follows every valid query.
        """
        lens = [_take(lens, rows) for rows in self.rows]
        parts = zip(self.pad(k), self.pad(v), lens, self.pad(block), strict=True)
        return [_Keys(*part) for part in parts]

    def unpad(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `pad`."""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.slots)


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
    if cu_q is None:
        keys = _padded_keys(k, v, k_lens, k_block, cu_k, max_k).rows(kv_index)
        out = _attend(q, keys, q_block, causal, bias, scale)
        if q_lens is None:
            return out
        valid = torch.arange(max_q, device=q.device) < q_lens[:, None]
        return out.masked_fill(~valid[..., None, None], 0)
    if q.shape[0] == 0:
        return q.clone()
    if cu_k is cu_q and kv_index is None:
        layout = _layout(cu_q, max_q, q.shape[0])
        keys = layout.keys(k, v, k_block, None if causal else cu_q.diff())
    else:
        table = _padded_keys(k, v, k_lens, k_block, cu_k, max_k)
        placeless = not causal and q_block is None and bias is None
        if kv_index is not None and placeless and _may_read_back(q):
            layout, kv_index = _by_reader(cu_q, kv_index, table.k.shape[0], q.shape[0]), None
        else:
            layout = _layout(cu_q, max_q, q.shape[0])
        reads = [rows if kv_index is None else _take(kv_index, rows) for rows in layout.rows]
        keys = [table.rows(index) for index in reads]
    outs = []
    queries, blocks = layout.pad(q), layout.pad(q_block)
    for part, key, block, rows in zip(queries, keys, blocks, layout.rows, strict=True):
        outs.append(_attend(part, key, block, causal, _crop(bias, rows, part, key.k), scale))
    return layout.unpad(outs)


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
    if _favours_products(q, k, v):
        return _products(
            q, k, v, _visible(keys, q.shape[2], None, True) if is_causal else mask, scale
        )
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2)


def _favours_products(*qkv: Tensor) -> bool:
    """Whether attention over q, k, v (R, H, L, E) is faster written out."""
    q, k, _ = qkv
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float16)
        and max(q.shape[2], k.shape[2]) <= MAX_WRITTEN_OUT
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in qkv)
    )


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v with the softmax in fp32; rows that see nothing are zero."""
    scores = q @ (k * scale).transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    weights = torch.ops.aten._safe_softmax.default(scores, -1, torch.float32)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


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


def _padded_keys(
    k: Tensor,
    v: Tensor,
    lens: Tensor | None,
    block: Tensor | None,
    cu_k: Tensor | None,
    max_k: int,
) -> _Keys:
    if cu_k is None:
        return _Keys(k, v, lens, block)
    return _one_chunk(cu_k, max_k, k.shape[0]).keys(k, v, block, cu_k.diff())[0]


def _crop(bias: Tensor | None, rows: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias of one chunk."""
    if bias is None:
        return None
    if bias.dim() == 4:
        bias = _take(bias, rows)
    return bias[..., : q.shape[1], : k.shape[1]]


def _take(x: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return x if x is None or rows is None else x.index_select(0, rows)


def _may_read_back(x: Tensor) -> bool:
    """Whether lengths can be read on the host for nothing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _layout(cu: Tensor, max_len: int, num_tokens: int) -> _Layout:
    if not _may_read_back(cu):
        return _one_chunk(cu, max_len, num_tokens)
    return _by_length(cu.diff(), num_tokens)


def _one_chunk(cu: Tensor, max_len: int, num_tokens: int) -> _Layout:
    """All sequences in order, padded to `max_len`."""
    num = cu.shape[0] - 1
    starts = torch.arange(num, device=cu.device) * max_len
    return _Layout(_slots(starts, cu.diff(), num_tokens), [None], [(num, max_len)])


def _by_length(lens: Tensor, num_tokens: int) -> _Layout:
    """Sequences sorted by length, without the empty ones, in NUM_CHUNKS chunks of equal count."""
    sorted_lens, order = lens.sort(stable=True)
    lengths = sorted_lens.tolist()
    num_empty = bisect_right(lengths, 0)
    size = max(1, -(-(len(lengths) - num_empty) // NUM_CHUNKS))
    rows, shapes, offset = [], [], 0
    sorted_starts = torch.zeros_like(order)
    for first in range(num_empty, len(lengths), size):
        chunk = slice(first, first + size)
        num, length = len(lengths[chunk]), lengths[chunk][-1]
        sorted_starts[chunk] = torch.arange(num) * length + offset
        rows.append(order[chunk])
        shapes.append((num, length))
        offset += num * length
    starts = torch.empty_like(order).index_copy_(0, order, sorted_starts)
    return _Layout(_slots(starts, lens, num_tokens), rows, shapes)


def _by_reader(cu: Tensor, kv_index: Tensor, num_keys: int, num_tokens: int) -> _Layout:
    """One sequence for each key sequence, all queries that read it end to end; then by length."""
    lens, order = cu.diff(), kv_index.argsort(stable=True)
    num_queries = lens.new_zeros(num_keys).index_add_(0, kv_index, lens)
    layout = _by_length(num_queries, num_tokens)
    # Token i in the order of readers is token `tokens[i]` of the packed tensor.
    tokens = _slots(cu[:-1].index_select(0, order), lens.index_select(0, order), num_tokens)
    return layout._replace(slots=torch.empty_like(tokens).index_copy_(0, tokens, layout.slots))


def _slots(starts: Tensor, lens: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64: starts[r] + position in sequence r, for packed sequences of `lens` (R,)."""
    shift = (starts - lens.cumsum(0) + lens).repeat_interleave(lens, output_size=num_tokens)
    return torch.arange(num_tokens, device=lens.device) + shift
