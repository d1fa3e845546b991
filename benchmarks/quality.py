"""Rows of what trained runs reach, from the evaluations in their run folders.

Appends rows:    python -m benchmarks.quality RUN [RUN ...] [--machine NAME]
Makes tables:    python -m benchmarks.quality --readme README.md --others docs/runs.md \
                     --presets docs/presets.md --downstream docs/downstream.md \
                     --cleaning docs/cleaning.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.plot import rewrite
from benchmarks.rows import RESULTS, append, load

BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
# In its machine's folder, apart from the rows of ops.
FILE = "quality/runs.csv"
_HEADLINE = {
    "retrieval": ("txt_r1", "txt_r10", "img_r1", "img_r10"),
    "mlm": ("mlm_accuracy", "shuffled_mlm_accuracy"),
    "swap": ("swap_accuracy", "itm_swap_accuracy"),
    "noise": ("noise_auc", "kept_clean"),
    "caption": ("exact_match", "next_token_accuracy", "shuffled_next_token_accuracy"),
}
# The row of an evaluation that says how long its training kept a core busy, all threads together.
CORE_MINUTES = "core_minutes"
# By which metric a task is seen to work, and the same with another image or random weights; where
# there is none, chance is the control.
_WORKS = {
    "retrieval": ("img_r10", ""),
    "mlm": ("mlm_accuracy", "shuffled_mlm_accuracy"),
    "caption": ("next_token_accuracy", "shuffled_next_token_accuracy"),
    "vqa": ("vqa_accuracy", "shuffled_vqa_accuracy"),
    "entailment": ("entailment_accuracy", "shuffled_entailment_accuracy"),
    "nlvr": ("nlvr_accuracy", "shuffled_nlvr_accuracy"),
    "box": ("box_accuracy", "shuffled_box_accuracy"),
    "image": ("code_accuracy", "other_caption_code_accuracy"),
    "classify": ("accuracy", ""),
    "codes": ("codebook_use", ""),
    "mim": ("mim_accuracy", "shuffled_mim_accuracy"),
    "linear": ("linear_auc", "random_linear_auc"),
}
# What runs are fine-tuned for: docs/downstream.md has a line for each of these, of all systems.
_DOWNSTREAM = ("vqa", "entailment", "nlvr")
# Tables with a line for each evaluation: README.md has these runs, docs/runs.md all others of these
# systems; docs/presets.md has a line for each task of the other systems.
_MAIN = ("albef_scenes", "albef_scenes_long", "albef_scenes_swaps", "clip_emoji")
_SYSTEMS = ("albef", "clip")
# In docs/cleaning.md alone: runs on noisy data, on what filters kept of it, and the filters.
_CLEANING = (
    *("flip_noisy", "flip_kept"),
    *("flip_web", "flip_capfilt", "flip_filtered"),
    *("albef_filter", "blip_captioner"),
)


@dataclass(frozen=True)
class QualityRow:
    """One metric of one evaluation of one run.

    Attributes:
        run, preset: name of the run and of its model's preset.
        task, data, where, protocol: what was evaluated; `data` is folder/file, `protocol` the
            options that change numbers (rerank_k, pool_texts, captions).
        metric, value, chance: recalls and accuracies in percent; beside them `CORE_MINUTES`.
        samples_seen, minutes, threads: training until these weights, on this many CPU threads;
            minutes passed, other programs' turns and pauses included.
        num_images, num_texts: candidates.
        machine, torch, commit, date: where, with what, which revision, when it was recorded (UTC).
    """

    run: str
    preset: str
    task: str
    data: str
    where: str
    protocol: str
    metric: str
    value: float
    chance: float | None
    samples_seen: int
    minutes: float
    threads: int
    num_images: int
    num_texts: int
    machine: str
    torch: str
    commit: str
    date: str


def _training(run: Path, step: int) -> tuple[int, float, float]:
    """Samples seen, and minutes and core-minutes (0 where none are logged) spent in steps until
    `step`.
    """
    samples, seconds, busy, last = 0, 0.0, 0.0, 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["step"] > step:
            break
        seconds += row["step_s"] * (row["step"] - last)
        busy += row.get("cpu_s", 0.0) * (row["step"] - last)
        samples, last = row["samples_seen"], row["step"]
    return samples, seconds / 60, busy / 60


def rows_of(run: Path, machine_name: str | None = None) -> list[QualityRow]:
    """Rows of every evaluation in `RUN/eval`; of repeated ones the last.

    Raises:
        FileNotFoundError: the run has no evaluation or no configuration.
    """
    config = json.loads((run / "config.json").read_text())
    paths = sorted((run / "eval").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise FileNotFoundError(f"{run}/eval has no evaluation; make one by `vlpfast eval {run}`")
    stamp = machine.stamp(torch.device("cpu"), machine_name)
    found: dict[tuple, QualityRow] = {}
    for path in paths:
        result = json.loads(path.read_text())
        info, counts = result["info"], result["counts"]
        stem = Path(info["weights"]).stem
        step = int(stem.removeprefix("step_")) if stem.startswith("step_") else 2**62
        samples, minutes, core_minutes = _training(run, step)
        protocol = {
            name: info[name] for name in ("rerank_k", "pool_texts", "captions") if name in info
        }
        data = Path(info["data"])
        busy = {CORE_MINUTES: core_minutes} if core_minutes else {}
        for metric, value in (result["metrics"] | busy).items():
            row = QualityRow(
                run=config["name"],
                preset=f"{config['model']['preset']} {config['model']['size']}",
                task=result["task"],
                data=f"{data.parent.name}/{data.name}",
                where=info.get("where", ""),
                protocol=" ".join(f"{name}={value}" for name, value in protocol.items()),
                metric=metric,
                value=float(value),
                chance=result["chance"].get(metric),
                samples_seen=samples,
                minutes=minutes,
                threads=config["train"]["threads"] or torch.get_num_threads(),
                num_images=counts.get("num_images", 0),
                num_texts=counts.get("num_texts", 0),
                machine=stamp.machine,
                torch=stamp.torch,
                commit=stamp.commit,
                date=stamp.date,
            )
            found[row.task, row.data, row.where, row.protocol, row.metric] = row
    return list(found.values())


def _is_listed(row: QualityRow) -> bool:
    """Whether a row is of one of the systems whose evaluations stand one by one."""
    return row.preset.split()[0] in _SYSTEMS


def _newest(rows: Iterable[QualityRow]) -> dict[tuple, dict[str, QualityRow]]:
    """(task, run, data, where, protocol) -> its last evaluation's rows by metric."""
    newest: dict[tuple, dict[str, QualityRow]] = {}
    for row in sorted(rows, key=lambda row: row.date):
        key = (row.task, row.run, row.data, row.where, row.protocol)
        newest.setdefault(key, {})[row.metric] = row
    return newest


