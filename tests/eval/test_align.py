"""The alignment probe: which words count, where their mass goes, and its chance."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests._batches import make_batch
from vlpfast.eval.align import align_probe, overlap
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

WORDS = ["[S]", "[E]", "red", "blue", "circle", "square", "a", "and"]
LEFT, RIGHT, NOWHERE = (0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 1.0, 1.0), (0.45, 0.0, 0.55, 0.05)


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[i] for i in ids)


class Aligned(nn.Module):
    """Word w and a region of feature w have the same vector: "red" and "circle" share one."""

    device = torch.device("cpu")

    def encode_image(self, regions: Regions) -> SimpleNamespace:
        return SimpleNamespace(tokens=regions.features)

    def encode_text(self, text: Ragged) -> SimpleNamespace:
        kinds = torch.tensor([2, 2, 0, 1, 0, 1, 2, 2])
        values = nn.functional.one_hot(kinds[text.values], 3).float()
        return SimpleNamespace(tokens=text.with_values(values))

    def image_keys(self, tokens: Ragged) -> Ragged:
        return tokens

    def fuse_pairs(self, text: Ragged, keys: Ragged, kv_index: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(text=text, image=keys.select(kv_index))


def one(shape: str, color: str, box: tuple) -> dict:
    return {"shape": shape, "color": color, "box": box}


def test_mass_goes_to_the_region_that_is_spoken_of():
    texts = [[0, 6, 2, 4, 7, 3, 5, 1], [0, 2, 1]]
    features = torch.eye(3)[torch.tensor([2, 0, 1, 0])]
    regions = Regions(
        Ragged(features, torch.tensor([0, 3, 4], dtype=torch.int32), 3),
        torch.tensor([NOWHERE, LEFT, RIGHT, LEFT]),
    )
    batch = replace(make_batch(2, masked=False), text=Ragged.from_lists(texts), regions=regions)
    records = [
        {"objects": [one("circle", "red", LEFT), one("square", "blue", RIGHT)]},
        {"objects": [one("circle", "red", LEFT), one("square", "red", RIGHT)]},
    ]
    index = SimpleNamespace(record=records.__getitem__)
    result = align_probe(Aligned(), [batch], index, Tokenizer())
    # "red" of the second caption could be either object.
    assert result.counts == {"num_words": 4}
    assert result.chance["region_mass"] == pytest.approx(100 / 3)
    assert result.metrics["region_mass"] > 90
    assert result.metrics["shuffled_region_mass"] < result.metrics["region_mass"]
    with pytest.raises(ValueError, match="no caption names an object"):
        align_probe(Aligned(), [], index, Tokenizer())


def test_overlap():
    boxes = torch.tensor([LEFT, RIGHT, (0.0, 0.0, 0.2, 0.4)])
    torch.testing.assert_close(overlap(boxes, LEFT), torch.tensor([1.0, 0.0, 0.5]))
