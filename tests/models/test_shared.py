"""One encoder of everything: against straight-line code, alone and packed; experts by attributes
against loops over tokens, and one expert against the dense block.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlpfast.layers.block import Layout
from vlpfast.layers.moe import Choice, ExpertLinear, Gate, MoeBlock, MoeMlp, Routes
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.models.config import FusionConfig
from vlpfast.models.shared import ATTRIBUTES, Kind
from vlpfast.ragged import Ragged

PRESETS = ["uni-perceiver", "uni-perceiver-moe"]


def model(preset: str, **fusion) -> VLPModel:
    torch.manual_seed(0)
    config = preset_config(preset, "tiny", vocab_size=20, image_size=16)
    shape = {"dim": 32, "heads": 2}
    config = replace(
        config,
        vision=replace(config.vision, **shape),
        text=replace(config.text, **shape),
        fusion=replace(config.fusion, **shape, depth=3, **fusion),
        embed_dim=24,
    )
    return VLPModel(config).eval()


def texts() -> Ragged:
    return Ragged.from_lists([[1, 7, 8, 9, 2], [1, 2], [1, 11, 2]])


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8)


def expert(linear, gate, x, attributes):
    """Token by token: the shares of the two likeliest experts times their outputs."""
    if not isinstance(linear, ExpertLinear):
        return linear(x)
    out = []
    for token, a in zip(x, attributes, strict=True):
        logits = gate.expert(F.layer_norm(gate.tag(a), a.new_zeros(32).shape, *norm(gate)))
        top = logits.softmax(0).topk(min(2, len(linear.weight)))
        shares = top.values / top.values.sum()
        parts = [
            s * (linear.weight[e] @ token + linear.bias[e])
            for s, e in zip(shares, top.indices, strict=True)
        ]
        out.append(sum(parts))
    return torch.stack(out)


def norm(gate: Gate) -> tuple:
    return gate.norm.weight, gate.norm.bias, gate.norm.eps


def alone(tower, x, kinds, visible=None):
    """The tower on one sequence (N, D) whose tokens have `kinds`, with an explicit mask."""
    attributes = torch.tensor([ATTRIBUTES[kind] for kind in kinds], dtype=torch.float32)
    for block in tower.blocks:
        attention, mlp = block.attention, block.mlp
        normed = block.norm1(x)[0]
        qkv_gate, out_gate, mlp_gate = (
            (attention.qkv_gate, attention.out_gate, mlp.gate)
            if isinstance(block, MoeBlock)
            else (None, None, None)
        )
        qkv = expert(attention.qkv, qkv_gate, normed, attributes)
        q, k, v = qkv.unflatten(-1, (3, 2, -1)).unbind(1)
        scores = torch.einsum("mhe,nhe->hmn", q, k) * q.shape[-1] ** -0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        mixed = torch.einsum("hmn,nhe->mhe", scores.softmax(-1), v).flatten(1)
        x = x + expert(attention.out, out_gate, mixed, attributes)
        hidden = F.gelu(expert(mlp.fc1, mlp_gate, block.norm2(x)[0], attributes))
        x = x + expert(mlp.fc2, mlp_gate, hidden, attributes)
    return tower.norm(x)[0]


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_images_and_texts_are_encoded_as_alone(preset):
    ours, pixels = model(preset), images()
    tower = ours.fusion
    image, text = ours.encode_image(pixels), ours.encode_text(texts())
    for row in range(2):
        x = torch.cat([tower.start[None], image.tokens[row]])
        expected = tower.project(alone(tower, x, [Kind.IMAGE] * len(x))[0])
        torch.testing.assert_close(image.embedding[row], F.normalize(expected, dim=0))
    for row in range(3):
        x = ours.text(texts().select(torch.tensor([row]))).values
        x = torch.cat([tower.start[None], x[1:]])
        expected = tower.project(alone(tower, x, [Kind.TEXT] * len(x))[0])
        torch.testing.assert_close(text.embedding[row], F.normalize(expected, dim=0))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@torch.no_grad()
def test_texts_with_images_are_encoded_as_alone(preset, causal):
    ours, text = model(preset), texts()
    tower = ours.fusion
    places = ours.encode_image(images(), num_embedded=0).tokens
    words = ours.encode_text(text, num_embedded=0).tokens
    kv_index = torch.tensor([1, 0, 1])
    blocks = text.positions() + 1 if causal else None
    out = tower(words, ours.image_keys(places), kv_index, text_blocks=blocks)
    kind = Kind.CAUSAL_TEXT if causal else Kind.FUSED_TEXT
    for row, image in enumerate(kv_index.tolist()):
        one = words.select(torch.tensor([row])).values
        m, n = len(one), places.shape[1]
        x = torch.cat([tower.start[None], one[1:], places[image]])
        block = torch.cat([torch.arange(1, m + 1), torch.zeros(n, dtype=torch.int64)])
        visible = block[None] <= block[:, None] if causal else None
        kinds = [kind] * m + [Kind.FUSED_IMAGE] * n
        expected = alone(tower, x, kinds, visible)
        got = out.text.select(torch.tensor([row])).values
        torch.testing.assert_close(got, expected[:m], rtol=1e-5, atol=1e-5)
        got = out.image.select(torch.tensor([row])).values
        torch.testing.assert_close(got, expected[m:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_words_are_texts_of_one_token(preset):
    ours = model(preset)
    words, tower = ours.encode_words(), ours.fusion
    assert words.shape == (20, 24)
    for word in (0, 7, 19):
        x = ours.text(Ragged.from_lists([[1, word]])).values
        x = torch.stack([tower.start, x[1]])
        expected = tower.project(alone(tower, x, [Kind.WORD] * 2)[0])
        torch.testing.assert_close(words[word], F.normalize(expected, dim=0))


def test_one_expert_is_the_dense_block_to_the_bit():
    dense, moe = model("uni-perceiver"), model("uni-perceiver-moe", moe_experts=1)
    state = {}
    for name, value in moe.state_dict().items():
        if "gate." in name:
            state[name] = value
        else:
            source = dense.state_dict()[name]
            state[name] = source[None] if value.dim() > source.dim() else source
    moe.load_state_dict(state)
    pixels, blocks = images(), texts().positions() + 1
    results = []
    for ours in (dense, moe):
        image, text = ours.encode_image(pixels), ours.encode_text(texts())
        kv_index = torch.tensor([1, 0, 1])
        fused = ours.fusion(text.tokens, ours.image_keys(image.tokens), kv_index)
        causal = ours.fusion(
            text.tokens, ours.image_keys(image.tokens), kv_index, text_blocks=blocks
        )
        values = [image.embedding, text.embedding, fused.text.values, fused.image.values]
        results.append([*values, causal.text.values, ours.encode_words()])
        sum(v.square().sum() for v in (fused.text.values, text.embedding)).backward()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    grads = {name: p.grad for name, p in dense.named_parameters()}
    for name, parameter in moe.named_parameters():
        if "gate." not in name and parameter.grad is not None:
            assert torch.equal(parameter.grad.view_as(grads[name]), grads[name]), name


def test_experts_stand_in_every_second_block():
    kinds = [isinstance(block, MoeBlock) for block in model("uni-perceiver-moe").fusion.blocks]
    assert kinds == [True, False, True]
    with torch.device("meta"):
        base = VLPModel(preset_config("uni-perceiver-moe", "base"))
    assert sum(isinstance(block, MoeBlock) for block in base.fusion.blocks) == 6
    assert base.fusion.blocks[0].mlp.fc1.weight.shape == (8, 3072, 768)


def test_gate_chooses_by_attributes_alone():
    torch.manual_seed(0)
    gate = Gate(16, 8, 2)
    attributes = torch.tensor(ATTRIBUTES, dtype=torch.float32)
    choice = gate.eval()(attributes)
    assert choice.experts.shape == choice.shares.shape == (6, 2)
    torch.testing.assert_close(choice.shares.sum(1), torch.ones(6))
    assert len({tuple(row) for row in choice.experts.tolist()}) > 1
    noisy = gate.train()(attributes, seed=3)
    assert torch.equal(noisy.shares, gate(attributes, seed=3).shares)
    assert not torch.equal(noisy.shares, gate(attributes, seed=4).shares)
    assert torch.equal(gate(attributes).shares, choice.shares)


def test_noise_is_normal_with_the_published_deviation():
    gate = Gate(4, 8, 8).train()
    torch.nn.init.zeros_(gate.expert.weight)
    choice = gate(torch.ones(4000, 8), seed=1)
    # Of equal logits the centred logarithms of the shares are the centred noise.
    noise = choice.shares.detach().log()
    noise = noise - noise.mean(1, keepdim=True)
    assert float(noise.pow(2).sum() / (4000 * 7)) == pytest.approx(1 / 64, rel=0.05)


@torch.no_grad()
def test_load_is_the_share_of_choices():
    tower = model("uni-perceiver-moe").fusion
    sizes = {Kind.IMAGE: 30, Kind.FUSED_TEXT: 10}
    loads = tower.loads(sizes)
    assert loads.shape == (2, 3, 8)
    torch.testing.assert_close(loads.sum(2), torch.ones(2, 3))
    expected = torch.zeros(8)
    for kind, size in sizes.items():
        gate = tower.blocks[2].attention.out_gate
        for one in gate(torch.tensor([ATTRIBUTES[kind]], dtype=torch.float32)).experts[0]:
            expected[one] += size / 40 / 2
    torch.testing.assert_close(loads[1, 2], expected)


def test_order_and_inverse_route_every_token():
    torch.manual_seed(0)
    mlp = MoeMlp(8, 16, "gelu", 4, 2).eval()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    attributes = torch.tensor([ATTRIBUTES[Kind.WORD], ATTRIBUTES[Kind.IMAGE]]).float()
    places = [torch.tensor([4, 0, 2]), torch.tensor([1, 3])]
    x = torch.randn(5, 8)
    out = mlp(x, Routes.of(attributes, places))
    for kind, place in enumerate(places):
        only = Routes(attributes[kind : kind + 1], (len(place),))
        torch.testing.assert_close(out[place], mlp(x[place], only))


def test_merged_weights_are_the_sum_of_outputs():
    torch.manual_seed(0)
    linear = ExpertLinear(5, 6, 7)
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(9, 6)
    choice = Choice(torch.tensor([[3, 1]]), torch.tensor([[0.75, 0.25]]))
    expected = 0.75 * F.linear(x, linear.weight[3], linear.bias[3])
    expected = expected + 0.25 * F.linear(x, linear.weight[1], linear.bias[1])
    torch.testing.assert_close(linear(x, Routes(x.new_ones(1, 8), (9,)), choice), expected)


def test_compiles_as_one_graph():
    block = MoeBlock(
        16, 2, num_experts=4, top_k=2, mlp_ratio=2, norm="pre", norm_eps=1e-6, activation="gelu"
    ).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    routes = Routes.of(torch.tensor(ATTRIBUTES[:2]).float(), [torch.arange(3), torch.arange(3, 7)])
    layout = Layout(torch.tensor([0, 3, 7], dtype=torch.int32), 4, routes=routes)
    x = torch.randn(7, 16)
    run = torch.compile(lambda x: block(None, x, layout), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x)[0], block(None, x, layout)[0])


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("vilt", {"moe_experts": 8}, "fusion.kind must be 'shared', got 'concat'"),
        ("vilt", {"kind": "shared"}, "joint space whose words are encoded"),
        ("uni-perceiver-moe", {"layer_scale": 0.1}, r"layer_scale must be 0 .* got 0\.1 and 'pre'"),
        ("uni-perceiver-moe", {"norm": "sub"}, r"norm 'pre' or 'post', got 0\.0 and 'sub'"),
    ],
    ids=["experts", "shared", "scaled", "sub"],
)
def test_wirings_that_do_not_fit_say_so(preset, change, message):
    config = preset_config(preset)
    fusion: FusionConfig = replace(config.fusion, **change)
    with pytest.raises(ValueError, match=message):
        replace(config, fusion=fusion)


def test_there_is_no_matching_head():
    ours = create_model("uni-perceiver", vocab_size=20, image_size=16)
    with pytest.raises(ValueError, match="'uni-perceiver' has no matching head; presets that have"):
        ours.match(Ragged.from_dense(torch.zeros(1, 2, 192)))
