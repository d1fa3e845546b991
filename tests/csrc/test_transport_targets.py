"""The engine of optimal transport as compiled for older CPUs gives what it gives on this one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_targets_agree(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    program = tmp_path / "targets"
    includes = [f"-I{path}" for path in (ROOT / "csrc/include", *include_paths())]
    source = Path(__file__).with_name("transport_targets.cpp")
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Werror", *includes, source, "-o", program]
    subprocess.run(command, check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in output.splitlines()]
    assert len(rows) >= 5
    assert len(rows) % 5 == 0
    for target, case, *differences in rows:
        bound = 0 if target == "base" else 2e-5
        assert all(float(d) <= bound for d in differences), (target, case, differences)
