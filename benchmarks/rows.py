"""Result rows: what one measurement says, and the CSV files it is appended to. Rows are never
edited."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# The library's implementations, and its whole step; every other name is a peer.
OWN = ("reference", "cpp", "triton", "cuda", "vlpfast")


@dataclass(frozen=True)
class Row:
    """One implementation at one shape. A number that was not measured or has no meaning for the op
    is None, an empty cell.

    Attributes:
        op, impl, shape, dtype: what ran; `impl` is `<name>@<ref>` where another revision ran.
        direction: "fwd", "bwd" or "both", or "step" for a whole training step; the column is
            called `pass`.
        ms_p50, ms_p20, ms_p80: quantiles over rounds of the time of one call.
        ratio_p50, ratio_p20, ratio_p80: quantiles over rounds of baseline time / this time, > 1 is
            faster than the baseline.
        baseline: the implementation the ratio compares with, in the same rounds.
        peak_mib: most memory one call held beyond what was held before it, its results included.
        gb_per_s, tflop_per_s: bytes and FLOPs by the op's formula over ms_p50.
        ceiling_pct: roofline time / ms_p50 by the ceilings measured in the same run.
        timer: "cpu" (warm caches), "graph" (CUDA graph, rotated buffers) or "events" (CUDA events,
            launches included).
        machine, threads, torch, triton, commit, date: where, with what, which revision ("-dirty":
            not all of it committed), UTC.
    """

    op: str
    impl: str
    direction: str
    shape: str
    dtype: str
    ms_p50: float
    ms_p20: float
    ms_p80: float
    ratio_p50: float | None
    ratio_p20: float | None
    ratio_p80: float | None
    baseline: str
    peak_mib: float | None
    gb_per_s: float | None
    tflop_per_s: float | None
    ceiling_pct: float | None
    timer: str
    machine: str
    threads: int
    torch: str
    triton: str
    commit: str
    date: str


@dataclass(frozen=True)
class Ceiling:
    """One measured limit of a machine: `kind` "gemm" (TFLOP/s), "copy" or "triad" (GB/s)."""

    kind: str
    dtype: str
    rate: float
    unit: str
    machine: str
    threads: int
    torch: str
    date: str


def _column(name: str) -> str:
    return "pass" if name == "direction" else name


def columns(kind: type) -> list[str]:
    """Header of the CSV that holds rows of this kind."""
    return [_column(field.name) for field in fields(kind)]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def append(path: Path, rows: Iterable[object]) -> None:
    """Appends rows to a CSV, which is created with a header if it is missing.

    Raises:
        ValueError: the file has other columns. Old rows stay as they are: a new schema starts a new
            file.
    """
    rows = list(rows)
    if not rows:
        return
    header = columns(type(rows[0]))
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != header:
            raise ValueError(f"{path} has the columns {found}, expected {header}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(header)
        writer.writerows([_cell(value) for value in asdict(row).values()] for row in rows)


def _parse(kind: type, cells: Mapping[str, str]) -> object:
    values: dict[str, object] = {}
    for field in fields(kind):
        cell = cells[_column(field.name)]
        if "float" in str(field.type):
            values[field.name] = float(cell) if cell else None
        else:
            values[field.name] = int(cell) if field.type == "int" else cell
    return kind(**values)


def load(path: Path, kind: type) -> list:
    """All rows of a CSV, oldest first."""
    with path.open(newline="") as file:
        return [_parse(kind, cells) for cells in csv.DictReader(file)]


def load_machine(folder: Path) -> tuple[list[Row], list[Ceiling]]:
    """Rows of every op and the ceilings recorded for one machine."""
    rows = [
        row
        for path in sorted(folder.glob("*.csv"))
        if path.name != "ceilings.csv"
        for row in load(path, Row)
    ]
    ceilings = folder / "ceilings.csv"
    return rows, load(ceilings, Ceiling) if ceilings.exists() else []


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest run of each (op, pass, shape, dtype, threads), whole: rows of different runs are
    never compared."""
    rows = list(rows)
    newest: dict[tuple, str] = {}
    for row in rows:
        newest[_group(row)] = max(newest.get(_group(row), ""), row.date)
    return [row for row in rows if row.date == newest[_group(row)]]


def _group(row: Row) -> tuple:
    return row.op, row.direction, row.shape, row.dtype, row.machine, row.threads
