"""Measures one op: every implementation, shape, dtype and direction, in interleaved rounds, into
rows.

A benchmark module `benchmarks/ops/bench_<op>.py` is a `Bench`, and so is a whole step's,
`benchmarks/step/bench_<system>.py`, under the name `step_<system>`; README.md shows one.
"""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.machine import Ceilings, Stamp
from benchmarks.rows import Row
from benchmarks.shapes import Shape
from benchmarks.timing import (
    Call,
    interleave,
    make_timer,
    num_buffers,
    peak_bytes,
    quantiles,
    ratios,
)

Inputs = dict[str, object]
Run = Callable[[Inputs], object]

# What the names of whole steps begin with.
STEP = "step_"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64}


class Bench(Protocol):
    """What a benchmark module gives.

    Attributes:
        OP: the op's stem, a key of shapes.SHAPES; its tests are tests/ops/test_<OP>.py, those
            of a whole step the module's `TESTS`.
        SHAPES: its workloads by name, from shapes.SHAPES.
        DTYPES: names of DTYPES it is measured in.
        DIRECTIONS: ("fwd",), or ("fwd", "bwd", "both") for an op with gradients; ("step",) for a
            training step, which is a call that has its backward in it.
        BASELINE: the implementation ratios compare with: the best public one that runs everywhere.
    """

    OP: str
    SHAPES: Mapping[str, Shape]
    DTYPES: Sequence[str]
    DIRECTIONS: Sequence[str]
    BASELINE: str

    def setup(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Fresh random inputs; a tensor that requires grad is differentiated."""

    def impls(self, device: torch.device) -> dict[str, Run]:
        """Implementations by name, ours and the peers; each is called with what `setup` gave."""

    def bytes(self, shape: Shape, dtype: torch.dtype, direction: str) -> int:
        """Fewest bytes the maths must move: each input read once, each result written once."""

    def flops(self, shape: Shape, direction: str) -> int:
        """Floating-point operations of the maths, recomputation not counted."""


def load(op: str) -> Bench:
    """The benchmark module of an op.

    Raises:
        ValueError: the op has none.
    """
    folder, stem = ("step", op.removeprefix(STEP)) if op.startswith(STEP) else ("ops", op)
    name = f"benchmarks.{folder}.bench_{stem}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(f"{op}: benchmarks/{folder}/bench_{stem}.py is missing") from error


def names() -> list[str]:
    """Everything that has a benchmark module: ops, then whole steps."""
    folders = (("ops", ""), ("step", STEP))
    return [
        prefix + path.stem.removeprefix("bench_")
        for folder, prefix in folders
        for path in sorted((Path(__file__).parent / folder).glob("bench_*.py"))
    ]


def tests(op: str) -> tuple[str, ...]:
    """Test files that must be green before rows of `op` are recorded."""
    return load(op).TESTS if op.startswith(STEP) else (f"tests/ops/test_{op}.py",)


@dataclass(frozen=True)
class Case:
    """One thing to measure, by names alone, so that another process can prepare it too."""

    op: str
    shape: str
    dtype: str
    direction: str
    device: str


class Prepared:
    """One implementation warmed up on one case: samples its time, knows its peak memory."""

    def __init__(self, bench: Bench, impl: str, case: Case) -> None:
        device, dtype = torch.device(case.device), DTYPES[case.dtype]
        shape = bench.SHAPES[case.shape]
        run = bench.impls(device)[impl]
        count = num_buffers(bench.bytes(shape, dtype, case.direction), device)
        # The backward runs on the stream of its forward, so the stream that is captured must see
        # both.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream) if stream else nullcontext():
            torch.manual_seed(0)
            calls = [
                directed(run, bench.setup(shape, dtype, device), case.direction)
                for _ in range(count)
            ]
            calls[0]()
            self.peak_bytes = peak_bytes(calls[0], device)
        self.timer = make_timer(calls, device, stream)

    @property
    def kind(self) -> str:
        """How it is timed."""
        return self.timer.kind

    def sample(self) -> float:
        """Milliseconds of one call."""
        return self.timer.sample()


def _differentiable(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result] if result.requires_grad else []
    parts = result.values() if isinstance(result, Mapping) else result
    if not isinstance(parts, (tuple, list)) and not isinstance(result, Mapping):
        return []
    return [tensor for part in parts for tensor in _differentiable(part)]


def directed(run: Run, inputs: Inputs, direction: str) -> Call:
    """A call of no arguments that does the forward, the backward alone, or both; a step is called
    as it is.

    The forward runs as in training, keeping what its backward needs; the backward draws random
    output gradients beforehand.
    """
    if direction in ("fwd", "step"):
        return lambda: run(inputs)
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    outputs = _differentiable(run(inputs))
    if not leaves or not outputs:
        raise ValueError(f"direction {direction!r} needs inputs and results with gradients")
    grads = [torch.randn_like(output) for output in outputs]
    # Peers may take an input in a form of their own, and then not use ours.
    found = torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
    leaves = [leaf for leaf, grad in zip(leaves, found, strict=True) if grad is not None]
    if direction == "bwd":
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    if direction == "both":
        return lambda: torch.autograd.grad(_differentiable(run(inputs)), leaves, grads)
    raise ValueError(f"direction must be 'fwd', 'bwd', 'both' or 'step', got {direction!r}")


class Sampler(Protocol):
    """A `Prepared`, in this process or another."""

    kind: str
    peak_bytes: int | None

    def sample(self) -> float:
        """Milliseconds of one call."""


Prepare = Callable[[Case], Sampler]


@dataclass(frozen=True)
class Budget:
    """How long to measure: rounds per case, each one sample of every implementation, and after how
    many seconds no round beyond `timing.MIN_ROUNDS` begins."""

    rounds: int
    seconds: float = math.inf


FULL, QUICK = Budget(rounds=51, seconds=20.0), Budget(rounds=7)


def cases(bench: Bench, shapes: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    """Every case of these shapes."""
    for shape in shapes:
        for dtype in bench.DTYPES:
            for direction in bench.DIRECTIONS:
                yield Case(bench.OP, shape.name, dtype, direction, str(device))


@dataclass(frozen=True)
class Outcome:
    """Rows of one case, and what failed: implementation name and error."""

    rows: list[Row]
    failed: dict[str, str]


def measure(
    bench: Bench,
    case: Case,
    prepares: Mapping[str, Prepare],
    baseline: str,
    stamp: Stamp,
    ceilings: Ceilings | None,
    budget: Budget,
) -> Outcome:
    """Measures all implementations of one case together.

    Args:
        prepares: how to prepare each implementation, by the name its row shall have.
        baseline: the name ratios compare with; if it is not among those that run, ratios stay
            empty.
    """
    ready: dict[str, Sampler] = {}
    failed: dict[str, str] = {}
    for name, prepare in prepares.items():
        try:
            ready[name] = prepare(case)
        except NotImplementedError as error:
            print(f"    {name} skipped: {error}")
        except Exception as error:  # one broken peer must not cost the others their rows
            failed[name] = "".join(traceback.format_exception_only(error)).strip()
    if not ready:
        return Outcome([], failed)
    samples = interleave(ready, budget.rounds, budget.seconds)
    return Outcome(
        [
            make_row(
                bench,
                case,
                name,
                samples[name],
                samples.get(baseline),
                baseline,
                one,
                stamp,
                ceilings,
            )
            for name, one in ready.items()
        ],
        failed,
    )


def make_row(
    bench: Bench,
    case: Case,
    impl: str,
    samples: Sequence[float],
    baseline_samples: Sequence[float] | None,
    baseline: str,
    prepared: Sampler,
    stamp: Stamp,
    ceilings: Ceilings | None,
) -> Row:
    """Turns samples of one implementation into its row."""
    shape, dtype = bench.SHAPES[case.shape], DTYPES[case.dtype]
    num_bytes = bench.bytes(shape, dtype, case.direction)
    num_flops = bench.flops(shape, case.direction)
    p50, p20, p80 = quantiles(samples)
    ratio = quantiles(ratios(baseline_samples, samples)) if baseline_samples else (None,) * 3
    floor = ceilings.floor_ms(num_bytes, num_flops, case.dtype) if ceilings else None
    return Row(
        op=case.op,
        impl=impl,
        direction=case.direction,
        shape=case.shape,
        dtype=case.dtype,
        ms_p50=p50,
        ms_p20=p20,
        ms_p80=p80,
        ratio_p50=ratio[0],
        ratio_p20=ratio[1],
        ratio_p80=ratio[2],
        baseline=baseline,
        peak_mib=None if prepared.peak_bytes is None else prepared.peak_bytes / 2**20,
        gb_per_s=num_bytes / p50 * 1e-6,
        tflop_per_s=num_flops / p50 * 1e-9 if num_flops else None,
        ceiling_pct=None if floor is None else 100 * floor / p50,
        timer=prepared.kind,
        **asdict(stamp),
    )


def own_impls(op: object, device: torch.device) -> list[str]:
    """Names of our implementations that a user of this device would get; Triton's interpreter is
    not one of them."""
    return [
        name
        for name, implementation in op.implementations.items()
        if implementation.missing() is None and not (name == "triton" and device.type == "cpu")
    ]
