"""Passes: what a step has run of its model on one batch, for the objectives to read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from vlpfast.data.batch import Batch
from vlpfast.models.fusion import ImageKeys
from vlpfast.models.outputs import FusedOutput, ImageOutput, TextOutput
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.objectives.plan import Plan
from vlpfast.objectives.table import Rows
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions

# Sum and count, so that a loop can average over ranks and accumulation steps exactly.
Loss = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Encoded:
    """What the towers of `model` made of a batch: the plan's images and texts, B of each version,
    and the images' keys where it fuses. Where negatives come from other ranks, those texts and
    images follow (`objectives.negatives`).
    """

    model: VLPModel
    image: ImageOutput | None
    text: TextOutput | None
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
        hard_text, hard_image (B,): of each image, and of each text, the hard negative as
            `Plan.fusion_rows` numbers it, -1 where none exists; or None.
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
    hard_text: Tensor | None = None
    hard_image: Tensor | None = None
    fused: FusedOutput | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> VLPModel:
        """The student."""
        return self.student.model

    @property
    def shown_regions(self) -> Regions:
        """Of the rows that predict hidden regions, what they show."""
        regions = self.batch.masked_regions
        swapped = self.plan.together and self.mixed_image is not None
        return regions[self.mixed_image] if swapped else regions

    @property
    def image_embedding(self) -> Tensor:
        """(B, E) of the batch's images."""
        return self.student.image.embedding[: len(self.batch)]

    @property
    def text_embedding(self) -> Tensor:
        """(B, E) of the batch's clean texts."""
        return self.student.text.embedding[: len(self.batch)]


def encode(model: VLPModel, batch: Batch, kept: Tensor | None, seed: int, plan: Plan) -> Encoded:
    """Each tower once: the plan's images, `kept` (B, K) of whose patches it embeds, and texts."""
    image = text = keys = None
    if plan.images:
        images, hidden = _images(model, batch, plan)
        image = model.encode_image(
            images,
            kept,
            seed=fold_seed(seed, 1),
            hidden=hidden,
            num_embedded=len(batch) if "image" in plan.embeds else 0,
            with_tokens=plan.image_tokens,
        )
        keys = model.image_keys(image.tokens) if plan.reads_pairs and not plan.fetches else None
    if plan.texts:
        text = model.encode_text(
            Ragged.cat([getattr(batch, version) for version in plan.texts]),
            seed=fold_seed(seed, 2),
            num_embedded=len(batch) if "text" in plan.embeds else 0,
            with_tokens=plan.reads_pairs or "masked_alone" in plan.texts,
        )
    return Encoded(model, image, text, keys)


def _images(model: VLPModel, batch: Batch, plan: Plan) -> tuple[Tensor | Regions, Tensor | None]:
    """The images that the plan has, clean ones first, and which patches of them are hidden."""
    images, clean = batch.visual(model.config.vision.front), "image" in plan.images
    if "masked_image" not in plan.images:
        return images, None
    if isinstance(images, Regions):
        masked = batch.masked_regions
        return Regions.cat([images, masked]) if clean else masked, None
    ids = batch.hidden_patches
    shape = (len(batch), model.config.num_patches)
    # What stands for none (-1) is hidden in a column that is cut off.
    hidden = torch.zeros(shape[0], shape[1] + 1, dtype=torch.bool, device=ids.device)
    hidden = hidden.scatter(1, torch.where(ids < 0, shape[1], ids), True)[:, :-1]
    if not clean:
        return images, hidden
    return torch.cat([images, images]), torch.cat([torch.zeros_like(hidden), hidden])


def fuse(passes: Passes) -> FusedOutput:
    """All rows of the plan in one call.

    A missing negative (-1) runs on row 0 and is left out of the loss: no data-dependent shapes.
    """
    batch, plan, student, size = passes.batch, passes.plan, passes.student, len(passes.batch)
    hard = (passes.hard_text, passes.hard_image)
    hard = [None if drawn is None else drawn.clamp(min=0) for drawn in hard]
    device = batch.image_ids.device
    texts, images = plan.fusion_rows(size, *hard, device, passes.mixed_image, batch.shown)
    words, keys, blocks = None if student.text is None else student.text.tokens, student.keys, None
    if plan.reads_alone:
        nothing = Ragged.empty((words if keys is None else keys).values)
        words = nothing if words is None else Ragged.cat([words, nothing])
        keys = nothing if keys is None else Ragged.cat([keys, nothing])
    rows = words.select(texts)
    if plan.causal:
        masked = (rows.row_ids() // size) == plan.fusion.index(Rows.MASKED)
        blocks = torch.where(masked, rows.positions() + 1, 0)
    return passes.model.fuse_pairs(
        rows,
        keys,
        images,
        seed=fold_seed(passes.seed, 4),
        text_blocks=blocks,
        images="masked_image" in plan.images or bool(passes.config.wra),
    )


def teacher_fused(passes: Passes) -> Ragged:
    """What the teacher's fusion makes of the masked texts with their images: packed tokens."""
    teacher, size = passes.teacher, len(passes.batch)
    own = torch.arange(size, device=passes.batch.image_ids.device)
    return teacher.model.fuse(teacher.text.tokens.select(own + size), teacher.keys, own)
