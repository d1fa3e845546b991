"""The "flash_attn" and "xformers" implementations of `attention`: the packages' own kernels, where
the arguments are within what they offer. Both run on CUDA GPUs and are never the automatic choice.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection

import torch
from torch import Tensor

_DTYPES = {
    "flash_attn": (torch.float16, torch.bfloat16),
    "xformers": (torch.float16, torch.bfloat16, torch.float32),
}
_MAX_HEAD_DIM = 256
# What neither has, by argument.
_LACKS = {
    "kv_index": "every query sequence reads keys of its own",
    "q_block": "has no blocks but 'causal'",
    "bias": "has no gradient of a bias",
    "q_lens": "takes packed sequences, not padded ones",
    "k_lens": "takes packed sequences, not padded ones",
}


def flash_attn(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """`vlpfast.ops.attention`, same arguments, by `flash_attn_varlen_func`."""
    run = importlib.import_module("flash_attn").flash_attn_varlen_func
    cu_q, cu_k = _offsets(q, options["cu_q"]), _offsets(k, options["cu_k"])
    out = run(
        *(_packed(x) for x in (q, k, v)), cu_q, cu_k, options["max_q"], options["max_k"],
        softmax_scale=options["scale"], causal=options["causal"], deterministic=True,
    )  # fmt: skip
    return out.view(q.shape)


def xformers(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """`vlpfast.ops.attention`, same arguments, by `memory_efficient_attention`.

    Its masks are made on the host: lengths are read from the device, which waits.
    """
    ops = importlib.import_module("xformers.ops")
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    mask = masks.BlockDiagonalCausalMask if options["causal"] else masks.BlockDiagonalMask
    lens = [_offsets(q, options["cu_q"]), _offsets(k, options["cu_k"])]
    bias = mask.from_seqlens(*(cu.diff().tolist() for cu in lens))
    tokens = (_packed(x)[None] for x in (q, k, v))
    return ops.memory_efficient_attention(*tokens, bias, scale=options["scale"]).view(q.shape)


def missing(package: str) -> Callable[[], str | None]:
    """Why `package` cannot run here, as a function for `Implementation.missing`."""

    def missing() -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return None if torch.cuda.is_available() else "no CUDA GPU here"

    return missing


def rejects(package: str) -> Callable[..., str | None]:
    """Why `package` cannot take these arguments, as a function for `Implementation.rejects`."""

    def rejects(
        *,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        dropout_p: float,
        given: Collection[str],
        aligned: bool,
    ) -> str | None:
        if device.type != "cuda":
            return f"runs on cuda, got {device.type} tensors"
        if dtype not in _DTYPES[package]:
            return f"takes {', '.join(map(str, _DTYPES[package]))}, got {dtype}"
        if head_dim > _MAX_HEAD_DIM:
            return f"takes heads of up to {_MAX_HEAD_DIM}, got {head_dim}"
        if dropout_p > 0:
            return "its dropout draws from a generator, not from the counter; dropout_p must be 0"
        lacking = [f"{name}: {_LACKS[name]}" for name in _LACKS if name in given]
        if lacking:
            return lacking[0]
        if "causal" in given and not aligned:
            return "q_block 'causal' counts from the end where queries and keys differ in length"
        return None

    return rejects


def _packed(x: Tensor) -> Tensor:
    return x.flatten(0, 1) if x.dim() == 4 else x


def _offsets(x: Tensor, cu: Tensor | None) -> Tensor:
    """(sequences + 1,) int32: those of packed tokens, or the starts of dense sequences."""
    if cu is not None:
        return cu.to(torch.int32)
    size, length = x.shape[:2]
    return torch.arange(size + 1, dtype=torch.int32, device=x.device) * length
