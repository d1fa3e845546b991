"""Questions and statements in the forms that data sets have, their answers' scores, pairs of
images.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests._images import encode, picture, write_jsonl, write_tar
from vlpfast.data.answers import accuracies, normalize, open_answers, scores
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import choose_loader, make_loader, make_tokenizer, open_index
from vlpfast.data.prompts import asked, examples, spoken
from vlpfast.data.scenes import write_shards
from vlpfast.data.scenes.text import ANSWERS, LABELS
from vlpfast.data.tools import pack

TEN = ["red", "red", "Red.", "a red", "blue", "blue", "two", "green", "green", "green"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "val"
    write_shards(folder, num_samples=100, image_size=32, split="val", num_pairs=40, progress=False)
    return folder


def write_pictures(folder, count: int) -> None:
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encode(picture(i), "PNG"))


def load(config: DataConfig, steps: int = 1, batch_size: int = 4, **options):
    index = open_index(config)
    tokenizer = make_tokenizer(config, index)
    loader = make_loader(
        index, config, tokenizer=tokenizer, image_size=16, batch_size=batch_size, seed=0, **options
    )
    try:
        stream = iter(loader)
        return index, tokenizer, [next(stream) for _ in range(steps)]
    finally:
        loader.close()


# Answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Two  dogs.", "2 dogs"),
        ("the Red-ish car", "red-ish car"),
        ("yes, it is", "yes it is"),
        ("left/right", "left right"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("dont", "don't"),
        ("none", "0"),
        ("A", ""),
        ("what?", "what"),
    ],
)
def test_answers_are_compared_as_vqa_does(answer, expected):
    assert normalize(answer) == expected


def test_answers_of_scenes_stay_as_they_are():
    assert [normalize(answer) for answer in (*ANSWERS, *LABELS)] == [*ANSWERS, *LABELS]


def test_scores_and_accuracies_of_ten_people():
    said = [normalize(one) for one in TEN]
    assert scores(TEN) == pytest.approx({"red": 1.0, "green": 0.9, "blue": 0.6, "2": 0.3})
    expected = {}
    for answer in set(said):
        shares = []
        for left_out in range(10):
            others = said[:left_out] + said[left_out + 1 :]
            shares.append(min(others.count(answer) / 3, 1.0))
        expected[answer] = sum(shares) / 10
    assert accuracies(TEN) == pytest.approx(expected)
    # Whoever said it is left out one time in ten.
    assert accuracies(TEN)["2"] == pytest.approx(0.3)


def test_scores_of_few_answers_and_of_scores():
    for weigh in (scores, accuracies):
        assert weigh("Yes") == weigh(["yes"]) == {"yes": 1.0}
        assert weigh(["cat", "dog", "dog"]) == {"dog": 1.0, "cat": 1.0}
        assert weigh(True) == {"true": 1.0}
        assert weigh(None) == weigh([]) == {}
        assert weigh({"no": 0.3, "The yes": 1}) == {"yes": 1.0, "no": 0.3}
        with pytest.raises(ValueError, match=r"'no': the score must be in \[0, 1\], got 3"):
            weigh({"no": 3})
    assert [spoken(a) for a in (TEN, {"b": 0.1, "a": 0.9}, False, "True", 3)] == [
        "green",
        "a",
        "false",
        "true",
        "3",
    ]


# Formats


def vqa_rows(folder) -> list[dict]:
    """ALBEF's: what ten people said, what one said; several questions an image."""
    write_pictures(folder, 2)
    rows = [
        {"image": "0.png", "question": "what colour?", "answer": TEN, "question_id": 7},
        {"image": "0.png", "question": "how many?", "answer": ["two"], "dataset": "vg"},
        {"image": "1.png", "question": "is it red?", "answer": {"no": 1.0, "red": 0.3}},
        {"image": "1.png", "question": "whose is it?", "answer": ["nobody's"]},
    ]
    (folder / "vqa.json").write_text(json.dumps(rows))
    return rows


