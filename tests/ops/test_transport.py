"""ipot against UNITER's recurrence written out per sample."""

from __future__ import annotations

import math

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests._transport import exact, make, problem, routes_of, skip_interpreted, uniter
from vlpfast.ops.transport import _IPOT, ipot
from vlpfast.testing import (
    assert_compiles,
    assert_same,
    assert_within_budget,
    opcheck,
    poisoned_allocations,
    routes,
    with_gradients,
)

ROUTES = routes_of(_IPOT)
KERNELS = routes_of(_IPOT, "reference")

# (B, M, N, D): one of everything; primes; below, at and above a vector of 16 and a tile; text
# longer than image; features that are no multiple of a vector.
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 5, 3),
    (3, 7, 1, 8),
    (3, 5, 15, 17),
    (2, 16, 16, 32),
    (2, 13, 33, 31),
]
LARGE = [(2, 60, 36, 64), (3, 32, 196, 768), (1, 64, 577, 80)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("beta", [0.5, 0.05], ids=["scaling", "log"])
@pytest.mark.parametrize("inner", [1, 3])
def test_matches_uniter(beta: float, inner: int) -> None:
    """Distance, plan and feature gradients of each sample, whatever its masks."""
    x, y, x_mask, y_mask = problem()
    weights = make(4, seed=5)
    options = {"beta": beta, "inner": inner, "iters": 20}
    plan = ipot(x, y, x_mask, y_mask, return_plan=True, **options).plan
    ours, our_grads = with_gradients(
        lambda x, y: ipot(x, y, x_mask, y_mask, **options).distance, (x, y), weights
    )
    for b in range(4):
        inputs = (x[b][x_mask[b]], y[b][y_mask[b]])
        (distance, T), grads = with_gradients(
            lambda x, y: uniter(x, y, **options),
            inputs,
            weights[b],
        )
        torch.testing.assert_close(ours[0][b], distance, rtol=1e-11, atol=0)
        torch.testing.assert_close(plan[b][x_mask[b]][:, y_mask[b]], T, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(our_grads[0][b][x_mask[b]], grads[0], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(our_grads[1][b][y_mask[b]], grads[1], rtol=1e-9, atol=1e-13)
        assert (our_grads[0][b][~x_mask[b]] == 0).all()
        assert (our_grads[1][b][~y_mask[b]] == 0).all()
        assert plan[b][~x_mask[b]].sum() == plan[b][:, ~y_mask[b]].sum() == 0


def test_defaults_are_uniters() -> None:
    x, y, _, _ = problem()
    expected = torch.stack([uniter(x[b], y[b])[0] for b in range(4)])
    torch.testing.assert_close(ipot(x, y).distance, expected, rtol=1e-11, atol=0)


def test_ipot_gradcheck_at_fixed_plan() -> None:
    """The plan is a constant: the gradient is that of sum C * plan with the plan frozen."""
    x, y, x_mask, y_mask = problem()
    plan = ipot(x, y, x_mask, y_mask, return_plan=True).plan

    def frozen(x: Tensor, y: Tensor) -> Tensor:
        cosine = torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
        return ((1 - cosine) * plan).sum((1, 2))

    assert torch.autograd.gradcheck(frozen, [x.requires_grad_(), y.requires_grad_()])
    ours = with_gradients(lambda x, y: ipot(x, y, x_mask, y_mask).distance, (x, y))
    torch.testing.assert_close(ours[1], with_gradients(frozen, (x, y))[1], rtol=1e-9, atol=1e-13)


def test_ipot_marginals_and_potentials() -> None:
    x, y, x_mask, y_mask = problem()
    for beta in (0.5, 0.05):
        output = ipot(x, y, x_mask, y_mask, beta=beta, return_plan=True)
        a, b = (mask.double() / mask.sum(1, keepdim=True) for mask in (x_mask, y_mask))
        # The text side is scaled last, so its marginal is exact; the image side's is near at best.
        torch.testing.assert_close(output.plan.sum(2), a, rtol=1e-12, atol=1e-14)
        if beta == 0.5:
            assert (output.plan.sum(1) - b).abs().sum(1).max() < 1e-3
        cost = 1 - torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
        exponent = (output.f[:, :, None] + output.g[:, None] - cost) * (50 / beta)
        rebuilt = a[:, :, None] * b[:, None] * exponent.exp()
        torch.testing.assert_close(rebuilt, output.plan, rtol=1e-8, atol=1e-14)
        assert output.num_iters.tolist() == [50] * 4
        assert_same(output.value, output.distance)


def test_ipot_converges_to_the_optimum() -> None:
    """Many iterations reach the exact distance; 50 are above it, not below."""
    x, y, _, _ = problem(B=2)
    cost = 1 - torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
    exact = torch.tensor([float(ot.emd2([], [], c.numpy())) for c in cost], dtype=torch.float64)
    torch.testing.assert_close(ipot(x, y, iters=2000).distance, exact, rtol=2e-3, atol=0)
    assert (ipot(x, y).distance > exact - 0.02).all()


def test_masked_tokens_may_hold_anything() -> None:
    x, y, x_mask, y_mask = problem(torch.float32)
    expected = with_gradients(lambda x, y: ipot(x, y, x_mask, y_mask).distance, (x, y))
    for junk in (1e6, math.nan, math.inf):
        dirty = (
            x.masked_fill(~x_mask[..., None], junk),
            y.masked_fill(~y_mask[..., None], junk),
        )
        assert_same(
            with_gradients(lambda x, y: ipot(x, y, x_mask, y_mask).distance, dirty), expected
        )


@pytest.mark.parametrize("beta", [0.5, 0.05], ids=["scaling", "log"])
def test_empty_side_is_zero(beta: float) -> None:
    x, y, x_mask, y_mask = problem(torch.float32)
    x_mask[0], y_mask[2] = False, False
    x_mask[3] = y_mask[3] = False
    call = lambda x, y: ipot(x, y, x_mask, y_mask, beta=beta, return_plan=True)
    output, grads = with_gradients(lambda x, y: call(x, y).distance, (x, y))
    assert output[0][[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    for grad in grads:
        assert (grad[[0, 2, 3]] == 0).all()
        assert grad[1].abs().max() > 0
    full = call(x, y)
    assert (full.plan[[0, 2, 3]] == 0).all()
    assert all(field.isfinite().all() for field in full)
    assert ipot(x[:, :0], y, beta=beta).distance.tolist() == [0.0] * 4
    assert ipot(x[:0], y[:0], beta=beta).distance.shape == (0,)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), M=st.integers(1, 5), N=st.integers(1, 5))
def test_ipot_properties(seed: int, M: int, N: int) -> None:
    """A mask leaves tokens out; their order and the company in a batch change nothing."""
    torch.manual_seed(seed)
    x, y = make(3, M, 4, seed=seed), make(3, N, 4, seed=seed + 1)
    alone = ipot(x[:1], y[:1], iters=10).distance
    torch.testing.assert_close(ipot(x, y, iters=10).distance[:1], alone, rtol=1e-12, atol=1e-14)
    rows, columns = torch.randperm(M), torch.randperm(N)
    shuffled = ipot(x[:1, rows], y[:1, columns], iters=10).distance
    torch.testing.assert_close(shuffled, alone, rtol=1e-11, atol=1e-13)
    padded_x = torch.cat([x[:1], make(1, 2, 4, seed=seed + 2)], 1)
    mask = torch.arange(M + 2)[None] < M
    padded = ipot(padded_x, y[:1], mask, iters=10).distance
    torch.testing.assert_close(padded, alone, rtol=1e-12, atol=1e-14)


def test_bfloat16_and_autocast() -> None:
    x, y, x_mask, y_mask = problem(torch.bfloat16)
    distance = lambda x, y: ipot(x, y, x_mask, y_mask).distance
    output, grads = with_gradients(distance, (x, y))
    truth, exact = with_gradients(distance, (x.double(), y.double()))
    assert output[0].dtype == torch.float32
    torch.testing.assert_close(output[0].double(), truth[0], rtol=1e-6, atol=0)
    for grad, true_grad in zip(grads, exact, strict=True):
        assert_within_budget(grad, true_grad, true_grad.to(torch.bfloat16))
    x, y = x.float(), y.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distance(x, y)
    assert_same(inside, distance(x, y))


def test_non_contiguous_not_mutated_repeatable() -> None:
    x, y, x_mask, y_mask = problem(torch.float32)
    strided = (x.mT.contiguous().mT, y.transpose(0, 1).contiguous().transpose(0, 1))
    before = [t.clone() for t in strided]
    call = lambda: ipot(*strided, x_mask, y_mask, return_plan=True)
    assert_same(call(), call())
    torch.testing.assert_close(call().distance, ipot(x, y, x_mask, y_mask).distance)
    assert_same(list(strided), before)


def test_ipot_compiles() -> None:
    x, y, x_mask, y_mask = problem(torch.float32)
    distance = lambda x, y: ipot(x, y, x_mask, y_mask, iters=2).distance
    assert_compiles(distance, x.requires_grad_(), y.requires_grad_())


def assert_distance(actual: Tensor, truth: Tensor, beta: float, impl: str) -> None:
    """1e-6 at UNITER's beta = 0.5; a cosine's rounding enters the exponents 50 / beta times."""
    rtol = 1e-6 * max(1.0, 0.25 / beta)
    if beta < 0.1 and impl != "cpp":  # logarithms in fp32
        rtol = 3e-4 if beta < 0.05 else 5e-5
    torch.testing.assert_close(actual.double().cpu(), truth, rtol=rtol, atol=2e-7)


def assert_plan(actual: Tensor, truth: Tensor, beta: float, iters: int, impl: str) -> None:
    """A cosine's rounding enters the plan's exponents iters / beta times."""
    error = (actual.double().cpu() - truth).abs().amax((1, 2)) / truth.amax((1, 2)).clamp(min=1e-30)
    bound = 1e-5 * max(1.0, iters / beta / 100) * (1 if impl == "cpp" else 5)
    assert error.max() <= bound, (
        f"plan off by {error.max():.2e} of its maximum, {bound:.1e} allowed"
    )


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=lambda s: "B{}-M{}-N{}-D{}".format(*s))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_fp32_matches_fp64(impl, device, shape, masked) -> None:
    """Distance 1e-6 relative, plan 1e-5 of its maximum, gradients 1e-5 of the frozen plan's."""
    if shape in LARGE:
        skip_interpreted(impl, device)
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32, *shape))
    if not masked:
        x_mask, y_mask = torch.ones_like(x_mask), torch.ones_like(y_mask)
    given_masks = (x_mask, y_mask) if masked else (None, None)
    weights = make(shape[0], seed=5).to(device)
    truth, plan = exact(*(t.cpu() for t in (x, y, x_mask, y_mask)), beta=0.5, iters=50)

    def frozen(x: Tensor, y: Tensor) -> Tensor:
        unit = [t / t.norm(dim=2, keepdim=True) for t in (x, y)]
        return ((1 - unit[0] @ unit[1].mT) * plan.to(device)).sum((1, 2))

    call = lambda x, y: ipot(x, y, *given_masks, return_plan=True, impl=impl)
    out = call(x, y)
    assert_distance(out.distance, truth, 0.5, impl)
    assert_plan(out.plan, plan, 0.5, 50, impl)
    grads = with_gradients(lambda x, y: call(x, y).distance, (x, y), weights)[1]
    wanted = with_gradients(frozen, (x.double(), y.double()), weights)[1]
    for grad, want in zip(grads, wanted, strict=True):
        scale = want.abs().max().item()
        # One row or one column: T is constant there, the gradient can be all rounding.
        torch.testing.assert_close(grad.double(), want, rtol=0, atol=1e-5 * scale + 1e-7)
    assert (grads[0][~x_mask] == 0).all()
    assert (grads[1][~y_mask] == 0).all()


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("beta", [0.5, 0.1, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("inner", [1, 3])
def test_every_beta_and_inner_in_fp32(impl, device, beta, inner) -> None:
    """The scaling form alone would be silently wrong below 0.1 and NaN at 0.005."""
    args = problem(torch.float32)
    truth, plan = exact(*args, beta=beta, iters=50, inner=inner)
    x, y, x_mask, y_mask = (t.to(device) for t in args)
    options = {"beta": beta, "inner": inner, "return_plan": True, "impl": impl}
    out = ipot(x, y, x_mask, y_mask, **options)
    assert_distance(out.distance, truth, beta, impl)
    assert_plan(out.plan, plan, beta, 50, impl)
    # The potentials rebuild the plan.
    wide = ipot(*args[:2], *args[2:], **(options | {"impl": "reference"}))
    for mine, theirs in ((out.f, wide.f), (out.g, wide.g)):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=2e-5)
    assert out.num_iters.tolist() == [50] * 4


def test_where_eager_scaling_fails() -> None:
    """At beta = 0.1 entries of these plans leave fp32's range and return; eager code loses them."""
    x, y, _, _ = problem(torch.float32, 64, 6, 9, 8)
    every = torch.ones(64, 6, dtype=torch.bool), torch.ones(64, 9, dtype=torch.bool)
    truth, _ = exact(x, y, *every, beta=0.1, iters=50)
    error = lambda impl: ((ipot(x, y, beta=0.1, impl=impl).distance - truth) / truth).abs().max()
    assert error("reference") > 1e-3
    assert error("cpp") < 5e-6


@pytest.mark.parametrize(("impl", "device"), KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
def test_half_precision_features(impl, device, dtype) -> None:
    """Dot products in fp32 of what was given: the distance is that of the rounded features."""
    for shape in [(2, 13, 33, 31), (3, 32, 196, 768)]:
        if shape[1] == 32 and impl == "triton" and device.type == "cpu":
            continue
        x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32, *shape))
        out = ipot(x.to(dtype), y.to(dtype), x_mask, y_mask, impl=impl)
        assert out.distance.dtype == torch.float32
        truth, _ = exact(*(t.cpu() for t in (x.to(dtype), y.to(dtype), x_mask, y_mask)), 0.5, 50)
        assert_distance(out.distance, truth, 0.5, impl)
        unrounded, _ = exact(*(t.cpu() for t in (x, y, x_mask, y_mask)), 0.5, 50)
        bound = 2e-4 if dtype == torch.bfloat16 and shape[3] == 768 else 5e-3
        torch.testing.assert_close(out.distance.double().cpu(), unrounded, rtol=bound, atol=0)
        distance = lambda x, y, m=(x_mask, y_mask), i=impl: ipot(x, y, *m, impl=i).distance
        grads = with_gradients(distance, (x.to(dtype), y.to(dtype)))[1]
        wide = (x.to(dtype).double(), y.to(dtype).double())
        reference = lambda x, y, m=(x_mask, y_mask): ipot(x, y, *m, impl="reference").distance
        wanted = with_gradients(reference, wide)[1]
        for grad, want in zip(grads, wanted, strict=True):
            assert grad.dtype == dtype
            assert_within_budget(grad, want, want.to(dtype))


