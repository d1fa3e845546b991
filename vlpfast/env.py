"""What this machine can run: versions, hardware, compiled modules, and every op's implementations.

`python -m vlpfast.env` prints it; `vlpfast env` is the same.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

from vlpfast import _ext

# Distributions whose version decides how something runs here.
_PACKAGES = (
    "vlpfast",
    "torch",
    "triton",
    "numpy",
    "tokenizers",
    "nvidia-dali-cuda130",
    "simplejpeg",
    "opencv-python-headless",
    "xformers",
    "flash-attn",
    "transformers",
    "open_clip_torch",
    "timm",
)


def report() -> dict:
    """Everything `vlpfast env` shows, as plain values (JSON)."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": _machine(),
        "modules": {name: _ext.missing(name) or "built" for name in ("_C", "_C_cuda", "_host")},
        "ops": _ops(),
    }


def describe(values: dict | None = None) -> str:
    """`report()` as text: one block for each of its parts."""
    values = values or report()
    lines = []
    for title in ("versions", "machine", "modules"):
        rows = [(name, str(value)) for name, value in values[title].items() if value is not None]
        lines += [title, *_columns(rows), ""]
    rows = [("op", "implementation", "here", "auto on cpu", "auto on cuda")]
    reasons = []
    for op, facts in values["ops"].items():
        for i, (impl, reason) in enumerate(facts["implementations"].items()):
            ranks = [_rank(facts["auto"].get(device, []), impl) for device in ("cpu", "cuda")]
            rows.append((op if i == 0 else "", impl, "no" if reason else "yes", *ranks))
            if reason:
                reasons.append((f"{op}: {impl}", reason))
    lines += ["ops", *_columns(rows)]
    if reasons:
        lines += ["", "not here because", *_columns(reasons)]
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machine() -> dict[str, str | int | None]:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(i) for i in range(num_gpus)]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "gpus": ", ".join(f"{g.name} (sm_{g.major}{g.minor})" for g in gpus) or "none",
        "triton": _ext.triton_missing() or "runs",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _ops() -> dict[str, dict]:
    from vlpfast.ops import OPS

    return {
        name: {
            "implementations": {i: way.missing() for i, way in op.implementations.items()},
            "auto": {device: list(order) for device, order in op.auto.items()},
        }
        for name, op in OPS.items()
    }


def _rank(order: list[str], impl: str) -> str:
    return str(order.index(impl) + 1) if impl in order else "-"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    print(describe())