def works(rows: Iterable[QualityRow]) -> str:
    """One markdown table, a line for each system and task: metric, control, chance, and what the
    metric has over the greater of both.
    """
    lines = [
        "| preset | recipe, training | task: metric | value | control | chance | margin |",
        "|" + "---|" * 7,
    ]
    cases = ((run, task, found) for (task, run, *_), found in _newest(rows).items())
    for run, task, found in sorted(cases, key=lambda case: case[:2]):
        metric, other = _WORKS[task]
        row, control = found[metric], found.get(other)
        floor = max(r for r in (control and control.value, row.chance) if r is not None)
        cells = [
            row.preset.split()[0],
            f"`{run}`, {_time(found)}",
            f"{task}: {metric}",
            f"{row.value:.1f}",
            f"{control.value:.1f}" if control else "",
            "" if row.chance is None else f"{row.chance:.1f}",
            f"{row.value - floor:+.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(rows: Iterable[QualityRow]) -> str:
    """One markdown table a task: the newest rows of each run and data set."""
    newest = _newest(rows)
    parts = []
    for task, headline in _HEADLINE.items():
        cases = {key: found for key, found in newest.items() if key[0] == task}
        if not cases:
            continue
        names = [m for m in headline if any(m in found for found in cases.values())]
        matched = [f"itm_{m}" for m in names if any(f"itm_{m}" in f for f in cases.values())]
        names += [m for m in matched if m not in names]
        lines = [
            f"| {task}: run | model | training | data | {' | '.join(names)} |",
            "|" + "---|" * (4 + len(names)),
        ]
        for (_, run, data, where, protocol), found in cases.items():
            some = next(iter(found.values()))
            what = " ".join(filter(None, (data, where, protocol)))
            cells = [_cell(found.get(name)) for name in names]
            lines.append(
                f"| {run} | {some.preset} | {_time(found)} | {what} | {' | '.join(cells)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _time(found: dict[str, QualityRow]) -> str:
    """How long a run was trained."""
    some = next(iter(found.values()))
    time = f"{some.minutes:.0f} min, {some.threads} thread{'s' if some.threads > 1 else ''}"
    if CORE_MINUTES in found:
        time = f"{found[CORE_MINUTES].value:.1f} core-minutes"
    return f"{some.samples_seen / 1000:.0f} k samples, {time}"


def _cell(row: QualityRow | None) -> str:
    if row is None:
        return ""
    return f"{row.value:.1f}" + ("" if row.chance is None else f" ({row.chance:.1f})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Records runs or rewrites a file's tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--machine", help="name of this machine in the rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"rewrite {', '.join(_MAIN)} from {BEGIN} on"
    )
    parser.add_argument(
        "--others", type=Path, metavar="FILE", help=f"rewrite other runs of {', '.join(_SYSTEMS)}"
    )
    parser.add_argument("--presets", type=Path, metavar="FILE", help="rewrite the other systems")
    parser.add_argument(
        "--downstream", type=Path, metavar="FILE", help=f"rewrite {', '.join(_DOWNSTREAM)}"
    )
    parser.add_argument("--cleaning", type=Path, metavar="FILE", help="rewrite runs of cleaning")
    options = parser.parse_args(arguments)
    for run in options.runs:
        rows = rows_of(run, options.machine)
        path = options.results / rows[0].machine / FILE
        append(path, rows)
        print(f"{len(rows)} rows of {run.name} -> {path}")
    paths = sorted(options.results.glob(f"*/{FILE}"))
    every = [row for path in paths for row in load(path, QualityRow)]
    cleaning = [row for row in every if row.run in _CLEANING]
    others = [row for row in every if row.run not in _CLEANING]
    listed = [row for row in others if _is_listed(row)]
    shown = {
        options.readme: tables(row for row in listed if row.run in _MAIN),
        options.others: tables(row for row in listed if row.run not in _MAIN),
        options.presets: works(row for row in others if not _is_listed(row)),
        options.downstream: works(row for row in others if row.task in _DOWNSTREAM),
        options.cleaning: tables(cleaning),
    }
    for file, text in shown.items():
        if file is not None:
            file.write_text(rewrite(file.read_text(), text, BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
