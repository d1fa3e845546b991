"""Two streams that read each other by co-attention.

The compact sizes normalise before each branch, as `albef`'s, and read the regions of the embedded
scenes; for others set `vision.region_dim` and `vision.region_classes`.
"""

from __future__ import annotations

from vlpfast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
from vlpfast.models.presets.sizes import compact


def _two_streams(
    preset: str,
    size: str,
    depths: tuple[int, int, int],
    *,
    image: dict,
    fusion: dict,
    image_size: int = 224,
    **model,
) -> ModelConfig:
    """Text and fusion as BERT; `image` is what differs of the image stream. `depths` are those of
    vision, text and fusion; `image_size` is base's.
    """
    base = size == "base"
    shape = {"dim": 768, "heads": 12} if base else compact(size)[0]
    norm = {"norm": "post", "norm_eps": 1e-12} if base else {"norm_eps": 1e-6}
    dropout = {"dropout": 0.1, "attention_dropout": 0.1} if base else {}
    vision, text, co = depths
    regions = {"region_dim": 2048 if base else 64, "region_classes": 1601 if base else 65}
    return ModelConfig(
        preset,
        size,
        image_size=image_size if base else compact(size)[1],
        embed_dim=0,
        vision=VisionConfig(
            **shape | {"depth": vision, "front": "regions"} | norm | dropout | regions | image
        ),
        text=TextConfig(
            **shape | {"depth": text} | norm | dropout,
            vocab_size=30522 if base else 4096,
            context_length=512 if base else 77,
            pool="first",
            embed_norm=True,
            token_types=2,
        ),
        fusion=FusionConfig(**shape | {"depth": co, "kind": "co"} | norm | dropout | fusion),
        mlm_head=True,
        **{"region_heads": True} | model,
    )


def vilbert(size: str) -> ModelConfig:
    """ViLBERT; base is BERT-base beside an image stream of six layers of width 1024, six layers of
    co-attention between text layers 6 to 11 and image layers 0 to 5.

    As a stack: a layer of `fusion` is one of co-attention and the next of each stream. So the image
    stream has no layer of its own before the first co-attention.

    Source: Lu et al. 2019, arXiv:1908.02265; facebookresearch/vilbert-multi-task
    config/bert_base_6layer_6conect.json.
    """
    image = {"region_kind": "vilbert", "mlp_ratio": 1.0}
    image |= {"dim": 1024, "heads": 8} if size == "base" else {}
    _, text, co = (0, 6, 6) if size == "base" else compact(size)[3]
    return _two_streams(
        "vilbert",
        size,
        (0, text, co),
        image=image,
        fusion={"co_mlp": True, "pair_pooler": True},
    )


def lxmert(size: str) -> ModelConfig:
    """LXMERT; base is 9 layers of text, 5 of regions and 5 of both, whose co-attention shares its
    weights: 207.94 M parameters without heads, 228.05 M with all of them. The compact sizes have
    no heads for attributes (`vision.region_attributes`) and answers (`answers`).

    Source: Tan & Bansal 2019, arXiv:1908.07490; airsplay/lxmert src/lxrt/modeling.py.
    """
    _, text, co = (5, 9, 5) if size == "base" else compact(size)[3]
    return _two_streams(
        "lxmert",
        size,
        (co, text, co),
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
    base = size == "base"
    _, text, co = (5, 9, 5) if base else compact(size)[3]
    cells = compact(size)[2] if not base else 32
    return _two_streams(
        "x-lxmert",
        size,
        (co, text, co),
        image={"front": "grid", "cnn": "resnet50" if base else "small", "patch_size": cells},
        fusion={"tied": True, "pooler": True},
        image_size=256,
        region_heads=False,
        codes=10_000 if base else 256,
    )
