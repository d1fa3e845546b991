"""Ahead-of-time gate: compiles every kernel for sm_80 and sm_90, needs no GPU, checks the code.

    python -m vlpfast.kernels.aot [STEM ...] [--json]

A kernel joins by listing its specialisations in `AOT_CASES` of its file. Exit code 1 if one of them
spills, is over its registers or shared memory, or lacks an instruction it must have.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlpfast.kernels._common import INTERPRETED, AotCase

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class AotReport(NamedTuple):
    """What a kernel became on one GPU generation; `problems` is empty where it holds its limits."""

    case: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    problems: list[str]


def blocks_per_sm(capability: int, threads: int, registers: int, shared_bytes: int) -> int:
    """Programs or blocks of a kernel that one multiprocessor holds at a time.

    Registers are given out by the warp in units of 256; each block takes 1 KiB of shared memory
    beyond its own. Source: CUDA C++ Programming Guide, tables of compute capabilities.
    """
    shared_per_sm = {80: 164, 90: 228}[capability] * 1024
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    return min(32, 64 // warps, by_registers, shared_per_sm // (shared_bytes + 1024))


def stems() -> list[str]:
    """Kernel files that list AOT_CASES, by their stem."""
    package = importlib.import_module("vlpfast.kernels")
    names = [m.name for m in pkgutil.iter_modules(package.__path__)]
    return [n for n in names if n != "aot" and not n.startswith("_") and cases(n)]


def cases(stem: str) -> list[AotCase]:
    """AOT_CASES of kernels/<stem>.py."""
    return getattr(importlib.import_module(f"vlpfast.kernels.{stem}"), "AOT_CASES", [])


def compile_case(case: AotCase, capability: int) -> AotReport:
    """Compiles one specialisation and reads its resources from the cubin."""
    if INTERPRETED:
        raise RuntimeError("the gate compiles: run it without TRITON_INTERPRET")
    names = case.kernel.arg_names
    aligned = [n for n, kind in case.types.items() if kind.startswith("*") or n in case.divisible]
    source = ASTSource(
        case.kernel,
        signature={n: case.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in case.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "maxnreg": case.maxnreg,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        required = case.instructions.get(capability, ())
        sass = _tool("cuobjdump", "-sass", cubin.name) if required else ""
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    shared = compiled.metadata.shared
    problems = [f"no {word} in the code" for word in required if word not in sass]
    if stack:
        problems.append(f"spills: {stack} bytes of stack")
    if registers > case.max_registers:
        problems.append(f"{registers} registers, at most {case.max_registers} accepted")
    if shared > case.max_shared_bytes:
        problems.append(
            f"{shared} bytes of shared memory, at most {case.max_shared_bytes} accepted"
        )
    blocks = blocks_per_sm(capability, 32 * case.num_warps, registers, shared)
    return AotReport(case.name, capability, registers, stack, shared, blocks, problems)


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Compiles the cases of the given stems (all by default) and prints a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m vlpfast.kernels.aot", description=__doc__)
    parser.add_argument("stems", nargs="*", help="kernel files, all by default")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    options = parser.parse_args(argv)
    reports = [
        compile_case(case, capability)
        for stem in options.stems or stems()
        for case in cases(stem)
        for capability in case.capabilities
    ]
    if options.json:
        print(json.dumps([report._asdict() for report in reports]))
    else:
        print(f"triton {triton.__version__}")
        for r in reports:
            verdict = "; ".join(r.problems) or "ok"
            print(
                f"{r.case:28} sm_{r.capability} {r.registers:4} registers {r.stack_bytes:4} B stack"
                f" {r.shared_bytes:7} B shared {r.blocks_per_sm:3} blocks/SM  {verdict}"
            )
    return int(any(r.problems for r in reports))


if __name__ == "__main__":
    sys.exit(main())
