"""The machine a benchmark runs on: its name, the software on it, and the ceilings measured on
it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.rows import Ceiling
from benchmarks.timing import make_timer

_ROOT = Path(__file__).parents[1]
_NOISE = re.compile(
    r"\((r|tm)\)|\b(nvidia|intel|amd|cpu|processor|gpu|\d+-core)\b|@.*", re.IGNORECASE
)


def slug(model: str) -> str:
    """A short file name for a CPU or GPU model: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", _NOISE.sub(" ", model).lower()).strip("-") or "unknown"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine_name(device: torch.device) -> str:
    """Folder name of this machine's rows: the GPU's model, or the CPU's with its cores
    (`xeon-2c`)."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    return f"{slug(_cpu_model())}-{len(os.sched_getaffinity(0))}c"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """Short hash of the checkout, "-dirty" if tracked files differ from it (result rows aside).

    Outside git: VLPFAST_COMMIT, which whoever copied the tree may set, else "unknown".
    """
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return os.environ.get("VLPFAST_COMMIT", "unknown")
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return head + ("-dirty" if changed else "")


@dataclass(frozen=True)
class Stamp:
    """What every row of one run shares."""

    machine: str
    threads: int
    torch: str
    triton: str
    commit: str
    date: str


def stamp(device: torch.device, machine: str | None) -> Stamp:
    """Describes this run; `machine` overrides the name found."""
    return Stamp(
        machine=machine or machine_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=_version("triton"),
        commit=commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


@dataclass(frozen=True)
class Ceilings:
    """Best rates seen: memory traffic in GB/s (read plus written), matrix product in TFLOP/s by
    dtype."""

    gb_per_s: float
    tflop_per_s: dict[str, float]

    def floor_ms(self, num_bytes: float, num_flops: float, dtype: str) -> float | None:
        """Least time of this much work by the roofline: the slower of memory and arithmetic. None
        if a needed rate is unknown."""
        ms = num_bytes / self.gb_per_s * 1e-6
        if num_flops == 0:
            return ms
        if dtype not in self.tflop_per_s:
            return None
        return max(ms, num_flops / self.tflop_per_s[dtype] * 1e-9)


def _best_ms(call, device: torch.device, rounds: int) -> float:
    timer = make_timer([call], device)
    return min(timer.sample() for _ in range(rounds))


def measure_ceilings(
    device: torch.device, stamp: Stamp, *, quick: bool
) -> tuple[Ceilings, list[Ceiling]]:
    """Measures memory and matrix-product rates on random data, larger than the caches; the best of
    several rounds.

    Memory: copy (2 streams) and triad a + s * b -> c (3 streams), the better one counts. fp32
        products keep torch's default precision.
    """
    on_gpu = device.type == "cuda"
    rounds = 3 if quick else 10
    # 1 GiB on a GPU, 64 MiB on a CPU.
    num_floats = (1 << 28 if on_gpu else 1 << 24) >> (2 if quick else 0)
    a = torch.randn(num_floats, device=device)
    b, c = torch.randn_like(a), torch.empty_like(a)
    copy_ms = _best_ms(lambda: c.copy_(a), device, rounds)
    triad_ms = _best_ms(lambda: torch.add(a, b, alpha=3.0, out=c), device, rounds)
    rates = [
        ("copy", "fp32", 2e-6 * a.nbytes / copy_ms, "GB/s"),
        ("triad", "fp32", 3e-6 * a.nbytes / triad_ms, "GB/s"),
    ]
    a = b = c = None  # their memory goes before the matrices come
    n = (8192 if on_gpu else 1024) >> (1 if quick else 0)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(x)
        ms = _best_ms(lambda x=x, y=y, out=out: torch.mm(x, y, out=out), device, rounds)
        rates.append(("gemm", name, 2e-9 * n**3 / ms, "TFLOP/s"))
    rows = [
        Ceiling(kind, dtype, rate, unit, stamp.machine, stamp.threads, stamp.torch, stamp.date)
        for kind, dtype, rate, unit in rates
    ]
    return Ceilings(
        gb_per_s=max(row.rate for row in rows if row.unit == "GB/s"),
        tflop_per_s={row.dtype: row.rate for row in rows if row.kind == "gemm"},
    ), rows
