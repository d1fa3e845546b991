"""The benchmark harness on fakes whose cost is known. No assertion depends on how fast this machine
is."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import harness, plot, rows, run, shapes, timing
from benchmarks.machine import Ceilings, Stamp, slug

STAMP = Stamp("fake-1c", 1, "2.13.0", "3.6.0", "abc1234", "2026-01-01T00:00:00Z")
CPU = torch.device("cpu")


class FakeTimer:
    """Costs `ms`, and ten times that in every third round, as when the machine is disturbed."""

    kind = "cpu"
    peak_bytes = 3 * 2**20

    def __init__(self, ms: float) -> None:
        self._ms, self._rounds = ms, 0

    def sample(self) -> float:
        self._rounds += 1
        return self._ms * (10.0 if self._rounds % 3 == 0 else 1.0)


def fake_bench(**changes: object) -> SimpleNamespace:
    def slow(inputs):
        return (inputs["x"] * 2.0).sum(-1) + 0.0

    def fast(inputs):
        return (inputs["x"] * 2.0).sum(-1)

    def missing(inputs):
        raise NotImplementedError("no such device")

    bench = SimpleNamespace(
        OP="keep_ids",
        SHAPES=shapes.SHAPES["keep_ids"],
        DTYPES=("fp32",),
        DIRECTIONS=("fwd", "bwd", "both"),
        BASELINE="slow",
        setup=lambda shape, dtype, device: {
            "x": torch.randn(4, 8, dtype=dtype, requires_grad=True)
        },
        impls=lambda device: {"slow": slow, "cpp": fast, "missing": missing},
        bytes=lambda shape, dtype, direction: 10**6,
        flops=lambda shape, direction: 4 * 10**9,
    )
    bench.__dict__.update(changes)
    return bench


def fake_row(**changes: object) -> rows.Row:
    values = {
        "op": "keep_ids",
        "impl": "cpp",
        "direction": "fwd",
        "shape": "flip-b16-b256-keep98",
        "dtype": "int64",
        "ms_p50": 1.0,
        "ms_p20": 0.9,
        "ms_p80": 1.2,
        "ratio_p50": 4.0,
        "ratio_p20": 3.5,
        "ratio_p80": 4.5,
        "baseline": "mae",
        "peak_mib": 2.0,
        "gb_per_s": 10.0,
        "tflop_per_s": None,
        "ceiling_pct": 50.0,
        "timer": "cpu",
        **vars(STAMP),
    }
    return rows.Row(**{**values, **changes})


# A machine's small CSV: our implementation, the baseline, a peer, and one case with arithmetic for
# the roofline.
SMALL = [
    fake_row(),
    fake_row(impl="mae", ms_p50=4.0, ratio_p50=1.0, ratio_p20=1.0, ratio_p80=1.0),
    fake_row(impl="timm", ms_p50=2.0, ratio_p50=2.0, ratio_p20=1.9, ratio_p80=2.1),
    fake_row(impl="cpp@main", ms_p50=1.5, ratio_p50=2.7),
    fake_row(shape="flip-l14-b1024-keep64", ms_p50=7.0),
    fake_row(
        op="bias_gelu", shape="vit-b16-b256", dtype="fp32", impl="reference", tflop_per_s=0.01
    ),
]
CEILINGS = [
    rows.Ceiling("gemm", "fp32", 0.1, "TFLOP/s", "fake-1c", 1, "2.13.0", "2026-01-01T00:00:00Z"),
    rows.Ceiling("copy", "fp32", 20.0, "GB/s", "fake-1c", 1, "2.13.0", "2026-01-01T00:00:00Z"),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows.append(tmp_path / "fake-1c" / "keep_ids.csv", SMALL[:5])
    rows.append(tmp_path / "fake-1c" / "bias_gelu.csv", SMALL[5:])
    rows.append(tmp_path / "fake-1c" / "ceilings.csv", CEILINGS)
    return tmp_path


def test_columns_hold_what_a_row_must_say():
    required = (
        "op impl pass shape dtype ms_p50 ms_p20 ms_p80 ratio_p50 ratio_p20 ratio_p80 baseline "
        "peak_mib gb_per_s tflop_per_s ceiling_pct machine threads torch triton commit date"
    )
    assert set(required.split()) <= set(rows.columns(rows.Row))


def test_rows_round_trip_and_old_ones_stay(tmp_path: Path):
    path = tmp_path / "m" / "keep_ids.csv"
    rows.append(path, SMALL[:2])
    before = path.read_bytes()
    rows.append(path, [fake_row(ms_p50=0.123456789)])
    assert path.read_bytes().startswith(before)
    read = rows.load(path, rows.Row)
    assert read[:2] == SMALL[:2]
    assert read[2].ms_p50 == 0.12346
    assert read[2].tflop_per_s is None
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == rows.columns(rows.Row)


def test_file_of_another_schema_is_refused(tmp_path: Path):
    path = tmp_path / "keep_ids.csv"
    path.write_text("op,impl\nkeep_ids,cpp\n")
    with pytest.raises(ValueError, match=r"has the columns \['op', 'impl'\]"):
        rows.append(path, [fake_row()])
    assert path.read_text() == "op,impl\nkeep_ids,cpp\n"


def test_latest_keeps_whole_runs():
    old = [fake_row(impl=name) for name in ("cpp", "mae")]
    new = [replace(old[0], date="2026-01-02T00:00:00Z", ms_p50=0.5)]
    other_threads = [fake_row(threads=2)]
    assert rows.latest(old + new + other_threads) == new + other_threads


def test_ratios_pair_within_a_round():
    # The machine slows down tenfold in the middle: medians over time would mix rounds, pairs do
    # not.
    slow, fast = [2.0, 20.0, 40.0, 2.0], [1.0, 10.0, 10.0, 1.0]
    assert timing.ratios(slow, fast) == [2.0, 2.0, 4.0, 2.0]
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


def test_interleave_takes_turns_in_a_rotating_order():
    order: list[str] = []

    def timer(name: str) -> SimpleNamespace:
        return SimpleNamespace(sample=lambda: order.append(name) or float(len(order)))

    samples = timing.interleave({name: timer(name) for name in "abc"}, rounds=4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert samples["a"] == [1.0, 6.0, 8.0, 10.0]


def test_interleave_stops_slow_calls_after_the_fewest_rounds(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def sample() -> float:
        clock[0] += 1.0
        return 1000.0

    timers = {"a": SimpleNamespace(sample=sample)}
    assert len(timing.interleave(timers, rounds=51, seconds=3.0)["a"]) == timing.MIN_ROUNDS
    assert len(timing.interleave(timers, rounds=51, seconds=20.0)["a"]) == 21
    assert len(timing.interleave(timers, rounds=5, seconds=3.0)["a"]) == 5


def test_cpu_timer_measures_one_call(monkeypatch: pytest.MonkeyPatch):
    clock = [0]
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: clock[0])

    def call() -> None:
        clock[0] += 250_000

    timer = timing.CpuTimer([call])
    before = clock[0]
    assert timer.sample() == 0.25
    assert clock[0] - before == 8 * 250_000  # as many calls as fill 2 ms


def test_peak_counts_what_lives_at_once():
    def call() -> torch.Tensor:
        first = torch.ones(1 << 18)  # 1 MiB
        second = first + 1.0
        del first
        return second.double()  # second (1 MiB) and result (2 MiB) at once

    assert timing.peak_bytes(call, CPU) == pytest.approx(3 * 2**20, rel=0.01)


@pytest.mark.parametrize(
    ("num_bytes", "num_flops", "dtype", "floor_ms"),
    [
        (4e9, 0, "int64", 40.0),  # memory alone: 4 GB at 100 GB/s
        (4e9, 2e12, "fp32", 1000.0),  # arithmetic binds: 2 TFLOP at 2 TFLOP/s
        (4e9, 2e9, "fp32", 40.0),  # memory binds
        (4e9, 1, "fp8", None),  # no ceiling measured for the dtype
    ],
)
def test_roofline_floor(num_bytes, num_flops, dtype, floor_ms):
    floor = Ceilings(100.0, {"fp32": 2.0}).floor_ms(num_bytes, num_flops, dtype)
    assert floor == (None if floor_ms is None else pytest.approx(floor_ms))


def test_measure_gives_known_ratios_and_rates():
    bench = fake_bench()
    case = harness.Case("keep_ids", "flip-b16-b256-keep98", "fp32", "fwd", "cpu")

    def broken(case):
        raise RuntimeError("peer fell over")

    def absent(case):
        raise NotImplementedError("not built")

    prepares = {
        "slow": lambda case: FakeTimer(8.0),
        "cpp": lambda case: FakeTimer(2.0),
        "broken": broken,
        "cuda": absent,
    }
    ceilings = Ceilings(1.0, {"fp32": 4.0})
    outcome = harness.measure(bench, case, prepares, "slow", STAMP, ceilings, harness.QUICK)
    assert outcome.failed == {"broken": "RuntimeError: peer fell over"}
    slow, cpp = outcome.rows
    assert (slow.impl, slow.ratio_p50) == ("slow", 1.0)
    assert (cpp.impl, cpp.ratio_p50, cpp.ratio_p20, cpp.ratio_p80) == ("cpp", 4.0, 4.0, 4.0)
    assert cpp.peak_mib == 3.0
    assert cpp.gb_per_s == pytest.approx(0.5)  # 1 MB in 2 ms
    assert cpp.tflop_per_s == pytest.approx(2.0)  # 4 GFLOP in 2 ms
    assert cpp.ceiling_pct == pytest.approx(50.0)  # of 4 TFLOP/s and 1 GB/s: both floors are 1 ms
    assert (cpp.machine, cpp.commit) == ("fake-1c", "abc1234")


def test_baseline_that_does_not_run_leaves_ratios_empty():
    case = harness.Case("keep_ids", "flip-b16-b256-keep98", "fp32", "fwd", "cpu")
    prepares = {"cpp": lambda case: FakeTimer(2.0)}
    outcome = harness.measure(fake_bench(), case, prepares, "slow", STAMP, None, harness.QUICK)
    assert outcome.rows[0].ratio_p50 is None
    assert outcome.rows[0].ceiling_pct is None


def test_directions_do_what_they_say():
    x = torch.randn(3, requires_grad=True)
    forwards = []

    def square(inputs):
        forwards.append(1)
        return inputs["x"] ** 2, "not a tensor"

    assert torch.equal(harness.directed(square, {"x": x}, "fwd")()[0], x**2)
    backward = harness.directed(square, {"x": x}, "bwd")
    forwards.clear()
    first, again = backward()[0], backward()[0]
    assert not forwards
    assert torch.equal(first, again)
    both = harness.directed(square, {"x": x}, "both")
    forwards.clear()
    assert both()[0].shape == x.shape
    assert len(forwards) == 1
    with pytest.raises(ValueError, match="needs inputs and results with gradients"):
        harness.directed(square, {"x": x.detach()}, "bwd")


def _install(monkeypatch: pytest.MonkeyPatch, bench: SimpleNamespace) -> None:
    module = ModuleType("benchmarks.ops.bench_keep_ids")
    module.__dict__.update(vars(bench))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        run, "measure_ceilings", lambda *a, **k: (Ceilings(1.0, {"fp32": 1.0}), CEILINGS)
    )
    monkeypatch.setattr(harness, "FULL", harness.Budget(rounds=3))
    monkeypatch.setattr(timing, "_MIN_SAMPLE_MS", 0.01)


_RECORD = [
    "keep_ids",
    "--record",
    "--shape",
    "flip-b16-b256-keep98",
    "--machine",
    "fake-1c",
    "--threads",
    "1",
]


def test_red_tests_record_nothing(monkeypatch, tmp_path, capsys):
    calls: list[str] = []
    _install(monkeypatch, fake_bench(setup=lambda *a: calls.append("measured")))
    code = run.main([*_RECORD, "--results", str(tmp_path)], gate=lambda op: "1 failed, 3 passed")
    assert code == 1
    assert not calls
    assert list(tmp_path.iterdir()) == []
    assert "keep_ids: not measured, its tests are not green: 1 failed" in capsys.readouterr().err


def test_green_tests_record_every_direction(monkeypatch, tmp_path):
    _install(monkeypatch, fake_bench())
    code = run.main([*_RECORD, "--results", str(tmp_path)], gate=lambda op: None)
    assert code == 0
    recorded, ceilings = rows.load_machine(tmp_path / "fake-1c")
    assert [(r.direction, r.impl) for r in recorded] == [
        (direction, impl) for direction in ("fwd", "bwd", "both") for impl in ("slow", "cpp")
    ]
    assert all(r.ratio_p50 == 1.0 for r in recorded if r.impl == "slow")
    assert all(r.ms_p20 <= r.ms_p50 <= r.ms_p80 for r in recorded)
    assert ceilings == CEILINGS


@pytest.mark.parametrize(
    ("returncode", "output", "reason"),
    [
        (0, "....\n4 passed in 0.1s", None),
        (0, "..s.\n3 passed, 1 skipped in 0.1s", None),
        (1, "..F.\n1 failed, 3 passed in 0.1s", "1 failed, 3 passed in 0.1s"),
        (0, "ss\n2 skipped in 0.1s", "2 skipped in 0.1s"),
        (5, "no tests ran in 0.0s", "no tests ran in 0.0s"),
        (4, "", "no output"),
    ],
)
def test_verdict(returncode, output, reason):
    assert run.verdict(returncode, output) == reason


@pytest.mark.slow
def test_gate_runs_pytest(monkeypatch, tmp_path):
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    for name, body in (("green", "assert True"), ("red", "assert False")):
        path = tmp_path / "tests" / "ops" / f"test_{name}.py"
        path.write_text(f"def test_it(): {body}\n")
    monkeypatch.setattr(run, "_ROOT", tmp_path)
    assert run.run_tests("green") is None
    assert "1 failed" in run.run_tests("red")
    assert run.run_tests("absent") == "tests/ops/test_absent.py is missing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "bench_no_such_op.py is missing"),
        (["keep_ids", "--shape", "huge"], "keep_ids has no shape 'huge'"),
        (["keep_ids", "--record", "--quick"], "too noisy to --record"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_shapes_are_named_for_their_op():
    for op, named in shapes.SHAPES.items():
        kinds = {type(shape) for shape in named.values()}
        assert len(kinds) == 1, op
        assert all(name == shape.name for name, shape in named.items())
    on_cpu = shapes.select("contrastive", [], "cpu")
    assert not any(shape.gpu_only for shape in on_cpu)
    assert len(shapes.select("contrastive", [], "cuda")) > len(on_cpu)
    assert shapes.select("contrastive", ["clip-l14-b32768"], "cpu")[0].batch == 32768


@pytest.mark.parametrize("op", harness.names())
def test_every_benchmark_gives_what_the_harness_asks(op):
    bench = harness.load(op)
    assert op == bench.OP
    assert all((Path(run.__file__).parents[1] / path).exists() for path in harness.tests(op))
    assert bench.SHAPES is shapes.SHAPES[bench.OP]
    assert set(bench.DTYPES) <= set(harness.DTYPES)
    assert set(bench.DIRECTIONS) <= {"fwd", "bwd", "both", "step"}
    assert bench.BASELINE in bench.impls(CPU)
    for shape in bench.SHAPES.values():
        for direction in bench.DIRECTIONS:
            assert bench.bytes(shape, harness.DTYPES[bench.DTYPES[0]], direction) > 0
            assert bench.flops(shape, direction) >= 0


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Intel(R) Xeon(R) Processor", "xeon"),
        ("AMD EPYC 7763 64-Core Processor", "epyc-7763"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "xeon-platinum-8488c"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ],
)
def test_machine_slug(model, name):
    assert slug(model) == name


def test_table_shows_newest_rows(results: Path):
    loaded, _ = rows.load_machine(results / "fake-1c")
    lines = plot.table(loaded, headline=True).splitlines()
    assert lines[0] == "| op | pass | shape | dtype | baseline | vlpfast | other peers |"
    assert lines[2] == (
        "| `keep_ids` | fwd | flip-b16-b256-keep98 | int64 | mae 4 ms "
        "| cpp 1 ms (4x) | timm 2 ms (2x) |"
    )
    assert len(lines) == 4  # each op's first shape only
    full = plot.table(loaded, headline=False).splitlines()
    assert full[0] == "| op | pass | shape | dtype | baseline | reference | cpp | other peers |"
    assert "7 ms" in plot.table(loaded, headline=False)
    assert "cpp@main" not in plot.table(loaded, headline=False)


def test_plots_are_written(results: Path):
    assert plot.main(["--results", str(results)]) == 0
    folder = results / "fake-1c"
    for name in ("keep_ids.png", "bias_gelu.png", "roofline.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name
    assert "flip-l14-b1024-keep64" in (folder / "README.md").read_text()


def test_readme_region_is_rewritten_and_nothing_else(results: Path, tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{plot.BEGIN}\nold numbers\n{plot.END}\nThe end.\n")
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert plot.main(arguments) == 0
    once = readme.read_text()
    assert once.startswith(f"# Title\n{plot.BEGIN}\n**fake-1c** (threads 1, torch 2.13.0")
    assert once.endswith(f"{plot.END}\nThe end.\n")
    assert "old numbers" not in once
    assert plot.main(arguments) == 0
    assert readme.read_text() == once


@pytest.mark.parametrize(
    "text", ["no markers", f"{plot.END} {plot.BEGIN}", plot.BEGIN * 2 + plot.END]
)
def test_readme_without_markers_is_refused(text):
    with pytest.raises(ValueError, match="expected one"):
        plot.rewrite(text, "region")
