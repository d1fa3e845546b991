"""The chunked hinge losses (C++ and Triton passes) against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops import _contrastive_passes, _contrastive_tiles
from vlpfast.ops.contrastive import hinge_loss
from vlpfast.ops.reference import contrastive as reference
from vlpfast.testing import assert_compiles, assert_same, routes, with_gradients

BF16 = torch.bfloat16


def back_ends() -> list:
    """Both back ends of the passes; Triton's is skipped where its kernels are missing."""
    reason = _contrastive_passes.triton_missing()
    return routes("cpp") if reason is not None else routes("cpp", "triton")


def make_inputs(B: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B)
    draw = lambda: F.normalize(torch.randn(B, D, generator=generator, dtype=torch.float64), dim=1)
    image = draw()
    return image.to(dtype), F.normalize(image + draw(), dim=1).to(dtype)


def check(impl, device, B: int, dtype: torch.dtype, hardest: bool, ids: Tensor | None) -> None:
    """fp32 by dtype defaults; bf16 within twice the error of the formula in bf16."""
    inputs = make_inputs(B, 16, dtype)
    run = lambda i, t, impl, ids: hinge_loss(i, t, hardest=hardest, ids=ids, impl=impl)
    ids_there = None if ids is None else ids.to(device)
    output, grads = with_gradients(
        lambda i, t: run(i, t, impl, ids_there), [x.to(device) for x in inputs]
    )
    truth, true_grads = with_gradients(
        lambda i, t: run(i, t, "reference", ids), [x.double() for x in inputs]
    )
    assert output[0].dtype == torch.float32
    if dtype == torch.float32:
        torch.testing.assert_close(output[0].cpu().double(), truth[0], rtol=1e-5, atol=1e-5)
        for grad, true in zip(grads, true_grads, strict=True):
            torch.testing.assert_close(grad.cpu().double(), true, rtol=1e-5, atol=1e-5)
        return
    # Rounded similarities near a hinge's end, or nearly as hard as the hardest, may fall on either
    # side, in eager code of that dtype too: errors are compared by their norm.
    names = torch.arange(B) if ids is None else ids
    eager = lambda i, t: reference.hinge(i, t, names, margin=0.2, hardest=hardest)
    plain, plain_grads = with_gradients(eager, inputs)
    triples = zip((*output, *grads), (*truth, *true_grads), (*plain, *plain_grads), strict=True)
    for actual, true, rough in triples:
        plain_error = (rough.double() - true).norm()
        band = torch.finfo(dtype).eps * true.norm() + 1e-6
        assert (actual.cpu().double() - true).norm() <= 2 * (plain_error + band)


# 1: no negative; 7: a prime; 255, 256, 257: around a strip of columns.
@pytest.mark.parametrize("B", [1, 7, 255, 256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["alone", "ids"])
@pytest.mark.parametrize("hardest", [False, True], ids=["vse0", "vse++"])
@pytest.mark.parametrize(("impl", "device"), back_ends())
def test_matches_reference(impl, device, hardest, with_ids, dtype, B: int) -> None:
    if impl == "triton" and device.type == "cpu" and (B > 7 or dtype != torch.float32):
        pytest.skip("Triton's interpreter: tiny shapes in fp32")
    ids = torch.arange(B) * 5 % max(1, B - B // 3) if with_ids else None
    check(impl, device, B, dtype, hardest, ids)


@pytest.mark.parametrize("hardest", [False, True], ids=["vse0", "vse++"])
def test_many_tiles(monkeypatch, hardest: bool) -> None:
    monkeypatch.setattr(_contrastive_tiles, "_MIN_TILE_ROWS", 16)
    monkeypatch.setattr(_contrastive_tiles, "_MAX_TILE_ROWS", {"cpu": 16, "cuda": 16})
    check("cpp", torch.device("cpu"), 71, torch.float32, hardest, torch.arange(71) // 2)


@pytest.mark.parametrize("hardest", [False, True], ids=["vse0", "vse++"])
@pytest.mark.parametrize(("impl", "device"), back_ends())
def test_ends(impl, device, hardest: bool) -> None:
    run = lambda i, t, **kw: hinge_loss(i, t, hardest=hardest, impl=impl, **kw)
    eye = torch.eye(3, device=device)
    num_negatives = 1 if hardest else 2
    assert run(eye, eye, margin=0.5) == 0
    assert run(eye, eye, margin=1.5) == 6 * num_negatives * 0.5
    assert run(eye[:1], eye[:1], margin=1.5) == 0
    assert run(eye, eye, margin=1.5, ids=torch.zeros(3, dtype=torch.int64, device=device)) == 0
    empty = eye[:0].clone().requires_grad_()
    loss = run(empty, eye[:0])
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == (0, 3)


@pytest.mark.parametrize("hardest", [False, True], ids=["vse0", "vse++"])
def test_gradients_where_wanted(hardest: bool) -> None:
    inputs = make_inputs(20, 8, torch.float32)
    run = lambda i, t: hinge_loss(i, t, hardest=hardest, impl="cpp")
    (loss,), expected = with_gradients(run, inputs)
    for trained in range(2):
        leaves = [x.clone().requires_grad_(i == trained) for i, x in enumerate(inputs)]
        (-2 * run(*leaves)).backward()
        torch.testing.assert_close(leaves[trained].grad, -2 * expected[trained])
        assert leaves[1 - trained].grad is None
    assert run(*inputs) == loss
    assert not run(*inputs).requires_grad


@pytest.mark.parametrize("hardest", [False, True], ids=["vse0", "vse++"])
def test_nan_and_repeat_and_bytes(hardest: bool) -> None:
    B, D = 300, 8
    image, text = (x.requires_grad_() for x in make_inputs(B, D, torch.float32))
    saved = []
    pack = lambda x: (saved.append(x.untyped_storage().nbytes()), x)[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = hinge_loss(image, text, hardest=hardest, impl="cpp")
    assert sum(saved) == 2 * B * D * 4
    call = lambda: with_gradients(
        lambda i, t: hinge_loss(i, t, hardest=hardest, impl="cpp"), (image, text)
    )
    assert_same(call(), call())
    assert call()[0][0] == loss.detach()
    with torch.no_grad():
        image[11, 3] = torch.nan
    assert hinge_loss(image, text, hardest=hardest, impl="cpp").isnan()


@pytest.mark.parametrize("hardest", [False, True], ids=["vse0", "vse++"])
def test_compiles(hardest: bool) -> None:
    image, text = (x.requires_grad_() for x in make_inputs(20, 8, torch.float32))
    assert_compiles(hinge_loss, image, text, hardest=hardest, impl="cpp")


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize(("impl", "device"), back_ends())
def test_a_broken_tower_is_no_loss_of_zero(impl, device, hardest, broken, dtype):
    towers = [x.to(device) for x in make_inputs(7, 16, dtype)]
    towers[broken].fill_(torch.nan)
    run = lambda i, t, ids=None: hinge_loss(i, t, hardest=hardest, ids=ids, impl=impl)
    (loss,), grads = with_gradients(run, towers)
    assert loss.isnan()
    assert any(grad.isnan().all() for grad in grads)
    # Where no pair has a negative there is nothing to look at.
    if hardest:
        assert run(*towers, torch.zeros(7, dtype=torch.int64, device=device)) == 0
