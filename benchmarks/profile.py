"""Runs each of our implementations of an op alone, for a profiler.

torch's, a table on stdout and Chrome traces in DIR:
    python -m benchmarks.profile keep_ids --device cuda --out DIR
Nsight Compute, hardware counters of one call:
    ncu --profile-from-start off --clock-control none python -m benchmarks.profile keep_ids
        --device cuda --bare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness, shapes
from benchmarks.rows import OWN

_WARMUP_CALLS = 3


def _bare(call: harness.Call, device: torch.device) -> None:
    """One call between the marks that `ncu --profile-from-start off` waits for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
    else:
        call()


def _traced(call: harness.Call, device: torch.device, label: str, out: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / f"{label}.json.gz"))
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"== {label}\n{profiler.key_averages().table(sort_by=by, row_limit=12)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0, or 2 for wrong usage."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("op", metavar="OP")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--shape", default="", metavar="NAME", help="default: the op's first shape")
    p.add_argument("--out", type=Path, default=Path("traces"), metavar="DIR")
    p.add_argument(
        "--bare", action="store_true", help="only run, between cudaProfilerStart and Stop"
    )
    args = p.parse_args(arguments)
    device = torch.device(args.device)
    try:
        bench = harness.load(args.op)
        shape = shapes.select(args.op, [args.shape] if args.shape else [], args.device)[0]
    except ValueError as error:
        p.error(str(error))
    for dtype in bench.DTYPES:
        for impl, run in bench.impls(device).items():
            if impl not in OWN:
                continue
            inputs = bench.setup(shape, harness.DTYPES[dtype], device)
            try:
                call = harness.directed(run, inputs, bench.DIRECTIONS[-1])
                for _ in range(_WARMUP_CALLS):
                    call()
            except NotImplementedError as error:
                print(f"{impl} skipped: {error}")
                continue
            if args.bare:
                _bare(call, device)
            else:
                _traced(call, device, f"{args.op}-{impl}-{shape.name}-{dtype}", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
