"""Names of the tensors of Hugging Face transformers' models beside ours (see `names`)."""

from __future__ import annotations

import math

from vlpfast.integrations.layouts.names import rules_of, stack_of
from vlpfast.integrations.weights import ZEROS, Layout, Rule
from vlpfast.models.config import ModelConfig

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


_POSITION_IDS = ("*.position_ids", "a constant")


def clip(vision_depth: int, text_depth: int) -> Layout:
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
    rules = rules_of(names)
    for tower, depth in (("vision", vision_depth), ("text", text_depth)):
        rules += stack_of(_TRANSFORMERS_BLOCK, tower, f"{tower}_model.encoder.layers", depth)
    return Layout("transformers CLIPModel", tuple(rules), (_POSITION_IDS,))


def siglip(config: ModelConfig) -> Layout:
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
    rules = rules_of(names)
    rules += rules_of({"scale": "logit_scale", "logit_bias": "logit_bias"}, lead=1)
    rules += rules_of({"vision.pooler.probe": "vision_model.head.probe"}, lead=2)
    joined = {"vision.pooler.q.{k} vision.pooler.kv.{k}": "vision_model.head.attention.in_proj_{k}"}
    rules += rules_of(joined, shares=(1, 2))
    for tower in ("vision", "text"):
        depth = getattr(config, tower).depth
        rules += stack_of(_TRANSFORMERS_BLOCK, tower, f"{tower}_model.encoder.layers", depth)
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
    rules, number = rules_of(stem, here, there), 0
    for stage, blocks in enumerate(_STAGES):
        names = _LATER_STAGES if stage else _FIRST_STAGE
        for block in range(math.ceil(blocks * _DEPTHS[known.index(cnn)])):
            prefixes = f"{here}blocks.{stage}.{block}.", f"{there}encoder.blocks.{number}."
            rules += rules_of(names | _SQUEEZE, *prefixes)
            number += 1
    return rules


def align(config: ModelConfig) -> Layout:
    names = {
        "scale": "temperature",
        "text_projection.{k}": "text_projection.{k}",
        "text.embedding.token": "text_model.embeddings.word_embeddings.weight",
        "text.embedding.position": "text_model.embeddings.position_embeddings.weight",
        "text.embedding.token_type": "text_model.embeddings.token_type_embeddings.weight",
        "text.embedding.norm.{k}": "text_model.embeddings.LayerNorm.{k}",
    }
    rules = [
        *rules_of(names),
        *stack_of(_BERT_BLOCK, "text", "text_model.encoder.layer", config.text.depth),
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


_FLAVA_HEAD = {
    "dense.{k}": "transform.dense.{k}",
    "norm.{k}": "transform.LayerNorm.{k}",
    "weight": "decoder.weight",
}


def vilt(depth: int) -> Layout:
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
        *rules_of(names),
        *rules_of({"vision.embedding.class_token": "embeddings.cls_token"}, lead=2),
        *rules_of({"vision.embedding.position": "embeddings.position_embeddings"}, lead=1),
        *stack_of(_VILT_BLOCK, "fusion", "encoder.layer", depth),
    ]
    constants = (_POSITION_IDS, ("*.token_type_ids", "a constant"))
    return Layout("transformers ViltModel", tuple(rules), constants)