def test_questions_need_no_captions(tmp_path):
    vqa_rows(tmp_path)
    config = DataConfig(path=str(tmp_path / "vqa.json"), tasks=("vqa",), answers=4, workers=1)
    index, tokenizer, (batch,) = load(config, train=False)
    assert index.num_samples == 4
    assert index.num_captions == 0
    # Rows about one image are the same image.
    ids = batch.image_ids.tolist()
    assert ids[0] == ids[1] != ids[2] == ids[3]
    numbers = open_answers(index, ("vqa",), 4)
    assert set(numbers) == {"2", "green", "no", "nobody s"}
    assert batch.answer_ids.tolist() == [-100, *(numbers[a] for a in ("2", "no", "nobody s"))]
    told = [{}, {}, {}, {}]
    sets, names = batch.answer_sets, list(numbers)
    for row, answer, score in zip(sets.row_ids(), sets.values, batch.answer_scores, strict=True):
        told[row][names[answer]] = pytest.approx(float(score))
    assert told == [{"green": 0.9, "2": 0.3}, {"2": 1.0}, {"no": 1.0}, {"nobody s": 1.0}]
    texts = [batch.text.select(torch.tensor([row])).values.tolist() for row in range(4)]
    assert [tokenizer.decode(ids) for ids in texts][1] == "how many?"
    assert examples(index.record(0), "vqa") == [("what colour?", "green")]


def test_rare_answers_are_none(tmp_path):
    write_pictures(tmp_path, 1)
    said = ["red"] * 3 + ["blue"] * 2 + ["grey"]
    rows = [{"image": "0.png", "question": "?", "answer": answer} for answer in said]
    index = Index.open(write_jsonl(tmp_path / "a.jsonl", rows), require_captions=False)
    assert open_answers(index, ("vqa",), 10, 2) == {"red": 0, "blue": 1}
    assert open_answers(index, ("vqa",), 1, 2) == {"red": 0}
    with pytest.raises(ValueError, match=r"a\.jsonl: no answer to what \['vqa'\] ask is that freq"):
        open_answers(index, ("vqa",), 10, 9)


def test_vqas_own_files(tmp_path):
    folder = tmp_path / "train2014"
    folder.mkdir()
    for i in (9, 25):
        (folder / f"COCO_train2014_{i:012d}.jpg").write_bytes(encode(picture(i)))
    questions = [
        {"image_id": i, "question": f"what is {i}?", "question_id": 10 * i} for i in (25, 9)
    ]
    annotations = [
        {
            "question_id": 10 * i,
            "image_id": i,
            "question_type": "what is",
            "answer_type": "other",
            "multiple_choice_answer": "red",
            "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(TEN)],
        }
        for i in (9, 25)
    ]
    path = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    path.write_text(json.dumps({"data_subtype": "train2014", "questions": questions}))
    unanswered = Index.open(path, require_captions=False)
    assert "answer" not in unanswered.record(0)
    beside = tmp_path / "v2_mscoco_train2014_annotations.json"
    beside.write_text(json.dumps({"annotations": annotations}))
    index = Index.open(path, require_captions=False)
    assert index.image_ids.tolist() == [25, 9]
    assert index.record(0)["question_id"] == 250
    assert index.record(0)["answer"] == TEN
    # The data set's own choice of the most frequent one.
    assert examples(index.record(1), "vqa") == [("what is 9?", "red")]
    path.write_text(json.dumps({"questions": questions}))
    with pytest.raises(ValueError, match="'questions' without 'data_subtype'"):
        Index.open(path, require_captions=False)


def test_sentences_about_an_image(tmp_path):
    write_pictures(tmp_path, 3)
    rows = [{"image": f"{i}.png", "sentence": f"it is {i}", "label": LABELS[i]} for i in range(3)]
    path = write_jsonl(tmp_path / "ve.jsonl", rows)
    config = DataConfig(path=str(path), tasks=("entailment",), answers=3, workers=1)
    index, tokenizer, (batch,) = load(config, train=False, batch_size=3)
    assert sorted(batch.answer_ids.tolist()) == [0, 1, 2]
    numbers = open_answers(index, ("entailment",), 3)
    assert [list(numbers)[i] for i in batch.answer_ids] == list(LABELS)
    text = tokenizer.decode(batch.text.select(torch.tensor([2])).values.tolist())
    assert text == "is it so? it is 2"


