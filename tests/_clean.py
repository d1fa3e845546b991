"""Run folders of fresh models, for cleaning data with them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlpfast.config import to_dict
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.models import VLPModel, create_model
from vlpfast.objectives import ObjectivesConfig
from vlpfast.train.config import RunConfig, TrainConfig

SIDE = 32


def make_run(folder: Path, index: Index, preset: str, data: DataConfig, **objectives) -> VLPModel:
    """A run folder of a fresh model, with weights large enough to tell images apart."""
    tokenizer = Tokenizer.train(index.iter_captions(), 300)
    torch.manual_seed(0)
    model = create_model(
        preset,
        vocab_size=tokenizer.vocab_size + (2 if preset == "blip" else 0),
        context_length=32,
        image_size=SIDE,
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "pooler" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    config = RunConfig(
        name="run",
        model=model.config,
        objectives=ObjectivesConfig(**objectives),
        data=data,
        train=TrainConfig(batch_size=4, steps=1),
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    tokenizer.save(folder / "tokenizer.json")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return model


def data_of(path: Path, **options) -> DataConfig:
    return DataConfig(path=str(path), loader="torch", workers=1, max_tokens=16, **options)
