"""Triton's interpreter where there is no GPU, poisoned memory, and marks that say why they skip."""

from __future__ import annotations

import functools
import os
import shutil
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when it is imported, so it is set before any kernel is.
    os.environ["TRITON_INTERPRET"] = "1"

# Tests are small: more threads cost more than they give, and pytest-xdist runs several processes.
torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))

# `with torch.device(...)` knows factories by identity and lists them once, at its first use: before
# the fixture below wraps some.
with torch.device("meta"):
    torch.empty(0)

# Larger than any index or count in a test, so that using an unwritten integer shows.
_POISON_INT = 0x5A5A5A5A


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


@functools.cache
def _nvcc_missing() -> bool:
    from_home = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return shutil.which("nvcc") is None and not os.path.exists(from_home)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "no CUDA GPU here",
        "nvcc": "no nvcc here (neither on PATH nor in CUDA_HOME)" if _nvcc_missing() else None,
        "dist": None if torch.distributed.is_available() else "this torch has no torch.distributed",
        "slow": None if config.getoption("--slow") else "slow: run with --slow",
    }
    for item in items:
        for mark, reason in reasons.items():
            if reason is not None and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(min(_POISON_INT, torch.iinfo(tensor.dtype).max))


def _poisoned(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # Under a compiler the allocation is the compiler's business.
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("vlpfast") and type(tensor) is torch.Tensor and not tensor.is_meta:
            _poison(tensor)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory the library allocates uninitialised holds NaN: a kernel writes all it returns."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device a test body runs on."""
    return torch.device(request.param)
