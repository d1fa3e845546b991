"""The engine of optimal transport as compiled for older CPUs gives what it gives on this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc.targets import rows_of


@pytest.mark.slow
def test_targets_agree(tmp_path: Path) -> None:
    rows = rows_of("transport_targets", tmp_path)
    assert len(rows) >= 5
    assert len(rows) % 5 == 0
    for target, case, *differences in rows:
        bound = 0 if target == "base" else 2e-5
        assert all(float(d) <= bound for d in differences), (target, case, differences)