def flava(config: ModelConfig) -> Layout:
    """`FlavaForPreTraining`, whose heads on fused tokens are ours; its dVAE has no place here."""
    names = {
        "scale": "flava.logit_scale",
        "image_projection.{k}": "flava.image_projection.{k}",
        "text_projection.{k}": "flava.text_projection.{k}",
        "fusion.image_map.{k}": "flava.image_to_mm_projection.{k}",
        "fusion.text_map.{k}": "flava.text_to_mm_projection.{k}",
        "vision.embedding.{k}": "flava.image_model.embeddings.patch_embeddings.projection.{k}",
        "text.embedding.token": "flava.text_model.embeddings.word_embeddings.weight",
        "text.embedding.position": "flava.text_model.embeddings.position_embeddings.weight",
        "text.embedding.token_type": "flava.text_model.embeddings.token_type_embeddings.weight",
        "text.embedding.norm.{k}": "flava.text_model.embeddings.LayerNorm.{k}",
        "pooler.{k}": "itm_head.pooler.dense.{k}",
        "match_head.{k}": "itm_head.seq_relationship.{k}",
    }
    tokens = {
        "vision.embedding.class_token": "flava.image_model.embeddings.cls_token",
        "fusion.class_token": "flava.multimodal_model.cls_token",
    }
    heads = {"token_head": "mmm_text_head"}
    unused = [
        ("flava.*_model.pooler.*", "a pooler that no objective reads"),
        ("m[il]m_head.*", "a tower's own head: one serves the towers and fusion here"),
        ("image_codebook.*", "the dVAE: a tokenizer is a run of its own here"),
        _POSITION_IDS,
        ("*.token_type_ids", "a constant"),
    ]
    if config.codes:
        heads["code_head"] = "mmm_image_head"
        tokens["vision.embedding.mask_token"] = "flava.image_model.embeddings.mask_token"
    else:
        unused.append(("mmm_image_head.*", "codes is 0"))
        unused.append(("flava.image_model.embeddings.mask_token", "codes is 0"))
    rules = [
        *rules_of(names),
        *rules_of(tokens, lead=2),
        *rules_of(
            {"vision.embedding.position": "flava.image_model.embeddings.position_embeddings"},
            lead=1,
        ),
    ]
    for ours, theirs in heads.items():
        rules += rules_of(_FLAVA_HEAD, f"{ours}.", f"{theirs}.")
        # One tensor, there by two names.
        rules += [Rule((f"{ours}.bias",), (f"{theirs}.{n}",)) for n in ("bias", "decoder.bias")]
    for ours, theirs in (("vision", "image"), ("text", "text"), ("fusion", "multimodal")):
        there, depth = f"flava.{theirs}_model.", getattr(config, ours).depth
        rules += stack_of(_VILT_BLOCK, ours, f"{there}encoder.layer", depth)
        rules += rules_of({"norm.{k}": "layernorm.{k}"}, f"{ours}.", there)
    return Layout("transformers FlavaForPreTraining", tuple(rules), tuple(unused))


_BEIT_BLOCK = {
    "attention.qkv.weight": "attention.q_proj.weight attention.k_proj.weight "
    "attention.v_proj.weight",
    # A key's bias adds the same to all scores of a query.
    "attention.qkv.bias": f"attention.q_proj.bias {ZEROS} attention.v_proj.bias",
    "attention.out.{k}": "attention.o_proj.{k}",
    "attention.out.scale": "lambda_1",
    "norm1.{k}": "layernorm_before.{k}",
    "norm2.{k}": "layernorm_after.{k}",
    "mlp.fc1.{k}": "mlp.fc1.{k}",
    "mlp.fc2.{k}": "mlp.fc2.{k}",
    "mlp.fc2.scale": "lambda_2",
}


def beit(config: ModelConfig) -> Layout:
    """Without the class token's head, which transformers has not."""
    depth = config.vision.depth
    owners = {
        "none": [],
        "shared": ["beit.shared_position_bias"],
        "layer": [f"beit.layers.{n}.relative_position_bias" for n in range(depth)],
    }[config.vision.relative_bias]
    names = {
        "vision.embedding.{k}": "beit.embeddings.patch_embeddings.projection.{k}",
        "vision.norm.{k}": "layernorm.{k}",
        "code_head.{k}": "lm_head.{k}",
    }
    if owners:
        tables = [f"{owner}.relative_position_bias_table" for owner in owners]
        names["vision.relative_bias.table"] = " ".join(tables)
    tokens = {
        "vision.embedding.class_token": "beit.embeddings.cls_token",
        "vision.embedding.mask_token": "beit.embeddings.mask_token",
    }
    rules = [
        *rules_of(names),
        *rules_of(tokens, lead=2),
        *stack_of(_BEIT_BLOCK, "vision", "beit.layers", depth),
    ]
    return Layout("transformers BeitForMaskedImageModeling", tuple(rules))


