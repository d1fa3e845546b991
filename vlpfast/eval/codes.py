"""Probes of codes and patches: how a tokenizer uses its codes, how well hidden codes are told, and
those of an image that a caption describes; and what a linear map reads out of the patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.data.masking import mask_patches
from vlpfast.eval.probe import derange
from vlpfast.eval.report import EvalResult

# Of a generated scene's objects, what the linear probe asks for.
_READ_OUT = ("shape", "color")
# Of which logits are made at once.
_ROWS = 4096
# Of the mean square of the features, added to the diagonal: the probe is ridge regression.
_RIDGE = 1e-3


class Codes(Protocol):
    """A frozen tokenizer."""

    def image_codes(self, images: Tensor) -> Tensor:
        """(B, P) int64 of images (B, S, S, 3) uint8."""


class Records(Protocol):
    """What `linear_probe` needs of an index."""

    def record(self, sample_id: int) -> Mapping[str, object]:
        """The fields of a sample, `objects` among them."""


@torch.inference_mode()
def codes_probe(model: nn.Module, batches: Iterable[Batch]) -> EvalResult:
    """Share of a tokenizer's codes that occur in the data, and the perplexity of their distribution
    as a share of their number. Chance is a tokenizer that gives every patch one code.

    Args:
        model: a tokenizer in eval mode.
        batches: of images.
    """
    size, num_images = model.config.codebook.size, 0
    seen = torch.zeros(size, dtype=torch.int64)
    for batch in batches:
        seen += (
            model.image_codes(batch.images.to(model.device)).flatten().cpu().bincount(None, size)
        )
        num_images += len(batch)
    share = seen / max(1, int(seen.sum()))
    entropy = float(torch.special.entr(share).sum())
    use = {"codebook_use": 100 * int((seen > 0).sum()) / size}
    use["codebook_perplexity"] = 100 * math.exp(entropy) / size
    counts = {"num_images": num_images, "num_codes": size}
    return EvalResult("codes", use, dict.fromkeys(use, 100 / size), counts)


@torch.inference_mode()
def mim_probe(
    model: nn.Module, batches: Iterable[Batch], guide: Codes, *, probability: float, seed: int = 0
) -> EvalResult:
    """Accuracy of the codes of hidden patches, by the tower and by the class token's head; and by
    the tower among the visible patches of another image of the batch. Chance is the share of the
    most frequent code. Images whose batch holds no other one are left out of all.

    Args:
        model: in eval mode, with a code head.
        batches: of images; their patches are hidden here, by `seed` and sample.
        guide: the tokenizer that the model learned from.
        probability: share of patches hidden.
        seed: of the masks and of the choice of the other image.
    """
    num_patches, device = model.config.num_patches, model.device
    num_hidden = max(1, round(probability * num_patches))
    hits: dict[str, Tensor] = {}
    seen = torch.zeros(model.config.codes, dtype=torch.int64, device=device)
    for batch in batches:
        ids = mask_patches(
            num_hidden, math.isqrt(num_patches), seed=seed, positions=batch.sample_ids
        ).to(device)
        images = batch.images.to(device)
        partner, differs = (part.to(device) for part in derange(batch.image_ids, seed=seed))
        target = guide.image_codes(images).gather(1, ids)
        seen += target[differs].flatten().bincount(minlength=len(seen))
        hidden = torch.zeros(len(batch), num_patches, dtype=torch.bool, device=device)
        hidden.scatter_(1, ids, True)
        masked = model.encode_image(images, hidden=hidden)
        read = {"": model.image_states(masked.tokens), "class_head_": masked.class_head}
        shuffled = model.encode_image(images[partner], hidden=hidden).tokens
        read["shuffled_"] = model.image_states(shuffled)
        for name, tokens in read.items():
            if tokens is not None:
                told = model.code_logits(model.patches(tokens).take_along_dim(ids[..., None], 1))
                right = (told.argmax(-1) == target)[differs].sum()
                hits[name] = hits.get(name, 0) + right
    total = int(seen.sum())
    if not total:
        raise ValueError("mim: the data is empty, or every batch holds a single image")
    return EvalResult(
        "mim",
        metrics={f"{name}mim_accuracy": 100 * int(hit) / total for name, hit in hits.items()},
        chance={"mim_accuracy": 100 * int(seen.max()) / total},
        counts={"num_images": total // num_hidden, "num_hidden": total},
    )


@torch.inference_mode()
def image_probe(model: nn.Module, batches: Iterable[Batch], *, seed: int = 0) -> EvalResult:
    """Accuracy of each code of images that are written, the true codes before it given, from the
    true caption and from another's of the batch. Chance is the share of the most frequent code.
    Images whose batch holds no other one are left out.

    Args:
        model: in eval mode, with image codes in its vocabulary.
        batches: on any device, of prompts that ask for images and of texts that are their codes
            (`Guide.fill`).
        seed: of the choice of the other caption.
    """
    text_config, device = model.config.text, model.device
    first, size = text_config.vocab_size, text_config.image_codes
    hits, num_images = torch.zeros(2, dtype=torch.int64, device=device), 0
    seen = torch.zeros(size, dtype=torch.int64, device=device)
    for batch in batches:
        partner, differs = derange(batch.image_ids.cpu(), seed=seed)
        kept = differs.nonzero()[:, 0]
        text, prompt = batch.text.to(device).select(kept.to(device)), batch.prompt.to(device)
        own = torch.arange(len(kept), device=device)
        places = text.but_last()
        target = text.values[places + 1]
        is_code = target >= first
        seen += (target[is_code] - first).bincount(minlength=size)
        num_images += len(kept)
        for case, shown in enumerate((kept, partner[kept])):
            sources = model.read(None, own, prompt.select(shown.to(device)))
            states = model.decode(text, sources, own).values[places]
            told = [model.next_token_logits(part).argmax(-1) for part in states.split(_ROWS)]
            hits[case] += (torch.cat(told) == target)[is_code].sum()
    total = int(seen.sum())
    if not total:
        raise ValueError("image: the data is empty, or every batch holds a single image")
    names = ("code_accuracy", "other_caption_code_accuracy")
    return EvalResult(
        "image",
        metrics={name: 100 * hit / total for name, hit in zip(names, hits.tolist(), strict=True)},
        chance={"code_accuracy": 100 * int(seen.max()) / total},
        counts={"num_images": num_images, "num_codes": total},
    )


@torch.inference_mode()
def linear_probe(
    model: nn.Module, control: nn.Module, batches: Iterable[Batch], records: Records
) -> EvalResult:
    """Whether a linear map of the mean patch tells which shapes and colours an image shows: the
    mean over them of the area under the ROC curve.

    Ridge regression on every other sample, scored on the rest. `random_linear_auc` is the same of
    `control`. Chance is 50.

    Args:
        model: in eval mode, with a vision tower.
        control: the same with random weights.
        batches: of images.
        records: an index of generated scenes.
    """
    rows: list[set[tuple[str, str]]] = []
    features: dict[str, list[Tensor]] = {"": [], "random_": []}
    for batch in batches:
        rows += [_shown(records.record(i)) for i in batch.sample_ids.tolist()]
        images = batch.images.to(model.device)
        for name, encoder in (("", model), ("random_", control)):
            tokens = encoder.patches(encoder.image_states(encoder.encode_image(images).tokens))
            features[name].append(tokens.double().mean(1).cpu())
    things = sorted(set().union(*rows))
    labels = torch.tensor([[thing in row for thing in things] for row in rows])
    # What both halves have, and lack.
    split = [labels[half::2] for half in (0, 1)]
    told = torch.stack([part.any(0) & ~part.all(0) for part in split]).all(0)
    if not told.any():
        raise ValueError("linear: nothing is shown by some images and not by others in both halves")
    labels = labels[:, told]
    metrics = {
        f"{name}linear_auc": 100 * _readout(torch.cat(parts), labels).item()
        for name, parts in features.items()
    }
    counts = {"num_images": len(rows), "num_labels": labels.shape[1]}
    return EvalResult("linear", metrics, {"linear_auc": 50.0}, counts)


def _shown(record: Mapping[str, object]) -> set[tuple[str, str]]:
    if not isinstance(record.get("objects"), list):
        raise ValueError("linear reads generated scenes: their records say which objects are shown")
    return {(field, o[field]) for o in record["objects"] for field in _READ_OUT}


def _readout(x: Tensor, labels: Tensor) -> Tensor:
    """Mean area under the ROC curve on odd rows of ridge regression on even ones."""
    x = x - x[::2].mean(0)
    x = x / x[::2].std(0).clamp(min=1e-12)
    y = labels.to(x.dtype)
    even = x[::2]
    gram = even.T @ even + _RIDGE * len(even) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, even.T @ (y[::2] - y[::2].mean(0)))
    return area_under_roc(x[1::2] @ weight, labels[1::2]).mean()


def area_under_roc(scores: Tensor, labels: Tensor) -> Tensor:
    """Share of (positive, negative) pairs in which the positive scores higher, an equal score one
    half: (L,) of scores (n, L) and labels (n, L) bool.
    """
    ordered = scores.sort(0).values.T.contiguous()
    columns = scores.T.contiguous()
    below = torch.searchsorted(ordered, columns)
    upto = torch.searchsorted(ordered, columns, right=True)
    positive = labels.sum(0)
    # Mean rank of the positives, less what they rank above each other.
    ranks = ((below + upto).T * labels).sum(0) / 2
    return (ranks - positive.square() / 2) / (positive * (len(labels) - positive))