def test_shards_need_no_captions_either(tmp_path):
    fields = json.dumps({"question": "what?", "answer": "red"}).encode()
    png = encode(picture(0), "PNG")
    write_tar(tmp_path / "a.tar", [("1.png", png), ("1.json", fields)])
    config = DataConfig(path=str(tmp_path / "a.tar"), tasks=("vqa",), answers=2, workers=1)
    index, _, (batch,) = load(config, train=False, batch_size=1)
    assert asked(index.record(0), "vqa") == [{"question": "what?", "answer": "red"}]
    assert batch.answer_ids.tolist() == [0]
    with pytest.raises(ValueError, match="no 'caption' or 'captions' key"):
        open_index(replace(config, tasks=("caption", "vqa")))


def test_an_image_is_asked_several_of_its_questions(scenes):
    config = DataConfig(
        path=str(scenes), tasks=("vqa",), answers=50, questions=3, workers=1, max_tokens=40
    )
    index, tokenizer, found = load(config, steps=2)
    numbers = open_answers(index, ("vqa",), 50)
    for batch in found:
        assert batch.images.shape[0] == 4
        assert len(batch) == len(batch.text) == len(batch.positions) == 12
        assert batch.shown.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
        assert batch.image_positions.tolist() == batch.positions[::3].tolist()
        asked_of = {}
        for row, sample in enumerate(batch.sample_ids.tolist()):
            text = tokenizer.decode(batch.text.select(torch.tensor([row])).values.tolist())
            answers = dict(examples(index.record(sample), "vqa"))
            assert int(batch.answer_ids[row]) == numbers[answers[text]]
            asked_of.setdefault(sample, set()).add(text)
        assert [len(texts) for texts in asked_of.values()] == [3] * 4
    (batch,) = load(config, train=False)[2]
    assert len(batch) == 4
    assert batch.shown is None
    for change in ({"answers": 0}, {"tasks": ("vqa", "caption")}):
        with pytest.raises(ValueError, match=r"questions 3 an image need answers > 0 and tasks"):
            replace(config, **change)


def test_an_index_without_need_of_captions_serves_both(scenes):
    """It is built once where every sample has one."""
    config = DataConfig(path=str(scenes))
    meta = open_index(config).folder / "meta.json"
    built = meta.stat().st_mtime_ns
    open_index(replace(config, tasks=("vqa",)))
    open_index(replace(config, tasks=("caption", "vqa")))
    assert meta.stat().st_mtime_ns == built


def test_captions_that_are_missing_are_asked_for(tmp_path):
    write_pictures(tmp_path, 2)
    rows = [
        {"image": "0.png", "caption": "a", "questions": []},
        {"image": "1.png", "captions": [], "questions": []},
    ]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    config = DataConfig(path=str(path), tasks=("vqa",), workers=1)
    assert open_index(config).num_samples == 2
    assert open_index(replace(config, tasks=())).num_samples == 1
    assert open_index(config).num_samples == 2
    with pytest.raises(ValueError, match=r"'vqa': no example and no caption in"):
        load(config, train=False, batch_size=2)


# Pairs


def pair_rows(folder, count: int = 6) -> list[dict]:
    write_pictures(folder, count)
    return [
        {
            "images": [f"{i}.png", f"{(i + 1) % count}.png"],
            "sentence": f"number {i}",
            "label": ("True", "False")[i % 2],
        }
        for i in range(count)
    ]


PAIRS = DataConfig(path="", tasks=("nlvr",), answers=2, workers=1, max_tokens=40)


def test_pairs_are_loaded_side_by_side(tmp_path):
    path = write_jsonl(tmp_path / "nlvr.jsonl", pair_rows(tmp_path))
    config = replace(PAIRS, path=str(path), crop_scale=(0.5, 1.0), hflip=0.5)
    index, _, (batch,) = load(config, train=False, batch_size=6)
    assert index.has_pairs
    assert [index.second.name(i) for i in range(6)] == [f"{(i + 1) % 6}.png" for i in range(6)]
    assert index.second.image_bytes(5) == index.image_bytes(0)
    assert len(batch) == 6
    assert batch.images.shape == (12, 16, 16, 3)
    assert batch.shown.tolist() == [list(range(6)), list(range(6, 12))]
    first, second = batch.images.chunk(2)
    assert torch.equal(second, first.roll(-1, 0))
    assert open_answers(index, ("nlvr",), 2) == {"false": 0, "true": 1}
    assert batch.answer_ids.tolist() == [1, 0] * 3
    again = [load(config, steps=2, batch_size=n)[2] for n in (3, 6)]
    (one, two), (both, _) = again
    assert torch.equal(
        both.images, torch.cat([one.images[:3], two.images[:3], one.images[3:], two.images[3:]])
    )
    # Crops are each image's own.
    assert not torch.equal(both.images[6:], both.images[:6].roll(-1, 0))


