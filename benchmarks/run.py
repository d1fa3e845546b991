"""Measures ops and records rows.

Every op and shape, printed only:       python -m benchmarks.run
Tests first, then rows on disk:         python -m benchmarks.run keep_ids --record
Against another revision, in turns:     python -m benchmarks.run keep_ids --base main
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import harness, shapes
from benchmarks.base import Worker, checkout
from benchmarks.machine import Ceilings, Stamp, measure_ceilings, stamp
from benchmarks.rows import OWN, RESULTS, Row, append

_ROOT = Path(__file__).parents[1]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "ops", nargs="*", metavar="OP", help="ops to measure (default: all that have a benchmark)"
    )
    p.add_argument(
        "--record",
        action="store_true",
        help="run each op's tests, then append its rows; refuse on a red test",
    )
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument(
        "--base",
        metavar="REF",
        help="also measure the library as of this git revision, in the same rounds",
    )
    p.add_argument(
        "--baseline",
        metavar="IMPL",
        help="implementation the ratios compare with (default: the benchmark's own)",
    )
    p.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME",
        help="only this shape; may be repeated",
    )
    p.add_argument(
        "--impl",
        action="append",
        default=[],
        metavar="NAME",
        help="only this implementation and the baseline; may be repeated",
    )
    p.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch"
    )
    p.add_argument(
        "--machine",
        metavar="NAME",
        help="folder of the rows (default: from the CPU's or GPU's model)",
    )
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument(
        "--quick",
        action="store_true",
        help="few rounds, first shape only: does it run? Never recorded",
    )
    return p


def run_tests(op: str) -> str | None:
    """Runs the op's tests; why its rows may not be recorded, or None if every test that could run
    passed."""
    paths = harness.tests(op)
    missing = [path for path in paths if not (_ROOT / path).exists()]
    if missing:
        return f"{missing[0]} is missing"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    reason = verdict(done.returncode, done.stdout.strip() or done.stderr.strip())
    return None if reason is None else f"{', '.join(paths)}: {reason}"


def verdict(returncode: int, output: str) -> str | None:
    """What is wrong with a pytest run, or None: at least one test passed and none failed."""
    last = (output.splitlines() or ["no output"])[-1]
    return None if returncode == 0 and " passed" in f" {last}" else last


Gate = Callable[[str], str | None]


def _prepares(
    bench: harness.Bench,
    device: torch.device,
    wanted: Sequence[str],
    worker: Worker | None,
    ref: str | None,
) -> dict[str, harness.Prepare]:
    """How to prepare each implementation: all of ours and the peers, and `<name>@<ref>` for those
    that are the library's."""
    own = {
        name: functools.partial(harness.Prepared, bench, name)
        for name in bench.impls(device)
        if not wanted or name in wanted
    }
    if worker is None:
        return own
    there = [
        n for n in worker.impls(bench.OP, str(device)) if n in OWN and (not wanted or n in wanted)
    ]
    return own | {f"{n}@{ref}": functools.partial(worker.prepare, impl=n) for n in there}


def _describe(row: Row) -> str:
    def number(value: float | None, unit: str) -> str:
        return "" if value is None else f"{value:9.3g}{unit}"

    return (
        f"    {row.impl:<18} {row.ms_p50:10.4f} ms [{row.ms_p20:.4f}, {row.ms_p80:.4f}]"
        f"{number(row.ratio_p50, 'x')}{number(row.peak_mib, ' MiB')}"
        f"{number(row.gb_per_s, ' GB/s')}"
        f"{number(row.tflop_per_s, ' TFLOP/s')}{number(row.ceiling_pct, ' % of ceiling')}"
        f"{number(shapes.samples_per_s(row.op, row.shape, row.ms_p50), ' samples/s')}"
    )


def measure_op(
    bench: harness.Bench,
    args: argparse.Namespace,
    stamp: Stamp,
    ceilings: Ceilings,
    worker: Worker | None,
) -> tuple[list[Row], dict[str, str]]:
    """Measures every case of one op; its rows, and the errors by case and implementation."""
    device = torch.device(args.device)
    chosen = shapes.select(bench.OP, args.shape, args.device)
    if args.quick and not args.shape:
        chosen = chosen[:1]
    baseline = args.baseline or bench.BASELINE
    wanted = [*args.impl, baseline] if args.impl else []
    budget = harness.QUICK if args.quick else harness.FULL
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for case in harness.cases(bench, chosen, device):
        label = f"{case.op} {case.direction} {case.shape} {case.dtype}"
        print(f"  {label} (x: times faster than {baseline})", flush=True)
        prepares = _prepares(bench, device, wanted, worker, args.base)
        outcome = harness.measure(bench, case, prepares, baseline, stamp, ceilings, budget)
        if worker is not None:
            worker.drop()
        for row in outcome.rows:
            print(_describe(row), flush=True)
        for impl, error in outcome.failed.items():
            print(f"    {impl} FAILED: {error}", flush=True)
            failed[f"{label} {impl}"] = error
        rows += outcome.rows
    return rows, failed


def main(arguments: Sequence[str] | None = None, gate: Gate = run_tests) -> int:
    """Runs the command line; 0 if all was measured (and recorded), 1 if something failed, 2 for
    wrong usage."""
    p = parser()
    args = p.parse_args(arguments)
    if args.record and args.quick:
        p.error("--quick rows are too noisy to --record")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA GPU here")
    try:
        benches: Mapping[str, harness.Bench] = {
            op: harness.load(op) for op in args.ops or harness.names()
        }
        for op in benches:
            shapes.select(op, args.shape, args.device)
    except ValueError as error:
        p.error(str(error))

    torch.set_num_threads(args.threads)
    refused = {op: reason for op in benches if args.record and (reason := gate(op)) is not None}
    for op, reason in refused.items():
        print(f"{op}: not measured, its tests are not green: {reason}", file=sys.stderr)
    benches = {op: bench for op, bench in benches.items() if op not in refused}
    if not benches:
        return 1

    device = torch.device(args.device)
    run = stamp(device, args.machine)
    ceilings, ceiling_rows = measure_ceilings(device, run, quick=args.quick)
    software = f"torch {run.torch}, triton {run.triton}, commit {run.commit}"
    print(f"{run.machine}, {run.threads} threads, {software}")
    for row in ceiling_rows:
        print(f"  ceiling {row.kind} {row.dtype}: {row.rate:.4g} {row.unit}")
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        worker = None
        if args.base:
            try:
                path = stack.enter_context(checkout(args.base))
            except ValueError as error:
                p.error(str(error))
            worker = stack.enter_context(Worker(path, args.threads))
        if args.record:
            append(args.results / run.machine / "ceilings.csv", ceiling_rows)
        for op, bench in benches.items():
            rows, errors = measure_op(bench, args, run, ceilings, worker)
            failed |= errors
            if args.record:
                path = args.results / run.machine / f"{op}.csv"
                append(path, rows)
                print(f"  {len(rows)} rows -> {path}")
    for label, error in failed.items():
        print(f"FAILED {label}: {error}", file=sys.stderr)
    return 1 if failed or refused else 0


if __name__ == "__main__":
    sys.exit(main())
