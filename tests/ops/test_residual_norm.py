"""residual_norm: the sum, both norms, and dropout by counter."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlpfast.ops.reference.counter import draw, keep_mask, stream
from vlpfast.ops.residual_norm import _OP, residual_norm
from vlpfast.testing import (
    assert_compiles,
    assert_same,
    assert_within_budget,
    opcheck,
    poisoned_allocations,
    routes,
    with_gradients,
)

KINDS = ["layer", "rms"]
# One element, a prime, an odd width, more than two dimensions, no rows.
SHAPES = [(1, 1), (7, 13), (2, 3, 5), (4, 64), (0, 8)]


def build(shape, dtype=torch.float64):
    """[x, residual, weight, bias]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, shape, shape[-1:], shape[-1:]]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def definition(x, residual, weight, bias, kind, eps):
    """Spelled out with means."""
    s = x + residual
    if kind == "layer":
        s = s - s.mean(-1, keepdim=True)
    normed = s / (s.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * weight + bias, x + residual


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(kind, shape):
    inputs = build(shape)
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    actual = with_gradients(lambda *a: residual_norm(*a, kind=kind, eps=1e-3), inputs, grads)
    expected = with_gradients(lambda *a: definition(*a, kind, 1e-3), inputs, grads)
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, e)


DTYPES = [torch.float32, torch.bfloat16]
IDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get
# One element, a prime, around the 16 lanes of the C++ sums, several rows in a block of a backward.
FUSED_SHAPES = [(1, 1), (7, 13), (3, 15), (2, 3, 16), (70, 33), (0, 8)]


def results(impl, inputs, grads, kind, dropout_p):
    """Outputs and gradients under one seed, flat."""
    function = lambda *a: residual_norm(*a, kind=kind, dropout_p=dropout_p, seed=6, impl=impl)
    outs, gradients = with_gradients(function, inputs, grads)
    return [*outs, *gradients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), routes("reference", "cpp", "triton"))
def test_within_budget(impl, device, shape, dtype, residual_dtype, dropout_p, kind):
    if impl == "triton" and device.type == "cpu" and torch.bfloat16 in (dtype, residual_dtype):
        pytest.skip("the interpreter does not round to bf16 as a GPU does")
    x, residual, weight, bias = (t.to(device) for t in build(shape, dtype))
    inputs = [x, residual.to(residual_dtype), weight, bias]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
    grads = [grads[0].to(dtype), grads[1].to(torch.promote_types(dtype, residual_dtype))]
    actual = results(impl, inputs, grads, kind, dropout_p)
    eager = results("reference", inputs, grads, kind, dropout_p)
    truth = results("reference", [t.double() for t in inputs], [g.double() for g in grads],
                    kind, dropout_p)  # fmt: skip
    for name, a, t, e in zip(
        ["normed", "residual", "dx", "dresidual", "dweight", "dbias"],
        actual, truth, eager, strict=True,
    ):  # fmt: skip
        assert_within_budget(a, t, e, name=name)


@pytest.mark.parametrize(("impl", "device"), routes("cpp", "triton"))
def test_one_gradient_alone(impl, device):
    """Whichever output is used and whichever input is frozen."""
    x, residual, weight, bias = (t.float().to(device) for t in build((5, 24)))
    weight.requires_grad_()
    out = residual_norm(x, residual, weight, bias, impl=impl)
    assert not out.residual.requires_grad or out.residual.grad_fn is not None
    (grad,) = torch.autograd.grad(out.normed.square().sum(), weight)
    ref = residual_norm(x, residual, weight, bias, impl="reference")
    (expected,) = torch.autograd.grad(ref.normed.square().sum(), weight)
    torch.testing.assert_close(grad, expected)
    x.requires_grad_()
    out = residual_norm(x, residual, dropout_p=0.5, seed=1, impl=impl)
    (grad,) = torch.autograd.grad(out.residual.sum(), x)
    torch.testing.assert_close(
        grad, residual_norm(torch.ones_like(x), dropout_p=0.5, seed=1, impl=impl).residual
    )


