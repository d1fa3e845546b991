"""Attention for towers and fusion: dense or packed, keys shared by many queries, block masks.

Checks, defaults and the choice of implementation are here; "cpp" and "triton" are
`_attention_op.py`, "sdpa" is `_attention_sdpa.py`, packages' kernels are `_attention_peers.py`, the
eager oracle is `reference/attention.py`.

Letters: R query sequences (B when dense), B_k key sequences, T tokens of a packed tensor.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vlpfast import _ext
from vlpfast.ops import _attention_op, _attention_peers, _attention_sdpa
from vlpfast.ops._checks import check_devices, check_seed
from vlpfast.ops._dispatch import Implementation, Op
from vlpfast.ops.reference import attention as reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    kv_index: Tensor | None = None,
    q_block: Tensor | Literal["causal"] | None = None,
    k_block: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
    max_q: int | None = None,
    max_k: int | None = None,
) -> Tensor:
    """Softmax attention over dense or packed sequences, with keys shared by index.

    For query sequence r, reading key sequence s = kv_index[r]:

        S = scale * q_r k_s^T + bias;  P = softmax over visible keys of S;  out_r = dropout(P) v_s

    Key n is visible to query m iff n < length of s and k_block[n] <= q_block[m]. A query that sees
    no key, or lies beyond its `q_lens`, returns zero and has zero gradient.

    Args:
        q: queries, dense (B, M, H, E) or packed (T, H, E) with `cu_q`.
        k: keys, dense (B_k, N, H, E) or packed (T_k, H, E) with `cu_k`, whichever form `q` has.
        v: values, shape and dtype of `k`.
        q_lens (B,): valid queries of each dense sequence, which come first; default all.
        k_lens (B_k,): valid keys of each dense sequence. What lies beyond must be finite and has no
            effect.
        cu_q (R + 1,): int32 offsets of the packed query sequences; sequences may be empty.
        cu_k (B_k + 1,): the same for keys; default `cu_q`, for packed self-attention.
        kv_index (R,): int64, the key sequence each query sequence reads; default r reads r.
        q_block (B, M) or (T,): int block of each query. All zero: bidirectional; positions: causal;
            0..0,1,2,3: prefix-LM; runs: semi-causal. "causal" stands for positions on both sides
            and is faster: no mask is stored.
        k_block (B_k, N) or (T_k,): int block of each key; default `q_block`, for self-attention.
        bias (H, M, N) or (R, H, M, N): added to the scores, finite, differentiable. For packed
            inputs M, N are `max_q`, `max_k`; positions count from a sequence's first token.
        dropout_p: probability of dropping a weight, in [0, 1); kept ones are scaled by 1 / (1 - p).
        seed: int or 0-d int64 tensor, required with dropout. The mask is a function of (seed, query
            sequence r, head, query position, key position), so packed and padded inputs drop the
            same weights; `reference/attention.py` has the bits.
        scale: factor of the scores; default E ** -0.5.
        impl: "auto", "cpp" and "triton" (one pass forward and one backward, nothing padded or
            copied, no scores or masks stored; fp32 and bf16, "triton" fp16 too), "sdpa" (torch's
            fused kernels over padded sequences; no dropout), "reference" (explicit softmax), or,
            where installed and within what they offer, "flash_attn" and "xformers".
        max_q: host-side upper bound of the packed queries' lengths. Without it the shape of `bias`
            gives it, else the device is asked, which waits (and breaks a compiled graph).
        max_k: the same for packed keys.

    Returns:
        Shape and dtype of `q`.

    Raises:
        ValueError, TypeError: an argument's shape or dtype; on a CPU also offsets that do not
            ascend over all tokens and a `kv_index` out of range, which on a GPU are not read.

    Source: Vaswani et al. 2017, eq. 1, arXiv:1706.03762; semi-causal: Hao et al. 2022 (MetaLM),
        section 2.1, arXiv:2206.06336.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"attention: dropout_p={dropout_p} needs a seed")
    check_seed(seed, prefix="attention: ")
    options = _prepare(
        q,
        k,
        q_lens=q_lens,
        k_lens=k_lens,
        cu_q=cu_q,
        cu_k=cu_k,
        kv_index=kv_index,
        q_block=q_block,
        k_block=k_block,
        bias=bias,
        scale=scale,
        max_q=max_q,
        max_k=max_k,
    )
    _check_like("v", v, k)
    run = _OP.choose(
        impl,
        q.device,
        dropout_p=dropout_p,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        given=[
            name for name, option in options.items() if option is not None and option is not False
        ],
        aligned=options["cu_k"] is options["cu_q"] and q.shape == k.shape,
    )
    return run(q, k, v, dropout_p=dropout_p, seed=seed, **options)


