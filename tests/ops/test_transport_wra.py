"""wra_loss: UNITER's loss, with gradients written in the forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests._transport import make, problem, routes_of, uniter
from vlpfast.ops.transport import _WRA, ipot, wra_loss
from vlpfast.testing import (
    assert_compiles,
    assert_same,
    assert_within_budget,
    opcheck,
    poisoned_allocations,
    routes,
    with_gradients,
)

ROUTES = routes_of(_WRA)
KERNELS = routes_of(_WRA, "reference")
MATCHED = torch.tensor([True, False, False, True])


def test_wra_is_uniters() -> None:
    x, y, x_mask, y_mask = problem()
    matched = torch.tensor([True, False, False, True])
    d = [uniter(x[b][x_mask[b]], y[b][y_mask[b]])[0] for b in range(4)]
    loss = wra_loss(x, y, x_mask, y_mask, matched)
    expected = 0.1 * ((d[0] + d[3]) - (d[1] + d[2])) / (2 + 2)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(wra_loss(x, y, x_mask, y_mask, ~matched, weight=1.0), -10 * loss)
    assert wra_loss(x[:0], y[:0], None, None, matched[:0]) == 0


@pytest.mark.parametrize(("impl", "device"), KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.5, 0.05], ids=["scaling", "log"])
@pytest.mark.parametrize("upstream", [1.0, -3.0])
def test_matches_fp64(impl, device, dtype, beta, upstream) -> None:
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32, 4, 13, 33, 31))
    x, y = x.to(dtype), y.to(dtype)
    x_mask[2] = False  # an empty side counts in B and adds nothing
    masks, matched = (x_mask, y_mask), MATCHED.to(device)
    call = lambda impl: lambda x, y: wra_loss(x, y, *masks, matched, beta=beta, impl=impl)
    up = torch.tensor(upstream, device=device)
    (loss,), grads = with_gradients(call(impl), (x, y), up)
    (truth,), wanted = with_gradients(call("reference"), (x.double(), y.double()), up.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)
    for grad, want in zip(grads, wanted, strict=True):
        if dtype == torch.float32:
            scale = want.abs().max().item()
            torch.testing.assert_close(grad.double(), want, rtol=0, atol=2e-5 * scale)
        else:
            # Written with weight / B, then multiplied: two roundings where eager code has one.
            assert_within_budget(grad, want, want.to(dtype), factor=2.0)
        assert (grad[2] == 0).all()


@pytest.mark.parametrize(("impl", "device"), KERNELS)
def test_is_ipots_distance_to_the_bit(impl, device) -> None:
    """The same engine: distances and, but for one rounding of the factor, gradients of `ipot`."""
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    sign = torch.where(MATCHED, 1.0, -1.0).to(device)
    distance = ipot(x, y, x_mask, y_mask, impl=impl).distance
    loss = wra_loss(x, y, x_mask, y_mask, MATCHED.to(device), weight=0.5, impl=impl)
    torch.testing.assert_close(loss, (sign * distance).sum() * (0.5 / 4), rtol=1e-6, atol=1e-8)
    call = lambda x, y: ipot(x, y, x_mask, y_mask, impl=impl).distance
    wanted = with_gradients(call, (x, y), sign * (0.5 / 4))[1]
    call = lambda x, y: wra_loss(x, y, x_mask, y_mask, MATCHED.to(x.device), weight=0.5, impl=impl)
    assert_same(with_gradients(call, (x, y))[1], wanted, exact=impl == "cpp")


@pytest.mark.parametrize(("impl", "device"), KERNELS)
def test_backward_twice_and_one_side(impl, device) -> None:
    """The gradients are handed over; a second backward, and one with another factor, is right."""
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    matched = MATCHED.to(device)
    call = lambda x, y: wra_loss(x, y, x_mask, y_mask, matched, impl=impl)
    wanted = with_gradients(call, (x, y))[1]
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = call(x, y)
    kept = torch.autograd.grad(loss, (x, y), torch.tensor(2.0, device=device), retain_graph=True)
    again = torch.autograd.grad(loss, (x, y), retain_graph=True)
    assert_same(again, wanted)
    assert_same(kept, tuple(2 * grad for grad in wanted))
    again[0].zero_()
    assert_same(torch.autograd.grad(loss, (x, y)), wanted)
    for side, grad in enumerate(wanted):
        inputs = [t.detach() for t in (x, y)]
        inputs[side].requires_grad_()
        assert_same(torch.autograd.grad(call(*inputs), inputs[side])[0], grad)
    with torch.no_grad():
        assert not call(x, y).requires_grad
    double = torch.autograd.grad(call(x, y) + 3 * call(x, y), x)[0]
    torch.testing.assert_close(double, 4 * wanted[0])


@pytest.mark.parametrize(("impl", "device"), KERNELS)
def test_packed_sequence(impl, device) -> None:
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    matched = MATCHED.to(device)
    masks = [torch.cat([x_mask, y_mask & False], 1), torch.cat([x_mask & False, y_mask], 1)]
    call = lambda p: wra_loss(p, p, *masks, matched, impl=impl)
    (loss,), (grad,) = with_gradients(call, (torch.cat([x, y], 1),))
    apart = lambda x, y: wra_loss(x, y, x_mask, y_mask, matched, impl=impl)
    (wanted,), parts = with_gradients(apart, (x, y))
    assert_same((loss, grad), (wanted, torch.cat(parts, 1)))


def test_threads_do_not_matter() -> None:
    x, y, x_mask, y_mask = problem(torch.float32, 7, 17, 40, 33)
    matched = make(7, seed=1) > 0
    call = lambda: with_gradients(
        lambda x, y: wra_loss(x, y, x_mask, y_mask, matched, impl="cpp"), (x, y)
    )
    one, before = call(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = call()
    finally:
        torch.set_num_threads(before)
    assert_same(two, one)


def test_large_gradients_are_those_of_each_problem() -> None:
    """Gradients of more than 16 MiB are stored past the caches, of a batch of one as usual; the
    problems of a large batch are also taken, and read, in advance."""
    B, M, N, D = 80, 5, 67, 768
    x, y = make(B, M, D, seed=0).float(), make(B, N, D, seed=1).float()
    x_mask, y_mask = make(B, M, seed=2) > -1, make(B, N, seed=3) > -1
    upstream = make(B, seed=4).float()
    call = lambda rows: with_gradients(
        lambda x, y: ipot(x, y, x_mask[rows], y_mask[rows], iters=3, impl="cpp").distance,
        (x[rows], y[rows]),
        upstream[rows],
    )
    (distance,), grads = call(slice(None))
    assert sum(grad.numel() * 4 for grad in grads) > 16 * 2**20
    for b in (0, 1, B // 2, B - 1):
        alone = call(slice(b, b + 1))
        assert_same((distance[b : b + 1], *(g[b : b + 1] for g in grads)), (*alone[0], *alone[1]))


@pytest.mark.parametrize(("impl", "device"), routes("cpp", "cuda"))
def test_registration_and_poison(impl, device) -> None:
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    op = torch.ops.vlpfast.wra_fwd.default
    for needs in ((True, True), (False, True), (False, False)):
        args = (x, y, x_mask, y_mask, MATCHED.to(device), 0.5, 4, 0.1, *needs)
        opcheck(op, *args)
        with poisoned_allocations():
            out = op(*args)
        assert all(t.isfinite().all() for t in out)
        assert [t.numel() > 0 for t in out[2:]] == list(needs)


@pytest.mark.parametrize(("impl", "device"), ROUTES)
def test_compiles(impl, device) -> None:
    if impl == "triton" and device.type == "cpu":
        pytest.skip("the interpreter is no code to compile")
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return wra_loss(x, y, x_mask, y_mask, MATCHED.to(x.device), iters=3, impl=impl) * 2

    assert_compiles(loss, x.requires_grad_(), y.requires_grad_())
    assert_compiles(loss, x.detach(), y)


def test_wra_errors() -> None:
    x, y, x_mask, y_mask = problem()
    with pytest.raises(TypeError, match="matched must be bool"):
        wra_loss(x, y, x_mask, y_mask, torch.ones(4).long())
    with pytest.raises(ValueError, match=r"matched must be \(B,\) = \(4,\), got \(3,\)"):
        wra_loss(x, y, x_mask, y_mask, torch.ones(3).bool())
