"""Rows and tables of trained runs, from a run folder made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import BEGIN, CORE_MINUTES, END, FILE, QualityRow, main, rows_of, works
from benchmarks.rows import load


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 20 steps of 8 samples, logged every 10 steps; one evaluation done twice."""
    folder = tmp_path / "logs" / "small"
    (folder / "eval").mkdir(parents=True)
    config = {
        "name": "small",
        "model": {"preset": "clip", "size": "tiny"},
        "train": {"threads": 2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    logged = [
        {"step": 10, "samples_seen": 80, "step_s": 6.0},
        {"step": 20, "samples_seen": 160, "step_s": 12.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    for number, recall in ((1, 1.0), (2, 25.0)):
        result = {
            "task": "retrieval",
            "metrics": {"txt_r1": recall, "txt_r10": 50.0, "img_r1": 20.0, "img_r10": 60.0},
            "chance": {"txt_r1": 0.5, "img_r10": 5.0},
            "counts": {"num_images": 200, "num_texts": 400},
            "info": {
                "weights": f"{folder}/checkpoints/step_20.pt",
                "data": "/somewhere/emoji/val.jsonl",
                "where": "vendor=a",
                "pool_texts": "mean",
            },
        }
        (folder / "eval" / f"retrieval-{number}.json").write_text(json.dumps(result))
    return folder


def test_rows_tell_what_was_trained_and_evaluated(run):
    rows = {row.metric: row for row in rows_of(run, "box")}
    assert set(rows) == {"txt_r1", "txt_r10", "img_r1", "img_r10"}
    row = rows["txt_r1"]
    assert (row.run, row.preset, row.task) == ("small", "clip tiny", "retrieval")
    assert (row.data, row.where, row.protocol) == ("emoji/val.jsonl", "vendor=a", "pool_texts=mean")
    # The second evaluation replaces the first; a metric without a chance level has none.
    assert (row.value, row.chance, rows["txt_r10"].chance) == (25.0, 0.5, None)
    assert (row.samples_seen, row.minutes, row.threads) == (160, 3.0, 2)


def test_core_minutes_are_told_where_they_are_logged(run, tmp_path):
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step_s"', '"cpu_s": 1.5, "step_s"'))
    rows = {row.metric: row for row in rows_of(run, "box")}
    assert (rows[CORE_MINUTES].value, rows["txt_r1"].minutes) == (0.5, 3.0)
    table = tmp_path / "runs.md"
    table.write_text(f"{BEGIN}\n{END}\n")
    places = ["--results", str(tmp_path / "results"), "--others", str(table)]
    main([str(run), "--machine", "box", *places])
    assert "| small | clip tiny | 0 k samples, 0.5 core-minutes |" in table.read_text()


def test_training_counts_until_the_evaluated_step(run):
    path = run / "eval" / "retrieval-2.json"
    path.write_text(path.read_text().replace("step_20", "step_10"))
    row = next(r for r in rows_of(run, "box") if r.metric == "txt_r1")
    assert (row.samples_seen, row.minutes) == (80, 1.0)


@pytest.mark.parametrize(
    ("name", "option"),
    [("clip_emoji", "--readme"), ("own", "--others"), ("flip_kept", "--cleaning")],
)
def test_tables_are_made_from_the_rows(run, tmp_path, name, option):
    config = run / "config.json"
    config.write_text(config.read_text().replace("small", name))
    files = {option: tmp_path / option for option in ("--readme", "--others", "--cleaning")}
    for file in files.values():
        file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    results = tmp_path / "results"
    places = [str(part) for pair in files.items() for part in pair]
    main([str(run), "--machine", "box", "--results", str(results), *places])
    assert len(load(results / "box" / FILE, QualityRow)) == 4
    text = files.pop(option).read_text()
    assert "old" not in text
    assert f"| {name} | clip tiny | 0 k samples, 3 min, 2 threads |" in text
    assert "| 25.0 (0.5) | 50.0 | 20.0 | 60.0 (5.0) |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert not any(name in other.read_text() for other in files.values())


def test_margin_is_over_the_greater_of_control_and_chance(run, tmp_path):
    for path in (run / "eval").glob("*.json"):
        result = json.loads(path.read_text())
        result |= {"task": "vqa", "chance": {"vqa_accuracy": 34.0}}
        result["metrics"] = {"vqa_accuracy": 38.0, "shuffled_vqa_accuracy": 31.0}
        path.write_text(json.dumps(result))
    (row,) = works(rows_of(run, "box")).splitlines()[2:]
    assert row.endswith("| vqa: vqa_accuracy | 38.0 | 31.0 | 34.0 | +4.0 |")
    files = {name: tmp_path / name for name in ("downstream.md", "others.md")}
    for file in files.values():
        file.write_text(f"{BEGIN}\n{END}\n")
    places = ["--downstream", str(files["downstream.md"]), "--others", str(files["others.md"])]
    main([str(run), "--machine", "box", "--results", str(tmp_path / "results"), *places])
    assert row in files["downstream.md"].read_text()
    assert "vqa" not in files["others.md"].read_text()


def test_other_systems_stand_elsewhere(run, tmp_path):
    config = run / "config.json"
    config.write_text(config.read_text().replace("clip", "vilt"))
    files = {name: tmp_path / name for name in ("README.md", "presets.md")}
    for file in files.values():
        file.write_text(f"{BEGIN}\n{END}\n")
    places = ["--readme", str(files["README.md"]), "--presets", str(files["presets.md"])]
    main([str(run), "--machine", "box", "--results", str(tmp_path / "results"), *places])
    line = "| vilt | `small`, 0 k samples, 3 min, 2 threads | retrieval: img_r10 |"
    assert f"{line} 60.0 |  | 5.0 | +55.0 |" in files["presets.md"].read_text()
    assert "small" not in files["README.md"].read_text()


def test_a_run_without_evaluations_says_how_to_make_one(run):
    for path in (run / "eval").glob("*.json"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="vlpfast eval"):
        rows_of(run)
