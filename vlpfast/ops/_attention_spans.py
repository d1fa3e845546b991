"""Where the sequences of an attention call lie, and who reads whom: one description of dense and
packed inputs, remembered between the layers of a step.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Sequences within tokens (T, H, E).

    Attributes:
        q (R, 2): int32, first token and length of each query sequence.
        k (B_k, 2): the same for key sequences.
        kv_index (R,): int64, the key sequence that each query sequence reads; None: its own.
        plan: `kernels.attention.AttentionPlan`, where Triton runs; else None.
    """

    q: Tensor
    k: Tensor
    kv_index: Tensor | None
    plan: NamedTuple | None


# (weak references, versions, numbers, spans) of the last calls, the latest first.
_remembered: list[tuple] = []
_NUM_REMEMBERED = 4


def spans_of(
    q: Tensor,
    k: Tensor,
    *,
    q_lens: Tensor | None,
    k_lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    kv_index: Tensor | None,
    plan: bool,
) -> Spans:
    """The spans of an attention call; q, k as the caller gave them, `plan` for Triton.

    A step's layers share their lengths and readers, so the tensors of the last calls are remembered
    (weakly) with what was made of them, as long as they are not changed.
    """
    tensors = (cu_q, q_lens, cu_k, k_lens, kv_index)
    # Dense inputs are described by their shapes alone.
    numbers = (q.shape[:-2], k.shape[:-2], q.device, plan)
    remember = not torch.compiler.is_compiling() and not any(
        t is not None and t.is_inference() for t in tensors
    )
    if remember:
        for refs, versions, known, spans in _remembered:
            if known == numbers and _alive(tensors, refs, versions):
                return spans
    spans = _make(q, k, *tensors, plan=plan)
    if remember:
        refs = [None if t is None else weakref.ref(t) for t in tensors]
        versions = [None if t is None else t._version for t in tensors]
        entry = (refs, versions, numbers, spans)
        _remembered[:] = [entry, *_remembered[: _NUM_REMEMBERED - 1]]
    return spans


def _alive(tensors: tuple[Tensor | None, ...], refs: list, versions: list) -> bool:
    """Whether `tensors` are those remembered, unchanged."""
    return all(
        t is None if ref is None else t is not None and ref() is t and t._version == version
        for t, ref, version in zip(tensors, refs, versions, strict=True)
    )


def _make(q, k, cu_q, q_lens, cu_k, k_lens, kv_index, *, plan: bool) -> Spans:
    q_spans = _side(q, cu_q, q_lens)
    # One tensor for both tells a kernel that they are the same; a compiled graph has no aliases.
    same = not torch.compiler.is_compiling() and cu_k is cu_q and k_lens is q_lens
    same = same and q.shape[:-2] == k.shape[:-2]
    k_spans = q_spans if same else _side(k, cu_k, k_lens)
    index = None if kv_index is None else kv_index.to(torch.int64)
    made = None
    if plan:
        from vlpfast.kernels.attention import make_plan

        num_queries = q.shape[:-2].numel()
        made = make_plan(q_spans, k_spans.shape[0], index, num_queries)
    return Spans(q_spans, k_spans, index, made)


def _side(x: Tensor, cu: Tensor | None, lens: Tensor | None) -> Tensor:
    """(sequences, 2) int32: first token and length."""
    if cu is not None:
        return torch.stack([cu[:-1], cu.diff()], 1).to(torch.int32)
    size, length = x.shape[:2]
    starts = torch.arange(size, dtype=torch.int32, device=x.device) * length
    lens = torch.full_like(starts, length) if lens is None else lens.to(torch.int32)
    return torch.stack([starts, lens], 1)
