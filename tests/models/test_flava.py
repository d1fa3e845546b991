"""Fusion with a class token over towers: pairs one by one, what reads the class token, and states
before and after the towers' last norms.
"""

from dataclasses import replace

import pytest
import torch

from tests.models.test_concat import alone, count, packed
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.models.config import FusionConfig
from vlpfast.models.fusion import ClassTower
from vlpfast.models.stack import init_tower
from vlpfast.ragged import Ragged

TEXTS = [[1, 7, 2], [1, 9, 8, 2], [1, 2], [1, 5, 2]]


@pytest.fixture
def tower():
    """Of width 16 over images of width 12 and texts of width 20."""
    torch.manual_seed(0)
    config = FusionConfig(16, 2, 2, kind="concat", class_token=True)
    tower = ClassTower(config, 12, 20)
    init_tower(tower, config)
    return tower.eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("flava", "tiny", vocab_size=50, image_size=16).eval()


def some_images(size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (size, 16, 16, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("masked", [False, True], ids=["all-visible", "prefix"])
@torch.no_grad()
def test_packed_rows_equal_pairs_alone(tower, masked):
    """An image is read twice, another by none; the mask is every pair's own."""
    text, images = packed([3, 1, 5, 2], 20), torch.randn(3, 4, 12)
    kv_index = torch.tensor([2, 0, 2, 0])
    blocks = text.positions() + 1 if masked else None
    out = tower(text, tower.image_keys(images), kv_index, text_blocks=blocks)
    words, places = out.text.pad()[0], out.image.pad()[0]
    assert out.text.lens.tolist() == [3, 1, 5, 2]
    assert out.image.lens.tolist() == [5, 5, 5, 5]
    for row, image in enumerate(kv_index.tolist()):
        m = int(text.lens[row])
        block = torch.cat([torch.arange(1, m + 1), torch.zeros(5, dtype=torch.int64)])
        visible = block[None, :] <= block[:, None] if masked else torch.ones(m + 5, m + 5).bool()
        mapped = tower.text_map(text.pad()[0][row, :m]), tower.image_map(images[image])
        sequence = torch.cat([tower.class_token[None], mapped[1]])
        expected = alone(tower, mapped[0], sequence, visible)
        torch.testing.assert_close(words[row, :m], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(places[row], expected[1], rtol=1e-5, atol=1e-5)


def test_the_class_token_reads_its_own_pair_alone(tower):
    text, images = packed([3, 2], 20), torch.randn(2, 4, 12, requires_grad=True)
    text.values.requires_grad_()
    out = tower(text, tower.image_keys(images), torch.tensor([1, 0]))
    out.image.values[out.image.first()[0]].square().sum().backward()
    assert (text.values.grad.abs().sum(1) > 0).tolist() == [True, True, True, False, False]
    assert (images.grad.abs().sum(2) > 0).tolist() == [[False] * 4, [True] * 4]
    assert tower.class_token.grad.abs().sum() > 0


@pytest.mark.slow
@torch.no_grad()
def test_compiles_whole(tower):
    text, images, kv_index = packed([3, 1, 5], 20), torch.randn(2, 4, 12), torch.tensor([1, 0, 1])
    run = lambda: tower(text, tower.image_keys(images), kv_index)
    expected, out = run(), torch.compile(run, fullgraph=True, backend="aot_eager")()
    for mine, other in ((out.text, expected.text), (out.image, expected.image)):
        torch.testing.assert_close(mine.values, other.values)
        assert mine.cu_seqlens.equal(other.cu_seqlens)


@torch.no_grad()
def test_matching_reads_the_class_token(model):
    text = model.encode_text(Ragged.from_lists(TEXTS)).tokens
    keys = model.image_keys(model.encode_image(some_images()).tokens)
    fused = model.fuse_pairs(text, keys, torch.arange(4))
    first, other = model.first_tokens(fused, 3)
    assert other is None
    assert first.equal(fused.image.pad()[0][:3, 0])
    expected = model.match_head(torch.tanh(model.pooler(first)))
    torch.testing.assert_close(model.match(fused)[:3], expected)
    # It is no patch, though it stands where images' tokens do.
    assert model.config.num_patches + 2 == fused.image.max_len
    with pytest.raises(ValueError, match="match of preset 'flava' reads the fused image tokens"):
        model.match(fused.text)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fusion_reads_what_the_last_norm_reads(dropout):
    """The same weights without the class token give the same towers, normalised."""
    config = preset_config("flava", "tiny", vocab_size=50, image_size=16)
    config = replace(
        config,
        vision=replace(config.vision, dropout=dropout),
        text=replace(config.text, dropout=dropout),
    )
    plain = replace(config, fusion=replace(config.fusion, class_token=False))
    torch.manual_seed(0)
    model, other = VLPModel(config).train(), VLPModel(plain).train()
    left = other.load_state_dict(model.state_dict(), strict=False)
    assert left.missing_keys == []
    assert {name.split(".")[1] for name in left.unexpected_keys} == {
        "class_token",
        "image_map",
        "text_map",
    }
    text = Ragged.from_lists(TEXTS)
    pairs = [
        (model.encode_image(some_images(), seed=3), other.encode_image(some_images(), seed=3)),
        (model.encode_text(text, seed=3), other.encode_text(text, seed=3)),
    ]
    for (mine, theirs), states in zip(pairs, (model.image_states, model.text_states), strict=True):
        tokens = mine.tokens if isinstance(mine.tokens, torch.Tensor) else mine.tokens.values
        normed = theirs.tokens if isinstance(theirs.tokens, torch.Tensor) else theirs.tokens.values
        assert (tokens - normed).abs().max() > 0.1
        torch.testing.assert_close(states(tokens), normed, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.embedding, theirs.embedding, rtol=1e-5, atol=1e-5)


def test_base_has_the_published_size():
    """transformers counts 241.36 M with a pooler in each of its three models."""
    with torch.device("meta"):
        model = VLPModel(preset_config("flava", "base"))
    joint = (model.image_projection, model.text_projection)
    bare = count(model.vision, model.text, model.fusion, *joint)
    assert bare == pytest.approx(239.58, abs=0.01)
    assert bare + 3 * count(model.pooler) == pytest.approx(241.36, abs=0.01)
    assert count(model.token_head) == pytest.approx(24.06, abs=0.01)
    assert count(model.code_head) == pytest.approx(6.89, abs=0.01)
    assert count(model) == pytest.approx(271.13, abs=0.01)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("fusion", {"kind": "cross"}, "needs fusion.kind 'concat'.*got 'cross'"),
        ("fusion", {"experts": "mome"}, "needs .*got 'concat', 'mome' and 128"),
        ("vision", {"front": "grid"}, "vision.front 'patches'.*got 'grid' and 0"),
        ("text", {"norm": "post"}, "text.norm 'pre' or 'sub'.*got 4, 'post' and 'first'"),
        ("vision", {"pool": "mean"}, "vision.pool 'first', got 4, 'pre' and 'mean'"),
        ("text", {"depth": 0}, "text.depth > 0.*got 0, 'pre' and 'first'"),
    ],
)
def test_what_does_not_fit_is_named(part, changes, message):
    config = preset_config("flava", "tiny")
    with pytest.raises(ValueError, match=f"fusion.class_token .*{message}"):
        replace(config, **{part: replace(getattr(config, part), **changes)})
