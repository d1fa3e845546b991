"""Imports point down only: a folder may use those below it and none above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down; those on one line do not import each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"integrations"},
    {"recipes", "profile", "clean"},
    {"train", "eval"},
    {"objectives", "data"},
    {"models"},
    {"layers"},
    {"ops"},
    {"kernels", "_ext"},
    {"regions", "images"},
    {"config", "rules", "ragged"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# For people and tests, above everything: no layer imports them, except the CLI.
FREE = {"env", "testing"}
# `data` feeds any model and knows none.
FORBIDDEN = {"data": {"models", "layers"}}
# An objective knows no loader, but the batch it is given.
ALLOWED = {("objectives", "vlpfast.data.batch")}


def _modules() -> list[tuple[str, Path]]:
    """(part of the library, file) for every module."""
    found = [
        (path.relative_to(ROOT / "vlpfast").parts[0].removesuffix(".py"), path)
        for path in sorted((ROOT / "vlpfast").rglob("*.py"))
    ]
    found += [("kernels", path) for path in sorted((ROOT / "kernels").glob("*.py"))]
    return [(part, path) for part, path in found if part != "__init__"]


def imported(path: Path) -> set[str]:
    """Full names of the vlpfast modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: relative import"
            # `from vlpfast import ops` names the part in the alias.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "vlpfast"}


def _parts(path: Path, importer: str = "") -> set[str]:
    names = {
        name
        for name in imported(path)
        if "." in name and (importer, name.rpartition(".")[0]) not in ALLOWED
    }
    parts = {name.split(".")[1] for name in names}
    return parts & (LEVEL.keys() | FREE)


@pytest.mark.parametrize(
    ("part", "path"),
    [pytest.param(*m, id=str(m[1].relative_to(ROOT))) for m in _modules()],
)
def test_imports_point_down(part, path):
    assert part in LEVEL.keys() | FREE, f"{path}: give {part!r} its place in LAYERS"
    if part in FREE:
        return
    for used in _parts(path, part) - {part}:
        if used in FREE:
            assert part == "cli", f"{path} imports vlpfast.{used}"
            continue
        assert LEVEL[used] > LEVEL[part], f"{path}: {part} imports vlpfast.{used}, not below it"
        assert used not in FORBIDDEN.get(part, ()), f"{path}: {part} imports vlpfast.{used}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_stand_alone(path):
    assert {name for name in imported(path) if not name.startswith("vlpfast.kernels")} == set()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "vlpfast/ops/reference").glob("*.py")), ids=lambda p: p.name
)
def test_references_stand_alone(path):
    outside = {n for n in imported(path) if not n.startswith("vlpfast.ops.reference")}
    assert outside == set()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "csrc").rglob("*.c*")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_cpp_uses_stable_headers_only(path):
    lines = [line.split("#include")[1].strip() for line in path.read_text().splitlines()
             if line.startswith("#include")]  # fmt: skip
    torch_headers = [line for line in lines if line.startswith(("<torch/", "<ATen/", "<c10/"))]
    if path.suffix == ".cu" or "host" in path.parts:
        assert torch_headers == []
    stable = ("<torch/csrc/stable/", "<torch/headeronly/")
    assert [line for line in torch_headers if not line.startswith(stable)] == []


def test_an_upward_import_is_found(tmp_path):
    path = tmp_path / "low.py"
    path.write_text("import vlpfast.ops.keep_ids\ndef f():\n    from vlpfast.train import loop\n")
    assert imported(path) == {"vlpfast.train.loop", "vlpfast.ops.keep_ids"}
    assert _parts(path) == {"train", "ops"}
