"""The processes of a run (torch.distributed): who am I, sums over all, waiting with a reason."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
# For what one process does while all others wait: an index of billions of samples takes hours.
_MOST_MINUTES = 24 * 60.0


@dataclass(frozen=True)
class World:
    """This process's place among all.

    Attributes:
        rank: number of this process, 0 writes the run folder.
        size: number of processes.
        device: where this process computes.
        host: of all processes, where the default group's backend does not serve the host: to wait
            in, for longer than a backend for devices lets a collective last.
    """

    rank: int
    size: int
    device: torch.device
    host: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with gradients averaged over all processes.

        Buffers (queues, counters) are not broadcast: every process computes the same ones.
        """
        if self.size == 1:
            return module
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # TODO(torch>=2.13): the new name only.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        unsynced = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return DistributedDataParallel(
            module,
            device_ids=device_ids,
            gradient_as_bucket_view=True,
            find_unused_parameters=getattr(module, "has_idle_parameters", False),
            **unsynced,
        )

    @contextlib.contextmanager
    def main_first(self, reason: str) -> Iterator[None]:
        """The main process runs the body before all others do (it fills a cache that they read)."""
        if not self.is_main:
            self.barrier(reason, _MOST_MINUTES)
        try:
            yield
        finally:
            # Also when the body failed: the others then run it, and fail in the same way.
            if self.is_main:
                self.barrier(reason, _MOST_MINUTES)

    def from_main(self, make: Callable[[], T], reason: str) -> T:
        """What `make` gives on the main process, on all of them; its error too."""
        if self.size == 1:
            return make()
        made: list[object] = [None]
        if self.is_main:
            try:
                made = [make()]
            except Exception as error:  # raised below, by every process
                made = [error]
        self.barrier(reason, _MOST_MINUTES)
        dist.broadcast_object_list(made, src=0, group=self.host)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    def barrier(self, reason: str, minutes: float = 30.0) -> None:
        """Waits for all processes, on the host.

        Raises:
            RuntimeError: some did not come; says what was waited for, and who is missing.
        """
        if self.size == 1:
            return
        try:
            limit = datetime.timedelta(minutes=minutes)
            dist.monitored_barrier(group=self.host, timeout=limit)
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} waited in vain for {reason}: {error}"
            ) from error

    def check_alike(self, facts: Mapping[str, object]) -> None:
        """Refuses processes that would train on different things without a word.

        Args:
            facts: what must be the same on all, by name; short values.

        Raises:
            ValueError: on every process; names what differs, and one process it differs on.
        """
        if self.size == 1:
            return
        all_facts = [None] * self.size
        dist.all_gather_object(all_facts, dict(facts), group=self.host)
        for rank, other in enumerate(all_facts):
            odd = [n for n in all_facts[0] if other.get(n) != all_facts[0][n]]
            if odd:
                parts = ", ".join(f"{n} is {all_facts[0][n]!r} and {other.get(n)!r}" for n in odd)
                raise ValueError(
                    f"processes 0 and {rank} differ: {parts}; all must read the same data, "
                    "configuration and checkpoint"
                )


@contextlib.contextmanager
def open_world(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[World]:
    """Joins the processes that torchrun started, or is alone; leaves them at the end.

    A process group that stands already is used and left standing.
    """
    chosen = local_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    owned = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if owned:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            host = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
            yield World(dist.get_rank(), dist.get_world_size(), chosen, host)
        else:
            yield World(0, 1, chosen)
    finally:
        if owned:
            dist.destroy_process_group()


def local_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process, among those that torchrun started on its machine.

    Raises:
        NotImplementedError: a GPU is asked for by name, and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NotImplementedError("device 'cuda' needs a CUDA GPU, and torch sees none here")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
