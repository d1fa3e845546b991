"""The compiled modules: loaded when this file is imported, with the reason where one is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch


def _load(name: str) -> ModuleType | str:
    try:
        return importlib.import_module(f"vlpfast.{name}")
    except ImportError as error:
        if importlib.util.find_spec(f"vlpfast.{name}") is not None:
            return f"vlpfast.{name} does not load: {error}"
    if name == "_C_cuda" and torch.version.cuda is None:
        return "not built: this torch has no CUDA"
    return f"vlpfast.{name} is not built"


# Loading _C or _C_cuda registers the implementations of torch.ops.vlpfast.*.
_MODULES = {name: _load(name) for name in ("_C", "_C_cuda", "_host")}
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing(name: str) -> str | None:
    """Why compiled module `name` ("_C", "_C_cuda", "_host") is not here, or None."""
    found = _MODULES[name]
    return found if isinstance(found, str) else None


def host() -> ModuleType:
    """The pybind11 module `_host`.

    Raises:
        ImportError: it is not built.
    """
    found = _MODULES["_host"]
    if isinstance(found, str):
        raise ImportError(found)
    return found


def cpp_missing() -> str | None:
    """Why no C++ implementation can run, or None."""
    return missing("_C")


def cpp_rejects(device: torch.device) -> str | None:
    """Why a C++ implementation cannot take tensors on `device`, or None."""
    return None if device.type == "cpu" else f"runs on cpu, got {device.type} tensors"


def cuda_missing() -> str | None:
    """Why no CUDA implementation can run, or None."""
    return missing("_C_cuda") or (None if torch.cuda.is_available() else "no CUDA GPU here")


def cuda_rejects(device: torch.device) -> str | None:
    """Why a CUDA implementation cannot take tensors on `device`, or None."""
    return None if device.type == "cuda" else f"runs on cuda, got {device.type} tensors"


def triton_missing() -> str | None:
    """Why no Triton kernel can run, or None. TRITON_INTERPRET=1 runs them anywhere, slowly."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if _INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA GPU here, and TRITON_INTERPRET is not 1"


def triton_rejects(device: torch.device) -> str | None:
    """Why a Triton kernel cannot take tensors on `device`, or None."""
    if device.type == "cuda" or _INTERPRETED:
        return None
    return f"runs on cuda, got {device.type} tensors"