def attention_map(q: Tensor, k: Tensor, **options) -> Tensor:
    """Attention weights P of `attention`, before dropout, for probing and grounding.

    Args:
        q: as in `attention`.
        k: as in `attention`.
        **options: q_lens, k_lens, cu_q, cu_k, kv_index, q_block, k_block, bias, scale, max_q and
            max_k of `attention`.

    Returns:
        (R, H, M, N), M and N being `max_q` and `max_k` for packed inputs. A row sums to 1, or is
        zero where nothing is visible.
    """
    return reference.attention_map(q, k, **_prepare(q, k, **options))


def gradcam(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, *, reduce_heads: bool = True, **options
) -> Tensor:
    """Gradient-weighted attention map: P * relu(dL/dP), by default averaged over heads.

    dL/dP = grad_out v^T, so that neither a hook nor a stored map is needed: for the output `out` of
    an `attention` without dropout, take `grad_out` from `torch.autograd.grad(score, out)`.

    Args:
        q: as in `attention`.
        k: as in `attention`.
        v: as in `attention`.
        grad_out: gradient of the score with respect to the output of `attention`; shape of `q`.
        reduce_heads: mean over heads, as ALBEF's grounding does; else the head dimension stays.
        **options: as in `attention_map`.

    Returns:
        (R, M, N), or (R, H, M, N) without `reduce_heads`; >= 0.

    Source: Li et al. 2021 (ALBEF), Grounding.py, arXiv:2107.07651; Selvaraju et al. 2017
        (Grad-CAM), arXiv:1610.02391.
    """
    options = _prepare(q, k, **options)
    _check_like("v", v, k)
    _check_like("grad_out", grad_out, q)
    cam = reference.gradcam(q, k, v, grad_out, **options)
    return cam.mean(1) if reduce_heads else cam


