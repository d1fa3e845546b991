"""sinkhorn against POT, and its implementations against the fp64 reference."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests._transport import make, masses, routes_of
from vlpfast.ops.transport import _SINKHORN, sinkhorn
from vlpfast.testing import (
    assert_compiles,
    assert_same,
    opcheck,
    poisoned_allocations,
    routes,
    with_gradients,
)

ROUTES = routes_of(_SINKHORN)
KERNELS = routes_of(_SINKHORN, "reference")


def test_sinkhorn_matches_pot() -> None:
    cost, a, b = masses(0)
    output = sinkhorn(cost, a, b, eps=0.1, iters=2000, return_plan=True)
    for i in range(3):
        plan = ot.sinkhorn(
            *(t[i].numpy() for t in (a, b, cost)), 0.1,
            method="sinkhorn_log", numItermax=5000, stopThr=1e-14,
        )  # fmt: skip
        torch.testing.assert_close(output.plan[i], torch.from_numpy(plan), rtol=1e-8, atol=1e-12)
        linear = (plan * cost[i].numpy()).sum()
        assert output.distance[i].item() == pytest.approx(linear, rel=1e-9)
        relative = plan * np.log(plan / np.outer(a[i], b[i]))
        assert output.value[i].item() == pytest.approx(linear + 0.1 * relative.sum(), rel=1e-9)
    torch.testing.assert_close(output.plan.sum(2), a, rtol=1e-9, atol=0)
    torch.testing.assert_close(output.plan.sum(1), b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("tau", [(0.2, 0.2), (0.05, 1.0), (None, 0.3)])
def test_unbalanced_matches_pot(tau: tuple[float | None, float | None]) -> None:
    cost, a, b = masses(1)
    b = 1.5 * b
    output = sinkhorn(cost, a, b, eps=0.1, iters=2000, tau_a=tau[0], tau_b=tau[1], return_plan=True)
    kl = lambda p, q: (p * (p / q).log() - p + q).sum()
    for i in range(3):
        plan = ot.unbalanced.sinkhorn_unbalanced(
            *(t[i].numpy() for t in (a, b, cost)), 0.1,
            tuple(math.inf if t is None else t for t in tau), numItermax=10000, stopThr=1e-15,
        )  # fmt: skip
        plan = torch.from_numpy(plan)
        torch.testing.assert_close(output.plan[i], plan, rtol=1e-7, atol=1e-12)
        assert output.plan[i].sum().item() == pytest.approx(plan.sum().item(), rel=1e-9)
        primal = (plan * cost[i]).sum() + 0.1 * kl(plan, torch.outer(a[i], b[i]))
        for t, marginal, weight in ((tau[0], plan.sum(1), a[i]), (tau[1], plan.sum(0), b[i])):
            primal += 0 if t is None else t * kl(marginal, weight)
        torch.testing.assert_close(output.value[i], primal, rtol=1e-8, atol=0)


@pytest.mark.parametrize("tau", [None, 0.3])
def test_value_gradients_are_the_envelopes(tau: float | None) -> None:
    """Finite differences of the converged solver agree with the gradients at fixed potentials."""
    cost, a, b = masses(2, B=1, M=3, N=4)

    def value(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if tau is None:
            # Stay on the set where the balanced problem has a solution.
            a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
        return sinkhorn(cost, a, b, eps=0.5, iters=60, tau_a=tau, tau_b=tau).value

    assert torch.autograd.gradcheck(value, [x.requires_grad_() for x in (cost, a, b)])
    output = sinkhorn(cost, a, b, eps=0.5, iters=60, tau_a=tau, tau_b=tau, return_plan=True)
    for scalar in (output.value, output.distance):
        (grad,) = torch.autograd.grad(scalar.sum(), cost, retain_graph=True)
        torch.testing.assert_close(grad, output.plan, rtol=1e-9, atol=1e-12)


def test_zero_weights_leave_out() -> None:
    cost, a, b = masses(3)
    padded_cost = torch.cat([cost, make(3, 2, 7, seed=9).abs()], 1)
    padded_a = torch.cat([a, torch.zeros(3, 2, dtype=a.dtype)], 1)
    expected = sinkhorn(cost, a, b, eps=0.05, return_plan=True)
    padded = sinkhorn(padded_cost, padded_a, b, eps=0.05, return_plan=True)
    torch.testing.assert_close(padded.plan[:, :5], expected.plan, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(padded.value, expected.value, rtol=1e-12, atol=0)
    assert (padded.plan[:, 5:] == 0).all()
    for tau in (None, 0.2):
        empty = sinkhorn(cost, torch.zeros_like(a), b, eps=0.05, tau_a=tau, return_plan=True)
        assert all(field.isfinite().all() for field in empty)
        assert (empty.plan == 0).all()
        assert (empty.value == 0).all()
    assert sinkhorn(cost[:, :0], eps=0.1).value.tolist() == [0.0] * 3


def test_tolerance_stops_each_problem_alone() -> None:
    cost, a, b = masses(4)
    # The second problem is nearly solved by the first iteration.
    cost[1] *= 1e-3
    together = sinkhorn(cost, a, b, eps=0.1, iters=500, tol=1e-6)
    alone = [sinkhorn(cost[i : i + 1], a[i : i + 1], b[i : i + 1], eps=0.1, iters=500, tol=1e-6)
             for i in range(3)]  # fmt: skip
    assert together.num_iters.tolist() == [int(out.num_iters) for out in alone]
    assert together.num_iters[1] < together.num_iters[0] < 500
    torch.testing.assert_close(
        together.value, torch.cat([out.value for out in alone]), rtol=1e-12, atol=0
    )
    assert sinkhorn(cost, a, b, eps=0.1, iters=7).num_iters.tolist() == [7, 7, 7]


def test_small_eps_in_fp32() -> None:
    """exp(-C / eps) is 0 everywhere here; potentials do not mind."""
    cost, a, b = (x.float() for x in masses(5))
    output = sinkhorn(10 + cost, a, b, eps=0.01, iters=3000, return_plan=True)
    exact = [ot.emd2(a[i].double().numpy(), b[i].double().numpy(), cost[i].double().numpy())
             for i in range(3)]  # fmt: skip
    np.testing.assert_allclose(output.distance.numpy() - 10, exact, rtol=0.03)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), M=st.integers(1, 5), N=st.integers(1, 5))
def test_sinkhorn_marginals(seed: int, M: int, N: int) -> None:
    cost, a, b = masses(seed, B=2, M=M, N=N)
    output = sinkhorn(cost, a, b, eps=0.5, iters=300, return_plan=True)
    torch.testing.assert_close(output.plan.sum(2), a, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.plan.sum(1), b, rtol=1e-6, atol=1e-8)
    mirrored = sinkhorn(cost.mT, b, a, eps=0.5, iters=300)
    torch.testing.assert_close(mirrored.value, output.value, rtol=1e-8, atol=1e-10)


def test_sinkhorn_compiles() -> None:
    cost = masses(0)[0].float().requires_grad_()
    for impl in ("reference", "cpp"):
        call = lambda cost, impl=impl: sinkhorn(
            cost, eps=0.1, iters=2, dustbin=0.5, return_plan=True, impl=impl
        )
        assert_compiles(lambda cost, call=call: call(cost).value, cost)
        assert_compiles(lambda cost, call=call: call(cost).plan.square().sum(), cost)


@pytest.mark.parametrize(("impl", "device"), KERNELS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 16, 16), (2, 33, 15), (2, 1, 40)])
@pytest.mark.parametrize("eps", [0.5, 0.1, 0.01], ids=["wide", "scaling", "log"])
@pytest.mark.parametrize("tau", [(None, None), (0.3, None), (0.1, 1.0)])
def test_fp32_matches_fp64(impl, device, shape, eps, tau) -> None:
    """Everything that is returned, and the gradients of distance and value."""
    cost, a, b = (t.float().to(device) for t in masses(6, *shape))
    options = {"eps": eps, "iters": 40, "tau_a": tau[0], "tau_b": tau[1]}
    call = lambda impl: lambda *p: sinkhorn(*p, return_plan=True, impl=impl, **options)
    wide = [t.double().cpu() for t in (cost, a, b)]
    out, truth = call(impl)(cost, a, b), call("reference")(*wide)
    for name in ("distance", "value", "f", "g"):
        actual, expected = getattr(out, name).double().cpu(), getattr(truth, name)
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
    error = (out.plan.double().cpu() - truth.plan).abs().max() / truth.plan.max()
    assert error <= 1e-6 * max(10, 3 / eps)
    assert out.num_iters.tolist() == truth.num_iters.tolist()
    both = lambda impl: lambda *p: call(impl)(*p)[:2]
    weights = [make(shape[0], seed=s) for s in (7, 8)]
    grads = with_gradients(both(impl), (cost, a, b), [w.to(device) for w in weights])[1]
    wanted = with_gradients(both("reference"), wide, weights)[1]
    for grad, want in zip(grads, wanted, strict=True):
        bound = 1e-5 * want.abs().max().item() + 1e-6 / eps
        torch.testing.assert_close(grad.double().cpu(), want, rtol=0, atol=bound)


def unrolled(cost: Tensor, a: Tensor, b: Tensor, eps: float, tau: tuple, iters: int) -> Tensor:
    """The plan by plain iterations that autograd follows."""
    damp = [1.0 if t is None else t / (t + eps) for t in tau]
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iters):
        g = -damp[1] * eps * (a.log()[:, :, None] + (f[:, :, None] - cost) / eps).logsumexp(1)
        f = -damp[0] * eps * (b.log()[:, None] + (g[:, None] - cost) / eps).logsumexp(2)
    return a[:, :, None] * b[:, None] * ((f[:, :, None] + g[:, None] - cost) / eps).exp()


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("tau", [(None, None), (0.3, None), (0.2, 0.7)])
@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4), (2, 5, 5)])
def test_plan_gradient_is_that_of_the_converged_plan(impl, device, tau, shape) -> None:
    cost, a, b = masses(8, *shape)
    weights = make(*shape, seed=9)
    dtype = torch.float64 if impl == "reference" else torch.float32

    def normalised(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        # A balanced problem stays one.
        same = tau == (None, None)
        return (a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)) if same else (a, b)

    def implicit(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sinkhorn(
            cost, *normalised(a, b), eps=0.3, iters=400, tau_a=tau[0], tau_b=tau[1],
            return_plan=True, impl=impl,
        ).plan  # fmt: skip

    inputs = [t.to(dtype).to(device) for t in (cost, a, b)]
    grads = with_gradients(implicit, inputs, weights.to(dtype).to(device))[1]
    plain = lambda cost, a, b: unrolled(cost, *normalised(a, b), 0.3, tau, 400)
    wanted = with_gradients(plain, (cost, a, b), weights)[1]
    for grad, want in zip(grads, wanted, strict=True):
        scale = want.abs().max().item()
        bound = 1e-9 if impl == "reference" else 3e-5
        torch.testing.assert_close(grad.double().cpu(), want, rtol=0, atol=bound * scale)


def test_plan_gradient_with_zero_weights_and_twice() -> None:
    """What has no weight has no gradient; the plan may be used more than once."""
    cost, a, b = masses(10)
    a[:, 1] = 0
    a = a / a.sum(1, keepdim=True)
    call = lambda cost, a: sinkhorn(cost, a, b, eps=0.3, iters=300, return_plan=True).plan
    weights = make(3, 5, 7, seed=11)
    plan, (grad, grad_a) = with_gradients(call, (cost, a), weights)
    assert (grad[:, 1] == 0).all()
    assert (grad_a[:, 1] == 0).all()
    kept = [0, 2, 3, 4]
    short = with_gradients(call, (cost[:, kept], a[:, kept]), weights[:, kept])[1]
    torch.testing.assert_close(grad[:, kept], short[0], rtol=1e-9, atol=1e-12)
    cost = cost.requires_grad_()
    out = call(cost, a)
    loss = (out * weights).sum() + (out * out).sum()
    torch.autograd.grad(loss, cost, retain_graph=True)
    torch.testing.assert_close(plan[0], out.detach())


def superglue(scores: Tensor, alpha: Tensor, iters: int) -> Tensor:
    """Sarlin et al. 2020, appendix: log-domain iterations, rows first, dustbins of m and n."""
    B, m, n = scores.shape
    Z = torch.cat([scores, alpha.expand(B, m, 1)], 2)
    Z = torch.cat([Z, alpha.expand(B, 1, n + 1)], 1)
    log_mu, log_nu = scores.new_zeros(B, m + 1), scores.new_zeros(B, n + 1)
    log_mu[:, m], log_nu[:, n] = math.log(n), math.log(m)
    u, v = torch.zeros_like(log_mu), torch.zeros_like(log_nu)
    for _ in range(iters):
        u = log_mu - (Z + v[:, None]).logsumexp(2)
        v = log_nu - (Z + u[:, :, None]).logsumexp(1)
    return (Z + u[:, :, None] + v[:, None]).exp()


@pytest.mark.parametrize(("impl", "device"), ROUTES)
def test_dustbin_is_superglues(impl, device) -> None:
    """Its very iterations, if ours start from its v = 0 with the sides exchanged."""
    scores, alpha = 3 * make(2, 4, 6, seed=12), torch.tensor(0.7, dtype=torch.float64)
    dtype = torch.float64 if impl == "reference" else torch.float32
    start = torch.zeros(2, 7, dtype=torch.float64)
    start[:, 6] = -math.log(4)
    inputs = [t.to(dtype).to(device) for t in (scores, alpha)]
    match = lambda scores, alpha, iters: sinkhorn(
        -scores.mT, eps=1.0, iters=iters, dustbin=-alpha, f=start.to(scores), return_plan=True,
        impl=impl,
    ).plan.mT  # fmt: skip
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if impl == "reference" else {}
    for iters in (3, 100):
        wanted = superglue(scores, alpha, iters).to(inputs[0])
        torch.testing.assert_close(match(*inputs, iters), wanted, **tolerance)
    weights = make(2, 5, 7, seed=13)
    grads = with_gradients(lambda *p: match(*p, 200), inputs, weights.to(inputs[0]))[1]
    wanted = with_gradients(lambda *p: superglue(*p, 200), (scores, alpha), weights)[1]
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.cpu(), want.to(dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("eps", [0.2, 0.01], ids=["scaling", "log"])
def test_warm_start_goes_on(impl, device, eps) -> None:
    """Iterations from where others ended are those that would have followed."""
    cost, a, b = (t.float().to(device) for t in masses(14))
    run = lambda iters, f=None: sinkhorn(
        cost, a, b, eps=eps, iters=iters, f=f, return_plan=True, impl=impl
    )
    half = run(10)
    for name in ("plan", "f", "g", "value"):
        resumed, whole = getattr(run(10, half.f), name), getattr(run(20), name)
        torch.testing.assert_close(resumed, whole, rtol=3e-5, atol=3e-6)
    solved = sinkhorn(cost, a, b, eps=eps, iters=3000, tol=1e-6, impl=impl)
    again = sinkhorn(cost, a, b, eps=eps, iters=3000, tol=1e-5, f=solved.f, impl=impl)
    assert (again.num_iters <= 2).all()


@pytest.mark.parametrize(("impl", "device"), KERNELS)
@pytest.mark.parametrize("eps", [0.2, 0.01], ids=["scaling", "log"])
def test_bits_depend_on_the_problem_alone(impl, device, eps) -> None:
    """In a batch, beside others, padded by zero weights or not: the same bits."""
    cost, a, b = (t.float().to(device) for t in masses(15, 4, 9, 20))
    a[:, 3], b[:, ::4] = 0, 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    options = {"eps": eps, "iters": 200, "tol": 1e-4, "return_plan": True, "impl": impl}
    together = sinkhorn(cost, a, b, **options)
    junk = cost.clone()
    junk[:, 3], junk[:, :, ::4] = math.nan, math.inf
    assert_same(sinkhorn(junk, a, b, **options), together)
    rows, columns = a[0].nonzero()[:, 0], b[0].nonzero()[:, 0]
    for i in range(4):
        alone = sinkhorn(
            cost[i : i + 1, rows][:, :, columns], a[i : i + 1, rows], b[i : i + 1, columns],
            **options,
        )  # fmt: skip
        for name in ("distance", "value", "num_iters"):
            assert_same(getattr(alone, name)[0], getattr(together, name)[i])
        assert_same(alone.plan[0], together.plan[i][rows][:, columns])
    assert len(set(together.num_iters.tolist())) > 1


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("eps", [0.2, 0.01], ids=["scaling", "log"])
def test_extremes(impl, device, eps) -> None:
    """Weights that differ by 1e20, costs of 1e4 eps and costs that are all the same."""
    cost, a, b = (t.float().to(device) for t in masses(16))
    tiny = a.clone()
    tiny[:, 0] *= 1e-20
    tiny = tiny / tiny.sum(1, keepdim=True)
    for costs, weights in ((cost, tiny), (1e2 * cost, a), (torch.full_like(cost, 7.0), a)):
        out = sinkhorn(costs, weights, b, eps=eps, iters=50, return_plan=True, impl=impl)
        assert all(t.isfinite().all() for t in out)
        torch.testing.assert_close(out.plan.sum(2), weights, rtol=2e-3, atol=1e-6)
    bad = cost.clone()
    bad[1, 2, 3] = math.nan
    distance = sinkhorn(bad, a, b, eps=eps, tol=1e-9, impl=impl).distance
    assert distance.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("impl", "device"), routes("cpp", "cuda"))
def test_registration_and_poison(impl, device) -> None:
    if _SINKHORN.implementations[impl].missing() is not None:
        pytest.skip(_SINKHORN.implementations[impl].missing())
    cost, a, b = (t.float().to(device) for t in masses(17))
    a[0], b[1, 2] = 0, 0
    op = torch.ops.vlpfast.sinkhorn_fwd.default
    for options in ((None, None, None), (1e-3, 0.5, None)):
        for f in (None, torch.zeros_like(a)):
            opcheck(op, cost, a, b, f, 0.1, 5, *options)
            with poisoned_allocations():
                out = op(cost, a, b, f, 0.1, 5, *options)
            assert all(t.isfinite().all() for t in out)
            assert 0 <= out[5].min() <= out[5].max() <= 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cost": torch.zeros(5, 7)}, ValueError, r"cost must be \(B, M, N\), got \(5, 7\)"),
        ({"cost": torch.zeros(3, 5, 7).int()}, TypeError, "cost must be floating point"),
        ({"a": torch.zeros(3, 7)}, ValueError, r"a must be \(3, 5\), got \(3, 7\)"),
        ({"b": torch.zeros(5)}, ValueError, r"b must be \(3, 7\), got \(5,\)"),
        ({"eps": -1.0}, ValueError, "eps must be > 0, got -1.0"),
        ({"tol": 0.0}, ValueError, "tol must be > 0, got 0.0"),
        ({"tau_b": 0.0}, ValueError, "tau_b must be > 0, got 0.0"),
        ({"f": torch.zeros(3, 4)}, ValueError, r"f must be \(3, 5\), got \(3, 4\)"),
        ({"dustbin": torch.zeros(2)}, ValueError, r"dustbin must be a number or 0-d, got \(2,\)"),
        ({"b": torch.zeros(3, 7, device="meta")}, ValueError, "b must be on cpu .* got meta"),
        ({"iters": 0}, ValueError, "iters must be >= 1, got 0"),
    ],
)
def test_sinkhorn_errors(change: dict, error: type, message: str) -> None:
    cost, a, b = masses(0)
    with pytest.raises(error, match=message):
        sinkhorn(**({"cost": cost, "a": a, "b": b, "eps": 0.1} | change))
