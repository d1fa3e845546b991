"""Names of the tensors of open_clip's models beside ours (see `names`)."""

from __future__ import annotations

from vlpfast.integrations.layouts.names import rules_of, stack_of
from vlpfast.integrations.weights import Layout, Rule
from vlpfast.models.config import ModelConfig

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


def _open_clip_text(config: ModelConfig, prefix: str) -> list[Rule]:
    names = {
        "text.embedding.token": "token_embedding.weight",
        "text.embedding.position": "positional_embedding",
        "text.norm.{k}": "ln_final.{k}",
    }
    blocks = f"{prefix}transformer.resblocks"
    return rules_of(names, there=prefix) + stack_of(
        _OPEN_CLIP_BLOCK, "text", blocks, config.text.depth
    )


def clip(config: ModelConfig) -> Layout:
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
        *rules_of(names),
        *rules_of(projections, transpose=True),
        *stack_of(_OPEN_CLIP_BLOCK, "vision", "visual.transformer.resblocks", config.vision.depth),
        *_open_clip_text(config, ""),
    ]
    return Layout("open_clip CLIP", tuple(rules), (("attn_mask", "a constant"),))


def siglip(config: ModelConfig) -> Layout:
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
        *rules_of({"scale": "logit_scale", "logit_bias": "logit_bias"}),
        *rules_of({"text_projection.{k}": "text.text_projection.{k}"}),
        *rules_of(trunk, "vision.", "visual.trunk."),
        *rules_of({"vision.embedding.position": "visual.trunk.pos_embed"}, lead=1),
        *rules_of({"vision.pooler.probe": "visual.trunk.attn_pool.latent"}, lead=2),
        *stack_of(_TIMM_BLOCK, "vision", "visual.trunk.blocks", config.vision.depth),
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


def coca(config: ModelConfig) -> Layout:
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
        *rules_of(names),
        *rules_of(projections, transpose=True),
        *stack_of(_OPEN_CLIP_BLOCK, "vision", "visual.transformer.resblocks", config.vision.depth),
        *_open_clip_text(config, "text."),
    ]
    for ours, theirs in (("queries", "attn_pool"), ("pooler", "attn_pool_contrastive")):
        here, there = f"vision.{ours}.", f"visual.{theirs}."
        rules += rules_of(_OPEN_CLIP_POOLER, here, there)
        rules += rules_of({"q.{k} kv.{k}": "attn.in_proj_{k}"}, here, there, shares=(1, 2))
    for n in range(depth):
        here, reads = f"fusion.blocks.{n}.", f"text_decoder.cross_attn.{n}."
        rules += rules_of(_OPEN_CLIP_OWN_TEXT, here, f"text_decoder.resblocks.{n}.")
        rules += rules_of(_OPEN_CLIP_READS_IMAGE, here, reads)
        keys, norm = (f"fusion.{part}.{{k}}#{n}/{depth}" for part in ("image_kv", "key_norm"))
        joined = {f"{here}cross.q.{{k}} {keys}": f"{reads}attn.in_proj_{{k}}"}
        rules += rules_of(joined, shares=(1, 2)) + rules_of({norm: f"{reads}ln_1_kv.{{k}}"})
    constants = (("text.attn_mask", "a constant"), ("text_decoder.attn_mask", "a constant"))
    return Layout("open_clip CoCa", tuple(rules), constants)
