"""Presets siglip, align and vse++: published sizes, and what their towers promise."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._peers import timm
from tests.models.test_models import count, meta, texts
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.ragged import Ragged

DUAL = ["siglip", "align", "vse++"]


def images(count: int = 3, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, side, side, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_siglip_base_has_the_published_size():
    assert count(meta("siglip")) == pytest.approx(203.16, abs=0.005)


def test_align_base_has_the_published_size():
    timm()
    model = meta("align")
    pooler = (768 * 768 + 768) / 1e6  # of transformers' BERT, which ALIGN's embeddings do not use
    assert count(model) + pooler == pytest.approx(172.12, abs=0.005)
    assert count(model.vision) == pytest.approx(62.14, abs=0.005)


def test_vsepp_base_has_the_published_parts():
    timm()
    model = meta("vse++")
    assert count(model.vision) == pytest.approx(143.667240 - 4.097, abs=1e-6)  # less its classes
    sizes = [
        sum(p.numel() for p in m.parameters()) for m in (model.image_projection, model.text.gru)
    ]
    assert sizes == [4096 * 1024 + 1024, 3 * (300 * 1024 + 1024 * 1024 + 2 * 1024)]


@pytest.mark.parametrize("preset", DUAL)
def test_every_parameter_is_trained_and_dtype_is_kept(preset):
    model = create_model(preset, "tiny", vocab_size=50, image_size=32).double().train()
    image, text = model.encode_image(images()).embedding, model.encode_text(texts()).embedding
    assert image.dtype == text.dtype == torch.float64
    logits = model.logit_scale * image @ text.T
    logits = logits if model.logit_bias is None else logits + model.logit_bias
    logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("preset", DUAL)
@torch.no_grad()
def test_rows_do_not_depend_on_each_other(preset):
    """Also in training mode: no statistics over the batch."""
    model = create_model(preset, "tiny", vocab_size=50, image_size=32).train()
    together = model.encode_image(images()).embedding, model.encode_text(texts()).embedding
    for row in range(3):
        image = model.encode_image(images()[row : row + 1]).embedding
        text = model.encode_text(texts().select(torch.tensor([row]))).embedding
        torch.testing.assert_close(together[0][row], image[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[1][row], text[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gru_reads_forward_only_and_gives_the_last_state():
    model = create_model("vse++", "tiny", vocab_size=50, image_size=32)
    first = model.encode_text(Ragged.from_lists([[1, 5, 6, 7, 2], [1, 2]]))
    other = model.encode_text(Ragged.from_lists([[1, 5, 6, 9, 2], [1, 2]]))
    torch.testing.assert_close(first.tokens.values[:3], other.tokens.values[:3], rtol=0, atol=0)
    assert (first.tokens.values[3:5] - other.tokens.values[3:5]).abs().min() > 0
    words = F.embedding(torch.tensor([[1, 5, 6, 7, 2]]), model.text.token)
    state = F.normalize(model.text.gru(words)[1][0], dim=1)
    torch.testing.assert_close(first.embedding[:1], state, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_vsepp_normalises_features_before_the_projection():
    model = create_model("vse++", "tiny", vocab_size=50, image_size=32)
    out = model.encode_image(images())
    pooled = F.normalize(out.tokens.mean(1), dim=1)
    expected = F.normalize(model.image_projection(pooled), dim=1)
    torch.testing.assert_close(out.embedding, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", DUAL)
def test_bf16_autocast(preset):
    model = create_model(preset, "tiny", vocab_size=50, image_size=32)
    with torch.autocast("cpu", torch.bfloat16):
        image = model.encode_image(images()).embedding
        text = model.encode_text(texts()).embedding
    exact = model.encode_image(images()).embedding, model.encode_text(texts()).embedding
    (image.sum() + text.sum()).backward()
    for embedding, reference in zip((image, text), exact, strict=True):
        assert embedding.dtype == torch.float32
        assert (embedding * reference).sum(1).min() > 0.99


def test_scale_bounds():
    siglip, align, vsepp = (create_model(p, "tiny", vocab_size=9, image_size=32) for p in DUAL)
    assert siglip.logit_scale.item() == pytest.approx(10)
    assert siglip.logit_bias.item() == -10
    assert align.logit_scale.item() == vsepp.logit_scale.item() == 1
    with torch.no_grad():
        align.scale.fill_(-3.0)
        siglip.scale.fill_(7.0)
    for model, expected in ((align, -3.0), (siglip, 7.0), (vsepp, 1.0)):
        model.clamp_scale()
        assert model.scale.item() == expected


@pytest.mark.parametrize(
    ("preset", "cnn", "dim", "places"),
    [("align", "tf_efficientnet_b0", 320, 4), ("vse++", "vgg11", 4096, 1)],
)
@torch.no_grad()
def test_timm_networks_give_the_published_features(preset, cnn, dim, places):
    """Their last feature map (ALIGN averages it), or what their classifier reads (VSE++)."""
    timm()
    config = preset_config(preset, "base", vocab_size=50, image_size=64)
    vision = replace(config.vision, cnn=cnn, dim=dim)
    embed_dim = dim if preset == "align" else 1024
    model = VLPModel(replace(config, vision=vision, embed_dim=embed_dim)).eval()
    tokens = model.encode_image(images(2, 64)).tokens
    pixels = images(2, 64) / 255 - torch.tensor(config.image_mean)
    pixels = (pixels / torch.tensor(config.image_std)).permute(0, 3, 1, 2)
    features = model.vision.cnn.network(pixels)
    assert tokens.shape == (2, places, dim)
    expected = features if preset == "vse++" else features[-1].mean((2, 3))
    torch.testing.assert_close(tokens.mean(1), expected, rtol=1e-4, atol=1e-5)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="embed_dim must be the image tower's width 192"):
        preset_config("siglip", embed_dim=100)
    model = create_model("align", vocab_size=9, image_size=32)
    with pytest.raises(ValueError, match="a CNN has none"):
        model.encode_image(images(), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most 77 tokens"):
        create_model("vse++", vocab_size=9).encode_text(Ragged.from_lists([[1] * 78]))
    with pytest.raises(
        ValueError, match=r"'vse\+\+' has no fusion tower; presets that have: 'albef'"
    ):
        create_model("vse++", vocab_size=9).image_keys(torch.zeros(1, 2, 192))
    config = preset_config("vse++")
    with pytest.raises(ValueError, match=r"word_dim of kind 'gru' must be > 0, got 0"):
        replace(config, text=replace(config.text, word_dim=0))
    with pytest.raises(ValueError, match=r"'gru' has neither fusion nor a token head"):
        preset_config("vse++", mlm_head=True)
    with pytest.raises(ValueError, match=r"of cnn 'small'.* must be 'mean', got 'first'"):
        replace(config, vision=replace(config.vision, pool="first"))
    with pytest.raises(ValueError, match=r"are for patches, not for vision\.front 'cnn'"):
        replace(config, vision=replace(config.vision, patch_dropout=0.5))
    siglip = preset_config("siglip")
    with pytest.raises(ValueError, match=r"takes the class token: set vision\.class_token"):
        replace(siglip, vision=replace(siglip.vision, pool="first"))


def test_networks_of_timm_that_do_not_fit(monkeypatch):
    timm()
    config = preset_config("align", "base", vocab_size=9)
    with pytest.raises(
        ValueError, match=r"must be 'small', 'resnet50' or a model of timm, got 'b7'"
    ):
        VLPModel(replace(config, vision=replace(config.vision, cnn="b7")))
    with pytest.raises(ValueError, match=r"vision\.dim must be 320 .*_b0', got 640"):
        VLPModel(replace(config, vision=replace(config.vision, cnn="tf_efficientnet_b0")))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NotImplementedError, match="needs timm and the torchvision it imports"):
        VLPModel(config)
