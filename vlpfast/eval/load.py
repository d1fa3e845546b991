"""Reads a run folder: configuration, tokenizer and weights, as training writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vlpfast.config import from_dict
from vlpfast.data.config import DataConfig
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.models.load import load_model, run_config
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what it was trained with.

    Attributes:
        model: in eval mode, on its device.
        tokenizer: of the run.
        data: the run's data configuration.
        objectives: what the run trained.
        answers: those that its answer head tells, by number; empty where it has none.
        weights: the file that the weights came from.
    """

    model: VLPModel
    tokenizer: Tokenizer
    data: DataConfig
    objectives: ObjectivesConfig
    answers: tuple[str, ...]
    weights: Path


def load_run(
    run_dir: str | Path,
    *,
    weights: str = "latest",
    device: Literal["auto", "cpu", "cuda"] | torch.device = "auto",
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
    config = run_config(folder)
    try:
        data_config = from_dict(DataConfig, config["data"], "data")
        objectives = from_dict(ObjectivesConfig, config["objectives"], "objectives")
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not a run's configuration: {error}"
        ) from error
    model, path = load_model(folder, weights)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = folder / "answers.json"
    answers = tuple(json.loads(names.read_text())) if names.exists() else ()
    return LoadedRun(
        model.to(device),
        Tokenizer.load(folder / "tokenizer.json"),
        data_config,
        objectives,
        answers,
        path,
    )
