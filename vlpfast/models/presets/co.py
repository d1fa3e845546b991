"""Two streams that read each other by co-attention.

The compact sizes normalise before each branch, as `albef`'s, and read the regions of the embedded
scenes; for others set `vision.region_dim` and `vision.region_classes`.
"""

from __future__ import annotations

from vlpfast.models.config import ModelConfig
from vlpfast.models.presets.sizes import BERT, BERT_WORDS, SHAPES, build


def _two_streams(
    preset: str,
    size: str,
    depths: tuple[int, int, int],
    *,
    image: dict,
    fusion: dict,
    base: dict | None = None,
    **model,
) -> ModelConfig:
    """Text and fusion as BERT; `image` is what differs of the image stream, `base` what size base
    has besides.
    """
    base = base or {}
    return build(
        preset,
        size,
        depths,
        vision={"front": "regions", "region_dim": 64, "region_classes": 65} | image,
        text={"pool": "first", "embed_norm": True, "token_types": 2},
        fusion={"kind": "co"} | fusion,
        base=base
        | {
            "vision": {"region_dim": 2048, "region_classes": 1601} | BERT | base.get("vision", {}),
            "text": BERT_WORDS | BERT,
            "fusion": BERT,
        },
        **{"mlm_head": True, "region_heads": True} | model,
    )


def vilbert(size: str) -> ModelConfig:
    """ViLBERT; base is BERT-base beside an image stream of six layers of width 1024, six layers of
    co-attention between text layers 6 to 11 and image layers 0 to 5.

    As a stack: a layer of `fusion` is one of co-attention and the next of each stream. So the image
    stream has no layer of its own before the first co-attention.

    Source: Lu et al. 2019, arXiv:1908.02265; facebookresearch/vilbert-multi-task
    config/bert_base_6layer_6conect.json.
    """
    shape = SHAPES[size]
    return _two_streams(
        "vilbert",
        size,
        (0, shape.text, shape.fusion),
        image={"region_kind": "vilbert", "mlp_ratio": 1.0},
        fusion={"co_mlp": True, "pair_pooler": True},
        base={"vision": {"dim": 1024, "heads": 8}},
    )


def lxmert(size: str) -> ModelConfig:
    """LXMERT; base is 9 layers of text, 5 of regions and 5 of both, whose co-attention shares its
    weights: 207.94 M parameters without heads, 228.05 M with all of them. The compact sizes have
    no heads for attributes (`vision.region_attributes`) and answers (`answers`).

    Source: Tan & Bansal 2019, arXiv:1908.07490; airsplay/lxmert src/lxrt/modeling.py.
    """
    return _two_streams(
        "lxmert",
        size,
        _lxmert_depths(size),
        image={"region_kind": "lxmert", "region_attributes": 401 if size == "base" else 0},
        fusion={"tied": True, "pooler": True},
        answers=9500 if size == "base" else 0,
    )


def x_lxmert(size: str) -> ModelConfig:
    """X-LXMERT: LXMERT on the 8 x 8 cells of a CNN's grid, some of which are hidden and told by
    their codes; without answers.

    Deviations: the CNN is trained along, from pixels in which hidden cells are blank; a cell's
    place is a learned vector, not a box; codes are a guide's (`objectives.guide`), k-means centres
    of a CNN's features (preset "kmeans") or a tokenizer's, not those of a detector's features, and
    their head is one linear map.

    Source: Cho et al. 2020, arXiv:2009.11278, section 4.
    """
    return _two_streams(
        "x-lxmert",
        size,
        _lxmert_depths(size),
        image={"front": "grid"},
        fusion={"tied": True, "pooler": True},
        region_heads=False,
        codes=256,
        base={
            "image_size": 256,
            "codes": 10_000,
            "vision": {"cnn": "resnet50", "patch_size": 32},
        },
    )


def _lxmert_depths(size: str) -> tuple[int, int, int]:
    if size == "base":
        return 5, 9, 5
    shape = SHAPES[size]
    return shape.fusion, shape.text, shape.fusion
