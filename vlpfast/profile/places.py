"""From a profiler's events to parts and operators.

An event's own time, what no event inside it took, belongs to the innermost mark around it. A
backward runs under no mark: its node has the sequence number of the forward operator that made it,
and so that operator's part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch.autograd.profiler_util import FunctionEvent

from vlpfast.profile.marks import PREFIX, REST
from vlpfast.profile.report import Operator, Part

_NODE = "autograd::engine::evaluate_function: "
# The gradient of a weight is added to what other uses of it gave.
_ACCUMULATE = _NODE + "torch::autograd::AccumulateGrad"
_GRADIENTS = "gradients"

Place = tuple[str, str]


def parts(events: Sequence[FunctionEvent], steps: int, *, on_device: bool) -> list[Part]:
    """Milliseconds of each part in a step, the longest first; on the CPU they sum to the step's.

    Args:
        events: of `steps` steps, each under a mark `REST`.
        steps: how many.
        on_device: count the time of a GPU's kernels instead of the host's.
    """
    owners = _owners(events)
    times: dict[Place, float] = defaultdict(float)
    for event in events:
        place = _place(event, owners)
        if place is not None:
            own = event.self_device_time_total if on_device else event.self_cpu_time_total
            times[place] += own / 1e3 / steps
    names = {name for name, _ in times}
    found = [
        Part(n, times.get((n, "forward"), 0.0), times.get((n, "backward"), 0.0)) for n in names
    ]
    return sorted((p for p in found if p.total_ms > 0), key=lambda p: -p.total_ms)


def operators(events: Sequence[FunctionEvent], steps: int, *, on_device: bool) -> list[Operator]:
    """Operators of a step by their own time, the longest first. Nodes of the backward and what runs
    in Python count under the operator or function they are named after.
    """
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    for event in events:
        # Whose part it is does not matter, but whether it is of a step.
        if event.name.startswith(PREFIX) or _place(event, {}) is None:
            continue
        name = event.name.removeprefix(_NODE)
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        calls[name] += 1
        times[name] += own / 1e3 / steps
        flops[name] += (event.flops or 0) / steps
    found = [Operator(n, calls[n] / steps, times[n], flops[n] / 1e9) for n in times]
    return sorted((o for o in found if o.self_ms > 0), key=lambda o: -o.self_ms)


def _owners(events: Sequence[FunctionEvent]) -> dict[int, str]:
    """The part of the operator that made each node of the graph, by sequence number."""
    owners: dict[int, tuple[float, str]] = {}
    for event in events:
        if event.sequence_nr < 0 or _in_backward(event):
            continue
        part = _innermost(event)
        start = event.time_range.start
        # Operators without a gradient have the number of the next node: the last one made it.
        if part is not None and start >= owners.get(event.sequence_nr, (start, ""))[0]:
            owners[event.sequence_nr] = (start, part)
    return {number: part for number, (_, part) in owners.items()}


def _place(event: FunctionEvent, owners: dict[int, str]) -> Place | None:
    """(part, direction) of an event; None outside of the steps."""
    around = event
    while around is not None:
        if around.name.startswith(_ACCUMULATE):
            return _GRADIENTS, "backward"
        if around.name.startswith(_NODE):
            return owners.get(around.sequence_nr, REST), "backward"
        if around.name.startswith(PREFIX):
            return around.name.removeprefix(PREFIX), "forward"
        around = around.cpu_parent
    return None


def _innermost(event: FunctionEvent) -> str | None:
    while event is not None and not event.name.startswith(PREFIX):
        event = event.cpu_parent
    return None if event is None else event.name.removeprefix(PREFIX)


def _in_backward(event: FunctionEvent | None) -> bool:
    while event is not None:
        if event.name.startswith(_NODE):
            return True
        event = event.cpu_parent
    return False
