"""BEiT-3's weights from and to microsoft/unilm's names; outputs against torchscale where it is."""

import pytest
import torch
import torch.nn.functional as F

from vlpfast.integrations.weights import export_weights, import_weights
from vlpfast.models import create_model
from vlpfast.ragged import Ragged

SHAPE = {"vocab_size": 50, "image_size": 32, "context_length": 20, "codes": 0}


def beit3(seed: int = 0, **changes):
    torch.manual_seed(seed)
    model = create_model("beit3", "tiny", **SHAPE, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("heads", [{"mlm_head": False}, {"embed_dim": 0}])
def test_export_and_import_are_inverse(heads):
    first, second = beit3(0, **heads), beit3(1, **heads)
    names = export_weights(first, "unilm")
    assert names["beit3.encoder.embed_positions.A.weight"].shape == (2 + 17, 192)
    assert names["beit3.encoder.layers.3.self_attn.k_proj.B.weight"].shape == (192, 192)
    assert ("mlm_head.bias" in names) != ("vision_head.weight" in names)
    mask = {"beit3.vision_embed.mask_token": torch.zeros(1, 1, 192)}
    report = import_weights(second, names | mask, "unilm")
    assert [name for name, _ in report.unused] == list(mask)
    for one, two in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert one.equal(two)


def test_what_does_not_fit_is_named():
    model = beit3(mlm_head=False)
    names = export_weights(model, "unilm")
    del names["beit3.encoder.layers.0.ffn.A.fc1.weight"]
    with pytest.raises(ValueError, match=r"missing: beit3\.encoder\.layers\.0\.ffn\.A\.fc1"):
        import_weights(model, names, "unilm")
    with pytest.raises(ValueError, match="without a place there: code_head"):
        export_weights(create_model("beit3", "tiny", **SHAPE | {"codes": 9}), "unilm")


@torch.no_grad()
def test_beit3_equals_torchscale():
    """Pairs, each modality alone, and captioning's mask."""
    pytest.importorskip("torchscale")
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    ours = beit3(mlm_head=False, embed_dim=0)
    config = EncoderConfig(
        img_size=32,
        patch_size=8,
        vocab_size=50,
        multiway=True,
        no_output_layer=True,
        encoder_embed_dim=192,
        encoder_attention_heads=6,
        encoder_ffn_embed_dim=768,
        encoder_layers=4,
        max_source_positions=22,
    )
    theirs = BEiT3(config).eval()
    state = {n.removeprefix("beit3."): t for n, t in export_weights(ours, "unilm").items()}
    assert theirs.load_state_dict(state, strict=False).missing_keys == ["vision_embed.mask_token"]
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    pixels = ((images / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    text = Ragged.from_lists([[1, 7, 8, 9, 2], [1, 2], [1, 30, 2]])
    padded, valid = text.pad()
    words = {"textual_tokens": padded, "text_padding_position": ~valid}
    tokens = ours.encode_text(text).tokens
    keys, own = ours.image_keys(ours.encode_image(images).tokens), torch.arange(3)
    close = {"rtol": 1e-4, "atol": 1e-4}
    for causal in (False, True):
        hidden = torch.zeros(22, 22)
        hidden[:17, 17:] = 1
        hidden[17:, 17:] = 1 - torch.ones(5, 5).tril()
        mask = {"attn_mask": hidden} if causal else {}
        expected = theirs(visual_tokens=pixels, **words, **mask)["encoder_out"]
        blocks = text.positions() + 1 if causal else None
        fused = ours.fuse_pairs(tokens, keys, own, text_blocks=blocks)
        torch.testing.assert_close(fused.text.values, expected[:, 17:][valid], **close)
        torch.testing.assert_close(fused.image.pad()[0], expected[:, :17], **close)
    expected = theirs(visual_tokens=pixels)["encoder_out"]
    torch.testing.assert_close(ours.fusion.alone(keys, "image").pad()[0], expected, **close)
    expected = theirs(**words)["encoder_out"]
    torch.testing.assert_close(ours.fusion.alone(tokens, "text").values, expected[valid], **close)
    assert F.cosine_similarity(expected[0, 0], expected[1, 0], dim=0) < 0.999
