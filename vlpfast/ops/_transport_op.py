"""An op of transport: the same kernels by the same names in C++, CUDA and Triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

from vlpfast import _ext
from vlpfast.ops._dispatch import Implementation, Op, Reason


def kernel(impl: str, name: str) -> Callable:
    """Kernel `name` of implementation "cpp", "cuda" (the dispatcher tells them apart by device) or
    "triton"."""
    if impl == "triton":
        from vlpfast.kernels import transport

        return getattr(transport, name)
    return getattr(torch.ops.vlpfast, name).default


def transport_op(
    op: str,
    kernels: tuple[str, ...],
    reference: Callable,
    fused: Callable[[str], Callable],
    dtypes: tuple[torch.dtype, ...],
) -> Op:
    """The op and its implementations.

    Args:
        op: its name.
        kernels: what it calls, the forward first.
        reference: runs it eagerly.
        fused: given "cpp", "triton" or "cuda", what runs it on those kernels.
        dtypes: what the kernels take; the reference takes all.
    """

    def rejects(common: Callable[[torch.device], Reason], more: Callable[..., Reason]) -> Callable:
        def reason(*, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Reason:
            return common(device) or _wrong_dtype(dtype, dtypes) or more(kernels[0], dtype, shape)

        return reason

    nothing_more = lambda *_: None
    return Op(
        op,
        {
            "reference": Implementation(reference),
            "cpp": Implementation(
                fused("cpp"), _ext.cpp_missing, rejects(_ext.cpp_rejects, nothing_more)
            ),
            "triton": Implementation(
                fused("triton"),
                functools.partial(_triton_missing, kernels),
                rejects(_ext.triton_rejects, _triton_rejects),
            ),
            "cuda": Implementation(
                fused("cuda"),
                functools.partial(_cuda_missing, kernels),
                rejects(_ext.cuda_rejects, nothing_more),
            ),
        },
        auto={"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    )


def _wrong_dtype(dtype: torch.dtype, known: tuple[torch.dtype, ...]) -> Reason:
    names = [str(d).removeprefix("torch.") for d in (*known, dtype)]
    return None if dtype in known else f"takes {', '.join(names[:-1])}, got {names[-1]}"


def _triton_missing(kernels: tuple[str, ...]) -> Reason:
    if (reason := _ext.triton_missing()) is not None:
        return reason
    if importlib.util.find_spec("vlpfast.kernels.transport") is None:
        return "kernels/transport.py is not here"
    from vlpfast.kernels import transport

    absent = [name for name in kernels if not hasattr(transport, name)]
    return f"kernels/transport.py has no {absent[0]}" if absent else None


def _triton_rejects(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Reason:
    from vlpfast.kernels import transport

    rejects = getattr(transport, "rejects", None)
    return None if rejects is None else rejects(name, dtype, shape)


def _cuda_missing(kernels: tuple[str, ...]) -> Reason:
    if (reason := _ext.cuda_missing()) is not None:
        return reason
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    absent = [name for name in kernels if not has(f"vlpfast::{name}", "CUDA")]
    return f"csrc/cuda has no {absent[0]}" if absent else None
