"""Contrastive losses between two towers: softmax (CLIP, ALBEF) and sigmoid (SigLIP) with queues,
momentum targets, several positives, hard negatives and ranks; hinge losses (VSE0, VSE++).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vlpfast import _ext
from vlpfast.ops import _contrastive_autograd as chunked
from vlpfast.ops import _contrastive_passes as back_ends
from vlpfast.ops._checks import check_devices, check_integers, check_seed
from vlpfast.ops._collectives import gather_rows, gather_sizes
from vlpfast.ops._dispatch import Implementation, Op
from vlpfast.ops.reference import contrastive as reference


class ContrastiveOutput(NamedTuple):
    """Result of `contrastive_loss`. Only `loss` carries a gradient; the rest are statistics.

    Attributes:
        loss: scalar, fp32 (fp64 for fp64 inputs), the mean of the next two.
        image_to_text: scalar, loss of the images against their text candidates.
        text_to_image: scalar, loss of the texts against their image candidates.
        image_lse (B,): log-sum-exp of each image's logits over all candidates; None for sigmoid.
        text_lse (B,): the same of each text; None for sigmoid.
        hard_text (B, k): int64, negative texts of each image, as rows of this rank; -1: none left.
        hard_image (B, k): int64, negative images of each text.
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    image_lse: Tensor | None
    text_lse: Tensor | None
    hard_text: Tensor
    hard_image: Tensor


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    kind: str = "softmax",
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
    key_ids: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    alpha: float = 0.0,
    hard_negatives: int = 0,
    seed: int | Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> ContrastiveOutput:
    """Contrastive loss of B image-text pairs, row b of `image` with row b of `text`.

    Image to text (text to image with the roles swapped; loss = the mean of both directions):

        z_ij = logit_scale * <image_i, c_j> + logit_bias          candidates c = [texts, text_keys]
        y_ij = [j is positive for i]                              (softmax: / number of positives)
        y_ij = (1 - label_smoothing) * y_ij + label_smoothing / C           (sigmoid: / 2)
        t_ij = alpha * p_ij + (1 - alpha) * y_ij         p: softmax or sigmoid of teacher logits
        softmax:  mean_i -sum_j t_ij log softmax_j(z_i)
        sigmoid:  mean_i -sum_j (t_ij log sigmoid(z_ij) + (1 - t_ij) log sigmoid(-z_ij))

    With `teacher`, the in-batch candidates of each direction are the teacher's features of the
    other modality, as in ALBEF, and p uses the same scale and bias, not differentiated.

    With `group`, candidates are the batches of all ranks (which may differ in size) and the
    returned loss is (W / G) * the sum over this rank's rows: its mean over ranks is the loss of
    the concatenated batch, and the mean over ranks of its gradient (what DDP takes) is that
    batch's gradient, for towers, scale and bias.

    No B x C matrix is kept, forward or backward, but by "reference": see docs/ops.md. Gradients are
    made in the forward, for the inputs that need them; so is all communication with the group, and
    the upstream gradient must be the same on every rank. Features in bf16 (both towers) are
    multiplied in bf16, similarities rounded as in eager bf16 code but for each pair's own; all
    else is fp32. Keys and teacher are cast to the features' dtype.

    Hard negatives are drawn without replacement from softmax(z_i) over the pairs of this rank
    whose id differs, by Gumbel-max: no host sync, and -1 where none is left.

    Args:
        image (B, D): L2-normalised image embeddings, fp32/bf16/fp16/fp64 ("cpp": fp32, bf16;
            "triton": fp32, bf16, fp16). Other lengths are taken as they are.
        text (B, D): L2-normalised text embeddings.
        logit_scale: what similarities are multiplied by: a number or a tensor of one element.
        logit_bias: what is added to them, or None.
        kind: "softmax" (InfoNCE) or "sigmoid" (SigLIP).
        ids (B,): integers; pairs with equal ids are positives of each other. None: all differ.
        label_smoothing: in [0, 1).
        image_keys (K, D): more image candidates (a queue), never differentiated.
        text_keys (K, D): more text candidates, never differentiated.
        key_ids (K,): ids of the keys; None: no key is a positive. Give empty slots an id that no
            sample has (ALBEF's is -100).
        teacher: the momentum teacher's (image, text), each (B, D); never differentiated.
        alpha: weight of the teacher's targets in [0, 1].
        hard_negatives: k, negatives to draw for each row.
        seed: seed of that draw, needed if k > 0; use another one each step.
        group: ranks that share candidates, all of which make this call; None: this process alone.
        impl: "auto", "reference", "cpp" or "triton".

    Returns:
        ContrastiveOutput. An empty batch has loss 0.

    Raises:
        ValueError: a shape, option or, with a group, a rank's D does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: the named implementation cannot run here.

    Source: Radford et al. 2021 (CLIP), fig. 3, arXiv:2103.00020; Zhai et al. 2023 (SigLIP),
        alg. 1, arXiv:2303.15343; Li et al. 2021 (ALBEF), eq. 1-2 and 6, arXiv:2107.07651, with
        ids as in its retrieval code. Smoothing applies to y, before the teacher's share. SigLIP
        has no queue or teacher; they enter here as they do for softmax. Maths: docs/ops.md.
    """
    _check_options(kind, label_smoothing, hard_negatives, seed)
    _check_pair(image, text)
    _check_ids(ids, image)
    _check_keys(image_keys, text_keys, key_ids, ids, image)
    _check_teacher(teacher, alpha, image)
    dtype = _product_dtype(image, text)
    run = _OP.choose(impl, image.device, dtype=dtype)
    with torch.autocast(image.device.type, enabled=False):
        outputs = run(
            image,
            text,
            _scalar(logit_scale, "logit_scale", image),
            None if logit_bias is None else _scalar(logit_bias, "logit_bias", image),
            dtype=dtype,
            kind=kind,
            ids=ids,
            label_smoothing=label_smoothing,
            image_keys=image_keys,
            text_keys=text_keys,
            key_ids=key_ids,
            teacher=teacher,
            alpha=alpha,
            hard_negatives=hard_negatives,
            seed=seed,
            group=group,
        )
    return ContrastiveOutput(*outputs)


