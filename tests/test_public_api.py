"""The names users import: present, typed, documented; and `import vlpfast` stays light."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import vlpfast
from vlpfast import ops
from vlpfast.env import describe, report

# Signature of every public op: positional arguments, then keyword-only ones.
OPS = {
    "contrastive_loss": (
        "image text logit_scale logit_bias",
        "kind ids label_smoothing image_keys text_keys key_ids teacher alpha hard_negatives seed"
        " group impl",
    ),
    "hinge_loss": ("image text", "margin hardest ids impl"),
    "linear_cross_entropy": (
        "hidden weight target bias",
        "ignore_index label_smoothing teacher alpha reduction impl",
    ),
    "ipot": ("x y x_mask y_mask", "beta iters inner tol return_plan impl"),
    "ipot_from_cost": ("cost x_mask y_mask", "beta iters inner tol return_plan impl"),
    "sinkhorn": ("cost a b", "eps iters tol tau_a tau_b dustbin f return_plan impl"),
    "wra_loss": ("text image text_mask image_mask matched", "beta iters weight impl"),
    "keep_ids": ("num_samples num_patches num_keep", "seed sample_ids valid device impl"),
    "patch_embed": ("images weight bias pos_embed ids", "patch_size mean std layout impl"),
    "attention": (
        "q k v",
        "q_lens k_lens cu_q cu_k kv_index q_block k_block bias dropout_p seed scale impl",
    ),
    "residual_norm": ("x residual weight bias", "kind dropout_p seed eps impl"),
    "bias_gelu": ("x bias", "dropout_p seed impl"),
}


@pytest.mark.parametrize("name", OPS)
def test_op_signature(name):
    function = getattr(ops, name)
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert positional == OPS[name][0].split()
    # An op may grow options; it keeps those it has.
    assert set(OPS[name][1].split()) <= set(keyword_only)
    assert function.__kwdefaults__["impl"] == "auto"


@pytest.mark.parametrize("name", [*OPS, "attention_map", "gradcam"])
def test_op_is_documented_and_typed(name):
    function = getattr(ops, name)
    assert "Args:" in function.__doc__
    assert "Returns:" in function.__doc__
    hints = typing.get_type_hints(function)
    # `**options` is what a function hands on to another that types it.
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} | {"return"}
    assert names - set(hints) == set()


def test_names_of_the_package():
    assert vlpfast.__all__
    for name in vlpfast.__all__:
        assert getattr(vlpfast, name) is not None, name
        assert name in dir(vlpfast)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vlpfast.no_such_name


def test_every_op_has_its_reference_in_the_table():
    values = report()
    assert set(values["ops"]) == set(ops.OPS)
    assert values["versions"]["torch"] == torch.__version__
    for name, facts in values["ops"].items():
        assert facts["implementations"]["reference"] is None, name
        for order in facts["auto"].values():
            assert set(order) <= set(facts["implementations"])
            assert order[-1] == "reference", f"{name}: auto must end with what always fits"


def test_the_table_says_why_something_is_not_here():
    text = describe()
    for name, facts in report()["ops"].items():
        assert name in text
        for reason in filter(None, facts["implementations"].values()):
            assert reason in text


@pytest.mark.parametrize("statement", ["import vlpfast", "import vlpfast.ops"])
def test_import_is_light(statement):
    heavy = ["triton", "transformers", "nvidia.dali", "matplotlib", "tensorboard", "tyro", "PIL"]
    code = f"{statement}; import sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_version_is_one():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{vlpfast.__version__}"' in text


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "vlpfast").rglob("*.py")),
    ids=lambda p: str(p.relative_to(Path(__file__).parents[1])),
)
def test_modules_say_what_they_are(path):
    source = path.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source)), "no module docstring"
