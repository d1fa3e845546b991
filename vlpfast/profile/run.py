"""`profile`: steps of the real training loop, on real data, timed and then recorded."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vlpfast.data.batch import Batch
from vlpfast.profile import places
from vlpfast.profile.marks import REST, mark, marked, modules_marked, optimizer_marked
from vlpfast.profile.report import StepProfile, plot_parts
from vlpfast.rules import check_rules
from vlpfast.train.config import RunConfig
from vlpfast.train.loop import Trainer
from vlpfast.train.run import open_trainer

# See `vlpfast.rules`.
_RULES = (
    "{warmup must be >= 0}",
    "{timed must be >= 1}",
    "{recorded must be >= 1}",
    "{depth must be >= 1}",
)


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured.

    Attributes:
        warmup: steps before the first timed one.
        timed: steps that are timed without a profiler.
        recorded: steps under the profiler.
        depth: how many names deep modules are told apart: 1 towers, 3 a block's attention and MLP.
    """

    warmup: int = 3
    timed: int = 10
    recorded: int = 3
    depth: int = 3

    def __post_init__(self) -> None:
        check_rules(self, _RULES)


def profile(config: RunConfig, out: Path, options: ProfileOptions | None = None) -> StepProfile:
    """Measures the training steps of `config` from its first one on; the weights are not kept.

    Leaves in `out` profile.json, profile.png and trace.json.gz, Chrome's format (Perfetto reads
    it), where a range "vlpfast: PART" says which part runs. Of several processes every one takes
    the steps, and the first one writes.

    Args:
        config: of a run, as for `train`.
        out: a folder, made where it is missing.
        options: how many steps, and how finely modules are told apart.

    Raises:
        ValueError: as `train`.
    """
    options = options or ProfileOptions()
    with open_trainer(config) as trainer:
        module = trainer.world.wrap(trainer.module)
        with contextlib.closing(trainer.open_loader(0)) as loader:
            batches = iter(loader)
            for _ in range(options.warmup):
                trainer.take_step(module, batches)
            times = [_timed(trainer, module, batches) for _ in range(options.timed)]
            recorded, peak = _record(trainer, module, batches, options)
        device = trainer.world.device
        on_device = device.type == "cuda"
        events = recorded.events()
        result = StepProfile(
            step_ms=statistics.median(step for step, _ in times),
            data_ms=statistics.median(data for _, data in times),
            samples=trainer.global_batch,
            peak_mib=peak / 2**20,
            product_tflop_per_s=_product_rate(device, config.train.precision),
            parts=places.parts(events, options.recorded, on_device=on_device),
            operators=places.operators(events, options.recorded, on_device=on_device),
            info={
                "name": config.name,
                "device": str(device),
                "processes": trainer.world.size,
                "precision": config.train.precision,
                "threads": torch.get_num_threads(),
                "batch_size": config.train.batch_size,
            },
        )
        if trainer.world.is_main:
            out.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(out / "trace.json.gz"))
            (out / "profile.json").write_text(result.to_json() + "\n")
            plot_parts(result, out / "profile.png", config.name)
    return result


def _timed(
    trainer: Trainer, module: torch.nn.Module, batches: Iterator[Batch]
) -> tuple[float, float]:
    """Milliseconds of a step, and of waiting for its data. Its guard waits for the device."""
    started = time.perf_counter()
    report = trainer.take_step(module, batches)
    return 1e3 * (time.perf_counter() - started), 1e3 * report.data_s


def _record(
    trainer: Trainer, module: torch.nn.Module, batches: Iterator[Batch], options: ProfileOptions
) -> tuple[torch.profiler.profile, int]:
    """The profiler's record of the steps, and the most bytes they held."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_device = trainer.world.device.type == "cuda"
    if on_device:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    prepare = trainer.prepare
    trainer.prepare = marked("prepare", prepare)
    try:
        with (
            modules_marked(trainer.module, options.depth),
            optimizer_marked(trainer.optimizer),
            # Shapes, for the operations of products.
            torch.profiler.profile(
                activities=activities, record_shapes=True, with_flops=True, profile_memory=True
            ) as recorded,
        ):
            for _ in range(options.recorded):
                with mark(REST):
                    trainer.take_step(module, _marked_data(batches))
    finally:
        trainer.prepare = prepare
    if on_device:
        return recorded, torch.cuda.max_memory_allocated() - before
    return recorded, _peak_on_cpu(recorded)


def _marked_data(batches: Iterator[Batch]) -> Iterator[Batch]:
    while True:
        with mark("data"):
            batch = next(batches)
        yield batch


def _peak_on_cpu(recorded: torch.profiler.profile) -> int:
    """The running maximum of what torch's allocator gave and got back, as the profiler logs it."""
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def _product_rate(device: torch.device, precision: str) -> float:
    """TFLOP/s of a large product of random matrices, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "amp_bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2e-12 * size**3 / best
