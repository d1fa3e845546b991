"""Weights from and to transformers' and open_clip's models: equal outputs, nothing lost."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests import _peers
from vlpfast.data.batch import Batch
from vlpfast.integrations.weights import export_weights, import_weights
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

try:
    import transformers
except ImportError:
    transformers = None

VOCAB, LENGTH, SIDE = 99, 16, 32
TEXTS = [[97, 5, 6, 98], [97, 98], [97, *range(10, 23), 98], [97, 3, 98]]


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


def _transformers():
    if transformers is None:
        pytest.skip("transformers is not installed")
    return transformers


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """In eval mode with random weights, also where a fresh model has zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point() and "mask" not in name:
                noise = 0.02 * torch.randn(value.shape, generator=generator)
                value.add_(noise.abs() if name.endswith("running_var") else noise)
    return module.eval()


def pixels_of(images: torch.Tensor, model: VLPModel) -> torch.Tensor:
    config = model.config
    return (
        (images / 255 - torch.tensor(config.image_mean)) / torch.tensor(config.image_std)
    ).permute(0, 3, 1, 2)


def padded(texts: list[list[int]], value: int = 0) -> torch.Tensor:
    return torch.tensor([text + [value] * (LENGTH - len(text)) for text in texts])


def some_images(side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8, generator=generator)


def small(preset: str) -> VLPModel:
    torch.manual_seed(0)
    return create_model(
        preset, "tiny", vocab_size=VOCAB, context_length=LENGTH, image_size=SIDE
    ).eval()


def assert_equal_outputs(ours: VLPModel, image: torch.Tensor, text: torch.Tensor, packed) -> None:
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    # Different inputs have different embeddings, else equality would say little.
    assert min((image[0] - image[1]).norm(), (text[0] - text[1]).norm()) > 0.02
    close(ours.encode_image(some_images(ours.config.image_size)).embedding, image)
    close(ours.encode_text(packed).embedding, text)


def transformers_siglip(model: VLPModel) -> torch.nn.Module:
    library = _transformers()
    vision, text = model.config.vision, model.config.text
    shape = {
        "hidden_size": text.dim,
        "intermediate_size": 4 * text.dim,
        "num_attention_heads": text.heads,
        "hidden_act": "gelu",
    }
    config = library.SiglipConfig(
        vision_config={
            **shape,
            "num_hidden_layers": vision.depth,
            "image_size": SIDE,
            "patch_size": vision.patch_size,
        },
        text_config={
            **shape,
            "num_hidden_layers": text.depth,
            "vocab_size": VOCAB,
            "max_position_embeddings": LENGTH,
            "pad_token_id": 1,
            "bos_token_id": 97,
            "eos_token_id": 98,
        },
    )
    return shaken(library.SiglipModel(config))


