"""Programs that run the same code as compiled for every target that this CPU runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths

_HERE = Path(__file__).parent


def rows_of(name: str, folder: Path) -> list[list[str]]:
    """Words of each line that tests/csrc/NAME.cpp prints, compiled in `folder`."""
    program = folder / name
    includes = [f"-I{path}" for path in (_HERE.parents[1] / "csrc/include", *include_paths())]
    source = _HERE / f"{name}.cpp"
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Werror", *includes, source, "-o", program]
    subprocess.run(command, check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return [line.split() for line in output.splitlines()]