def test_threads_do_not_matter():
    inputs = [t.float() for t in build((3000, 40))]
    run = lambda: results("cpp", inputs, [torch.ones(3000, 40)] * 2, "layer", 0.1)
    one = run()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = run()
    finally:
        torch.set_num_threads(before)
    assert_same(three, one)


def test_writes_all_it_returns():
    inputs = [t.float() for t in build((40, 24))]
    with poisoned_allocations():
        found = results("cpp", inputs, [torch.ones(40, 24)] * 2, "rms", 0.1)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("split", [False, True])
def test_registration(split):
    x, residual, weight, bias = (t.float() for t in build((6, 10)))
    seed, p = torch.tensor(3), 0.2 if split else 0.0
    forward = torch.ops.vlpfast.residual_norm_fwd.default
    opcheck(forward, x, residual, weight, bias, seed, False, p, 1e-6)
    opcheck(forward, x.bfloat16(), residual, None, None, seed, True, p, 1e-6)
    normed, total, mean, rstd = forward(x, residual, weight, bias, seed, False, p, 1e-6)
    backward = torch.ops.vlpfast.residual_norm_bwd.default
    opcheck(backward, normed, total, total, weight, mean, rstd, seed, False, p, split)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(kind, dropout_p):
    function = lambda *a: residual_norm(*a, kind=kind, dropout_p=dropout_p, seed=3)
    torch.autograd.gradcheck(function, [x.requires_grad_() for x in build((3, 4))])


@pytest.mark.parametrize("kind", KINDS)
def test_optional_parts(kind):
    x, residual, weight, bias = build((3, 8))
    zero, one = torch.zeros(8).double(), torch.ones(8).double()
    full = residual_norm(x, torch.zeros_like(x), one, zero, kind=kind)
    for a, b in zip(residual_norm(x, kind=kind), full, strict=True):
        torch.testing.assert_close(a, b)
    normed = residual_norm(x, residual, weight, kind=kind).normed
    torch.testing.assert_close(
        residual_norm(x, residual, weight, bias, kind=kind).normed, normed + bias
    )


def test_dropout_is_keyed_by_row_and_column():
    x = torch.rand(6, 5) + 1
    kept = residual_norm(x, dropout_p=0.4, seed=2**40 + 9).residual
    keep = keep_mask(draw(stream(2**40 + 9, torch.arange(6))[:, None], torch.arange(5)), 0.4)
    torch.testing.assert_close(kept, torch.where(keep, x / 0.6, 0))
    folded = residual_norm(x.view(2, 3, 5), dropout_p=0.4, seed=torch.tensor(2**40 + 9)).residual
    assert torch.equal(folded.view(6, 5), kept)
    first_rows = residual_norm(x[:2], dropout_p=0.4, seed=2**40 + 9).residual
    assert torch.equal(first_rows, kept[:2])


def test_dropout_leaves_the_residual_alone():
    x, residual, *_ = build((4, 9))
    dropped = residual_norm(x, dropout_p=0.5, seed=1).residual
    assert torch.equal(
        residual_norm(x, residual, dropout_p=0.5, seed=1).residual, residual + dropped
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), dropout_p=st.floats(0.05, 0.95))
def test_dropout_keeps_the_mean(seed, dropout_p):
    out = residual_norm(torch.ones(128, 128), dropout_p=dropout_p, seed=seed).residual
    # 16,384 draws; 5 standard errors.
    bound = 5 * (dropout_p / (1 - dropout_p) / 16384) ** 0.5
    assert abs(out.mean() - 1) < bound
    assert not torch.equal(
        out, residual_norm(torch.ones(128, 128), dropout_p=dropout_p, seed=seed ^ 1).residual
    )


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_dropout_masks_agree(impl):
    x = torch.ones(37, 50)
    out = residual_norm(x, dropout_p=0.37, seed=-(2**62), impl=impl).residual
    keep = keep_mask(draw(stream(-(2**62), torch.arange(37))[:, None], torch.arange(50)), 0.37)
    assert torch.equal(out != 0, keep)


