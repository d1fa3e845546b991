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
    # It leaves this matrix as it was allocated.
    torch.nn.init.normal_(peer.text_decoder.text_projection, std=0.1)
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


def transformers_wiring() -> VLPModel:
    """Preset `blip` in BERT's order of norms, without dropout."""
    torch.manual_seed(0)
    config = preset_config("blip", "tiny", vocab_size=VOCAB, context_length=LENGTH, image_size=SIDE)
    bert = {"norm": "post", "norm_eps": 1e-12}
    text, fusion = replace(config.text, **bert), replace(config.fusion, **bert)
    return VLPModel(replace(config, text=text, fusion=fusion)).eval()


def transformers_blip(model: VLPModel) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The retrieval model and the captioner of one pre-training: tied, but for self-attention."""
    library = pytest.importorskip("transformers")
    vision, text = model.config.vision, model.config.text
    config = library.BlipConfig(
        vision_config={
            "hidden_size": vision.dim,
            "intermediate_size": 4 * vision.dim,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "image_size": SIDE,
            "patch_size": vision.patch_size,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "hidden_size": text.dim,
            "encoder_hidden_size": vision.dim,
            "intermediate_size": 4 * text.dim,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "vocab_size": VOCAB,
            "max_position_embeddings": LENGTH,
            "pad_token_id": 0,
            "bos_token_id": VOCAB - 2,
        },
        image_text_hidden_size=model.config.embed_dim,
    )
    retrieval = shaken(library.BlipForImageTextRetrieval(config))
    captioner = shaken(library.BlipForConditionalGeneration(config))
    captioner.vision_model.load_state_dict(retrieval.vision_model.state_dict())
    own = captioner.text_decoder.bert.state_dict()
    for name, value in retrieval.text_encoder.state_dict().items():
        if ".attention." not in name:
            own[name].copy_(value)
    return retrieval, captioner


@torch.no_grad()
def test_transformers_blip():
    """Embeddings, matching logits, and logits of each next token of padded texts."""
    ours = transformers_wiring()
    retrieval, captioner = transformers_blip(ours)
    source = retrieval.state_dict() | captioner.state_dict()
    report = import_weights(ours, source, "transformers")
    assert {why for _, why in report.unused} <= {"a constant", "of ours, left as it was"}
    decoder_start, encoder_start = ours.config.text.task_ids
    pixels, ids = pixels_of(some_images(), ours), padded(TEXTS)
    packed, mask = Ragged.from_lists(TEXTS), (ids != 0).long()
    image = torch.nn.functional.normalize(
        retrieval.vision_proj(retrieval.vision_model(pixels).last_hidden_state[:, 0]), dim=-1
    )
    states = retrieval.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    text = torch.nn.functional.normalize(retrieval.text_proj(states), dim=-1)
    assert_equal_outputs(ours, image, text, packed)
    similarity = retrieval(ids, pixels, use_itm_head=False, attention_mask=mask).itm_score
    torch.testing.assert_close(image @ text.T, similarity)

    keys, own = ours.image_keys(ours.encode_image(some_images()).tokens), torch.arange(4)
    ids[:, 0] = encoder_start
    matched = retrieval(ids, pixels, attention_mask=mask).itm_score
    assert (matched[0] - matched[1]).abs().max() > 1e-3
    fused = ours.fuse(ours.encode_text(packed).tokens, keys, own)
    torch.testing.assert_close(ours.match(fused), matched, rtol=1e-4, atol=1e-5)

    ids[:, 0] = decoder_start
    logits = captioner(pixels, ids, attention_mask=mask).logits
    theirs = torch.cat([rows[: len(t)] for rows, t in zip(logits, TEXTS, strict=True)])
    assert (theirs[0] - theirs[4]).norm() > 0.02
    states = ours.decode(packed, keys, own).values
    torch.testing.assert_close(ours.next_token_logits(states), theirs, rtol=1e-4, atol=1e-4)


def test_transformers_blip_and_back():
    ours = transformers_wiring()
    retrieval, captioner = transformers_blip(ours)
    source = retrieval.state_dict() | captioner.state_dict()
    import_weights(ours, source, "transformers")
    exported = export_weights(ours, "transformers")
    assert {n for n in source if "position_ids" not in n} == exported.keys()
    for key, value in exported.items():
        torch.testing.assert_close(value, source[key], rtol=0, atol=0)


def test_tied_tensors_that_differ_are_refused():
    ours = transformers_wiring()
    exported = export_weights(ours, "transformers")
    layer = "text_decoder.bert.encoder.layer.1.output.dense.bias"
    exported[layer] = exported[layer] + 1
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.bias.* differ from .* text\.b"):
        import_weights(ours, exported, "transformers")
