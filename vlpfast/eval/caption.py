"""Captions that a model writes: right to the letter or not, with the true and another image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from vlpfast.data.batch import Batch
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.probe import binomial_interval, derange
from vlpfast.eval.report import EvalResult
from vlpfast.models.presets import missing
from vlpfast.ragged import Ragged


@torch.inference_mode()
def caption_probe(
    model: nn.Module,
    batches: Iterable[Batch],
    captions: Callable[[int], list[str]],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    num_beams: int = 1,
    prompt: str = "",
    seed: int = 0,
) -> EvalResult:
    """Exact match of written captions, and accuracy at each next token of the true ones.

    A caption is right where it equals one of its image's, as the tokenizer spells it. Shuffled
    means: what was written about another image of the batch. A model that ignores the image scores
    alike with both; chance is the share of images that the commonest caption is right for, and of
    the commonest token. Next tokens are those of the sample's first caption. Samples whose batch
    holds no other image are left out.

    Args:
        model: in eval mode, with a text decoder.
        batches: of images.
        captions: those of a sample, by its id.
        tokenizer: of the captions.
        max_tokens: longest text that is written, start and end token included.
        num_beams: of the search; 1 is greedy.
        prompt: what asks for a caption, of a model that is asked; empty: nothing does.
        seed: of the choice of the other image.
    """
    if "a text decoder" not in model.config.parts:
        raise ValueError(f"caption: {missing(model.config.preset, 'a text decoder')}")
    matches, words = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    common, seen = Counter(), torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    num_samples = 0
    asked = tokenizer.encode([prompt], max_tokens) if prompt else []
    for batch in batches:
        partner, differs = derange(batch.image_ids, seed=seed)
        kept = differs.nonzero()[:, 0]
        if len(kept) == 0:
            continue
        encoded = [tokenizer.encode(captions(i), max_tokens) for i in batch.sample_ids.tolist()]
        truths = [{tokenizer.decode(ids) for ids in encoded[row]} for row in kept.tolist()]
        common.update(text for true in truths for text in true)
        if asked:
            batch = replace(batch, prompt=Ragged.from_lists(asked * len(batch)))
        written = _write(model, batch, tokenizer, max_tokens, num_beams)
        for case, rows in enumerate((kept, partner[kept])):
            texts = [tokenizer.decode(written[row]) for row in rows.tolist()]
            matches[case] += sum(t in true for t, true in zip(texts, truths, strict=True))
        text = Ragged.from_lists([texts[0] for texts in encoded])
        hits, targets = _next_tokens(model, replace(batch, text=text), partner, differs)
        words += hits
        seen += targets.bincount(minlength=len(seen))
        num_samples += len(kept)
    if num_samples == 0:
        raise ValueError("caption: the data is empty, or every batch holds a single image")
    info = {"num_beams": num_beams}
    return replace(_result(matches, words, common, seen, num_samples), info=info)


def _result(
    matches: torch.Tensor,
    words: torch.Tensor,
    common: Counter[str],
    seen: torch.Tensor,
    num_samples: int,
) -> EvalResult:
    """From right captions (2,) and next tokens (2,), with the true and with the other image, and
    how often each caption and each token (V,) was the right one.
    """
    num_tokens = int(seen.sum())
    exact, shuffled = (100 * n / num_samples for n in matches.tolist())
    token, shuffled_token = (100 * n / num_tokens for n in words.tolist())
    return EvalResult(
        "caption",
        metrics={
            "exact_match": exact,
            "shuffled_exact_match": shuffled,
            "next_token_accuracy": token,
            "shuffled_next_token_accuracy": shuffled_token,
        },
        chance={
            "exact_match": 100 * max(common.values()) / num_samples,
            "next_token_accuracy": 100 * int(seen.max()) / num_tokens,
        },
        counts={"num_samples": num_samples, "num_tokens": num_tokens},
        intervals={"exact_match": binomial_interval(exact, num_samples)},
    )


def _write(
    model: nn.Module, batch: Batch, tokenizer: Tokenizer, max_tokens: int, num_beams: int
) -> list[list[int]]:
    """Ids of a caption for each image; no special token but the end is written."""
    out = model.generate(
        batch.visual(model.config.vision.front).to(model.device),
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        max_tokens=max_tokens,
        num_beams=num_beams,
        banned=tuple(i for i in tokenizer.special_ids if i != tokenizer.end_id),
        **_prompted(model, batch),
    )
    ids, ends = out.text.values.tolist(), out.text.cu_seqlens.tolist()
    return [ids[a:b] for a, b in pairwise(ends)]


def _next_tokens(
    model: nn.Module, batch: Batch, partner: torch.Tensor, differs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens (2,) of the batch's captions that are predicted rightly, with the true and with
    the other image, and those tokens (n,); texts that are not `differs` are left out.
    """
    device = model.device
    text = batch.text.to(device)
    images = batch.visual(model.config.vision.front).to(device)
    keys = model.image_keys(model.encode_image(images).tokens)
    places = text.but_last()
    places = places[differs.to(device)[text.row_ids()[places]]]
    target = text.values[places + 1]
    hits = []
    for kv_index in (torch.arange(len(batch)), partner):
        states = model.decode(text, keys, kv_index.to(device), **_prompted(model, batch))
        states = states.values[places]
        hits.append((model.next_token_logits(states).argmax(-1) == target).sum().cpu())
    return torch.stack(hits), target.cpu()


def _prompted(model: nn.Module, batch: Batch) -> dict[str, Ragged]:
    return {} if batch.prompt is None else {"prompt": batch.prompt.to(model.device)}
