"""Runs a function in several gloo processes on this machine and returns what each returns."""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = timedelta(seconds=120)


def run_distributed(function: Callable, world_size: int, *args: object) -> list:
    """`function(rank, *args)` in `world_size` processes that form the default gloo group.

    Args:
        function: a module-level function; tensors, containers and numbers may be returned.
        world_size: number of processes, each with one thread.
        args: picklable arguments, the same for all.

    Returns:
        The results in rank order. An exception in any process is raised here.
    """
    path, name = inspect.getsourcefile(function), function.__name__
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_process, (world_size, folder, path, name, args), nprocs=world_size)
        except mp.ProcessRaisedException as error:
            # The first one noticed may have failed because another one had left.
            texts = [path.read_text() for path in sorted(Path(folder).glob("rank*.txt"))]
            raise RuntimeError("\n".join(texts) or str(error)) from error
        return [torch.load(_result(folder, rank)) for rank in range(world_size)]


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pt"


def _process(
    rank: int, world_size: int, folder: str, path: str, name: str, args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    # By path: under importlib mode a test module's name means nothing to a new process.
    spec = importlib.util.spec_from_file_location(f"_distributed_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    try:
        torch.save(getattr(module, name)(rank, *args), _result(folder, rank))
        # A process that leaves at once would close connections that others are still making.
        dist.barrier()
    except BaseException:
        _result(folder, rank).with_suffix(".txt").write_text(
            f"rank {rank}: {traceback.format_exc()}"
        )
        raise
    finally:
        dist.destroy_process_group()
