"""The scenes data set: reproducible, its boxes and sentences true, its labels not told by words.

Truth is checked by parsing sentences and looking at boxes, not by the generator's own functions.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from vlpfast.data.scenes import (
    ANSWERS,
    HELD_OUT,
    SPLITS,
    blind_answer_accuracy,
    describe,
    encode_png,
    image_pair,
    make,
    record,
    regions,
    render,
    sample_scene,
    sample_sibling,
    sample_siblings,
    write_shards,
)
from vlpfast.data.scenes.render import RGB, _patch
from vlpfast.data.scenes.space import COLORS, SHAPES, SIZES, TEXTURES

# The splits, and the training split with siblings.
SETS = (*SPLITS, "siblings")
PHRASE = re.compile(
    rf"(?:({'|'.join(SIZES)}) )?(?:({'|'.join(TEXTURES)}) )?"
    rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
)
RELATION = re.compile(r"left of|right of|above|below")


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict]]:
    """600 records of each set, as they come out of JSON."""
    scenes = {split: [sample_scene(0, split, i) for i in range(600)] for split in SPLITS}
    scenes["siblings"] = [sample_sibling(0, "train", i) for i in range(600)]
    return {
        name: [json.loads(json.dumps(record(s))) for s in set_] for name, set_ in scenes.items()
    }


def place(o: dict) -> str:
    """Place words from the centre of the box."""
    x1, y1, x2, y2 = o["box"]
    row = ("top", "", "bottom")[int((y1 + y2) * 1.5)]
    column = ("left", "", "right")[int((x1 + x2) * 1.5)]
    return f"{row} {column}".strip() or "centre"


def fits(o: dict, words: tuple[str, ...]) -> bool:
    keys = ("size", "texture", "color", "shape")
    return all(word in ("", o[key]) for key, word in zip(keys, words, strict=True))


def related(a: dict, relation: str, b: dict) -> bool:
    """By the boxes: `a` ends before `b` begins."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a["box"], b["box"]
    tests = {
        "left of": ax2 <= bx1,
        "right of": bx2 <= ax1,
        "above": ay2 <= by1,
        "below": by2 <= ay1,
    }
    return tests[relation]


def relational_truth(caption: str, objects: list[dict]) -> bool:
    first, second = PHRASE.findall(caption)
    relation = RELATION.search(caption).group()
    pairs = ((a, b) for a in objects for b in objects)
    return any(fits(a, first) and fits(b, second) and related(a, relation, b) for a, b in pairs)


def answer(question: str, objects: list[dict]) -> str:
    """Answers a question by looking at the objects; fails where it has no single answer."""

    def the(found: list[dict]) -> dict:
        (o,) = found
        return o

    named = (
        [the([o for o in objects if fits(o, words)]) for words in PHRASE.findall(question)]
        if (not question.startswith("is there"))
        else []
    )
    if match := re.match(
        r"what (colour|shape) is the shape at the (.+)\?|what shape is at the (.+)\?", question
    ):
        o = the([o for o in objects if place(o) == (match[2] or match[3])])
        return o["color" if match[1] == "colour" else "shape"]
    if match := re.match(r"what colour is the (\w+)\?", question):
        return the([o for o in objects if o["shape"] == match[1]])["color"]
    if match := re.match(r"what shape is (\w+)\?", question):
        return the([o for o in objects if o["color"] == match[1]])["shape"]
    if match := re.match(r"how many (?:(\w+) )?shapes are there\?", question):
        return str(sum(match[1] in (None, o["color"]) for o in objects))
    if question.startswith("is there"):
        return "yes" if any(fits(o, PHRASE.search(question).groups("")) for o in objects) else "no"
    if question.startswith("what size"):
        return named[0]["size"]
    if question.startswith("what texture"):
        return named[0]["texture"]
    if question.startswith("where"):
        return place(named[0])
    relation = RELATION.search(question).group()
    return "yes" if related(named[0], relation, named[1]) else "no"


def entailment_label(sentence: str, objects: list[dict]) -> str:
    if match := re.match(r"the (\w+) is (\w+)$", sentence):
        found, key, word = [o for o in objects if o["shape"] == match[1]], "color", match[2]
    else:
        match = re.match(r"at the (.+) is (?:something|a) (\w+)$", sentence)
        found, word = [o for o in objects if place(o) == match[1]], match[2]
        key = "color" if word in COLORS else "shape"
    if not found:
        return "neutral"
    (o,) = found
    return "entailment" if o[key] == word else "contradiction"


