"""CapFilt: a captioner writes a caption for each image, and a filter keeps what fits it, of what
was written and of what the web said.

Source: Li et al. 2022 (BLIP), section 3.3, arXiv:2201.12086.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from pathlib import Path
from typing import Literal

import torch
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
from vlpfast.data.index import Index
from vlpfast.data.loader import open_index
from vlpfast.data.recaptions import captions_in, finish_captions, write_captions
from vlpfast.data.sidecar import Part, rows_in
from vlpfast.eval.load import LoadedRun, load_run
from vlpfast.eval.pairs import Metric, check_metric, pair_scores
from vlpfast.models.presets import missing
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.rules import check_rules
from vlpfast.train.distributed import local_device

# See `vlpfast.rules`.
_RULES = (
    "{min_tokens must be >= 2}",
    "{max_tokens must be >= 0}",
    "{seed must be >= 0}",
    "{batch_size must be >= 1}",
    "{pairs_per_call must be >= 1}",
    "{top_p must be in (0, 1]}",
)
# Of a run's data, what decides how an image is shown; runs that agree share its decoding.
_SHOWN = ("regions", "eval_crop", "max_aspect", "size_multiple", "interpolation", "loader")


@dataclass(frozen=True)
class CapFiltOptions:
    """How captions are written and filtered.

    Attributes:
        metric: by which the filter judges, as `clean.score.ScoreOptions`.
        min_score: of a caption that stays. BLIP's filter calls a pair noisy that it thinks more
            likely not to match.
        captions: places of a sample's own captions that are judged, the others do not stay; empty:
            those that the filter was trained on. Of a sample that has none of these, all are.
        top_p: captions are drawn of the nucleus that holds this much probability (BLIP: 0.9).
        min_tokens: of a caption that is written, start and end token included.
        max_tokens: likewise; 0 takes the captioner's own bound.
        seed: with a sample's place in the data it decides what is written about it.
        batch_size: images at once.
        pairs_per_call: image-text pairs matched at once.
        progress: show a bar where the terminal can.
    """

    metric: Metric = "match"
    min_score: float = 0.5
    captions: tuple[int, ...] = ()
    top_p: float = 0.9
    min_tokens: int = 2
    max_tokens: int = 0
    seed: int = 0
    batch_size: int = 64
    pairs_per_call: int = 512
    progress: bool = True

    def __post_init__(self) -> None:
        check_rules(self, _RULES)
        check_places(self.captions)


def capfilt(
    captioner_dir: str | Path,
    filter_dir: str | Path,
    data: str | Path,
    out: str | Path,
    options: CapFiltOptions | None = None,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> dict[str, object]:
    """Writes what stays of each image's own captions and of a new one into the folder `out`
    (`vlpfast.data.recaptions`), which `data.recaptions` of a run names.

    Memory, resuming and several processes are as in `clean.score.score`. What is written about a
    sample depends on the seed and on its place in the data alone, but for a draw that rounding
    moves.

    Args:
        captioner_dir: run folder of a model that writes captions without a prompt.
        filter_dir: run folder of a model that gives `options.metric`; may be the same.
        data: folder of shards, or a table, as in training.
        out: made if missing.
        options: `CapFiltOptions()` if None.
        device: "auto" is a GPU where there is one.

    Returns: what captions.json says, with `finished`: whether all shards are done. `num_web` and
        `num_synthetic` captions were judged, of which `num_web_kept` and `num_synthetic_kept` stay;
        `num_kept` of `num_samples` samples have a caption.

    Raises:
        ValueError: a model cannot do its part, or `out` has something else.
    """
    options, files = options or CapFiltOptions(), captions_in(out)
    captioner = load_run(captioner_dir, device=local_device(device))
    judge = load_run(filter_dir, device=local_device(device))
    check_metric(options.metric, judge.model.config, judge.objectives)
    options = replace(
        options,
        max_tokens=options.max_tokens or captioner.data.max_tokens,
        captions=options.captions or judge.data.captions,
    )
    _check_captioner(captioner, options)
    configs = [data_config(run.data, data) for run in (captioner, judge)]
    index = open_index(configs[1])
    made_by = {
        "metric": options.metric,
        "min_score": options.min_score,
        "captions": list(options.captions),
        "top_p": options.top_p,
        "min_tokens": options.min_tokens,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
        "captioner": str(captioner_dir),
        "captioner_weights": str(captioner.weights),
        "captioner_sha256": file_sha256(captioner.weights),
        "run": str(filter_dir),
        "weights": str(judge.weights),
        "weights_sha256": file_sha256(judge.weights),
    }
    files.begin(index, made_by)
    work = CapFilt(captioner, judge, index, configs, options)
    mine = unfinished(files, index)
    with progress_bar("capfilt", index, mine, options.progress) as bar:
        for part in mine:
            corrupt: dict[str, str] = {}
            write_captions(files, part, work.lines(part, corrupt, bar), corrupt)
    done = finish_captions(files, index)
    return {**(done or files.description()), "finished": done is not None}


def _check_captioner(run: LoadedRun, options: CapFiltOptions) -> None:
    config = run.model.config
    if "a text decoder" not in config.parts:
        raise ValueError(f"capfilt: {missing(config.preset, 'a text decoder')}")
    if run.data.tasks or not run.objectives.lm:
        raise ValueError(
            "capfilt needs a captioner that was trained to write captions without a prompt "
            f"(objectives.lm > 0, data.tasks empty), got objectives.lm {run.objectives.lm} and "
            f"data.tasks {run.data.tasks}"
        )
    if not options.min_tokens <= options.max_tokens <= config.text.context_length:
        raise ValueError(
            f"max_tokens must be in min_tokens {options.min_tokens} .. the captioner's context "
            f"{config.text.context_length}, got {options.max_tokens}"
        )


class CapFilt:
    """Writes and filters captions of one part after the other; `configs` are how captioner and
    filter read the data.
    """

    def __init__(
        self,
        captioner: LoadedRun,
        judge: LoadedRun,
        index: Index,
        configs: Sequence[DataConfig],
        options: CapFiltOptions,
    ) -> None:
        self.captioner, self.judge, self.configs = captioner, judge, configs
        self.index, self.options = index, options

    def lines(self, part: Part, corrupt: dict[str, str], bar: tqdm) -> Iterator[dict[str, object]]:
        """What `recaptions.write_captions` takes: one line for each row of a part."""
        chosen = replace(self.index, rows=rows_in(self.index, part))
        row = part.first
        for shown, judged in self._batches(chosen, corrupt, bar):
            rows = chosen.rows_of(shown.sample_ids.numpy())
            lines = self.batch_lines(chosen, shown, judged)
            for own, line in zip(rows.tolist(), lines, strict=True):
                yield from repeat(_NOTHING, own - row)
                yield line
                row = own + 1
        yield from repeat(_NOTHING, part.last - row)

    def _batches(
        self, chosen: Index, corrupt: dict[str, str], bar: tqdm
    ) -> Iterator[tuple[Batch, Batch]]:
        """Each batch as the captioner sees it, and as the filter does: one where they see alike."""
        size = self.options.batch_size
        shown = batches(chosen, self.captioner, self.configs[0], size, corrupt, bar)
        if self._see_alike():
            yield from ((batch, batch) for batch in shown)
            return
        silent = tqdm(disable=True)
        judged = batches(chosen, self.judge, self.configs[1], size, corrupt, silent)
        for pair in zip(shown, judged, strict=True):
            ids = [batch.sample_ids for batch in pair]
            if not torch.equal(*ids):
                raise ValueError(f"{chosen.source} changed while it was read: {corrupt}")
            yield pair

    def _see_alike(self) -> bool:
        sides = {run.model.config.image_size for run in (self.captioner, self.judge)}
        seen = [[getattr(config, name) for name in _SHOWN] for config in self.configs]
        return len(sides) == 1 and seen[0] == seen[1]

    def batch_lines(self, index: Index, shown: Batch, judged: Batch) -> list[dict[str, object]]:
        """One line for each of a batch's images."""
        written = self.write(index, shown)
        web = self._own(index, judged)
        texts = [[*own, *new] for own, new in zip(web, written, strict=True)]
        scores = self.score(judged, texts)
        return [
            self._line(own, new, found)
            for own, new, found in zip(web, written, scores, strict=True)
        ]

    def _own(self, index: Index, batch: Batch) -> list[list[str]]:
        """The captions that each image came with and that are judged."""
        places = self.options.captions
        every = [index.captions(i) for i in batch.sample_ids.tolist()]
        return [[c for n, c in enumerate(own) if n in places] or own for own in every]

    def _line(self, web: list[str], written: list[str], scores: list[float]) -> dict[str, object]:
        good = [score >= self.options.min_score for score in scores]
        kept = [text for text, fits in zip([*web, *written], good, strict=True) if fits]
        split = len(web)
        return {
            # The same words twice are one caption.
            "captions": list(dict.fromkeys(kept)),
            "web_scores": scores[:split],
            "written": written,
            "written_scores": scores[split:],
            "web": split,
            "web_kept": sum(good[:split]),
            "synthetic": len(written),
            "synthetic_kept": sum(good[split:]),
        }

    @torch.inference_mode()
    def write(self, index: Index, batch: Batch) -> list[list[str]]:
        """What the captioner writes of each image: one caption, none where it has no words."""
        model, tokenizer = self.captioner.model, self.captioner.tokenizer
        rows = index.rows_of(batch.sample_ids.numpy()).tolist()
        text = model.generate(
            batch.to(model.device).visual(model.config.vision.front),
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            max_tokens=self.options.max_tokens,
            min_tokens=self.options.min_tokens,
            banned=tuple(i for i in tokenizer.special_ids if i != tokenizer.end_id),
            seeds=tuple(fold_seed(self.options.seed, row) for row in rows),
            top_p=self.options.top_p,
        ).text
        ids, ends = text.values.tolist(), text.cu_seqlens.tolist()
        texts = [tokenizer.decode(ids[a:b]).strip() for a, b in pairwise(ends)]
        return [[text] if text else [] for text in texts]

    @torch.inference_mode()
    def score(self, batch: Batch, texts: list[list[str]]) -> list[list[float]]:
        """The filter's score of each text of each image."""
        model, tokenizer = self.judge.model, self.judge.tokenizer
        every = [text for own in texts for text in own]
        lens = torch.tensor([len(own) for own in texts])
        packed = Ragged.from_lists(tokenizer.encode(every, self.judge.data.max_tokens))
        scores = pair_scores(
            model,
            self.options.metric,
            batch.to(model.device).visual(model.config.vision.front),
            packed.to(model.device),
            torch.arange(len(texts)).repeat_interleave(lens).to(model.device),
            pairs_per_call=self.options.pairs_per_call,
        ).cpu()
        if not scores.isfinite().all():
            raise ValueError(f"{self.judge.weights} gives scores that are not finite")
        return [own.tolist() for own in scores.split(lens.tolist())]


_NOTHING: Mapping[str, object] = {
    "captions": [],
    "web": 0,
    "web_kept": 0,
    "synthetic": 0,
    "synthetic_kept": 0,
}