_LXMERT_STREAM = {
    "attention.qkv.{k}": "self_att.self.query.{k} self_att.self.key.{k} self_att.self.value.{k}",
    "attention.out.{k}": "self_att.output.dense.{k}",
    "norm1.{k}": "self_att.output.LayerNorm.{k}",
    "mlp.fc1.{k}": "inter.dense.{k}",
    "mlp.fc2.{k}": "output.dense.{k}",
    "norm2.{k}": "output.LayerNorm.{k}",
}
_LXMERT_CROSS = {
    "qkv.{k}": "att.query.{k} att.key.{k} att.value.{k}",
    "out.{k}": "output.dense.{k}",
    "norm.{k}": "output.LayerNorm.{k}",
}


def lxmert(config: ModelConfig) -> Layout:
    names = {
        "text.embedding.token": "lxmert.embeddings.word_embeddings.weight",
        "text.embedding.position": "lxmert.embeddings.position_embeddings.weight",
        "text.embedding.token_type": "lxmert.embeddings.token_type_embeddings.weight",
        "text.embedding.norm.{k}": "lxmert.embeddings.LayerNorm.{k}",
        "vision.embedding.feature.{k}": "lxmert.encoder.visn_fc.visn_fc.{k}",
        "vision.embedding.feature_norm.{k}": "lxmert.encoder.visn_fc.visn_layer_norm.{k}",
        "vision.embedding.box.{k}": "lxmert.encoder.visn_fc.box_fc.{k}",
        "vision.embedding.box_norm.{k}": "lxmert.encoder.visn_fc.box_layer_norm.{k}",
        "pooler.{k}": "lxmert.pooler.dense.{k}",
        "match_head.{k}": "cls.seq_relationship.{k}",
        "token_head.dense.{k}": "cls.predictions.transform.dense.{k}",
        "token_head.norm.{k}": "cls.predictions.transform.LayerNorm.{k}",
        "token_head.bias": "cls.predictions.bias",
        "region_heads.dense.{k}": "obj_predict_head.transform.dense.{k}",
        "region_heads.norm.{k}": "obj_predict_head.transform.LayerNorm.{k}",
        "region_heads.classes.{k}": "obj_predict_head.decoder_dict.obj.{k}",
        "region_heads.feature.{k}": "obj_predict_head.decoder_dict.feat.{k}",
    }
    unused = [
        ("cls.predictions.decoder.weight", "the token table, which is there twice"),
        _POSITION_IDS,
    ]
    attributes = {"region_heads.attributes.{k}": "obj_predict_head.decoder_dict.attr.{k}"}
    answers = {
        "answer_head.dense.{k}": "answer_head.logit_fc.0.{k}",
        "answer_head.norm.{k}": "answer_head.logit_fc.2.{k}",
        "answer_head.answers.{k}": "answer_head.logit_fc.3.{k}",
    }
    if config.vision.region_attributes:
        names |= attributes
    else:
        unused.append(("obj_predict_head.decoder_dict.attr.*", "vision.region_attributes is 0"))
    if config.answers:
        names |= answers
    else:
        unused.append(("answer_head.*", "answers is 0"))
    rules = [
        *rules_of(names),
        *stack_of(_BERT_BLOCK, "text", "lxmert.encoder.layer", config.text.depth),
        *stack_of(_BERT_BLOCK, "vision", "lxmert.encoder.r_layers", config.vision.depth),
    ]
    for number in range(config.fusion.depth):
        here, there = f"fusion.layers.{number}.", f"lxmert.encoder.x_layers.{number}."
        rules += rules_of(_LXMERT_CROSS, f"{here}cross.0.", f"{there}visual_attention.")
        for place, stream in enumerate(("lang_", "visn_")):
            rules += rules_of(_LXMERT_STREAM, f"{here}own.{place}.", f"{there}{stream}")
    return Layout("transformers LxmertForPreTraining", tuple(rules), tuple(unused))


