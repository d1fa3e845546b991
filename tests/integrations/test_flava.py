"""FLAVA from and to transformers: every output that has a head here, the sizes, nothing lost."""

from dataclasses import replace
from functools import partial

import pytest
import torch

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

transformers = pytest.importorskip("transformers")
CODES = 13


def flava(codes: int = CODES) -> VLPModel:
    """64 wide, with unlike depths."""
    config = preset_config(
        "flava", "tiny", vocab_size=VOCAB, context_length=LENGTH, image_size=SIDE, codes=codes
    )
    shape = {"dim": 64, "heads": 4}
    vision, text = replace(config.vision, **shape, depth=3), replace(config.text, **shape, depth=2)
    fusion = replace(config.fusion, **shape, depth=2)
    torch.manual_seed(0)
    return VLPModel(replace(config, vision=vision, text=text, fusion=fusion)).eval()


def peer_of(model: VLPModel) -> torch.nn.Module:
    parts = {}
    for name, stack in (("image", "vision"), ("text", "text"), ("multimodal", "fusion")):
        config = getattr(model.config, stack)
        parts[f"{name}_config"] = {
            "hidden_size": config.dim,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "intermediate_size": 4 * config.dim,
        }
    pixels = {"image_size": SIDE, "patch_size": model.config.vision.patch_size}
    parts["image_config"] |= pixels | {"vocab_size": CODES}
    parts["text_config"] |= {"vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    config = transformers.FlavaConfig(
        **parts,
        hidden_size=model.config.fusion.dim,
        projection_dim=model.config.embed_dim,
        init_codebook=False,
    )
    torch.manual_seed(1)
    return shaken(transformers.FlavaForPreTraining(config))


@torch.no_grad()
def test_every_output_equals_transformers():
    """Clean towers and embeddings; then masked words and patches through towers and fusion, and
    the logits of matching, words and codes.
    """
    ours = flava()
    peer = peer_of(ours)
    import_weights(ours, peer.state_dict(), "transformers")
    texts, masked, images = padded(TEXTS), padded(TEXTS), some_images()
    masked[:, 1] = torch.where(masked[:, 1] == 98, 98, 4)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.rand(4, ours.config.num_patches, generator=generator) < 0.4
    out = peer(
        input_ids=texts,
        input_ids_masked=masked,
        attention_mask=(texts != 0).long(),
        pixel_values=pixels_of(images, ours),
        bool_masked_pos=hidden.long(),
        return_loss=False,
    )
    packed, words = Ragged.from_lists(TEXTS), texts != 0
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5)
    image, text = ours.encode_image(images), ours.encode_text(packed)
    close(ours.image_states(image.tokens), out.image_embeddings)
    close(ours.text_states(text.tokens.values), out.text_embeddings[words])
    logits = ours.logit_scale * image.embedding @ text.embedding.T
    close(logits, out.contrastive_logits_per_image)
    unit = partial(torch.nn.functional.normalize, dim=-1)
    project = peer.flava.image_projection, peer.flava.text_projection
    assert_equal_outputs(
        ours,
        unit(project[0](out.image_embeddings[:, 0])),
        unit(project[1](out.text_embeddings[:, 0])),
        packed,
    )
    image = ours.encode_image(images, hidden=hidden, num_embedded=0)
    text = ours.encode_text(packed.with_values(masked[words]), num_embedded=0)
    close(ours.image_states(image.tokens), out.image_masked_embeddings)
    fused = ours.fuse_pairs(text.tokens, ours.image_keys(image.tokens), torch.arange(4))
    theirs = out.multimodal_masked_embeddings
    num_image = 2 + ours.config.num_patches
    assert (theirs[0, 0] - theirs[1, 0]).norm() > 0.02
    close(fused.image.pad()[0], theirs[:, :num_image])
    close(fused.text.values, theirs[:, num_image:][words])
    close(ours.match(fused), out.itm_logits)
    close(ours.token_logits(fused.text.values), out.mmm_text_logits[words])
    close(ours.code_logits(ours.patches(fused.image.pad()[0])), out.mmm_image_logits)


def test_export_is_the_inverse():
    ours = flava()
    peer = peer_of(ours)
    theirs = peer.state_dict()
    report = import_weights(ours, theirs, "transformers")
    reasons = {why: [n for n, other in report.unused if other == why] for _, why in report.unused}
    assert {why: len(names) for why, names in reasons.items()} == {
        "a pooler that no objective reads": 6,
        "a tower's own head: one serves the towers and fusion here": 14,
    }
    exported = export_weights(ours, "transformers")
    assert set(theirs) == set(exported) | {unused for unused, _ in report.unused}
    for name, value in exported.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)
    again = VLPModel(ours.config)
    assert import_weights(again, theirs | exported, "transformers").used == report.used
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_a_model_without_codes_leaves_their_head():
    ours = flava(codes=0)
    report = import_weights(ours, peer_of(ours).state_dict(), "transformers")
    assert sum(why == "codes is 0" for _, why in report.unused) == 8
    assert ours.vision.embedding.mask_token is None


def test_base_is_transformers_default():
    """Every tensor of the default FlavaForPreTraining has a place or a reason, and ours its shape
    there: 357.65 M, of which 53.79 M are the dVAE's.
    """
    from vlpfast.integrations.layouts import LAYOUTS

    with torch.device("meta"):
        ours = VLPModel(preset_config("flava", "base"))
        peer = transformers.FlavaForPreTraining(transformers.FlavaConfig())
    layout = LAYOUTS["transformers"]["flava"](ours.config)
    theirs, own = peer.state_dict(), ours.state_dict()
    placed = {name for rule in layout.rules for name in rule.theirs}
    assert placed <= theirs.keys()
    assert [n for n in theirs.keys() - placed if layout.reason(n) is None] == []
    for rule in layout.rules:
        for name, tensor in rule.import_(theirs).items():
            assert tensor.shape == own[name].shape, name
    count = lambda names: sum(p.numel() for n, p in peer.named_parameters() if n in names) / 1e6
    total = sum(p.numel() for p in ours.parameters()) / 1e6
    assert count(placed) == pytest.approx(total, abs=1e-6)
    assert count(theirs.keys()) == pytest.approx(357.65, abs=0.01)
    assert count({n for n in theirs if n.startswith("flava.")}) == pytest.approx(241.36, abs=0.01)
