"""From a DataConfig to batches: the index, the tokenizer and the loader that a run uses."""

from __future__ import annotations

import importlib.util
import itertools

import torch

from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader_torch import TorchLoader
from vlpfast.data.prompts import iter_texts, needs_captions
from vlpfast.data.recaptions import recaptioned
from vlpfast.data.regions import with_regions
from vlpfast.data.scores import kept
from vlpfast.data.tokenizer import Tokenizer, find_clip_vocabulary


def open_index(config: DataConfig) -> Index:
    """The index of `config.path` with its identity and selection; built first if need be.

    Where `config.regions` is "files", samples without regions are left out; of the rest,
    `config.scores` leaves out those of low scores. Captions are those in `config.recaptions`.
    """
    index = Index.open(
        config.path,
        index_dir=config.index_dir or None,
        id_key=config.id_key,
        image_key=config.image_key,
        caption_key=config.caption_key,
        verify=config.verify,
        require_captions=needs_captions(config.tasks),
    )
    if config.recaptions:
        index = recaptioned(index, config.recaptions)
    index = with_regions(index.where(config.conditions), config.regions)
    if not config.scores:
        return index
    return kept(
        index, config.scores, min_score=config.min_score, keep_fraction=config.keep_fraction
    )


def make_tokenizer(config: DataConfig, index: Index) -> Tokenizer:
    """The configured tokenizer, with the configured location tokens: trained on all captions of
    `index`, CLIP's, or one from a file.
    """
    return _make_tokenizer(config, index).with_locations(config.locations)


def _make_tokenizer(config: DataConfig, index: Index) -> Tokenizer:
    if config.tokenizer == "train":
        texts = itertools.chain(index.iter_captions(), iter_texts(index, config.tasks))
        return Tokenizer.train(texts, config.vocab_size)
    if config.tokenizer == "clip":
        return Tokenizer.clip(find_clip_vocabulary())
    if config.tokenizer.endswith((".txt", ".txt.gz")):
        return Tokenizer.clip(config.tokenizer)
    return Tokenizer.load(config.tokenizer)


def choose_loader(config: DataConfig, *, pairs: bool = False) -> str:
    """The loader that `config` gets here, "dali" or "torch".

    "auto" is DALI on a GPU. On CPU Pillow takes fewer CPU seconds an image (1.3 to 1.9 times, by
    size), and those are the training step's.

    Raises RuntimeError if DALI is asked for by name and is not installed, ValueError if it is for
    texts about two images (`pairs`).
    """
    if config.loader == "dali" and pairs:
        raise ValueError("texts about two images are loaded by 'torch': data.loader is 'dali'")
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if config.loader == "dali" and not installed:
        raise RuntimeError(
            "loader 'dali' needs the package nvidia-dali-cuda130, which is not installed"
        )
    if config.loader == "auto" and (config.max_aspect > 1 or pairs):
        return "torch"
    if config.loader == "auto":
        return "dali" if installed and torch.cuda.is_available() else "torch"
    return config.loader


def make_loader(
    index: Index,
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    image_size: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    train: bool = True,
    start_step: int = 0,
    num_codes: int = 0,
) -> TorchLoader:
    """Batches of `index` for one rank.

    Args:
        index: from `open_index`.
        config: how images and captions are drawn.
        tokenizer: from `make_tokenizer`.
        image_size: S; images come as (B, S, S, 3), or with `config.max_aspect` as large as the
            largest of the batch, S their shorter side.
        batch_size: B, per rank.
        seed: of the run; with the place in the stream it decides order, crops, captions and masks.
        rank, world: this process and their number.
        train: endless from `start_step`; else one pass over this rank's share in order, evaluation
            crop, caption 0.
        start_step: first step of a resumed run.
        num_codes: of an image, for the task "image".

    Returns: an iterable of `Batch`, with `corrupt` and `close()`.
    """
    kind = TorchLoader
    if choose_loader(config, pairs=index.has_pairs) == "dali":
        from vlpfast.data.loader_dali import DaliLoader

        kind = DaliLoader
    return kind(
        index,
        config,
        tokenizer=tokenizer,
        image_size=image_size,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world=world,
        train=train,
        start_step=start_step,
        num_codes=num_codes,
    )
