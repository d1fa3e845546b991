"""What scoring and rewriting a data set share: a run's own parts of it, read batch by batch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from vlpfast.data.batch import Batch
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader
from vlpfast.data.sidecar import Part, Sidecar, num_parts, part, rows_in
from vlpfast.eval.load import LoadedRun


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


def check_places(captions: tuple[int, ...]) -> None:
    """Raises ValueError where a place of captions counts from the end."""
    if any(place < 0 for place in captions):
        raise ValueError(f"captions must be places >= 0, got {captions}")
