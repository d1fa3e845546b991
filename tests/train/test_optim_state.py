"""Moments belong to parameters, not to places in groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlpfast.train.config import OptimConfig
from vlpfast.train.optim import create_optimizer, load_moments, moments_by_name, param_groups


def stepped(config: OptimConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    optimizer = create_optimizer(param_groups(module, config), config, torch.device("cpu"))
    module(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def test_other_groups_and_settings():
    module, optimizer = stepped(OptimConfig(wd=0.2))
    saved = moments_by_name(optimizer, module)
    # No decay and another rate for the first layer: groups of other parameters.
    config = OptimConfig(wd=0.0, beta2=0.9, lr_multipliers=(("0.", 0.1),))
    other, resumed = stepped(config)
    load_moments(resumed, other, saved)
    named = dict(other.named_parameters())
    for name, moments in saved["moments"].items():
        for key, value in moments.items():
            assert torch.equal(resumed.state[named[name]][key], value), (name, key)
    assert [g["lr_scale"] for g in resumed.param_groups] == [0.1, 1.0]
    assert all(g["betas"] == (0.9, 0.9) and g["weight_decay"] == 0 for g in resumed.param_groups)


def test_before_the_first_step():
    module, optimizer = stepped(OptimConfig())
    load_moments(optimizer, module, {"moments": {}, "steps": 0})
    assert not optimizer.state


def test_other_parameters_are_named():
    module, optimizer = stepped(OptimConfig())
    saved = moments_by_name(optimizer, module)
    saved["moments"]["2.weight"] = saved["moments"].pop("1.weight")
    with pytest.raises(ValueError, match=r"differ in 1\.weight, 2\.weight"):
        load_moments(optimizer, module, saved)


def test_counted_by_group():
    """As apex's optimizers count their steps."""
    module, optimizer = stepped(OptimConfig())
    for group in optimizer.param_groups:
        group["step"] = 7
    saved = moments_by_name(optimizer, module)
    other, resumed = stepped(OptimConfig())
    load_moments(resumed, other, saved)
    assert {g["step"] for g in resumed.param_groups} == {7}