def hinge_loss(
    image: Tensor,
    text: Tensor,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Triplet hinge loss of B image-text pairs, SUMMED over the batch (not its mean).

        s_ij = <image_i, text_j>;   h(x) = max(0, x);   negatives: j != i, and ids_j != ids_i
        hardest (VSE++):  sum_i max_j h(margin + s_ij - s_ii) + sum_j max_i h(margin + s_ij - s_jj)
        else (VSE0):      sum_i sum_j h(margin + s_ij - s_ii) + sum_j sum_i h(margin + s_ij - s_jj)

    A row without a negative costs 0. Where several negatives tie, one of them has the gradient.
    No B x B matrix is kept but by "reference"; bf16 as in `contrastive_loss`.

    Args:
        image (B, D): L2-normalised image embeddings, fp32/bf16/fp16/fp64 ("cpp": fp32, bf16).
        text (B, D): L2-normalised text embeddings.
        margin: in units of cosine similarity.
        hardest: the hardest negative of each row (VSE++) or all of them (VSE0).
        ids (B,): integers; pairs with equal ids are no negatives of each other. None: all differ.
        impl: "auto", "reference", "cpp" or "triton".

    Returns:
        scalar, fp32 (fp64 for fp64 inputs).

    Source: Faghri et al. 2018 (VSE++), eq. 4 and 6, arXiv:1707.05612. `ids` is not in the paper.
    """
    _check_pair(image, text)
    _check_ids(ids, image)
    check_devices(image.device, ids=ids)
    dtype = _product_dtype(image, text)
    run = _HINGE.choose(impl, image.device, dtype=dtype)
    with torch.autocast(image.device.type, enabled=False):
        return run(image, text, ids, margin=margin, hardest=hardest, dtype=dtype)


def _reference_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    ids: Tensor | None,
    image_keys: Tensor | None,
    text_keys: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    seed: int | Tensor | None,
    group: dist.ProcessGroup | None,
    **options: object,
) -> tuple[Tensor | None, ...]:
    """The whole matrix at once, in fp32 at least, with the candidates of all ranks."""
    dtype = scale.dtype
    image, text = image.to(dtype), text.to(dtype)
    constant = lambda x: None if x is None else x.detach().to(dtype)
    if teacher is not None:
        teacher = (constant(teacher[0]), constant(teacher[1]))
    image_batch, text_batch = (image, text) if teacher is None else teacher
    counts, first_row, batch_ids = [image.shape[0]], 0, ids
    if group is not None:
        sizes = gather_sizes(image.shape, group, image.device)
        chunked.check_same_dim(sizes)
        counts = [count for count, _ in sizes]
        first_row = sum(counts[: dist.get_rank(group)])
        both = gather_rows(torch.stack([image_batch, text_batch], dim=1), counts, group)
        image_batch, text_batch = both.unbind(1)
        batch_ids = None if ids is None else gather_rows(ids, counts, group)
    if batch_ids is None:
        batch_ids = torch.arange(sum(counts), device=image.device)
    rows = reference.contrastive(
        image,
        text,
        image_batch,
        text_batch,
        scale,
        bias,
        batch_ids=batch_ids,
        first_row=first_row,
        image_keys=constant(image_keys),
        text_keys=constant(text_keys),
        teacher=teacher,
        seed=0 if seed is None else seed,
        **options,
    )
    share = len(counts) / max(1, sum(counts))
    image_to_text, text_to_image = rows.image_loss.sum() * share, rows.text_loss.sum() * share
    loss = (image_to_text + text_to_image) / 2
    return (loss, image_to_text.detach(), text_to_image.detach(), *rows[2:])


def _reference_hinge(
    image: Tensor,
    text: Tensor,
    ids: Tensor | None,
    *,
    margin: float,
    hardest: bool,
    dtype: torch.dtype,
) -> Tensor:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if ids is None:
        ids = torch.arange(image.shape[0], device=image.device)
    return reference.hinge(image.to(dtype), text.to(dtype), ids, margin=margin, hardest=hardest)


def _op(name: str, reference_run, chunked_run) -> Op:
    return Op(
        name,
        {
            "reference": Implementation(reference_run),
            "cpp": Implementation(
                partial(chunked_run, passes="cpp"), _ext.cpp_missing, back_ends.cpp_rejects
            ),
            "triton": Implementation(
                partial(chunked_run, passes="triton"),
                back_ends.triton_missing,
                back_ends.triton_rejects,
            ),
        },
        auto={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    )


_OP = _op("contrastive", _reference_loss, chunked.contrastive_loss)
_HINGE = _op("hinge", _reference_hinge, chunked.hinge_loss)


def _product_dtype(image: Tensor, text: Tensor) -> torch.dtype:
    """What features are multiplied in: their own dtype if they agree, else fp32; fp64 by image."""
    if image.dtype == torch.float64 or image.dtype == text.dtype:
        return image.dtype
    return torch.float32


def _scalar(value: Tensor | float, name: str, image: Tensor) -> Tensor:
    """`value` as a 0-d tensor in fp32, or fp64 for fp64 features, with its gradient."""
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=image.device)
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    return value.reshape(()).to(dtype=dtype, device=image.device)


def _check_options(
    kind: str, label_smoothing: float, hard_negatives: int, seed: int | Tensor | None
) -> None:
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"kind must be 'softmax' or 'sigmoid', got {kind!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    check_integers(hard_negatives=hard_negatives)
    check_seed(seed)
    if hard_negatives < 0:
        raise ValueError(f"hard_negatives must be >= 0, got {hard_negatives}")
    if hard_negatives > 0 and seed is None:
        raise ValueError("hard_negatives needs a seed, got None")


def _check_pair(image: Tensor, text: Tensor) -> None:
    for name, x in (("image", image), ("text", text)):
        if x.dim() != 2:
            raise ValueError(f"{name} must be (B, D), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if image.shape != text.shape:
        raise ValueError(
            f"image and text must have one shape, got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    check_devices(image.device, text=text)


def _check_ids(ids: Tensor | None, image: Tensor) -> None:
    if ids is None:
        return
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    if ids.shape != image.shape[:1]:
        raise ValueError(f"ids must be (B,) = ({image.shape[0]},), got {tuple(ids.shape)}")


def _check_keys(
    image_keys: Tensor | None,
    text_keys: Tensor | None,
    key_ids: Tensor | None,
    ids: Tensor | None,
    image: Tensor,
) -> None:
    for name, keys in (("image_keys", image_keys), ("text_keys", text_keys)):
        if keys is not None and (keys.dim() != 2 or keys.shape[1] != image.shape[1]):
            raise ValueError(f"{name} must be (K, D={image.shape[1]}), got {tuple(keys.shape)}")
        if key_ids is not None and keys is not None and key_ids.shape != keys.shape[:1]:
            raise ValueError(
                f"key_ids must be (K,) = ({keys.shape[0]},) for {name}, got {tuple(key_ids.shape)}"
            )
    check_devices(image.device, image_keys=image_keys, text_keys=text_keys)
    if key_ids is not None and ids is None:
        raise ValueError("key_ids needs ids of the batch, got ids=None")
    if key_ids is not None and image_keys is None and text_keys is None:
        raise ValueError("key_ids needs image_keys or text_keys, got neither")


def _check_teacher(teacher: tuple[Tensor, Tensor] | None, alpha: float, image: Tensor) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if teacher is None:
        if alpha > 0:
            raise ValueError(f"alpha={alpha} needs a teacher, got None")
        return
    if len(teacher) != 2:
        raise ValueError(f"teacher must be (image, text), got {len(teacher)} entries")
    for name, x in zip(("teacher[0]", "teacher[1]"), teacher, strict=True):
        if x.shape != image.shape:
            raise ValueError(
                f"{name} must have image's shape {tuple(image.shape)}, got {tuple(x.shape)}"
            )
        check_devices(image.device, **{name: x})