def test_scenes_do_not_depend_on_order() -> None:
    forward = [sample_scene(3, "val", i) for i in range(50)]
    backward = [sample_scene(3, "val", i) for i in reversed(range(50))][::-1]
    assert forward == backward
    assert [record(s) for s in forward] == [record(s) for s in reversed(backward)][::-1]
    assert len({sample_scene(seed, split, 7) for seed, split in product(range(3), SPLITS)}) == 9


def test_first_records_stay_the_same_in_every_version() -> None:
    # A new digest means a new data set: numbers measured on the old one no longer compare.
    digest = hashlib.sha256()
    for split, i in product(SPLITS, range(20)):
        digest.update(json.dumps(record(sample_scene(0, split, i))).encode())
    assert digest.hexdigest()[:16] == "d72c980576152aad"


@pytest.mark.parametrize("size", [32, 64, 84, 96])  # 84: not a multiple of the 32-unit grid
def test_boxes_contain_the_drawn_pixels(size: int) -> None:
    slack = 0 if size % 32 == 0 else 1
    for i in range(60):
        scene = sample_scene(1, "train", i)
        empty = render(replace(scene, objects=()), size)
        for o in scene.objects:
            drawn = render(replace(scene, objects=(o,)), size)
            ys, xs = np.nonzero((drawn != empty).any(axis=2))
            x1, y1, x2, y2 = np.array(o.box) * size
            assert x1 - slack <= xs.min() <= x1 + 1 + slack
            assert y1 - slack <= ys.min() <= y1 + 1 + slack
            assert x2 - 1 - slack <= xs.max() + 1 <= x2 + slack
            assert y2 - 1 - slack <= ys.max() + 1 <= y2 + slack
        boxes = np.array([o.box for o in scene.objects])
        for a, b in product(boxes, boxes):
            apart = (a[2:] <= b[:2]).any() or (b[2:] <= a[:2]).any()
            assert apart or (a == b).all()


def test_colors_shapes_and_textures_look_different() -> None:
    for color in COLORS:
        _, paint = _patch("square", color, "plain", 2, 10, 2.0)
        nearest = min(RGB, key=lambda name: np.abs(paint[5, 5] / 256 - np.array(RGB[name])).sum())
        assert nearest == color
    for diameter in (10, 12, 18, 20):
        seen = {
            kind: np.concatenate(
                [a.astype(float) / 256 for a in _patch(kind[0], "red", kind[1], 2, diameter, 2.0)],
                2,
            )
            for kind in product(SHAPES, TEXTURES)
        }
        # Mean over the patch of the largest channel difference, 0-255.
        closest = min(
            np.abs(seen[a] - seen[b]).max(axis=2).mean() for a in seen for b in seen if a < b
        )
        assert closest > 12, diameter


@pytest.mark.parametrize("split", SETS)
def test_captions_are_true_and_complete(records: dict, split: str) -> None:
    for row in records[split]:
        objects = row["objects"]
        truth = Counter(
            (o["size"], o["texture"], o["color"], o["shape"], place(o)) for o in objects
        )
        full = re.findall(rf"a {PHRASE.pattern} at the ([a-z ]+?)(?=,|$| and)", row["captions"][0])
        assert Counter(full) == truth
        terse = [
            re.fullmatch(rf"(.+?) {PHRASE.pattern}", part)
            for part in row["captions"][1].split(", ")
        ]
        assert Counter((*m.groups()[1:], m[1]) for m in terse) == truth
        short = Counter(words[2:] for words in PHRASE.findall(row["captions"][2]))
        assert short == Counter((o["color"], o["shape"]) for o in objects)
        assert [place(o) for o in objects] == [o["place"] for o in objects]
        if len(objects) > 1:
            assert row["captions"][3] == row["relational"]
            assert relational_truth(row["relational"], objects)
        else:
            assert len(row["captions"]) == 3
            assert row["relational"] is row["swapped"] is None


def test_describe_gives_the_captions_of_the_record() -> None:
    for i in range(20):
        scene = sample_scene(0, "train", i)
        assert describe(scene) == record(scene)["captions"]


