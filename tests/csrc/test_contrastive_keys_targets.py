"""The walk over keys as compiled for older CPUs gives what it gives on this one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
# v4_bf16 rounds g to bf16 for the product with the keys: relative to the largest sum of 401 terms.
BOUNDS = {"base": (0, 0, 0), "v3": (2e-5,) * 3, "v4": (2e-5,) * 3, "v4_bf16": (2e-5, 2e-5, 2e-3)}


@pytest.mark.slow
def test_targets_agree(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    program = tmp_path / "targets"
    includes = [f"-I{path}" for path in (ROOT / "csrc/include", *include_paths())]
    source = Path(__file__).with_name("contrastive_keys_targets.cpp")
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Werror", *includes, source, "-o", program]
    subprocess.run(command, check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in output.splitlines()]
    assert len(rows) >= 2
    for target, *differences in rows:
        pairs = zip(differences, BOUNDS[target], strict=True)
        assert all(float(d) <= bound for d, bound in pairs), (target, differences)
