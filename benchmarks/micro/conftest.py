"""The stored baseline of the guards, and the option that renews it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_BASELINE = Path(__file__).parent / "baseline.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store-baseline", action="store_true", help="store what is measured as the new baseline"
    )


class Baseline:
    """Costs in units of one plain Python call, so that the baseline of one machine holds on
    another."""

    def __init__(self, store: bool) -> None:
        self._store = store
        self._costs: dict[str, float] = (
            json.loads(_BASELINE.read_text()) if _BASELINE.exists() else {}
        )

    def check(self, name: str, cost: float, slack: float) -> None:
        """Fails if `cost` exceeds `slack` times the stored one."""
        if self._store:
            self._costs[name] = round(cost, 1)
            _BASELINE.write_text(json.dumps(dict(sorted(self._costs.items())), indent=2) + "\n")
            return
        assert name in self._costs, f"{name} has no baseline: run once with --store-baseline"
        stored = self._costs[name]
        assert cost <= slack * stored, (
            f"{name} costs {cost:.1f} plain calls, the baseline is {stored} (slack {slack}x)"
        )


@pytest.fixture
def baseline(request: pytest.FixtureRequest) -> Baseline:
    return Baseline(request.config.getoption("--store-baseline"))
