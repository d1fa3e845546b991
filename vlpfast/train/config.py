"""What a training run is made of, as frozen dataclasses, and their JSON form (`config.json`)."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, Union

from vlpfast.data.config import DataConfig
from vlpfast.models.config import ModelConfig
from vlpfast.objectives.config import ObjectivesConfig

ConfigT = TypeVar("ConfigT")


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


def to_dict(config: object) -> dict[str, object]:
    """A (nested) dataclass as a dictionary of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[ConfigT], values: object, path: str = "") -> ConfigT:
    """The dataclass `cls` from what `to_dict` gave. Absent fields take their defaults.

    Raises:
        ValueError: an unknown or a missing field, or a value of the wrong type, by its path.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path or cls.__name__}: expected an object with fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown field {_join(path, name)!r}{close_match(name, known)}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"missing field {_join(path, name)!r}")
    return cls(**{n: _decode(hints[n], v, _join(path, n)) for n, v in values.items()})


def differences(old: Mapping[str, object], new: Mapping[str, object], path: str = "") -> list[str]:
    """ "path: old -> new" for every value in which two configs in `to_dict` form differ."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, _join(path, name))
        elif a != b:
            found.append(f"{_join(path, name)}: {a!r} -> {b!r}")
    return found


def close_match(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the closest of `known`, or a list of all where none is close."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known: {', '.join(known)}"


def _decode(hint: object, value: object, path: str) -> object:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{path}: expected one of {args}, got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _decode(hint, value, path)
    if origin is tuple:
        return _decode_tuple(args, value, path)
    if origin is dict and isinstance(value, dict):
        return {k: _decode(args[1], v, _join(path, k)) for k, v in value.items()}
    expected = origin or hint
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ValueError(f"{path}: expected {expected.__name__}, got {value!r}")
    return value


def _decode_tuple(args: tuple, value: object, path: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path}: expected a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise ValueError(f"{path}: expected {len(args)} values, got {value!r}")
    return tuple(
        _decode(a, v, f"{path}.{i}") for i, (a, v) in enumerate(zip(args, value, strict=True))
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got!r}")
