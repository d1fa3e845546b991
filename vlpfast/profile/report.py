"""What a profile says: tables, JSON, and the parts as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_SHOWN_OPERATORS = 12
# Of a step, for a part to be shown by itself.
_LEAST_SHARE = 0.005


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: a module's path ("fusion.blocks.cross"; a tower's blocks are one), "losses" (the
            forward outside of modules), "data", "prepare", "optimizer", "gradients" (their being
            added up) or "rest".
        forward_ms, backward_ms: of one step, without what parts inside it took.
    """

    name: str
    forward_ms: float
    backward_ms: float

    @property
    def total_ms(self) -> float:
        """Both directions."""
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class Operator:
    """An operator in a step.

    Attributes:
        name: torch's name of it, or the autograd node's.
        calls: of one step.
        self_ms: of one step, without what operators inside it took.
        gflop: of one step, for the matrix products and convolutions that torch knows.
    """

    name: str
    calls: float
    self_ms: float
    gflop: float


@dataclass(frozen=True)
class StepProfile:
    """One training step, measured.

    Attributes:
        step_ms: median of the steps without a profiler, data included.
        data_ms: what of it was waited for data.
        samples: of a step, all processes together.
        peak_mib: most memory that the step held beyond what it found; on a CPU that of torch's
            allocator.
        product_tflop_per_s: rate of one large matrix product in the run's precision, measured here.
        parts, operators: the longest first.
        info: recipe, device, precision, threads.
    """

    step_ms: float
    data_ms: float
    samples: int
    peak_mib: float
    product_tflop_per_s: float
    parts: Sequence[Part]
    operators: Sequence[Operator]
    info: dict[str, str | int] = field(default_factory=dict)

    @property
    def samples_per_s(self) -> float:
        """Throughput."""
        return 1e3 * self.samples / self.step_ms

    @property
    def product_share(self) -> float:
        """Share of a step in which torch's matrix products and convolutions ran, with the profiler
        on. Products inside of our own operators (attention, patches on a CPU) are not among them.
        """
        total = sum(p.total_ms for p in self.parts)
        return sum(o.self_ms for o in self.operators if o.gflop) / total if total else 0.0

    @property
    def product_rate(self) -> float:
        """TFLOP/s of those products while they ran."""
        ms = sum(o.self_ms for o in self.operators if o.gflop)
        return sum(o.gflop for o in self.operators) / ms if ms else 0.0

    def table(self) -> str:
        """For the terminal."""
        total = sum(p.total_ms for p in self.parts)

        def share(ms: float) -> str:
            return f"{100 * ms / total:.1f}"

        large = self.product_rate / self.product_tflop_per_s
        lines = [
            f"{self.step_ms:.1f} ms a step, {self.samples_per_s:.1f} samples/s; waited for data "
            f"{self.data_ms:.1f} ms; peak {self.peak_mib:.0f} MiB beyond weights and state",
            f"torch's products: {self.product_share:.0%} of the step at {self.product_rate:.3g} "
            f"TFLOP/s, {large:.0%} of one large product ({self.product_tflop_per_s:.3g})",
            "",
        ]
        shown = [p for p in self.parts if p.total_ms >= _LEAST_SHARE * total]
        small = [p for p in self.parts if p.total_ms < _LEAST_SHARE * total]
        if small:
            sums = sum(p.forward_ms for p in small), sum(p.backward_ms for p in small)
            shown.append(Part(f"{len(small)} smaller ones", *sums))
        rows = [
            (
                p.name,
                f"{p.forward_ms:.2f}",
                f"{p.backward_ms:.2f}",
                f"{100 * p.total_ms / total:.1f}",
            )
            for p in shown
        ]
        lines += _columns(("part", "forward ms", "backward ms", "%"), rows)
        rows = [
            (o.name, f"{o.calls:g}", f"{o.self_ms:.2f}", share(o.self_ms))
            for o in self.operators[:_SHOWN_OPERATORS]
        ]
        lines += ["", *_columns(("operator", "calls", "own ms", "%"), rows)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it, indented."""
        derived = {
            "samples_per_s": self.samples_per_s,
            "product_share": self.product_share,
            "product_rate": self.product_rate,
        }
        return json.dumps(asdict(self) | derived, indent=2)


def plot_parts(profile: StepProfile, out: Path, title: str) -> None:
    """Draws the parts as bars, forward and backward, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    least = _LEAST_SHARE * sum(p.total_ms for p in profile.parts)
    shown = [p for p in profile.parts if p.total_ms >= least][::-1]
    names = [p.name for p in shown]
    forward = [p.forward_ms for p in shown]
    figure = Figure(figsize=(8.5, 1.2 + 0.28 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(names, forward, color="tab:blue", label="forward")
    axes.barh(
        names, [p.backward_ms for p in shown], left=forward, color="tab:orange", label="backward"
    )
    axes.set_xlabel("ms of a step, under the profiler")
    axes.legend(loc="lower right", frameon=False)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}: {profile.samples_per_s:.1f} samples/s", fontsize=11)
    figure.savefig(out, dpi=110, format="png")


def _columns(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (heading, *rows)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
