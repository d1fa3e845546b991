"""What a training run is made of, as frozen dataclasses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlpfast.data.config import DataConfig
from vlpfast.models.config import ModelConfig
from vlpfast.objectives.config import ObjectivesConfig


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule; the names are open_clip's.

    Attributes:
        optimizer: "adamw" is torch's; "apex_adam" and "apex_lamb" are NVIDIA apex's fused ones.
        lr: peak learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        wd: decoupled weight decay, on parameters that `optim.decays` names.
        no_decay: further parameters without weight decay, by parts of their names ("pos_embed").
        lr_multipliers: (prefix of parameter names, factor) pairs; the longest fitting prefix holds.
        grad_clip_norm: largest global gradient norm; 0 does not clip.
        lr_scheduler: "cosine", "const", or "const-cooldown" (constant, then down to `min_lr`).
        warmup: steps of linear warm-up.
        cooldown: steps of the cooldown at the end of "const-cooldown".
        cooldown_power: shape of the cooldown, 1 is linear.
        min_lr: learning rate at the end of "cosine" and "const-cooldown".
    """

    optimizer: Literal["adamw", "apex_adam", "apex_lamb"] = "adamw"
    lr: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    wd: float = 0.2
    no_decay: tuple[str, ...] = ()
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    grad_clip_norm: float = 0.0
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = "cosine"
    warmup: int = 0
    cooldown: int = 0
    cooldown_power: float = 1.0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", "> 0", self.lr)
        _require(self.wd >= 0, "optim.wd", ">= 0", self.wd)
        _require(self.grad_clip_norm >= 0, "optim.grad_clip_norm", ">= 0", self.grad_clip_norm)
        _require(self.warmup >= 0, "optim.warmup", ">= 0 steps", self.warmup)
        _require(self.cooldown >= 0, "optim.cooldown", ">= 0 steps", self.cooldown)
        _require(self.cooldown_power > 0, "optim.cooldown_power", "> 0", self.cooldown_power)
        _require(0 <= self.min_lr <= self.lr, "optim.min_lr", "in [0, optim.lr]", self.min_lr)


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, and what is written.

    Attributes:
        steps: optimizer steps of the whole run; 0 takes them from `epochs`.
        epochs: passes over the data, may be fractional; 0 takes `steps`.
        batch_size: samples per device and micro-batch.
        accum_freq: micro-batches per optimizer step; a loss is the mean of their means.
        precision: "fp32", or "amp_bf16": fp32 weights, forward under bf16 autocast.
        device: "auto" is a GPU where there is one.
        seed: the only source of randomness of the run.
        ema_decay: decay of the averaged weights, exported beside the trained ones; 0 is off.
        threads: CPU threads of this process; 0 leaves torch's choice.
        logs: folder of all runs; a run's own folder is `logs/NAME`.
        log_every_n_steps: steps between log lines.
        save_every: steps between checkpoints; 0 writes one at the end only.
        keep_checkpoints: newest checkpoints kept; 0 keeps all.
        time_limit_minutes: stop with a checkpoint after this long; 0 is no limit. The schedule
            stays that of `steps`, so a resumed run continues it.
        report_to: "tensorboard" or "none".
        grad_checkpointing: blocks run again in the backward and keep their inputs alone: less
            memory, about a third more time, the same gradients.
        init: run folder whose newest weights and tokenizer a new run starts from; what only one of
            the two models has is named in the log.
        freeze: parameters that are not trained, by patterns of their names ("vision.*").
    """

    batch_size: int
    steps: int = 0
    epochs: float = 0.0
    accum_freq: int = 1
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    ema_decay: float = 0.0
    threads: int = 0
    logs: str = "logs"
    log_every_n_steps: int = 100
    save_every: int = 1000
    keep_checkpoints: int = 2
    time_limit_minutes: float = 0.0
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    grad_checkpointing: bool = False
    init: str = ""
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, "train.batch_size", "> 0", self.batch_size)
        _require(self.accum_freq > 0, "train.accum_freq", "> 0", self.accum_freq)
        _require(
            self.log_every_n_steps > 0, "train.log_every_n_steps", "> 0", self.log_every_n_steps
        )
        _require(0 <= self.ema_decay < 1, "train.ema_decay", "in [0, 1)", self.ema_decay)
        _require(0 <= self.seed < 2**63, "train.seed", "in [0, 2**63)", self.seed)
        for name in (
            "steps",
            "epochs",
            "threads",
            "save_every",
            "keep_checkpoints",
            "time_limit_minutes",
        ):
            _require(getattr(self, name) >= 0, f"train.{name}", ">= 0", getattr(self, name))
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(
                "exactly one of train.steps and train.epochs must be > 0, "
                f"got {self.steps} and {self.epochs}"
            )

    def total_steps(self, num_samples: int, world: int) -> int:
        """Optimizer steps of the run over `num_samples` samples on `world` processes."""
        if self.steps:
            return self.steps
        return math.ceil(self.epochs * num_samples / (world * self.batch_size * self.accum_freq))


@dataclass(frozen=True)
class RunConfig:
    """A whole training run; a recipe is a function that returns one.

    Attributes:
        name: of the run and its folder.
        model: the architecture.
        objectives: the losses.
        data: where samples come from and how they are augmented.
        optim: optimizer and schedule.
        train: length, precision, logging, checkpoints.
    """

    name: str
    model: ModelConfig
    objectives: ObjectivesConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.train.logs) / self.name


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got!r}")