def test_wide_residual_stream():
    """bf16 branches beside an fp32 residual: the sum keeps fp32, the next layer reads bf16."""
    x, residual = torch.full((2, 4), 2.0**-10).bfloat16(), torch.ones(2, 4)
    out = residual_norm(x, residual)
    assert out.normed.dtype == torch.bfloat16
    assert torch.equal(out.residual, torch.full((2, 4), 1 + 2.0**-10))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_rows(kind):
    x = torch.tensor([[1e18, -1e18, 1e18, -1e18], [0.0, 0.0, 0.0, 0.0]])
    normed = residual_norm(x, kind=kind).normed
    torch.testing.assert_close(normed, torch.tensor([[1.0, -1, 1, -1], [0, 0, 0, 0]]))


def test_non_contiguous_repeatable_unmutated():
    x, residual = torch.randn(5, 2, 6).unbind(1)
    before = x.clone()
    run = lambda a: residual_norm(a, residual, dropout_p=0.2, seed=4)
    for a, b, c in zip(run(x), run(x), run(x.contiguous()), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_compiles(kind, impl):
    inputs = [x.requires_grad_() for x in build((3, 8), torch.float32)]
    run = lambda *a: residual_norm(*a, kind=kind, dropout_p=0.3, seed=5, impl=impl)
    assert_compiles(run, *inputs)


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, r"residual must be \(2, 4\).*got \(2, 1\)", {"residual": torch.zeros(2, 1)}),
        (ValueError, r"weight must be \(4,\), got \(2,\)", {"weight": torch.zeros(2)}),
        (ValueError, r"bias must be \(4,\), got \(2,\)", {"bias": torch.zeros(2)}),
        (ValueError, "kind must be", {"kind": "batch"}),
        (ValueError, "dropout_p must be", {"dropout_p": -0.1, "seed": 0}),
        (ValueError, "needs a seed", {"dropout_p": 0.1}),
        (TypeError, "x must be floating", {"x": torch.zeros(2, 4, dtype=torch.int64)}),
        (ValueError, "impl must be", {"impl": "magic"}),
        (
            NotImplementedError,
            "takes fp32 and bf16, got torch.float64",
            {"x": torch.zeros(2, 4).double(), "impl": "cpp"},
        ),
    ],
)
def test_bad_arguments(error, words, change):
    with pytest.raises(error, match=words):
        residual_norm(**{"x": torch.zeros(2, 4), **change})


@pytest.fixture
def apex(monkeypatch):
    """apex's two functions, with their signatures, computed by torch."""
    norms = SimpleNamespace(
        fused_layer_norm_affine=lambda x, weight, bias, shape, eps: F.layer_norm(
            x, shape, weight, bias, eps
        ),
        fused_rms_norm_affine=lambda x, weight, shape, eps: F.rms_norm(x, shape, weight, eps),
    )
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", norms)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_arguments_reach_apex(kind, apex):
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8) if kind == "layer" else None
    options = {"kind": kind, "dropout_p": 0.0, "seed": None, "eps": 1e-3}
    actual = _OP.implementations["apex"].run(x, None, weight, bias, **options)
    expected = residual_norm(x, None, weight, bias, kind=kind, eps=1e-3, impl="reference")
    torch.testing.assert_close(tuple(actual), tuple(expected))


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("runs on cuda", {"device": torch.device("cpu")}),
        ("the norm alone", {"plain": False}),
        ("needs a weight", {"affine": False}),
    ],
)
def test_reasons_of_apex(words, change):
    arguments = {
        "device": torch.device("cuda"),
        "dtypes": [torch.bfloat16],
        "columns": 8,
        "plain": True,
        "affine": True,
    }
    rejects = _OP.implementations["apex"].rejects
    assert rejects(**arguments) is None
    assert words in rejects(**{**arguments, **change})