def test_a_pair_with_a_corrupt_image_is_left_out(tmp_path):
    rows = pair_rows(tmp_path)
    data = encode(picture(2), "PNG")
    (tmp_path / "2.png").write_bytes(data[:60] + bytes(40) + data[100:])
    path = write_jsonl(tmp_path / "nlvr.jsonl", rows)
    config = replace(PAIRS, path=str(path))
    index = open_index(config)
    tokenizer = make_tokenizer(config, index)
    options = {"tokenizer": tokenizer, "image_size": 16, "batch_size": 6, "seed": 0}
    loader = make_loader(index, config, train=False, **options)
    (batch,) = list(loader)
    loader.close()
    assert batch.sample_ids.tolist() == [0, 3, 4, 5]
    assert batch.images.shape[0] == 8
    assert len(batch.text) == len(batch.answer_ids) == 4
    assert list(loader.corrupt) == ["2.png"]
    loader = make_loader(index, config, **options)
    batch = loader.load(0)
    loader.close()
    assert batch.images.shape[0] == 12
    assert not {1, 2} & set(batch.sample_ids.tolist())


def test_pairs_of_generated_scenes(scenes):
    """Their images lie in the shards beside the table."""
    config = replace(PAIRS, path=str(scenes / "val.nlvr.jsonl"))
    index, _, (batch,) = load(config, train=False, batch_size=8)
    own = Index.open(scenes)
    places = {own.name(i): i for i in range(len(own))}
    lines = (scenes / "val.nlvr.jsonl").read_text().splitlines()
    assert index.num_samples == len(lines) == 40
    for i, line in enumerate(map(json.loads, lines)):
        assert index.record(i)["sentence"] == line["statement"]
        for side, at in (("left", index), ("right", index.second)):
            name = f"val-000000.tar/{line[side]}.png"
            assert at.name(i) == name
            assert at.image_bytes(i) == own.image_bytes(places[name])
    truths = Counter(spoken(index.record(i)["label"]) for i in range(40))
    assert truths == {"true": 20, "false": 20}
    assert batch.images.shape == (16, 16, 16, 3)


def test_what_pairs_exclude_is_named(tmp_path, scenes):
    rows = pair_rows(tmp_path)
    mixed = [*rows, {"image": "0.png", "sentence": "one", "label": "True"}]
    path = write_jsonl(tmp_path / "mixed.jsonl", mixed)
    with pytest.raises(ValueError, match="about one image, or all two"):
        Index.open(path, require_captions=False)
    path = write_jsonl(tmp_path / "three.jsonl", [{**rows[0], "images": ["0.png"] * 3}])
    with pytest.raises(ValueError, match=r"'images' must be two paths, got \['0\.png', "):
        Index.open(path, require_captions=False)
    path = write_jsonl(tmp_path / "nlvr.jsonl", rows)
    with pytest.raises(ValueError, match=r"two images .* data\.max_aspect 1, got '' and 2"):
        load(replace(PAIRS, path=str(path), max_aspect=2.0))
    with pytest.raises(ValueError, match=r"loaded by 'torch': data\.loader is 'dali'"):
        choose_loader(replace(PAIRS, loader="dali"), pairs=True)
    assert choose_loader(PAIRS, pairs=True) == "torch"
    with pytest.raises(ValueError, match=r"about two images each cannot be packed"):
        pack(path, tmp_path / "packed", require_captions=False)
    with pytest.raises(ValueError, match=r"answers needs tasks that ask .*got \('vqa', 'box'\)"):
        DataConfig(path="", tasks=("vqa", "box"), answers=3, locations=10)
