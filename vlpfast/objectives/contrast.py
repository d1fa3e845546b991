"""Losses of the joint space: softmax, pairwise sigmoid and hinge."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vlpfast.objectives.passes import Loss, Passes
from vlpfast.objectives.teacher import FeatureQueue
from vlpfast.ops._collectives import gather_rows
from vlpfast.ops.contrastive import contrastive_loss, hinge_loss
from vlpfast.ops.seed import fold_seed


def itc(passes: Passes, queue: FeatureQueue | None) -> tuple[Loss, Tensor | None, Tensor | None]:
    """Image-text contrast over the batch of all ranks and the queue, with the teacher's targets.

    Returns: the loss, and where the plan wants them, each image's hard negative text and each
    text's hard negative image, (B,) int64, -1 where none exists.
    """
    keys, hard = {}, passes.plan.hard_negatives
    if queue is not None:
        image_keys, text_keys, key_ids = queue.entries()
        keys = {"image_keys": image_keys, "text_keys": text_keys, "key_ids": key_ids}
    if passes.teacher is not None:
        keys["teacher"] = teacher_embeddings(passes)
        keys["alpha"] = passes.alpha
    out = contrastive_loss(
        passes.image_embedding,
        passes.text_embedding,
        passes.model.logit_scale,
        # A softmax does not see it; so its gradient is zero, not absent.
        passes.model.logit_bias,
        ids=passes.batch.image_ids,
        label_smoothing=passes.config.label_smoothing,
        hard_negatives=int(hard),
        seed=fold_seed(passes.seed, 3),
        group=passes.group,
        **keys,
    )
    # Already normalised over all ranks: see `contrastive_loss` on what `group` returns.
    value, joint = out.loss, passes.student.image.joint_embedding
    if joint is not None:
        value = (value + _joint_loss(passes, joint)) / 2
    loss = (value, torch.ones((), device=value.device))
    return (loss, out.hard_text[:, 0], out.hard_image[:, 0]) if hard else (loss, None, None)


def _joint_loss(passes: Passes, image: Tensor) -> Tensor:
    """The same of the joint embeddings, with their own scale (VLMo averages both)."""
    return contrastive_loss(
        image,
        passes.student.text.joint_embedding[: len(passes.batch)],
        passes.model.joint_heads.scale.exp(),
        ids=passes.batch.image_ids,
        label_smoothing=passes.config.label_smoothing,
        group=passes.group,
    ).loss


def teacher_embeddings(passes: Passes) -> tuple[Tensor, Tensor]:
    """The teacher's image and text embeddings of the batch, (B, E) each."""
    teacher = passes.teacher
    return teacher.image.embedding, teacher.text.embedding[: len(passes.batch)]


def sigmoid(passes: Passes) -> Loss:
    """Every pair of the batches of all ranks by itself (SigLIP)."""
    out = contrastive_loss(
        passes.image_embedding,
        passes.text_embedding,
        passes.model.logit_scale,
        passes.model.logit_bias,
        kind="sigmoid",
        ids=passes.batch.image_ids,
        group=passes.group,
    )
    return out.loss, torch.ones((), device=out.loss.device)


def hinge(passes: Passes) -> Loss:
    """Triplets with a margin (VSE++)."""
    config = passes.config
    return gathered_hinge(
        passes.image_embedding,
        passes.text_embedding,
        passes.batch.image_ids,
        margin=config.hinge_margin,
        hardest=config.hinge_hardest and passes.step >= config.hinge_sum_steps,
        group=passes.group,
    )


def gathered_hinge(
    image: Tensor,
    text: Tensor,
    ids: Tensor,
    *,
    margin: float,
    hardest: bool,
    group: dist.ProcessGroup | None,
) -> Loss:
    """`ops.hinge_loss` of the pairs of all ranks, a sum over all of them, as (sum, 1).

    Every rank computes all of it; the mean over ranks of its gradient is that of one process on
    the concatenated batch.

    Args:
        image, text (B, E): this rank's embeddings, L2-normalised; B is the same on every rank.
        ids (B,): pairs with equal ids are no negatives of each other.
        margin, hardest: as `ops.hinge_loss`.
        group: the ranks, or None.
    """
    if group is not None:
        counts = [image.shape[0]] * dist.get_world_size(group)
        image, text, ids = (gather_rows(rows, counts, group) for rows in (image, text, ids))
    loss = hinge_loss(image, text, margin=margin, hardest=hardest, ids=ids)
    return loss, torch.ones((), device=loss.device)
