"""linear_cross_entropy against eager code and the fused peers: loss and gradients of hidden, weight
and bias.

`eager` makes the logits of all rows, as the published MLM heads do; `eager_selected` those that
have a target, as a careful user does. With a teacher both are ALBEF's formula.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import LinearCrossEntropy

OP = "linear_cross_entropy"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
# What runs in the forward and what in the backward is an implementation's choice.
DIRECTIONS = ("both",)
BASELINE = "eager"
_ALPHA = 0.4


def setup(shape: LinearCrossEntropy, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A head at initialisation, random targets at random places, a teacher near the student."""

    def make(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    hidden = make(shape.num_tokens, shape.dim)
    weight, bias = 0.02 * make(shape.vocab, shape.dim), 0.02 * make(shape.vocab)
    target = torch.full((shape.num_tokens,), -100, device=device)
    kept = torch.randperm(shape.num_tokens, device=device)[: shape.num_kept]
    target[kept] = torch.randint(shape.vocab, (shape.num_kept,), device=device)
    teacher = None
    if shape.distilled:
        near = [(0.9 * x + 0.1 * x.roll(1, 0)).to(dtype) for x in (hidden, weight, bias)]
        teacher = tuple(near)
    return {
        "shape": shape,
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "bias": bias.requires_grad_(),
        "target": target,
        "teacher": teacher,
    }


def _own(name: str, bound: bool, inputs: Inputs) -> Tensor:
    op = importlib.import_module("vlpfast.ops.linear_cross_entropy").linear_cross_entropy
    teacher = inputs["teacher"]
    return op(
        inputs["hidden"],
        inputs["weight"],
        inputs["target"],
        inputs["bias"],
        teacher=teacher,
        alpha=0.0 if teacher is None else _ALPHA,
        impl=name,
        # On a GPU without it the host waits, and a CUDA graph cannot be made.
        **({"max_rows": inputs["shape"].num_kept} if bound else {}),
    )


def _loss(hidden: Tensor, inputs: Inputs, target: Tensor, hidden_m: Tensor | None = None) -> Tensor:
    logits = F.linear(hidden, inputs["weight"], inputs["bias"]).float()
    loss = F.cross_entropy(logits, target)
    if hidden_m is None:
        return loss
    # ALBEF, models/xbert.py, BertForMaskedLM.forward.
    with torch.no_grad():
        soft = F.softmax(F.linear(hidden_m, *inputs["teacher"][1:]).float(), dim=-1)
    distill = -torch.sum(F.log_softmax(logits, dim=-1) * soft, dim=-1)
    return (1 - _ALPHA) * loss + _ALPHA * distill[target != -100].mean()


def _eager(inputs: Inputs) -> Tensor:
    hidden_m = None if inputs["teacher"] is None else inputs["teacher"][0]
    return _loss(inputs["hidden"], inputs, inputs["target"], hidden_m)


def _eager_selected(inputs: Inputs) -> Tensor:
    kept = (inputs["target"] != -100).nonzero().squeeze(1)
    hidden_m = None if inputs["teacher"] is None else inputs["teacher"][0][kept]
    return _loss(inputs["hidden"][kept], inputs, inputs["target"][kept], hidden_m)


def _hard_only(inputs: Inputs, name: str) -> None:
    if inputs["teacher"] is not None:
        raise NotImplementedError(f"{name} has no teacher")


def _torch(chunked: bool, inputs: Inputs) -> Tensor:
    """torch >= 2.13; without options it is eager code on all rows."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    _hard_only(inputs, "F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True) if chunked else None
    return F.linear_cross_entropy(
        inputs["hidden"],
        inputs["weight"],
        inputs["target"],
        linear_bias=inputs["bias"],
        ignore_index=-100,
        options=options,
    )


def _open_clip() -> Run | None:
    """open_clip >= 4: its loss.py alone, which needs nothing but torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fused = getattr(module, "fused_linear_cross_entropy", None)
    if fused is None:
        return None

    def run(inputs: Inputs) -> object:
        _hard_only(inputs, "open_clip")
        tensors = (inputs[name] for name in ("hidden", "weight", "target", "bias"))
        return fused(*tensors)

    return run


def _liger(inputs: Inputs) -> Tensor:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    _hard_only(inputs, "Liger")
    return loss(inputs["weight"], inputs["hidden"], inputs["target"], inputs["bias"])


def _cut_cross_entropy(inputs: Inputs) -> Tensor:
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    _hard_only(inputs, "cut-cross-entropy")
    return loss(inputs["hidden"], inputs["weight"], inputs["target"], inputs["bias"])


def _quack(inputs: Inputs) -> Tensor:
    """Without the bias, which it does not take."""
    module = importlib.import_module("quack.linear_cross_entropy")
    _hard_only(inputs, "QuACK")
    if inputs["shape"].vocab % 128 or inputs["hidden"].dtype != torch.bfloat16:
        raise NotImplementedError("QuACK takes bf16 and vocabularies of a multiple of 128")
    return module.chunked_linear_cross_entropy(
        inputs["hidden"], inputs["weight"], inputs["target"], ignore_index=-100
    )


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, then the peers; those that have GPU code alone only on a GPU."""
    op = importlib.import_module("vlpfast.ops.linear_cross_entropy")._OP
    on_gpu = device.type == "cuda"
    found = {
        name: functools.partial(_own, name, on_gpu and name != "reference")
        for name in own_impls(op, device)
    }
    found |= {
        "eager": _eager,
        "eager_selected": _eager_selected,
        "torch": functools.partial(_torch, False),
        "torch_chunked": functools.partial(_torch, True),
    }
    if (open_clip := _open_clip()) is not None:
        found["open_clip"] = open_clip
    if on_gpu:
        found |= {"liger": _liger, "cut_cross_entropy": _cut_cross_entropy, "quack": _quack}
    return found


def bytes(shape: LinearCrossEntropy, dtype: torch.dtype, direction: str) -> int:
    """Kept rows of hidden, the weight and the bias, the teacher's too; their gradients (the
    student's, in full); logits never exist."""
    size = dtype.itemsize
    head = (shape.vocab * (shape.dim + 1) + shape.num_kept * shape.dim) * size
    total = head * (2 if shape.distilled else 1) + 8 * shape.num_tokens
    if direction != "fwd":
        total += (shape.vocab * (shape.dim + 1) + shape.num_tokens * shape.dim) * size
    return total


def flops(shape: LinearCrossEntropy, direction: str) -> int:
    """Products of kept rows with the vocabulary: logits, the two of their gradient, teacher's."""
    products = 1 + shape.distilled + (2 if direction != "fwd" else 0)
    return products * 2 * shape.num_kept * shape.vocab * shape.dim
