"""Every Triton kernel compiles ahead of time for sm_80 and sm_90 within its limits."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from vlpfast.kernels import aot

CASES = [
    pytest.param(stem, case.name, capability, marks=pytest.mark.xdist_group(f"aot-{stem}"))
    for stem in aot.stems()
    for case in aot.cases(stem)
    for capability in case.capabilities
]


@functools.cache
def _reports(stem: str) -> dict[tuple[str, int], dict]:
    # Another process, because this one may interpret kernels, which then cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "vlpfast.kernels.aot", stem, "--json"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode in (0, 1), run.stderr
    return {(r["case"], r["capability"]): r for r in json.loads(run.stdout)}


@pytest.mark.parametrize(("stem", "name", "capability"), CASES)
def test_within_limits(stem, name, capability):
    report = _reports(stem)[name, capability]
    assert report["problems"] == []
    assert report["stack_bytes"] == 0
    assert 0 < report["registers"] <= 255


def test_there_are_cases_with_unique_names():
    names = [(p.values[1], p.values[2]) for p in CASES]
    assert ("keep_ids-P256", 90) in names
    assert len(set(names)) == len(names)


_STRICT = """
from vlpfast.kernels import aot, keep_ids
case = keep_ids.AOT_CASES[0]._replace(max_registers=16, instructions={90: ("HGMMA",)})
report = aot.compile_case(case, 90)
print(report.problems)
"""


def test_the_gate_fails_what_breaks_a_limit():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _STRICT], capture_output=True, text=True, env=environment, check=True
    )
    assert "no HGMMA in the code" in run.stdout
    assert "registers, at most 16 accepted" in run.stdout
