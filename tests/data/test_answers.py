"""Questions as texts: which answers are numbered, and what a batch holds of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests._recipes import small
from vlpfast.data.answers import open_answers
from vlpfast.data.config import DataConfig
from vlpfast.data.loader import make_loader, make_tokenizer, open_index
from vlpfast.data.scenes import write_shards
from vlpfast.models import VLPModel
from vlpfast.recipes import get
from vlpfast.train.run import fit_answers, fresh_parts, train

BOTH = ("caption", "vqa")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "val"
    write_shards(folder, num_samples=24, image_size=32, split="val", progress=False)
    return folder


def batches(config: DataConfig, count: int, **options):
    index = open_index(config)
    tokenizer = make_tokenizer(config, index)
    loader = make_loader(
        index, config, tokenizer=tokenizer, image_size=32, batch_size=8, seed=0, **options
    )
    try:
        stream = iter(loader)
        return index, tokenizer, [next(stream) for _ in range(count)]
    finally:
        loader.close()


def test_the_most_frequent_come_first(scenes):
    index = open_index(DataConfig(path=str(scenes)))
    counts = Counter(q["answer"] for i in range(24) for q in index.record(i)["questions"])
    whole = open_answers(index, BOTH, 10_000)
    assert set(whole) == set(counts)
    assert list(whole.values()) == list(range(len(counts)))
    ranked = [counts[name] for name in whole]
    assert ranked == sorted(ranked, reverse=True)
    assert list(open_answers(index, BOTH, 3)) == list(whole)[:3]


def test_texts_are_questions_or_captions(scenes):
    """Each text is one of its image's questions with that answer's number, or one of its captions
    without; rare answers have none.
    """
    config = DataConfig(path=str(scenes), tasks=BOTH, answers=5, vocab_size=400, max_tokens=48)
    index, tokenizer, found = batches(config, 6)
    numbers = open_answers(index, BOTH, 5)
    seen, captions = Counter(), set(index.iter_captions())
    for batch in found:
        assert batch.prompt is None
        for row, sample in enumerate(batch.sample_ids.tolist()):
            first, end = batch.text.cu_seqlens[row : row + 2].tolist()
            text = tokenizer.decode(batch.text.values[first:end].tolist())
            record, label = index.record(sample), int(batch.answer_ids[row])
            answers = [q["answer"] for q in record["questions"] if q["question"] == text]
            if answers:
                assert label == numbers.get(answers[0], -100)
                seen["rare" if label < 0 else "known"] += 1
            else:
                assert text in captions
                assert label == -100
                seen["caption"] += 1
    assert min(seen["rare"], seen["known"], seen["caption"]) > 0
    assert 0.3 < seen["caption"] / 48 < 0.7


def test_evaluation_reads_captions(scenes):
    config = DataConfig(path=str(scenes), tasks=BOTH, answers=5, vocab_size=400, max_tokens=48)
    (batch,) = batches(config, 1, train=False)[2]
    assert batch.answer_ids.tolist() == [-100] * 8


def test_the_model_has_the_datas_answers(scenes):
    config = get("lxmert_scenes_answers")
    assert config.model.answers == 0
    data = DataConfig(path=str(scenes), tasks=BOTH, answers=7)
    fitted = fit_answers(replace(config, data=data), open_index(data))
    assert fitted.model.answers == 7


def test_a_head_of_other_answers_starts_fresh(scenes, tmp_path):
    """As many answers, but others: their numbers mean something else."""
    config = get("lxmert_scenes_answers")
    data = DataConfig(path=str(scenes), tasks=BOTH, answers=7)
    index, init = open_index(data), replace(config.train, init=str(tmp_path))
    config = fit_answers(replace(config, data=data, train=init), index)
    names = list(open_answers(index, BOTH, 7))
    told = {None: False, tuple(names): True, tuple(reversed(names)): False}
    for before, same in told.items():
        if before is not None:
            (tmp_path / "answers.json").write_text(json.dumps(before))
            (tmp_path / "config.json").write_text('{"model": {"answer_images": 1}}')
        assert fresh_parts(config, index) == (() if same else ("answer_head.answers.",))
    model = VLPModel(replace(config.model, vision=replace(config.model.vision, region_dim=64)))
    named = [n for n in model.state_dict() if n.startswith("answer_head.answers.")]
    assert [model.state_dict()[n].shape[0] for n in named] == [7, 7]


@pytest.mark.slow
def test_a_run_keeps_the_names_of_its_answers(scenes, tmp_path):
    config = small("lxmert_scenes_answers", scenes, tmp_path, 1)
    result = train(config)
    names = json.loads((config.run_dir / "answers.json").read_text())
    assert names == list(open_answers(open_index(config.data), BOTH, config.data.answers))
    state = torch.load(result.checkpoint, weights_only=True)["state_dict"]
    assert state["model.answer_head.answers.bias"].shape == (len(names),)


def test_answers_need_questions():
    with pytest.raises(ValueError, match=r"answers needs tasks that ask .* got \('caption',\)"):
        DataConfig(path="x", tasks=("caption",), answers=3)
