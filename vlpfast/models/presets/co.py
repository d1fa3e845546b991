"""Two streams that read each other by co-attention.

The compact sizes normalise before each branch, as `albef`'s, and read the regions of the embedded
scenes; for others set `vision.region_dim` and `vision.region_classes`.
"""

from __future__ import annotations

from vlpfast.models.presets.sizes import (
    BERT,
    BERT_TEXT,
    BERT_WORDS,
    DETECTOR_REGIONS,
    SCENES_REGIONS,
    Parts,
    Shape,
    merge,
)

_TWO_STREAMS = {
    "vision": SCENES_REGIONS,
    "text": BERT_TEXT,
    "fusion": {"kind": "co"},
    "mlm_head": True,
    "region_heads": True,
    "base": {"stacks": BERT, "vision": DETECTOR_REGIONS, "text": BERT_WORDS},
}


def vilbert(shape: Shape) -> Parts:
    """ViLBERT; base is BERT-base beside an image stream of six layers of width 1024, six layers of
    co-attention between text layers 6 to 11 and image layers 0 to 5.

    As a stack: a layer of `fusion` is one of co-attention and the next of each stream. So the image
    stream has no layer of its own before the first co-attention.

    Source: Lu et al. 2019, arXiv:1908.02265; facebookresearch/vilbert-multi-task
    config/bert_base_6layer_6conect.json.
    """
    own = {
        "depths": (0, shape.text, shape.fusion),
        "vision": {"region_kind": "vilbert", "mlp_ratio": 1.0},
        "fusion": {"co_mlp": True, "pair_pooler": True},
        "base": {"vision": {"dim": 1024, "heads": 8}},
    }
    return merge(_TWO_STREAMS, own)


def lxmert(shape: Shape) -> Parts:
    """LXMERT; base is 9 layers of text, 5 of regions and 5 of both, whose co-attention shares its
    weights: 207.94 M parameters without heads, 228.05 M with all of them. The compact sizes have
    no heads for attributes (`vision.region_attributes`) and answers (`answers`).

    Source: Tan & Bansal 2019, arXiv:1908.07490; airsplay/lxmert src/lxrt/modeling.py.
    """
    own = {
        "vision": {"region_kind": "lxmert"},
        "base": {"vision": {"region_attributes": 401}, "answers": 9500},
    }
    return merge(_TWO_STREAMS, _lxmert(shape), own)


def x_lxmert(shape: Shape) -> Parts:
    """X-LXMERT: LXMERT on the 8 x 8 cells of a CNN's grid, some of which are hidden and told by
    their codes; without answers.

    Deviations: the CNN is trained along, from pixels in which hidden cells are blank; a cell's
    place is a learned vector, not a box; codes are a guide's (`objectives.guide`), k-means centres
    of a CNN's features (preset "kmeans") or a tokenizer's, not those of a detector's features, and
    their head is one linear map.

    Source: Cho et al. 2020, arXiv:2009.11278, section 4.
    """
    own = {
        "vision": {"front": "grid"},
        "region_heads": False,
        "codes": 256,
        "base": {
            "image_size": 256,
            "codes": 10_000,
            "vision": {"cnn": "resnet50", "patch_size": 32},
        },
    }
    return merge(_TWO_STREAMS, _lxmert(shape), own)


def _lxmert(shape: Shape) -> Parts:
    return {
        "depths": (shape.fusion, shape.text, shape.fusion),
        "fusion": {"tied": True, "pooler": True},
        "base": {"depths": (5, 9, 5)},
    }
