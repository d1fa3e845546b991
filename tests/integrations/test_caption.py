"""CoCa and BLIP from and to open_clip and transformers: equal outputs, nothing lost."""

from dataclasses import replace

import pytest
import torch

from tests import _peers
from tests.integrations.test_weights import (
    LENGTH,
    SIDE,
    TEXTS,
    VOCAB,
    assert_equal_outputs,
    padded,
    pixels_of,
    shaken,
    some_images,
)
from vlpfast.integrations.weights import export_weights, import_weights
from vlpfast.models import VLPModel, preset_config
from vlpfast.ragged import Ragged


def open_clip_wiring() -> VLPModel:
    """Preset `coca` with what open_clip's has more."""
    torch.manual_seed(0)
    config = preset_config(
        "coca", "tiny", vocab_size=VOCAB, context_length=LENGTH, image_size=SIDE, embed_dim=192
    )
    vision = replace(config.vision, patch_bias=False, embed_norm=True, num_queries=5)
    fusion = replace(config.fusion, key_norm=True, mlp_between=True)
    return VLPModel(replace(config, vision=vision, fusion=fusion)).eval()


def open_clip_coca(model: VLPModel) -> torch.nn.Module:
    vision, text = model.config.vision, model.config.text
    heads = {"heads": text.heads, "width": text.dim, "layers": text.depth}
    words = {"context_length": LENGTH, "vocab_size": VOCAB}
    peer = _peers.open_clip_model("coca_model").CoCa(
        embed_dim=vision.dim,
        vision_cfg={
            "layers": vision.depth,
            "width": vision.dim,
            "head_width": vision.dim // vision.heads,
            "patch_size": vision.patch_size,
            "image_size": SIDE,
            "attentional_pool": "cascade",
            "attn_pooler_heads": vision.heads,
            "attn_pooler_queries": vision.num_queries,
            "output_tokens": True,
        },
        text_cfg={**heads, **words, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**heads, **words},
    )
    # By default its class token sees the first padding place, and not itself.
    peer.text.correct_cls_mask = True
    return shaken(peer)


@torch.no_grad()
def test_open_clip_coca():
    """Both embeddings, and the logits of each next token of padded texts of different lengths."""
    ours = open_clip_wiring()
    peer = open_clip_coca(ours)
    report = import_weights(ours, peer.state_dict(), "open_clip")
    assert report.unused == ()
    packed = Ragged.from_lists(TEXTS)
    out = peer(pixels_of(some_images(), ours), padded(TEXTS), output_labels=False)
    assert_equal_outputs(ours, out["image_features"].squeeze(1), out["text_features"], packed)
    keys = ours.image_keys(ours.encode_image(some_images()).tokens)
    states = ours.decode(packed, keys, torch.arange(4))
    logits = states.with_values(ours.next_token_logits(states.values))
    theirs = torch.cat([rows[: len(t)] for rows, t in zip(out["logits"], TEXTS, strict=True)])
    assert (theirs[0] - theirs[4]).norm() > 0.02
    torch.testing.assert_close(logits.values, theirs, rtol=1e-4, atol=1e-4)


def test_open_clip_coca_and_back():
    ours = open_clip_wiring()
    peer = open_clip_coca(ours)
    import_weights(ours, peer.state_dict(), "open_clip")
    exported = export_weights(ours, "open_clip")
    theirs = peer.state_dict()
    assert exported.keys() == theirs.keys()
    for key, value in exported.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)


def test_the_published_coca_is_not_open_clips():
    with pytest.raises(ValueError, match=r"missing here: fusion\.blocks\.0\.mlp_between"):
        export_weights(VLPModel(preset_config("coca", "tiny", vocab_size=VOCAB)), "open_clip")
