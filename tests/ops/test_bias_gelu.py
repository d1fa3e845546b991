"""bias_gelu: the exact GELU of x + bias, and dropout by counter."""

from __future__ import annotations

import math

import pytest
import torch

from vlpfast.ops.bias_gelu import bias_gelu
from vlpfast.ops.residual_norm import residual_norm
from vlpfast.testing import (
    assert_compiles,
    assert_same,
    assert_within_budget,
    opcheck,
    poisoned_allocations,
    routes,
    with_gradients,
)

KINDS = ["gelu", "quick_gelu"]

# One element, a prime, more than two dimensions, no rows.
SHAPES = [(1, 1), (7, 13), (2, 3, 5), (0, 8)]


def build(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, shape[-1:]]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def definition(x, bias, kind="gelu"):
    y = x + bias
    if kind == "quick_gelu":
        return y / (1 + (-1.702 * y).exp())
    return y * (1 + torch.erf(y / math.sqrt(2))) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, kind):
    run = lambda f: with_gradients(lambda *a: f(*a, kind=kind), build(shape))
    actual, expected = run(bias_gelu), run(definition)
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, e)


def results(impl, inputs, kind, dropout_p, grad):
    function = lambda *a: bias_gelu(*a, kind=kind, dropout_p=dropout_p, seed=6, impl=impl)
    outs, gradients = with_gradients(function, inputs, grad)
    return [*outs, *gradients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (2, 3, 16), (70, 33), (0, 8)], ids=str)
@pytest.mark.parametrize(("impl", "device"), routes("reference", "cpp", "triton"))
def test_within_budget(impl, device, shape, dtype, dropout_p, kind):
    if impl == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not round to bf16 as a GPU does")
    # Three standard deviations and more on both sides, where the tails are.
    inputs = [(3 * t).to(device) for t in build(shape, dtype)]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    actual = results(impl, inputs, kind, dropout_p, grad)
    eager = results("reference", inputs, kind, dropout_p, grad)
    truth = results("reference", [t.double() for t in inputs], kind, dropout_p, grad.double())
    for name, a, t, e in zip(["out", "dx", "dbias"], actual, truth, eager, strict=True):
        assert_within_budget(a, t, e, name=name)


def test_threads_do_not_matter():
    inputs = [t.float() for t in build((3000, 40))]
    run = lambda: results("cpp", inputs, "gelu", 0.1, torch.ones(3000, 40))
    one = run()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = run()
    finally:
        torch.set_num_threads(before)
    assert_same(three, one)


@pytest.mark.parametrize("kind", KINDS)
def test_fine_grid(kind):
    """Every tail: error of value and slope over [-12, 12] against fp64, in units of fp32's eps."""
    y = torch.linspace(-12, 12, 200_001)[:, None]
    with poisoned_allocations():
        value, slope = results("cpp", [y, torch.zeros(1)], kind, 0.0, torch.ones_like(y))[:2]
    wide = y.double().requires_grad_()
    truth = definition(wide, 0, kind)
    (true_slope,) = torch.autograd.grad(truth.sum(), wide)
    eps = torch.finfo(torch.float32).eps
    # torch's own gelu is at 88 in the left tail, where 1 + erf cancels.
    assert ((value - truth).abs() <= 5 * eps * truth.abs().clamp(min=0.1)).all()
    assert ((slope - true_slope).abs() <= 10 * eps).all()


def test_registration():
    x, bias = (t.float() for t in build((6, 10)))
    for b, quick, p in ((bias, False, 0.2), (None, True, 0.0)):
        opcheck(torch.ops.vlpfast.bias_gelu_fwd.default, x, b, torch.tensor(3), quick, p)
        opcheck(torch.ops.vlpfast.bias_gelu_bwd.default, x, x, b, torch.tensor(3), quick, p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(dropout_p):
    inputs = [x.requires_grad_() for x in build((3, 4))]
    torch.autograd.gradcheck(lambda *a: bias_gelu(*a, dropout_p=dropout_p, seed=3), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_extreme_values(impl, kind):
    x = torch.tensor([[-1e30], [-60.0], [0.0], [60.0], [1e30]])
    outs, grads = with_gradients(lambda x: bias_gelu(x, kind=kind, impl=impl), [x])
    torch.testing.assert_close(outs[0], torch.tensor([[0.0], [0.0], [0.0], [60.0], [1e30]]))
    torch.testing.assert_close(grads[0], torch.tensor([[0.0], [0.0], [0.5], [1.0], [1.0]]))


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


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_compiles(impl):
    inputs = [x.requires_grad_() for x in build((3, 8), torch.float32)]
    assert_compiles(lambda *a: bias_gelu(*a, dropout_p=0.3, seed=5, impl=impl), *inputs)


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, r"bias must be \(4,\), got \(2,\)", {"bias": torch.zeros(2)}),
        (ValueError, "dropout_p must be", {"dropout_p": 1.0, "seed": 0}),
        (ValueError, "needs a seed", {"dropout_p": 0.1}),
        (TypeError, "x must be floating", {"x": torch.zeros(2, 4, dtype=torch.int64)}),
        (ValueError, "impl must be", {"impl": "magic"}),
        (ValueError, "kind must be 'gelu' or 'quick_gelu', got 'tanh'", {"kind": "tanh"}),
        (
            NotImplementedError,
            "takes fp32 and bf16, got torch.float16",
            {"x": torch.zeros(2, 4).half(), "impl": "cpp"},
        ),
    ],
)
def test_bad_arguments(error, words, change):
    with pytest.raises(error, match=words):
        bias_gelu(**{"x": torch.zeros(2, 4), **change})
