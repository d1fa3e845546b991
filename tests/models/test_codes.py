"""Models of images alone: published sizes, the mask token, the class token's head by its formula,
parity with transformers' BEiT, what they have not.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vlpfast.integrations.weights import export_weights, import_weights
from vlpfast.layers.block import Layout
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.ragged import Ragged

SIDE = 32


def small(preset: str, *, library: str = "", **vision: object) -> VLPModel:
    """16 patches; with random weights where a fresh model has ones and zeros."""
    torch.manual_seed(0)
    config = preset_config(preset, "tiny", image_size=SIDE)
    model = VLPModel(replace(config, vision=replace(config.vision, **vision)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def some_images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)


def some_hidden() -> torch.Tensor:
    return torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.4


def millions(*modules: nn.Module) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def test_base_has_the_published_size():
    """timm's beit_base_patch16_224 has 86.53 M: with a classifier of 1000, without a mask token,
    its bias tables one a layer.
    """
    with torch.device("meta"):
        model = VLPModel(preset_config("beit2", "base"))
    vision = model.vision
    keys, tables, classes = 12 * 768 / 1e6, 11 * 732 * 12 / 1e6, 769 * 1000 / 1e6
    body = millions(vision) - millions(vision.head_blocks) - 768 / 1e6
    assert body - keys + tables + classes == pytest.approx(86.53, rel=1e-3)
    assert millions(vision.head_blocks) == pytest.approx(2 / 12 * millions(vision.blocks))
    assert model.code_head.weight.shape == (8192, 768)
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.BeitForMaskedImageModeling(
            transformers.BeitConfig(use_mask_token=True, use_shared_relative_position_bias=True)
        )
    ours = millions(model) - millions(vision.head_blocks) - keys
    assert ours == pytest.approx(millions(theirs), rel=1e-6)
    with torch.device("meta"):
        tokenizer = VLPModel(preset_config("vqkd", "base"))
    assert tokenizer.tokenizer.codebook.vectors.shape == (8192, 32)
    # A ViT-B/16 without a classifier.
    assert millions(tokenizer.vision) == pytest.approx(85.80, rel=1e-3)


@torch.no_grad()
def test_hidden_patches_do_not_matter():
    model, hidden, images = small("beit2"), some_hidden(), some_images()
    changed = images.clone()
    places = hidden.unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    changed[places] = 7
    out, other = (model.encode_image(pixels, hidden=hidden) for pixels in (images, changed))
    assert out.tokens.equal(other.tokens)
    assert out.class_head.equal(other.class_head)
    clean = model.encode_image(images)
    assert clean.class_head is None
    assert (clean.tokens - out.tokens).abs().max() > 1e-2
    nothing = model.encode_image(images, hidden=torch.zeros_like(hidden))
    torch.testing.assert_close(nothing.tokens, clean.tokens)


@torch.no_grad()
def test_the_mask_token_stands_at_its_place():
    """Also with learned positions: token = mask token + position."""
    model, hidden = small("beit2", position="learned"), some_hidden()
    embedding = model.vision.embedding
    tokens = embedding(some_images(), None, hidden)
    expected = (embedding.mask_token + embedding.position[1:]).expand(3, -1, -1)
    torch.testing.assert_close(tokens[:, 1:][hidden], expected[hidden])
    clean = embedding(some_images())
    assert tokens[:, 1:][~hidden].equal(clean[:, 1:][~hidden])


@pytest.mark.parametrize("bias", ["none", "shared", "layer"])
@torch.no_grad()
def test_class_head_by_its_formula(bias):
    """Two blocks over the last class token and the patches after three of four blocks."""
    position = "learned" if bias == "none" else "none"
    model = small("beit2", relative_bias=bias, position=position)
    vision, hidden = model.vision, some_hidden()
    out = model.encode_image(some_images(), hidden=hidden)
    biases = list(vision.relative_bias()) if bias != "none" else [None]
    biases *= 6 // len(biases)
    x = vision.embedding(some_images(), None, hidden)
    for number, block in enumerate(vision.blocks):
        branch, x = block(None, x, Layout(bias=biases[number]))
        x = x + branch
        if number + 1 == 3:
            early = x[:, 1:]
    torch.testing.assert_close(out.tokens, vision.norm(x)[0], rtol=1e-4, atol=1e-4)
    x = torch.cat([x[:, :1], early], 1)
    for number, block in enumerate(vision.head_blocks, start=4):
        branch, x = block(None, x, Layout(bias=biases[number]))
        x = x + branch
    torch.testing.assert_close(out.class_head, vision.norm(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["shared", "layer"])
@torch.no_grad()
def test_equals_transformers_both_ways(bias):
    transformers = pytest.importorskip("transformers")
    ours = small("beit2", head_layers=0, early_layers=0, relative_bias=bias)
    vision = ours.config.vision
    config = transformers.BeitConfig(
        vocab_size=ours.config.codes,
        hidden_size=vision.dim,
        num_hidden_layers=vision.depth,
        num_attention_heads=vision.heads,
        intermediate_size=4 * vision.dim,
        layer_norm_eps=vision.norm_eps,
        image_size=SIDE,
        patch_size=vision.patch_size,
        use_mask_token=True,
        use_shared_relative_position_bias=bias == "shared",
        use_relative_position_bias=bias == "layer",
        layer_scale_init_value=0.1,
    )
    theirs = transformers.BeitForMaskedImageModeling(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    images, hidden = some_images(), some_hidden()
    mean, std = (torch.tensor(v) for v in (ours.config.image_mean, ours.config.image_std))
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = ours.encode_image(images, hidden=hidden).tokens
        expected = theirs(pixels, bool_masked_pos=hidden).logits
        assert expected.shape == (3, 16, ours.config.codes)
        return ours.code_logits(ours.patches(tokens)), expected

    # Our key biases change nothing that a softmax sees: exported without them, outputs are equal.
    assert ours.vision.blocks[0].attention.qkv.bias[vision.dim : 2 * vision.dim].abs().min() > 0
    before = logits()
    assert (before[0] - before[1]).abs().max() > 0.1
    theirs.load_state_dict(export_weights(ours, "transformers"))
    torch.testing.assert_close(*logits(), rtol=1e-4, atol=1e-4)
    for parameter in theirs.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    report = import_weights(ours, theirs.state_dict(), "transformers")
    assert report.unused == ()
    torch.testing.assert_close(*logits(), rtol=1e-4, atol=1e-4)
    assert millions(ours) - vision.depth * vision.dim / 1e6 == pytest.approx(millions(theirs))


def test_a_tokenizer_gives_codes_of_patches():
    model = small("vqkd")
    codes = model.image_codes(some_images())
    assert codes.shape == (3, 16)
    tokens = model.encode_image(some_images()).tokens
    out = model.tokenizer(model.patches(tokens))
    assert out.codes.equal(codes)
    assert out.features.shape == (3, 16, model.config.codebook.target_dim)
    narrow = nn.functional.normalize(model.tokenizer.encode(tokens[:, 1:]), dim=-1)
    vectors = model.tokenizer.codebook.vectors
    assert codes.equal((narrow[:, :, None] - vectors).norm(dim=-1).argmin(-1))
    # Decoded from the codes alone.
    decoded = model.tokenizer.decode(model.tokenizer.decoder(vectors[codes]))
    torch.testing.assert_close(out.features, decoded, rtol=1e-4, atol=1e-5)


def test_errors_name_what_is_missing():
    model, clip = small("beit2"), create_model("clip", "tiny", image_size=SIDE)
    text = Ragged.from_lists([[1, 2]])
    with pytest.raises(ValueError, match="preset 'beit2' has no text tower; presets that have: "):
        model.encode_text(text)
    with pytest.raises(ValueError, match="'clip' has no code head; presets that have: 'beit2'"):
        clip.encode_image(some_images(), hidden=some_hidden())
    with pytest.raises(
        ValueError, match="'beit2' has no codebook; presets that have: 'kmeans', 'vqkd'"
    ):
        model.image_codes(some_images())
    with pytest.raises(ValueError, match=r"without a place there: vision\.head_blocks"):
        export_weights(model, "transformers")


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("beit2", {"codes": 0}, r"vision\.head_layers needs codes > 0"),
        ("beit2", {"early_layers": 4}, r"early_layers between 0 and vision\.depth 4, got .* 4"),
        ("beit2", {"norm": "post"}, r"vision\.norm 'pre'"),
        ("beit2", {"embed_dim": 8}, r"text\.kind 'none' is a model of images alone"),
        ("pixel-bert", {"color_head": True}, r"vision\.front must be 'patches', got 'grid'"),
        ("uniter", {"codes": 8}, r"must be 'patches' or 'grid', got 'regions'"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit_say_so(preset, change, message):
    config = preset_config(preset, "tiny")
    fields = {name for name in change if hasattr(config, name)}
    model = {name: change[name] for name in fields}
    vision = {name: value for name, value in change.items() if name not in fields}
    with pytest.raises(ValueError, match=message):
        replace(config, vision=replace(config.vision, **vision), **model)
