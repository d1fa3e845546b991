"""torch's own sample inputs of linear_cross_entropy, which come with it, against our op.

What its op has and ours does not is in `NOT_OURS`; such a sample must be refused, not computed.
"""

from __future__ import annotations

import importlib
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vlpfast.ops.linear_cross_entropy import linear_cross_entropy
from vlpfast.testing import assert_within_budget, with_gradients

samples = importlib.import_module("torch.testing._internal.common_methods_invocations")
modules = importlib.import_module("torch.testing._internal.common_modules")
reference = getattr(
    importlib.import_module("torch.testing._internal.common_nn"),
    "linear_cross_entropy_loss_reference",
    None,
)
pytestmark = pytest.mark.skipif(reference is None, reason="this torch has no linear_cross_entropy")

NOT_OURS = {
    "class weights": "pre-training weighs no token; an argument nobody needs in the kernel",
    "K-dimensional classes": "segmentation's layout; rows (..., D) cover text",
    "probability targets": "a (N, V) tensor is what the op avoids; `teacher` gives soft targets",
}
# What torch's samples say with other words: chunk sizes and accumulators are the op's own business.
IGNORED = {"options"}


def features_not_ours(weight: Tensor, target: Tensor, options: dict) -> list[str]:
    found = []
    if options.get("weight") is not None:
        found.append("class weights")
    if weight.dim() != 2:
        found.append("K-dimensional classes")
    if target.is_floating_point():
        found.append("probability targets")
    return found


def op_samples(kind: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, dict]]:
    """(input, weight, target, options) of the OpInfo's samples."""
    torch.manual_seed(0)
    random.seed(0)
    generate = getattr(samples, f"sample_inputs_linear_cross_entropy{kind}")
    for sample in generate(None, "cpu", dtype, False):
        yield sample.input, *sample.args, sample.kwargs


def module_samples(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, dict]]:
    """The same of the module's samples: label smoothing, out-of-range and full ignore_index."""
    torch.manual_seed(0)
    generate = modules.module_inputs_torch_nn_LinearCrossEntropyLoss
    for sample in generate(None, "cpu", dtype, False, True):
        constructor, (input, target) = sample.constructor_input, sample.forward_input.args
        in_features, num_classes = constructor.args
        options = dict(constructor.kwargs)
        shape = (num_classes, *options.pop("out_features"))
        if options.pop("bias", False):
            options["linear_bias"] = torch.randn(shape, dtype=dtype)
        for name in ("device", "dtype"):
            options.pop(name)
        yield input, torch.randn(*shape, in_features, dtype=dtype), target, options


def translated(options: dict) -> dict:
    """torch's keyword arguments as ours."""
    names = {"reduction", "ignore_index", "label_smoothing"}
    unknown = set(options) - names - IGNORED - {"weight", "linear_bias"}
    assert not unknown, f"torch has a new option: {unknown}"
    return {name: options[name] for name in names if options.get(name) is not None}


def run(cases: Iterator[tuple[Tensor, Tensor, Tensor, dict]]) -> Counter:
    """Checks every case; how many were compared, and refused for which reason."""
    counts = Counter()
    for input, weight, target, options in cases:
        bias = options.get("linear_bias")
        mine = translated(options)
        missing = features_not_ours(weight, target, options)
        counts.update(missing or ["compared"])
        if missing == ["class weights"]:
            with pytest.raises(TypeError, match="class_weight"):
                linear_cross_entropy(input, weight, target, class_weight=options["weight"])
        elif missing:
            with pytest.raises((TypeError, ValueError), match=r"(weight|target) must be"):
                linear_cross_entropy(input, weight, target, bias, **mine)
        else:
            compare(input, weight, target, bias, mine)
    return counts


def compare(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options) -> None:
    """Loss and gradients against torch's reference in fp64 on the same numbers.

    In half precision they may be as far from it as twice what torch's reference in that dtype is.
    """
    leaves = [input, weight] if bias is None else [input, weight, bias]

    def theirs(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return reference(x, w, target, linear_bias=b, **options)

    ours, grads = with_gradients(
        lambda x, w, b=None: linear_cross_entropy(x, w, target, b, **options), leaves
    )
    truth, true_grads = with_gradients(theirs, [x.double() for x in leaves])
    assert ours[0].dtype == (torch.float64 if input.dtype == torch.float64 else torch.float32)
    if truth[0].isnan().any():
        # All rows ignored: torch's mean is NaN, ours 0.
        assert options["reduction"] == "mean"
        assert ours[0] == 0
        assert all((grad == 0).all() for grad in grads)
        return
    if input.dtype in (torch.float32, torch.float64):
        found = [x.double() for x in (*ours, *grads)]
        torch.testing.assert_close(found, [*truth, *true_grads], rtol=1e-5, atol=1e-5)
        return
    eager, eager_grads = with_gradients(theirs, leaves)
    found = (ours[0].to(eager[0].dtype), *grads)
    for one, exact, plain in zip(found, (*truth, *true_grads), (*eager, *eager_grads), strict=True):
        assert_within_budget(one, exact, plain)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPE_IDS = ["fp32", "fp64", "bf16", "fp16"]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("kind", ["", "_chunked", "_chunked_none"])
def test_op_samples(kind: str, dtype: torch.dtype) -> None:
    counts = run(op_samples(kind, dtype))
    assert counts["compared"] >= 10
    assert set(counts) - {"compared"} <= set(NOT_OURS)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_module_samples(dtype: torch.dtype) -> None:
    counts = run(module_samples(dtype))
    assert counts["compared"] >= 100
    assert set(counts) - {"compared"} == set(NOT_OURS)


def test_errors() -> None:
    """What torch refuses, ours refuses, with a message that names the argument."""
    cases = list(samples.error_inputs_linear_cross_entropy(None, "cpu"))
    assert len(cases) == 6
    for case in cases:
        sample = case.sample_input
        options = dict(sample.kwargs)
        bias = options.pop("linear_bias", None)
        with pytest.raises((TypeError, ValueError), match=r"^(weight|target|bias) must be"):
            linear_cross_entropy(sample.input, *sample.args, bias, **options)


def test_a_new_option_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"torch has a new option: {'softcap'}"):
        translated({"softcap": 30.0, "reduction": "sum"})


def test_known_features_are_told_apart() -> None:
    weight, target = torch.ones(3, 2), torch.ones(4, dtype=torch.int64)
    assert features_not_ours(weight, target, {}) == []
    found = features_not_ours(weight[None], target.float(), {"weight": torch.ones(3)})
    assert found == list(NOT_OURS)
