"""Schedules, parameter groups and averages against their formulas."""

import math

import pytest
import torch
from torch import nn

from vlpfast.models import create_model
from vlpfast.train.config import OptimConfig
from vlpfast.train.ema import Ema
from vlpfast.train.optim import create_optimizer, decays, param_groups
from vlpfast.train.schedule import learning_rate

CPU = torch.device("cpu")


def test_warmup_and_cosine():
    config = OptimConfig(lr=1.0, warmup=4)
    rates = [learning_rate(step, 12, config) for step in range(13)]
    expected = [0.25, 0.5, 0.75, 1.0]
    expected += [0.5 * (1 + math.cos(math.pi * e / 8)) for e in range(9)]
    assert rates == pytest.approx(expected)


def test_cosine_ends_at_the_floor():
    config = OptimConfig(lr=1.0, min_lr=0.1)
    assert learning_rate(10, 10, config) == pytest.approx(0.1)
    assert learning_rate(5, 10, config) == pytest.approx(0.55)


def test_const_and_cooldown():
    const = OptimConfig(lr=1.0, warmup=2, lr_scheduler="const")
    assert [learning_rate(s, 6, const) for s in range(6)] == [0.5, 1, 1, 1, 1, 1]
    cooldown = OptimConfig(
        lr=1.0, lr_scheduler="const-cooldown", cooldown=4, cooldown_power=2.0, min_lr=0.2
    )
    rates = [learning_rate(s, 6, cooldown) for s in range(7)]
    expected = [1, 1, *(0.2 + 0.8 * (1 - t / 4) ** 2 for t in range(5))]
    assert rates == pytest.approx(expected)


def test_weight_decay_follows_open_clip():
    parameter = nn.Parameter(torch.zeros(3, 3))
    vector = nn.Parameter(torch.zeros(3))
    assert decays("block.attention.weight", parameter)
    assert decays("token_embedding.weight", parameter)
    assert decays("pos_embed", parameter)
    assert not decays("pos_embed", parameter, ("pos_embed",))
    assert not decays("ln.weight", vector)
    assert not decays("proj.bias", parameter)
    assert not decays("logit_scale", nn.Parameter(torch.zeros(())))


def test_groups_hold_each_trained_parameter_once():
    model = create_model("albef", vocab_size=64, image_size=32)
    model.image_projection.requires_grad_(False)
    config = OptimConfig(wd=0.1, lr_multipliers=(("fusion.", 5.0), ("fusion.blocks.0", 2.0)))
    groups = param_groups(model, config, lambda name: 0.5 if name.startswith("vision.") else 1.0)
    names = {id(p): n for n, p in model.named_parameters()}
    grouped = [names[id(p)] for g in groups for p in g["params"]]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    by_name = {names[id(p)]: g for g in groups for p in g["params"]}
    assert by_name["scale"]["weight_decay"] == 0.0
    assert {g["weight_decay"] for n, g in by_name.items() if n.endswith("bias")} == {0.0}
    matrices = [n for n in trained if dict(model.named_parameters())[n].ndim > 1]
    assert {by_name[n]["weight_decay"] for n in matrices if not n.endswith("bias")} == {0.1}
    factors = {n: g["lr_scale"] for n, g in by_name.items()}
    assert {f for n, f in factors.items() if n.startswith("vision.")} == {0.5}
    assert {f for n, f in factors.items() if n.startswith("fusion.blocks.0")} == {2.0}
    assert factors["scale"] == 1.0


def test_adamw_update():
    """One step of decoupled weight decay and bias-corrected moments, by hand."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    module = nn.Module()
    module.weight = weight
    config = OptimConfig(lr=0.1, beta1=0.9, beta2=0.98, eps=1e-6, wd=0.5)
    optimizer = create_optimizer(param_groups(module, config), config, CPU)
    grad = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    weight.grad = grad.clone()
    before = weight.detach().clone()
    optimizer.step()
    # Bias correction makes the first moments the gradient itself and its square.
    expected = before * (1 - 0.1 * 0.5) - 0.1 * grad / (grad.abs() + 1e-6)
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", ["apex_adam", "apex_lamb"])
def test_apex_says_why_not(name):
    with pytest.raises(NotImplementedError, match=f"optim.optimizer='{name}' needs .*use 'adamw'"):
        create_optimizer([{"params": []}], OptimConfig(optimizer=name), CPU)


def test_ema_is_its_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    ema = Ema(model, 0.9)
    expected = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        for name, parameter in model.named_parameters():
            if name in expected:
                expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach()
    averages = ema.state_dict()
    assert averages.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(averages[name], value)
    whole = ema.averaged_state_dict(model)
    assert whole.keys() == model.state_dict().keys()
    torch.testing.assert_close(whole["0.weight"], expected["0.weight"])
    torch.testing.assert_close(whole["0.bias"], model[0].bias.detach(), rtol=0, atol=0)


def test_ema_averages_tied_weights_under_both_names():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model["a"].weight.add_(1.0)
    ema.update()
    state = ema.averaged_state_dict(model)
    torch.testing.assert_close(state["b.weight"], state["a.weight"], rtol=0, atol=0)
    torch.testing.assert_close(state["b.weight"], model["a"].weight.detach() - 0.5)


def test_ema_refuses_another_model():
    with pytest.raises(ValueError, match="do not fit the model"):
        Ema(nn.Linear(2, 2), 0.5).load_state_dict({"weight": torch.zeros(2, 2)})


def test_a_multiplier_that_fits_nothing_is_an_error():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no parameter starts with 'scale'"):
        param_groups(module, OptimConfig(lr_multipliers=(("scale", 0.1),)))