@pytest.mark.parametrize(("impl", "device"), KERNELS)
@pytest.mark.parametrize("beta", [0.5, 0.1, 0.02])
def test_bits_depend_on_the_problem_alone(impl, device, beta) -> None:
    """Alone, in a batch, at another place in it or under other padding: the same bits."""
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32, 4, 11, 21, 24))

    def solve(x, y, x_mask, y_mask):
        call = lambda x, y: ipot(
            x, y, x_mask, y_mask, beta=beta, iters=20, return_plan=True, impl=impl
        )
        out = call(x, y)
        return out, with_gradients(lambda x, y: call(x, y).distance, (x, y))[1]

    together, grads = solve(x, y, x_mask, y_mask)
    order = [2, 0, 3, 1]
    moved, moved_grads = solve(x[order], y[order], x_mask[order], y_mask[order])
    assert_same(moved.distance, together.distance[order])
    assert_same(moved_grads, tuple(g[order] for g in grads))
    for b in range(4):
        rows, columns = x_mask[b].nonzero()[:, 0], y_mask[b].nonzero()[:, 0]
        u, v = x[b : b + 1, rows], y[b : b + 1, columns]
        alone, alone_grads = solve(u, v, None, None)
        assert_same(alone.distance, together.distance[b : b + 1])
        assert_same(alone.plan[0], together.plan[b][rows][:, columns])
        assert_same((alone.f[0], alone.g[0]), (together.f[b, rows], together.g[b, columns]))
        assert_same(alone_grads[0][0], grads[0][b, rows])
        assert_same(alone_grads[1][0], grads[1][b, columns])