_CROSS_BLOCK = {
    "cross.q.{k}": "crossattention.self.query.{k}",
    "cross.out.{k}": "crossattention.output.dense.{k}",
    "norm_cross.{k}": "crossattention.output.LayerNorm.{k}",
}
_BLIP_VISION_BLOCK = {
    "attention.qkv.{k}": "self_attn.qkv.{k}",
    "attention.out.{k}": "self_attn.projection.{k}",
    "norm1.{k}": "layer_norm1.{k}",
    "norm2.{k}": "layer_norm2.{k}",
    "mlp.fc1.{k}": "mlp.fc1.{k}",
    "mlp.fc2.{k}": "mlp.fc2.{k}",
}
_OF_ATTENTION = ("attention.qkv.{k}", "attention.out.{k}", "norm1.{k}")


def _blip_text(config: ModelConfig, there: str, decoder: bool) -> list[Rule]:
    """Encoder or decoder under `there`; what they tie is one tensor here."""
    names = {
        "text.embedding.token": "embeddings.word_embeddings.weight",
        "text.embedding.position": "embeddings.position_embeddings.weight",
        "text.embedding.norm.{k}": "embeddings.LayerNorm.{k}",
    }
    rules, depth = rules_of(names, there=there), config.text.depth
    for n in range(depth):
        layer = f"{there}encoder.layer.{n}."
        for ours, theirs in _BERT_BLOCK.items():
            tower = "decoder" if decoder and ours in _OF_ATTENTION else "text"
            rules += rules_of({ours: theirs}, f"{tower}.blocks.{n}.", layer)
        rules += rules_of(_CROSS_BLOCK, f"fusion.blocks.{n}.", layer)
        keys = "crossattention.self.key.{k} crossattention.self.value.{k}"
        rules += rules_of({f"fusion.image_kv.{{k}}#{n}/{depth}": keys}, there=layer)
    return rules


def blip(config: ModelConfig) -> Layout:
    """`BlipForImageTextRetrieval`, and where there is a decoder `BlipForConditionalGeneration` with
    it in one state dict.
    """
    names = {
        "image_projection.{k}": "vision_proj.{k}",
        "text_projection.{k}": "text_proj.{k}",
        "match_head.{k}": "itm_head.{k}",
        "vision.embedding.{k}": "vision_model.embeddings.patch_embedding.{k}",
        "vision.norm.{k}": "vision_model.post_layernorm.{k}",
    }
    here, there = "vision.embedding.", "vision_model.embeddings."
    rules = [
        *rules_of(names),
        *rules_of({"class_token": "class_embedding"}, here, there, lead=2),
        *rules_of({"position": "position_embedding"}, here, there, lead=1),
        *stack_of(_BLIP_VISION_BLOCK, "vision", "vision_model.encoder.layers", config.vision.depth),
        *_blip_text(config, "text_encoder.", False),
    ]
    name = "transformers BlipForImageTextRetrieval"
    if config.decoder:
        name += " with BlipForConditionalGeneration"
        head = {
            "lm_head.dense.{k}": "transform.dense.{k}",
            "lm_head.norm.{k}": "transform.LayerNorm.{k}",
            "text.embedding.token": "decoder.weight",
        }
        rules += _blip_text(config, "text_decoder.bert.", True)
        rules += rules_of(head, there="text_decoder.cls.predictions.")
        for bias in ("bias", "decoder.bias"):
            rules += rules_of({"lm_head.bias": f"text_decoder.cls.predictions.{bias}"})
    return Layout(name, tuple(rules), (_POSITION_IDS,), lacks=("scale",))
