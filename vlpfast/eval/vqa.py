"""Questions answered, in words or by choice among a run's answers, and whether a sentence holds of
an image or of two: accuracy with the true images, and with others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlpfast.data.answers import accuracies, normalize
from vlpfast.data.batch import Batch
from vlpfast.data.index import Index
from vlpfast.data.prompts import ANSWER, asked, examples
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.probe import binomial_interval, derange
from vlpfast.eval.report import EvalResult
from vlpfast.models.generate import SearchOptions, generate
from vlpfast.models.vlp import VLPModel
from vlpfast.ragged import Ragged

MAX_ANSWER = 8


@torch.inference_mode()
def answers(
    model: VLPModel, keys: Ragged, kv_index: Tensor, prompt: Ragged, tokenizer: Tokenizer
) -> list[str]:
    """What the model writes after each prompt, the likeliest token at a time, at most `MAX_ANSWER`.

    Args:
        model: in eval mode, one that takes prompts.
        keys: `VLPModel.image_keys`; what an encoder makes of them and the prompts is made once.
        kv_index (R,): int64, the image of each prompt.
        prompt: packed token ids of R prompts.
        tokenizer: of prompts and answers.
    """
    encodes = model.config.fusion.kind == "seq2seq"
    sources = model.read(keys, kv_index, prompt) if encodes else keys.select(kv_index)
    # In one sequence, prompts of different lengths leave no common place for kept keys.
    search = SearchOptions(
        tokenizer.start_id,
        tokenizer.end_id,
        MAX_ANSWER + 1,
        allowed=(0, model.config.text.vocab_size),
        cached=encodes,
    )
    text = generate(model, sources, len(prompt), search, None if encodes else prompt).text
    ids, ends = text.values.tolist(), text.cu_seqlens.tolist()
    rows = [ids[a + 1 : b] for a, b in pairwise(ends)]
    return [tokenizer.decode([i for i in row if i != tokenizer.end_id]) for row in rows]


@torch.inference_mode()
def choices(
    model: VLPModel, keys: Ragged, kv_index: Tensor, question: Ragged, names: Sequence[str]
) -> list[str]:
    """Of `names`, what the model's answer head tells of each question about image `kv_index` (R,).

    Args:
        model: in eval mode, one with an answer head.
        keys: `VLPModel.image_keys`.
        kv_index (R,): int64, the image of each question; of questions about two images (2R,), the
            second ones after all first ones.
        question: packed token ids of R questions.
        names: the answers by number.
    """
    words = model.encode_text(question, num_embedded=0).tokens
    own = torch.arange(len(question), device=kv_index.device)
    rows = words.select(own.repeat(len(kv_index) // len(question)))
    fused = model.fuse_pairs(rows, keys, kv_index, images=False)
    told = model.answer_logits(*model.first_tokens(fused)).argmax(1)
    return [names[number] for number in told.tolist()]


def vqa_probe(
    model: nn.Module,
    batches: Iterable[Batch],
    index: Index,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    task: str = "vqa",
    names: Sequence[str] = (),
    seed: int = 0,
) -> EvalResult:
    """Accuracy of answers, as VQA counts it (`data.answers.accuracies`; of one answer: whether it
    is the same), with the true image (or pair) and with another of the batch: what the latter
    reaches needs no image.

    Chance always gives a question type's best answer. Questions without an answer (a test set's)
    are answered and not counted; nor are those whose batch holds no other image.

    Args:
        model: in eval mode, one that writes text after a prompt, or has an answer head.
        batches: images and sample ids.
        index: whose records hold the task's examples (`data.prompts.asked`).
        tokenizer: the model's.
        max_tokens: longer questions lose their tail.
        task: one of `data.prompts.ANSWER`.
        names: the answers that the model's answer head chooses from, by number; empty: the model
            writes.
        seed: of the choice of the other image.

    Raises:
        ValueError: no image differs from another, or none of the answers is among `names`.
    """
    hits, truths, types, told, num_samples = [0.0, 0.0], [], [], [], 0
    for batch in batches:
        questions = [q for row in range(len(batch)) for q in _questions(batch, row, index, task)]
        if not questions:
            continue
        keys, numbers = _encode_once(model, batch, index)
        rows = torch.tensor([q.row for q in questions])
        prompt = tokenizer.encode([q.prompt for q in questions], max_tokens)
        prompt = Ragged.from_lists(prompt, model.device)

        def say(images: Tensor, prompt: Ragged, keys=keys, numbers=numbers) -> list[str]:
            """About the images of these rows."""
            shown = numbers[:, images].flatten().to(model.device)
            if names:
                return choices(model, keys, shown, prompt, names)
            return answers(model, keys, shown, prompt, tokenizer)

        partner, differs = derange(batch.image_ids, seed=seed)
        said = say(rows, prompt)
        told += [{"question_id": q.name, "answer": a} for q, a in zip(questions, said, strict=True)]
        counted = differs[rows].nonzero()[:, 0]
        if not len(counted):
            continue
        num_samples += int(differs.sum())
        other = say(partner[rows[counted]], prompt.select(counted.to(model.device)))
        own, questions = ([one[i] for i in counted.tolist()] for one in (said, questions))
        truths += (truth := [q.truth for q in questions])
        types += [q.kind for q in questions]
        for case, found in enumerate((own, other)):
            # Those of a head are normalised already; twice is not once: dont, don't, don t.
            compared = found if names else map(normalize, found)
            hits[case] += sum(t.get(a, 0.0) for a, t in zip(compared, truth, strict=True))
    if not truths:
        raise ValueError(f"{task}: no question with two images to compare")
    return _result(task, hits, truths, types, told, num_samples, names)


class _Question(NamedTuple):
    """One of a batch's: its row, what a server knows it by, its text, the accuracies of its
    answers, and its type.
    """

    row: int
    name: str | int
    prompt: str
    truth: dict[str, float]
    kind: str


def _questions(batch: Batch, row: int, index: Index, task: str) -> Iterator[_Question]:
    sample = int(batch.sample_ids[row])
    record, key = index.record(sample), ANSWER[task][1]
    pairs = zip(asked(record, task), examples(record, task), strict=True)
    for number, (example, (prompt, _)) in enumerate(pairs):
        name = example.get("question_id", f"{index.name(sample)}:{number}")
        kind = example.get("type", example.get("question_type", ""))
        yield _Question(row, name, prompt, accuracies(example.get(key)), kind)


def _encode_once(model: VLPModel, batch: Batch, index: Index) -> tuple[object, Tensor]:
    """Keys of the batch's images, each file once however many rows are about it, and the number of
    each row's images in them: (1, B), or (2, B) of pairs.
    """
    sources = [index, index.second] if index.has_pairs else [index]
    files = [source.name(i) for source in sources for i in batch.sample_ids.tolist()]
    places: dict[str, int] = {}
    for place, file in enumerate(files):
        places.setdefault(file, place)
    known = {file: number for number, file in enumerate(places)}
    numbers = [known[file] for file in files]
    first = torch.tensor(list(places.values()))
    images = batch.visual(model.config.vision.front)[first].to(model.device)
    keys = model.image_keys(model.encode_image(images).tokens)
    return keys, torch.tensor(numbers).unflatten(0, (len(sources), -1))


def _result(
    task: str,
    hits: list[float],
    truths: list[dict[str, float]],
    types: list[str],
    told: list[dict],
    num_samples: int,
    names: Sequence[str],
) -> EvalResult:
    counts = {"num_samples": num_samples, "num_questions": len(truths)}
    num_answered = sum(map(bool, truths))
    if not num_answered:
        return EvalResult(task, metrics={}, chance={}, counts=counts, answers=told)
    if names and not any(name in truth for truth in truths for name in names):
        raise ValueError(
            f"{task}: none of the data's answers is among the {len(names)} that the model tells, "
            f"from {names[0]!r} on: it was trained for another task"
        )
    true, shuffled = (100 * hit / num_answered for hit in hits)
    return EvalResult(
        task,
        metrics={f"{task}_accuracy": true, f"shuffled_{task}_accuracy": shuffled},
        chance={f"{task}_accuracy": 100 * _blind(truths, types) / num_answered},
        counts=counts,
        intervals={f"{task}_accuracy": binomial_interval(true, num_answered)},
        answers=told,
    )


def _blind(truths: Sequence[dict[str, float]], types: Sequence[str]) -> float:
    """Summed accuracies of always giving a question type's best answer."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for truth, kind in zip(truths, types, strict=True):
        sums[kind].update(truth)
    return sum(max(found.values(), default=0.0) for found in sums.values())
