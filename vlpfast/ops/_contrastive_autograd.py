"""The chunked contrastive losses as operators and for autograd: gradients are made in the forward
and only multiplied by the upstream one in the backward.

One operator holds the whole loop over tiles, so that a compiler sees one call, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vlpfast.ops._collectives import gather_sizes
from vlpfast.ops._contrastive_chunked import chunked
from vlpfast.ops._contrastive_dist import OneProcess, Ranks
from vlpfast.ops._contrastive_hinge import hinge_chunked
from vlpfast.ops._contrastive_passes import passes_of
from vlpfast.ops._contrastive_state import Problem, Result, Wants
from vlpfast.ops._once import once_differentiable

torch.library.define(
    "vlpfast::contrastive_chunked",
    "(Tensor image, Tensor text, Tensor scale, Tensor bias, Tensor? ids, Tensor? image_keys,"
    " Tensor? text_keys, Tensor? key_ids, Tensor? image_teacher, Tensor? text_teacher,"
    " Tensor? seed, str kind, float label_smoothing, float alpha, int hard_negatives, str passes,"
    f" bool[] wants) -> ({', '.join(['Tensor'] * len(Result._fields))})",
)
torch.library.define(
    "vlpfast::contrastive_hinge_chunked",
    "(Tensor image, Tensor text, Tensor? ids, float margin, bool hardest, str passes,"
    " bool[] wants) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("vlpfast::contrastive_chunked", ("cpu", "cuda"))
def _contrastive_chunked(*arguments: object) -> Result:
    *problem, passes, wants = arguments
    image = arguments[0]
    return chunked(Problem(*problem), passes_of(passes), OneProcess(image.shape[0]), Wants(*wants))


@torch.library.register_fake("vlpfast::contrastive_chunked")
def _fake_contrastive(*arguments: object) -> tuple[Tensor, ...]:
    problem, (image_wanted, text_wanted, scalars_wanted) = Problem(*arguments[:-2]), arguments[-1]
    image, scale, B = problem.image, problem.scale, problem.image.shape[0]
    num_lse = B if problem.kind == "softmax" else 0
    empty = lambda: scale.new_empty(0)
    feature = lambda wanted: torch.empty_like(image) if wanted else empty()
    scalar = lambda: torch.empty_like(scale) if scalars_wanted else empty()
    drawn = lambda: image.new_empty(B, problem.hard_negatives, dtype=torch.int64)
    return (
        *(torch.empty_like(scale) for _ in range(3)),
        *(scale.new_empty(num_lse) for _ in range(2)),
        drawn(),
        drawn(),
        feature(image_wanted),
        feature(text_wanted),
        scalar(),
        scalar(),
    )


@torch.library.impl("vlpfast::contrastive_hinge_chunked", ("cpu", "cuda"))
def _hinge_chunked(
    image: Tensor, text: Tensor, ids: Tensor | None, margin: float, hardest: bool, passes: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return hinge_chunked(image, text, ids, margin, hardest, passes_of(passes), tuple(wants))


@torch.library.register_fake("vlpfast::contrastive_hinge_chunked")
def _fake_hinge(
    image: Tensor, text: Tensor, ids: Tensor | None, margin: float, hardest: bool, passes: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = [torch.empty_like(image) if wanted else image.new_empty(0) for wanted in wants]
    return (image.new_empty((), dtype=torch.float32), *grads)


_contrastive = torch.ops.vlpfast.contrastive_chunked.default
_hinge = torch.ops.vlpfast.contrastive_hinge_chunked.default


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor,
        group: dist.ProcessGroup | None, passes: str, wants: tuple[bool, bool, bool],
        *rest: object,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        problem = (image, text, scale, bias, *rest)
        if group is None:
            result = _contrastive(*problem, passes, list(wants))
        else:
            result = chunked(Problem(*problem), passes_of(passes), _ranks(image, group),
                             Wants(*wants))  # fmt: skip
        outputs, grads = result[:7], result[7:]
        ctx.wants = (wants[0], wants[1], wants[2], wants[2])
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable("contrastive_loss")
    def backward(ctx, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            grad * upstream if wanted else None
            for grad, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)
        )
        return (*grads, *(None,) * 14)


class _Hinge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, image: Tensor, text: Tensor, ids: Tensor | None, margin: float, hardest: bool,
        passes: str, wants: tuple[bool, bool],
    ) -> Tensor:  # fmt: skip
        loss, *grads = _hinge(image, text, ids, margin, hardest, passes, list(wants))
        ctx.wants = wants
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable("hinge_loss")
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            grad * upstream if wanted else None
            for grad, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)
        )
        return (*grads, *(None,) * 5)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    passes: str,
    dtype: torch.dtype,
    kind: str,
    ids: Tensor | None,
    label_smoothing: float,
    image_keys: Tensor | None,
    text_keys: Tensor | None,
    key_ids: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    alpha: float,
    hard_negatives: int,
    seed: int | Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor | None, ...]:
    """Fields of `ContrastiveOutput`; features are multiplied in `dtype`."""
    wants = tuple(_wanted(x) for x in (image, text, scale, bias))
    wants = (wants[0], wants[1], wants[2] or wants[3])
    constant = lambda x: None if x is None else x.detach().to(dtype).contiguous()
    whole = lambda x: None if x is None else x.to(image.device, torch.int64).contiguous()
    if hard_negatives == 0:
        seed = None
    elif not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=image.device)
    image_teacher, text_teacher = (None, None) if teacher is None else teacher
    outputs = _Contrastive.apply(
        image.to(dtype).contiguous(),
        text.to(dtype).contiguous(),
        scale,
        torch.zeros_like(scale) if bias is None else bias,
        group,
        passes,
        wants,
        whole(ids),
        constant(image_keys),
        constant(text_keys),
        whole(key_ids),
        constant(image_teacher),
        constant(text_teacher),
        None if seed is None else whole(seed).reshape(()),
        kind,
        label_smoothing,
        alpha,
        hard_negatives,
    )
    lses = outputs[3:5] if kind == "softmax" else (None, None)
    return (*outputs[:3], *lses, *outputs[5:])


def hinge_loss(
    image: Tensor, text: Tensor, ids: Tensor | None, *, margin: float, hardest: bool, passes: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`ops.hinge_loss`; features are multiplied in `dtype`."""
    return _Hinge.apply(
        image.to(dtype).contiguous(),
        text.to(dtype).contiguous(),
        None if ids is None else ids.to(torch.int64).contiguous(),
        margin,
        hardest,
        passes,
        (_wanted(image), _wanted(text)),
    )


def _wanted(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _ranks(image: Tensor, group: dist.ProcessGroup) -> Ranks:
    """The group's ranks and their batch sizes.

    Raises:
        ValueError: the ranks' features differ in D.
    """
    sizes = gather_sizes(image.shape, group, image.device)
    check_same_dim(sizes)
    return Ranks([count for count, _ in sizes], group)


def check_same_dim(sizes: Sequence[Sequence[int]]) -> None:
    """Raises ValueError, on every rank alike, if shapes (B, D) of the ranks differ in D."""
    if len({dim for _, dim in sizes}) > 1:
        shapes = [tuple(size) for size in sizes]
        raise ValueError(f"image must have one D on every rank, got shapes {shapes}")
