"""patch_embed: every implementation against normalise-convolve-choose, and that against patches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlpfast.ops.patch_embed import patch_embed
from vlpfast.testing import (
    assert_compiles,
    assert_same,
    assert_within_budget,
    opcheck,
    poisoned_allocations,
    routes,
    with_gradients,
)

IMPLS = ["reference", "folded"]
FUSED = routes("cpp", "triton")
NORM = {"mean": (0.48, 0.45, 0.4), "std": (0.27, 0.26, 0.3)}


def build(
    batch=3, height=8, width=12, patch_size=4, dim=5, keep=None, pixels="uint8", layout="hwc"
):
    """[images, weight, bias, pos_embed, ids] in fp64, and the options."""
    generator = torch.Generator().manual_seed(0)
    num_patches = (height // patch_size) * (width // patch_size)
    images = torch.randint(0, 256, (batch, height, width, 3), generator=generator)
    images = images.to(torch.uint8) if pixels == "uint8" else images.double() - 0.25
    if layout == "chw":
        images = images.permute(0, 3, 1, 2)  # left non-contiguous on purpose
    shapes = [(dim, 3, patch_size, patch_size), (dim,), (num_patches, dim)]
    params = [torch.randn(s, generator=generator, dtype=torch.float64) * 0.3 for s in shapes]
    ids = None
    if keep is not None:
        order = [torch.randperm(num_patches, generator=generator)[:keep] for _ in range(batch)]
        # In any order, and other images keep the same patches.
        ids = torch.stack(order) if batch else torch.zeros(0, keep).long()
    return [images, *params, ids], {"patch_size": patch_size, "layout": layout, **NORM}


# A prime grid, one patch, one pixel per patch, patches of 16 and 14 pixels (runs of whole and of
# broken vectors), no image, one kept patch, none kept, all kept.
SHAPES = {
    "all": {},
    "half": {"keep": 3},
    "half-chw": {"keep": 3, "layout": "chw"},
    "float": {"keep": 4, "pixels": "float"},
    "float-chw": {"pixels": "float", "layout": "chw"},
    "prime": {"height": 35, "width": 15, "patch_size": 5, "keep": 7},
    "one-patch": {"height": 4, "width": 4},
    "one-pixel": {"height": 2, "width": 3, "patch_size": 1, "dim": 1},
    "p16": {"batch": 1, "height": 16, "width": 32, "patch_size": 16, "dim": 17, "keep": 1},
    "p14-chw": {"batch": 1, "height": 28, "width": 14, "patch_size": 14, "layout": "chw"},
    "no-image": {"batch": 0, "keep": 2},
    "keep-one": {"keep": 1},
    "keep-none": {"keep": 0},
    "keep-all": {"keep": 6},
}


def convert(inputs, dtype, device="cpu"):
    """Parameters and floating images in `dtype`."""
    convert_one = lambda x: x.to(dtype) if x.is_floating_point() else x
    return [None if x is None else convert_one(x).to(device) for x in inputs]


def run(impl, options, ids):
    return lambda images, *params: patch_embed(images, *params, ids, impl=impl, **options)


def check(impl, name, dtype, device, pos_dtype=None):
    inputs, options = build(**SHAPES[name])
    *inputs, ids = convert(inputs, dtype, device)
    if pos_dtype is not None:
        inputs[3] = inputs[3].to(pos_dtype)
    wide = convert(inputs, torch.float64, device)
    eager_run, actual_run = run("reference", options, ids), run(impl, options, ids)
    out = eager_run(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    if impl in ("cpp", "triton"):
        # These have no gradient of the images.
        grads_of = lambda f, x: with_gradients(lambda *p: f(x[0], *p), x[1:], grad.to(x[1]))
    else:
        grads_of = lambda f, x: with_gradients(f, x, grad.to(x[1]))
    truth = grads_of(eager_run, wide)
    eager = grads_of(eager_run, inputs)
    actual = grads_of(actual_run, inputs)
    flat = [[*outs, *grads] for outs, grads in (actual, truth, eager)]
    for i, (a, t, e) in enumerate(zip(*flat, strict=True)):
        assert_within_budget(a, t, e, name=f"{name} {i}")


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_folded_matches_reference(name, dtype, device):
    check("folded", name, dtype, device)


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("impl", "device"), FUSED)
def test_matches_reference(impl, device, name, dtype):
    if impl == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot multiply bf16")
    check(impl, name, dtype, device)


def test_wide_positions():
    """bf16 weights, fp32 positions: tokens are fp32, their gradient is rounded for the product."""
    check("cpp", "half", torch.bfloat16, torch.device("cpu"), pos_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_many_chunks(dtype):
    """More pixels than are gathered at a time, forward (2**20) and backward (2**22)."""
    shape = {"batch": 180, "height": 64, "width": 128, "patch_size": 32, "dim": 3, "keep": 8}
    (images, *params, ids), options = build(**shape)
    params = convert(params, dtype)
    truth_params = convert(params, torch.float64)
    results = [
        with_gradients(partial(run(impl, options, ids), images), p)
        for impl, p in (("cpp", params), ("reference", truth_params), ("reference", params))
    ]
    flat = [[*outs, *grads] for outs, grads in results]
    for i, (a, t, e) in enumerate(zip(*flat, strict=True)):
        assert_within_budget(a, t, e, name=str(i))


@pytest.mark.parametrize("pos", [True, False])
@pytest.mark.parametrize(("impl", "device"), FUSED)
def test_autocast(impl, device, pos):
    if impl == "triton" and device.type == "cpu":
        pytest.skip("the interpreter cannot multiply bf16")
    (images, *params, ids), options = build(keep=4, height=16, width=16)
    params = convert(params, torch.float32, device)
    params[2] = params[2] if pos else None
    images, ids = images.to(device), ids.to(device)
    results = {}
    for name in ("folded", impl):
        leaves = [None if p is None else p.clone().requires_grad_() for p in params]
        with torch.autocast(device.type, torch.bfloat16):
            out = patch_embed(images, *leaves, ids, impl=name, **options)
        out.float().square().sum().backward()
        results[name] = [out.detach(), *(p.grad for p in leaves if p is not None)]
    assert results[impl][0].dtype == (torch.float32 if pos else torch.bfloat16)
    for actual, expected in zip(results[impl], results["folded"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02 * expected.abs().max())


@pytest.mark.parametrize(("impl", "device"), FUSED)
def test_layouts_and_strides(impl, device):
    """A crop, a flip of the channels' order and both layouts of the same pixels."""
    (images, *params, ids), options = build(keep=4)
    params, ids = convert(params, torch.float32, device), ids.to(device)
    images = images.to(device)
    expected = patch_embed(images, *params, ids, impl=impl, **options)
    larger = torch.zeros(3, 10, 15, 3, dtype=torch.uint8, device=device)
    larger[:, 1:9, 2:14] = images
    planes = images.permute(0, 3, 1, 2)
    for layout, x in (
        ("hwc", larger[:, 1:9, 2:14]),
        ("hwc", images.flip(3).contiguous().flip(3)),
        ("hwc", planes.contiguous().permute(0, 2, 3, 1)),
        ("chw", planes),
        ("chw", planes.contiguous()),
        ("chw", larger.permute(0, 3, 1, 2).contiguous()[:, :, 1:9, 2:14]),
    ):
        out = patch_embed(x, *params, ids, impl=impl, **{**options, "layout": layout})
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("impl", "device"), FUSED)
def test_one_gradient_alone(impl, device):
    (images, *params, ids), options = build(keep=4)
    images, ids, params = images.to(device), ids.to(device), convert(params, torch.float32, device)
    for wanted in range(3):
        grads = []
        for name in (impl, "reference"):
            leaves = [p.clone().requires_grad_(i == wanted) for i, p in enumerate(params)]
            out = patch_embed(images, *leaves, ids, impl=name, **options)
            grad = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
            grads.append(torch.autograd.grad(out, leaves[wanted], grad)[0])
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("impl", "device"), FUSED)
def test_the_same_patch_twice(impl, device):
    (images, *params, _), options = build()
    ids = torch.tensor([[2, 2, 0], [5, 5, 5], [0, 1, 2]])
    inputs = [images, *convert(params, torch.float32)]
    images, *params = (x.to(device) for x in inputs)
    results = [
        with_gradients(partial(run(name, options, ids.to(device)), images), params)
        for name in (impl, "reference")
    ]
    assert_same(*results, exact=False)


