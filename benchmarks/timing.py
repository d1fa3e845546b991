"""Timers. Each holds calls that do the same work and gives the time of one call, in ms, whenever it
is asked.

A timer takes one sample at a time, so that implementations can take turns: a slow moment of the
    machine then hits all of them.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

Call = Callable[[], object]

# A sample shorter than this is mostly clock and loop.
_MIN_SAMPLE_MS = 2.0
_WARMUP_CALLS = 3


class Timer(Protocol):
    """Gives one sample per request; `kind` is the row's `timer`."""

    kind: str

    def sample(self) -> float:
        """Milliseconds of one call."""


class CpuTimer:
    """Wall clock over as many calls as fill `_MIN_SAMPLE_MS`; caches stay warm."""

    kind = "cpu"

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        for call in calls:
            call()
        once = min(self._run(1) for _ in range(_WARMUP_CALLS))
        self._repeats = max(1, round(_MIN_SAMPLE_MS / max(once, 1e-4)))

    def _run(self, repeats: int) -> float:
        start = time.perf_counter_ns()
        for i in range(repeats):
            self._calls[i % len(self._calls)]()
        return (time.perf_counter_ns() - start) * 1e-6 / repeats

    def sample(self) -> float:
        return self._run(self._repeats)


class GraphTimer:
    """Replays one CUDA graph of all calls. Each call has its own buffers, results too, so none
    finds its data in L2."""

    kind = "graph"

    def __init__(self, calls: Sequence[Call], stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            # Held for the life of the graph: freed results would hand their memory to the next
            # call.
            self._results = [call() for call in calls]
        self._num_calls = len(calls)
        self._graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> float:
        return _events_ms(self._graph.replay) / self._num_calls


class EventTimer:
    """CUDA events around plain calls, for code that waits for the device: launches are included."""

    kind = "events"

    def __init__(self, calls: Sequence[Call], stream: torch.cuda.Stream) -> None:
        self._calls, self._stream = calls, stream

    def sample(self) -> float:
        with torch.cuda.stream(self._stream):
            return _events_ms(lambda: [call() for call in self._calls]) / len(self._calls)


def _waits_for_device(call: Call) -> str | None:
    """Why a CUDA graph cannot hold this call, or None.

    Asked before a capture, because one that fails leaves the generator and the allocator capturing.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def _events_ms(run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def make_timer(
    calls: Sequence[Call], device: torch.device, stream: torch.cuda.Stream | None = None
) -> Timer:
    """Warms up and builds the best timer for these calls; `stream` is the one on which their
    autograd graphs were made."""
    if device.type == "cpu":
        return CpuTimer(calls)
    stream = stream or torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP_CALLS):
            for call in calls:
                call()
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        reason = _waits_for_device(calls[0])
    torch.cuda.synchronize(device)
    if reason is not None:
        print(f"    timed by events, no CUDA graph: {reason}")
        return EventTimer(calls, stream)
    return GraphTimer(calls, stream)


def num_buffers(num_bytes: int, device: torch.device) -> int:
    """How many copies of a call's data it takes to exceed a GPU's L2 three times; 1 on a CPU."""
    if device.type == "cpu":
        return 1
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(1, -(-3 * l2_bytes // max(1, num_bytes))))


# Calls of a second are slow enough for their median to need no more.
MIN_ROUNDS = 7


def interleave(
    timers: Mapping[str, Timer], rounds: int, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Samples every timer once a round, in an order that rotates so that none always follows the
    same one; after `seconds` no round beyond MIN_ROUNDS begins."""
    names = list(timers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for i in range(rounds):
            if i >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            first = i % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(timers[name].sample())
    finally:
        if collecting:
            gc.enable()
    return samples


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    p50, p20, p80 = np.quantile(np.asarray(values, dtype=np.float64), (0.5, 0.2, 0.8))
    return float(p50), float(p20), float(p80)


def ratios(baseline: Sequence[float], other: Sequence[float]) -> list[float]:
    """Round by round, how many times faster `other` was than `baseline`."""
    return [b / o for b, o in zip(baseline, other, strict=True)]


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Most memory one call holds beyond what was held before it, its result included.

    GPU: the caching allocator's peak. CPU: the running maximum of torch's CPU allocator as the
    profiler logs it, so memory that a library takes from malloc behind torch's back does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    del result
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = np.cumsum([change for _, change in sorted(changes, key=lambda c: c[0])] or [0])
    return int(max(held.max(), 0))
