"""Embeddings without tokens: the last block runs for what is pooled, with the same numbers."""

from dataclasses import replace

import pytest
import torch

from tests.models.test_dual import images
from tests.models.test_models import texts
from vlpfast.models import VLPModel, create_model, preset_config

# Presets by which of their towers pool one token that sees all others.
PRESETS = {
    "clip": {"vision", "text"},
    "flip": {"text"},  # averages patches
    "siglip": {"text"},  # attends to patches
    "align": {"text"},  # a CNN
    "albef": {"vision", "text"},
    "blip": {"vision", "text"},
    "coca": set(),
    "vse++": set(),
}


def small(preset: str) -> VLPModel:
    torch.manual_seed(0)
    return create_model(preset, "tiny", vocab_size=50, image_size=32).double()


def gradients(model: VLPModel, with_tokens: bool) -> dict[str, torch.Tensor]:
    """Of a loss on both embeddings, which are there too."""
    model.zero_grad()
    image = model.encode_image(images(), with_tokens=with_tokens).embedding
    text = model.encode_text(texts(), with_tokens=with_tokens).embedding
    (image @ text.mT).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"image": image.detach(), "text": text.detach()} | grads


@pytest.mark.parametrize("preset", PRESETS)
def test_same_embeddings_and_gradients(preset):
    model = small(preset).eval()
    expected, got = gradients(model, True), gradients(model, False)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        # What is summed in another order: K and V's gradient on one hand, queries' on the other.
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_the_last_block_runs_for_the_pooled_token_alone(preset):
    model, text, rows = small(preset).eval(), texts(), {}
    for name in ("vision", "text"):
        for block in list(getattr(getattr(model, name), "blocks", []))[-1:]:
            count = lambda _, args, out, name=name: rows.update({name: out.shape[:-1].numel()})
            block.mlp.register_forward_hook(count)
    assert model.encode_image(images(), with_tokens=False).tokens is None
    assert model.encode_text(text, with_tokens=False).tokens is None
    sizes = {"vision": len(images()), "text": len(text)}
    assert {name for name in rows if rows[name] == sizes[name]} == PRESETS[preset]
    assert all(rows[name] >= sizes[name] for name in rows)


@torch.no_grad()
def test_dropout_is_a_function_of_the_seed():
    config = preset_config("clip", "tiny", vocab_size=50, image_size=32)
    vision = replace(config.vision, dropout=0.1, attention_dropout=0.1)
    model = VLPModel(replace(config, vision=vision)).train()
    embed = lambda seed: model.encode_image(images(), seed=seed, with_tokens=False).embedding
    assert torch.equal(embed(1), embed(1))
    assert not torch.equal(embed(1), embed(2))
