"""patch_embed: the folded product against normalise-convolve-choose, and that against patches."""

from __future__ import annotations

import pytest
import torch

from vlpfast.ops.patch_embed import patch_embed
from vlpfast.testing import assert_compiles, assert_within_budget, with_gradients

IMPLS = ["reference", "folded"]
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
        ids = torch.stack(order).sort(1).values if batch else torch.zeros(0, keep).long()
    return [images, *params, ids], {"patch_size": patch_size, "layout": layout, **NORM}


# A prime grid, one patch, one pixel per patch, no image, one kept patch, none kept, all kept.
SHAPES = {
    "all": {},
    "half": {"keep": 3},
    "half-chw": {"keep": 3, "layout": "chw"},
    "float": {"keep": 4, "pixels": "float"},
    "float-chw": {"pixels": "float", "layout": "chw"},
    "prime": {"height": 35, "width": 15, "patch_size": 5, "keep": 7},
    "one-patch": {"height": 4, "width": 4},
    "one-pixel": {"height": 2, "width": 3, "patch_size": 1, "dim": 1},
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_matches_reference(name, dtype, device):
    inputs, options = build(**SHAPES[name])
    *inputs, ids = convert(inputs, dtype, device)
    wide = convert(inputs, torch.float64, device)
    eager_run, folded = run("reference", options, ids), run("folded", options, ids)
    out = eager_run(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    truth = with_gradients(eager_run, wide, grad.double())
    eager = with_gradients(eager_run, inputs, grad)
    actual = with_gradients(folded, inputs, grad)
    flat = [[*outs, *grads] for outs, grads in (actual, truth, eager)]
    for i, (a, t, e) in enumerate(zip(*flat, strict=True)):
        assert_within_budget(a, t, e, name=f"{name} {i}")


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


@pytest.mark.parametrize("impl", IMPLS)
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