def _prepare(
    q: Tensor,
    k: Tensor,
    *,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    kv_index: Tensor | None = None,
    q_block: Tensor | Literal["causal"] | None = None,
    k_block: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
) -> dict:
    """Checks the arguments and fills in the defaults: what every implementation takes."""
    cu_k = cu_q if cu_k is None and k.dim() == 3 else cu_k
    rows, keys = _check_side("q", q, q_lens, cu_q), _check_side("k", k, k_lens, cu_k)
    heads, head_dim = q.shape[-2:]
    if k.shape[-2:] != q.shape[-2:]:
        expected = f"{heads} heads of {head_dim} as q has"
        raise ValueError(f"attention: k must have {expected}, got {tuple(k.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"attention: k must have the dtype of q {q.dtype}, got {k.dtype}")
    check_devices(
        q.device, prefix="attention: ", k=k, q_lens=q_lens, k_lens=k_lens, cu_q=cu_q, cu_k=cu_k,
        kv_index=kv_index, bias=bias,
    )  # fmt: skip
    _check_index("kv_index", kv_index, (rows,))
    if kv_index is not None and rows and _readable(kv_index):
        values = kv_index.numpy()
        if values.min() < 0 or values.max() >= keys:
            got = f"{values.min()} to {values.max()}"
            raise ValueError(f"attention: kv_index must be in [0, {keys}), got {got}")
    if kv_index is None and rows != keys:
        raise ValueError(f"attention: kv_index is needed to read {keys} sequences from {rows}")
    causal = isinstance(q_block, str)
    if causal:
        if q_block != "causal" or k_block is not None:
            raise ValueError(f"attention: q_block is 'causal', alone, or a tensor, got {q_block!r}")
        q_block = None
    elif q_block is not None:
        k_block = q_block if k_block is None else k_block
        _check_index("q_block", q_block, tuple(q.shape[:-2]))
        _check_index("k_block", k_block, tuple(k.shape[:-2]))
        check_devices(q.device, prefix="attention: ", q_block=q_block, k_block=k_block)
    elif k_block is not None:
        raise ValueError("attention: k_block needs q_block, got None")
    max_q = _bound(q, cu_q, max_q, bias, -2)
    if max_k is None and cu_k is not None and cu_k is cu_q:
        max_k = max_q
    max_k = _bound(k, cu_k, max_k, bias, -1)
    if bias is not None:
        _check_shape("bias", bias, (heads, max_q, max_k), (rows, heads, max_q, max_k))
    return {
        "q_lens": q_lens,
        "k_lens": k_lens,
        "cu_q": cu_q,
        "cu_k": cu_k,
        "kv_index": kv_index,
        "q_block": q_block,
        "k_block": k_block,
        "causal": causal,
        "bias": bias,
        "scale": head_dim**-0.5 if scale is None else scale,
        "max_q": max_q,
        "max_k": max_k,
    }


def _bound(x: Tensor, cu: Tensor | None, given: int | None, bias: Tensor | None, dim: int) -> int:
    """Host-side upper bound of the lengths of one side."""
    if cu is None:
        return x.shape[1]
    if given is not None:
        return given
    if bias is not None:
        return bias.shape[dim]
    return int(cu.diff().max()) if cu.shape[0] > 1 else 0


def _check_side(name: str, x: Tensor, lens: Tensor | None, cu: Tensor | None) -> int:
    """Checks one side's form; returns its number of sequences."""
    got = f"got {name} {tuple(x.shape)}"
    if not x.is_floating_point():
        raise TypeError(f"attention: {name} must be floating point, got {x.dtype}")
    if x.dim() == 4:
        if cu is not None:
            raise ValueError(f"attention: cu_{name} goes with packed {name} (T, H, E), {got}")
        _check_index(f"{name}_lens", lens, (x.shape[0],))
        return x.shape[0]
    if x.dim() != 3:
        raise ValueError(f"attention: {name} must be (B, L, H, E) or packed (T, H, E), {got}")
    if cu is None:
        raise ValueError(f"attention: packed {name} needs cu_{name}, {got}")
    if lens is not None:
        raise ValueError(f"attention: {name}_lens goes with dense {name} (B, L, H, E), {got}")
    if cu.dim() != 1 or cu.shape[0] == 0:
        raise ValueError(f"attention: cu_{name} must be (sequences + 1,), got {tuple(cu.shape)}")
    _check_index(f"cu_{name}", cu, tuple(cu.shape))
    if _readable(cu):
        values = cu.numpy()
        if values[0] != 0 or values[-1] != x.shape[0] or (values[1:] < values[:-1]).any():
            expected = f"ascend from 0 to {x.shape[0]}, the tokens of {name}"
            raise ValueError(f"attention: cu_{name} must {expected}, got {values.tolist()}")
    return cu.shape[0] - 1


def _readable(x: Tensor) -> bool:
    """Whether values can be checked: on a GPU that would wait, and a graph has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_index(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is None:
        return
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention: {name} must be int32 or int64, got {x.dtype}")
    _check_shape(name, x, shape)


def _check_shape(name: str, x: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(x.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"attention: {name} must be {expected}, got {tuple(x.shape)}")


def _check_like(name: str, x: Tensor, other: Tensor) -> None:
    _check_shape(name, x, tuple(other.shape))
    if x.dtype != other.dtype:
        raise TypeError(f"attention: {name} must be {other.dtype}, got {x.dtype}")
    check_devices(other.device, prefix="attention: ", **{name: x})


_OP = Op(
    "attention",
    {
        "reference": Implementation(reference.attention),
        "cpp": Implementation(
            partial(_attention_op.fused, "cpp"), _ext.cpp_missing, _attention_op.rejects("cpp")
        ),
        "triton": Implementation(
            partial(_attention_op.fused, "triton"),
            _ext.triton_missing,
            _attention_op.rejects("triton"),
        ),
        "sdpa": Implementation(_attention_sdpa.sdpa, rejects=_attention_sdpa.rejects),
        **{
            run.__name__: Implementation(
                run, _attention_peers.missing(run.__name__), _attention_peers.rejects(run.__name__)
            )
            for run in (_attention_peers.flash_attn, _attention_peers.xformers)
        },
    },
    {"cpu": ("cpp", "sdpa", "reference"), "cuda": ("triton", "sdpa", "reference")},
)
