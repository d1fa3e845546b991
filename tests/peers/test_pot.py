"""What POT's tests check, in our own words: ops.sinkhorn and IPOT against ot.solve and ot.emd."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from tests.peers import _pot
from vlpfast import ops
from vlpfast.integrations import uniter
from vlpfast.testing import with_gradients


def costs(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).rand(*shape))


def histograms(B: int, n: int, seed: int) -> Tensor:
    weights = costs(B, n, seed=seed) + 0.1
    return weights / weights.sum(1, keepdim=True)


def solve(M: Tensor, a: Tensor | None = None, b: Tensor | None = None, **options):
    """POT on one problem of the batch, to convergence."""
    return ot.solve(M.numpy(), *(None if w is None else w.numpy() for w in (a, b)), **options)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("reg", [1.0, 0.1])
@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_plan_and_value_of_a_batch(uniform: bool, reg: float, reg_type: str) -> None:
    """Four problems of 16 x 16: plan to 1e-5; the value of either kind of regularisation."""
    M = costs(4, 16, 16)
    a, b = (None, None) if uniform else (histograms(4, 16, 1), histograms(4, 16, 2))
    ours = _pot.solve_batch(M, reg, a, b, max_iter=10000, reg_type=reg_type.lower())
    for i in range(4):
        weights = (None, None) if uniform else (a[i], b[i])
        truth = solve(M[i], *weights, reg=reg, reg_type=reg_type, tol=1e-12, max_iter=10000)
        np.testing.assert_allclose(ours.plan[i], truth.plan, atol=1e-5 * truth.plan.max())
        np.testing.assert_allclose(ours.value_linear[i], truth.value_linear, rtol=1e-6)
        np.testing.assert_allclose(ours.value[i], truth.value, rtol=1e-6)


def test_a_problem_does_not_know_its_batch() -> None:
    """Each stops by itself: alone and in a batch with a harder one, the same bits."""
    M = costs(3, 16, 16) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    batch = ops.sinkhorn(M, eps=0.1, iters=500, tol=1e-9, return_plan=True)
    assert len(set(batch.num_iters.tolist())) > 1
    for i in range(3):
        alone = ops.sinkhorn(M[i : i + 1], eps=0.1, iters=500, tol=1e-9, return_plan=True)
        assert torch.equal(alone.plan[0], batch.plan[i])


@pytest.mark.parametrize("weights", [None, []], ids=["none", "empty"])
def test_no_weights_are_uniform(weights: list | None) -> None:
    M = costs(9, 12).numpy()
    plan = _pot.sinkhorn(weights, weights, M, 0.5, stopThr=1e-12)
    np.testing.assert_allclose(plan.sum(1), 1 / 9, atol=1e-12)
    np.testing.assert_allclose(plan.sum(0), 1 / 12, atol=1e-12)
    np.testing.assert_allclose(plan, solve(torch.from_numpy(M), reg=0.5, tol=1e-12).plan, atol=1e-9)


def test_zero_weights_leave_points_out() -> None:
    """As if they were not there: a batch's padding."""
    M = costs(1, 8, 10)
    a, b = histograms(1, 8, 1), histograms(1, 10, 2)
    a[0, [2, 7]], b[0, [0, 4]] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    rows, columns = a[0] > 0, b[0] > 0
    padded = ops.sinkhorn(M, a, b, eps=0.2, iters=2000, tol=1e-14, return_plan=True)
    trimmed = solve(M[0][rows][:, columns], a[0][rows], b[0][columns], reg=0.2, tol=1e-13)
    np.testing.assert_allclose(padded.plan[0][rows][:, columns], trimmed.plan, atol=1e-10)
    assert padded.plan[0][~rows].sum() == padded.plan[0][:, ~columns].sum() == 0


def test_several_right_hand_sides() -> None:
    """The columns of b are problems of one batch: losses, in the order of the columns."""
    M = costs(7, 9).numpy()
    b = histograms(3, 9, 4).numpy()
    losses = _pot.sinkhorn(None, b.T, M, 0.3, stopThr=1e-12)
    expected = [ot.solve(M, None, row, reg=0.3, tol=1e-12).value_linear for row in b]
    np.testing.assert_allclose(losses, expected, rtol=1e-8)


