"""Presets: published parameter counts, equality of packed, alone and regrouped inputs, clear
errors.
"""

import pytest
import torch

from vlpfast.models import VLPModel, create_model, list_presets, preset_config
from vlpfast.ragged import Ragged


def count(module: torch.nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def meta(preset: str) -> VLPModel:
    with torch.device("meta"):
        return VLPModel(preset_config(preset, "base"))


@pytest.fixture
def albef():
    torch.manual_seed(0)
    return create_model("albef", "tiny", vocab_size=50, image_size=16).eval()


def texts() -> Ragged:
    return Ragged.from_lists([[1, 7, 8, 9, 2], [1, 2], [1, 30, 2]])


def test_clip_base_has_the_published_size():
    assert count(meta("clip")) == pytest.approx(151.28, abs=0.005)


def test_albef_base_has_the_published_size():
    model = meta("albef")
    assert count(model.vision) == pytest.approx(85.84, abs=0.005)
    bert = count(model.text) + count(model.fusion) + count(model.token_head)
    assert bert == pytest.approx(123.70, abs=0.01)


def test_flip_base_is_vit_b16_with_a_clip_sized_text_tower():
    model = meta("flip")
    assert model.config.num_patches == 196
    assert count(model.vision) == pytest.approx(85.65, abs=0.01)


JOINT = [name for name in list_presets() if "a joint space" in preset_config(name).parts]


@pytest.mark.parametrize("preset", JOINT)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_every_preset_with_a_joint_space_embeds_images_and_texts(preset, size):
    model = create_model(preset, size, vocab_size=50, image_size=32).eval()
    with torch.no_grad():
        image = model.encode_image(
            torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
        ).embedding
        text = model.encode_text(texts()).embedding
    assert image.shape == text.shape == (3, model.config.embed_dim)
    for embedding in (image, text):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
        assert (embedding[0] - embedding[1]).norm() > 1e-3


@torch.no_grad()
def test_packed_texts_equal_texts_alone(albef):
    together = albef.encode_text(texts())
    for number in range(3):
        alone = albef.encode_text(texts().select(torch.tensor([number])))
        torch.testing.assert_close(
            together.embedding[number : number + 1], alone.embedding, rtol=1e-5, atol=1e-6
        )


@torch.no_grad()
def test_rows_that_share_an_image_equal_copied_images(albef):
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    kv_index = torch.tensor([1, 0, 1])
    tokens = albef.encode_text(texts()).tokens
    shared = albef.fuse(tokens, albef.image_keys(albef.encode_image(images).tokens), kv_index)
    copied = albef.fuse(
        tokens, albef.image_keys(albef.encode_image(images[kv_index]).tokens), torch.arange(3)
    )
    torch.testing.assert_close(shared.values, copied.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(albef.match(shared), albef.match(copied), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_fused_text_depends_on_the_image_and_unimodal_text_does_not(albef):
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    keys = albef.image_keys(albef.encode_image(images).tokens)
    tokens = albef.encode_text(texts()).tokens
    first = albef.fuse(tokens, keys, torch.zeros(3, dtype=torch.int64)).values
    second = albef.fuse(tokens, keys, torch.ones(3, dtype=torch.int64)).values
    assert (first - second).abs().max() > 1e-4


@torch.no_grad()
def test_keeping_every_patch_is_the_dense_tower():
    model = create_model("flip", "tiny", vocab_size=50, image_size=32).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    everything = torch.arange(16).expand(2, 16)
    dense, kept = model.encode_image(images), model.encode_image(images, everything)
    torch.testing.assert_close(dense.embedding, kept.embedding, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_dropped_patches_do_not_matter():
    model = create_model("flip", "tiny", vocab_size=50, image_size=32).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    changed = images.clone()
    changed[:, 8:16, :8] = 0  # patch 4 of the 4 x 4 grid
    kept = torch.tensor([[0, 1, 7], [2, 3, 15]])
    torch.testing.assert_close(
        model.encode_image(images, kept).embedding,
        model.encode_image(changed, kept).embedding,
        rtol=0,
        atol=0,
    )


def test_errors_name_what_is_wrong(albef):
    with pytest.raises(ValueError, match="did you mean 'albef'"):
        preset_config("albeff")
    with pytest.raises(ValueError, match="size must be one of"):
        preset_config("clip", "huge")
    with pytest.raises(ValueError, match="unknown model field 'imagesize'"):
        preset_config("clip", imagesize=3)
    with pytest.raises(ValueError, match=r"multiple of vision\.patch_size 8, got 30"):
        preset_config("clip", image_size=30)
    with pytest.raises(ValueError, match=r"images must be \(B, 16, 16, 3\)"):
        albef.encode_image(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at most 77 tokens"):
        albef.encode_text(Ragged.from_lists([[1] * 78]))
    with pytest.raises(
        ValueError, match="'clip' has no fusion tower; presets that have: 'albef', "
    ):
        create_model("clip", vocab_size=50).image_keys(torch.zeros(1, 2, 192))


def test_some_fields_of_a_stack():
    vision = preset_config("clip", vision={"depth": 1, "patch_bias": False}).vision
    assert (vision.depth, vision.patch_bias) == (1, False)
    assert vision.dim == preset_config("clip").vision.dim
    with pytest.raises(ValueError, match=r"unknown model field 'vision\.deph'; did you mean"):
        preset_config("clip", vision={"deph": 1})
