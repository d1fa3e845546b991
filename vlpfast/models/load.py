"""Reads the model of a run folder: its configuration and weights, as training writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

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


def load_model(folder: Path, weights: str = "latest") -> tuple[VLPModel, Path]:
    """The model of a run folder on the CPU, in eval mode, and the file of its weights.

    Args:
        folder: with config.json and weights.
        weights: "latest" checkpoint (else model.safetensors), or the path of either kind of file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: configuration and weights do not fit.
    """
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


def _load_weights(model: VLPModel, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        # Mapped, not read: a checkpoint also holds the optimizer, the teacher and the queue.
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        prefix = "model."
        state = {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the run's config.json: {error}") from error
