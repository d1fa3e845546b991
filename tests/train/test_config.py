"""Configurations: JSON round trip, and messages that name the field."""

import json
from dataclasses import replace

import pytest

from vlpfast import recipes
from vlpfast.config import differences, from_dict, to_dict
from vlpfast.train.config import (
    OptimConfig,
    RunConfig,
    TrainConfig,
)


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_survives_json(name):
    config = recipes.get(name)
    config = replace(config, optim=replace(config.optim, lr_multipliers=(("fusion.", 5.0),)))
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_absent_fields_take_defaults():
    assert from_dict(TrainConfig, {"batch_size": 8, "steps": 5}) == TrainConfig(8, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"lrr": 1.0}}, r"unknown field 'optim\.lrr'; did you mean 'lr'"),
        ({"train": {"steps": 5}}, r"missing field 'train\.batch_size'"),
        ({"train": {"batch_size": "8", "steps": 5}}, r"train\.batch_size: expected int, got '8'"),
        ({"train": {"batch_size": True, "steps": 5}}, r"expected int, got True"),
        ({"optim": {"lr_scheduler": "linear"}}, r"optim\.lr_scheduler: expected one of"),
        ({"optim": {"lr_multipliers": [["a"]]}}, r"optim\.lr_multipliers\.0: expected 2 values"),
        ({"optim": 3}, r"optim: expected an object"),
    ],
    ids=["unknown", "missing", "text", "bool", "choice", "tuple", "object"],
)
def test_wrong_values_are_named(change, message):
    values = to_dict(recipes.get("clip_tiny"))
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, values | change)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, {"batch_size": 0, "steps": 1}, r"train\.batch_size must be > 0, got 0"),
        (TrainConfig, {"batch_size": 1}, r"exactly one of train\.steps and train\.epochs"),
        (TrainConfig, {"batch_size": 1, "steps": 1, "epochs": 1.0}, "exactly one of"),
        (TrainConfig, {"batch_size": 1, "steps": 1, "ema_decay": 1.0}, r"ema_decay must be in"),
        (OptimConfig, {"lr": 0.0}, r"optim\.lr must be > 0, got 0\.0"),
        (OptimConfig, {"lr": 0.1, "min_lr": 0.2}, r"optim\.min_lr must be in"),
    ],
)
def test_impossible_values_are_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("train", "world", "steps"),
    [
        ({"steps": 7}, 4, 7),
        ({"epochs": 1.0}, 1, 13),  # 100 samples of 8: a last batch that wraps
        ({"epochs": 2.0, "accum_freq": 2}, 2, 7),
        ({"epochs": 0.5}, 1, 7),
    ],
)
def test_total_steps(train, world, steps):
    assert TrainConfig(batch_size=8, **train).total_steps(100, world) == steps


def test_differences():
    old = {"a": {"b": 1, "c": [1]}, "d": 2}
    new = {"a": {"b": 3, "c": [1]}, "e": 4}
    assert differences(old, new) == ["a.b: 1 -> 3", "d: 2 -> None", "e: None -> 4"]
