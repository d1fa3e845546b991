"""Names of the tensors of microsoft/unilm's BEiT-3, which torchscale builds, beside ours."""

from __future__ import annotations

from vlpfast.integrations.weights import Layout, Rule
from vlpfast.models.config import ModelConfig

# Their expert of each modality.
_EXPERTS = {"image": "A", "text": "B"}
# fairseq's tables of positions begin with two rows for what is not a token.
_FIRST_POSITION = 2


def beit3(config: ModelConfig) -> Layout:
    """BEiT-3 as `BEiT3ForRetrieval` where there is a joint space, `BEiT3ForCaptioning` where there
    is a token head; of masked images they have the mask token, without a head of codes.

    Source: microsoft/unilm beit3/modeling_finetune.py; torchscale 0.2.0 model/BEiT3.py.
    """
    pairs = [("encoder.layer_norm.{e}", "fusion.norm.{m}")]
    for number in range(config.fusion.depth):
        there, here = f"encoder.layers.{number}", f"fusion.blocks.{number}"
        pairs += [
            (f"{there}.self_attn.out_proj.{{e}}", f"{here}.attention.out.{{m}}"),
            (f"{there}.self_attn.inner_attn_ln.{{e}}", f"{here}.attention.norm.{{m}}"),
            (f"{there}.self_attn_layer_norm.{{e}}", f"{here}.norm1.{{m}}"),
            (f"{there}.final_layer_norm.{{e}}", f"{here}.norm2.{{m}}"),
            (f"{there}.ffn.{{e}}.fc1", f"{here}.mlp.{{m}}.fc1"),
            (f"{there}.ffn.{{e}}.fc2", f"{here}.mlp.{{m}}.fc2"),
            (f"{there}.ffn.{{e}}.ffn_layernorm", f"{here}.mlp.{{m}}.norm"),
        ]
    rules = _embeddings()
    for modality, expert in _EXPERTS.items():
        for kind in ("weight", "bias"):
            for theirs, ours in pairs:
                names = (ours.format(m=modality), f"beit3.{theirs.format(e=expert)}")
                rules.append(Rule(*((f"{name}.{kind}",) for name in names)))
            for number in range(config.fusion.depth):
                attention = f"beit3.encoder.layers.{number}.self_attn"
                qkv = tuple(f"{attention}.{part}_proj.{expert}.{kind}" for part in "qkv")
                ours = f"fusion.blocks.{number}.attention.qkv.{modality}.{kind}"
                rules.append(Rule((ours,), qkv))
    if config.embed_dim:
        rules += [
            Rule(("image_projection.weight",), ("vision_head.weight",)),
            Rule(("text_projection.weight",), ("language_head.weight",)),
            Rule(("scale",), ("logit_scale",)),
        ]
    if config.mlm_head:
        rules += [Rule((f"token_head.{k}",), (f"mlm_head.{k}",)) for k in ("weight", "bias")]
    unused = (("beit3.vision_embed.mask_token", "masked images need a head of codes"),)
    return Layout("microsoft/unilm BEiT3", tuple(rules), unused)


def _embeddings() -> list[Rule]:
    here, there = "vision.embedding", "beit3.vision_embed"
    positions, first = "beit3.encoder.embed_positions", _FIRST_POSITION
    return [
        Rule((f"{here}.weight",), (f"{there}.proj.weight",)),
        Rule((f"{here}.bias",), (f"{there}.proj.bias",)),
        Rule((f"{here}.class_token",), (f"{there}.cls_token",), lead=2),
        Rule((f"{here}.position",), (f"{positions}.A.weight",), skip=first),
        Rule(("text.embedding.token",), ("beit3.text_embed.weight",)),
        Rule(("text.embedding.position",), (f"{positions}.B.weight",), skip=first),
    ]
