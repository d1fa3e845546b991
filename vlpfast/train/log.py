"""What a run tells: lines (terminal, out.log), metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from vlpfast.train.checkpoint import write_atomic


@dataclass
class Window:
    """Sums over the steps since the last log line.

    Attributes:
        steps: how many.
        data_s: seconds waited for the loader.
        step_s: seconds in all.
        cpu_s: CPU seconds of this process in all, its loading threads included.
        losses: sum of each loss.
        counts: of how many steps each loss is the sum; a step need not have all.
    """

    steps: int = 0
    data_s: float = 0.0
    step_s: float = 0.0
    cpu_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, data_s: float, step_s: float, cpu_s: float, losses: Mapping[str, float]) -> None:
        """Takes in one step."""
        self.steps += 1
        self.data_s += data_s
        self.step_s += step_s
        self.cpu_s += cpu_s
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean of each loss."""
        return {name: value / self.counts[name] for name, value in self.losses.items()}


class RunLog:
    """Writes the run folder's logs. On processes other than the first one it writes nothing."""

    def __init__(
        self, run_dir: Path, *, active: bool, start_step: int, total_steps: int, report_to: str
    ) -> None:
        self._active = active
        self._tensorboard = None
        if not active:
            return
        self._metrics_path = run_dir / "metrics.jsonl"
        _cut_metrics(self._metrics_path, start_step)
        self._metrics = self._metrics_path.open("a")
        self._out = (run_dir / "out.log").open("a")
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def info(self, text: str) -> None:
        """One line to the terminal and to `out.log`."""
        if self._active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            stamp = time.strftime("%Y-%m-%d,%H:%M:%S")
            self._out.write(f"{stamp} | {text}\n")
            self._out.flush()

    def advance(self) -> None:
        """One step on the progress bar."""
        if self._active:
            self._bar.update()

    def row(self, row: Mapping[str, object]) -> None:
        """One row to `metrics.jsonl` and TensorBoard; values are numbers or mappings of them."""
        if not self._active:
            return
        self._metrics.write(json.dumps(_finite_or_null(row)) + "\n")
        self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in _scalars(row):
                self._tensorboard.add_scalar(f"train/{name}", value, row["step"])

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            self._bar.close()
            self._metrics.close()
            self._out.close()
            if self._tensorboard is not None:
                self._tensorboard.close()


def log_line(
    row: Mapping[str, object],
    *,
    last: Mapping[str, float],
    num_samples: int,
    total_steps: int,
    world: int,
    device: str,
) -> str:
    """open_clip's log line, with the share of the time that was spent waiting for data.

    Args:
        row: what goes to `metrics.jsonl` at this step.
        last: each loss that this step has; in parentheses follows the mean since the line before.
        num_samples: samples of an epoch.
        total_steps: steps of the run.
        world: number of processes.
        device: their device type.
    """
    seen = row["samples_seen"] - row["epoch"] * num_samples
    unit = "gpu" if device == "cuda" else "process"
    rate = row["samples_per_s"]
    losses = " ".join(
        f"{_title(n)}: {last.get(n, m):#.5g} ({m:#.5g})" for n, m in row["losses"].items()
    )
    metrics = " ".join(f"{_title(n)}: {v:.4g}" for n, v in row["metrics"].items())
    return (
        f"Train Epoch: {row['epoch']} "
        f"[{seen:>{len(str(num_samples))}}/{num_samples} ({seen / num_samples:.0%})] "
        f"Step: {row['step']}/{total_steps} "
        f"Data (t): {row['data_s']:.3f} ({row['data_s'] / row['step_s']:.0%}) "
        f"Batch (t): {row['step_s']:.3f}, {rate:#.5g}/s, {rate / world:#.5g}/s/{unit} "
        f"LR: {row['lr']:.6f} {metrics} {losses}"
    )


def _title(name: str) -> str:
    return name.replace("_", " ").title()


def _scalars(row: Mapping[str, object], prefix: str = "") -> list[tuple[str, float]]:
    scalars = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            scalars += _scalars(value, f"{prefix}{name}/")
        elif name != "step":
            scalars.append((f"{prefix}{name}", value))
    return scalars


def _finite_or_null(value: object) -> object:
    if isinstance(value, Mapping):
        return {k: _finite_or_null(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_metrics(path: Path, start_step: int) -> None:
    """Drops the rows of steps that will be run again, and a last row that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= start_step:
            kept.append(line + "\n")
    write_atomic(path, lambda p: p.write_text("".join(kept)))
