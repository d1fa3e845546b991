"""Overlaps by counting cells, the best box for all by trying, what is written and its share."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests._batches import make_batch
from tests.models.test_unified_io import lively
from vlpfast.eval import boxes
from vlpfast.eval.boxes import best_constants, box_probe, overlaps, written_boxes
from vlpfast.eval.codes import image_probe
from vlpfast.eval.run import TASKS
from vlpfast.ragged import Ragged

SIDE = 8
EXTENT = st.integers(0, SIDE - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, SIDE)))
CORNERS = st.tuples(EXTENT, EXTENT).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))


def cells(box) -> set[tuple[int, int]]:
    x1, y1, x2, y2 = box
    return set(product(range(x1, x2), range(y1, y2)))


@given(CORNERS, CORNERS)
def test_overlap_by_counting(one, two):
    a, b = (torch.tensor(box, dtype=torch.float64) / SIDE for box in (one, two))
    expected = len(cells(one) & cells(two)) / len(cells(one) | cells(two))
    assert float(overlaps(a, b)) == pytest.approx(expected)
    assert float(overlaps(b, a)) == float(overlaps(a, b))


def test_a_box_without_area_overlaps_nothing():
    turned, whole = torch.tensor([0.6, 0.2, 0.4, 0.9]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert float(overlaps(turned, whole)) == 0
    assert float(overlaps(turned, turned)) == 0
    assert float(overlaps(whole, whole)) == 1


def test_the_best_constant_by_hand():
    corner, centre = [0.0, 0.0, 0.2, 0.2], [0.25, 0.25, 0.75, 0.75]
    truth = torch.tensor([corner, corner, centre, [0.8, 0.8, 1.0, 1.0]], dtype=torch.float64)
    assert best_constants(truth) == (0.5, 0.5)
    # A square in the centre is tried though no box of the data is one.
    near = torch.tensor([[0.2, 0.3, 0.7, 0.7], [0.3, 0.3, 0.8, 0.75]], dtype=torch.float64)
    assert best_constants(near)[0] == 1.0


NAMES = ("red ring", "blue star")
PLACES = {
    0: ((0.0, 0.0, 0.25, 0.25), (0.5, 0.5, 1.0, 1.0)),
    1: ((0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.25, 0.75)),
    2: ((0.0, 0.5, 0.5, 1.0), (0.75, 0.0, 1.0, 0.25)),
}


class Tokens:
    """A tokenizer of prompts that are numbers of names."""

    locations = range(8, 16)
    start_id, end_id = 1, 2

    def encode(self, texts, _max_tokens):
        return [[next(i for i, n in enumerate(NAMES) if n in t)] for t in texts]


def test_shares_by_hand(monkeypatch):
    """A reader that knows each image's boxes; other images' boxes overlap nothing."""
    record = lambda i: {
        "objects": [{"name": n, "box": box} for n, box in zip(NAMES, PLACES[i], strict=True)]
    }
    index = SimpleNamespace(record=record)

    def written(_model, keys, kv_index, prompt, _tokenizer):
        asked = zip(kv_index.tolist(), prompt.values.tolist(), strict=True)
        return torch.tensor([PLACES[int(keys[i])][name] for i, name in asked]).double()

    monkeypatch.setattr(boxes, "written_boxes", written)
    batch = make_batch(3, masked=False)
    batch = SimpleNamespace(
        image_ids=torch.arange(3), sample_ids=torch.arange(3), visual=lambda _: batch.sample_ids
    )
    model = SimpleNamespace(
        device=torch.device("cpu"),
        config=SimpleNamespace(vision=SimpleNamespace(front="patches")),
        encode_image=lambda images: SimpleNamespace(tokens=images),
        image_keys=lambda tokens: tokens,
    )
    whole = lambda ids: np.tile([0.0, 0.0, 1.0, 1.0], (len(ids), 1))
    result = box_probe(model, [batch], index, Tokens(), crops=whole, max_tokens=16)
    assert result.metrics["box_accuracy"] == result.metrics["mean_iou"] == 100
    assert result.metrics["shuffled_box_accuracy"] == result.metrics["shuffled_mean_iou"] == 0
    assert result.counts == {"num_samples": 3, "num_boxes": 6}
    truth = torch.tensor([box for pair in PLACES.values() for box in pair]).double()
    found, mean = best_constants(truth)
    assert result.chance == pytest.approx({"box_accuracy": 100 * found, "mean_iou": 100 * mean})
    with pytest.raises(ValueError, match=r"a record without 'objects', found \['captions'\]"):
        box_probe(
            model,
            [batch],
            SimpleNamespace(record=lambda _: {"captions": []}),
            Tokens(),
            crops=whole,
            max_tokens=16,
        )
    words = SimpleNamespace(locations=range(0))
    with pytest.raises(ValueError, match="no location tokens: train with locations"):
        box_probe(model, [batch], index, words, crops=whole, max_tokens=16)


@torch.no_grad()
def test_boxes_are_the_likeliest_places_one_by_one():
    model, tokenizer = lively(), Tokens()
    images = make_batch(2, masked=False).images
    keys = model.image_keys(model.encode_image(images).tokens)
    prompt, rows = Ragged.from_lists([[1, 5, 6, 2], [1, 7, 2], [1, 2]]), torch.tensor([1, 0, 1])
    told = written_boxes(model, keys, rows, prompt, tokenizer)
    for row in range(3):
        one, ids = torch.tensor([row]), [1]
        for _ in range(4):
            text = Ragged.from_lists([ids])
            states = model.decode(text, keys, rows[one], prompt=prompt.select(one)).values
            ids.append(8 + int(model.next_token_logits(states[-1])[8:16].argmax()))
        y1, x1, y2, x2 = (min((i - 8 + 0.5) / 7, 1.0) for i in ids[1:])
        assert told[row].tolist() == pytest.approx([x1, y1, x2, y2])
    assert len({tuple(box) for box in told.tolist()}) > 1


WORDS, CODES = 20, 8


class Caption:
    """Writes the code that its prompt names, whatever was before."""

    device = torch.device("cpu")
    config = SimpleNamespace(text=SimpleNamespace(vocab_size=WORDS, image_codes=CODES))

    def read(self, keys, own, prompt):
        assert keys is None
        return prompt.values[prompt.first() + 1]

    def decode(self, text, sources, own):
        return text.with_values(sources[own][text.row_ids()])

    def next_token_logits(self, states):
        return torch.nn.functional.one_hot(WORDS + states, WORDS + CODES).float()


def test_codes_from_the_true_and_from_another_caption():
    codes = [3, 5, 5, 0]
    text = Ragged.from_lists([[1, WORDS + c, WORDS + c, 2] for c in codes])
    prompt = Ragged.from_lists([[1, c, 2] for c in codes])
    batch = SimpleNamespace(image_ids=torch.tensor([0, 1, 1, 2]), text=text, prompt=prompt)
    result = image_probe(Caption(), [batch])
    assert result.metrics == {"code_accuracy": 100, "other_caption_code_accuracy": 0}
    assert result.chance == {"code_accuracy": 50}
    assert result.counts == {"num_images": 4, "num_codes": 8}
    alone = SimpleNamespace(image_ids=torch.tensor([1, 1]), text=text.select(torch.tensor([1, 2])))
    alone.prompt = prompt.select(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="every batch holds a single image"):
        image_probe(Caption(), [alone])
    assert {"box", "image"} <= set(TASKS)
