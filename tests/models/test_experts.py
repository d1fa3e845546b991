"""Experts by modality: packed pairs against pairs alone in straight lines, each modality's tower is
the same stack, who gets gradients, captioning's mask by brute force, published sizes.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlpfast.layers.block import Block, Layout
from vlpfast.layers.experts import ExpertBlock, Experts, PairLayout, expert_norm
from vlpfast.layers.position_bias import pair_displacements
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.models.config import FusionConfig
from vlpfast.models.experts import ExpertTower
from vlpfast.models.stack import init_tower
from vlpfast.ragged import Ragged

KINDS = {
    "multiway-sub": {"experts": "multiway", "norm": "sub", "order": "image"},
    "mome-joint": {"experts": "mome", "joint_experts": 1, "modality_types": True},
}


def packed(lens: list[int], dim: int = 16) -> Ragged:
    return Ragged.from_padded(torch.randn(len(lens), max(lens), dim), torch.tensor(lens))


def make(kind: str, **changes) -> ExpertTower:
    torch.manual_seed(0)
    config = FusionConfig(16, 3, 2, kind="concat", **{**KINDS[kind], **changes})
    tower = ExpertTower(config)
    init_tower(tower, config)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower.eval()


@pytest.fixture(params=KINDS)
def tower(request):
    return make(request.param)


def norm(x, module):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def of(part, name, joint):
    if not isinstance(part, Experts):
        return part
    return part.joint if joint and part.joint is not None else getattr(part, name)


def alone(tower, parts: dict[str, torch.Tensor], visible: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tower on one row, text before image, in straight lines; visible (T, T)."""
    joint = len(parts) == 2
    x = dict(parts)
    if tower.modality is not None:
        x = {m: t + tower.modality[("text", "image").index(m)] for m, t in x.items()}
    sizes = [len(t) for t in x.values()]
    for block in tower.blocks:
        attention = block.attention
        qkv = torch.cat(
            [of(attention.qkv, m, joint)(norm(t, of(block.norm1, m, joint))) for m, t in x.items()]
        )
        q, k, v = qkv.unflatten(-1, (3, attention.heads, -1)).unbind(1)
        scores = torch.einsum("mhe,nhe->hmn", q, k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        mixed = torch.einsum("hmn,nhe->mhe", weights, v).flatten(1).split(sizes)
        for (m, t), y in zip(list(x.items()), mixed, strict=True):
            inner = y if attention.norm is None else norm(y, of(attention.norm, m, joint))
            t = t + of(attention.out, m, joint)(inner)
            mlp = of(block.mlp, m, joint)
            hidden = F.gelu(mlp.fc1(norm(t, of(block.norm2, m, joint))))
            x[m] = t + mlp.fc2(hidden if mlp.norm is None else norm(hidden, mlp.norm))
    return {m: norm(t, of(tower.norm, m, joint)) for m, t in x.items()}


@pytest.mark.parametrize("masked", [False, True], ids=["all-visible", "captioning"])
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
        visible = torch.ones(m + n, m + n, dtype=torch.bool)
        if masked:
            # An image sees the image; a word sees the image, itself and earlier words.
            visible[m:, :m] = False
            visible[:m, :m].tril_()
        parts = {"text": text.pad()[0][row, :m], "image": images.pad()[0][image, :n]}
        expected = alone(tower, parts, visible)
        torch.testing.assert_close(words[row, :m], expected["text"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(places[row, :n], expected["image"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_modality_alone_is_its_tower(tower):
    """The dual mode: the same stack on rows whose other part is empty."""
    text, images = packed([3, 1, 5]), packed([4, 2])
    for name, part in (("text", text), ("image", images)):
        out = tower.alone(part, name)
        assert out.lens.equal(part.lens)
        for row in range(len(part)):
            x = part.select(torch.tensor([row])).values
            expected = alone(tower, {name: x}, torch.ones(len(x), len(x), dtype=torch.bool))
            found = out.select(torch.tensor([row])).values
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_alone_may_stand_among_pairs():
    tower = make("multiway-sub")
    text, images = packed([3, 2, 4]), packed([4, 2])
    keys = Ragged.cat([images, Ragged.empty(images.values)])
    mixed = tower(text, keys, torch.tensor([1, 2, 0]))
    assert mixed.image.lens.tolist() == [2, 0, 4]
    pairs = tower(text.select(torch.tensor([0, 2])), images, torch.tensor([1, 0]))
    middle = torch.tensor([1])
    expected = tower.alone(text.select(middle), "text")
    torch.testing.assert_close(mixed.text.select(middle).values, expected.values)
    rows = torch.tensor([0, 2])
    torch.testing.assert_close(mixed.text.select(rows).values, pairs.text.values)
    torch.testing.assert_close(mixed.image.select(rows).values, pairs.image.values)


@torch.no_grad()
def test_unwanted_images_are_left_after_the_last_attention(tower):
    text, images = packed([3, 2]), packed([4, 2])
    whole, rows = tower(text, images, torch.tensor([1, 0])), []
    for block in tower.blocks:
        for name in ("text", "image", "joint"):
            if (mlp := getattr(block.mlp, name)) is not None:
                mlp.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    out = tower(text, images, torch.tensor([1, 0]), images=False)
    assert out.image is None
    torch.testing.assert_close(out.text.values, whole.text.values, rtol=0, atol=0)
    assert rows == [5, 6, 5, 6, 5]


@torch.no_grad()
def test_order_is_layout_only():
    text, images = packed([3, 2]), packed([4, 2])
    first, second = (make("multiway-sub", order=order) for order in ("text", "image"))
    ours = PairLayout.of(text, images, image_first=True).sequences
    assert ours.cu_seqlens.tolist() == [0, 7, 11]
    a, b = (tower(text, images, torch.tensor([1, 0])) for tower in (first, second))
    torch.testing.assert_close(a.text.values, b.text.values)
    torch.testing.assert_close(a.image.values, b.image.values)
    ids = Ragged.cat([text.with_values(torch.arange(5)), images.with_values(torch.arange(5, 11))])
    for image_first, expected in (
        (False, [0, 1, 2, 5, 6, 7, 8, 3, 4, 9, 10]),
        (True, [5, 6, 7, 8, 0, 1, 2, 9, 10, 3, 4]),
    ):
        layout = PairLayout.of(text, images, image_first=image_first)
        streams = {"text": ids.values[:5], "image": ids.values[5:]}
        assert layout.join(streams).tolist() == expected
        back = layout.split(layout.join(streams), streams)
        assert all(back[m].equal(streams[m]) for m in streams)


def experts_with_gradient(tower: ExpertTower) -> set[str]:
    names = {n for n, p in tower.named_parameters() if p.grad is not None and p.grad.any()}
    return {e for n in names for e in ("text", "image", "joint") if f".{e}." in n}


@pytest.mark.parametrize("name", ["text", "image"])
def test_one_modality_trains_its_experts_only(tower, name):
    tower.alone(packed([3, 2]), name).values.square().sum().backward()
    assert experts_with_gradient(tower) == {name}
    inside = [n for n, p in tower.named_parameters() if f".{name}." in n and p.grad is None]
    assert inside == []


def test_pairs_train_all_but_where_joint_experts_stand_in(tower):
    out = tower(packed([3, 2]), packed([2, 3]), torch.tensor([0, 1]))
    (out.text.values.square().sum() + out.image.values.square().sum()).backward()
    idle = {n for n, p in tower.named_parameters() if p.grad is None}
    joint = tower.blocks[-1].mlp.joint is not None
    last = {f"blocks.2.{p}.{m}" for p in ("mlp", "norm2") for m in ("text", "image")}
    assert {n.rsplit(".", 2 if ".mlp." in n else 1)[0] for n in idle} == (last if joint else set())


def test_no_gradient_crosses_a_pair_or_the_mask(tower):
    text, images = packed([3, 2]), packed([2, 3])
    for part in (text.values, images.values):
        part.requires_grad_()
    out = tower(text, images, torch.tensor([0, 1]), text_blocks=text.positions() + 1)
    (out.text.values[0].square().sum() + out.image.values[0].square().sum()).backward()
    # The first word sees itself and its image; the image no word; neither the other pair.
    assert (text.values.grad.abs().sum(1) > 0).tolist() == [True, False, False, False, False]
    assert (images.values.grad.abs().sum(1) > 0).tolist() == [True, True, False, False, False]


def test_dropout_masks_of_the_streams_differ():
    tower = make("multiway-sub", dropout=0.5).train()
    streams = dict.fromkeys(("text", "image"), torch.ones(4, 16))
    layout = PairLayout.of(packed([4]), packed([4]), image_first=True)
    _, summed = expert_norm(tower.blocks[0].norm1, streams, streams, layout, 3)
    assert not summed["text"].equal(summed["image"])
    text, images = Ragged.from_dense(torch.ones(1, 4, 16)), Ragged.from_dense(torch.ones(1, 4, 16))
    first = tower(text, images, torch.tensor([0]), 3)
    again = tower(text, images, torch.tensor([0]), 3)
    other = tower(text, images, torch.tensor([0]), 4)
    assert first.text.values.equal(again.text.values)
    assert not first.text.values.equal(other.text.values)


@pytest.mark.parametrize("kind", KINDS)
def test_block_compiles_whole(kind):
    tower = make(kind)
    block = tower.blocks[-1]
    assert isinstance(block, ExpertBlock)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    text, images = packed([3, 2]), packed([2, 3])
    layout = PairLayout.of(text, images, image_first=True)
    streams = {"text": text.values, "image": images.values}
    for expected, found in zip(
        block(None, streams, layout), compiled(None, streams, layout), strict=True
    ):
        for name in streams:
            torch.testing.assert_close(found[name], expected[name])


@torch.no_grad()
def test_sub_norm_of_a_shared_block():
    torch.manual_seed(0)
    shape = {"mlp_ratio": 4.0, "norm_eps": 1e-6, "activation": "gelu"}
    block = Block(16, 2, norm="sub", **shape)
    for parameter in block.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(1, 5, 16)
    branch, residual = block(None, x, Layout())
    q, k, v = block.attention.qkv(norm(x, block.norm1)).unflatten(-1, (3, 2, -1)).unbind(2)
    mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    mixed = norm(mixed.transpose(1, 2).flatten(2), block.attention.norm)
    expected = x + block.attention.out(mixed)
    hidden = norm(F.gelu(block.mlp.fc1(norm(expected, block.norm2))), block.mlp.norm)
    expected = expected + block.mlp.fc2(hidden)
    torch.testing.assert_close(branch + residual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sub_norm_scales_its_weights_as_magneto():
    torch.manual_seed(0)
    config = FusionConfig(256, 8, 4, kind="concat", norm="sub", experts="multiway")
    tower = ExpertTower(config)
    init_tower(tower, config)
    block, gain = tower.blocks[3], torch.tensor(16.0).log().sqrt()
    for expert in (block.attention.qkv.text, block.attention.qkv.image):
        q, k, v = expert.weight.chunk(3)
        for part, expected in ((q, 1.0), (k, 1.0), (v, gain)):
            assert part.std() * 16 == pytest.approx(float(expected), rel=0.02)
    assert block.attention.out.image.weight.std() * 16 == pytest.approx(float(gain), rel=0.02)
    fc1 = block.mlp.text.fc1.weight
    assert fc1.std() == pytest.approx(float(gain) * (2 / 1280) ** 0.5, rel=0.02)


def test_beit3_base_has_the_published_size():
    with torch.device("meta"):
        model = VLPModel(preset_config("beit3", "base"))
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    bare = count(model.vision, model.text, model.fusion)
    assert bare == pytest.approx(220.99, abs=0.01)
    assert count(model.image_projection, model.text_projection) == pytest.approx(1.18, abs=0.001)
    assert count(model.token_head) == pytest.approx(49.22, abs=0.01)
    assert count(model.code_head) == pytest.approx(6.3, abs=0.01)
    heads = count(model.token_head, model.code_head)
    assert bare + heads == pytest.approx(276.5, abs=0.05)


def test_vlmo_base_has_the_published_size():
    with torch.device("meta"):
        model = VLPModel(preset_config("vlmo", "base"))
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    assert count(model.vision, model.text, model.fusion) == pytest.approx(175.43, abs=0.03)
    layers = [block.mlp.joint is not None for block in model.fusion.blocks]
    assert layers == 10 * [False] + 2 * [True]


@pytest.fixture
def beit3():
    torch.manual_seed(0)
    return create_model("beit3", "tiny", vocab_size=50, image_size=32).eval()


@torch.no_grad()
def test_towers_are_the_stack(beit3):
    """An embedding is the stack's first state of the modality alone, projected."""
    assert len(beit3.vision.blocks) == len(beit3.text.blocks) == 0
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    text = Ragged.from_lists([[1, 7, 8, 2], [1, 9, 2]])
    image, words = beit3.encode_image(images), beit3.encode_text(text)
    n = image.tokens.shape[1]
    for row in range(2):
        full = torch.ones(n, n, dtype=torch.bool)
        state = alone(beit3.fusion, {"image": image.tokens[row]}, full)["image"][0]
        expected = F.normalize(beit3.image_projection(state), dim=0)
        torch.testing.assert_close(image.embedding[row], expected, rtol=1e-4, atol=1e-5)
        x = words.tokens.select(torch.tensor([row])).values
        full = torch.ones(len(x), len(x), dtype=torch.bool)
        state = alone(beit3.fusion, {"text": x}, full)["text"][0]
        expected = F.normalize(beit3.text_projection(state), dim=0)
        torch.testing.assert_close(words.embedding[row], expected, rtol=1e-4, atol=1e-5)
    assert beit3.encode_text(text, num_embedded=0).embedding is None
    assert beit3.encode_image(images, num_embedded=0).embedding is None
    one = beit3.encode_text(text, num_embedded=1)
    torch.testing.assert_close(one.embedding, words.embedding[:1])
    first = beit3.encode_image(images, num_embedded=1)
    torch.testing.assert_close(first.embedding, image.embedding[:1])
    assert len(first.tokens) == 2
    states = beit3.image_states(image.tokens)
    assert states.shape == image.tokens.shape
    direct = F.normalize(beit3.image_projection(states[:, 0]), dim=1)
    torch.testing.assert_close(direct, image.embedding)
    assert len(one.tokens) == 2


def displacement(place: tuple, key: tuple, side: int, length: int) -> int:
    """The kind of one pair of VLMo's tokens: ("image" or "text", number, 0 the first)."""
    square, (m, i), (n, j) = (2 * side - 1) ** 2, place, key
    if m != n:
        return square + 3 + (m == "image")
    if m == "image" and i and j:
        (y, x), (v, u) = divmod(i - 1, side), divmod(j - 1, side)
        return (y - v + side - 1) * (2 * side - 1) + x - u + side - 1
    if m == "text" and i and j:
        return square + 5 + (j - i) + length - 2
    last = square if m == "image" else square + 5 + 2 * length - 3
    return last + (0 if j else 2 if not i else 1)


def test_displacements_by_brute_force():
    side, length = 3, 5
    index, kinds = pair_displacements(side, length)
    tokens = [("image", i) for i in range(10)] + [("text", i) for i in range(length)]
    expected = [[displacement(a, b, side, length) for b in tokens] for a in tokens]
    assert index.tolist() == expected
    assert kinds == (2 * side - 1) ** 2 + 3 + 2 + 2 * length
    assert index.unique().tolist() == list(range(kinds))


@pytest.fixture
def vlmo():
    torch.manual_seed(0)
    model = create_model("vlmo", "tiny", vocab_size=50, image_size=24, context_length=8).eval()
    with torch.no_grad():
        model.fusion.relative_bias.table.normal_()
        for parameter in model.fusion.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def biased(model, parts: dict[str, torch.Tensor], joint: bool) -> dict[str, torch.Tensor]:
    """VLMo's stack on one row in straight lines, text before image as published; which MLP the last
    layers use is `joint`.
    """
    tower, (side, length) = model.fusion, (3, 8)
    tokens = [(m, i) for m, x in parts.items() for i in range(len(x))]
    kinds = torch.tensor([[displacement(a, b, side, length) for b in tokens] for a in tokens])
    x = {m: t + tower.modality[("text", "image").index(m)] for m, t in parts.items()}
    sizes = [len(t) for t in x.values()]
    for number, block in enumerate(tower.blocks):
        qkv, heads = block.attention.qkv, block.attention.heads
        q_bias, v_bias = qkv.query_value_bias
        states = norm(torch.cat(list(x.values())), block.norm1)
        q, k, v = (states @ qkv.weight.T).chunk(3, 1)
        q, k, v = ((t.unflatten(1, (heads, -1))) for t in (q + q_bias, k, v + v_bias))
        table = tower.relative_bias.table.unflatten(0, (len(tower.blocks), -1))
        bias = table[number][kinds].permute(2, 0, 1)
        scores = torch.einsum("mhe,nhe->hmn", q, k) * q.shape[-1] ** -0.5 + bias
        mixed = torch.einsum("hmn,nhe->mhe", scores.softmax(-1), v).flatten(1)
        out = block.attention.out
        mixed = (F.linear(mixed, out.weight, out.bias) * out.scale).split(sizes)
        for (m, t), y in zip(list(x.items()), mixed, strict=True):
            mlp, t = of(block.mlp, m, joint), t + y
            hidden = F.gelu(mlp.fc1(norm(t, of(block.norm2, m, joint))))
            x[m] = t + mlp.fc2.scale * F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)
    return {m: norm(t, tower.norm) for m, t in x.items()}


@torch.no_grad()
def test_vlmo_pairs_and_towers_in_straight_lines(vlmo):
    images = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    text = Ragged.from_lists([[1, 7, 8, 2], [1, 9, 2]])
    image, words = vlmo.encode_image(images), vlmo.encode_text(text)
    fused = vlmo.fuse_pairs(words.tokens, vlmo.image_keys(image.tokens), torch.tensor([1, 0]))
    close = {"rtol": 1e-4, "atol": 1e-5}
    for row in range(2):
        one = torch.tensor([row])
        x = words.tokens.select(one).values
        expected = biased(vlmo, {"text": x, "image": image.tokens[1 - row]}, joint=True)
        torch.testing.assert_close(fused.text.select(one).values, expected["text"], **close)
        torch.testing.assert_close(fused.image.select(one).values, expected["image"], **close)
        for name, part, out in (("text", x, words), ("image", image.tokens[row], image)):
            heads = {"": getattr(vlmo, f"{name}_projection")}
            heads["joint_"] = getattr(vlmo.joint_heads, name)
            for prefix, head in heads.items():
                state = biased(vlmo, {name: part}, joint=bool(prefix))[name][0]
                found = getattr(out, f"{prefix}embedding")[row]
                torch.testing.assert_close(found, F.normalize(head(state), dim=0), **close)


def test_words_have_an_order_without_positions(vlmo):
    with torch.no_grad():
        ab, ba = (
            vlmo.encode_text(Ragged.from_lists([[1, *pair, 2]])).embedding
            for pair in ([7, 8], [8, 7])
        )
    assert (ab - ba).abs().max() > 1e-4
    assert vlmo.text.embedding.position is None
    assert vlmo.vision.embedding.position is None


def test_configurations_that_do_not_fit():
    config = preset_config("beit3", "tiny")
    for change, message in (
        ({"kind": "cross"}, "needs fusion.kind 'concat'"),
        ({"norm": "post"}, "'pre' or 'sub'"),
        ({"experts": "shared"}, "order 'image' need"),
        ({"relative_bias": True, "order": "text"}, "before the text"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, fusion=replace(config.fusion, **change))
    with pytest.raises(ValueError, match="must be 'first', got 'mean'"):
        replace(config, vision=replace(config.vision, pool="mean"))
    with pytest.raises(ValueError, match="joint_embedding needs embed_dim"):
        replace(config, joint_embedding=True)
    model = create_model("beit3", "tiny", vocab_size=50, image_size=32)
    with pytest.raises(ValueError, match="no matching head; presets that have"):
        model.match_logits(torch.zeros(1, 192))
