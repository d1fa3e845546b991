"""Relative position bias by brute force, and LayerScale, in blocks and in the vision tower."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from vlpfast.layers.block import Block, Layout, ScaledLinear
from vlpfast.layers.position_bias import RelativeBias, window_displacements
from vlpfast.models import create_model, preset_config
from vlpfast.ops.seed import fold_seed


@pytest.mark.parametrize("side", [1, 2, 5])
def test_displacements_by_loops(side):
    index, kinds = window_displacements(side)
    assert kinds == (2 * side - 1) ** 2 + 3
    assert index.shape == (1 + side * side,) * 2
    assert index.unique().tolist() == sorted({*index.flatten().tolist()})
    seen = {}
    for m in range(side * side):
        for n in range(side * side):
            displacement = (m // side - n // side, m % side - n % side)
            # The same number for the same displacement, and another for another one.
            assert seen.setdefault(int(index[1 + m, 1 + n]), displacement) == displacement
    assert sorted(seen) == list(range((2 * side - 1) ** 2))
    assert index[0, 1:].unique().tolist() == [kinds - 3]
    assert index[1:, 0].unique().tolist() == [kinds - 2]
    assert index[0, 0] == kinds - 1


@pytest.mark.parametrize("layers", [1, 3])
def test_bias_and_its_gradient_by_loops(layers):
    torch.manual_seed(0)
    index, kinds = window_displacements(3)
    bias = RelativeBias(2, index, kinds, layers)
    assert bias.table.count_nonzero() == 0
    nn.init.normal_(bias.table)
    out = bias()
    grad = torch.randn_like(out)
    out.backward(grad)
    table = bias.table.unflatten(0, (layers, kinds))
    expected = torch.zeros_like(table)
    for m in range(10):
        for n in range(10):
            assert out[:, :, m, n].equal(table[:, index[m, n]])
            expected[:, index[m, n]] += grad[:, :, m, n]
    torch.testing.assert_close(bias.table.grad, expected.flatten(0, 1))


def make_block(layer_scale: float, **options: object) -> Block:
    torch.manual_seed(0)
    shape = {"mlp_ratio": 2.0, "norm": "pre", "norm_eps": 1e-6, "activation": "gelu"}
    return Block(16, 2, layer_scale=layer_scale, **shape | options)


def scaled(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear.scale * nn.functional.linear(x, linear.weight, linear.bias)


def test_block_is_its_formula():
    """x + s1 attention(norm1 x), with a bias on its scores; then x + s2 mlp(norm2 x)."""
    block = make_block(0.1)
    for linear in (block.attention.out, block.mlp.fc2):
        assert linear.scale.tolist() == pytest.approx([0.1] * 16)
        nn.init.normal_(linear.scale)
    x, bias = torch.randn(3, 5, 16), torch.randn(2, 5, 5, requires_grad=True)
    branch, residual = block(None, x, Layout(bias=bias))
    q, k, v = block.attention.qkv(block.norm1(x)[0]).unflatten(-1, (3, 2, 8)).unbind(2)
    scores = torch.einsum("bmhe,bnhe->bhmn", q, k) * 8**-0.5 + bias
    mixed = torch.einsum("bhmn,bnhe->bmhe", scores.softmax(-1), v).flatten(2)
    expected = x + scaled(block.attention.out, mixed)
    hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(expected)[0]))
    expected = expected + scaled(block.mlp.fc2, hidden)
    torch.testing.assert_close(branch + residual, expected)
    parameters = [bias, *block.parameters()]
    weight = torch.randn_like(x)
    ours, theirs = (
        torch.autograd.grad((out * weight).sum(), parameters)
        for out in (branch + residual, expected)
    )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cross", [False, True])
def test_every_branch_is_scaled_or_none(cross):
    names = {
        name for name, m in make_block(0.1, cross=cross).named_modules() if type(m) is ScaledLinear
    }
    assert names == {"attention.out", "mlp.fc2"} | ({"cross.out"} if cross else set())
    assert not any("scale" in name for name in make_block(0.0, cross=cross).state_dict())


def biased(kind: str, **changes: object):
    config = preset_config("clip", "tiny", image_size=32)
    vision = replace(config.vision, relative_bias=kind, position="none", layer_scale=0.1, **changes)
    return replace(config, vision=vision)


@pytest.mark.parametrize("kind", ["shared", "layer"])
def test_tower_reads_places_by_the_bias_alone(kind):
    torch.manual_seed(0)
    model = create_model("clip", "tiny", image_size=32, vision=biased(kind).vision)
    vision, images = model.vision, torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert vision.embedding.position is None
    assert vision.relative_bias.table.shape == ((4 if kind == "layer" else 1) * (7 * 7 + 3), 6)
    # Without positions, patches in another order give the tokens in that order.
    turned = images.flip(1).flip(2).unfold(1, 8, 8).unfold(2, 8, 8).flip(4).flip(5)
    turned = turned.permute(0, 1, 4, 2, 5, 3).reshape(images.shape)
    out, other = vision(images), vision(turned)
    torch.testing.assert_close(out[:, 1:].flip(1), other[:, 1:], rtol=1e-4, atol=1e-5)
    nn.init.normal_(vision.relative_bias.table)
    out, other = vision(images), vision(turned)
    assert (out[:, 1:].flip(1) - other[:, 1:]).abs().max() > 0.1
    out.square().sum().backward()
    assert [n for n, p in vision.named_parameters() if p.grad is None] == []
    assert vision.relative_bias.table.grad.abs().amin() > 0


@pytest.mark.parametrize("kind", ["shared", "layer"])
def test_tower_gives_each_layer_its_bias(kind):
    torch.manual_seed(0)
    model = create_model("clip", "tiny", image_size=16, vision=biased(kind).vision).eval()
    vision = model.vision
    nn.init.normal_(vision.relative_bias.table)
    tables = vision.relative_bias.table.unflatten(0, (-1, 3 * 3 + 3))
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    out = vision(images)
    x, branch = vision.embed_norm(vision.embedding(images))[0], None
    for number, block in enumerate(vision.blocks):
        table = tables[number if kind == "layer" else 0]
        bias = table[window_displacements(2)[0]].permute(2, 0, 1)
        branch, x = block(branch, x, Layout(bias=bias), seed=fold_seed(0, number))
    torch.testing.assert_close(out, vision.norm(branch, x)[0])


@pytest.mark.parametrize(
    "changes",
    [{"patch_dropout": 0.5}, {"max_patches": 3}, {"class_token": False, "pool": "mean"}],
    ids=str,
)
def test_bias_needs_the_whole_window(changes):
    with pytest.raises(ValueError, match=r"vision\.relative_bias is for a class token and all"):
        biased("shared", **changes)


def test_bias_refuses_dropped_patches():
    model = create_model("clip", "tiny", image_size=16, vision=biased("shared").vision)
    images = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the relative bias is of all of them"):
        model.encode_image(images, torch.zeros(1, 1, dtype=torch.int64))
