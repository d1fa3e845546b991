"""POT's own test functions against our ops, where a checkout of POT's tests is at hand.

They are not in its wheel and not copied here. The folder of them is named by the environment:

    pip download POT==0.9.7.post1 --no-deps --no-binary POT && tar xzf pot-*.tar.gz
    VLPFAST_POT_TESTS=pot-0.9.7.post1/test pytest tests/peers/test_pot_suite.py

(the sdist lacks batch/ and unbalanced/, which a checkout of the repository has). What they check is
in test_pot.py in our own words, and always runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
TESTS = os.environ.get("VLPFAST_POT_TESTS")
# Functions of each file that the adapter can carry.
FILES = {
    "batch/test_solve_batch.py": [
        "test_solve_batch", "test_sinkhorn_solve_batch", "test_solve_batch_vs_solve",
        "test_proximal_solve_batch", "test_gradients_torch", "test_backend",
        "test_sample_solve_batch", "test_sample_solve_batch_vs_solve_batch",
    ],
    "test_bregman.py": [
        "test_sinkhorn", "test_sinkhorn_backends", "test_sinkhorn2_backends",
        "test_sinkhorn2_gradients", "test_sinkhorn_empty", "test_sinkhorn_multi_b",
        "test_sinkhorn_variants", "test_sinkhorn_variants_log", "test_sinkhorn_variants_multi_b",
        "test_sinkhorn_variants_log_multib", "test_sinkhorn2_variants_multi_b",
        "test_sinkhorn_warmstart", "test_stabilized_vs_sinkhorn_multidim",
    ],
    "unbalanced/test_sinkhorn.py": [
        "test_unbalanced_convergence", "test_unbalanced_marginals", "test_unbalanced_warmstart",
        "test_unbalanced_reference_measure", "test_sinkhorn_unbalanced2",
        "test_unbalanced_relaxation_parameters", "test_unbalanced_relaxation_parameters_pair",
        "test_unbalanced_multiple_inputs", "test_stabilized_vs_sinkhorn",
    ],
    "test_solvers.py": ["test_solve", "test_solve_detach", "test_solve_envelope"],
}  # fmt: skip
# Left out, and why. `method` values that are POT's other solvers run POT's own code.
NOT_OURS = {
    "test_nan_warning": "reg=0: a ValueError here, not NaN with a warning",
    "test_proximal_bregman_log_plan_batch": "POT's internal step, not a solver",
    "test_bregman_batch": "POT's internal projections, not a solver",
    "test_solve_last_step": "differentiates the plan of the last iteration",
}


@pytest.mark.slow
@pytest.mark.skipif(TESTS is None, reason="VLPFAST_POT_TESTS names no folder")
@pytest.mark.parametrize("file", FILES)
def test_pots_own(file: str, tmp_path: Path) -> None:
    path = Path(TESTS) / file
    if not path.exists():
        pytest.skip(f"{path} is not there")
    report = tmp_path / "report.xml"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if file == "test_solvers.py":
        environment["VLPFAST_POT_SOLVE"] = "1"
    source = path.read_text()
    nodes = [f"{path}::{name}" for name in FILES[file] if f"def {name}(" in source]
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-rs", "-p", "tests.peers._pot_plugin",
            "-c", os.devnull, "--noconftest", f"--rootdir={path.parent}",
            "-p", "no:cacheprovider", f"--junitxml={report}", *nodes,
        ],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(run.stdout)
    suite = ElementTree.parse(report).getroot()[0]
    passed = int(suite.get("tests")) - int(suite.get("skipped"))
    assert suite.get("failures") == suite.get("errors") == "0", run.stdout
    assert passed > 0
