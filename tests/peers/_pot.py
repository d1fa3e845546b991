"""POT's functions on `ops.sinkhorn` and UNITER's `ipot`: what POT's own tests are run against.

NumPy arrays and tensors of one problem, several right-hand sides or a batch come in; they go to
the op as one batch in fp64 and come back as they were. What POT has and the op does not raises
`NotOurs` with its reason, or is left to POT where a test uses it as the yardstick.

Letters: M = sources, N = targets of one problem, as in vlpfast/ops/transport.py.
"""

from __future__ import annotations

import inspect
import os
import warnings

import numpy as np
import ot
import ot.batch
import torch
from ot.utils import OTResult
from torch import Tensor

from vlpfast import ops
from vlpfast.integrations import uniter
from vlpfast.ops.transport import TransportOutput

# POT's own, before anything is replaced.
_SINKHORN, _SINKHORN2, _SOLVE = ot.sinkhorn, ot.sinkhorn2, ot.solve
_UNBALANCED = ot.unbalanced.sinkhorn_unbalanced
_UNBALANCED2 = ot.unbalanced.sinkhorn_unbalanced2
_OURS = ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "log_sinkhorn")
# The op runs in this; POT's tests are fp64, which only the reference takes.
DTYPE = getattr(torch, os.environ.get("VLPFAST_POT_DTYPE", "float64"))
# What ops.sinkhorn may have: a potential to start from, and a plan that is differentiated.
HAS_START = "f" in inspect.signature(ops.sinkhorn).parameters
HAS_PLAN_GRADIENT = ops.sinkhorn(
    torch.zeros(1, 1, 1, requires_grad=True), eps=1.0, iters=1, return_plan=True
).plan.requires_grad
# How often the op was called, so that a run can show that it was.
calls = 0


class NotOurs(NotImplementedError):
    """A feature of POT's that the op does not have."""


def _solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    reg: float,
    max_iter: int,
    tol: float,
    *,
    taus: tuple[float | None, float | None] = (None, None),
    start: Tensor | None = None,
) -> TransportOutput:
    """One call of the op; POT's `tol` bounds marginals, so the potentials get a closer one."""
    global calls
    calls += 1
    dtype, options = cost.dtype, {}
    cost, a, b = cost.to(DTYPE), a.to(DTYPE), b.to(DTYPE)
    if start is not None:
        if not HAS_START:
            raise NotOurs("ops.sinkhorn has no warm start")
        options["f"] = start.to(DTYPE).expand_as(a)
    out = ops.sinkhorn(
        cost, a, b, eps=reg, iters=max_iter, tol=1e-3 * min(tol, 1e-6) * reg or None,
        tau_a=taus[0], tau_b=taus[1], return_plan=True, **options,
    )  # fmt: skip
    return TransportOutput(*(x.to(dtype) for x in out[:-1]), out.num_iters)


def _tensor(x: object, *, like: Tensor | None = None) -> Tensor:
    tensor = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
    return tensor if like is None else tensor.to(like)


def _weights(w: object, size: int, cost: Tensor) -> Tensor:
    """(size, k) weights; None or nothing at all is uniform."""
    if w is None or len(w) == 0:
        return torch.full((size, 1), 1 / size, dtype=cost.dtype, device=cost.device)
    w = _tensor(w, like=cost)
    return w if w.dim() == 2 else w[:, None]


def _like(x: Tensor, example: object) -> object:
    return x if isinstance(example, Tensor) else x.detach().numpy()


