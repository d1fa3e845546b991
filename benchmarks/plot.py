"""Plots and tables, made from recorded rows and nothing else.

Plots and a full table in results/<machine>/:       python -m benchmarks.plot
A file rewritten between its bench markers:         python -m benchmarks.plot --readme README.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import OWN, RESULTS, Ceiling, Row, latest, load_machine
from benchmarks.shapes import SHAPES, samples_per_s

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

_COLOURS = {
    "reference": "#9aa5b1",
    "cpp": "#2f7ed8",
    "triton": "#e8833a",
    "cuda": "#4aa564",
    "vlpfast": "#2f7ed8",
}
_PEER_COLOUR = "#c9b8d8"
# What benchmarks of whole steps call us, and the headline of our column.
OURS = "vlpfast"


def _groups(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
    """Newest rows of each case, in the order of shapes.py; other revisions (`name@ref`) left
    out."""
    groups: dict[tuple, list[Row]] = {}
    for row in latest(rows):
        if "@" not in row.impl:
            key = (row.op, row.shape, row.dtype, row.direction, row.threads)
            groups.setdefault(key, []).append(row)
    ops = list(SHAPES)

    def place(key: tuple) -> tuple:
        op, shape, *rest = key
        names = list(SHAPES.get(op, ()))
        return (
            ops.index(op) if op in ops else len(ops),
            names.index(shape) if shape in names else len(names),
            *rest,
        )

    return {key: groups[key] for key in sorted(groups, key=place)}


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    speed = "" if row.ratio_p50 is None or row.impl == row.baseline else f" ({row.ratio_p50:.3g}x)"
    rate = samples_per_s(row.op, row.shape, row.ms_p50)
    samples = "" if rate is None else f", {rate:.3g}/s"
    return f"{row.ms_p50:.3g} ms{speed}{samples}"


def table(rows: Sequence[Row], *, headline: bool) -> str:
    """A markdown table: a line per case, a column per implementation; `headline` keeps each op's
    first shape, of its passes "both" where there is one, and our fastest implementation."""
    groups = _groups(rows)
    if headline:
        groups = _headlines(groups)
        own = [OURS]
    else:
        every = [row.impl for group in groups.values() for row in group]
        own = [name for name in OWN if name in every]
    lines = [
        "| op | pass | shape | dtype | baseline | " + " | ".join([*own, "other peers"]) + " |",
        "|" + " --- |" * (6 + len(own)),
    ]
    for (op, shape, dtype, direction, _), group in groups.items():
        by_impl = {row.impl: row for row in group}
        baseline = group[0].baseline
        peers = [row for row in group if row.impl not in OWN and row.impl != baseline]
        cells = [
            f"`{op}`",
            direction,
            shape,
            dtype,
            f"{baseline} {_cell(by_impl.get(baseline))}",
            *([_fastest(group)] if headline else (_cell(by_impl.get(name)) for name in own)),
            ", ".join(f"{row.impl} {_cell(row)}" for row in peers) or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _headlines(groups: dict[tuple, list[Row]]) -> dict[tuple, list[Row]]:
    first: dict[str, str] = {}
    for op, shape, *_ in groups:
        first.setdefault(op, shape)
    whole = {key[:3] for key in groups if key[3] == "both"}
    return {
        key: group
        for key, group in groups.items()
        if first[key[0]] == key[1] and (key[3] == "both" or key[:3] not in whole)
    }


def _fastest(group: Sequence[Row]) -> str:
    ours = [row for row in group if row.impl in OWN and row.impl != group[0].baseline]
    if not ours:
        return "-"
    best = min(ours, key=lambda row: row.ms_p50)
    return f"{'' if best.impl == OURS else best.impl + ' '}{_cell(best)}"


def _conditions(rows: Sequence[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(sorted({str(getattr(row, name)) for row in rows}))

    return (
        f"threads {all_of('threads')}, torch {all_of('torch')}, triton {all_of('triton')}, "
        f"commit {all_of('commit')}, {', '.join(sorted({row.date[:10] for row in rows}))}"
    )


def _machines(results: Path) -> dict[str, tuple[list[Row], list[Ceiling]]]:
    folders = sorted(path for path in results.glob("*") if path.is_dir())
    loaded = {folder.name: load_machine(folder) for folder in folders}
    return {name: both for name, both in loaded.items() if both[0]}


def readme_region(results: Path) -> str:
    """The generated text: one headline table per machine with its conditions."""
    parts = []
    for machine, (rows, _) in _machines(results).items():
        shown = latest(rows)
        parts.append(
            f"**{machine}** ({_conditions(shown)}). Median of one call; in brackets, how "
            f"many times faster than the baseline in the same run.\n\n{table(rows, headline=True)}"
        )
    return "\n\n".join(parts) or "No rows are recorded yet."


def rewrite(text: str, region: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what lies between its bench markers replaced by `region`.

    Raises:
        ValueError: the markers are missing, doubled or in the wrong order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} followed by one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{region}\n{end}{rest.split(end)[1]}"


def _impl_place(row: Row) -> tuple[int, str]:
    return OWN.index(row.impl) if row.impl in OWN else len(OWN), row.impl


def plot_speedup(rows: Sequence[Row], op: str, path: Path) -> None:
    """Bars of each implementation's speed over the baseline, one cluster per case; whiskers from
    20th to 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = {k: g for k, g in _groups(rows).items() if k[0] == op and g[0].ratio_p50 is not None}
    if not groups:
        return
    num_bars = sum(map(len, groups.values()))
    fig, ax = plt.subplots(figsize=(max(6.0, 2.0 + 0.36 * (num_bars + len(groups))), 3.6))
    left, centres = 0.0, []
    for group in groups.values():
        bars = sorted((row for row in group if row.ratio_p50 is not None), key=_impl_place)
        for x, row in enumerate(bars):
            whisker = [[row.ratio_p50 - row.ratio_p20], [row.ratio_p80 - row.ratio_p50]]
            bar = ax.bar(
                left + x,
                row.ratio_p50,
                0.9,
                yerr=whisker,
                color=_COLOURS.get(row.impl, _PEER_COLOUR),
                error_kw={"elinewidth": 0.8, "ecolor": "#444"},
            )
            ax.bar_label(
                bar, [f"{row.impl} {row.ratio_p50:.3g}"], fontsize=7, rotation=90, padding=3
            )
        centres.append(left + (len(bars) - 1) / 2)
        left += len(bars) + 1
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.yaxis.set_minor_formatter("")
    low, high = ax.get_ylim()
    ax.set_ylim(low / 1.2, high * (high / low) ** 0.35)  # room for the labels above the bars
    ax.axhline(1.0, color="#444", linewidth=0.8, linestyle=":")
    ax.set_xticks(centres, [f"{k[1]}\n{k[3]} {k[2]}" for k in groups], fontsize=7)
    one = next(iter(groups.values()))[0]
    ax.set_ylabel(f"times faster than {one.baseline}")
    ax.set_title(f"{op} on {one.machine}", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def plot_roofline(rows: Sequence[Row], ceilings: Sequence[Ceiling], path: Path) -> None:
    """Every row that does floating-point work, under the roofs of the newest measured ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    points = [
        row for row in latest(rows) if row.tflop_per_s and row.gb_per_s and "@" not in row.impl
    ]
    newest = max((ceiling.date for ceiling in ceilings), default="")
    roofs = [ceiling for ceiling in ceilings if ceiling.date == newest]
    if not points or not roofs:
        return
    bandwidth = max(ceiling.rate for ceiling in roofs if ceiling.unit == "GB/s")
    intensity = np.array([row.tflop_per_s * 1e3 / row.gb_per_s for row in points])
    fig, ax = plt.subplots(figsize=(6.4, 4.0))
    x = np.geomspace(min(intensity.min(), 1.0) / 2, max(intensity.max(), 1e3) * 2, 200)
    for roof in roofs:
        if roof.unit == "TFLOP/s":
            (line,) = ax.plot(x, np.minimum(x * bandwidth * 1e-3, roof.rate), linewidth=1)
            ax.annotate(roof.dtype, (x[-1], roof.rate), color=line.get_color(), fontsize=8)
    for row, at in zip(points, intensity, strict=True):
        ax.plot(at, row.tflop_per_s, "o", markersize=4, color=_COLOURS.get(row.impl, _PEER_COLOUR))
        ax.annotate(f"{row.op} {row.impl} {row.direction}", (at, row.tflop_per_s), fontsize=6)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("FLOP per byte, by the op's formula")
    ax.set_ylabel("TFLOP/s")
    ax.set_title(f"{points[0].machine}, {bandwidth:.4g} GB/s", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def write_machine(folder: Path) -> list[Path]:
    """Writes a machine's plots and its full table beside its rows; what was written."""
    rows, ceilings = load_machine(folder)
    for op in sorted({row.op for row in rows}):
        plot_speedup(rows, op, folder / f"{op}.png")
    plot_roofline(rows, ceilings, folder / "roofline.png")
    text = f"# {folder.name}\n\n{_conditions(latest(rows))}\n\n{table(rows, headline=False)}\n"
    (folder / "README.md").write_text(text)
    return sorted([*folder.glob("*.png"), folder / "README.md"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0, or 2 for wrong usage."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"rewrite this file between {BEGIN} and {END}"
    )
    args = p.parse_args(arguments)
    if args.readme:
        try:
            args.readme.write_text(rewrite(args.readme.read_text(), readme_region(args.results)))
        except (OSError, ValueError) as error:
            p.error(f"{args.readme}: {error}")
        return 0
    for machine in _machines(args.results):
        for path in write_machine(args.results / machine):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