@pytest.mark.skipif(not _pot.HAS_START, reason="ops.sinkhorn has no warm start")
def test_warm_start() -> None:
    """The same plan from the exact problem's dual as from zero; from the answer, at once."""
    M = torch.from_numpy(ot.dist(np.arange(10.0)[:, None], np.arange(20.0)[:, None]))
    _, log = ot.lp.emd([], [], M.numpy(), log=True)
    cold = ops.sinkhorn(M[None], eps=1.0, iters=5000, tol=1e-10, return_plan=True)
    duals = torch.from_numpy(log["u"])[None]
    warm, again = (
        ops.sinkhorn(M[None], eps=1.0, iters=5000, tol=1e-10, return_plan=True, f=start)
        for start in (duals, cold.f)
    )
    torch.testing.assert_close(warm.plan, cold.plan, rtol=0, atol=1e-8)
    torch.testing.assert_close(again.plan, cold.plan, rtol=0, atol=1e-8)
    assert again.num_iters.item() <= 2 < cold.num_iters.item()


def test_gradient_of_the_value() -> None:
    """Envelope theorem: in the cost it is the plan, in the weights the centred potentials, as POT
    gets it by differentiating all its iterations."""
    M, a, b = costs(10, 7), histograms(1, 10, 1)[0], histograms(1, 7, 2)[0]

    def ours(M: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.sinkhorn(M[None], a[None], b[None], eps=1.0, iters=200, tol=1e-14).value

    def theirs(M: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ot.solve(M, a, b, reg=1.0, grad="autodiff", tol=1e-14, max_iter=200).value

    (value,), grads = with_gradients(ours, (M, a, b))
    (truth,), true_grads = with_gradients(theirs, (M, a, b))
    torch.testing.assert_close(value[0], truth, rtol=1e-9, atol=0)
    torch.testing.assert_close(grads[0], true_grads[0], rtol=1e-6, atol=1e-9)
    for one, other in zip(grads[1:], true_grads[1:], strict=True):
        # Weights of mass 1 have gradients up to a constant.
        torch.testing.assert_close(one - one.mean(), other - other.mean(), rtol=1e-6, atol=1e-9)


def test_gradient_modes() -> None:
    """'detach' and 'envelope' as POT means them."""
    M = costs(2, 4, 5).requires_grad_()
    detached = _pot.solve_batch(M, 0.1, grad="detach")
    assert not detached.value.requires_grad
    assert not detached.value_linear.requires_grad
    envelope = _pot.solve_batch(M, 0.1, grad="envelope", max_iter=5000, tol=1e-9, reg_type="kl")
    (grad,) = torch.autograd.grad(envelope.value.sum(), M)
    torch.testing.assert_close(grad, envelope.plan, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("mode", ["autodiff", "last_step"])
def test_gradient_of_the_plan(mode: str) -> None:
    """POT differentiates all iterations; where they have converged, so is the implicit gradient.
    An op without one says so."""
    M, weights = costs(1, 4, 5), costs(1, 4, 5, seed=1)

    def ours(M: Tensor) -> Tensor:
        plan = _pot.solve_batch(M, 0.5, grad=mode, max_iter=2000, tol=1e-9).plan
        return (plan * weights).sum()

    def theirs(M: Tensor) -> Tensor:
        plan = ot.solve(M[0], reg=0.5, grad="autodiff", max_iter=200, tol=1e-15).plan
        return (plan * weights[0]).sum()

    if not _pot.HAS_PLAN_GRADIENT:
        with pytest.raises(_pot.NotOurs, match="the plan carries no gradient"):
            with_gradients(ours, (M,))
        return
    torch.testing.assert_close(
        with_gradients(ours, (M,))[1], with_gradients(theirs, (M,))[1], rtol=1e-6, atol=1e-10
    )


@pytest.mark.parametrize("reg_m", [(1.0, 1.0), (0.3, np.inf), (np.inf, np.inf)], ids=str)
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_unbalanced(reg_m: tuple[float, float], reg_type: str) -> None:
    """Plan and mass of POT's unbalanced problem, with more mass in b than in a."""
    M, a, b = costs(20, 30).numpy(), np.full(20, 1 / 20), np.full(30, 1.5 / 30)
    b = b if np.isfinite(reg_m).any() else b / 1.5
    options = {"reg": 0.5, "reg_m": reg_m, "reg_type": reg_type}
    plan, log = _pot.sinkhorn_unbalanced(a, b, M, **options, numItermax=5000, log=True)
    truth = ot.unbalanced.sinkhorn_unbalanced(
        a, b, M, **options, numItermax=5000, stopThr=1e-13, method="sinkhorn_stabilized"
    )
    np.testing.assert_allclose(plan, truth, atol=1e-5 * truth.max())
    np.testing.assert_allclose(plan.sum(), truth.sum(), rtol=1e-5)
    # The fixed point: u = tau_a / (tau_a + reg) * (log a - log sum_j c_ij / a_i ... v_j).
    damp = [1.0 if np.isinf(tau) else tau / (tau + 0.5) for tau in reg_m]
    c = np.outer(a, b) if reg_type == "kl" else np.ones_like(M)
    kernel = c * np.exp(-M / 0.5)
    u = damp[0] * np.log(a / (kernel @ np.exp(log["logv"])))
    v = damp[1] * np.log(b / (kernel.T @ np.exp(log["logu"])))
    np.testing.assert_allclose(u, log["logu"], atol=1e-6)
    np.testing.assert_allclose(v, log["logv"], atol=1e-6)


def test_unbalanced_limits() -> None:
    """A growing penalty tends to the balanced problem as 1 / penalty; one number is both sides'."""
    M = costs(6, 8).numpy()
    options = {"reg": 0.5, "numItermax": 2000}
    balanced = _pot.sinkhorn(None, None, M, 0.5)
    errors = [
        np.abs(_pot.sinkhorn_unbalanced(None, None, M, reg_m=tau, **options) - balanced).max()
        for tau in (10.0, 100.0)
    ]
    assert 1e-6 < errors[1] < 2e-4
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.15)
    one = _pot.sinkhorn_unbalanced2(None, None, M, reg_m=2.0, **options)
    two = _pot.sinkhorn_unbalanced2(None, None, M, reg_m=[2.0, 2.0], **options)
    assert one == two


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_log_cross_ratio(steps: int) -> None:
    """Of a 2 x 2 plan, scaling rows and columns leaves P00 P11 / (P01 P10): it says how far, and in
    which direction, the cost has acted. IPOT acts once per step; a wrong sign would alternate."""
    M = torch.tensor([[[0.2, 0.9], [0.7, 0.3]]], dtype=torch.float64)
    tilt = (M[0, 0, 1] + M[0, 1, 0] - M[0, 0, 0] - M[0, 1, 1]).item()

    def ratio(plan: Tensor) -> float:
        P = plan[0]
        return (P[0, 0] * P[1, 1] / (P[0, 1] * P[1, 0])).log().item()

    none, lengths = torch.zeros(1, 2, dtype=torch.bool), torch.full((1,), 2.0)
    joint = torch.zeros(1, 2, 2, dtype=torch.bool)
    plan = uniter.ipot(M, lengths, none, lengths, none, joint, 2.0, steps, 1)
    assert ratio(plan) == pytest.approx(steps * tilt / 2.0, rel=1e-9)
    plan = ops.sinkhorn(M, eps=0.4, iters=steps, return_plan=True).plan
    assert ratio(plan) == pytest.approx(tilt / 0.4, rel=1e-9)
    # From features: C = 1 - cosine.
    x = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]], dtype=torch.float64)
    y = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]], dtype=torch.float64)
    C = uniter.cost_matrix_cosine(x, y)[0]
    tilt = (C[0, 1] + C[1, 0] - C[0, 0] - C[1, 1]).item()
    plan = ops.ipot(x, y, beta=2.0, iters=steps, return_plan=True).plan
    assert ratio(plan) == pytest.approx(steps * tilt / 2.0, rel=1e-9)


@pytest.mark.parametrize("inner", [1, 5])
def test_ipot_reaches_the_exact_plan(inner: int) -> None:
    """Many steps end in the plan of the linear programme."""
    M = costs(3, 5, 7)
    ours = _pot.solve_batch(M, method="proximal", max_iter=1000, inner_reg=0.1, inner_iter=inner)
    for i in range(3):
        plan = ot.emd([], [], M[i].numpy())
        np.testing.assert_allclose(ours.plan[i], plan, atol=1e-5)


def test_bad_input() -> None:
    """eps = 0 is an error where POT returns NaN with a warning."""
    with pytest.raises(ValueError, match="eps must be > 0"):
        _pot.sinkhorn(None, None, costs(3, 3), 0)
    with pytest.raises(ValueError, match="eps must be > 0"):
        _pot.solve_batch(costs(1, 3, 3), None, method="sinkhorn")
    with pytest.raises(_pot.NotOurs, match="no regularisation"):
        _pot.solve_batch(costs(1, 3, 3), 0.1, method="proximal")
