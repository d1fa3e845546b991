"""Scores every pair of a data set by a trained model, shard by shard."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vlpfast.clean.shards import (
    batches,
    check_places,
    data_config,
    file_sha256,
    progress_bar,
    unfinished,
)
from vlpfast.data.batch import Batch
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index, TokenTable
from vlpfast.data.loader import open_index
from vlpfast.data.scores import finish_scores, scores_in, write_scores
from vlpfast.data.sidecar import Part, rows_in
from vlpfast.eval.load import LoadedRun, load_run
from vlpfast.eval.pairs import Metric, check_metric, sample_scores
from vlpfast.rules import check_rules
from vlpfast.train.distributed import local_device

# See `vlpfast.rules`.
_RULES = (
    "{batch_size must be >= 1}",
    "{pairs_per_call must be >= 1}",
    "{precision must be 'fp32' or 'amp_bf16'}",
)


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
        check_rules(self, _RULES)
        check_places(self.captions)


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
    run = load_run(run_dir, weights=weights, device=local_device(device))
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
