"""PretrainStep: a batch through the model once, every enabled objective out of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives import (
    codes,
    contrast,
    language,
    matching,
    negatives,
    regions,
    similarity,
)
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.objectives.passes import Encoded, Loss, Passes, encode, fuse
from vlpfast.objectives.plan import Plan
from vlpfast.objectives.table import OBJECTIVES, Rows
from vlpfast.objectives.teacher import FeatureQueue, Teacher
from vlpfast.objectives.wiring import check_wiring
from vlpfast.ops.keep_ids import keep_ids
from vlpfast.ops.seed import fold_seed

# Of images of unlike sizes, patches over those of a square: what an image keeps is drawn of as many
# numbers, whatever the batch.
_MOST_ASPECT = 4
# All but itc's, which draws negatives too; in the order of the log.
_LOSSES = {
    "sigmoid": contrast.sigmoid,
    "hinge": contrast.hinge,
    "classify": similarity.classify,
    "itm": matching.itm,
    "lm": language.lm,
    "wra": regions.wra,
    "mlm": language.mlm,
    "mtm": language.mtm,
    "mrfr": regions.mrfr,
    "mrc": regions.mrc,
    "mrckl": regions.mrckl,
    "mra": regions.mra,
    "qa": matching.qa,
    "mim": codes.mim,
    "mvm": codes.mvm,
    "mpp": codes.mpp,
    "vqkd": codes.vqkd,
    "kmeans": codes.kmeans,
}


@dataclass(frozen=True)
class StepOutput:
    """losses: per objective (sum, count) over this rank's rows; metrics: detached scalars for the
    log.
    """

    losses: dict[str, Loss]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class PretrainStep(nn.Module):
    """Model, teacher and queue with the objectives of a run; the module that data-parallel training
    wraps.

    Args:
        model: the student.
        config: enabled objectives.
        group: process group over which contrastive candidates are gathered, or None.
        seed: of the run; with a sample's place in the stream it keys patch dropping, which so does
            not depend on the split over ranks.

    Raises:
        ValueError: an objective needs a part that the model does not have.
    """

    def __init__(
        self,
        model: VLPModel,
        config: ObjectivesConfig,
        group: dist.ProcessGroup | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_wiring(model.config, config)
        self.model, self.config, self.group, self.seed = model, config, group, seed
        self.teacher = Teacher(model, config.momentum) if config.momentum else None
        self.queue = (
            FeatureQueue(config.queue_size, model.config.embed_dim) if config.queue_size else None
        )
        self._to_enqueue: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each objective in the total."""
        return self.config.weights

    @property
    def has_idle_parameters(self) -> bool:
        """Whether a step may leave parameters without a gradient: it trains one of several
        objectives, or not those of all heads or scales, or one stack whose last states of a
        modality nothing reads.
        """
        config, model = self.config, self.model
        images, one_stack = model.config.answer_images, model.config.one_stack
        plan = Plan.of(config, one_stack=one_stack, images=images)
        needed = {part for name in config.weights for part in OBJECTIVES[name].needs}
        idle = any(
            head is not None and part not in needed for part, head in model.trained_parts.items()
        )
        reads_words = config.itm or config.mlm or config.mtm
        experts = model.config.fusion.experts != "shared" and not (
            reads_words and "masked_image" in plan.images
        )
        alone = len(plan.fusion) == 1 and plan.reads_alone
        unread = one_stack and "image" not in plan.embeds and (experts or alone)
        # A joint space with scales of tasks has one of contrast beside them.
        scales = {*model.task_scale, "itc"} if model.task_scale else set()
        return bool(config.mix) or unread or idle or not scales <= config.weights.keys()

    def forward(self, batch: Batch, *, seed: int, step: int) -> StepOutput:
        """Losses of one batch.

        Args:
            batch: with `masked_text` and `mlm_labels` where MLM is enabled, `masked_alone` and
                `alone_labels` where masked text modelling is, with `regions` where the model reads
                them, `masked_regions` where hidden ones are predicted, `answer_ids` for QA or
                `answer_sets` and `answer_scores` (of two images each, where the model has them),
                `hidden_patches` for MIM, MVM and MPP, `codes` for the first two, `features` for
                VQ-KD.
            seed: keys dropout and hard negatives; the caller varies it by step and rank.
            step: optimizer step, for the ramp of alpha, the end of patch dropping and the choice of
                objective.
        """
        passes = self._passes(batch, self.config.at(step, fold_seed(self.seed, 1)), seed, step)
        config, plan, metrics = passes.config, passes.plan, passes.metrics
        losses = {}
        if self.model.scale is not None:
            metrics["logit_scale"] = self.model.logit_scale.detach()
        if config.itc:
            losses["itc"], *hard = contrast.itc(passes, self.queue)
            passes = replace(passes, hard_text=hard[0], hard_image=hard[1])
            if self.queue is not None and self.training:
                self._to_enqueue.append((*contrast.teacher_embeddings(passes), batch.image_ids))
        if config.itm and config.itm_negatives == "hard-global":
            passes = negatives.over_ranks(passes, fold_seed(self.seed, 4, step))
        if plan.fusion:
            passes = replace(passes, fused=fuse(passes))
        losses |= {name: loss(passes) for name, loss in _LOSSES.items() if name in config.weights}
        metrics |= similarity.expert_metrics(passes)
        return StepOutput(losses, metrics)

    @torch.no_grad()
    def finish_step(self) -> None:
        """After the optimizer step: bounds the scale, moves the teacher and the codes, pushes the
        step's embeddings into the queue.
        """
        self.model.clamp_scale()
        if self.model.tokenizer is not None:
            self.model.tokenizer.codebook.update(fold_seed(self.seed, 3), self.group)
        if self.teacher is not None:
            self.teacher.update(self.model)
        for image, text, ids in self._to_enqueue:
            self.queue.push(*(_gather(t, self.group) for t in (image, text, ids)))
        self._to_enqueue.clear()

    def _passes(self, batch: Batch, config: ObjectivesConfig, seed: int, step: int) -> Passes:
        """The towers' passes."""
        if batch.shown is not None and config.weights.keys() != {"qa"}:
            raise ValueError(
                "several texts about one image (data.questions), or one about two, train "
                f"objectives.qa alone, got {sorted(config.weights)}"
            )
        about = 1 if batch.shown is None else len(batch.shown)
        if config.qa and about != self.model.config.answer_images:
            raise ValueError(
                f"model.answer_images is {self.model.config.answer_images}, and the batch's texts "
                f"are about {about} of its images each"
            )
        one_stack, over_ranks = self.model.config.one_stack, self.group is not None
        images = self.model.config.answer_images
        plan = Plan.of(config, one_stack=one_stack, over_ranks=over_ranks, images=images)
        absent = [name for name in plan.texts if getattr(batch, name) is None]
        if absent:
            raise ValueError(
                f"the batch has no {' and no '.join(absent)}, which objectives "
                f"{', '.join(config.weights)} read; vlpfast.data.masking.mask_text hides words"
            )
        alpha = config.alpha_at(step)
        kept = self._kept_patches(batch, step)
        return Passes(
            batch,
            config,
            plan,
            encode(self.model, batch, kept, seed, plan),
            self._teacher_pass(batch, kept, seed, plan, alpha),
            alpha,
            seed,
            step,
            self.group,
            matching.mixed_images(batch, self.seed) if config.mixes_pairs else None,
        )

    @torch.no_grad()
    def _teacher_pass(
        self, batch: Batch, kept: Tensor | None, seed: int, plan: Plan, alpha: float
    ) -> Encoded | None:
        """The teacher reads masked texts only where its word distributions count."""
        if self.teacher is None:
            return None
        texts, rows = ("text",), ()
        if "masked_text" in plan.texts and alpha > 0:
            texts, rows = ("text", "masked_text"), (Rows.MASKED,)
        read = Plan(texts, ("image",), rows, ("image", "text"))
        return encode(self.teacher.model, batch, kept, seed, read)

    def _kept_patches(self, batch: Batch, step: int) -> Tensor | None:
        """(B, K) ids of the patches that this step embeds; the same for student and teacher."""
        vision, num_patches = self.model.config.vision, self.model.config.num_patches
        if not self.training or vision.front == "regions":
            return None
        num_keep = vision.num_kept(num_patches)
        if batch.sizes is not None and vision.max_patches:
            return self._kept_of_unlike(batch, fold_seed(self.seed, 0))
        if 0 < vision.patch_dropout_steps <= step or num_keep == num_patches:
            return None
        places, seed = batch.image_positions, fold_seed(self.seed, 0)
        return keep_ids(len(places), num_patches, num_keep, seed=seed, sample_ids=places).ids

    def _kept_of_unlike(self, batch: Batch, seed: int) -> Tensor | None:
        """The same of images of unlike sizes, numbered in an image's own raster; what an image
        keeps does not depend on the batch's other images.
        """
        vision, most = self.model.config.vision, _MOST_ASPECT * self.model.config.num_patches
        counts = (batch.sizes // vision.patch_size).prod(1)
        if int(counts.max()) <= vision.max_patches:
            return None
        if int(counts.max()) > most:
            raise ValueError(
                f"an image has {int(counts.max())} patches: at most {_MOST_ASPECT} times the "
                f"{self.model.config.num_patches} of a square fit; set data.max_aspect lower"
            )
        valid = torch.arange(most) < counts[:, None]
        valid = valid.to(batch.images.device, non_blocking=True)
        keys = {"seed": seed, "sample_ids": batch.image_positions, "valid": valid}
        return keep_ids(len(valid), most, vision.max_patches, **keys).ids


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks, in rank order; every rank has the same number."""
    if group is None:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)
