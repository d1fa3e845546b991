"""Scores every pair of a data set by a trained model, shard by shard."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vlpfast.data.batch import Batch
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index, TokenTable
from vlpfast.data.loader import make_loader, open_index
from vlpfast.data.scores import finish_scores, scores_in, write_scores
from vlpfast.data.sidecar import Part, Sidecar, num_parts, part, rows_in
from vlpfast.eval.load import LoadedRun, load_run
from vlpfast.eval.pairs import Metric, check_metric, sample_scores


@dataclass(frozen=True)
class ScoreOptions:
    """How pairs are scored.

    Attributes:
        metric: "similarity", the cosine in a joint space (CLIP score), or "match", the probability
            that a matching head gives.
        captions: places of the captions that are scored of each sample, whose score is their mean;
            empty: those that the run was trained on. A sample that has none of these is scored by
            all it has.
        batch_size: images encoded at once.
        pairs_per_call: image-text pairs matched at once.
        precision: "fp32", or "amp_bf16": forward under bf16 autocast.
        progress: show a bar where the terminal can.
    """

    metric: Metric = "similarity"
    captions: tuple[int, ...] = ()
    batch_size: int = 128
    pairs_per_call: int = 512
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "pairs_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if any(place < 0 for place in self.captions):
            raise ValueError(f"captions must be places >= 0, got {self.captions}")
        if self.precision not in ("fp32", "amp_bf16"):
            raise ValueError(f"precision must be 'fp32' or 'amp_bf16', got {self.precision!r}")


def score(
    run_dir: str | Path,
    data: str | Path,
    out: str | Path,
    options: ScoreOptions | None = None,
    *,
    weights: str = "latest",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> dict[str, object]:
    """Writes the scores of all valid samples of `data` into the folder `out` (`data.scores`).

    Memory is a batch's, whatever the size of the data. Shards that have their scores are left
    alone, so a call that was stopped goes on where it was. Processes that torchrun started, or
    others with RANK and WORLD_SIZE set, take shards in turn and need not wait for each other.

    Args:
        run_dir: of a model that gives `options.metric`.
        data: folder of shards, or a table, as in training.
        out: made if missing.
        options: `ScoreOptions()` if None.
        weights, device: as `eval.load.load_run`.

    Returns: what scores.json says, with `finished`: whether all shards have their scores; else
        other processes still work at theirs.

    Raises:
        ValueError: the model cannot give the metric, or `out` has other scores.
    """
    options, files = options or ScoreOptions(), scores_in(out)
    run = load_run(run_dir, weights=weights, device=own_device(device))
    check_metric(options.metric, run.model.config, run.objectives)
    config = data_config(run.data, data)
    options = replace(options, captions=options.captions or run.data.captions)
    index = open_index(config)
    made_by = {
        "metric": options.metric,
        "captions": list(options.captions),
        "precision": options.precision,
        "run": str(run_dir),
        "weights": str(run.weights),
        "weights_sha256": file_sha256(run.weights),
    }
    files.begin(index, made_by)
    scorer = Scorer(run, index, config, options)
    mine = unfinished(files, index)
    with progress_bar("score", index, mine, options.progress) as bar:
        for chosen in mine:
            write_scores(files, chosen, *scorer.scores(chosen, bar))
    done = finish_scores(files, index)
    return {**(done or files.description()), "finished": done is not None}


class Scorer:
    """Scores the samples of one part after the other with the model of a run."""

    def __init__(
        self, run: LoadedRun, index: Index, config: DataConfig, options: ScoreOptions
    ) -> None:
        self.run, self.index, self.config, self.options = run, index, config, options
        self.tokens: TokenTable = index.tokens(run.tokenizer, config.max_tokens)

    def scores(self, part: Part, bar: tqdm) -> tuple[np.ndarray, dict[str, str]]:
        """Float32 scores of a part's rows, NaN where a sample cannot be read or is none of the
        index's, and why those that are cannot.
        """
        found = np.full(part.num_rows, np.nan, np.float32)
        corrupt: dict[str, str] = {}
        chosen = replace(self.index, rows=rows_in(self.index, part))
        for batch in batches(chosen, self.run, self.config, self.options.batch_size, corrupt, bar):
            rows = chosen.rows_of(batch.sample_ids.numpy())
            found[rows - part.first] = self.score_batch(chosen, batch).numpy()
        return found, corrupt

    def score_batch(self, index: Index, batch: Batch) -> Tensor:
        """(B,) fp32 on the CPU."""
        model, bf16 = self.run.model, self.options.precision == "amp_bf16"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            found = sample_scores(
                model,
                self.options.metric,
                batch,
                index,
                self.tokens,
                captions=self.options.captions,
                pairs_per_call=self.options.pairs_per_call,
            )
        if not found.isfinite().all():
            name = index.name(int(batch.sample_ids[~found.isfinite()][0]))
            raise ValueError(f"{self.run.weights} gives {name} a score that is not finite")
        return found


def batches(
    index: Index,
    run: LoadedRun,
    config: DataConfig,
    batch_size: int,
    corrupt: dict[str, str],
    bar: tqdm,
) -> Iterator[Batch]:
    """One pass over `index`; names in `corrupt` what cannot be read."""
    if not len(index):
        return
    loader = make_loader(
        index,
        config,
        tokenizer=run.tokenizer,
        image_size=run.model.config.image_size,
        batch_size=batch_size,
        seed=0,
        train=False,
    )
    with contextlib.closing(loader):
        for batch in loader:
            if len(batch):
                yield batch
            bar.update(len(batch))
        corrupt.update(loader.corrupt)


def data_config(data: DataConfig, path: str | Path) -> DataConfig:
    """How a run trained on `data` reads the whole of other data, to score it."""
    return replace(
        data.unfiltered(),
        path=str(path),
        index_dir="",
        id_key="",
        tasks=(),
        answers=0,
        classes="",
        cache_gib=0.0,
    )


def unfinished(files: Sidecar, index: Index) -> list[Part]:
    """The parts of this process, every WORLD_SIZE-th, that are not finished."""
    rank, world = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    own = (part(index, number) for number in range(rank, num_parts(index), world))
    return [chosen for chosen in own if not files.is_finished(chosen)]


def progress_bar(what: str, index: Index, mine: list[Part], progress: bool) -> tqdm:
    """Progress over the samples of parts."""
    total = sum(len(rows_in(index, chosen)) for chosen in mine)
    hidden = not (progress and sys.stderr.isatty())
    return tqdm(desc=what, total=total, unit="img", disable=hidden)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_device(device: str) -> str:
    """The device of this of several processes of a machine."""
    chosen = "cuda" if device == "auto" and torch.cuda.is_available() else device
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if chosen == "cuda" and local is not None else chosen
