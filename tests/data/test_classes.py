"""Class tables: names and rows by hand, the draw's distribution, zero-shot accuracy by hand."""

import json

import numpy as np
import pytest
import torch

from vlpfast.data.classes import class_names, open_classes
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader
from vlpfast.data.scenes import write_shards
from vlpfast.data.scenes.space import HELD_OUT
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.run import EvalOptions, evaluate_model
from vlpfast.models import create_model
from vlpfast.ragged import Ragged


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "heldout"
    write_shards(folder, num_samples=40, split="heldout", progress=False)
    return Index.open(folder)


def shown(index: Index, i: int) -> set[str]:
    return {f"a {o['color']} {o['shape']}" for o in index.record(i)["objects"]}


def test_rows_have_the_names_of_their_objects(scenes):
    table = open_classes(scenes, "scenes")
    assert table.names == sorted(set().union(*(shown(scenes, i) for i in range(40))))
    for i in range(40):
        assert {table.names[c] for c in table.of(i)} == shown(scenes, i)
    # The second time it is read, not made.
    assert open_classes(scenes, "scenes").names == table.names
    held_out = open_classes(scenes, "scenes-heldout")
    assert set(held_out.names) <= {f"a {color} {shape}" for shape, color in HELD_OUT}
    assert all(held_out.of(i) for i in range(40))
    assert open_classes(scenes, "") is None


def test_a_field_may_hold_one_name_or_several():
    assert class_names({"kind": "cat"}, "kind") == ["cat"]
    assert class_names({"kind": ["cat", "dog", "cat"]}, "kind") == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"no field 'kind', found \['other'\]"):
        class_names({"other": 1}, "kind")


def test_every_class_of_a_row_is_drawn_as_often(scenes):
    table = open_classes(scenes, "scenes")
    row = max(range(40), key=lambda i: len(table.of(i)))
    positions = torch.arange(3000)
    drawn = table.draw(np.full(3000, row), 5, positions)
    counts = torch.bincount(drawn)[table.of(row)]
    assert counts.sum() == 3000
    expected = 3000 / len(counts)
    # Four standard deviations.
    assert (counts - expected).abs().max() < 4 * expected**0.5
    assert torch.equal(drawn[10:20], table.draw(np.full(10, row), 5, positions[10:20]))


def test_batches_carry_classes(scenes):
    tokenizer = Tokenizer.train(scenes.iter_captions(), 300)
    config = DataConfig(path="", classes="scenes", workers=1, max_tokens=16)
    options = {"tokenizer": tokenizer, "image_size": 16, "batch_size": 8, "seed": 0}
    loader = make_loader(scenes, config, **options)
    batch = loader.load(0)
    loader.close()
    table = open_classes(scenes, "scenes")
    for sample, number in zip(batch.sample_ids.tolist(), batch.class_ids.tolist(), strict=True):
        assert number in table.of(sample)
    first = batch.class_names.select(torch.tensor([0])).values
    assert tokenizer.decode(first.tolist()) == table.names[0]


def test_zero_shot_accuracy_by_hand(scenes):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(scenes.iter_captions(), 300)
    model = create_model("clip", vocab_size=tokenizer.vocab_size, image_size=64).eval()
    data = DataConfig(path="", workers=1, crop_scale=(1.0, 1.0))
    options = EvalOptions(classes="scenes-heldout", batch_size=16, progress=False)
    result = evaluate_model(model, scenes, tokenizer, ("classify",), data=data, options=options)
    result = result["classify"]
    table = open_classes(scenes, "scenes-heldout")
    loader = make_loader(
        scenes, data, tokenizer=tokenizer, image_size=64, batch_size=40, seed=0, train=False
    )
    (batch,) = list(loader)
    with torch.no_grad():
        names = Ragged.from_lists(tokenizer.encode(table.names, 32))
        scores = model.encode_image(batch.images).embedding @ model.encode_text(names).embedding.T
    hits = sum(int(scores[i].argmax()) in table.of(i) for i in range(40))
    assert result.metrics["accuracy"] == pytest.approx(100 * hits / 40)
    mean = sum(len(table.of(i)) for i in range(40)) / 40
    assert result.chance["accuracy"] == pytest.approx(100 * mean / len(table.names))
    assert json.loads(result.to_json())["info"]["classes"] == "scenes-heldout"


def test_classes_must_be_named(scenes):
    tokenizer = Tokenizer.train(scenes.iter_captions(), 300)
    model = create_model("clip", vocab_size=tokenizer.vocab_size, image_size=64)
    with pytest.raises(ValueError, match="classify needs class names: set classes"):
        evaluate_model(model, scenes, tokenizer, ("classify",), data=DataConfig(path=""))
