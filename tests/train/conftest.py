"""A step module and a stream that train in milliseconds, with the contracts of the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vlpfast.data.scenes import write_shards
from vlpfast.ops.reference.counter import draw, stream, uniform
from vlpfast.train.config import OptimConfig, TrainConfig
from vlpfast.train.distributed import World
from vlpfast.train.loop import Trainer
from vlpfast.train.types import Run

DIM = 6


@dataclass(frozen=True)
class TinyBatch:
    """x (B, DIM) and the places of the rows in the stream."""

    x: Tensor
    positions: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> TinyBatch:
        return self


@dataclass
class TinyLoader:
    """Row of place p is a function of p alone; micro-batch s takes places [s * B, (s + 1) * B)."""

    batch_size: int
    start: int
    rank: int = 0
    world: int = 1
    corrupt: dict[str, str] = field(default_factory=dict)
    closed: bool = False

    def __iter__(self) -> Iterator[TinyBatch]:
        step = self.start
        while True:
            first = (step * self.world + self.rank) * self.batch_size
            positions = torch.arange(first, first + self.batch_size)
            bits = draw(stream(7, positions)[:, None], torch.arange(DIM))
            yield TinyBatch(uniform(bits) - 0.5, positions)
            step += 1

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class TinyOutput:
    losses: dict[str, tuple[Tensor, Tensor]]
    metrics: dict[str, Tensor]


class TinyStep(nn.Module):
    """Two losses, one with a count that differs between batches, and a counter that is state."""

    def __init__(self, poison: dict[int, str] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(DIM, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, DIM))
        self.register_buffer("finished", torch.zeros((), dtype=torch.int64))
        self.poison = poison or {}

    @property
    def weights(self) -> dict[str, float]:
        return {"itc": 1.0, "mlm": 0.5}

    def forward(self, batch: TinyBatch, *, seed: int, step: int) -> TinyOutput:
        y = self.model(batch.x)
        losses = {
            "itc": ((y - batch.x).square().sum(), torch.tensor(len(batch.x))),
            "mlm": self.counted(y, batch),
        }
        if step in self.poison:
            name = self.poison[step]
            losses[name] = (losses[name][0] * float("nan"), losses[name][1])
        return TinyOutput(losses, {"logit_scale": torch.tensor(14.3)})

    def counted(self, y: Tensor, batch: TinyBatch) -> tuple[Tensor, Tensor]:
        chosen = batch.positions % 3 == 0
        return (y.abs().sum(1) * chosen).sum(), chosen.sum()

    def finish_step(self) -> None:
        self.finished += 1


@dataclass(frozen=True)
class Tiny:
    """Makes trainers in a folder."""

    folder: Path

    def trainer(
        self,
        *,
        step: nn.Module | None = None,
        optim: OptimConfig | None = None,
        identity: dict[str, str] | None = None,
        loaders: list[TinyLoader] | None = None,
        name: str = "run",
        **train: object,
    ) -> Trainer:
        settings = {
            "batch_size": 4,
            "steps": 10,
            "precision": "fp32",
            "device": "cpu",
            "save_every": 3,
            "log_every_n_steps": 2,
            "report_to": "none",
        }
        config = TrainConfig(**(settings | train))

        def open_loader(start: int) -> TinyLoader:
            loader = TinyLoader(config.batch_size, start)
            if loaders is not None:
                loaders.append(loader)
            return loader

        return Trainer(
            step or TinyStep(),
            open_loader,
            optim or OptimConfig(lr=0.01, warmup=3),
            config,
            Run(name, self.folder / name, 32, {"name": name}, identity or {"data": "d"}),
            World(0, 1, torch.device("cpu")),
        )


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path)


@pytest.fixture
def make_step() -> Callable[..., TinyStep]:
    return TinyStep


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A shard of 24 generated scenes."""
    folder = tmp_path_factory.mktemp("scenes") / "val"
    write_shards(folder, num_samples=24, split="val", progress=False)
    return folder