def test_image_id_is_equal_exactly_for_equal_full_captions() -> None:
    # 20,000 scenes, so that there are duplicates to find.
    scenes = [sample_scene(0, "train", i) for i in range(20_000)]
    by_id, by_caption = defaultdict(set), defaultdict(set)
    for scene in scenes:
        caption = tuple((o.size, o.texture, o.color, o.shape, o.place) for o in scene.objects)
        by_id[scene.image_id].add(caption)
        by_caption[caption].add(scene.image_id)
    assert all(len(captions) == 1 for captions in by_id.values())
    assert all(len(ids) == 1 for ids in by_caption.values())
    assert 0 < len(scenes) - len(by_id) < 0.05 * len(scenes)
    assert len({scene.image_id for scene in scenes[:1000]}) >= 990
    assert max(by_id) < 2**48


@pytest.mark.parametrize("split", SETS)
def test_swapped_captions_are_false_with_the_same_words(records: dict, split: str) -> None:
    pairs = [row for row in records[split] if row["relational"]]
    swapped = [row for row in pairs if row["swapped"]]
    assert len(swapped) > 0.95 * len(pairs)
    for row in swapped:
        assert sorted(row["swapped"].split()) == sorted(row["relational"].split())
        assert not relational_truth(row["swapped"], row["objects"])


@pytest.mark.parametrize("split", SPLITS)
def test_siblings_differ_exactly_by_the_swap(split: str) -> None:
    kinds = Counter()
    for number in range(0, 1200, 2):
        scenes = sample_siblings(2, split, number)
        assert scenes == tuple(sample_sibling(2, split, number + i) for i in range(2))
        assert [s.number for s in scenes] == [number, number + 1]
        a, b = (record(s) for s in scenes)
        plain = sample_scene(2, split, number)
        if scenes[0] == plain:  # nothing to exchange: an independent scene follows
            assert scenes[1] == sample_scene(2, split, number + 1)
            kinds["none", len(a["objects"]) == 1] += 1
            continue
        assert replace(scenes[0], claims=None) == plain
        assert scenes[0].background == scenes[1].background
        assert scenes[0].image_id != scenes[1].image_id
        # Captions of the same words, each true of its own scene and false of the other.
        assert (a["relational"], a["swapped"]) == (b["swapped"], b["relational"])
        assert sorted(a["relational"].split()) == sorted(b["relational"].split())
        for own, other in ((a, b), (b, a)):
            assert relational_truth(own["relational"], own["objects"])
            assert not relational_truth(own["relational"], other["objects"])
        # The same objects but for one attribute, or the place, of two.
        keys = ("shape", "color", "size", "texture", "place")
        for key in keys:
            assert Counter(o[key] for o in a["objects"]) == Counter(o[key] for o in b["objects"])
        changed = Counter(o["place"] for o in a["objects"] if o not in b["objects"])
        assert len(changed) == 2
        at = [{o["place"]: o for o in row["objects"] if o["place"] in changed} for row in (a, b)]
        keys = [k for k in keys if any(at[0][p][k] != at[1][p][k] for p in changed)]
        (p, q) = changed
        for key in keys:
            assert (at[0][p][key], at[0][q][key]) == (at[1][q][key], at[1][p][key])
        kinds[keys[0] if len(keys) == 1 else "place"] += 1
    # Few scenes of several objects have no sibling, and every attribute is exchanged.
    assert kinds["none", False] < 0.05 * kinds.total()
    assert min(kinds[k] for k in ("shape", "color", "size", "texture", "place")) > 10, kinds


def test_share_of_siblings() -> None:
    num_siblings = {}
    for share in (0.0, 0.25, 1.0):
        pairs = [sample_siblings(0, "train", i, share) for i in range(0, 4000, 2)]
        num_siblings[share] = sum(a.claims is not None for a, _ in pairs)
        for i, pair in enumerate(pairs):
            if pair[0].claims is None:
                assert pair == tuple(sample_scene(0, "train", 2 * i + j) for j in range(2))
    assert num_siblings[0.0] == 0
    # A quarter of 2,000, within 4 standard deviations, of what can be swapped.
    assert abs(num_siblings[0.25] / num_siblings[1.0] - 0.25) < 0.045


def test_held_out_combinations_are_only_in_heldout(records: dict) -> None:
    assert len(HELD_OUT) == len({s for s, _ in HELD_OUT}) == len({c for _, c in HELD_OUT}) == 8
    for split in ("train", "val", "siblings"):
        for row in records[split]:
            assert not {(o["shape"], o["color"]) for o in row["objects"]} & set(HELD_OUT)
            sentences = [*row["captions"], row["swapped"] or ""]
            sentences += [q["question"] for q in row["questions"]]
            named = {words[:1:-1] for text in sentences for words in PHRASE.findall(text)}
            assert not named & set(HELD_OUT)
            facts = [re.match(r"the (\w+) is (\w+)$", e["sentence"]) for e in row["entailment"]]
            assert not {m.groups() for m in facts if m} & set(HELD_OUT)
    for row in records["heldout"]:
        assert {(o["shape"], o["color"]) for o in row["objects"]} & set(HELD_OUT)


