"""One stack with experts by modality: fusion encoder, and each modality's tower."""

from __future__ import annotations

from vlpfast.models.presets.sizes import BERT_TEXT, HALF, Parts, Shape


def beit3(shape: Shape) -> Parts:
    """BEiT-3 as released: all projections, norms and MLPs per modality, only the attention's
    product in common, Sub-LN; base is ViT-B/16 at 224 px with 64,010 tokens: 220.99 M parameters,
    1.18 M more in the projections of contrast, 49.2 M in the token head, 6.3 M in that of codes.

    Source: Wang et al. 2022, arXiv:2208.10442; microsoft/unilm beit3/modeling_utils.py, torchscale
    model/BEiT3.py.
    """
    return HALF | {
        "depths": (0, 0, shape.text + shape.fusion),
        "stacks": {"norm_eps": 1e-5},
        "text": {"pool": "first"},
        "fusion": {"kind": "concat", "norm": "sub", "experts": "multiway", "order": "image"},
        "embed_dim": shape.embed_dim,
        "codes": 256,
        "mlm_head": True,
        "mlm_transform": False,
        "mlm_tied": False,
        "match_head": False,
        "base": {"codes": 8192, "text": {"vocab_size": 64010, "context_length": 1022}},
    }


def vlmo(shape: Shape) -> Parts:
    """VLMo: self-attention in common, an MLP and its norm per modality, and in the last two layers
    one more for pairs; LayerScale, relative positions only, two pairs of embeddings. Base is
    ViT-B/16 at 224 px: 175.43 M parameters without pooler and heads.

    Deviations: images stand before texts, which changes no number; each MLP has its own LayerScale
    (VLMo's of a layer share one); the table of words' displacements is as long as the texts.

    Source: Bao et al. 2022, arXiv:2111.02358; microsoft/unilm vlmo/modules/vlmo_module.py,
    multiway_transformer.py, config.py.
    """
    return HALF | {
        "depths": (0, 0, shape.text + shape.fusion),
        "vision": {"position": "none"},
        "text": BERT_TEXT | {"norm_eps": 1e-12, "position": "none"},
        "fusion": {
            "kind": "concat",
            "modality_types": True,
            "pooler": True,
            "experts": "mome",
            "joint_experts": 1,
            "order": "image",
            "relative_bias": True,
            "key_bias": False,
            "layer_scale": 0.1,
        },
        "embed_dim": shape.embed_dim,
        "codes": 256,
        "joint_embedding": True,
        "mlm_head": True,
        "mlm_tied": False,
        "base": {
            "codes": 8192,
            "text": {"vocab_size": 30522, "context_length": 196},
            "fusion": {"joint_experts": 2},
        },
    }
