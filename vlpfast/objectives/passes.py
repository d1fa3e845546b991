"""Passes: what a step has run of its model on one batch, for the objectives to read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from vlpfast.data.batch import Batch
from vlpfast.models.outputs import FusedOutput, ImageOutput, TextOutput
from vlpfast.models.towers import ImageKeys
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.objectives.plan import Plan
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

# Sum and count, so that a loop can average over ranks and accumulation steps exactly.
Loss = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Encoded:
    """What the towers of `model` made of a batch: images (B), clean texts (B), then masked texts
    (B) where the plan has them, and the images' keys where it fuses.
    """

    model: VLPModel
    image: ImageOutput
    text: TextOutput
    keys: ImageKeys | Ragged | None


@dataclass(frozen=True)
class Passes:
    """One step's passes.

    Attributes:
        batch, config, plan: what is computed; `config` is what this step trains.
        student, teacher: the towers' outputs; the teacher's without a gradient, or None.
        alpha: weight of the teacher's soft targets.
        seed: keys dropout and negatives of this step.
        step: optimizer step.
        group: ranks over which candidates are gathered, or None.
        mixed_image (B,): the image that random matching shows with each text, or None.
        fused: of the rows of `plan.fusion`, or None.
        metrics: detached scalars for the log, filled by the objectives.
    """

    batch: Batch
    config: ObjectivesConfig
    plan: Plan
    student: Encoded
    teacher: Encoded | None
    alpha: float
    seed: int
    step: int
    group: dist.ProcessGroup | None
    mixed_image: Tensor | None = None
    fused: FusedOutput | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> VLPModel:
        """The student."""
        return self.student.model

    @property
    def image_embedding(self) -> Tensor:
        """(B, E) of the batch's images."""
        return self.student.image.embedding

    @property
    def text_embedding(self) -> Tensor:
        """(B, E) of the batch's clean texts."""
        return self.student.text.embedding[: len(self.batch)]


def encode(model: VLPModel, batch: Batch, kept: Tensor | None, seed: int, plan: Plan) -> Encoded:
    """Each tower once: images, `kept` (B, K) of whose patches it embeds, and the plan's texts."""
    images = batch.visual(model.config.vision.front)
    if plan.masked_image:
        images = Regions.cat([images, batch.masked_regions])
    image = model.encode_image(images, kept, seed=fold_seed(seed, 1), embed=plan.embed_image)
    texts = [batch.text, batch.masked_text] if plan.masked_text else [batch.text]
    text = model.encode_text(Ragged.cat(texts), seed=fold_seed(seed, 2), embed=plan.embed_text)
    keys = model.image_keys(image.tokens) if plan.fusion or plan.decodes else None
    return Encoded(model, image, text, keys)


def fuse(passes: Passes, hard_text: Tensor | None, hard_image: Tensor | None) -> FusedOutput:
    """All rows of the plan in one call.

    A missing negative (-1) runs on row 0 and is left out of the loss: no data-dependent shapes.
    """
    negatives = [None if hard is None else hard.clamp(min=0) for hard in (hard_text, hard_image)]
    device = passes.batch.image_ids.device
    texts, images = passes.plan.fusion_rows(
        len(passes.batch), *negatives, device, passes.mixed_image
    )
    return passes.model.fuse_pairs(
        passes.student.text.tokens.select(texts),
        passes.student.keys,
        images,
        seed=fold_seed(passes.seed, 4),
    )


def teacher_fused(passes: Passes) -> Ragged:
    """What the teacher's fusion makes of the masked texts with their images: packed tokens."""
    teacher, size = passes.teacher, len(passes.batch)
    own = torch.arange(size, device=passes.batch.image_ids.device)
    return teacher.model.fuse(teacher.text.tokens.select(own + size), teacher.keys, own)
