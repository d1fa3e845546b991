"""ipot_from_cost: the recurrence of ipot on any cost."""

from __future__ import annotations

import math

import pytest
import torch

from tests._transport import make, problem, routes_of
from vlpfast.ops.transport import _IPOT_FROM_COST, ipot, ipot_from_cost
from vlpfast.testing import assert_compiles, opcheck, routes, with_gradients

ROUTES = routes_of(_IPOT_FROM_COST)


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["scaling", "log"])
def test_from_cost(impl, device, scale) -> None:
    """Any cost: the one of cosines gives ipot; a wide one, 2000 beta, is solved in logarithms."""
    x, y, x_mask, y_mask = (t.to(device) for t in problem(torch.float32))
    cost = 1 - torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
    wanted = ipot(x.double(), y.double(), x_mask, y_mask, beta=0.5 / scale, return_plan=True)
    junk = cost.masked_fill(~(x_mask[:, :, None] & y_mask[:, None]), math.nan)
    call = lambda cost: ipot_from_cost(scale * cost, x_mask, y_mask, return_plan=True, impl=impl)
    out = call(junk)
    loose = 1 if impl == "cpp" else 100
    torch.testing.assert_close(
        out.distance.double() / scale, wanted.distance, rtol=1e-6 * loose, atol=3e-7 * loose
    )
    error = (out.plan - wanted.plan).abs().max() / wanted.plan.max()
    assert error <= 1e-5 * scale
    (grad,) = with_gradients(lambda cost: call(cost).distance, (junk,))[1]
    torch.testing.assert_close(grad, scale * out.plan)
    assert ipot_from_cost(cost.to(torch.bfloat16), impl=impl).distance.dtype == torch.float32
    empty = ipot_from_cost(cost[:, :0], impl=impl)
    assert empty.distance.tolist() == [0.0] * 4


@pytest.mark.parametrize(("impl", "device"), ROUTES)
def test_potentials_and_counts(impl, device) -> None:
    """T = exp((f + g - C) / eps) / (m n), with eps of the steps that were taken."""
    cost = make(3, 5, 17, seed=1).abs().float().to(device)
    out = ipot_from_cost(cost, beta=0.3, tol=1e-2, return_plan=True, impl=impl)
    eps = 0.3 / out.num_iters[:, None, None]
    rebuilt = ((out.f[:, :, None] + out.g[:, None] - cost) / eps).exp() / (5 * 17)
    torch.testing.assert_close(rebuilt, out.plan, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(out.plan.sum(2), torch.full_like(out.f, 1 / 5))
    assert (out.num_iters < 50).all()


@pytest.mark.parametrize(("impl", "device"), routes("cpp", "cuda"))
def test_registration(impl, device) -> None:
    if (reason := _IPOT_FROM_COST.implementations[impl].missing()) is not None:
        pytest.skip(reason)
    cost, mask = make(2, 5, 7, seed=0).float().to(device), make(2, 5, seed=1).to(device) > -1
    opcheck(torch.ops.vlpfast.ipot_cost_fwd.default, cost, None, None, 0.5, 4, 1, None)
    opcheck(torch.ops.vlpfast.ipot_cost_fwd.default, cost, mask, None, 0.02, 4, 2, 1e-3)


def test_compiles() -> None:
    cost = make(2, 5, 7, seed=0).float().requires_grad_()
    for impl in ("reference", "cpp"):
        call = lambda cost, impl=impl: ipot_from_cost(cost, iters=2, impl=impl).distance
        assert_compiles(call, cost)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cost": torch.zeros(6, 9)}, ValueError, r"cost must be \(B, M, N\), got \(6, 9\)"),
        ({"cost": torch.zeros(2, 6, 9).int()}, TypeError, "cost must be floating point"),
        ({"x_mask": torch.ones(2, 9).bool()}, ValueError, r"x_mask .* \(2, 6\), got \(2, 9\)"),
        ({"y_mask": torch.ones(2, 9)}, TypeError, r"y_mask must be bool \(True = valid\)"),
        ({"beta": -1.0}, ValueError, "beta must be > 0, got -1.0"),
        ({"impl": "pot"}, ValueError, "ipot_from_cost: impl must be 'auto' or one of"),
    ],
)
def test_errors(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ipot_from_cost(**({"cost": torch.zeros(2, 6, 9)} | change))