@pytest.mark.parametrize("split", SETS)
def test_answers_are_true(records: dict, split: str) -> None:
    asked = Counter()
    for row in records[split]:
        for q in row["questions"]:
            assert answer(q["question"], row["objects"]) == q["answer"], q
            assert q["answer"] in ANSWERS
            asked[q["type"]] += 1
    assert len(asked) == 8
    assert min(asked.values()) > 400


@pytest.mark.parametrize("kind", ["exists", "relation"])
@pytest.mark.parametrize("split", SETS)
def test_yes_no_is_balanced(records: dict, split: str, kind: str) -> None:
    answers = [q["answer"] for row in records[split] for q in row["questions"] if q["type"] == kind]
    # 4 standard deviations of a fair coin.
    assert abs(answers.count("yes") / len(answers) - 0.5) < 2 / len(answers) ** 0.5


def test_blind_answer_accuracy(records: dict) -> None:
    questions = [q for row in records["train"] for q in row["questions"]]
    blind = blind_answer_accuracy(questions)
    assert blind["exists"] < 0.56
    assert blind["color"] < 0.2
    assert 0.25 < blind["count"] < 0.5
    one = blind_answer_accuracy([{"type": "a", "answer": x} for x in "xxyz"])
    assert one == {"a": 0.5, "all": 0.5}
    with pytest.raises(ValueError, match="at least one"):
        blind_answer_accuracy([])


@pytest.mark.parametrize("split", SETS)
def test_entailment_labels(records: dict, split: str) -> None:
    for row in records[split]:
        assert {e["label"] for e in row["entailment"]} == {"entailment", "neutral", "contradiction"}
        for e in row["entailment"]:
            assert entailment_label(e["sentence"], row["objects"]) == e["label"], e


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_words_alone_do_not_tell_the_label(split: str) -> None:
    # A table sentence -> label of one half stays at chance on the other half.
    facts, pairs = [], []
    for i in range(3000):
        facts += [
            (e["sentence"], e["label"]) for e in record(sample_scene(0, split, i))["entailment"]
        ]
    pairs = [
        (p["statement"], p["label"]) for p in (image_pair(0, split, i, 3000) for i in range(3000))
    ]
    for rows, chance in ((facts, 1 / 3), (pairs, 1 / 2)):
        table = defaultdict(Counter)
        half = len(rows) // 2
        for text, label in rows[:half]:
            table[text][label] += 1
        test = rows[half:]
        hits = sum(
            bool(c := table[text]) and c.most_common(1)[0][0] == label for text, label in test
        )
        assert hits / len(test) < chance + 4 * (chance * (1 - chance) / len(test)) ** 0.5


def test_nlvr_labels_are_true_and_balanced() -> None:
    labels = []
    for i in range(400):
        pair = image_pair(0, "val", i, 500)
        left, right = (
            record(sample_scene(0, "val", int(pair[k])))["objects"] for k in ("left", "right")
        )
        text = pair["statement"]
        words = [word for word in re.findall(r"\w+", text) if word in COLORS + SHAPES]
        shows = [
            [any(word in (o["color"], o["shape"]) for o in side) for word in words]
            for side in (left, right)
        ]
        if text.startswith("both"):
            truth = shows[0][0] and shows[1][0]
        elif text.startswith("exactly"):
            truth = shows[0][0] != shows[1][0]
        elif len(words) == 2:
            truth = shows[0][0] and shows[1][1]
        elif "more" in text:
            truth = len(left) > len(right)
        else:
            assert text == "the two images contain the same number of shapes"
            truth = len(left) == len(right)
        assert truth == pair["label"], pair
        assert pair["left"] != pair["right"]
        labels.append(pair["label"])
    assert sum(labels) == 200
    with pytest.raises(ValueError, match="too few"):
        image_pair(0, "val", 0, 1)


