"""What of a record belongs to which part: against a step whose operators tell by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlpfast.profile import places
from vlpfast.profile.marks import LOSSES, PREFIX, REST, mark, modules_marked, part_of


class _Exp(nn.Module):
    def forward(self, x):
        return x.exp()


class _Tower(nn.Module):
    """Two blocks with an operator that nothing else has, and one of its own (`tan`)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([_Exp(), _Exp()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x * 0.1)
        return x.tan()


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class _Step(nn.Module):
    """A tower, a frozen copy that runs between, and a loss of its own operators."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"vision": _Tower(), "head": nn.Linear(64, 64)})
        self.teacher = nn.ModuleDict({"model": nn.ModuleDict({"vision": _Tower()})})

    def forward(self, x):
        y = self.model["vision"](x)
        with torch.no_grad():
            target = self.teacher["model"]["vision"](x)
        return (_Square.apply(self.model["head"](y)) - target).sinh().mean()


def _record(steps: int = 2, depth: int = 3):
    torch.manual_seed(0)
    step, x = _Step(), torch.randn(32, 64) * 0.1
    x.requires_grad_()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        modules_marked(step, depth),
        torch.profiler.profile(activities=activities, record_shapes=True, with_flops=True) as done,
    ):
        for _ in range(steps):
            with mark(REST):
                step(x).backward()
    return done.events()


def _places(events, name):
    owners = places._owners(events)
    return {places._place(e, owners) for e in events if e.name == name}


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("aten::exp", {("vision.blocks", "forward"), ("teacher.vision.blocks", "forward")}),
        ("ExpBackward0", {("vision.blocks", "backward")}),
        ("aten::tan", {("vision", "forward"), ("teacher.vision", "forward")}),
        ("TanBackward0", {("vision", "backward")}),
        ("AddmmBackward0", {("head", "backward")}),
        ("_Square", {(LOSSES, "forward")}),
        ("_SquareBackward", {(LOSSES, "backward")}),
        ("SinhBackward0", {(LOSSES, "backward")}),
        ("torch::autograd::AccumulateGrad", {("gradients", "backward")}),
    ],
)
def test_every_operator_in_its_part(operator, expected):
    assert _places(_record(), operator) == expected


def test_coarser_parts():
    events = _record(depth=1)
    assert _places(events, "ExpBackward0") == {("vision", "backward")}
    assert {p.name for p in places.parts(events, 2, on_device=False)} == {
        "vision", "teacher.vision", "head", LOSSES, REST, "gradients"
    }  # fmt: skip


def test_parts_sum_to_the_step():
    events = _record(steps=3)
    whole = sum(e.cpu_time_total for e in events if e.name == PREFIX + REST) / 1e3 / 3
    found = places.parts(events, 3, on_device=False)
    assert sum(p.total_ms for p in found) == pytest.approx(whole, rel=1e-6)
    assert [p.total_ms for p in found] == sorted((p.total_ms for p in found), reverse=True)
    assert next(p for p in found if p.name == "teacher.vision").backward_ms == 0


def test_operators_of_one_step():
    found = {o.name: o for o in places.operators(_record(steps=4), 4, on_device=False)}
    assert found["aten::exp"].calls == 4
    # The product and the two of its backward: 2 x 32 x 64 x 64 each.
    product = 2 * 32 * 64 * 64 / 1e9
    assert found["aten::addmm"].gflop == pytest.approx(product)
    assert found["aten::mm"].gflop == pytest.approx(2 * product)
    assert not any(name.startswith(PREFIX) for name in found)


def test_hooks_are_gone_afterwards():
    step = _Step()
    with modules_marked(step, 3):
        assert step.model["head"]._forward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in step.modules())


def test_a_part_is_a_path_without_numbers():
    assert part_of("model.fusion.blocks.11.cross.q") == "fusion.blocks.cross.q"
    assert part_of("") == ""
