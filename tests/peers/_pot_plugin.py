"""pytest plugin for a run of POT's own tests: its solvers are replaced by tests/peers/_pot.py.

Given with `-p tests.peers._pot_plugin`. It stands in for POT's conftest.py, which makes `nx`.
"""

from __future__ import annotations

import os

import ot
import ot.batch
import ot.bregman
import ot.unbalanced
import pytest
from ot.backend import NumpyBackend, TorchBackend

from tests.peers import _pot

for _owner, _names in (
    (ot.batch, ("solve_batch", "solve_sample_batch")),
    (ot, ("sinkhorn", "sinkhorn2", "sinkhorn_unbalanced", "sinkhorn_unbalanced2")),
    (ot.bregman, ("sinkhorn", "sinkhorn2")),
    (ot.unbalanced, ("sinkhorn_unbalanced", "sinkhorn_unbalanced2")),
):
    for _name in _names:
        setattr(_owner, _name, getattr(_pot, _name))
# Its tests of a batch take `solve` as the truth, those of `solve` itself do not.
if os.environ.get("VLPFAST_POT_SOLVE"):
    ot.solve = _pot.solve

# Decorators of its conftest that leave out backends that are not installed here.
pytest.skip_backend = lambda *_, **__: lambda function: function
pytest.skip_arg = lambda *_, **__: lambda function: function


@pytest.fixture(params=[NumpyBackend(), TorchBackend()], ids=["numpy", "torch"])
def nx(request: pytest.FixtureRequest) -> object:
    """POT's backend of a test."""
    return request.param


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """Skips, with the reason, what met a missing feature or never met the op."""
    before = _pot.calls
    outcome = yield
    if outcome.excinfo is not None and issubclass(outcome.excinfo[0], _pot.NotOurs):
        outcome.force_exception(pytest.skip.Exception(str(outcome.excinfo[1])))
    elif outcome.excinfo is None and _pot.calls == before:
        outcome.force_exception(pytest.skip.Exception("runs POT's own solvers only"))
