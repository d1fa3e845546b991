"""What the training loop takes and gives, and how a signal stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vlpfast.data.batch import Batch


class Loader(Protocol):
    """An endless stream of this process's micro-batches.

    Attributes:
        corrupt: samples that were skipped, by name, each with its reason.
    """

    corrupt: Mapping[str, str]

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None:
        """Frees what the loader holds."""


class NonFiniteError(RuntimeError):
    """A loss or the gradient is NaN or infinite; the weights are those before the step."""


@dataclass(frozen=True)
class Run:
    """What a trainer needs to know of the run around it.

    Attributes:
        name: of the run.
        folder: where everything is written.
        num_samples: samples of one epoch.
        config: the effective configuration, for `config.json` and checkpoints.
        identity: what must be the same on resuming, by name (data, tokenizer).
        files: further files of the run folder, by name, each with what writes it to a path.
        notes: for the log of a new run.
    """

    name: str
    folder: Path
    num_samples: int
    config: Mapping[str, object]
    identity: Mapping[str, str | int]
    files: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run_dir: the run's folder.
        step: optimizer steps taken since the start of the run.
        samples_seen: samples of all processes until there.
        losses: mean of each loss over the last logged window; empty where nothing was trained.
        stopped: "done", "time limit", or "interrupted" by SIGINT or SIGTERM.
        checkpoint: the last one.
    """

    run_dir: Path
    step: int
    samples_seen: int
    losses: dict[str, float]
    stopped: str
    checkpoint: Path


class StepOutput(Protocol):
    """What a step module returns: (sum, count) of each loss over its rows, and scalars to log."""

    losses: dict[str, tuple[Tensor, Tensor]]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class StepReport:
    """One optimizer step in numbers.

    Attributes:
        losses: mean of each loss over all processes.
        metrics: scalars of this process's last micro-batch.
        grad_norm: global norm of the gradient before clipping.
        lr: learning rate.
        data_s: seconds waited for the loader.
    """

    losses: dict[str, float]
    metrics: dict[str, float]
    grad_norm: float
    lr: float
    data_s: float


@contextlib.contextmanager
def on_signals(act: Callable[[], None]) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM calls `act`; a second one does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        act()
        signal.signal(number, before[number])
        # os.write: a signal may come in the middle of a print.
        os.write(2, b"\nstopping after this step with a checkpoint; once more stops at once\n")

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
