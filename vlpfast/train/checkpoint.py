"""Checkpoints, written whole or not at all, loadable with `weights_only=True`; exported weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 2
_NAME = re.compile(r"step_(\d+)\.pt")
_PARTIAL = ".partial"


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a file beside `path`, flushes it to disk, then renames it to `path`.

    A reader sees the old file or the whole new one, however the process ends.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    write(partial)
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def path_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps stands."""
    return run_dir / "checkpoints" / f"step_{step}.pt"


def save(run_dir: Path, state: Mapping[str, object], *, keep: int) -> Path:
    """Writes `state` as `checkpoints/step_K.pt`, K its global_step, and points `latest` to it.

    Args:
        run_dir: the run's folder.
        state: tensors and plain Python values only.
        keep: newest checkpoints that stay; 0 keeps all.
    """
    path = path_of(run_dir, state["global_step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda p: torch.save(dict(state), p))
    _point_latest(run_dir, path)
    if keep:
        for old in _by_age(run_dir)[:-keep]:
            old.unlink()
    return path


def latest(run_dir: Path) -> Path | None:
    """The checkpoint of a run folder that was written last, or None. Partial files do not count."""
    pointer = run_dir / "latest"
    if pointer.is_file() and (run_dir / pointer.read_text().strip()).is_file():
        return run_dir / pointer.read_text().strip()
    # The very first checkpoint stands, and the process died before it wrote the pointer.
    files = _by_age(run_dir)
    return files[-1] if files else None


def find(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint a run begins from, or None for a new run.

    Args:
        run_dir: the run's folder.
        resume: a checkpoint's path; "latest": the newest there, if any; None: a new run.

    Raises:
        ValueError: a new run in a folder that has checkpoints.
        FileNotFoundError: there is no file at `resume`.
    """
    newest = latest(run_dir)
    if resume == "latest":
        return newest
    if resume is not None:
        if not Path(resume).is_file():
            raise FileNotFoundError(f"no checkpoint at {resume}")
        return Path(resume)
    if newest is not None:
        raise ValueError(
            f"run folder {run_dir} holds {newest.name} already; "
            "continue it with --resume latest or choose another --name"
        )
    return None


def clean(run_dir: Path) -> None:
    """Removes what writes that were cut off have left."""
    for folder in (run_dir, run_dir / "checkpoints"):
        for partial in folder.glob(f".*{_PARTIAL}"):
            partial.unlink()


def load(path: Path) -> dict[str, object]:
    """Reads a checkpoint onto the CPU.

    Raises:
        ValueError: the file is not a checkpoint of this format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: expected checkpoint format {FORMAT_VERSION}, got {version!r}")
    return state


def check_same(path: Path, state: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Refuses a checkpoint of another data stream.

    Args:
        path: for the message.
        state: the checkpoint.
        expected: this run's identity (seed, data, tokenizer, global batch) by name.

    Raises:
        ValueError: names each part that differs, with both values.
    """
    identity = state["identity"]
    odd = [k for k in expected if identity.get(k) != expected[k]]
    if odd:
        parts = ", ".join(f"{k} is {expected[k]!r}, was {identity.get(k)!r}" for k in odd)
        raise ValueError(
            f"cannot resume from {path}: {parts}; resuming needs the same, a new run another --name"
        )


def export_safetensors(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes weights as safetensors. Tied weights are written under each of their names."""
    tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in state.items()}
    write_atomic(path, lambda p: save_file(tensors, p, metadata=dict(metadata)))


def _by_age(run_dir: Path) -> list[Path]:
    """Whole checkpoints, the one written last at the end."""
    files = (run_dir / "checkpoints").glob("step_*.pt")
    return sorted(
        (p for p in files if _NAME.fullmatch(p.name)),
        key=lambda p: (p.stat().st_mtime_ns, int(_NAME.fullmatch(p.name)[1])),
    )


def _point_latest(run_dir: Path, path: Path) -> None:
    text = str(path.relative_to(run_dir))
    write_atomic(run_dir / "latest", lambda p: p.write_text(text + "\n"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
