"""Probes of what a model takes from the image: masked words with the true and with another image,
and captions told from copies with swapped attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.data.masking import mask_text
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.report import EvalResult
from vlpfast.ops.reference import counter
from vlpfast.ragged import Ragged


class Records(Protocol):
    """What `swap_probe` needs of an index."""

    def record(self, sample_id: int) -> Mapping[str, object]:
        """The fields of a sample."""


def derange(image_ids: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """A random other image for each sample of a batch.

    Sorts the samples by a random key of their id and shifts them by the size of the largest group
    of equal keys, so that no group meets itself unless it fills more than half of the batch.

    Args:
        image_ids (B,): int64.
        seed: chooses the keys.

    Returns:
        partner (B,): int64 row of the other image, a permutation; differs (B,): bool, False where
        the partner has the same id.
    """
    keys, order = counter.stream(seed, image_ids).sort(stable=True)
    _, counts = keys.unique_consecutive(return_counts=True)
    partner = torch.empty_like(order)
    partner[order] = order.roll(-int(counts.max()))
    return partner, image_ids[partner] != image_ids


@torch.inference_mode()
def mlm_probe(
    model: nn.Module, batches: Iterable[Batch], tokenizer: Tokenizer, *, seed: int = 0
) -> EvalResult:
    """Accuracy at masked tokens with the true image, with another image of the batch, and blind.

    A model that ignores the image scores alike with both. Chance is the share of the most frequent
    masked token. Samples whose batch holds no other image are left out of all three.

    Args:
        model: in eval mode, with a fusion tower and a token head.
        batches: their texts are masked here, by `seed` and sample.
        tokenizer: of the texts.
        seed: of the masks and of the choice of the other image.
    """
    _need_fusion(model, "mlm")
    device = model.device
    hits = torch.zeros(2, dtype=torch.int64, device=device)
    seen = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    num_samples = 0
    for batch in batches:
        masked, labels = mask_text(batch.text, tokenizer, seed=seed, positions=batch.sample_ids)
        partner, differs = derange(batch.image_ids, seed=seed)
        chosen = ((labels != -100) & differs[batch.text.row_ids()]).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        seen += labels[chosen].bincount(minlength=len(seen)).cpu()
        num_samples += int(differs.sum())
        images = batch.visual(model.config.vision.front).to(device)
        keys = model.image_keys(model.encode_image(images).tokens)
        text = model.encode_text(masked.to(device)).tokens
        chosen, labels = chosen.to(device), labels.to(device)
        for case, kv_index in enumerate((torch.arange(len(batch)), partner)):
            fused = model.fuse(text, keys, kv_index.to(device))
            predicted = model.token_logits(fused.values[chosen]).argmax(-1)
            hits[case] += (predicted == labels[chosen]).sum()
    num_masked = int(seen.sum())
    if num_masked == 0:
        raise ValueError(
            "mlm: no masked token with two images to compare: the data is empty, its captions have"
            " no words, or every batch holds a single image"
        )
    true, shuffled = (100 * h / num_masked for h in hits.tolist())
    return EvalResult(
        "mlm",
        metrics={"mlm_accuracy": true, "shuffled_mlm_accuracy": shuffled},
        chance={"mlm_accuracy": 100 * int(seen.max()) / num_masked},
        counts={"num_samples": num_samples, "num_masked": num_masked},
    )


@torch.inference_mode()
def swap_probe(
    model: nn.Module,
    batches: Iterable[Batch],
    records: Records,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    true_key: str = "relational",
    swapped_key: str = "swapped",
) -> EvalResult:
    """Share of images that prefer their caption to a copy with attributes swapped.

    "Red circle left of blue square" against "blue circle left of red square" has the same words, so
    a bag of words scores 50 %. An equal score counts one half.

    Args:
        model: in eval mode; the contrastive score is measured where there is a joint space, the
            matching score where there is a fusion tower.
        batches: images and sample ids.
        records: an index; samples whose record lacks either caption are passed over.
        tokenizer: of the captions.
        max_tokens: longer captions lose their tail.
        true_key, swapped_key: fields of the record.
    """
    device = model.device
    wins = {"swap_accuracy": 0.0} if model.has_joint_space else {}
    wins |= {"itm_swap_accuracy": 0.0} if model.match_head is not None else {}
    num_pairs = 0
    for batch in batches:
        fields = [records.record(i) for i in batch.sample_ids.tolist()]
        rows = [
            i
            for i, record in enumerate(fields)
            if record.get(true_key)
            and record.get(swapped_key)
            and record[true_key] != record[swapped_key]
        ]
        if not rows:
            continue
        num_pairs += len(rows)
        captions = [fields[i][key] for key in (true_key, swapped_key) for i in rows]
        tokens = Ragged.from_lists(tokenizer.encode(captions, max_tokens), device)
        images = batch.visual(model.config.vision.front)[rows].to(device)
        image, text = model.encode_image(images), model.encode_text(tokens)
        if model.has_joint_space:
            similarity = image.embedding.repeat(2, 1).mul(text.embedding).sum(-1)
            wins["swap_accuracy"] += _wins(similarity)
        if model.match_head is not None:
            kv_index = torch.arange(len(rows), device=device).repeat(2)
            fused = model.fuse_pairs(text.tokens, model.image_keys(image.tokens), kv_index)
            logits = model.match(fused)
            wins["itm_swap_accuracy"] += _wins(logits[:, 1] - logits[:, 0])
    if num_pairs == 0:
        raise ValueError(
            f"swap: no record has both a {true_key!r} and a different {swapped_key!r} caption"
        )
    metrics = {name: 100 * won / num_pairs for name, won in wins.items()}
    return EvalResult(
        "swap",
        metrics=metrics,
        chance={"swap_accuracy": 50.0},
        counts={"num_pairs": num_pairs},
        intervals={name: binomial_interval(value, num_pairs) for name, value in metrics.items()},
    )


def binomial_interval(percent: float, num: int, *, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share of `num` independent trials, in percent.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209.
    """
    share, spread = percent / 100, z * z / num
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)


def _wins(scores: Tensor) -> float:
    """How many of the first half of `scores` (2n,) beat their partner in the second."""
    true, swapped = scores.chunk(2)
    return (true > swapped).sum().item() + 0.5 * (true == swapped).sum().item()


def _need_fusion(model: nn.Module, task: str) -> None:
    if not model.has_fusion:
        raise ValueError(
            f"{task} needs a model with a fusion tower; preset {model.config.preset!r} has none"
        )
