"""How fast each loader makes training batches of a data set, and what CPU time it takes from the
step.

Printed only:                     python -m benchmarks.data.bench_loader PATH
Rows in results/<machine>/data:   python -m benchmarks.data.bench_loader PATH --name emoji --record
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import stamp
from benchmarks.rows import RESULTS, append
from benchmarks.timing import interleave, quantiles
from vlpfast.data.config import DataConfig
from vlpfast.data.loader import make_loader, make_tokenizer, open_index

_LOADERS = ("torch", "dali")


@dataclass(frozen=True)
class LoaderRow:
    """One loader on one data set.

    Attributes:
        images_per_s: median over rounds, and the 20th and 80th percentile.
        cpu_ms_per_image: CPU time of this process, all threads, over all rounds.
        num_samples: of the data set; where it fits, the page cache holds the files.
    """

    loader: str
    dataset: str
    num_samples: int
    image_size: int
    batch_size: int
    workers: int
    images_per_s: float
    images_per_s_p20: float
    images_per_s_p80: float
    cpu_ms_per_image: float
    machine: str
    threads: int
    torch: str
    commit: str
    date: str


class _Rounds:
    """Draws a few batches per sample; prefetched ones are drained, so that work done while others
    ran does not count."""

    kind = "cpu"

    def __init__(self, batches: Iterator, batch_size: int, prefetch: int) -> None:
        self._batches, self._batch_size, self._drain = batches, batch_size, prefetch + 1
        self._measured = 2 * self._drain
        self.cpu_s, self.num_images = 0.0, 0
        next(batches)

    def sample(self) -> float:
        """Milliseconds per image."""
        for _ in range(self._drain):
            next(self._batches)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(self._measured):
            next(self._batches)
        num_images = self._measured * self._batch_size
        self.cpu_s += time.process_time() - cpu
        self.num_images += num_images
        return (time.perf_counter() - start) * 1e3 / num_images


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0, or 2 for wrong usage."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.data.bench_loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("path", metavar="PATH", help="data set, as for `vlpfast train --data`")
    p.add_argument(
        "--name", default="", help="what rows call the data set (default: its file name)"
    )
    p.add_argument("--loader", action="append", default=[], choices=_LOADERS)
    p.add_argument("--image-size", type=int, default=224)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--workers", type=int, default=0, help="loading threads; 0 as in training")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--machine", metavar="NAME")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument("--record", action="store_true")
    args = p.parse_args(arguments)
    run = stamp(torch.device("cpu"), args.machine)
    timers, loaders = {}, []
    try:
        for name in args.loader or _LOADERS:
            config = DataConfig(args.path, loader=name, workers=args.workers)
            index = open_index(config)
            loader = make_loader(
                index,
                config,
                tokenizer=make_tokenizer(config, index),
                image_size=args.image_size,
                batch_size=args.batch_size,
                seed=0,
            )
            loaders.append(loader)
            timers[name] = _Rounds(iter(loader), args.batch_size, config.prefetch)
        samples = interleave(timers, args.rounds)
    except (OSError, ValueError, RuntimeError) as error:
        p.error(str(error))
    finally:
        for loader in loaders:
            loader.close()
    rows = []
    for name, timer in timers.items():
        p50, p20, p80 = quantiles(1e3 / np.asarray(samples[name]))
        rows.append(
            LoaderRow(
                loader=name,
                dataset=args.name or Path(args.path).name,
                num_samples=index.num_samples,
                image_size=args.image_size,
                batch_size=args.batch_size,
                workers=args.workers,
                images_per_s=p50,
                images_per_s_p20=p20,
                images_per_s_p80=p80,
                cpu_ms_per_image=1e3 * timer.cpu_s / timer.num_images,
                machine=run.machine,
                threads=run.threads,
                torch=run.torch,
                commit=run.commit,
                date=run.date,
            )
        )
        print(
            f"{name:<6} {p50:8.1f} images/s [{p20:.1f}, {p80:.1f}], "
            f"{rows[-1].cpu_ms_per_image:.2f} ms of CPU an image"
        )
    if args.record:
        append(args.results / run.machine / "data" / "loader.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
