"""Balanced Sinkhorn on a batch of small costs, 50 iterations at eps = 0.05, against the batched
solvers of POT and geomloss. Padding is a weight of 0 everywhere.

POT's `sinkhorn` is the scaling form, as ours is for these costs; its `log_sinkhorn` and geomloss's
annealed solver are the robust ones. None of them leaves padding out.
"""

from __future__ import annotations

import importlib

import torch

from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.ops.bench_transport_cost import setup as _cost
from benchmarks.ops.transport_peers import num_pairs
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import Transport

OP = "transport_sinkhorn"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32",)
DIRECTIONS = ("fwd",)
BASELINE = "pot"

_EPS = 0.05


def setup(shape: Transport, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Cosine costs and uniform weights on what is valid."""
    inputs = _cost(shape, dtype, device)
    weights = []
    for pad in inputs["pads"]:
        valid = (~pad).to(dtype)
        weights.append(valid / valid.sum(1, keepdim=True))
    return {"shape": shape, "cost": inputs["cost"], "a": weights[0], "b": weights[1]}


def _pot(method: str) -> Run:
    """POT 0.9.7, ot.batch.solve_batch; tol = 0 runs all iterations."""

    def run(inputs: Inputs) -> object:
        solve_batch = importlib.import_module("ot.batch").solve_batch
        return solve_batch(
            inputs["cost"],
            _EPS,
            inputs["a"],
            inputs["b"],
            max_iter=inputs["shape"].iters,
            tol=0.0,
            method=method,
            grad="detach",
        ).plan

    return run


def _geomloss(inputs: Inputs) -> object:
    """geomloss 0.3.1, ot.solve_batch: annealed, so not the same iterations."""
    solve_batch = importlib.import_module("geomloss.ot").solve_batch
    return solve_batch(
        inputs["cost"],
        reg=_EPS,
        a=inputs["a"],
        b=inputs["b"],
        max_iter=inputs["shape"].iters,
    ).plan


def _own(name: str) -> Run:
    sinkhorn = importlib.import_module("vlpfast.ops.transport").sinkhorn

    def run(inputs: Inputs) -> object:
        return sinkhorn(
            inputs["cost"],
            inputs["a"],
            inputs["b"],
            eps=_EPS,
            iters=inputs["shape"].iters,
            return_plan=True,
            impl=name,
        )

    return run


def impls(device: torch.device) -> dict[str, Run]:
    """Ours and the peers."""
    op = importlib.import_module("vlpfast.ops.transport")._SINKHORN
    ours: dict[str, Run] = {name: _own(name) for name in own_impls(op, device)}
    peers = {"pot": _pot("sinkhorn"), "pot_log": _pot("log_sinkhorn"), "geomloss": _geomloss}
    return {**ours, **peers}


def bytes(shape: Transport, dtype: torch.dtype, direction: str) -> int:
    """Cost read and plan written once, valid pairs only."""
    return 2 * num_pairs(shape) * dtype.itemsize


def flops(shape: Transport, direction: str) -> int:
    """A product and a sum for each potential, a pair and iteration."""
    return 4 * num_pairs(shape) * shape.iters
