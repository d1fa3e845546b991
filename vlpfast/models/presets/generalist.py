"""One model for many tasks: everything is similarity, or everything is text."""

from __future__ import annotations

from vlpfast.models.presets.sizes import Parts, Shape, merge


def uni_perceiver(shape: Shape) -> Parts:
    """Uni-Perceiver: one pre-norm stack encodes images, texts, both and the words and class names
    with which they are compared; a learned temperature per task. Base is ViT-B/16 at 224 px.

    Deviations: no LayerScale, no stochastic depth, no video; embeddings of images and of texts have
    a LayerNorm each; a word is asked for by the output of the word before it, not by a second
    stream of start tokens; the vocabulary is this library's BPE of the published size.

    Source: Zhu et al. 2022, arXiv:2112.01522; fundamentalvision/Uni-Perceiver
        configs/BERT_L12_H768_experiments/16tasks_training_basedense_stage2_64gpu.yaml.
    """
    return {
        "depths": (0, 0, shape.text + shape.fusion),
        "vision": {
            "position": "sincos",
            "class_token": False,
            "pool": "mean",
            "embed_norm": True,
        },
        "text": {"pool": "first", "token_types": 1, "embed_norm": True},
        "fusion": {"kind": "shared"},
        "embed_dim": shape.embed_dim,
        "match_head": False,
        "task_scales": ("mlm", "lm", "classify"),
        "base": {"text": {"vocab_size": 49408, "context_length": 512}},
    }


def uni_perceiver_moe(shape: Shape) -> Parts:
    """Uni-Perceiver-MoE: of every second block, MLP and attention projections are 8 experts, two of
    which a token gets by its attributes.

    Source: Zhu et al. 2022, arXiv:2206.04674; fundamentalvision/Uni-Perceiver
        configs/BERT_L12_H768_experiments/16tasks_training_basemoe_stage2_56gpu.yaml.
    """
    return merge(uni_perceiver(shape), {"fusion": {"moe_experts": 8, "moe_top_k": 2}})


def metalm(shape: Shape) -> Parts:
    """MetaLM: an image tower, a linear connector, a causal decoder in whose sequence the image's
    tokens and a prompt see themselves both ways.

    No code was published. Base is ViT-B/16 at 224 px and 12 decoder blocks of its width.

    Source: Hao et al. 2022, arXiv:2206.06336, section 2.
    """
    return {
        "depths": (shape.vision, 0, shape.text + shape.fusion),
        "fusion": {"kind": "prefix", "causal": True},
        "lm_head": "linear",
        "match_head": False,
        "base": {"text": {"vocab_size": 50257, "context_length": 512}},
    }