def test_regions_are_noisy_truth() -> None:
    scene = next(s for i in range(99) if len((s := sample_scene(0, "train", i)).objects) == 3)
    again, exact = regions(scene), regions(scene, noise=0.0)
    noisy = regions(scene)
    assert all(np.array_equal(a, b) for a, b in zip(again, noisy, strict=True))
    assert noisy.features.shape == (8, 64)
    assert noisy.soft_labels.shape == (8, 65)
    np.testing.assert_allclose(noisy.soft_labels.sum(axis=1), 1, rtol=1e-5)
    assert sorted(noisy.sources) == [-1] * 5 + [0, 1, 2]
    for r, source in enumerate(exact.sources):
        label = int(exact.soft_labels[r].argmax())
        if source < 0:
            assert label == 64
            continue
        o = scene.objects[source]
        assert (SHAPES[label // 8], COLORS[label % 8]) == (o.shape, o.color)
        np.testing.assert_allclose(exact.boxes[r], o.box, rtol=1e-6)
        assert 0 < np.abs(noisy.boxes[r] - o.box).max() < 0.1
    hits, total = 0, 0
    for i in range(200):
        got = regions(sample_scene(0, "train", i))
        clean = regions(sample_scene(0, "train", i), noise=0.0)
        # The nearest clean region of the scene is the right one nearly always, though never equal.
        distance = np.linalg.norm(got.features[:, None] - clean.features[None], axis=2)
        same = clean.sources[distance.argmin(axis=1)] == got.sources
        hits, total = hits + int(same.sum()), total + len(same)
        assert distance.min() > 0.1
    assert hits > 0.97 * total
    with pytest.raises(ValueError, match="num_regions"):
        regions(scene, num_regions=2)


@pytest.mark.parametrize("size", [64, 96])
def test_png_decodes_to_the_rendered_pixels(size: int) -> None:
    for i in range(20):
        image = render(sample_scene(0, "train", i), size)
        with PIL.Image.open(io.BytesIO(encode_png(image))) as decoded:
            assert (decoded.format, decoded.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(decoded), image)


@pytest.mark.parametrize("siblings", [0.0, 0.5, 1.0])
def test_shards_are_readable_and_reproducible(tmp_path: Path, siblings: float) -> None:
    sample = partial(sample_sibling, share=siblings) if siblings else sample_scene
    for name in ("a", "b"):
        # A longer earlier set leaves nothing behind.
        write_shards(tmp_path / name, num_samples=70, samples_per_shard=30, progress=False)
        summary = write_shards(
            tmp_path / name,
            num_samples=50,
            num_pairs=10,
            siblings=siblings,
            samples_per_shard=30,
            progress=False,
        )
    assert summary["shards"] == ["train-000000.tar", "train-000001.tar"]
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == [*summary["shards"], "train.info.json", "train.nlvr.jsonl"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    names = []
    for shard in summary["shards"]:
        with tarfile.open(tmp_path / "a" / shard) as tar:
            for member in tar:
                names.append(member.name)
                data = tar.extractfile(member).read()
                scene = sample(0, "train", int(Path(member.name).stem))
                if member.name.endswith(".json"):
                    assert json.loads(data) == json.loads(json.dumps(record(scene)))
                else:
                    assert np.array_equal(
                        np.asarray(PIL.Image.open(io.BytesIO(data))), render(scene)
                    )
    assert names == [f"{i:09d}.{end}" for i in range(50) for end in ("png", "json")]
    pairs = (tmp_path / "a" / "train.nlvr.jsonl").read_text().splitlines()
    assert len(pairs) == 10
    assert {json.loads(p)[side] + ".png" for p in pairs for side in ("left", "right")} <= set(names)


def test_make_writes_the_splits(tmp_path: Path) -> None:
    summaries = make(
        tmp_path,
        120,
        val_samples=20,
        heldout_samples=0,
        image_size=32,
        siblings=1.0,
        progress=False,
    )
    assert list(summaries) == ["train", "val"]
    assert [s["siblings"] for s in summaries.values()] == [1.0, 0.0]
    assert (summaries["train"]["num_pairs"], summaries["val"]["num_pairs"]) == (60, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train", "val"]
    info = json.loads((tmp_path / "val" / "val.info.json").read_text())
    assert info["answers"] == list(ANSWERS)
    assert info["num_samples"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 1, "samples_per_shard": 0}, "samples_per_shard"),
        ({"num_samples": 3, "siblings": 1.0}, "num_samples"),
        ({"num_samples": 2, "siblings": 1.5}, "siblings"),
        ({"num_samples": 1, "split": "dev"}, "split"),
        ({"num_samples": 1, "seed": -1}, "seed"),
        ({"num_samples": 1, "image_size": 8}, "size"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "x", progress=False, **arguments)
