"""Reads the model of a run folder: its configuration and weights, as training writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlpfast.config import from_dict
from vlpfast.models.config import ModelConfig
from vlpfast.models.vlp import VLPModel


def run_config(folder: Path) -> Mapping[str, object]:
    """What config.json of a run folder says.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.json")
    return json.loads((folder / "config.json").read_text())


def load_model(folder: str | Path, weights: str = "latest") -> tuple[VLPModel, Path]:
    """The model of a run folder on the CPU, in eval mode, and the file of its weights.

    Args:
        folder: with config.json and weights.
        weights: "latest" checkpoint (else model.safetensors), or the path of either kind of file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: configuration and weights do not fit.
    """
    folder = Path(folder)
    config = run_config(folder)
    try:
        model_config = from_dict(ModelConfig, config["model"], "model")
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not a run's configuration: {error}"
        ) from error
    path = _newest_weights(folder) if weights == "latest" else Path(weights)
    model = VLPModel(model_config)
    _load_weights(model, path)
    return model.eval(), path


def _newest_weights(folder: Path) -> Path:
    """The checkpoint of the highest step, or model.safetensors where there is none."""
    checkpoints = (folder / "checkpoints").glob("step_*.pt")
    exported = folder / "model.safetensors"
    step = lambda path: int(path.stem.removeprefix("step_"))
    newest = max(checkpoints, key=step, default=exported)
    if not newest.is_file():
        raise FileNotFoundError(f"{folder} has neither checkpoints/step_*.pt nor {exported.name}")
    return newest


def start_from(model: VLPModel, folder: Path, fresh: tuple[str, ...] = ()) -> list[str]:
    """Gives `model` the newest weights of another run's model, where both have a part whose name
    starts with none of `fresh`.

    Returns: what to say of it: the parts that keep their fresh weights, and those left behind.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a part has another shape, or there is no common one.
    """
    path = _newest_weights(folder)
    own = model.state_dict()
    other = {n: t for n, t in _read_weights(path).items() if not n.startswith(fresh)}
    common = own.keys() & other.keys()
    wrong = [n for n in sorted(common) if own[n].shape != other[n].shape]
    if wrong or not common:
        name = wrong[0] if wrong else "nothing in common"
        shapes = f": {tuple(other[name].shape)}, here {tuple(own[name].shape)}" if wrong else ""
        raise ValueError(f"{path} does not fit the model: {name}{shapes}")
    model.load_state_dict({n: other[n] for n in common}, strict=False)
    notes = [f"started from {path}: {len(common)} of {len(own)} tensors"]
    for what, names in (("fresh", own.keys() - common), ("left behind", other.keys() - common)):
        notes += [f"{what}: {', '.join(sorted(names))}"] if names else []
    return notes


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    # Mapped, not read: a checkpoint also holds the optimizer, the teacher and the queue.
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    prefix = "model."
    return {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}


def _load_weights(model: VLPModel, path: Path) -> None:
    state = _read_weights(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the run's config.json: {error}") from error
