"""Names of the tensors of transformers' and open_clip's models beside ours.

In a table, `{k}` stands for "weight" and "bias", `{n}` for what a BatchNorm has, and several names
on one side are joined by rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from vlpfast.integrations.weights import Layout, Rule
from vlpfast.models.config import ModelConfig

Names = Mapping[str, str]

_QKV = "self_attn.q_proj.{k} self_attn.k_proj.{k} self_attn.v_proj.{k}"
_TRANSFORMERS_BLOCK = {
    "attention.qkv.{k}": _QKV,
    "attention.out.{k}": "self_attn.out_proj.{k}",
    "norm1.{k}": "layer_norm1.{k}",
    "norm2.{k}": "layer_norm2.{k}",
    "mlp.fc1.{k}": "mlp.fc1.{k}",
    "mlp.fc2.{k}": "mlp.fc2.{k}",
}
_BERT_BLOCK = {
    "attention.qkv.{k}": "attention.self.query.{k} attention.self.key.{k} attention.self.value.{k}",
    "attention.out.{k}": "attention.output.dense.{k}",
    "norm1.{k}": "attention.output.LayerNorm.{k}",
    "norm2.{k}": "output.LayerNorm.{k}",
    "mlp.fc1.{k}": "intermediate.dense.{k}",
    "mlp.fc2.{k}": "output.dense.{k}",
}
_OPEN_CLIP_BLOCK = {
    "attention.qkv.{k}": "attn.in_proj_{k}",
    "attention.out.{k}": "attn.out_proj.{k}",
    "norm1.{k}": "ln_1.{k}",
    "norm2.{k}": "ln_2.{k}",
    "mlp.fc1.{k}": "mlp.c_fc.{k}",
    "mlp.fc2.{k}": "mlp.c_proj.{k}",
}
_TIMM_BLOCK = {
    "attention.qkv.{k}": "attn.qkv.{k}",
    "attention.out.{k}": "attn.proj.{k}",
    **{f"{name}.{{k}}": f"{name}.{{k}}" for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
}


_ENDINGS = {
    "{k}": ("weight", "bias"),
    "{n}": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
}


def _rules(names: Names, here: str = "", there: str = "", **options: object) -> list[Rule]:
    """A rule for each entry, with prefixes."""
    rules = []
    for ours, theirs in names.items():
        mark = next((mark for mark in _ENDINGS if mark in ours), "")
        for ending in _ENDINGS.get(mark, ("",)):
            sides = [
                tuple(
                    prefix + (name.replace(mark, ending) if mark else name) for name in side.split()
                )
                for prefix, side in ((here, ours), (there, theirs))
            ]
            rules.append(Rule(*sides, **options))
    return rules


def _stack(names: Names, here: str, there: str, depth: int) -> list[Rule]:
    return [
        rule for n in range(depth) for rule in _rules(names, f"{here}.blocks.{n}.", f"{there}.{n}.")
    ]


_POSITION_IDS = ("*.position_ids", "a constant")


def transformers_clip(vision_depth: int, text_depth: int) -> Layout:
    """`CLIPModel` with so many layers."""
    names = {
        "scale": "logit_scale",
        "image_projection.weight": "visual_projection.weight",
        "text_projection.weight": "text_projection.weight",
        "vision.embedding.weight": "vision_model.embeddings.patch_embedding.weight",
        "vision.embedding.class_token": "vision_model.embeddings.class_embedding",
        "vision.embedding.position": "vision_model.embeddings.position_embedding.weight",
        "vision.embed_norm.{k}": "vision_model.pre_layrnorm.{k}",
        "vision.norm.{k}": "vision_model.post_layernorm.{k}",
        "text.embedding.token": "text_model.embeddings.token_embedding.weight",
        "text.embedding.position": "text_model.embeddings.position_embedding.weight",
        "text.norm.{k}": "text_model.final_layer_norm.{k}",
    }
    rules = _rules(names)
    for tower, depth in (("vision", vision_depth), ("text", text_depth)):
        rules += _stack(_TRANSFORMERS_BLOCK, tower, f"{tower}_model.encoder.layers", depth)
    return Layout("transformers CLIPModel", tuple(rules), (_POSITION_IDS,))


def _transformers_siglip(config: ModelConfig) -> Layout:
    names = {
        "text_projection.{k}": "text_model.head.{k}",
        "vision.embedding.{k}": "vision_model.embeddings.patch_embedding.{k}",
        "vision.embedding.position": "vision_model.embeddings.position_embedding.weight",
        "vision.norm.{k}": "vision_model.post_layernorm.{k}",
        "vision.pooler.out.{k}": "vision_model.head.attention.out_proj.{k}",
        "vision.pooler.norm.{k}": "vision_model.head.layernorm.{k}",
        "vision.pooler.mlp.fc1.{k}": "vision_model.head.mlp.fc1.{k}",
        "vision.pooler.mlp.fc2.{k}": "vision_model.head.mlp.fc2.{k}",
        "text.embedding.token": "text_model.embeddings.token_embedding.weight",
        "text.embedding.position": "text_model.embeddings.position_embedding.weight",
        "text.norm.{k}": "text_model.final_layer_norm.{k}",
    }
    rules = _rules(names)
    rules += _rules({"scale": "logit_scale", "logit_bias": "logit_bias"}, lead=1)
    rules += _rules({"vision.pooler.probe": "vision_model.head.probe"}, lead=2)
    joined = {"vision.pooler.q.{k} vision.pooler.kv.{k}": "vision_model.head.attention.in_proj_{k}"}
    rules += _rules(joined, shares=(1, 2))
    for tower in ("vision", "text"):
        depth = getattr(config, tower).depth
        rules += _stack(_TRANSFORMERS_BLOCK, tower, f"{tower}_model.encoder.layers", depth)
    return Layout("transformers SiglipModel", tuple(rules), (_POSITION_IDS,))


# Depth multipliers of EfficientNet-B0 to B7, and blocks of B0's stages (Tan & Le 2019, table 1).
_DEPTHS = (1.0, 1.1, 1.2, 1.4, 1.8, 2.2, 2.6, 3.1)
_STAGES = (1, 2, 2, 3, 3, 4, 1)
# A block of the first stage has no expansion before its depthwise convolution.
_FIRST_STAGE = {
    "conv_dw.weight": "depthwise_conv.depthwise_conv.weight",
    "bn1.{n}": "depthwise_conv.depthwise_norm.{n}",
    "conv_pw.weight": "projection.project_conv.weight",
    "bn2.{n}": "projection.project_bn.{n}",
}
_LATER_STAGES = {
    "conv_pw.weight": "expansion.expand_conv.weight",
    "bn1.{n}": "expansion.expand_bn.{n}",
    "conv_dw.weight": "depthwise_conv.depthwise_conv.weight",
    "bn2.{n}": "depthwise_conv.depthwise_norm.{n}",
    "conv_pwl.weight": "projection.project_conv.weight",
    "bn3.{n}": "projection.project_bn.{n}",
}
_SQUEEZE = {
    "se.conv_reduce.{k}": "squeeze_excite.reduce.{k}",
    "se.conv_expand.{k}": "squeeze_excite.expand.{k}",
}


def _efficientnet(cnn: str) -> list[Rule]:
    """timm's `tf_efficientnet_bN` beside transformers' AlignVisionModel, which numbers all blocks.

    They pad alike where the image's side is a multiple of 32; ALIGN's 289 px is none.
    """
    known = [f"tf_efficientnet_b{n}" for n in range(len(_DEPTHS))]
    if cnn not in known:
        raise ValueError(
            f"transformers' AlignModel has an EfficientNet: vision.cnn must be one of {known}, "
            f"got {cnn!r}"
        )
    here, there = "vision.cnn.network.", "vision_model."
    stem = {
        "conv_stem.weight": "embeddings.convolution.weight",
        "bn1.{n}": "embeddings.batchnorm.{n}",
    }
    rules, number = _rules(stem, here, there), 0
    for stage, blocks in enumerate(_STAGES):
        names = _LATER_STAGES if stage else _FIRST_STAGE
        for block in range(math.ceil(blocks * _DEPTHS[known.index(cnn)])):
            prefixes = f"{here}blocks.{stage}.{block}.", f"{there}encoder.blocks.{number}."
            rules += _rules(names | _SQUEEZE, *prefixes)
            number += 1
    return rules


def _transformers_align(config: ModelConfig) -> Layout:
    names = {
        "scale": "temperature",
        "text_projection.{k}": "text_projection.{k}",
        "text.embedding.token": "text_model.embeddings.word_embeddings.weight",
        "text.embedding.position": "text_model.embeddings.position_embeddings.weight",
        "text.embedding.token_type": "text_model.embeddings.token_type_embeddings.weight",
        "text.embedding.norm.{k}": "text_model.embeddings.LayerNorm.{k}",
    }
    rules = [
        *_rules(names),
        *_stack(_BERT_BLOCK, "text", "text_model.encoder.layer", config.text.depth),
        *_efficientnet(config.vision.cnn),
    ]
    unused = (
        ("text_model.pooler.*", "BERT's pooler, which ALIGN's embeddings do not use"),
        _POSITION_IDS,
        ("*.token_type_ids", "a constant"),
    )
    return Layout("transformers AlignModel", tuple(rules), unused)


_VILT_BLOCK = {
    "attention.qkv.{k}": "attention.attention.query.{k} attention.attention.key.{k} "
    "attention.attention.value.{k}",
    "attention.out.{k}": "attention.output.dense.{k}",
    "norm1.{k}": "layernorm_before.{k}",
    "norm2.{k}": "layernorm_after.{k}",
    "mlp.fc1.{k}": "intermediate.dense.{k}",
    "mlp.fc2.{k}": "output.dense.{k}",
}


def transformers_vilt(depth: int) -> Layout:
    """`ViltModel` with so many layers; it has no heads."""
    names = {
        "vision.embedding.{k}": "embeddings.patch_embeddings.projection.{k}",
        "text.embedding.token": "embeddings.text_embeddings.word_embeddings.weight",
        "text.embedding.position": "embeddings.text_embeddings.position_embeddings.weight",
        "text.embedding.token_type": "embeddings.text_embeddings.token_type_embeddings.weight",
        "text.embedding.norm.{k}": "embeddings.text_embeddings.LayerNorm.{k}",
        "fusion.modality": "embeddings.token_type_embeddings.weight",
        "fusion.norm.{k}": "layernorm.{k}",
        "pooler.{k}": "pooler.dense.{k}",
    }
    rules = [
        *_rules(names),
        *_rules({"vision.embedding.class_token": "embeddings.cls_token"}, lead=2),
        *_rules({"vision.embedding.position": "embeddings.position_embeddings"}, lead=1),
        *_stack(_VILT_BLOCK, "fusion", "encoder.layer", depth),
    ]
    constants = (_POSITION_IDS, ("*.token_type_ids", "a constant"))
    return Layout("transformers ViltModel", tuple(rules), constants)


def _open_clip_text(config: ModelConfig, prefix: str) -> list[Rule]:
    names = {
        "text.embedding.token": "token_embedding.weight",
        "text.embedding.position": "positional_embedding",
        "text.norm.{k}": "ln_final.{k}",
    }
    blocks = f"{prefix}transformer.resblocks"
    return _rules(names, there=prefix) + _stack(_OPEN_CLIP_BLOCK, "text", blocks, config.text.depth)


def _open_clip_clip(config: ModelConfig) -> Layout:
    names = {
        "scale": "logit_scale",
        "vision.embedding.weight": "visual.conv1.weight",
        "vision.embedding.class_token": "visual.class_embedding",
        "vision.embedding.position": "visual.positional_embedding",
        "vision.embed_norm.{k}": "visual.ln_pre.{k}",
        "vision.norm.{k}": "visual.ln_post.{k}",
    }
    projections = {
        "image_projection.weight": "visual.proj",
        "text_projection.weight": "text_projection",
    }
    rules = [
        *_rules(names),
        *_rules(projections, transpose=True),
        *_stack(_OPEN_CLIP_BLOCK, "vision", "visual.transformer.resblocks", config.vision.depth),
        *_open_clip_text(config, ""),
    ]
    return Layout("open_clip CLIP", tuple(rules), (("attn_mask", "a constant"),))


def _open_clip_siglip(config: ModelConfig) -> Layout:
    trunk = {
        "embedding.{k}": "patch_embed.proj.{k}",
        "norm.{k}": "norm.{k}",
        "pooler.q.{k}": "attn_pool.q.{k}",
        "pooler.kv.{k}": "attn_pool.kv.{k}",
        "pooler.out.{k}": "attn_pool.proj.{k}",
        "pooler.norm.{k}": "attn_pool.norm.{k}",
        "pooler.mlp.fc1.{k}": "attn_pool.mlp.fc1.{k}",
        "pooler.mlp.fc2.{k}": "attn_pool.mlp.fc2.{k}",
    }
    rules = [
        *_rules({"scale": "logit_scale", "logit_bias": "logit_bias"}),
        *_rules({"text_projection.{k}": "text.text_projection.{k}"}),
        *_rules(trunk, "vision.", "visual.trunk."),
        *_rules({"vision.embedding.position": "visual.trunk.pos_embed"}, lead=1),
        *_rules({"vision.pooler.probe": "visual.trunk.attn_pool.latent"}, lead=2),
        *_stack(_TIMM_BLOCK, "vision", "visual.trunk.blocks", config.vision.depth),
        *_open_clip_text(config, "text."),
    ]
    return Layout("open_clip SigLIP", tuple(rules), (("text.attn_mask", "a constant"),))


_OPEN_CLIP_POOLER = {
    "query": "query",
    "norm_q.{k}": "ln_q.{k}",
    "norm_k.{k}": "ln_k.{k}",
    "out.{k}": "attn.out_proj.{k}",
}
_OPEN_CLIP_OWN_TEXT = {
    "attention.qkv.{k}": "attn.in_proj_{k}",
    "attention.out.{k}": "attn.out_proj.{k}",
    "norm1.{k}": "ln_1.{k}",
    "norm_between.{k}": "ln_2.{k}",
    "mlp_between.fc1.{k}": "mlp.c_fc.{k}",
    "mlp_between.fc2.{k}": "mlp.c_proj.{k}",
}
_OPEN_CLIP_READS_IMAGE = {
    "cross.out.{k}": "attn.out_proj.{k}",
    "norm_cross.{k}": "ln_1.{k}",
    "norm2.{k}": "ln_2.{k}",
    "mlp.fc1.{k}": "mlp.c_fc.{k}",
    "mlp.fc2.{k}": "mlp.c_proj.{k}",
}


def _open_clip_coca(config: ModelConfig) -> Layout:
    """With `attentional_pool` "cascade", whose pooler is as wide as the vision tower."""
    depth = config.fusion.depth
    names = {
        "scale": "logit_scale",
        "vision.embedding.weight": "visual.conv1.weight",
        "vision.embedding.class_token": "visual.class_embedding",
        "vision.embedding.position": "visual.positional_embedding",
        "vision.embed_norm.{k}": "visual.ln_pre.{k}",
        "vision.norm.{k}": "visual.ln_post.{k}",
        "text.class_token": "text.cls_emb",
        "fusion.norm.{k}": "text_decoder.ln_final.{k}",
    }
    projections = {
        "image_projection.weight": "visual.proj",
        "text_projection.weight": "text.text_projection",
        "lm_head.weight": "text_decoder.text_projection",
    }
    rules = [
        *_rules(names),
        *_rules(projections, transpose=True),
        *_stack(_OPEN_CLIP_BLOCK, "vision", "visual.transformer.resblocks", config.vision.depth),
        *_open_clip_text(config, "text."),
    ]
    for ours, theirs in (("queries", "attn_pool"), ("pooler", "attn_pool_contrastive")):
        here, there = f"vision.{ours}.", f"visual.{theirs}."
        rules += _rules(_OPEN_CLIP_POOLER, here, there)
        rules += _rules({"q.{k} kv.{k}": "attn.in_proj_{k}"}, here, there, shares=(1, 2))
    for n in range(depth):
        here, reads = f"fusion.blocks.{n}.", f"text_decoder.cross_attn.{n}."
        rules += _rules(_OPEN_CLIP_OWN_TEXT, here, f"text_decoder.resblocks.{n}.")
        rules += _rules(_OPEN_CLIP_READS_IMAGE, here, reads)
        keys, norm = (f"fusion.{part}.{{k}}#{n}/{depth}" for part in ("image_kv", "key_norm"))
        joined = {f"{here}cross.q.{{k}} {keys}": f"{reads}attn.in_proj_{{k}}"}
        rules += _rules(joined, shares=(1, 2)) + _rules({norm: f"{reads}ln_1_kv.{{k}}"})
    constants = (("text.attn_mask", "a constant"), ("text_decoder.attn_mask", "a constant"))
    return Layout("open_clip CoCa", tuple(rules), constants)


LAYOUTS: dict[str, dict[str, Callable[[ModelConfig], Layout]]] = {
    "transformers": {
        "align": _transformers_align,
        "clip": lambda config: transformers_clip(config.vision.depth, config.text.depth),
        "siglip": _transformers_siglip,
    },
    "open_clip": {
        "clip": _open_clip_clip,
        "coca": _open_clip_coca,
        "siglip": _open_clip_siglip,
    },
}
