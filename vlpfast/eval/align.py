"""Probe of word-region alignment: does a word's transport go to the region it speaks of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.report import EvalResult
from vlpfast.ops.transport import ipot

_NAMED_BY = ("shape", "color")
_SAME_PLACE = 0.5


class Records(Protocol):
    """What `align_probe` needs of an index."""

    def record(self, sample_id: int) -> Mapping[str, object]:
        """The fields of a sample, `objects` among them."""


def overlap(boxes: Tensor, box: Sequence[float]) -> Tensor:
    """Intersection over union (R,) of boxes (R, 4) with one, corners (x1, y1, x2, y2)."""
    other = boxes.new_tensor(box)
    low, high = torch.maximum(boxes[:, :2], other[:2]), torch.minimum(boxes[:, 2:], other[2:])
    shared = (high - low).clamp(min=0).prod(1)
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, other)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-12)


@torch.inference_mode()
def align_probe(
    model: nn.Module, batches: Iterable[Batch], records: Records, tokenizer: Tokenizer
) -> EvalResult:
    """Share of a word's mass that the transport of `ops.ipot` puts on the region it speaks of.

    Of a caption's words those count that name the shape or colour of exactly one object, whose box
    some region has (intersection over union at least 0.5). Chance is an even spread over an image's
    regions; `shuffled_region_mass` is what the same words put there when they read another image's
    regions in fusion: it says how much comes from where in the list a region stands.

    Args:
        model: in eval mode, with fused image tokens, reading regions with boxes.
        batches: with regions; captions are taken as they are.
        records: an index of generated scenes.
        tokenizer: of the captions.
    """
    device = model.device
    mass, even, num_words = torch.zeros(2, device=device), 0.0, 0
    for batch in batches:
        words = [
            (row, place, region)
            for row, sample in enumerate(batch.sample_ids.tolist())
            for place, region in _spoken_of(batch, row, records.record(sample), tokenizer)
        ]
        if not words:
            continue
        rows, places, regions = torch.tensor(words, device=device).unbind(1)
        keys = model.image_keys(model.encode_image(batch.regions.to(device)).tokens)
        text = model.encode_text(batch.text.to(device)).tokens
        own = torch.arange(len(batch), device=device)
        for case, kv_index in enumerate((own, own.roll(1))):
            fused = model.fuse_pairs(text, keys, kv_index)
            (x, x_mask), (y, y_mask) = fused.text.pad(), fused.image.pad()
            plan = ipot(x, y, x_mask, y_mask, return_plan=True).plan[rows, places]
            inside = regions < y_mask[rows].sum(1)
            at = plan.gather(1, regions.clamp(max=plan.shape[1] - 1)[:, None])[:, 0]
            mass[case] += (at * inside / plan.sum(1)).sum()
        even += float((1 / batch.regions.features.lens.to(device)[rows]).sum())
        num_words += len(words)
    if not num_words:
        raise ValueError("align: no caption names an object of its own that a region shows")
    true, shuffled = (100 * m / num_words for m in mass.tolist())
    return EvalResult(
        "align",
        metrics={"region_mass": true, "shuffled_region_mass": shuffled},
        chance={"region_mass": 100 * even / num_words},
        counts={"num_words": num_words},
    )


def _spoken_of(
    batch: Batch, row: int, record: Mapping[str, object], tokenizer: Tokenizer
) -> Iterable[tuple[int, int]]:
    """(place of a word in the caption, region it speaks of), each within its own."""
    objects = record["objects"]
    named = {}
    for key in _NAMED_BY:
        values = [o[key] for o in objects]
        named |= {v: o for v, o in zip(values, objects, strict=True) if values.count(v) == 1}
    start, end = batch.text.cu_seqlens[row : row + 2].tolist()
    first, last = batch.regions.features.cu_seqlens[row : row + 2].tolist()
    boxes = batch.regions.boxes[first:last]
    for place, token in enumerate(batch.text.values[start:end].tolist()):
        thing = named.get(tokenizer.decode([token]).strip())
        if thing is None:
            continue
        best, region = overlap(boxes, thing["box"]).max(0)
        if best >= _SAME_PLACE:
            yield place, int(region)
