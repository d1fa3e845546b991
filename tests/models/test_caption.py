"""Models that write: what a state has seen, what text and image share, published sizes."""

from dataclasses import replace

import pytest
import torch

from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.ragged import Ragged

TEXTS = [[1, 7, 8, 9, 2], [1, 2], [1, 30, 7, 2]]


def count(*modules: torch.nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def images(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)


def small(preset: str) -> VLPModel:
    torch.manual_seed(0)
    return create_model(preset, "tiny", vocab_size=50, context_length=12, image_size=16).eval()


WRITERS = ("coca", "blip")


@pytest.fixture(params=WRITERS)
def writer(request):
    return small(request.param)


def test_coca_base_has_the_published_sizes():
    """86 M for the image encoder (the poolers apart), 297 M for the text decoder."""
    with torch.device("meta"):
        model = VLPModel(preset_config("coca", "base"))
    assert count(model.text, model.fusion, model.lm_head) == pytest.approx(297, abs=0.3)
    poolers = count(model.vision.queries, model.vision.pooler)
    assert count(model.vision) - poolers == pytest.approx(86, abs=0.3)
    assert model.config.vision.num_queries == 256


@torch.no_grad()
def test_a_state_sees_its_image_and_the_text_up_to_itself(writer):
    keys = writer.image_keys(writer.encode_image(images()).tokens)
    own = torch.arange(3)
    text = Ragged.from_lists(TEXTS)
    states = writer.decode(text, keys, own)
    for place in range(text.values.shape[0]):
        changed = text.with_values(text.values.clone())
        changed.values[place] = 11
        after = (text.row_ids() == text.row_ids()[place]) & (torch.arange(11) >= place)
        # The first token is the model's own to choose (BLIP's decoder starts with its own).
        moved = (writer.decode(changed, keys, own).values - states.values).abs().amax(1)
        assert (moved[~after] == 0).all()
        assert (moved[after] > 1e-5).all() or place in text.first()
    other = writer.decode(text, keys, own.roll(1))
    assert ((other.values - states.values).abs().amax(1) > 1e-5).all()


@torch.no_grad()
def test_texts_together_are_texts_alone(writer):
    keys = writer.image_keys(writer.encode_image(images()).tokens)
    text, kv_index = Ragged.from_lists(TEXTS), torch.tensor([2, 0, 2])
    together = writer.decode(text, keys, kv_index)
    for row in range(3):
        one = torch.tensor([row])
        alone = writer.decode(text.select(one), keys, kv_index[one])
        torch.testing.assert_close(together.select(one).values, alone.values, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_coca_reads_a_text_once_for_contrast_and_decoder():
    """The class token sees the text and no token sees it; so one pass serves both."""
    model, text = small("coca"), Ragged.from_lists(TEXTS)
    out = model.encode_text(text)
    assert out.tokens.lens.tolist() == [5, 2, 4]
    torch.nn.init.normal_(model.text.class_token)
    changed = model.encode_text(text)
    torch.testing.assert_close(changed.tokens.values, out.tokens.values, rtol=0, atol=0)
    assert ((changed.embedding - out.embedding).norm(dim=1) > 1e-3).all()
    keys = model.image_keys(model.encode_image(images()).tokens)
    own = torch.arange(3)
    given = model.decode(text, keys, own, tokens=out.tokens)
    torch.testing.assert_close(given.values, model.decode(text, keys, own).values, rtol=0, atol=0)


@torch.no_grad()
def test_cocas_embedding_pools_what_the_decoder_reads():
    """The cascade: 64 states of queries, and one query on them."""
    model = small("coca")
    out = model.encode_image(images())
    assert out.tokens.shape == (3, 64, 192)
    pooled = model.vision.pooler(out.tokens)
    assert pooled.shape == (3, 1, 192)
    expected = torch.nn.functional.normalize(model.image_projection(pooled[:, 0]), dim=-1)
    torch.testing.assert_close(out.embedding, expected)


def test_blip_base_has_the_published_size():
    """transformers' ITM model at 384 px; the decoder owns self-attention and a head beside it."""
    with torch.device("meta"):
        model = VLPModel(preset_config("blip", "base", image_size=384))
    own = count(*(part for b in model.decoder.blocks for part in (b.attention, b.norm1)))
    assert count(model) - own - count(model.lm_head) == pytest.approx(223.74, abs=0.01)
    # Of 12 layers, 4 projections of 768 and a norm.
    assert own == pytest.approx(12 * (4 * (768 * 768 + 768) + 2 * 768) / 1e6)


def test_blip_is_one_network_three_times():
    """The decoder has its own self-attention, with its norm, and nothing else."""
    model = small("blip")
    for text, fusion, decoder in zip(
        model.text.blocks, model.fusion.blocks, model.decoder.blocks, strict=True
    ):
        for name in ("attention", "norm1", "mlp", "norm2"):
            assert getattr(fusion, name) is getattr(text, name)
        for name in ("cross", "norm_cross", "mlp", "norm2"):
            assert getattr(decoder, name) is getattr(fusion, name)
        for name in ("attention", "norm1"):
            ours = {p.data_ptr() for p in getattr(decoder, name).parameters()}
            assert not ours & {p.data_ptr() for p in getattr(text, name).parameters()}
    assert model.decoder.image_kv is model.fusion.image_kv
    assert model.lm_head_inputs(torch.zeros(1, 192))[1] is model.text.embedding.token
    own = {n for n, _ in model.named_parameters() if n.startswith("decoder.")}
    assert {name.split(".")[3] for name in own} == {"attention", "norm1"}


@torch.no_grad()
def test_blip_texts_start_with_the_token_of_their_task():
    """The two last rows of the table: neither matching nor decoding reads the first token given."""
    model, text = small("blip"), Ragged.from_lists(TEXTS)
    assert model.config.text.task_ids == (48, 49)
    other = text.with_values(text.values.index_fill(0, text.first(), 7))
    keys, own = model.image_keys(model.encode_image(images()).tokens), torch.arange(3)
    results = {}
    for name, given in (("given", text), ("other", other)):
        out = model.encode_text(given)
        match = model.match(model.fuse(out.tokens, keys, own))
        results[name] = (match, model.decode(given, keys, own).values, out.embedding)
    for index, equal in enumerate((True, True, False)):
        assert torch.equal(results["given"][index], results["other"][index]) == equal
    before = results["given"]
    for row, changed in ((48, 1), (49, 0)):
        fresh = small("blip")
        torch.nn.init.normal_(fresh.text.embedding.token[row])
        match = fresh.match(fresh.fuse(fresh.encode_text(text).tokens, keys, own))
        now = (match, fresh.decode(text, keys, own).values)
        assert not torch.equal(now[changed], before[changed])
        assert torch.equal(now[1 - changed], before[1 - changed])


@torch.no_grad()
def test_blip_embeds_texts_alone():
    model, text = small("blip"), Ragged.from_lists(TEXTS)
    before = model.encode_text(text).embedding
    torch.nn.init.normal_(model.fusion.image_kv.weight)
    torch.testing.assert_close(model.encode_text(text).embedding, before, rtol=0, atol=0)


def test_what_shares_a_network_has_one_shape():
    with pytest.raises(ValueError, match=r"shares_text: fusion and text differ in \['depth'"):
        create_model("blip", fusion=replace(preset_config("blip").fusion, depth=3))
    with pytest.raises(ValueError, match=r"decoder needs fusion\.shares_text True"):
        create_model("albef", decoder=True, lm_head="tied")
    with pytest.raises(ValueError, match=r"lm_head goes with fusion\.causal or decoder"):
        create_model("albef", lm_head="linear")


def test_ragged_append_and_but_last_are_inverse():
    text = Ragged.from_lists([[1, 2, 3], [4], [5, 6]])
    grown = text.append(torch.tensor([7, 8, 9]))
    assert grown.values.tolist() == [1, 2, 3, 7, 4, 8, 5, 6, 9]
    assert grown.cu_seqlens.tolist() == [0, 4, 6, 9]
    assert grown.max_len == 4
    again = grown.without_last()
    assert again.values.tolist() == text.values.tolist()
    assert again.cu_seqlens.tolist() == text.cu_seqlens.tolist()
    assert text.without_last().lens.tolist() == [2, 0, 1]


def test_the_class_tokens_position_is_no_place_for_a_word(writer):
    text = lambda length: Ragged.from_lists([[1] * length])
    assert len(writer.encode_text(text(12)).tokens.values) == 12
    with pytest.raises(ValueError, match="text must have at most 12 tokens, got 13"):
        writer.encode_text(text(13))


def test_a_decoder_must_not_see_later_words():
    with pytest.raises(ValueError, match=r"fusion\.causal needs .* text\.causal True"):
        create_model("coca", "tiny", text=preset_config("albef", "tiny").text)
    text = replace(preset_config("clip").text, pool="appended", causal=False)
    with pytest.raises(ValueError, match=r"text\.pool 'appended' needs .* text\.causal True"):
        create_model("clip", text=text)
    with pytest.raises(
        ValueError, match="'albef' has no text decoder; presets that have: 'blip', 'coca'"
    ):
        small("albef").lm_head_inputs(torch.zeros(1, 192))