def test_threads_do_not_matter():
    (images, *params, ids), options = build(batch=64, height=32, width=48, keep=5, dim=48)
    params = convert(params, torch.float32)
    function = lambda *p: patch_embed(images, *p, ids, impl="cpp", **options)
    grad = torch.randn(64, 5, 48, generator=torch.Generator().manual_seed(1))
    one = with_gradients(function, params, grad)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = with_gradients(function, params, grad)
    finally:
        torch.set_num_threads(before)
    # Tokens and the weights' gradient are torch's products, whose sums are its business.
    assert_same(three[1][1:], one[1][1:])
    assert_same(three, one, exact=False)


def test_writes_all_it_returns():
    (images, *params, ids), options = build(keep=2)
    params = convert(params, torch.float32)
    with poisoned_allocations():
        outs, grads = with_gradients(
            lambda *p: patch_embed(images, *p, ids, impl="cpp", **options), params
        )
    assert all(x.isfinite().all() for x in (*outs, *grads))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("hwc", [False, True])
def test_registration(hwc, bf16):
    (images, weight, bias, pos, ids), _ = build(keep=3, layout="hwc" if hwc else "chw")
    images = images.contiguous()
    weight, bias, pos = (x.float() for x in (weight, bias, pos))
    norm = ([*NORM["mean"]], [*NORM["std"]], hwc, bf16)
    forward = torch.ops.vlpfast.patch_embed_fwd.default
    backward = torch.ops.vlpfast.patch_embed_bwd.default
    opcheck(forward, images, weight, bias, pos, ids, *norm)
    opcheck(forward, images, weight.bfloat16(), None, None, None, *norm)
    grad = forward(images, weight, bias, pos, ids, *norm)
    opcheck(backward, grad, images, weight, ids, *norm, True)
    opcheck(backward, grad, images, weight.bfloat16(), ids, *norm, False)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_choosing_commutes(data):
    """Tokens of kept patches are the rows of all tokens, in the order asked for."""
    num_rows, num_columns, p = (data.draw(st.integers(1, n)) for n in (4, 4, 6))
    keep = data.draw(st.integers(1, num_rows * num_columns))
    (images, *params, ids), options = build(
        batch=2, height=num_rows * p, width=num_columns * p, patch_size=p, keep=keep,
        layout=data.draw(st.sampled_from(["hwc", "chw"])),
    )  # fmt: skip
    params = convert(params, torch.float32)
    everything = patch_embed(images, *params, impl="cpp", **options)
    kept = patch_embed(images, *params, ids, impl="cpp", **options)
    expected = everything.gather(1, ids[..., None].expand(-1, -1, everything.shape[-1]))
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_is_a_product_per_patch(impl):
    (images, weight, bias, pos, ids), options = build(keep=4)
    out = patch_embed(images, weight, bias, pos, ids, impl=impl, **options)
    mean, std = (torch.tensor(NORM[x], dtype=torch.float64) for x in ("mean", "std"))
    for b in range(3):
        for place, patch in enumerate(ids[b].tolist()):
            row, column = divmod(patch, 3)
            pixels = images[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double()
            normalised = (pixels / 255 - mean) / std
            expected = torch.einsum("pqc,dcpq->d", normalised, weight) + bias + pos[patch]
            torch.testing.assert_close(out[b, place], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    inputs, options = build(batch=2, height=4, width=4, patch_size=2, dim=2, keep=3, pixels="float")
    *inputs, ids = inputs
    torch.autograd.gradcheck(run(impl, options, ids), [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("impl", IMPLS)
def test_keeping_all_is_keeping_none(impl):
    (images, weight, bias, pos, _), options = build()
    ids = torch.arange(6).expand(3, 6)
    kept = patch_embed(images, weight, bias, pos, ids, impl=impl, **options)
    assert torch.equal(kept, patch_embed(images, weight, bias, pos, impl=impl, **options))


@pytest.mark.parametrize("impl", IMPLS)
def test_optional_parts(impl):
    (images, weight, bias, pos, ids), options = build(keep=2)
    full = patch_embed(images, weight, bias, pos, ids, impl=impl, **options)
    bare = patch_embed(images, weight, None, None, ids, impl=impl, **options)
    torch.testing.assert_close(full, bare + bias + pos[ids])


@pytest.mark.parametrize("impl", IMPLS)
def test_black_and_white(impl):
    """Extreme pixels of a constant image, whose normalised value is known."""
    weight = torch.full((1, 3, 4, 4), 1 / 48, dtype=torch.float64)
    for value in (0, 255):
        images = torch.full((1, 4, 4, 3), value, dtype=torch.uint8)
        out = patch_embed(images, weight, None, patch_size=4, **NORM, impl=impl)
        expected = sum((value / 255 - m) / s for m, s in zip(*NORM.values(), strict=True)) / 3
        torch.testing.assert_close(out.item(), expected)


def test_folding_is_no_less_accurate_under_autocast():
    inputs, options = build(batch=8, height=32, width=32, patch_size=16, dim=64)
    truth = patch_embed(*inputs, impl="reference", **options)
    narrow = convert(inputs, torch.float32)
    error = {}
    for impl in IMPLS:
        with torch.autocast("cpu", torch.bfloat16):
            out = patch_embed(*narrow, impl=impl, **options)
        error[impl] = (out.double() - truth).square().mean().sqrt()
    assert error["folded"] <= error["reference"]


def test_repeatable_and_unmutated():
    inputs, options = build(keep=3)
    copies = [x.clone() for x in inputs]
    assert torch.equal(patch_embed(*inputs, **options), patch_embed(*inputs, **options))
    assert all(torch.equal(x, c) for x, c in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("impl", [*IMPLS, "cpp"])
def test_compiles(impl):
    inputs, options = build(keep=3)
    *inputs, ids = convert(inputs, torch.float32)
    inputs[1:] = [x.requires_grad_() for x in inputs[1:]]
    assert_compiles(run(impl, options, ids), *inputs)


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, r"images must be \(B, H, W, 3\)", {"images": torch.zeros(2, 3, 8, 8)}),
        (ValueError, r"images must be \(B, 3, H, W\)", {"layout": "chw"}),
        (TypeError, "images must be uint8", {"images": torch.zeros(2, 8, 8, 3, dtype=torch.int32)}),
        (ValueError, "patch_size 4 must divide", {"images": torch.zeros(2, 8, 6, 3)}),
        (ValueError, "layout must be", {"layout": "bchw"}),
        (ValueError, r"weight must be \(5, 3, 4, 4\)", {"weight": torch.zeros(5, 4, 4, 3)}),
        (TypeError, "weight must be floating", {"weight": torch.zeros(5, 3, 4, 4).int()}),
        (ValueError, r"bias must be \(5,\), got \(4,\)", {"bias": torch.zeros(4)}),
        (ValueError, r"pos_embed must be \(4, 5\)", {"pos_embed": torch.zeros(5, 5)}),
        (ValueError, r"ids must be \(2, K\)", {"ids": torch.zeros(3, 2, dtype=torch.int64)}),
        (ValueError, r"ids must be in 0\.\.3, got 4", {"ids": torch.tensor([[0], [4]])}),
        (ValueError, r"ids must be in 0\.\.3, got -1", {"ids": torch.tensor([[-1], [1]])}),
        (ValueError, "keep at most 4 patches, got 5", {"ids": torch.zeros(2, 5).long()}),
        (
            NotImplementedError,
            "takes fp32 and bf16, got torch.float64",
            {"weight": torch.zeros(5, 3, 4, 4).double(), "impl": "cpp"},
        ),
        (
            NotImplementedError,
            "takes uint8, fp32 and bf16 images, got torch.float16",
            {"images": torch.zeros(2, 8, 8, 3).half(), "impl": "cpp"},
        ),
        (
            NotImplementedError,
            "has no gradient of images",
            {"images": torch.zeros(2, 8, 8, 3).requires_grad_(), "impl": "cpp"},
        ),
        (TypeError, "ids must be int64", {"ids": torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, "3 values each, got 1 and 3", {"mean": (0.5,)}),
        (ValueError, "impl must be", {"impl": "magic"}),
    ],
)
def test_bad_arguments(error, words, change):
    arguments = {
        "images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        "weight": torch.zeros(5, 3, 4, 4),
        "bias": torch.zeros(5),
        "patch_size": 4,
        **NORM,
    }
    with pytest.raises(error, match=words):
        patch_embed(**{**arguments, **change})


def test_operator_checks_ids():
    """What reaches C++ by itself, as from a compiled model, is checked there."""
    (images, weight, *_), _ = build()
    norm = ([*NORM["mean"]], [*NORM["std"]], True, False)
    with pytest.raises(RuntimeError, match=r"ids must be in 0\.\.5, got 6"):
        torch.ops.vlpfast.patch_embed_fwd(
            images, weight.float(), None, None, torch.tensor([[6]] * 3), *norm
        )


def test_auto_differentiates_images():
    images = torch.rand(1, 4, 4, 3).requires_grad_()
    out = patch_embed(images, torch.ones(2, 3, 4, 4), None, patch_size=4, **NORM)
    (grad,) = torch.autograd.grad(out.sum(), images)
    expected = 2 / 255 / torch.tensor(NORM["std"])
    torch.testing.assert_close(grad, expected.expand(1, 4, 4, 3))