def _problems(a: object, b: object, M: object) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Cost (k, M, N) and weights of the k columns of b; whether b had columns."""
    cost = _tensor(M)
    a, b = _weights(a, cost.shape[0], cost), _weights(b, cost.shape[1], cost)
    k = b.shape[1]
    several = k > 1
    return cost.expand(k, *cost.shape), a.T.expand(k, -1), b.T, several


def solve_batch(
    M, reg=None, a=None, b=None, max_iter=1000, tol=1e-5, method="auto", inner_iter=1,
    inner_reg=1e-3, reg_type="entropy", grad="envelope", solver=None,
):  # fmt: skip
    """ot.batch.solve_batch; `solver` is what its `method` was called before 0.9.7."""
    method = solver or method
    if method == "auto":
        method = "log_sinkhorn" if reg else "proximal"
    cost = _tensor(M)
    a, b = (
        torch.full((len(cost), n), 1 / n, dtype=cost.dtype) if w is None else _tensor(w, like=cost)
        for w, n in ((a, cost.shape[1]), (b, cost.shape[2]))
    )
    cost = cost.detach() if grad == "detach" else cost
    if method == "proximal":
        out = _proximal(cost, reg, inner_reg, inner_iter, max_iter)
        plan, linear, value = out, (cost * out).sum((1, 2)), None
        potentials = None
    else:
        out = _solve(cost, a, b, reg or 0, max_iter, tol)
        plan, linear, value, potentials = out.plan, out.distance, out.value, (out.f, out.g)
        if reg_type == "entropy":
            value = value + reg * (torch.xlogy(a, a).sum(1) + torch.xlogy(b, b).sum(1))
    if grad in ("autodiff", "last_step") and cost.requires_grad and not plan.requires_grad:
        raise NotOurs("the plan carries no gradient; `value` has the exact one (envelope theorem)")
    if grad == "envelope":
        plan = plan.detach()
    fields = {"value": value, "value_linear": linear, "plan": plan}
    fields = {key: None if x is None else _like(x, M) for key, x in fields.items()}
    return OTResult(**fields, potentials=potentials, backend=ot.backend.get_backend(M))


def _proximal(cost: Tensor, reg: float | None, beta: float, inner: int, iters: int) -> Tensor:
    """POT's proximal method is IPOT with its rows first: UNITER's with the sides exchanged.

    In the limit the step does not matter, on the way it does: with UNITER's warm start and POT's
    default of 1e-3 the recurrence stalls with one marginal wrong by 0.09, here as in NumPy.
    """
    global calls
    if reg:
        raise NotOurs("IPOT here has no regularisation of its own")
    calls += 1
    B, M, N = cost.shape
    pads = (cost.new_zeros(B, N, dtype=torch.bool), cost.new_zeros(B, M, dtype=torch.bool))
    lengths = (cost.new_full((B,), N), cost.new_full((B,), M))
    joint = cost.new_zeros(B, N, M, dtype=torch.bool)
    return uniter.ipot(
        cost.detach().mT, lengths[0], pads[0], lengths[1], pads[1], joint,
        max(beta, 0.1), min(iters, 2000), inner,
    )  # fmt: skip


def solve_sample_batch(X_a, X_b=None, reg=None, metric="sqeuclidean", p=2, **options):
    """ot.batch.solve_sample_batch: POT's cost, our solution."""
    return solve_batch(ot.batch.dist_batch(X_a, X_b, metric=metric, p=p), reg, **options)


def sinkhorn(
    a, b, M, reg, method="sinkhorn", numItermax=1000, stopThr=1e-9, verbose=False, log=False,
    warn=True, warmstart=None, **options,
):  # fmt: skip
    """ot.sinkhorn: the plan, or for several columns of b their losses."""
    if method not in _OURS:
        return _SINKHORN(
            a, b, M, reg, method, numItermax, stopThr, verbose, log, warn, warmstart, **options
        )
    cost, a_, b_, several = _problems(a, b, M)
    start = None if warmstart is None else reg * _tensor(warmstart[0], like=cost)[None]
    out = _solve(cost, a_, b_, reg, numItermax, stopThr, start=start)
    error = (out.plan.sum(1) - b_).norm(dim=1).max()
    if warn and error > stopThr and (out.num_iters == numItermax).any():
        warnings.warn("Sinkhorn did not converge", UserWarning, stacklevel=2)
    result = _like(out.distance if several else out.plan[0], M)
    return (result, _logs(out, reg, several, M)) if log else result


def sinkhorn2(a, b, M, reg, method="sinkhorn", warn=False, log=False, **options):
    """ot.sinkhorn2: <M, P> of each column, with the gradient of the regularised objective."""
    if method not in _OURS:
        return _SINKHORN2(a, b, M, reg, method, warn=warn, log=log, **options)
    cost, a_, b_, several = _problems(a, b, M)
    out = _solve(cost, a_, b_, reg, options.get("numItermax", 1000), options.get("stopThr", 1e-9))
    loss = out.distance.detach() + (out.value - out.value.detach())
    result = _like(loss if several else loss[0], M)
    return (result, _logs(out, reg, several, M)) if log else result


def sinkhorn_unbalanced(
    a, b, M, reg, reg_m, method="sinkhorn", reg_type="kl", c=None, warmstart=None,
    numItermax=1000, stopThr=1e-6, verbose=False, log=False, **options,
):  # fmt: skip
    """ot.unbalanced.sinkhorn_unbalanced: the plan, or for several columns of b their losses."""
    if method not in _OURS:
        return _UNBALANCED(
            a, b, M, reg, reg_m, method, reg_type, c, warmstart, numItermax, stopThr, verbose, log,
            **options,
        )  # fmt: skip
    out, several = _unbalanced(a, b, M, reg, reg_m, reg_type, c, warmstart, numItermax, stopThr)
    result = _like(out.distance if several else out.plan[0], M)
    return (result, _logs(out, reg, several, M)) if log else result


