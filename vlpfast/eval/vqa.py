"""Questions answered, in words or by choice among a run's answers, and whether a sentence holds:
exact match with the true image, and with another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.data.index import Index
from vlpfast.data.prompts import TASKS, examples
from vlpfast.data.scenes.text import blind_answer_accuracy
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
        kv_index (R,): int64, the image of each question.
        question: packed token ids of R questions.
        names: the answers by number.
    """
    words = model.encode_text(question, num_embedded=0).tokens
    fused = model.fuse_pairs(words, keys, kv_index, images=False)
    told = model.answer_logits(model.first_tokens(fused)[0]).argmax(1)
    return [names[number] for number in told.tolist()]


def _chance(task: str, asked: Sequence[dict]) -> float:
    """Percent that always giving a question type's most frequent answer reaches."""
    if task == "vqa":
        return 100 * blind_answer_accuracy(asked)["all"]
    labels = Counter(example["label"] for example in asked)
    return 100 * max(labels.values()) / len(asked)


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
    """Share of questions answered in the very words of the record, with the true image and with
    another of the batch: what the latter reaches needs no image.

    Chance always gives a question type's most frequent answer.

    Args:
        model: in eval mode, one that writes text after a prompt, or has an answer head.
        batches: images and sample ids.
        index: whose records hold the task's field: `questions` (type, question, answer), or
            `entailment` (sentence, label).
        tokenizer: the model's.
        max_tokens: longer questions lose their tail.
        task: "vqa" or "entailment", of `data.prompts.TASKS`.
        names: the answers that the model's answer head chooses from, by number; empty: the model
            writes.
        seed: of the choice of the other image.

    Raises:
        ValueError: no image differs from another, or none of the answers is among `names`.
    """
    hits, asked, num_samples, known = [0, 0], [], 0, 0
    for batch in batches:
        partner, differs = derange(batch.image_ids, seed=seed)
        rows, questions = [], []
        for row, sample in enumerate(batch.sample_ids.tolist()):
            if differs[row]:
                record = index.record(sample)
                questions += examples(record, task)
                asked += record[TASKS[task][0]]
                rows += [row] * (len(questions) - len(rows))
                num_samples += 1
        if not questions:
            continue
        prompts, truth = zip(*questions, strict=True)
        known += sum(answer in names for answer in truth)
        prompt = Ragged.from_lists(tokenizer.encode(list(prompts), max_tokens), model.device)
        images = batch.visual(model.config.vision.front).to(model.device)
        keys = model.image_keys(model.encode_image(images).tokens)
        for case, shown in enumerate((torch.tensor(rows), partner[torch.tensor(rows)])):
            shown = shown.to(model.device)
            if names:
                said = choices(model, keys, shown, prompt, names)
            else:
                said = answers(model, keys, shown, prompt, tokenizer)
            hits[case] += sum(a == b for a, b in zip(said, truth, strict=True))
    if not asked:
        raise ValueError(f"{task}: no question with two images to compare")
    if names and not known:
        raise ValueError(
            f"{task}: none of the data's answers is among the {len(names)} that the model tells, "
            f"from {names[0]!r} on: it was trained for another task"
        )
    true, shuffled = (100 * hit / len(asked) for hit in hits)
    return EvalResult(
        task,
        metrics={f"{task}_accuracy": true, f"shuffled_{task}_accuracy": shuffled},
        chance={f"{task}_accuracy": _chance(task, asked)},
        counts={"num_samples": num_samples, "num_questions": len(asked)},
        intervals={f"{task}_accuracy": binomial_interval(true, len(asked))},
    )
