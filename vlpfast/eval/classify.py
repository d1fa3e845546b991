"""Zero-shot classification: images ranked against class names, which training may not have seen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from vlpfast.data.batch import Batch
from vlpfast.data.classes import ClassTable
from vlpfast.data.index import Index
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.probe import binomial_interval
from vlpfast.eval.report import EvalResult
from vlpfast.ragged import Ragged


@torch.inference_mode()
def classify_probe(
    model: nn.Module,
    batches: Iterable[Batch],
    index: Index,
    classes: ClassTable,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
) -> EvalResult:
    """Share of images whose most similar class name is one of theirs.

    Chance guesses a name at random. Images without a class are passed over.

    Args:
        model: in eval mode, with a joint space.
        batches: images and sample ids.
        index: of the samples.
        classes: its class table.
        tokenizer: of the names.
        max_tokens: longer names lose their tail.
    """
    if not classes.names:
        raise ValueError("classify: the data has no class name")
    ids = Ragged.from_lists(tokenizer.encode(classes.names, max_tokens), model.device)
    names = model.encode_text(ids, with_tokens=False).embedding
    hits = num_images = num_right = 0
    for batch in batches:
        rows = index.rows_of(batch.sample_ids.cpu().numpy())
        truth = torch.zeros(len(batch), len(classes.names), dtype=torch.bool)
        for i, row in enumerate(rows):
            truth[i, classes.of(int(row))] = True
        shown = truth.any(1)
        images = batch.visual(model.config.vision.front).to(model.device)
        guess = (model.encode_image(images, with_tokens=False).embedding @ names.mT).argmax(1).cpu()
        hits += int((truth[torch.arange(len(batch)), guess] & shown).sum())
        num_images += int(shown.sum())
        num_right += int(truth.sum())
    if not num_images:
        raise ValueError("classify: no image has a class")
    accuracy = 100 * hits / num_images
    return EvalResult(
        "classify",
        metrics={"accuracy": accuracy},
        chance={"accuracy": 100 * num_right / num_images / len(classes.names)},
        counts={"num_images": num_images, "num_classes": len(classes.names)},
        intervals={"accuracy": binomial_interval(accuracy, num_images)},
    )
