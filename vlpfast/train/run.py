"""`train`: from a `RunConfig` to a finished run folder."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
import torch.distributed as dist

from vlpfast.config import to_dict
from vlpfast.data.batch import Batch
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader, make_tokenizer, open_index
from vlpfast.data.masking import mask_regions, mask_text
from vlpfast.data.sources import containers
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.step import PretrainStep
from vlpfast.train import checkpoint
from vlpfast.train.config import RunConfig
from vlpfast.train.distributed import open_world
from vlpfast.train.loop import Trainer
from vlpfast.train.types import Loader, Run, TrainResult


def train(config: RunConfig, *, resume: str | None = None) -> TrainResult:
    """Trains `config` and leaves everything in its run folder.

    The folder holds config.json, tokenizer.json, out.log, metrics.jsonl, loss.png, tensorboard/,
    checkpoints/step_K.pt, and at the end model.safetensors.

    Args:
        config: of the whole run. The model's vocabulary becomes the tokenizer's.
        resume: a checkpoint's path, or "latest": the newest of this run, if it has one. Without it
            a run folder that has checkpoints is left alone.

    Raises:
        ValueError: parts of the config do not fit each other, the data, or the checkpoint.
        NonFiniteError: a loss or the gradient became NaN or infinite; it names which.
    """
    if not config.data.path:
        raise ValueError("data.path is not set: name the data with --data PATH")
    checkpoint.find(config.run_dir, resume)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with open_world(config.train.device) as world:
        with world.main_first("the first process to index the data"):
            index = open_index(config.data)
            tokenizer = open_tokenizer(config, index, resume)
        config = fit_parts(config, tokenizer)
        seed = config.train.seed
        # Only the initial weights are drawn from the global generator.
        torch.manual_seed(seed)
        group = dist.group.WORLD if world.size > 1 else None
        step = PretrainStep(VLPModel(config.model), config.objectives, group, seed=seed)

        def open_loader(micro_batch: int) -> Loader:
            return make_loader(
                index,
                config.data,
                tokenizer=tokenizer,
                image_size=config.model.image_size,
                batch_size=config.train.batch_size,
                seed=seed,
                rank=world.rank,
                world=world.size,
                start_step=micro_batch,
            )

        def prepare(batch: Batch) -> Batch:
            objectives, key = config.objectives, {"seed": seed, "positions": batch.positions}
            if objectives.mlm:
                masked, labels = mask_text(
                    batch.text,
                    tokenizer,
                    probability=objectives.mlm_probability,
                    whole_word=objectives.mlm_whole_word,
                    **key,
                )
                batch = replace(batch, masked_text=masked, mlm_labels=labels)
            if objectives.masks_regions:
                hidden = mask_regions(
                    batch.visual("regions"), probability=objectives.mrm_probability, **key
                )
                batch = replace(batch, masked_regions=hidden)
            return batch

        run = Run(
            name=config.name,
            folder=config.run_dir,
            num_samples=index.num_samples,
            config=to_dict(config),
            identity={"data": data_identity(index, config.data), "tokenizer": tokenizer.sha256},
            files={"tokenizer.json": tokenizer.save},
        )
        trainer = Trainer(step, open_loader, config.optim, config.train, run, world, prepare)
        return trainer.fit(resume)


def open_tokenizer(config: RunConfig, index: Index, resume: str | None) -> Tokenizer:
    """The tokenizer that the config names; resuming does not train it again."""
    kept = config.run_dir / "tokenizer.json"
    if resume is not None and config.data.tokenizer == "train" and kept.is_file():
        return Tokenizer.load(kept)
    return make_tokenizer(config.data, index)


def fit_parts(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The config with the model's vocabulary set to the tokenizer's.

    Raises:
        ValueError: captions may be longer than the model's context, or MLM lacks a mask token.
    """
    text = config.model.text
    if config.data.max_tokens > text.context_length:
        raise ValueError(
            f"data.max_tokens must be <= model.text.context_length {text.context_length}, "
            f"got {config.data.max_tokens}"
        )
    if config.data.tasks and 2 * config.data.max_tokens > text.context_length:
        raise ValueError(
            "data.max_tokens is of prompt and text each, which share model.text.context_length "
            f"{text.context_length}: with data.tasks it must be at most half, "
            f"got {config.data.max_tokens}"
        )
    if config.objectives.mlm and tokenizer.mask_id is None:
        raise ValueError("objectives.mlm needs a tokenizer with a mask token; 'clip' has none")
    text = replace(text, vocab_size=tokenizer.vocab_size)
    return replace(config, model=replace(config.model, text=text))


def data_identity(index: Index, config: DataConfig) -> str:
    """Hash of what decides which sample stands where in the stream.

    That is the containers' names and sizes, and the selection. Modification times are left out: a
    copy of the data is the same data.
    """
    digest = hashlib.sha256(
        f"{index.num_samples} {config.id_key} {sorted(config.where)}\n".encode()
    )
    for path in containers(index.source):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
