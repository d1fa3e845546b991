"""`train`: from a `RunConfig` to a finished run folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from vlpfast.config import to_dict
from vlpfast.data.answers import config_answers
from vlpfast.data.batch import Batch
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader, make_tokenizer, open_index
from vlpfast.data.masking import (
    mask_patches,
    mask_patches_evenly,
    mask_regions,
    mask_text,
)
from vlpfast.data.recaptions import captions_in
from vlpfast.data.scores import scores_in
from vlpfast.data.sources import hash_files
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.models.load import run_config, start_from
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.guide import Guide
from vlpfast.objectives.step import PretrainStep
from vlpfast.ops.seed import fold_seed
from vlpfast.train import checkpoint
from vlpfast.train.config import RunConfig
from vlpfast.train.distributed import open_world
from vlpfast.train.loop import Trainer
from vlpfast.train.optim import freeze
from vlpfast.train.types import Loader, Run, TrainResult


def train(config: RunConfig, *, resume: str | None = None) -> TrainResult:
    """Trains `config` and leaves everything in its run folder.

    The folder holds config.json, tokenizer.json, out.log, metrics.jsonl, loss.png, tensorboard/,
    checkpoints/step_K.pt, and at the end model.safetensors; corrupt/RANK.jsonl names the samples
    that a process skipped. guide.json is the configuration of the run that `objectives.guide`
    names, answers.json the answers that the model tells, by number.

    Args:
        config: of the whole run. The model's vocabulary becomes the tokenizer's.
        resume: a checkpoint's path, or "latest": the newest of this run, if it has one. Without it
            a run folder that has checkpoints is left alone.

    Raises:
        ValueError: parts of the config do not fit each other, the data, or the checkpoint.
        NonFiniteError: a loss or the gradient became NaN or infinite; it names which.
    """
    # Before the data is read, which may take long.
    checkpoint.find(config.run_dir, resume)
    with open_trainer(config, resume) as trainer:
        return trainer.fit(resume)


@contextlib.contextmanager
def open_trainer(config: RunConfig, resume: str | None = None) -> Iterator[Trainer]:
    """Model, data and processes of `config` as a trainer that has not begun; writes nothing but the
    data's index. Arguments and errors are those of `train`.
    """
    if not config.data.path:
        raise ValueError("data.path is not set: name the data with --data PATH")
    resumes = resume is not None and checkpoint.find(config.run_dir, resume) is not None
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with open_world(config.train.device) as world:
        with world.main_first("the first process to index the data"):
            index = open_index(config.data)
            config = fit_answers(config, index)
        tokenizer = world.from_main(
            partial(open_tokenizer, config, index, resume),
            "the first process to train the tokenizer",
        )
        guide = Guide.open(config.objectives, world.device, draws="image" in config.data.tasks)
        config = fit_parts(config, tokenizer, guide)
        seed = config.train.seed
        # Only the initial weights are drawn from the global generator.
        torch.manual_seed(seed)
        group = dist.group.WORLD if world.size > 1 else None
        model = VLPModel(config.model)
        notes: Sequence[str] = ()
        if config.train.init and not resumes:
            notes = start_from(model, Path(config.train.init), fresh_parts(config, index))
        freeze(model, config.train.freeze)
        model.set_grad_checkpointing(config.train.grad_checkpointing)
        step = PretrainStep(model, config.objectives, group, seed=seed)

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
                num_codes=guide.num_codes if guide is not None else 0,
            )

        run = run_of(config, index, tokenizer, guide, notes)
        ready = partial(prepare, config=config, tokenizer=tokenizer, guide=guide)
        yield Trainer(step, open_loader, config.optim, config.train, run, world, ready)


def prepare(batch: Batch, config: RunConfig, tokenizer: Tokenizer, guide: Guide | None) -> Batch:
    """`batch` with what its objectives hide of it, and the guide's targets: a function of the seed
    and of the places in the stream.
    """
    objectives, seed = config.objectives, config.train.seed
    key = {"seed": seed, "positions": batch.positions}
    words = {"whole_word": objectives.mlm_whole_word, "positions": batch.positions}
    if objectives.mlm:
        masked, labels = mask_text(
            batch.text, tokenizer, probability=objectives.mlm_probability, seed=seed, **words
        )
        batch = replace(batch, masked_text=masked, mlm_labels=labels)
    if objectives.mtm:
        other, share = fold_seed(seed, 1), objectives.mtm_probability
        masked, labels = mask_text(batch.text, tokenizer, probability=share, seed=other, **words)
        batch = replace(batch, masked_alone=masked, alone_labels=labels)
    if objectives.masks_regions:
        hidden = mask_regions(
            batch.visual("regions"), probability=objectives.mrm_probability, **key
        )
        batch = replace(batch, masked_regions=hidden)
    if objectives.hides_patches:
        patches = config.model.num_patches
        if objectives.mim_mask == "even":
            ids = mask_patches_evenly(patches, **key)
        else:
            count = max(1, round(objectives.mim_probability * patches))
            ids = mask_patches(count, math.isqrt(patches), **key)
        batch = replace(batch, hidden_patches=ids)
    if guide is not None:
        bf16 = config.train.precision == "amp_bf16"
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
            batch = guide.fill(batch, first_code=config.model.text.vocab_size)
    return batch


def run_of(
    config: RunConfig, index: Index, tokenizer: Tokenizer, guide: Guide | None, notes: Sequence[str]
) -> Run:
    """Names and identity of a run: a resumed one must have the same data, tokenizer and guide."""
    identity = {"data": data_identity(index, config.data), "tokenizer": tokenizer.sha256}
    files = {"tokenizer.json": tokenizer.save}
    if guide is not None:
        identity["guide"] = guide.sha256
        text = json.dumps(run_config(Path(config.objectives.guide)), indent=2) + "\n"
        files["guide.json"] = lambda path: path.write_text(text)
    if config.model.answers and config.data.answers:
        answers = config_answers(index, config.data)
        files["answers.json"] = lambda path: path.write_text(json.dumps(list(answers)) + "\n")
    return Run(
        name=config.name,
        folder=config.run_dir,
        num_samples=index.num_samples,
        config=to_dict(config),
        identity=identity,
        files=files,
        notes=notes,
    )


def open_tokenizer(config: RunConfig, index: Index, resume: str | None) -> Tokenizer:
    """The tokenizer that the config names; neither resuming nor a start from another run's weights
    trains it again.
    """
    kept = config.run_dir / "tokenizer.json"
    if resume is not None and config.data.tokenizer == "train" and kept.is_file():
        return Tokenizer.load(kept)
    if config.train.init and config.data.tokenizer == "train":
        return Tokenizer.load(Path(config.train.init) / "tokenizer.json")
    return make_tokenizer(config.data, index)


def fit_answers(config: RunConfig, index: Index) -> RunConfig:
    """The config with the model's answers set to the data's, where it learns to tell them, and how
    many images they are about.
    """
    data = config.data
    if not (config.objectives.qa and data.answers):
        return config
    found, images = len(config_answers(index, data)), 1 + index.has_pairs
    return replace(config, model=replace(config.model, answers=found, answer_images=images))


def fresh_parts(config: RunConfig, index: Index) -> tuple[str, ...]:
    """The parts of the model that do not start from the run `train.init`: what tells answers, where
    that run's are others, or in another order; its whole head, where they are about more images.
    """
    if not (config.model.answers and config.data.answers):
        return ()
    kept = Path(config.train.init) / "answers.json"
    before = json.loads(kept.read_text()) if kept.is_file() else []
    images = run_config(kept.parent)["model"].get("answer_images", 1) if before else 0
    if before and images != config.model.answer_images:
        return ("answer_head.",)
    same = before == list(config_answers(index, config.data))
    return () if same else ("answer_head.answers.",)


def fit_parts(config: RunConfig, tokenizer: Tokenizer, guide: Guide | None = None) -> RunConfig:
    """The config with the model's vocabulary set to the tokenizer's and the model's task tokens,
    and its codes or the width of its targets to the guide's.

    Raises:
        ValueError: captions may be longer than the model's context, MLM lacks a mask token, or the
            guide has other patches.
    """
    if guide is not None:
        config = replace(config, model=guide.fit(config.model))
    text = config.model.text
    if text.kind == "none":
        return config
    if config.data.max_tokens > text.context_length:
        raise ValueError(
            f"data.max_tokens must be <= model.text.context_length {text.context_length}, "
            f"got {config.data.max_tokens}"
        )
    together = config.model.fusion.kind != "seq2seq" and not config.data.answers
    if config.data.tasks and together and 2 * config.data.max_tokens > text.context_length:
        raise ValueError(
            "data.max_tokens is of prompt and text each, which share model.text.context_length "
            f"{text.context_length}: with data.tasks it must be at most half, "
            f"got {config.data.max_tokens}"
        )
    if config.data.locations != len(tokenizer.locations):
        raise ValueError(
            f"data.locations is {config.data.locations}, and the tokenizer has "
            f"{len(tokenizer.locations)} location tokens"
        )
    masks = config.objectives.mlm or config.objectives.mtm
    if masks and tokenizer.mask_id is None:
        raise ValueError("objectives.mlm needs a tokenizer with a mask token; 'clip' has none")
    text = replace(text, vocab_size=tokenizer.vocab_size + text.task_tokens)
    return replace(config, model=replace(config.model, text=text))


def data_identity(index: Index, config: DataConfig) -> str:
    """Hash of what decides which sample stands where in the stream.

    That is the containers' names and sizes, and the selection. Modification times are left out: a
    copy of the data is the same data.
    """
    digest = hashlib.sha256(
        f"{index.num_samples} {config.id_key} {sorted(config.where)}\n".encode()
    )
    if config.recaptions:
        digest.update(f"{captions_in(config.recaptions).identity()}\n".encode())
    if config.scores:
        rule = f"{scores_in(config.scores).identity()} {config.min_score} {config.keep_fraction}"
        digest.update(f"{rule}\n".encode())
    hash_files(digest, index.source)
    return digest.hexdigest()[:16]
