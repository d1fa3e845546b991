"""Reads a run folder: configuration, tokenizer and weights, as training writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from vlpfast.config import from_dict
from vlpfast.data.config import DataConfig
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.models.config import ModelConfig
from vlpfast.models.vlp import VLPModel


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what it was trained with.

    Attributes:
        model: in eval mode, on its device.
        tokenizer: of the run.
        data: the run's data configuration.
        weights: the file that the weights came from.
    """

    model: VLPModel
    tokenizer: Tokenizer
    data: DataConfig
    weights: Path


def load_run(
    run_dir: str | Path,
    *,
    weights: str = "latest",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> LoadedRun:
    """Builds the model of a run folder and loads its weights.

    Args:
        run_dir: folder with config.json, tokenizer.json and weights.
        weights: "latest" checkpoint (else model.safetensors), or the path of either kind of file.
        device: "auto" is a GPU where there is one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: configuration and weights do not fit.
    """
    folder = Path(run_dir)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.json")
    try:
        config = json.loads((folder / "config.json").read_text())
        model_config = from_dict(ModelConfig, config["model"], "model")
        data_config = from_dict(DataConfig, config["data"], "data")
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not a run's configuration: {error}"
        ) from error
    path = _newest_weights(folder) if weights == "latest" else Path(weights)
    model = VLPModel(model_config)
    _load_weights(model, path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedRun(
        model.to(device).eval(),
        Tokenizer.load(folder / "tokenizer.json"),
        data_config,
        path,
    )


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
