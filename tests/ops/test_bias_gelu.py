"""bias_gelu: the exact GELU of x + bias, and dropout by counter."""

from __future__ import annotations

import math

import pytest
import torch

from vlpfast.ops.bias_gelu import bias_gelu
from vlpfast.ops.residual_norm import residual_norm
from vlpfast.testing import assert_compiles, assert_within_budget, with_gradients

# One element, a prime, more than two dimensions, no rows.
SHAPES = [(1, 1), (7, 13), (2, 3, 5), (0, 8)]


def build(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, shape[-1:]]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def definition(x, bias):
    y = x + bias
    return y * (1 + torch.erf(y / math.sqrt(2))) / 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape):
    actual, expected = (with_gradients(f, build(shape)) for f in (bias_gelu, definition))
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_within_budget(dtype, device):
    inputs = [x.to(device) for x in build((7, 13), dtype)]
    actual, eager = (with_gradients(f, inputs) for f in (bias_gelu, definition))
    truth = with_gradients(definition, [x.double() for x in inputs])
    flat = [[*outs, *grads] for outs, grads in (actual, truth, eager)]
    for i, (a, t, e) in enumerate(zip(*flat, strict=True)):
        assert_within_budget(a, t, e, name=str(i))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(dropout_p):
    inputs = [x.requires_grad_() for x in build((3, 4))]
    torch.autograd.gradcheck(lambda *a: bias_gelu(*a, dropout_p=dropout_p, seed=3), inputs)


def test_extreme_values():
    x = torch.tensor([-1e30, -40.0, 0.0, 40.0, 1e30])
    torch.testing.assert_close(bias_gelu(x), torch.tensor([0.0, 0.0, 0.0, 40.0, 1e30]))


def test_output_has_the_dtype_of_x():
    assert bias_gelu(torch.ones(2, 3).bfloat16(), torch.ones(3)).dtype == torch.bfloat16


def test_dropout_has_the_mask_of_residual_norm():
    x = torch.rand(2, 5, 6) + 0.5
    scale = residual_norm(torch.ones(2, 5, 6), dropout_p=0.4, seed=8).residual
    out = bias_gelu(x, dropout_p=0.4, seed=torch.tensor(8))
    torch.testing.assert_close(out, bias_gelu(x) * scale)
    assert 0 < (out == 0).sum() < out.numel()


def test_non_contiguous_repeatable_unmutated():
    x = torch.randn(6, 5).t()
    before = x.clone()
    out = bias_gelu(x, dropout_p=0.2, seed=1)
    assert torch.equal(out, bias_gelu(x, dropout_p=0.2, seed=1))
    # Strided and vectorised erf differ in the last bit.
    torch.testing.assert_close(out, bias_gelu(x.contiguous(), dropout_p=0.2, seed=1))
    assert torch.equal(x, before)


def test_compiles():
    inputs = [x.requires_grad_() for x in build((3, 8), torch.float32)]
    assert_compiles(lambda *a: bias_gelu(*a, dropout_p=0.3, seed=5), *inputs)


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, r"bias must be \(4,\), got \(2,\)", {"bias": torch.zeros(2)}),
        (ValueError, "dropout_p must be", {"dropout_p": 1.0, "seed": 0}),
        (ValueError, "needs a seed", {"dropout_p": 0.1}),
        (TypeError, "x must be floating", {"x": torch.zeros(2, 4, dtype=torch.int64)}),
        (ValueError, "impl must be", {"impl": "magic"}),
    ],
)
def test_bad_arguments(error, words, change):
    with pytest.raises(error, match=words):
        bias_gelu(**{"x": torch.zeros(2, 4), **change})
