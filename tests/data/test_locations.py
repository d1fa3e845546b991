"""Boxes to location tokens and back, what a crop shows, and the prompts that speak of places."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader, make_tokenizer
from vlpfast.data.locations import bins_box, box_bins, named_objects, shown_part, spell
from vlpfast.data.prompts import choose, examples, iter_texts
from vlpfast.data.scenes import write_shards
from vlpfast.data.tokenizer import Tokenizer

FRACTIONS = st.floats(0, 1)
BOX = (0.25, 0.5, 0.75, 1.0)
RECORD = {
    "objects": [
        {"color": "red", "shape": "ring", "box": [0.0, 0.1, 0.2, 0.3]},
        {"color": "blue", "shape": "star", "box": [0.5, 0.5, 1.0, 1.0]},
        {"name": "a dog", "box": [0.1, 0.1, 0.2, 0.2]},
        {"name": "twin", "box": [0.1, 0.1, 0.2, 0.2]},
        {"name": "twin", "box": [0.3, 0.1, 0.4, 0.2]},
    ]
}


@given(st.tuples(*[FRACTIONS] * 4), st.integers(2, 1000))
def test_a_side_is_off_by_half_a_bin_at_most(box, num_bins):
    back = bins_box(box_bins(box, num_bins), num_bins)
    assert max(abs(a - b) for a, b in zip(back, box, strict=True)) <= 0.5 / (num_bins - 1) + 1e-12


@given(st.integers(2, 1000).flatmap(lambda n: st.tuples(st.just(n), *[st.integers(0, n - 1)] * 4)))
def test_bins_are_those_of_their_box(drawn):
    num_bins, *bins = drawn
    assert box_bins(bins_box(bins, num_bins), num_bins) == bins


def test_bins_are_the_published_ones():
    """`region_to_tokens` of a 400 x 400 image: y1 x1 y2 x2, 999 of the fraction, cut off."""
    assert box_bins(BOX, 1000) == [499, 249, 999, 749]
    assert spell(BOX, 1000) == "<loc499> <loc249> <loc999> <loc749>"
    assert box_bins((-0.1, 0.0, 1.2, 1.0), 10) == [0, 0, 9, 9]


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        ((0.0, 0.0, 1.0, 1.0), BOX),
        ((0.0, 0.5, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0)),
        # Half of its width is left, then less.
        ((0.5, 0.0, 1.0, 1.0), (0.0, 0.5, 0.5, 1.0)),
        ((0.6, 0.0, 1.0, 1.0), None),
        ((0.0, 0.0, 1.0, 0.4), None),
    ],
)
def test_a_crop_moves_and_cuts(crop, expected):
    shown = shown_part(BOX, crop)
    assert shown == (expected if expected is None else pytest.approx(expected))


def test_objects_of_one_name_are_not_asked_for():
    assert [name for name, _ in named_objects(RECORD)] == ["red ring", "blue star", "a dog"]
    ((name, box),) = named_objects(RECORD, (0.5, 0.5, 1.0, 1.0))
    assert (name, box) == ("blue star", (0.0, 0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"need objects with a box .* found one with \['name'\]"):
        examples({"objects": [{"name": "dog"}]}, "box")
    with pytest.raises(ValueError, match=r"'box': no field 'objects', found \['captions'\]"):
        examples({"captions": []}, "box")


def test_prompts_of_places_and_of_images():
    ask = lambda task, number=0: choose(RECORD, "two things", task, number, num_bins=11)
    place = "<loc1> <loc0> <loc3> <loc2>"
    assert ask("box", 3) == ('which region does the text "red ring" describe?', place)
    assert ask("region") == (f'what does the region "{place}" describe?', "red ring")
    assert ask("image") == ('what is the complete image? text: "two things"', "")
    empty = choose({"objects": []}, "nothing", "box", 5, num_bins=11)
    assert empty == ("caption", "nothing")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "val"
    write_shards(folder, num_samples=16, split="val", progress=False)
    return Index.open(folder)


CONFIG = DataConfig(
    path="",
    tasks=("box", "region", "image", "caption"),
    locations=32,
    crop_scale=(1.0, 1.0),
    workers=1,
    vocab_size=512,
    max_tokens=64,
)


def test_location_tokens_are_the_tokenizers_last(scenes, tmp_path):
    tokenizer = make_tokenizer(CONFIG, scenes)
    assert tokenizer.locations == range(tokenizer.vocab_size - 32, tokenizer.vocab_size)
    (ids,) = tokenizer.encode(["where is <loc3> <loc31> of <loc32>"], 64)
    places = [i - tokenizer.locations.start for i in ids if i in tokenizer.locations]
    assert places == [3, 31]
    assert tokenizer.decode(ids) == "where is<loc3><loc31> of <loc32>"
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.locations == tokenizer.locations
    assert again.with_locations(32) is again
    with pytest.raises(ValueError, match="locations is 33, and the tokenizer has 32"):
        again.with_locations(33)
    # Places are no words to learn a vocabulary from.
    assert not [text for text in iter_texts(scenes, CONFIG.tasks) if "<loc" in text]
    plain = Tokenizer.train(["a red ring"] * 3, 300)
    assert plain.with_locations(0) is plain
    assert plain.encode(["a <loc0>"], 32) != plain.with_locations(2).encode(["a <loc0>"], 32)


def test_batches_hold_each_task(scenes):
    tokenizer = make_tokenizer(CONFIG, scenes)
    loader = make_loader(
        scenes, CONFIG, tokenizer=tokenizer, image_size=16, batch_size=8, seed=0, num_codes=4
    )
    ask, kinds = partial(examples, num_bins=32), set()
    for step in range(4):
        batch = loader.load(step)
        drawn = batch.drawn.tolist()
        for row, sample in enumerate(batch.sample_ids.tolist()):
            record, one = scenes.record(sample), torch.tensor([row])
            captions = scenes.captions(sample)
            pairs = [(task, *pair) for task in ("box", "region") for pair in ask(record, task)]
            pairs += [("caption", "caption", c) for c in captions]
            pairs += [("image", f'what is the complete image? text: "{c}"', "") for c in captions]
            got = [part.select(one).values.tolist() for part in (batch.prompt, batch.text)]
            if row in drawn:
                assert got[1] == [1, 0, 0, 0, 0, 2]
                got[1] = [1, 2]
            names = {n for n, *pair in pairs if tokenizer.encode(pair, 64) == got}
            assert len(names) == 1, [tokenizer.decode(ids) for ids in got]
            assert (row in drawn) == (names == {"image"})
            kinds |= names
    loader.close()
    assert kinds == {"box", "region", "image", "caption"}


def test_evaluation_asks_for_images_by_the_captions_of_training(scenes):
    tokenizer = make_tokenizer(CONFIG, scenes)
    config = replace(CONFIG, tasks=("image",), captions=(2,))
    options = {"tokenizer": tokenizer, "image_size": 16, "batch_size": 8, "seed": 0}
    loader = make_loader(scenes, config, **options, train=False, num_codes=4)
    batch = loader.load(0)
    loader.close()
    assert batch.drawn.tolist() == list(range(8))
    for row, sample in enumerate(batch.sample_ids.tolist()):
        asked = f'what is the complete image? text: "{scenes.captions(sample)[2]}"'
        ids = batch.prompt.select(torch.tensor([row])).values.tolist()
        assert [ids] == tokenizer.encode([asked], 64)


def test_a_training_crop_moves_the_boxes(scenes):
    config = DataConfig(
        path="", tasks=("box",), locations=1000, workers=1, vocab_size=512, crop_scale=(0.5, 0.5)
    )
    tokenizer = make_tokenizer(config, scenes)
    loader = make_loader(scenes, config, tokenizer=tokenizer, image_size=64, batch_size=8, seed=0)
    batch, boxes = loader.load(0), loader.draws(0).boxes
    loader.close()
    for row, (x, y, width, height) in enumerate(boxes.tolist()):
        record, one = scenes.record(int(batch.sample_ids[row])), torch.tensor([row])
        side = scenes.at("width", batch.sample_ids[row : row + 1].numpy())[0]
        ids = batch.text.select(one).values.tolist()
        if ids[1] not in tokenizer.locations:
            continue  # nothing to be asked for is left: the caption
        bins = [i - tokenizer.locations.start for i in ids[1:-1]]
        moved = [
            [
                (v * side - o) / s
                for v, o, s in zip(b["box"], (x, y) * 2, (width, height) * 2, strict=True)
            ]
            for b in record["objects"]
        ]
        assert bins in [box_bins(box, 1000) for box in moved]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("box",)}, r"tasks \['box'\] need location tokens: set locations"),
        ({"tasks": ("region",), "locations": 9, "hflip": 0.5}, "hflip and zoom_out would move"),
        ({"tasks": ("box",), "locations": 9, "zoom_out": 1.5}, "hflip and zoom_out would move"),
        ({"tasks": ("box",), "locations": 9, "max_tokens": 5}, "of a box must be >= 6, got 5"),
        ({"locations": 1}, "locations must be 0 or >= 2, got 1"),
    ],
)
def test_settings_that_do_not_fit_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(path="", **options)


def test_images_need_a_number_of_codes(scenes):
    with pytest.raises(ValueError, match="'image' needs the number of an image's codes"):
        make_loader(
            scenes, CONFIG, tokenizer=SimpleNamespace(), image_size=16, batch_size=8, seed=0
        )
