"""What an evaluation returns, and how it is shown beside chance: table, JSON, bar chart."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

# A metric under one of these prefixes is another way to score the one without it.
VARIANTS = {
    "": "itc",
    "itm_": "itm",
    "shuffled_": "shuffled image",
    "class_head_": "class head",
    "random_": "random weights",
    "other_caption_": "other caption",
}
_FIRST_HEADING = {
    **dict.fromkeys(
        ("mlm", "align", "caption", "vqa", "entailment", "box", "classify"), "true image"
    ),
    "nlvr": "true images",
    "image": "true caption",
    "codes": "trained",
    "mim": "hidden patches",
    "linear": "trained",
}
_NOT_PERCENT = ("medr", "meanr", "rsum")


@dataclass(frozen=True)
class EvalResult:
    """The result of one task.

    Attributes:
        task: its name.
        metrics: by name. Accuracies and recalls are percent, ranks count from 1.
        chance: the level of a model that knows nothing, by the name of the metric.
        counts: what was evaluated, `num_*`.
        intervals: 95 % interval of a metric, percent.
        info: where model and data came from.
        answers: what was said to each question, as servers of test sets want it: `question_id` and
            `answer`; not in the JSON.
    """

    task: str
    metrics: dict[str, float]
    chance: dict[str, float]
    counts: dict[str, int]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    info: dict[str, str | int | float] = field(default_factory=dict)
    answers: list[dict[str, str | int]] = field(default_factory=list)

    def variants(self) -> dict[str, str]:
        """Prefixes of `VARIANTS` that the metrics have, and their headings."""
        headings = VARIANTS | {"": _FIRST_HEADING.get(self.task, VARIANTS[""])}
        return {
            p: h for p, h in headings.items() if any(p + n in self.metrics for n in self.chance)
        }

    def table(self) -> str:
        """A line a metric: its value under each way of scoring, and chance."""
        counts = ", ".join(f"{v} {n.removeprefix('num_')}" for n, v in self.counts.items())
        variants = self.variants()
        rows = [[f"{self.task} ({counts})", *variants.values(), "chance"]]
        for name, chance in self.chance.items():
            rows.append([name, *(self._cell(p + name) for p in variants), f"{chance:.2f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines += [f"{name}: {value}" for name, value in self.info.items()]
        return "\n".join(lines)

    def _cell(self, name: str) -> str:
        if name not in self.metrics:
            return ""
        low, high = self.intervals.get(name, (None, None))
        interval = f" [{low:.1f}, {high:.1f}]" if low is not None else ""
        return f"{self.metrics[name]:.2f}{interval}"

    def to_json(self) -> str:
        """One JSON object; `from_json` reads it back."""
        values = asdict(self)
        del values["answers"]
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> EvalResult:
        """The result that `to_json` wrote."""
        values = json.loads(text)
        values["intervals"] = {n: tuple(v) for n, v in values["intervals"].items()}
        return cls(**values)


def save_bars(result: EvalResult, path: Path) -> None:
    """Writes a PNG: a bar for each percentage and way of scoring, black lines at chance."""
    from matplotlib.figure import Figure

    names = [n for n in result.chance if not n.endswith(_NOT_PERCENT)]
    variants = result.variants()
    width = 0.8 / len(variants)
    figure = Figure(figsize=(1.5 + 0.8 * len(names), 4), layout="constrained")
    axes = figure.add_subplot()
    for place, (prefix, heading) in enumerate(variants.items()):
        shown = [(i, result.metrics[prefix + n]) for i, n in enumerate(names)]
        x = [i - 0.4 + (place + 0.5) * width for i, _ in shown]
        axes.bar(x, [value for _, value in shown], 0.95 * width, label=heading)
    chance = [result.chance[n] for n in names]
    left, right = ([i + side for i in range(len(names))] for side in (-0.45, 0.45))
    axes.hlines(chance, left, right, color="black", linewidth=2, label="chance")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("percent")
    axes.set_title(result.task)
    axes.legend()
    figure.savefig(path, dpi=120)
