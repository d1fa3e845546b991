"""What it costs to choose an implementation, and to call a registered op.

Not part of the default test run. `pytest benchmarks/micro` fails where a path costs 1.5 times its
stored baseline; with `--store-baseline`, after a change that is meant, it stores a new one.
The unit is one plain Python call that does nothing much, timed in the same test by the same loop.
"""

from __future__ import annotations

import importlib
import timeit

import pytest
import torch

from vlpfast.ops._dispatch import Implementation, Op

_SLACK = 1.5
_CPU = torch.device("cpu")


def _run(x: object) -> object:
    return x


def _missing() -> str:
    return "not built"


_OP = Op(
    "guard",
    {
        "cuda": Implementation(_run, _missing),
        "cpp": Implementation(_run),
        "reference": Implementation(_run),
    },
    auto={"cpu": ("cuda", "cpp", "reference")},
)


def _plain(x: object, *, y: object) -> object:
    return (x, y)


def _plain_call_s() -> float:
    """Best of many short loops: the least disturbed one."""
    return min(timeit.repeat(lambda: _plain(1, y=2), number=2000, repeat=50)) / 2000


def _guard(benchmark, baseline, name: str, call) -> None:
    unit = _plain_call_s()
    benchmark(call)
    unit = min(unit, _plain_call_s())
    baseline.check(name, benchmark.stats.stats.min / unit, _SLACK)


@pytest.mark.parametrize("impl", ["auto", "cpp"])
def test_choose(benchmark, baseline, impl: str) -> None:
    _guard(benchmark, baseline, f"choose-{impl}", lambda: _OP.choose(impl, _CPU))


def test_keep_ids_one_sample(benchmark, baseline) -> None:
    """The whole public call at a size whose kernel takes next to nothing: checks, dispatch,
    dispatcher."""
    module = importlib.import_module("vlpfast.ops.keep_ids")
    ids, seed = torch.zeros(1, dtype=torch.int64), torch.tensor(0)
    if module._OP.reason("cpp", _CPU, num_patches=2) is not None:
        pytest.skip("the C++ module is not built")
    _guard(
        benchmark,
        baseline,
        "keep_ids-B1-P2",
        lambda: module.keep_ids(1, 2, 1, seed=seed, sample_ids=ids, impl="cpp"),
    )