def test_threads_do_not_matter() -> None:
    x, y, x_mask, y_mask = problem(torch.float32, 9, 17, 40, 33)
    call = lambda: with_gradients(lambda x, y: ipot(x, y, x_mask, y_mask, impl="cpp"), (x, y))
    one, before = call(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = call()
    finally:
        torch.set_num_threads(before)
    assert_same(three, one)


@pytest.mark.parametrize(("impl", "device"), KERNELS)
def test_packed_sequence_is_read_in_place(impl, device) -> None:
    """[text | image] in one tensor, told apart by masks; strided views; all without a copy."""
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    packed = torch.cat([x, y], 1)
    none = lambda mask: torch.zeros_like(mask)
    masks = (torch.cat([x_mask, none(y_mask)], 1), torch.cat([none(x_mask), y_mask], 1))
    wanted = ipot(x, y, x_mask, y_mask, return_plan=True, impl=impl)
    out = ipot(packed, packed, *masks, return_plan=True, impl=impl)
    assert_same(out.plan[:, :6, 6:], wanted.plan)
    assert_same(out.distance, wanted.distance)
    views = (packed[:, :6], packed.transpose(0, 1).contiguous().transpose(0, 1)[:, 6:])
    assert_same(ipot(*views, x_mask, y_mask, impl=impl).distance, wanted.distance)
    (grad,) = with_gradients(lambda p: ipot(p, p, *masks, impl=impl).distance, (packed,))[1]
    parts = with_gradients(lambda x, y: ipot(x, y, x_mask, y_mask, impl=impl).distance, (x, y))[1]
    assert_same(grad, torch.cat(parts, 1))
    one = x[:1].expand(4, -1, -1)
    assert_same(ipot(one, y, impl=impl).distance, ipot(one.contiguous(), y, impl=impl).distance)


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("beta", [0.5, 0.05], ids=["scaling", "log"])
def test_not_a_number_stays_in_its_problem(impl, device, beta) -> None:
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    clean = ipot(x, y, x_mask, y_mask, beta=beta, impl=impl)
    for junk in (math.nan, math.inf):
        dirty = x.clone()
        dirty[1, 2, 3] = junk
        call = lambda x, y: ipot(x, y, x_mask, y_mask, beta=beta, tol=1e-12, impl=impl).distance
        (distance,), grads = with_gradients(call, (dirty, y))
        others = [0, 2, 3]
        assert distance[1].isnan()
        assert_same(distance[others], clean.distance[others], exact=impl != "reference")
        assert grads[1][1].isnan().any()
        assert all(grad[others].isfinite().all() for grad in grads)


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("beta", [0.5, 0.05], ids=["scaling", "log"])
def test_tolerance_stops_each_problem_alone(impl, device, beta) -> None:
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    y[2] = y[2, :1]  # one cost in all columns: the first step is the last that moves
    x_mask[3] = False
    options = {"beta": beta, "iters": 300, "return_plan": True}
    out = ipot(x, y, x_mask, y_mask, tol=1e-3, impl=impl, **options)
    counts = out.num_iters.tolist()
    assert counts[3] == 0
    assert 1 <= counts[2] <= 2 < counts[0] < 300
    wide = ipot(x.double(), y.double(), x_mask, y_mask, tol=1e-3, impl="reference", **options)
    for b in range(3):
        # The stop compares rounded numbers: a step earlier or later may be right.
        assert abs(counts[b] - wide.num_iters[b].item()) <= 1
        fixed = ipot(
            x[b : b + 1], y[b : b + 1], x_mask[b : b + 1], y_mask[b : b + 1],
            beta=beta, iters=counts[b], return_plan=True, impl=impl,
        )  # fmt: skip
        for field in ("distance", "plan", "f", "g"):
            stopped, ran = getattr(out, field)[b], getattr(fixed, field)[0]
            torch.testing.assert_close(stopped, ran, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("impl", "device"), KERNELS)
def test_only_what_is_needed(impl, device) -> None:
    """One side's gradient, no gradient, and a second backward through one graph."""
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    both = with_gradients(lambda x, y: ipot(x, y, x_mask, y_mask, impl=impl).distance, (x, y))[1]
    for side in range(2):
        inputs = [x.clone(), y.clone()]
        inputs[side].requires_grad_()
        distance = ipot(*inputs, x_mask, y_mask, impl=impl).distance.sum()
        first = torch.autograd.grad(distance, inputs[side], retain_graph=True)[0]
        assert_same(first, both[side])
        assert_same(torch.autograd.grad(distance, inputs[side])[0], both[side])
    with torch.no_grad():
        out = ipot(x.requires_grad_(), y, x_mask, y_mask, impl=impl)
    assert not out.distance.requires_grad
    out = ipot(x, y, x_mask, y_mask, return_plan=True, impl=impl)
    assert out.distance.requires_grad
    assert not any(t.requires_grad for t in (out.plan, out.f, out.g, out.num_iters))


@pytest.mark.parametrize(("impl", "device"), routes("cpp", "cuda"))
def test_registration_and_poison(impl, device) -> None:
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    x_mask[2] = False
    kernels = torch.ops.vlpfast
    for masks in ((x_mask, y_mask), (None, None)):
        for tol in (None, 1e-3):
            opcheck(kernels.ipot_fwd.default, x, y, *masks, 0.5, 4, 2, tol)
        with poisoned_allocations():
            distance, plan, f, g, num_iters = kernels.ipot_fwd(x, y, *masks, 0.5, 4, 1, None)
        assert all(t.isfinite().all() for t in (distance, plan, f, g))
        assert set(num_iters.tolist()) <= {0, 4}
        args = (distance, x.bfloat16(), y.bfloat16(), *masks, plan)
        opcheck(kernels.ipot_bwd.default, *args, True, False)
        with poisoned_allocations():
            grads = kernels.ipot_bwd(*args, True, True)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("impl", "device"), ROUTES)
