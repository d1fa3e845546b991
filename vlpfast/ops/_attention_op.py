"""The fused implementations of `attention`: one pass forward, one backward, nothing padded.

Both take tokens as (T, H, E) and, for each sequence, its first token and length. "cpp" is
csrc/cpu/attention.cpp, "triton" kernels/attention.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlpfast import _ext
from vlpfast.ops._attention_spans import spans_of
from vlpfast.ops._once import once_differentiable
from vlpfast.ops._rows import seed_tensor

_OPTIONS = (
    "Tensor q_spans, Tensor k_spans, Tensor? kv_index, Tensor? q_block, Tensor? k_block,"
    " Tensor? bias, Tensor seed, bool causal, float dropout_p, float scale"
)
torch.library.define(
    "vlpfast::attention_fwd", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)"
)
torch.library.define(
    "vlpfast::attention_bwd",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor lse, {_OPTIONS}, bool bias_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("vlpfast::attention_fwd")
def _fake_fwd(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("vlpfast::attention_bwd")
def _fake_bwd(grad_out, q, k, v, lse, *options):
    bias, bias_grad = options[5], options[-1]
    grad_bias = lse.new_empty(bias.shape if bias_grad else (0,))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


_cpp_fwd = torch.ops.vlpfast.attention_fwd.default
_cpp_bwd = torch.ops.vlpfast.attention_bwd.default


class _Attention(torch.autograd.Function):
    """Over tokens (T, H, E). "cpp" keeps q, k, v and a number for each query and head, "triton" the
    output too.
    """

    @staticmethod
    def forward(ctx, backend, q, k, v, bias, *options):
        fwd = _cpp_fwd if backend == "cpp" else _kernels().attention_fwd
        out, lse = fwd(q, k, v, *options[:5], _wide(bias), *options[5:])
        ctx.save_for_backward(bias, q, k, v, *([lse] if backend == "cpp" else [out, lse]))
        ctx.backend, ctx.options = backend, options
        return out

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx, grad_out):
        bias, *saved = ctx.saved_tensors
        options, bias_grad = ctx.options, ctx.needs_input_grad[4]
        bwd = _cpp_bwd if ctx.backend == "cpp" else _kernels().attention_bwd
        *grads, grad_bias = bwd(
            _rows(grad_out), *saved, *options[:5], _wide(bias), *options[5:], bias_grad
        )
        grad_bias = grad_bias.to(bias.dtype) if bias_grad else None
        return None, *grads, grad_bias, *(None,) * len(options)


def _kernels():
    from vlpfast.kernels import attention

    return attention


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _rows(x: Tensor) -> Tensor:
    """Tokens (T, H, E), contiguous in E, of a dense or packed tensor; a view where possible."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    # A view of its own also where nothing changes: torch.compile refuses one tensor in two places.
    return x.view_as(x) if x.dim() == 3 else x.flatten(0, 1)


def _blocks(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).to(torch.int32).contiguous().view(-1)


# Widest head for which kernels/attention.py has tiles.
_MAX_HEAD_DIM = 128


def fused(
    backend: str,
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
    """`vlpfast.ops.attention`, same arguments, by `backend` "cpp" or "triton"."""
    triton = backend == "triton"
    spans = spans_of(
        q, k, q_lens=q_lens, k_lens=k_lens, cu_q=cu_q, cu_k=cu_k, kv_index=kv_index, plan=triton
    )
    options = (
        *(spans.q, spans.k, spans.kv_index, _blocks(q_block), _blocks(k_block)),
        *(seed_tensor(seed, q.device), causal, dropout_p, scale),
    )
    tokens = [_rows(x) for x in (q, k, v)]
    if triton:
        options += (max_q, max_k, spans.plan)
    return _Attention.apply(backend, *tokens, bias, *options).view(q.shape)


def rejects(backend: str) -> Callable[..., str | None]:
    """Why `backend` cannot take these arguments, as a function for `Implementation.rejects`."""
    on_device = _ext.cpp_rejects if backend == "cpp" else _ext.triton_rejects
    dtypes = (torch.float32, torch.bfloat16)
    if backend == "triton":
        dtypes = (*dtypes, torch.float16)

    def rejects(*, device: torch.device, dtype: torch.dtype, head_dim: int, **_) -> str | None:
        if dtype not in dtypes:
            return f"takes {', '.join(map(str, dtypes))}, got {dtype}"
        if backend == "triton" and head_dim > _MAX_HEAD_DIM:
            return f"takes heads of up to {_MAX_HEAD_DIM}, got {head_dim}"
        return on_device(device)

    return rejects
