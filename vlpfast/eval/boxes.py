"""Boxes that a model writes as location tokens: overlap with the true ones, with the true image and
with another, and what the best box that is the same for all reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.data.index import Index
from vlpfast.data.locations import Box, bins_box, named_objects
from vlpfast.data.prompts import TASKS
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.probe import binomial_interval, derange
from vlpfast.eval.report import EvalResult
from vlpfast.models.generate import SearchOptions, generate
from vlpfast.models.vlp import VLPModel
from vlpfast.ragged import Ragged

# A box is found where it overlaps the true one by more.
FOUND = 0.5
# Boxes of the data that are tried as the same answer for all.
_MAX_CONSTANTS = 1024


def overlaps(one: Tensor, two: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) and (..., 4), x1 y1 x2 y2 -> (...); 0 where one has
    no area.
    """
    low, high = torch.maximum(one[..., :2], two[..., :2]), torch.minimum(one[..., 2:], two[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area = lambda boxes: (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    union = area(one) + area(two) - common
    return common / union.clamp(min=1e-12)


def best_constants(boxes: Tensor) -> tuple[float, float]:
    """The largest share of boxes (N, 4) found, and the largest mean overlap, of one box for all:
    of up to `_MAX_CONSTANTS` of them, spread over the data, and squares in the centre.
    """
    side = torch.arange(0.05, 1.0, 0.05, dtype=boxes.dtype)[:, None]
    centred = torch.cat([0.5 - side / 2] * 2 + [0.5 + side / 2] * 2, 1)
    some = boxes[:: -(-len(boxes) // _MAX_CONSTANTS)]
    found = mean = 0.0
    for part in torch.cat([centred, some]).split(128):
        overlap = overlaps(part[:, None], boxes)
        found = max(found, float((overlap > FOUND).double().mean(1).max()))
        mean = max(mean, float(overlap.mean(1).max()))
    return found, mean


@torch.inference_mode()
def written_boxes(
    model: VLPModel, keys: Ragged, kv_index: Tensor, prompt: Ragged, tokenizer: Tokenizer
) -> Tensor:
    """The likeliest box after each prompt, (R, 4) fp64, as x1 y1 x2 y2: four location tokens, which
    alone are allowed before the end.

    Args:
        model: in eval mode, with a prompt encoder.
        keys: `VLPModel.image_keys`.
        kv_index (R,): int64, the image of each prompt.
        prompt: packed token ids of R prompts.
        tokenizer: with location tokens.
    """
    bins = tokenizer.locations
    search = SearchOptions(
        tokenizer.start_id,
        tokenizer.end_id,
        max_tokens=6,
        min_tokens=6,
        allowed=(bins.start, bins.stop),
    )
    sources = model.read(keys, kv_index, prompt)
    ids = generate(model, sources, len(prompt), search).text.values.view(-1, 6)[:, 1:5]
    boxes = [bins_box(row, len(bins)) for row in (ids - bins.start).tolist()]
    return torch.tensor(boxes, dtype=torch.float64)


def box_probe(
    model: nn.Module,
    batches: Iterable[Batch],
    index: Index,
    tokenizer: Tokenizer,
    *,
    crops: Callable[[Tensor], np.ndarray],
    max_tokens: int,
    seed: int = 0,
) -> EvalResult:
    """Share of objects whose box is found (overlap > 0.5), and mean overlap, each object asked for
    by its name; with the true image and with another of the batch, which knows no more than how
    boxes of that name lie. Chance is the best box that is the same for all.

    Args:
        model: in eval mode, with a prompt encoder.
        batches: images and sample ids.
        index: whose records have objects (`data.locations.named_objects`).
        tokenizer: the model's, with location tokens.
        crops: of sample ids (B,), the shown parts (B, 4) of their images.
        max_tokens: longer prompts lose their tail.
        seed: of the choice of the other image.
    """
    if not tokenizer.locations:
        raise ValueError("box: the run's vocabulary has no location tokens: train with locations")
    told: tuple[list[Tensor], list[Tensor]] = ([], [])
    truth: list[Tensor] = []
    num_samples = 0
    for batch in batches:
        partner, differs = derange(batch.image_ids, seed=seed)
        asked = _asked(batch, index, crops(batch.sample_ids), differs)
        if not asked:
            continue
        rows, names, boxes = zip(*asked, strict=True)
        num_samples += len(set(rows))
        truth.append(torch.tensor(boxes, dtype=torch.float64))
        questions = [TASKS["box"][1].format(name=name) for name in names]
        prompt = Ragged.from_lists(tokenizer.encode(questions, max_tokens), model.device)
        images = batch.visual(model.config.vision.front).to(model.device)
        keys, own = model.image_keys(model.encode_image(images).tokens), torch.tensor(rows)
        for part, shown in zip(told, (own, partner[own]), strict=True):
            part.append(written_boxes(model, keys, shown.to(model.device), prompt, tokenizer))
    if not truth:
        raise ValueError("box: no object of its own name, or no two images to compare")
    return _result([torch.cat(part) for part in told], torch.cat(truth), num_samples)


def _asked(
    batch: Batch, index: Index, crops: np.ndarray, differs: Tensor
) -> list[tuple[int, str, Box]]:
    """(row, name, box) of the objects of the rows that `differs` (B,)."""
    asked = []
    for row in differs.nonzero()[:, 0].tolist():
        record = index.record(int(batch.sample_ids[row]))
        if "objects" not in record:
            raise ValueError(f"box: a record without 'objects', found {sorted(record)}")
        asked += [(row, *found) for found in named_objects(record, tuple(crops[row]))]
    return asked


def _result(told: list[Tensor], truth: Tensor, num_samples: int) -> EvalResult:
    metrics = {}
    for prefix, boxes in zip(("", "shuffled_"), told, strict=True):
        overlap = overlaps(boxes, truth)
        metrics[f"{prefix}box_accuracy"] = 100 * float((overlap > FOUND).double().mean())
        metrics[f"{prefix}mean_iou"] = 100 * float(overlap.mean())
    found, mean = best_constants(truth)
    return EvalResult(
        "box",
        metrics=metrics,
        chance={"box_accuracy": 100 * found, "mean_iou": 100 * mean},
        counts={"num_samples": num_samples, "num_boxes": len(truth)},
        intervals={"box_accuracy": binomial_interval(metrics["box_accuracy"], len(truth))},
    )
