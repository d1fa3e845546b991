"""The compiled modules load, keep to the stable ABI, and every CUDA source compiles unspilled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from vlpfast import _ext

ROOT = Path(__file__).parents[2]
CUDA = sorted((ROOT / "csrc/cuda").glob("*.cu"))
GLUE = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
# Registers a thread of any kernel of a file may use; an SM has 65536.
# keep_ids: 4 blocks of 128 threads. transport: 1 block of 512, whose state fills them; 64 x 577
# takes the shared memory too. transport_grad: 3 blocks of 128, 64 of the registers accumulators.
MAX_REGISTERS = {"keep_ids": 128, "transport": 128, "transport_grad": 168}


def _cuda_home() -> Path:
    """The toolkit's folder; `nvcc` on PATH may be a wrapper outside of it."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    candidates = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    homes = [Path(home) for home in candidates if home]
    return next(h for h in homes if (h / "include/cuda_runtime_api.h").exists())


@pytest.mark.parametrize("name", ["_C", "_host"])
def test_is_built(name):
    assert _ext.missing(name) is None


def test_cuda_module_is_built_or_says_why_not():
    reason = _ext.missing("_C_cuda")
    if torch.version.cuda is None:
        assert reason == "not built: this torch has no CUDA"
    else:
        assert reason is None or "not built" in reason


def test_operators_use_the_stable_abi():
    """No symbol of c10 or at is needed: one binary serves every torch from 2.11 on."""
    binary = Path(_ext._MODULES["_C"].__file__)
    assert binary.name == "_C.abi3.so"
    if shutil.which("nm") is None:
        pytest.skip("no nm here to read the binary's symbols")
    needed = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", binary], check=True, capture_output=True, text=True
    ).stdout
    assert "torch_parallel_for" in needed
    assert re.findall(r"\b(?:c10|at)::\S+", needed) == []
    assert "torch_exception_get_what" not in needed, "needs torch 2.13"


@pytest.mark.nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", CUDA, ids=lambda p: p.name)
def test_cuda_source_compiles_without_spills(source, arch, tmp_path):
    nvcc = shutil.which("nvcc") or _cuda_home() / "bin/nvcc"
    command = [
        nvcc, "-c", source, "-o", tmp_path / "kernel.o", "-std=c++20", "-O3", f"-arch={arch}",
        "-Xptxas=-v", "-Werror=all-warnings", f"-I{ROOT}/csrc/include",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    usage = run.stdout + run.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", usage)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", usage)]
    assert registers, f"no kernel in {source.name}"
    assert max(registers) <= MAX_REGISTERS[source.stem]
    assert set(spills) == {0}, usage


@pytest.mark.nvcc
@pytest.mark.parametrize("source", GLUE, ids=lambda p: p.name)
def test_cuda_glue_compiles(source, tmp_path):
    includes = [*include_paths(), sysconfig.get_paths()["include"], _cuda_home() / "include"]
    command = [
        os.environ.get("CXX", "g++"), "-c", source, "-o", tmp_path / "glue.o", "-std=c++20",
        "-fPIC", "-Wall", "-Werror", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{ROOT}/csrc/include", *(f"-isystem{path}" for path in includes),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
