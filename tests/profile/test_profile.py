"""`profile` on a real recipe, and what its result says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vlpfast import recipes
from vlpfast.data.scenes import write_shards
from vlpfast.profile import Operator, Part, ProfileOptions, StepProfile, profile


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    write_shards(folder / "data", num_samples=24, seed=0, split="train")
    config = recipes.get("albef_tiny")
    return replace(
        config,
        data=replace(config.data, path=str(folder / "data"), loader="torch"),
        train=replace(config.train, batch_size=4, logs=str(folder / "logs"), device="cpu"),
    )


def test_files_and_numbers(config, tmp_path):
    options = ProfileOptions(warmup=0, timed=1, recorded=1)
    result = profile(config, tmp_path / "out", options)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "profile.json", "profile.png", "trace.json.gz"
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "profile.json").read_text())["samples"] == 4
    names = {p.name for p in result.parts}
    assert {"vision.blocks.mlp", "fusion.blocks.cross", "losses", "optimizer", "data"} <= names
    trained = next(p for p in result.parts if p.name == "vision.blocks.mlp")
    assert min(trained.forward_ms, trained.backward_ms) > 0
    # Nothing is kept of a profiled run.
    assert not config.run_dir.exists()


def test_beside_a_run_of_that_name(config, tmp_path):
    checkpoint = config.run_dir / "checkpoints" / "step_1.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"not read")
    assert profile(config, tmp_path / "out", ProfileOptions(warmup=0, timed=1, recorded=1)).parts


@pytest.mark.parametrize("name", ["warmup", "timed", "recorded", "depth"])
def test_bad_options(name):
    with pytest.raises(ValueError, match=f"{name} must be >= "):
        ProfileOptions(**{name: -1})


def test_table():
    parts = [Part("vision", 30.0, 60.0), Part("losses", 6.0, 3.7), Part("data", 0.3, 0.0)]
    operators = [Operator("aten::mm", 4, 50.0, 100.0), Operator("aten::add", 1, 2.0, 0.0)]
    result = StepProfile(200.0, 5.0, 32, 10.0, 4.0, parts, operators)
    assert result.samples_per_s == 160
    assert result.product_share == 0.5
    assert result.product_rate == 2.0
    table = result.table()
    assert "50% of the step at 2 TFLOP/s, 50% of one large product (4)" in table
    cells = [line.split() for line in table.splitlines()]
    assert ["vision", "30.00", "60.00", "90.0"] in cells
    assert ["1", "smaller", "ones", "0.30", "0.00", "0.3"] in cells
    assert ["aten::mm", "4", "50.00", "50.0"] in cells
