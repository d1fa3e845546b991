"""The task "retrieval": all images and texts of a data set, ranked against each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlpfast.eval.evaluation import Evaluation
from vlpfast.eval.report import EvalResult
from vlpfast.eval.rerank import rerank
from vlpfast.eval.retrieval import recall_metrics, retrieval_ranks
from vlpfast.models.presets import missing
from vlpfast.ragged import Ragged


def retrieval(on: Evaluation) -> EvalResult:
    """Recall of images by texts and of texts by images; with `rerank_k` re-ranked by matching."""
    options, model = on.options, on.model
    if not model.has_joint_space:
        raise ValueError(
            "retrieval ranks by embeddings in a joint space; "
            f"{missing(model.config.preset, 'a joint space')}"
        )
    if options.rerank_k and not model.has_fusion:
        raise ValueError(f"rerank_k needs a fusion tower; preset {model.config.preset!r} has none")
    image, image_ids, samples = _images(on)
    captions, text_ids = _captions(on, samples)
    text, tokens = _texts(on, captions)
    image_ids, text_ids = image_ids.to(on.device), text_ids.to(on.device)
    ranks = retrieval_ranks(
        image, text, image_ids, text_ids, pool_texts=options.pool_texts, topk=options.rerank_k
    )
    metrics = recall_metrics(*ranks)
    info: dict[str, str | int | float] = {}
    if options.rerank_k:
        reranked = rerank(
            model,
            _image_tokens(on, samples),
            tokens,
            image_ids,
            text_ids,
            *ranks,
            itc_weight=options.itc_weight,
            pairs_per_call=options.pairs_per_call,
        )
        metrics |= {f"itm_{name}": v for name, v in recall_metrics(*reranked).items()}
        info = {"rerank_k": options.rerank_k, "itc_weight": options.itc_weight}
    return EvalResult(
        "retrieval",
        metrics=metrics,
        chance=recall_metrics(*(r.chance() for r in ranks)),
        counts={
            "num_images": ranks[1].num_candidates,
            "num_texts": ranks[0].num_candidates,
            "num_ids": len(image_ids.unique()),
        },
        info=info | options.protocol,
    )


def _images(on: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (I, E), image ids (I,) and sample ids (I,) of all images that can be read."""
    parts = [
        (
            on.model.encode_image(batch.images.to(on.device), with_tokens=False).embedding,
            batch.image_ids.cpu(),
            batch.sample_ids.cpu(),
        )
        for batch in on.batches("images")
    ]
    if not parts:
        raise ValueError(f"{on.index.source}: no image can be read, nothing to evaluate")
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _image_tokens(on: Evaluation, samples: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, tokens) of the images, encoded anew: the tokens of all would not fit in memory."""
    row_of = torch.full((int(samples.max()) + 1,), -1)
    row_of[samples] = torch.arange(len(samples))
    for batch in on.batches("matching"):
        rows = row_of[batch.sample_ids.cpu()]
        images = batch.images.to(on.device)
        yield rows, on.model.encode_image(images, num_embedded=0).tokens


def _captions(on: Evaluation, samples: Tensor) -> tuple[list[str], Tensor]:
    """The samples' captions and their ids; the same text for the same id counts once."""
    image_ids, places = on.index.image_ids, on.options.captions
    distinct = dict.fromkeys(
        (int(image_ids[i]), caption)
        for i in samples.tolist()
        for place, caption in enumerate(on.index.captions(i))
        if not places or place in places
    )
    if not distinct:
        raise ValueError(f"captions: no sample has a caption at any of the places {places}")
    ids, captions = zip(*distinct, strict=True)
    return list(captions), torch.tensor(ids)


def _texts(on: Evaluation, captions: list[str]) -> tuple[Tensor, Ragged | None]:
    """Embeddings (T, E) of texts, and where re-ranking needs them their packed tokens."""
    size = on.options.batch_size
    embeddings, tokens = [], []
    with on.bar("texts", len(captions), "txt") as bar:
        for start in range(0, len(captions), size):
            chunk = captions[start : start + size]
            ids = on.tokenizer.encode(chunk, on.data.max_tokens)
            packed = Ragged.from_lists(ids, on.device)
            text = on.model.encode_text(packed, with_tokens=bool(on.options.rerank_k))
            embeddings.append(text.embedding)
            if on.options.rerank_k:
                tokens.append(text.tokens)
            bar.update(len(chunk))
    return torch.cat(embeddings), Ragged.cat(tokens) if tokens else None