def test_compiles(impl, device) -> None:
    if impl == "triton" and device.type == "cpu":
        pytest.skip("the interpreter is no code to compile")
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    distance = lambda x, y, m: ipot(x, y, m, y_mask, iters=3, impl=impl).distance
    assert_compiles(distance, x.requires_grad_(), y.requires_grad_(), x_mask)
    assert_compiles(distance, x.detach(), y, None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 6)}, ValueError, r"x must be 3-d \(B, tokens, D\), got \(4, 6\)"),
        ({"x": torch.zeros(4, 6, 7)}, ValueError, r"share B and D, got \(4, 6, 7\) and "),
        ({"y": torch.zeros(4, 9, 8).int()}, TypeError, "y must be floating point"),
        ({"x_mask": torch.ones(4, 6)}, TypeError, r"x_mask must be bool \(True = valid\)"),
        ({"y_mask": torch.ones(4, 6).bool()}, ValueError, r"y_mask .* \(4, 9\), got \(4, 6\)"),
        ({"x": torch.zeros(4, 6, 0), "y": torch.zeros(4, 9, 0)}, ValueError, "must have D >= 1"),
        ({"y": torch.zeros(4, 9, 8, device="meta")}, ValueError, "y must be on cpu .* got meta"),
        ({"x_mask": torch.ones(4, 6, device="meta").bool()}, ValueError, "x_mask must be on cpu"),
        ({"beta": 0.0}, ValueError, "beta must be > 0, got 0.0"),
        ({"beta": math.nan}, ValueError, "beta must be > 0, got nan"),
        ({"beta": math.inf}, ValueError, "beta must be finite, got inf"),
        ({"tol": -1e-3}, ValueError, "tol must be > 0, got -0.001"),
        ({"iters": 0}, ValueError, "iters must be >= 1, got 0"),
        ({"inner": 0}, ValueError, "inner must be >= 1, got 0"),
        ({"impl": "pot"}, ValueError, "ipot: impl must be 'auto' or one of"),
    ],
)  # fmt: skip
def test_ipot_errors(change: dict, error: type, message: str) -> None:
    x, y, x_mask, y_mask = problem()
    with pytest.raises(error, match=message):
        ipot(**({"x": x, "y": y, "x_mask": x_mask, "y_mask": y_mask} | change))


def test_an_explicit_impl_runs_or_says_why_not() -> None:
    x, y, _, _ = problem()
    with pytest.raises(NotImplementedError, match="takes float32, bfloat16, float16, got float64"):
        ipot(x, y, impl="cpp")
    with pytest.raises(NotImplementedError, match="impl='cuda' cannot run"):
        ipot(x, y, impl="cuda")
    mixed = ipot(x.bfloat16(), y.float())
    assert_same(mixed.distance, ipot(x.bfloat16().float(), y.float()).distance)
