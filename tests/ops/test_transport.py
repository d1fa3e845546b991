"""ipot against UNITER's recurrence written out per sample, sinkhorn against POT."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlpfast.ops.transport import ipot, sinkhorn, wra_loss
from vlpfast.testing import assert_compiles, assert_same, assert_within_budget, with_gradients


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(
    dtype: torch.dtype = torch.float64, B: int = 4, M: int = 6, N: int = 9, D: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features that share prototypes, as tokens of one picture do, and masks with holes."""
    prototypes = make(4, D, seed=0)
    x = prototypes[torch.arange(B * M).reshape(B, M) % 4] + 0.5 * make(B, M, D, seed=1)
    y = prototypes[torch.arange(B * N).reshape(B, N) % 3] + 0.5 * make(B, N, D, seed=2)
    x_mask, y_mask = make(B, M, seed=3) > -0.8, make(B, N, seed=4) > -0.8
    x_mask[:, 0] = y_mask[:, 1] = True
    x_mask[1] = y_mask[1] = True
    return x.to(dtype), y.to(dtype), x_mask, y_mask


def uniter(
    x: Tensor, y: Tensor, beta: float = 0.5, iters: int = 50, inner: int = 1
) -> tuple[Tensor, Tensor]:
    """Distance and plan of one sample without padding, scalar by scalar over rows and columns."""
    n, m = len(x), len(y)
    C = torch.stack([torch.stack([1 - (u / u.norm()) @ (v / v.norm()) for v in y]) for u in x])
    A = (-C.detach() / beta).exp()
    T = torch.ones_like(A)
    sigma = torch.full((n,), 1 / n, dtype=A.dtype)
    for _ in range(iters):
        Q = A * T
        for _ in range(inner):
            delta = torch.stack([1 / (m * (Q[:, j] * sigma).sum()) for j in range(m)])
            sigma = torch.stack([1 / (n * (Q[i] * delta).sum()) for i in range(n)])
        T = torch.outer(sigma, delta) * Q
    return (C * T).sum(), T.detach()


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


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.05, 0.02, 0.005])
def test_small_beta_in_fp32(beta: float) -> None:
    """The scaling form alone would be silently wrong below 0.1 and NaN at 0.005."""
    x, y, x_mask, y_mask = problem(torch.float32)
    wide = problem()
    truth = torch.stack(
        [uniter(wide[0][b][x_mask[b]], wide[1][b][y_mask[b]], beta)[0] for b in range(4)]
    )
    distance = ipot(x, y, x_mask, y_mask, beta=beta).distance
    torch.testing.assert_close(distance.double(), truth, rtol=3e-4 if beta < 0.05 else 5e-5, atol=0)


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


def test_sinkhorn_compiles() -> None:
    cost = masses(0)[0].float().requires_grad_()
    assert_compiles(lambda cost: sinkhorn(cost, eps=0.1, iters=2).value, cost)


def test_wra_is_uniters() -> None:
    x, y, x_mask, y_mask = problem()
    matched = torch.tensor([True, False, False, True])
    d = [uniter(x[b][x_mask[b]], y[b][y_mask[b]])[0] for b in range(4)]
    loss = wra_loss(x, y, x_mask, y_mask, matched)
    expected = 0.1 * ((d[0] + d[3]) - (d[1] + d[2])) / (2 + 2)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(wra_loss(x, y, x_mask, y_mask, ~matched, weight=1.0), -10 * loss)
    assert wra_loss(x[:0], y[:0], None, None, matched[:0]) == 0


def masses(seed: int, B: int = 3, M: int = 5, N: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """cost, a, b with sum(a) = sum(b) = 1."""
    weights = [make(B, n, seed=seed + n).softmax(1) for n in (M, N)]
    return make(B, M, N, seed=seed).abs(), *weights


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 6)}, ValueError, r"x must be 3-d \(B, tokens, D\), got \(4, 6\)"),
        ({"x": torch.zeros(4, 6, 7)}, ValueError, r"share B and D, got \(4, 6, 7\) and "),
        ({"y": torch.zeros(4, 9, 8).int()}, TypeError, "y must be floating point"),
        ({"x_mask": torch.ones(4, 6)}, TypeError, r"x_mask must be bool \(True = valid\)"),
        ({"y_mask": torch.ones(4, 6).bool()}, ValueError, r"y_mask .* \(4, 9\), got \(4, 6\)"),
        ({"beta": 0.0}, ValueError, "beta must be > 0, got 0.0"),
        ({"iters": 0}, ValueError, "iters must be >= 1, got 0"),
        ({"inner": 0}, ValueError, "inner must be >= 1, got 0"),
        ({"impl": "pot"}, ValueError, "ipot: impl must be 'auto' or one of"),
    ],
)  # fmt: skip
def test_ipot_errors(change: dict, error: type, message: str) -> None:
    x, y, x_mask, y_mask = problem()
    with pytest.raises(error, match=message):
        ipot(**({"x": x, "y": y, "x_mask": x_mask, "y_mask": y_mask} | change))


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
        ({"iters": 0}, ValueError, "iters must be >= 1, got 0"),
    ],
)
def test_sinkhorn_errors(change: dict, error: type, message: str) -> None:
    cost, a, b = masses(0)
    with pytest.raises(error, match=message):
        sinkhorn(**({"cost": cost, "a": a, "b": b, "eps": 0.1} | change))


def test_wra_errors() -> None:
    x, y, x_mask, y_mask = problem()
    with pytest.raises(TypeError, match="matched must be bool"):
        wra_loss(x, y, x_mask, y_mask, torch.ones(4).long())
    with pytest.raises(ValueError, match=r"matched must be \(B,\) = \(4,\), got \(3,\)"):
        wra_loss(x, y, x_mask, y_mask, torch.ones(3).bool())
