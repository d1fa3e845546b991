"""Training in 2 and 4 gloo processes against one process on the concatenated batch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.dist._run import run_distributed
from vlpfast.train import checkpoint
from vlpfast.train.config import OptimConfig, TrainConfig
from vlpfast.train.distributed import World, open_world
from vlpfast.train.loop import Trainer
from vlpfast.train.types import NonFiniteError, Run

pytestmark = pytest.mark.dist
GLOBAL_BATCH, DIM = 8, 5


class Rows(NamedTuple):
    x: Tensor
    positions: Tensor

    def to(self, device, *, non_blocking=False):
        return self


class Output(NamedTuple):
    losses: dict[str, tuple[Tensor, Tensor]]
    metrics: dict[str, Tensor]


class Step(nn.Module):
    """A loss over all rows, and one over rows whose number differs by process (also zero)."""

    def __init__(self, poison_rank: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(DIM, 7), nn.GELU(), nn.Linear(7, DIM))
        self.poison_rank = poison_rank
        self.weights = {"all": 1.0, "some": 0.3}

    def forward(self, batch, *, seed, step):
        y = self.model(batch.x)
        some = (batch.positions % GLOBAL_BATCH < 3).float()
        bad = dist.is_initialized() and dist.get_rank() == self.poison_rank
        total = (y - batch.x).square().sum() * (float("nan") if bad else 1.0)
        losses = {
            "all": (total, torch.tensor(len(y))),
            "some": ((y.abs().sum(1) * some).sum(), some.sum()),
        }
        return Output(losses, {})

    def finish_step(self) -> None:
        pass


class Stream:
    corrupt: dict[str, str] = {}  # noqa: RUF012 a constant

    def __init__(self, config: TrainConfig, world: World, start: int) -> None:
        self.config, self.world, self.step = config, world, start

    def __iter__(self):
        while True:
            size = self.config.batch_size
            first = (self.step * self.world.size + self.world.rank) * size
            positions = torch.arange(first, first + size)
            yield Rows(torch.sin(positions[:, None] * (1.0 + torch.arange(DIM))), positions)
            self.step += 1

    def close(self) -> None:
        pass


def make_trainer(
    world: World, folder: str, *, accum_freq=1, poison_rank=-1, data="d", **train
) -> Trainer:
    config = TrainConfig(
        batch_size=GLOBAL_BATCH // world.size // accum_freq,
        accum_freq=accum_freq,
        precision="fp32",
        device="cpu",
        report_to="none",
        **({"steps": 4, "save_every": 2} | train),
    )
    return Trainer(
        Step(poison_rank),
        lambda start: Stream(config, world, start),
        OptimConfig(lr=0.01),
        config,
        Run("run", Path(folder), 64, {}, {"data": data}),
        world,
    )


def first_steps(rank: int, folder: str) -> list[tuple[list[Tensor], dict[str, float]]]:
    """Gradient and reported losses of a first step, without and with accumulation."""
    results = []
    with open_world("cpu") as world:
        for accum_freq in (1, 2):
            trainer = make_trainer(world, folder, accum_freq=accum_freq)
            grads: list[Tensor] = []
            trainer.optimizer.register_step_pre_hook(
                lambda *_, t=trainer, g=grads: g.extend(p.grad.clone() for p in t.parameters)
            )
            module = world.wrap(trainer.module)
            report = trainer.take_step(module, iter(trainer.open_loader(0)))
            results.append((grads, report.losses))
    return results


def train_and_resume(rank: int, folder: str) -> list[Tensor]:
    """Stopped after two steps by process 1's clock alone, then resumed to the end."""
    with open_world("cpu") as world:
        first = make_trainer(world, folder, time_limit_minutes=1e-9 if rank == 1 else 0)
        result = first.fit()
        assert (result.stopped, result.step) == ("time limit", 1)
        second = make_trainer(world, folder)
        assert second.fit("latest").stopped == "done"
        return [p.detach() for p in second.module.parameters()]


def train_through(rank: int, folder: str) -> list[Tensor]:
    with open_world("cpu") as world:
        trainer = make_trainer(world, folder)
        trainer.fit()
        return [p.detach() for p in trainer.module.parameters()]


def poisoned(rank: int, folder: str) -> str:
    """What each process says when only process 1 has a NaN."""
    with open_world("cpu") as world:
        try:
            make_trainer(world, folder, poison_rank=1).fit()
        except NonFiniteError as error:
            return str(error)
    return "no error"


def main_first(rank: int, folder: str) -> bool:
    with open_world("cpu") as world:
        marker = Path(folder) / "made"
        with world.main_first("the marker"):
            seen = marker.exists()
            if world.is_main:
                marker.touch()
        return seen


def failing_main(rank: int, folder: str) -> str:
    with (
        open_world("cpu") as world,
        contextlib.suppress(ValueError),
        world.main_first("the data"),
    ):
        raise ValueError("bad data")
    return "all failed alike"


def from_main(rank: int, folder: str) -> tuple[int, str]:
    with open_world("cpu") as world:
        given = world.from_main(lambda: 7 + world.rank, "a number")
        try:
            world.from_main(lambda: 1 // world.rank, "nothing")
        except ZeroDivisionError as error:
            return given, str(error)
    return given, "no error"


def other_data(rank: int, folder: str) -> str:
    with open_world("cpu") as world:
        try:
            make_trainer(world, folder, data=f"d{rank}").fit()
        except ValueError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradient_equals_one_process(tmp_path, world_size):
    expected = first_steps(0, str(tmp_path))
    for results in run_distributed(first_steps, world_size, str(tmp_path)):
        for (grads, losses), (wanted_grads, wanted_losses) in zip(results, expected, strict=True):
            assert losses == pytest.approx(wanted_losses)
            for actual, wanted in zip(grads, wanted_grads, strict=True):
                torch.testing.assert_close(actual, wanted)


def test_stop_and_resume(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    through = run_distributed(train_through, 2, str(whole))
    again = run_distributed(train_and_resume, 2, str(resumed))
    for ours, theirs in zip(again, through, strict=True):
        for actual, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    states = [checkpoint.load(checkpoint.path_of(f, 4)) for f in (whole, resumed)]
    for name, wanted in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], wanted, rtol=0, atol=0)


def test_every_process_names_the_loss(tmp_path):
    for message in run_distributed(poisoned, 2, str(tmp_path)):
        assert message.startswith("loss 'all' is nan at step 0")


def test_processes_with_other_data(tmp_path):
    for message in run_distributed(other_data, 2, str(tmp_path)):
        assert message.startswith("processes 0 and 1 differ: data is 'd0' and 'd1'")


def test_main_goes_first(tmp_path):
    assert run_distributed(main_first, 2, str(tmp_path)) == [False, True]
    assert run_distributed(failing_main, 2, str(tmp_path)) == ["all failed alike"] * 2
    expected = (7, "integer division or modulo by zero")
    assert run_distributed(from_main, 2, str(tmp_path)) == [expected] * 2