def sinkhorn_unbalanced2(
    a, b, M, reg, reg_m, method="sinkhorn", reg_type="kl", c=None, warmstart=None,
    returnCost="linear", numItermax=1000, stopThr=1e-6, verbose=False, log=False, **options,
):  # fmt: skip
    """ot.unbalanced.sinkhorn_unbalanced2: the linear loss of each column."""
    if method not in _OURS or returnCost == "total":
        return _UNBALANCED2(
            a, b, M, reg, reg_m, method, reg_type, c, warmstart, returnCost, numItermax, stopThr,
            verbose, log, **options,
        )  # fmt: skip
    if returnCost != "linear":
        raise ValueError(f"returnCost must be 'linear' or 'total', got {returnCost!r}")
    out, several = _unbalanced(a, b, M, reg, reg_m, reg_type, c, warmstart, numItermax, stopThr)
    # The shifted cost of another reference measure is not what the loss is measured in.
    linear = (_tensor(M) * out.plan).sum((1, 2))
    result = _like(linear if several else linear[0], M)
    return (result, _logs(out, reg, several, M)) if log else result


def _unbalanced(
    a, b, M, reg, reg_m, reg_type, c, warmstart, max_iter, tol
) -> tuple[TransportOutput, bool]:
    """Another reference measure c shifts the cost: a b exp(-C' / reg) = c exp(-C / reg)."""
    cost, a_, b_, several = _problems(a, b, M)
    if several and reg_type == "kl":
        # What POT does there.
        reg_type = "entropy"
    reference = a_[:, :, None] * b_[:, None, :]
    if c is not None:
        cost = cost + reg * (reference / _tensor(c, like=cost)).log()
    elif reg_type == "entropy":
        cost = cost + reg * reference.log()
    taus = np.ravel(reg_m if not isinstance(reg_m, Tensor) else reg_m.numpy()).tolist()
    taus = [None if np.isinf(tau) else tau for tau in (taus * 2 if len(taus) == 1 else taus)]
    start = None if warmstart is None else reg * _tensor(warmstart[0], like=cost)[None]
    out = _solve(cost, a_, b_, reg, max_iter, tol, taus=tuple(taus), start=start)
    return out, several


def _logs(out: TransportOutput, reg: float, several: bool, M: object) -> dict:
    """POT's names: plan = reference * exp(logu + logv - M / reg)."""
    columns = [(x / reg).T if several else (x / reg)[0] for x in (out.f, out.g)]
    return {"logu": _like(columns[0], M), "logv": _like(columns[1], M), "niter": out.num_iters}


def solve(
    M, a=None, b=None, reg=None, c=None, reg_type="KL", unbalanced=None, max_iter=1000, tol=1e-9,
    grad="autodiff", **options,
):  # fmt: skip
    """ot.solve where it is balanced, entropic and asks for no gradient of the plan."""
    differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in (M, a, b))
    ours = reg and unbalanced is None and c is None and reg_type.lower() in ("kl", "entropy")
    if not ours or (differentiable and grad not in ("detach", "envelope")):
        return _SOLVE(
            M, a, b, reg, c, reg_type, unbalanced, max_iter=max_iter, tol=tol, grad=grad, **options
        )
    cost, a_, b_, _ = _problems(a, b, M)
    if grad == "detach":
        cost, a_, b_ = cost.detach(), a_.detach(), b_.detach()
    out = _solve(cost, a_, b_, reg, max_iter or 1000, tol or 1e-9)
    value = out.value
    if reg_type.lower() == "entropy":
        value = value + reg * (torch.xlogy(a_, a_).sum(1) + torch.xlogy(b_, b_).sum(1))
    # Potentials of POT hold the weights; where its start puts the constant between the two.
    shift = a_.log().mean(1, keepdim=True)
    potentials = (out.f / reg + a_.log() - shift, out.g / reg + b_.log() + shift)
    return OTResult(
        value=_like(value[0], M),
        value_linear=_like(out.distance[0], M),
        plan=_like(out.plan[0], M),
        potentials=tuple(_like(x[0], M) for x in potentials),
        backend=ot.backend.get_backend(_tensor(M) if isinstance(M, Tensor) else np.asarray(M)),
    )
