"""What nvcc makes of the CUDA sources: registers, stack, spills, shared memory, blocks on an SM.

python -m tests.csrc.nvcc        the table in docs/kernels.md
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from vlpfast.kernels.aot import blocks_per_sm

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_90a")
# Threads of a block, and dynamic shared memory at the shapes of the table (transport.cu).
THREADS = {"keep_ids": 128, "transport": 512, "transport_grad": 128, "wra_loss": 256}


class Usage(NamedTuple):
    """One kernel on one architecture, as the assembler reports it."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int


def cuda_home() -> Path:
    """The toolkit's folder; `nvcc` on PATH may be a wrapper outside of it."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    candidates = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    homes = [Path(home) for home in candidates if home]
    return next(h for h in homes if (h / "include/cuda_runtime_api.h").exists())


def usage(source: Path, arch: str) -> list[Usage]:
    """Compiles one source and reads what each of its kernels takes.

    Raises:
        RuntimeError: it does not compile without a warning; the message is nvcc's.
    """
    nvcc = shutil.which("nvcc") or cuda_home() / "bin/nvcc"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc, "-c", source, "-o", Path(folder) / "kernel.o", "-std=c++20", "-O3",
            f"-arch={arch}", "-Xptxas=-v", "-Werror=all-warnings", f"-I{ROOT}/csrc/include",
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    log = run.stdout + run.stderr
    if run.returncode != 0:
        raise RuntimeError(log)
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        mangled = part.split("'")[0]
        name = re.search(r"\d+([a-z_]+_kernel)", mangled)[1]
        instance = mangled.split(name)[1]
        for tag, kind in (("IfE", "fp32"), ("bfloat16E", "bf16"), ("halfE", "fp16"),
                          ("ILb1E", "valid"), ("ILb0E", "all")):  # fmt: skip
            if tag in instance:
                name += f" {kind}"
        number = lambda pattern, text=part: int((re.search(pattern, text) or [0, 0])[1])
        found.append(
            Usage(
                name, number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                number(r"(\d+) bytes smem"),
            )
        )  # fmt: skip
    return found


def _dynamic_bytes(kernel: str) -> dict[str, int]:
    """Dynamic shared memory by shape, for the kernels whose share of an SM it decides."""
    if not kernel.startswith(("transport_scaling", "transport_log")):
        return {"": 0}
    sizes = {}
    for M, N in ((32, 196), (64, 577)):
        log = "log" in kernel
        ld = (M + 7) // 8 * 8 + 4 if log else {32: 36, 64: 68}[M]
        vectors = 8 * (3 * M + N) if log else 4 * (3 * M + 16 * (M + 2))
        header = -(-max(vectors, 4 * (M + N)) // 16) * 16 + -(-2 * (M + N) // 16) * 16 + 128
        sizes[f"{M}x{N}"] = header + 4 * N * ld
    return sizes


def main() -> None:
    print("| kernel | arch | shape | registers | spills B | shared B | blocks/SM | warps/SM |")
    print("|---|---|---|---|---|---|---|---|")
    for source in SOURCES:
        for arch in ARCHS:
            for u in usage(source, arch):
                threads = next(n for stem, n in THREADS.items() if u.kernel.startswith(stem)) \
                    if "grad" not in u.kernel else THREADS["transport_grad"]  # fmt: skip
                for shape, dynamic in _dynamic_bytes(u.kernel).items():
                    shared = u.static_shared_bytes + dynamic
                    blocks = blocks_per_sm(int(arch[3:5]), threads, u.registers, shared)
                    print(
                        f"| {u.kernel} | {arch} | {shape} | {u.registers} | {u.spill_bytes} |"
                        f" {shared} | {blocks} | {blocks * threads // 32} |"
                    )


if __name__ == "__main__":
    main()