def open_clip_siglip(model: VLPModel, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    module, timm = _peers.open_clip_model(with_timm=True), _peers.timm()
    vision, text = model.config.vision, model.config.text
    shape = {
        "embed_dim": vision.dim,
        "depth": vision.depth,
        "num_heads": vision.heads,
        "patch_size": vision.patch_size,
        "img_size": SIDE,
    }
    create = timm.create_model
    small = lambda name, **options: create(name, **(options | shape))
    monkeypatch.setattr(timm, "create_model", small)
    peer = module.CustomTextCLIP(
        embed_dim=model.config.embed_dim,
        vision_cfg={
            "image_size": SIDE,
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        text_cfg={
            "context_length": LENGTH,
            "vocab_size": VOCAB,
            "width": text.dim,
            "heads": text.heads,
            "layers": text.depth,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
        init_logit_bias=-10,
    )
    return shaken(peer)


def open_clip_clip(model: VLPModel) -> torch.nn.Module:
    module = _peers.open_clip_model()
    vision, text = model.config.vision, model.config.text
    peer = module.CLIP(
        embed_dim=model.config.embed_dim,
        vision_cfg=module.CLIPVisionCfg(
            layers=vision.depth,
            width=vision.dim,
            head_width=vision.dim // vision.heads,
            patch_size=vision.patch_size,
            image_size=SIDE,
        ),
        text_cfg=module.CLIPTextCfg(
            context_length=LENGTH,
            vocab_size=VOCAB,
            width=text.dim,
            heads=text.heads,
            layers=text.depth,
        ),
        quick_gelu=True,
    )
    return shaken(peer)


def transformers_align(model: VLPModel) -> torch.nn.Module:
    library = _transformers()
    text = model.config.text
    config = library.AlignConfig(
        projection_dim=320,
        text_config={
            "hidden_size": text.dim,
            "intermediate_size": 4 * text.dim,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.depth,
            "vocab_size": VOCAB,
            "max_position_embeddings": LENGTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        vision_config={"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 320},
    )
    peer = shaken(library.AlignModel(config))
    # With its own small weights and empty BatchNorms no image would reach the last layer.
    for module in peer.vision_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    peer.train().vision_model(pixels_of(some_images(64), model))
    return peer.eval()


def small_align() -> VLPModel:
    """BERT's order of norms, EfficientNet-B0, 64 px."""
    _peers.timm()
    base = preset_config("align", "base", vocab_size=VOCAB, context_length=LENGTH)
    text = replace(base.text, dim=64, depth=2, heads=4, dropout=0.0, attention_dropout=0.0)
    vision = replace(base.vision, dim=320, cnn="tf_efficientnet_b0")
    return VLPModel(replace(base, text=text, vision=vision, embed_dim=320, image_size=64)).eval()


@torch.no_grad()
def test_transformers_siglip():
    ours = small("siglip")
    peer = transformers_siglip(ours)
    import_weights(ours, peer.state_dict(), "transformers")
    texts = padded(TEXTS, 1)
    out = peer(input_ids=texts, pixel_values=pixels_of(some_images(), ours), return_loss=True)
    # SigLIP has no padding mask and pools the last place: padding is text to it.
    packed = Ragged.from_lists(texts.tolist())
    assert_equal_outputs(ours, out.image_embeds, out.text_embeds, packed)
    image, text = (
        ours.encode_image(some_images()).embedding,
        ours.encode_text(packed).embedding,
    )
    logits = ours.logit_scale * image @ text.T + ours.logit_bias
    torch.testing.assert_close(logits, out.logits_per_image, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_open_clip_siglip(monkeypatch):
    ours = small("siglip")
    peer = open_clip_siglip(ours, monkeypatch)
    import_weights(ours, peer.state_dict(), "open_clip")
    texts = padded(TEXTS, 1)
    image = peer.encode_image(pixels_of(some_images(), ours), normalize=True)
    text = peer.encode_text(texts, normalize=True)
    assert_equal_outputs(ours, image, text, Ragged.from_lists(texts.tolist()))


@torch.no_grad()
def test_open_clip_clip():
    ours = small("clip")
    peer = open_clip_clip(ours)
    import_weights(ours, peer.state_dict(), "open_clip")
    image = peer.encode_image(pixels_of(some_images(), ours), normalize=True)
    text = peer.encode_text(padded(TEXTS), normalize=True)
    assert_equal_outputs(ours, image, text, Ragged.from_lists(TEXTS))


@torch.no_grad()
def test_transformers_align():
    """Both towers, and the loss with its smoothed labels."""
    ours = small_align()
    peer = transformers_align(ours)
    report = import_weights(ours, peer.state_dict(), "transformers")
    assert {why for _, why in report.unused} == {
        "BERT's pooler, which ALIGN's embeddings do not use"
    }
    texts, packed = padded(TEXTS), Ragged.from_lists(TEXTS)
    images = some_images(64)
    out = peer(
        input_ids=texts,
        attention_mask=(texts != 0).long(),
        pixel_values=pixels_of(images, ours),
        return_loss=True,
    )
    assert_equal_outputs(ours, out.image_embeds, out.text_embeds, packed)
    step = PretrainStep(ours, ObjectivesConfig(label_smoothing=0.1)).eval()
    batch = _batch(images, packed)
    loss, _ = step(batch, seed=0, step=0).losses["itc"]
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)


def small_lxmert(attributes: int = 4, answers: int = 5) -> VLPModel:
    """BERT's order of norms, 64 wide, with unlike depths."""
    base = preset_config("lxmert", "base", vocab_size=VOCAB, context_length=LENGTH, answers=answers)
    shape = {"dim": 64, "heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
    vision = replace(base.vision, **shape, depth=1, region_dim=24, region_classes=11)
    vision = replace(vision, region_attributes=attributes)
    text, fusion = replace(base.text, **shape, depth=3), replace(base.fusion, **shape, depth=2)
    return VLPModel(replace(base, vision=vision, text=text, fusion=fusion)).eval()


def transformers_lxmert(model: VLPModel) -> torch.nn.Module:
    library = _transformers()
    config = library.LxmertConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
        l_layers=model.config.text.depth,
        r_layers=model.config.vision.depth,
        x_layers=model.config.fusion.depth,
        visual_feat_dim=24,
        num_object_labels=10,
        num_attr_labels=3,
        num_qa_labels=5,
    )
    return shaken(library.LxmertForPreTraining(config))


@torch.no_grad()
def test_transformers_lxmert():
    """Streams, pooled text, and every head; texts and images are of unlike lengths, two texts read
    one image.
    """
    ours = small_lxmert()
    peer = transformers_lxmert(ours)
    report = import_weights(ours, peer.state_dict(), "transformers")
    assert len(report.unused) == 1
    bare = import_weights(small_lxmert(0, 0), peer.state_dict(), "transformers")
    assert len(bare.unused) == 1 + 2 + 6
    generator = torch.Generator().manual_seed(1)
    features = Ragged.from_padded(
        torch.randn(3, 5, 24, generator=generator), torch.tensor([5, 2, 4])
    )
    boxes = torch.rand(11, 4, generator=generator)
    image = ours.encode_image(Regions(features, boxes))
    kv_index = torch.tensor([2, 0, 2, 1])
    text = ours.encode_text(Ragged.from_lists(TEXTS))
    fused = ours.fuse_pairs(text.tokens, ours.image_keys(image.tokens), kv_index)
    (padded_features, mask), (padded_boxes, _) = (
        r.pad() for r in (features, features.with_values(boxes))
    )
    texts = padded(TEXTS)
    inputs = {
        "input_ids": texts,
        "attention_mask": (texts != 0).long(),
        "visual_feats": padded_features[kv_index],
        "visual_pos": padded_boxes[kv_index],
        "visual_attention_mask": mask[kv_index].long(),
    }
    bare, out = peer.lxmert(**inputs), peer(**inputs)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5)
    assert (bare.language_output[0, 0] - bare.language_output[3, 0]).norm() > 0.02
    close(fused.text.values, bare.language_output[texts != 0])
    close(fused.image.values, bare.vision_output[mask[kv_index]])
    close(ours.pool(fused.text.values[fused.text.first()]), bare.pooled_output)
    close(ours.match(fused), out.cross_relationship_score)
    close(ours.token_logits(fused.text.values), out.prediction_logits[texts != 0])
    predicted = peer.obj_predict_head(bare.vision_output[mask[kv_index]])
    close(ours.region_logits(fused.image.values), predicted["obj"])
    close(ours.region_features(fused.image.values), predicted["feat"])
    close(ours.attribute_logits(fused.image.values), predicted["attr"])
    first = fused.text.values[fused.text.first()]
    close(ours.answer_logits(first), out.question_answering_score)


def _batch(images: torch.Tensor, text: Ragged):
    rows = torch.arange(len(text))
    return Batch(images, text, image_ids=rows, sample_ids=rows, positions=rows)


PEERS = {
    "transformers-siglip": lambda mp: (small("siglip"), transformers_siglip),
    "open_clip-siglip": lambda mp: (small("siglip"), partial(open_clip_siglip, monkeypatch=mp)),
    "open_clip-clip": lambda mp: (small("clip"), open_clip_clip),
    "transformers-align": lambda mp: (small_align(), transformers_align),
    "transformers-lxmert": lambda mp: (small_lxmert(), transformers_lxmert),
}


@pytest.mark.parametrize("name", PEERS)
def test_export_is_the_inverse_and_fits_the_peer(name, monkeypatch, tmp_path):
    library = name.split("-")[0]
    ours, make = PEERS[name](monkeypatch)
    peer = make(ours)
    theirs = peer.state_dict()
    report = import_weights(ours, theirs, library)
    exported = export_weights(ours, library, tmp_path / "weights.safetensors")
    assert set(theirs) == set(exported) | {unused for unused, _ in report.unused}
    for key, value in exported.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)
    outcome = peer.load_state_dict(exported, strict=False)
    assert set(outcome.missing_keys) == {unused for unused, _ in report.unused}
    assert outcome.unexpected_keys == []
    again = VLPModel(ours.config)
    assert import_weights(again, tmp_path / "weights.safetensors", library).used == report.used
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    assert load_file(tmp_path / "weights.safetensors").keys() == exported.keys()


def test_report_is_a_table():
    ours = small("clip")
    exported = export_weights(ours, "transformers")
    exported["text_model.embeddings.position_ids"] = torch.arange(LENGTH)
    report = import_weights(ours, exported, "transformers")
    lines = str(report).splitlines()
    assert lines[0].split() == ["vlpfast", "shape", "transformers", "CLIPModel"]
    assert len(report.used) == len(ours.state_dict()) == len(lines) - 4
    (line,) = (line for line in lines if line.startswith("vision.blocks.1.attention.qkv.weight "))
    joined = [f"vision_model.encoder.layers.1.self_attn.{p}_proj.weight" for p in "qkv"]
    assert line.split(maxsplit=2)[1:] == ["576x192", " + ".join(joined)]
    assert lines[-2].split() == [
        "(not",
        "used)",
        *["text_model.embeddings.position_ids:", "a", "constant"],
    ]
    assert lines[-1] == f"{len(report.used)} tensors loaded, 1 not used"


def test_nothing_is_dropped_silently():
    ours = small("clip")
    exported = export_weights(ours, "open_clip")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"without a place here: stranger"):
        import_weights(ours, {**exported, "stranger": torch.zeros(1)}, "open_clip")
    lacking = {name: value + 1 for name, value in exported.items() if name != "visual.proj"}
    with pytest.raises(ValueError, match=r"open_clip CLIP .*missing: visual\.proj"):
        import_weights(ours, lacking, "open_clip")
    exported["visual.proj"] = exported["visual.proj"][:, :5]
    with pytest.raises(
        ValueError, match=r"image_projection.weight is \(5, 192\), expected \(128, 192\)"
    ):
        import_weights(ours, exported, "open_clip")
    biased = create_model("clip", "tiny", vocab_size=VOCAB, projection_bias=True)
    with pytest.raises(ValueError, match=r"without a place there: image_projection\.bias"):
        import_weights(biased, export_weights(ours, "open_clip"), "open_clip")
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_errors_name_what_is_known():
    with pytest.raises(
        ValueError, match=r"must be one of \['open_clip', 'transformers', 'unilm'\]"
    ):
        export_weights(small("clip"), "timm")
    with pytest.raises(
        ValueError, match=r"open_clip has no model of preset 'vse\+\+'; it has \['clip'"
    ):
        export_weights(small("vse++"), "open_clip")
    with pytest.raises(ValueError, match=r"vision\.cnn must be one of .*got 'small'"):
        export_weights(small("align"), "transformers")
