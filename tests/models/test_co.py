"""Co-attention: packed is one pair at a time, streams meet in the first co-attention and not below,
what is shared is computed once, published sizes.
"""

from dataclasses import replace

import pytest
import torch

from tests._batches import make_regions
from vlpfast.layers.region import SummedRegionEmbedding
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.models.co import CoTower
from vlpfast.models.config import FusionConfig, StackConfig
from vlpfast.models.stack import init_tower
from vlpfast.ragged import Ragged


def count(*modules: torch.nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def packed(lens: list[int], dim: int) -> Ragged:
    return Ragged.from_padded(torch.randn(len(lens), max(lens), dim), torch.tensor(lens))


# Tied as LXMERT; own weights as ViLBERT, whose streams have unlike widths, heads and MLPs.
KINDS = {
    "tied-pre": (FusionConfig(16, 2, 2, kind="co", tied=True), StackConfig(16, 0, 2)),
    "tied-post": (
        FusionConfig(16, 2, 2, kind="co", tied=True, norm="post"),
        StackConfig(16, 0, 2, norm="post"),
    ),
    "own-pre": (
        FusionConfig(16, 2, 2, kind="co", co_mlp=True),
        StackConfig(24, 0, 3, mlp_ratio=1.0),
    ),
    "own-post": (
        FusionConfig(16, 2, 2, kind="co", co_mlp=True, norm="post"),
        StackConfig(24, 0, 3, mlp_ratio=1.0, norm="post"),
    ),
}


@pytest.fixture(params=KINDS, ids=str)
def tower(request):
    torch.manual_seed(0)
    text, image = KINDS[request.param]
    tower = CoTower(text, image)
    init_tower(tower, text)
    return tower.eval()


def attend(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    weights = (torch.einsum("mhe,nhe->hmn", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hmn,nhe->mhe", weights, v).flatten(1)


def alone(tower: CoTower, *pair: torch.Tensor) -> list[torch.Tensor]:
    """The tower on one pair, dense and without anything shared: words (M, D), places (N, D')."""

    def branch(x, norm, run):
        out = run(x if layer.post_norm else norm(x)[0])
        return norm(out + x)[0] if layer.post_norm else x + out

    for layer in tower.layers:
        sides = layer.cross[0], layer.cross[-1]
        read = [
            x if layer.post_norm else side.norm(x)[0] for x, side in zip(pair, sides, strict=True)
        ]
        parts = [side.qkv(x).chunk(3, -1) for x, side in zip(read, sides, strict=True)]
        crossed = []
        for number, (x, side) in enumerate(zip(pair, sides, strict=True)):
            (q, *_), (_, k, v) = parts[number], parts[1 - number]
            out = x + side.out(attend(q, k, v, layer.heads))
            crossed.append(side.norm(out)[0] if layer.post_norm else out)
        pair = crossed
        if layer.mlps is not None:
            pair = [branch(x, m.norm, m.mlp) for x, m in zip(pair, layer.mlps, strict=True)]
        for number, block in enumerate(layer.own):
            own, heads = block.attention, block.attention.heads
            run = lambda x, own=own, heads=heads: own.out(attend(*own.qkv(x).chunk(3, -1), heads))
            pair[number] = branch(pair[number], block.norm1, run)
            pair[number] = branch(pair[number], block.norm2, block.mlp)
    if tower.norms is None:
        return pair
    return [norm(x)[0] for x, norm in zip(pair, tower.norms, strict=True)]


@torch.no_grad()
def test_packed_rows_equal_pairs_alone(tower):
    """Images are shared, skipped and of different lengths; every row sees its own pair only."""
    width = tower.layers[0].cross[-1].qkv.in_features
    text, images = packed([3, 1, 5, 2], 16), packed([4, 1, 7, 2], width)
    kv_index = torch.tensor([2, 0, 2, 1])
    out = tower(text, images, kv_index)
    assert out.text.lens.tolist() == [3, 1, 5, 2]
    assert out.image.lens.tolist() == [7, 4, 7, 1]
    words, places = out.text.pad()[0], out.image.pad()[0]
    for row, image in enumerate(kv_index.tolist()):
        m, n = int(text.lens[row]), int(images.lens[image])
        expected = alone(tower, text.pad()[0][row, :m], images.pad()[0][image, :n])
        torch.testing.assert_close(words[row, :m], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(places[row, :n], expected[1], rtol=1e-5, atol=1e-5)


def test_gradients_of_a_shared_image_add_up(tower):
    """In training without dropout, against the same tower on copies of the image."""
    width = tower.layers[0].cross[-1].qkv.in_features
    text, images = packed([3, 2, 4], 16), packed([4, 2], width)
    kv_index = torch.tensor([1, 1, 0])
    grads = []
    for keys, index in ((images, kv_index), (images.select(kv_index), torch.arange(3))):
        leaf = images.values.clone().requires_grad_()
        values = leaf if index is kv_index else images.with_values(leaf).select(kv_index).values
        tower.zero_grad()
        out = tower(text, keys.with_values(values), index)
        (out.text.values.square().sum() + out.image.values.pow(3).sum()).backward()
        grads.append([leaf.grad, *(p.grad.clone() for p in tower.parameters())])
    for shared, copied in zip(*grads, strict=True):
        torch.testing.assert_close(shared, copied, rtol=1e-4, atol=1e-4)


def test_no_gradient_crosses_a_pair(tower):
    width = tower.layers[0].cross[-1].qkv.in_features
    text, images = packed([2, 3], 16), packed([3, 1], width)
    for part in (text.values, images.values):
        part.requires_grad_()
    out = tower(text, images, torch.tensor([1, 0]))
    out.image.values[0].square().sum().backward()
    assert (text.values.grad.abs().sum(1) > 0).tolist() == [True, True, False, False, False]
    assert (images.values.grad.abs().sum(1) > 0).tolist() == [False, False, False, True]


def test_images_are_copied_only_from_the_first_co_attention_on(tower):
    """Its projections run on each image once; all that follows on every row's own copy."""
    width = tower.layers[0].cross[-1].qkv.in_features
    seen = {"projected": [], "own": []}
    for layer in tower.layers:
        parts = (("projected", layer.cross[-1].qkv), ("own", layer.own[1].mlp))
        for name, module in parts:
            module.register_forward_pre_hook(lambda _m, args, n=name: seen[n].append(len(args[0])))
    tower(packed([1, 1, 1], 16), packed([4, 2], width), torch.tensor([0, 0, 0]))
    # Tied weights project texts (3 tokens) before images.
    images = seen["projected"][1::2] if len(tower.layers[0].cross) == 1 else seen["projected"]
    assert images == [6, 12]
    assert seen["own"] == [12, 12]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dropout_is_a_function_of_the_seed(kind):
    torch.manual_seed(0)
    text, image = (replace(s, dropout=0.3, attention_dropout=0.3) for s in KINDS[kind])
    tower = CoTower(text, image).train()
    same = packed([3], 16).select(torch.tensor([0, 0]))
    inputs = same, packed([4, 2], image.dim), torch.tensor([1, 1])
    one, two, three = (tower(*inputs, seed).image.values for seed in (1, 1, 2))
    assert one.equal(two)
    assert (one - three).abs().max() > 1e-2
    # Rows of the same text and image are dropped independently.
    assert (one[:2] - one[2:]).abs().max() > 1e-2


def test_tied_directions_are_one_set_of_weights():
    tied, own = (CoTower(*KINDS[kind]).layers[0] for kind in ("tied-pre", "own-pre"))
    assert tied.cross[0] is tied.cross[-1]
    assert own.cross[0] is not own.cross[-1]


def small(preset: str) -> VLPModel:
    """Of different depths, so that a stream's own layers are where they say."""
    torch.manual_seed(0)
    config = preset_config(preset, "tiny", vocab_size=50)
    vision = replace(config.vision, dim=48, heads=3) if preset == "vilbert" else config.vision
    return VLPModel(replace(config, vision=vision)).eval()


@pytest.mark.parametrize("preset", ["vilbert", "lxmert"])
def test_streams_are_independent_below_the_first_co_attention(preset):
    """Jacobian of each stream by the other's input: zero at the first co-attention's inputs, and
    not after it.
    """
    model = small(preset)
    text, regions = Ragged.from_lists([[1, 7, 8, 2]]), make_regions(1)
    features = regions.features.values.requires_grad_()
    regions = replace(regions, features=regions.features.with_values(features))
    met = {}
    first = model.fusion.layers[0]
    first.register_forward_pre_hook(lambda _m, args: met.update(before=args[:2]))
    first.register_forward_hook(lambda _m, _a, out: met.update(after=out))
    words = model.encode_text(text).tokens
    words = words.with_values(words.values.detach().requires_grad_())
    keys = model.image_keys(model.encode_image(regions).tokens)
    model.fuse_pairs(words, keys, torch.zeros(1, dtype=torch.int64))
    state = lambda stream: (stream.residual + (0 if stream.branch is None else stream.branch)).sum()
    for when, meets in (("before", False), ("after", True)):
        grads = [
            torch.autograd.grad(state(stream), other, retain_graph=True, allow_unused=True)[0]
            for stream, other in zip(met[when], (features, words.values), strict=True)
        ]
        assert [g is not None and bool(g.abs().max() > 0) for g in grads] == [meets, meets]


def test_base_sizes():
    with torch.device("meta"):
        lxmert, vilbert = (VLPModel(preset_config(p, "base")) for p in ("lxmert", "vilbert"))
    bare = count(lxmert.vision, lxmert.text, lxmert.fusion, lxmert.pooler)
    assert bare == pytest.approx(207.94, abs=0.005)
    # Attributes (400), and answers (9500) by a hidden layer with its norm.
    assert count(lxmert.region_heads.attributes) == pytest.approx(769 * 400 / 1e6)
    answers = 769 * 1536 + 2 * 1536 + 1537 * 9500
    assert count(lxmert.answer_head) == pytest.approx(answers / 1e6)
    assert count(lxmert) == pytest.approx(228.05, abs=0.005)
    assert count(vilbert) == pytest.approx(vilbert_count() / 1e6, abs=1e-6)
    assert vilbert.config.vision.depth == 0
    assert (vilbert.config.text.depth, vilbert.config.fusion.depth) == (6, 6)


def vilbert_count(t: int = 768, v: int = 1024, b: int = 1024, vocab: int = 30522) -> int:
    """Parameters by the published configuration, without `q_dense1` and `q_dense2`, which its
    co-attention has and does not use.
    """
    linear = lambda n, m: (n + 1) * m
    layer = lambda d, hidden: 4 * linear(d, d) + linear(d, hidden) + linear(hidden, d) + 4 * d
    mlp = lambda d, hidden: linear(d, hidden) + linear(hidden, d) + 2 * d
    co = 3 * linear(v, b) + 3 * linear(t, b) + linear(b, v) + linear(b, t) + 2 * v + 2 * t
    co += mlp(v, 1024) + mlp(t, 3072)
    words = (vocab + 512 + 2) * t + 2 * t
    regions = linear(2048, v) + linear(5, v) + 2 * v
    heads = linear(t, t) + 2 * t + vocab + linear(v, v) + 2 * v + linear(v, 1601)
    heads += linear(t, b) + linear(v, b) + linear(b, 2)
    return words + regions + 12 * layer(t, 3072) + 6 * layer(v, 1024) + 6 * co + heads


@torch.no_grad()
def test_the_whole_image_stands_before_its_regions():
    """ViLBERT's first region: the mean of the features that are shown, over all of the image."""
    torch.manual_seed(0)
    front = SummedRegionEmbedding(16, 64, 1e-6)
    regions = make_regions(3)
    hidden = torch.arange(regions.features.values.shape[0]) == 0
    out = front(regions.hide(hidden))
    assert out.lens.tolist() == (regions.features.lens + 1).tolist()
    assert out.max_len >= int(out.lens.max())
    features, starts = regions.features.values.clone(), regions.features.cu_seqlens.tolist()
    features[0] = 0
    for image in range(3):
        rows = slice(starts[image], starts[image + 1])
        boxes = regions.boxes[rows]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        what = torch.cat([features[rows].mean(0, keepdim=True), features[rows]])
        where = torch.cat([torch.tensor([[0.0, 0, 1, 1, 1]]), torch.cat([boxes, area[:, None]], 1)])
        expected = front.norm(front.feature(what) + front.box(where))[0]
        alone = out.values[out.cu_seqlens[image] : out.cu_seqlens[image + 1]]
        torch.testing.assert_close(alone, expected)


def test_matching_reads_both_streams():
    model = create_model("vilbert", "tiny", vocab_size=50).eval()
    text = model.encode_text(Ragged.from_lists([[1, 7, 2], [1, 9, 8, 2]])).tokens
    keys = model.image_keys(model.encode_image(make_regions(2)).tokens)
    fused = model.fuse_pairs(text, keys, torch.arange(2))
    words, places = (part.values[part.first()] for part in (fused.text, fused.image))
    pooled = model.pooler(words).relu() * model.image_pooler(places).relu()
    torch.testing.assert_close(model.match(fused), model.match_head(pooled))
    torch.testing.assert_close(model.match(fused, 1), model.match(fused)[:1])
    with pytest.raises(ValueError, match="'vilbert' reads the fused image tokens too"):
        model.match(fused.text)


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("lxmert", {"vision": {"norm": "post"}}, r"vision\.norm must be fusion\.norm 'pre'"),
        ("vilbert", {"fusion": {"layer_scale": 0.1}}, r"must be 0 for fusion\.kind 'co', got 0\.1"),
        ("lxmert", {"vision": {"dim": 96}}, r"vision\.dim must be fusion\.dim 192 where"),
        ("uniter", {"fusion": {"tied": True}}, r"are for fusion\.kind 'co', got 'concat'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_say_so(preset, change, message):
    config = preset_config(preset, "tiny")
    parts = {name: replace(getattr(config, name), **part) for name, part in change.items()}
    with pytest.raises(ValueError, match=message):
        replace(config, **parts)
