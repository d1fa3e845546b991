"""Preset clip against transformers' CLIPModel with copied random weights, and what causality
promises.
"""

import pytest
import torch

from vlpfast.integrations.transformers import clip_state_dict
from vlpfast.models import create_model
from vlpfast.models.config import CLIP_MEAN, CLIP_STD
from vlpfast.ragged import Ragged

transformers = pytest.importorskip("transformers")


@pytest.fixture
def pair():
    """A small vlpfast clip and the CLIPModel that holds the same weights."""
    ours = create_model("clip", "tiny", vocab_size=99, context_length=16, image_size=32)
    vision, text = ours.config.vision, ours.config.text
    shape = {
        "hidden_act": "quick_gelu",
        "attention_dropout": 0.0,
        "projection_dim": ours.config.embed_dim,
    }
    config = transformers.CLIPConfig(
        projection_dim=ours.config.embed_dim,
        vision_config={
            **shape,
            "hidden_size": vision.dim,
            "intermediate_size": 4 * vision.dim,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "image_size": 32,
            "patch_size": vision.patch_size,
        },
        text_config={
            **shape,
            "hidden_size": text.dim,
            "intermediate_size": 4 * text.dim,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "vocab_size": 99,
            "max_position_embeddings": 16,
            "eos_token_id": 98,
            "bos_token_id": 97,
            "pad_token_id": 0,
        },
    )
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours.load_state_dict(clip_state_dict(theirs.state_dict()))
    return ours.eval(), theirs


def _texts() -> list[list[int]]:
    return [[97, 5, 6, 98], [97, 98], [97, *range(10, 23), 98], [97, 3, 98]]


@torch.no_grad()
def test_equals_transformers(pair):
    ours, theirs = pair
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    pixels = (images / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    padded = torch.zeros(4, 16, dtype=torch.int64)
    for row, text in zip(padded, _texts(), strict=True):
        row[: len(text)] = torch.tensor(text)
    expected = theirs(
        input_ids=padded, pixel_values=pixels.permute(0, 3, 1, 2), attention_mask=padded != 0
    )
    image = ours.encode_image(images).embedding
    text = ours.encode_text(Ragged.from_lists(_texts())).embedding
    torch.testing.assert_close(image, expected.image_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text, expected.text_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.logit_scale * image @ text.T, expected.logits_per_image, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_a_token_never_depends_on_later_ones(pair):
    ours, _ = pair
    first = ours.encode_text(Ragged.from_lists([[97, 5, 6, 7, 98]])).tokens.values
    other = ours.encode_text(Ragged.from_lists([[97, 5, 6, 9, 98]])).tokens.values
    torch.testing.assert_close(first[:3], other[:3], rtol=0, atol=0)
    assert (first[3:] - other[3:]).abs().min() > 0


def test_conversion_names_foreign_weights(pair):
    _, theirs = pair
    with pytest.raises(ValueError, match="CLIPModel"):
        clip_state_dict({**theirs.state_dict(), "stranger": torch.zeros(1)})


def test_images_in_floats_are_refused():
    """Of 0 to 1 they would be black, and nothing would say so."""
    model = create_model("clip", vocab_size=50, image_size=16)
    with pytest.raises(TypeError, match=r"images must be uint8 in 0\.\.255 .*got float32"):
        model.encode_image(torch.rand(2, 16, 16, 3))
