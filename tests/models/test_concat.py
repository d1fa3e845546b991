"""Texts and images in one sequence: packed is one pair at a time, masks against brute force, ViLT
against transformers' ViltModel, published sizes.
"""

import pytest
import torch

from vlpfast.integrations.transformers import vilt_state_dict
from vlpfast.layers.block import Layout
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.models.config import FusionConfig
from vlpfast.models.fusion import ConcatTower
from vlpfast.models.stack import init_tower
from vlpfast.ragged import Ragged


def count(*modules: torch.nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def packed(lens: list[int], dim: int = 16) -> Ragged:
    return Ragged.from_padded(torch.randn(len(lens), max(lens), dim), torch.tensor(lens))


@pytest.fixture
def tower():
    torch.manual_seed(0)
    config = FusionConfig(16, 2, 2, kind="concat", modality_types=True)
    tower = ConcatTower(config)
    init_tower(tower, config)
    return tower.eval()


def alone(tower: ConcatTower, words: torch.Tensor, places: torch.Tensor, visible: torch.Tensor):
    """The tower on one pair, dense, with an explicit mask: words (M, D), places (N, D)."""
    types = tower.modality if tower.modality is not None else torch.zeros(2, 1)
    x = torch.cat([words + types[0], places + types[1]])
    for block in tower.blocks:
        normed = block.norm1(x)[0]
        q, k, v = (
            block.attention.qkv(normed).unflatten(-1, (3, block.attention.heads, -1)).unbind(1)
        )
        scores = torch.einsum("mhe,nhe->hmn", q, k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        x = x + block.attention.out(torch.einsum("hmn,nhe->mhe", weights, v).flatten(1))
        x = x + block.mlp(block.norm2(x)[0])
    x = tower.norm(x)[0]
    return x[: len(words)], x[len(words) :]


@pytest.mark.parametrize("masked", [False, True], ids=["all-visible", "prefix"])
@torch.no_grad()
def test_packed_rows_equal_pairs_alone(tower, masked):
    """Images are shared, skipped and of different lengths; the mask is every pair's own."""
    text, images = packed([3, 1, 5, 2]), packed([4, 1, 7])
    kv_index = torch.tensor([2, 0, 2, 1])
    blocks = text.positions() + 1 if masked else None
    out = tower(text, images, kv_index, text_blocks=blocks)
    words, places = out.text.pad()[0], out.image.pad()[0]
    assert out.text.lens.tolist() == [3, 1, 5, 2]
    assert out.image.lens.tolist() == [7, 4, 7, 1]
    for row, image in enumerate(kv_index.tolist()):
        m, n = int(text.lens[row]), int(images.lens[image])
        block = torch.cat([torch.arange(1, m + 1), torch.zeros(n, dtype=torch.int64)])
        visible = block[None, :] <= block[:, None] if masked else torch.ones(m + n, m + n).bool()
        expected = alone(tower, text.pad()[0][row, :m], images.pad()[0][image, :n], visible)
        torch.testing.assert_close(words[row, :m], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(places[row, :n], expected[1], rtol=1e-5, atol=1e-5)


def test_no_gradient_crosses_a_pair_or_the_mask(tower):
    text, images = packed([3, 2]), packed([2, 3])
    for part in (text.values, images.values):
        part.requires_grad_()
    blocks = text.positions() + 1
    out = tower(text, images, torch.tensor([0, 1]), text_blocks=blocks)
    out.text.values[0].square().sum().backward()
    # The first word sees itself and its image, not the later words, not the other pair.
    assert (text.values.grad.abs().sum(1) > 0).tolist() == [True, False, False, False, False]
    assert (images.values.grad.abs().sum(1) > 0).tolist() == [True, True, False, False, False]


def test_layout_is_not_padded(tower):
    seen = []
    tower.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    tower(packed([3, 1]), packed([4, 2]), torch.tensor([0, 0]))
    _, tokens, layout = seen[0]
    assert isinstance(layout, Layout)
    assert tokens.shape == (3 + 4 + 1 + 4, 16)
    assert layout.cu_seqlens.tolist() == [0, 7, 12]


def test_joined_sequences_part_again():
    first = Ragged.from_lists([[1, 2, 3], [4], [5, 6]])
    second = Ragged.from_lists([[7], [8, 9, 10, 11]])
    joined = Ragged.join(first, second, torch.tensor([1, 0, 1]))
    assert joined.whole.values.tolist() == [1, 2, 3, 8, 9, 10, 11, 4, 7, 5, 6, 8, 9, 10, 11]
    assert joined.whole.cu_seqlens.tolist() == [0, 7, 9, 15]
    assert joined.whole.max_len == 7
    parts = [joined.part(number, -joined.whole.values) for number in (0, 1)]
    assert parts[0].values.tolist() == (-first.values).tolist()
    assert parts[1].values.tolist() == [-8, -9, -10, -11, -7, -8, -9, -10, -11]
    assert [part.max_len for part in parts] == [3, 4]
    assert joined.token_ids(1).tolist() == [3, 4, 5, 6, 8, 11, 12, 13, 14]
    assert Ragged.join(second, second).whole.lens.tolist() == [2, 8]


def test_vilt_base_has_the_published_size():
    with torch.device("meta"):
        model = VLPModel(preset_config("vilt", "base"))
    bare = count(model.vision, model.text, model.fusion, model.pooler)
    assert bare == pytest.approx(111.60, abs=0.01)
    assert bare + count(model.token_head) == pytest.approx(112.22, abs=0.01)
    assert count(model) == pytest.approx(bare + count(model.token_head, model.match_head))


def vilt_pair():
    """A small vlpfast vilt and the ViltModel that holds the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = create_model("vilt", "tiny", vocab_size=99, context_length=16, image_size=32)
    config = transformers.ViltConfig(
        vocab_size=99,
        type_vocab_size=2,
        hidden_size=ours.config.fusion.dim,
        num_hidden_layers=ours.config.fusion.depth,
        num_attention_heads=ours.config.fusion.heads,
        intermediate_size=4 * ours.config.fusion.dim,
        max_position_embeddings=16,
        image_size=32,
        patch_size=ours.config.vision.patch_size,
    )
    theirs = transformers.ViltModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    absent = ours.load_state_dict(vilt_state_dict(theirs.state_dict()), strict=False)
    assert not absent.unexpected_keys
    assert {name.split(".")[0] for name in absent.missing_keys} == {"token_head", "match_head"}
    return ours.eval(), theirs


@torch.no_grad()
def test_vilt_equals_transformers():
    ours, theirs = vilt_pair()
    texts = [[7, 5, 6, 8], [7, 8], [7, *range(10, 24), 8], [7, 3, 8]]
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    pixels = (images / 255 - 0.5) / 0.5
    padded = torch.zeros(4, 16, dtype=torch.int64)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    expected = theirs(
        input_ids=padded, attention_mask=padded != 0, pixel_values=pixels.permute(0, 3, 1, 2)
    )
    keys = ours.image_keys(ours.encode_image(images).tokens)
    tokens = ours.encode_text(Ragged.from_lists(texts)).tokens
    out = ours.fuse_pairs(tokens, keys, torch.arange(4))
    torch.testing.assert_close(
        out.text.values, expected.last_hidden_state[:, :16][padded != 0], rtol=1e-4, atol=1e-4
    )
    pooled = ours.pool(out.text.values[out.text.first()])
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-4, atol=1e-4)
    # transformers shuffles the patches; each keeps its place in ours.
    image, theirs_image = out.image.pad()[0], expected.last_hidden_state[:, 16:]
    torch.testing.assert_close(image[:, 0], theirs_image[:, 0], rtol=1e-4, atol=1e-4)
    nearest = torch.cdist(image, theirs_image).min(2).values
    assert nearest.max() < 1e-3


def test_vilt_conversion_names_foreign_weights():
    _, theirs = vilt_pair()
    with pytest.raises(ValueError, match="ViltModel"):
        vilt_state_dict({**theirs.state_dict(), "stranger": torch.zeros(1)})


@torch.no_grad()
def test_what_is_sampled_in_training_is_all_there_in_evaluation():
    """Dropping patches before the stack is leaving them out of the sequence."""
    model = create_model("vilt", "tiny", vocab_size=50, image_size=32).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    text = model.encode_text(Ragged.from_lists([[1, 7, 2], [1, 9, 8, 2]])).tokens
    kept = torch.tensor([[0, 3, 9], [1, 2, 15]])
    own = torch.arange(2)
    dropped = model.fuse_pairs(text, model.image_keys(model.encode_image(images, kept).tokens), own)
    every = model.encode_image(images).tokens
    places = torch.cat([torch.zeros(2, 1, dtype=torch.int64), kept + 1], 1)
    chosen = every.gather(1, places[:, :, None].expand(-1, -1, every.shape[2]))
    expected = model.fuse_pairs(text, model.image_keys(chosen), own)
    torch.testing.assert_close(dropped.text.values, expected.text.values, rtol=1e-5, atol=1e-5)
    assert dropped.image.lens.tolist() == [4, 4]
    assert model.image_keys(every).lens.tolist() == [17, 17]
