"""PretrainStep: a batch through the model once, every enabled objective out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlpfast.data.batch import Batch
from vlpfast.models.outputs import FusedOutput, ImageOutput, TextOutput
from vlpfast.models.towers import ImageKeys
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.objectives.losses import Loss, hinge, matching_loss, pair_loss
from vlpfast.objectives.plan import Plan, Rows
from vlpfast.objectives.regions import alignment_loss, class_divergence, class_loss, feature_loss
from vlpfast.objectives.teacher import FeatureQueue, Teacher
from vlpfast.objectives.wiring import check_wiring
from vlpfast.ops.contrastive import contrastive_loss
from vlpfast.ops.keep_ids import keep_ids
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy
from vlpfast.ops.reference.counter import draw, stream, uniform
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions


@dataclass(frozen=True)
class StepOutput:
    """losses: per objective (sum, count) over this rank's rows; metrics: detached scalars for the
    log.
    """

    losses: dict[str, Loss]
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Encoded:
    """What the towers made of a batch: images (B), clean texts (B), then masked texts (B) where the
    plan has them.
    """

    image: ImageOutput
    text: TextOutput
    keys: ImageKeys | Ragged | None


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
        objectives.
        """
        return bool(self.config.mix)

    def forward(self, batch: Batch, *, seed: int, step: int) -> StepOutput:
        """Losses of one batch.

        Args:
            batch: with `masked_text` and `mlm_labels` where MLM is enabled, with `regions` where
                the model reads them, and `masked_regions` where hidden ones are predicted.
            seed: keys dropout and hard negatives; the caller varies it by step and rank.
            step: optimizer step, for the ramp of alpha, the end of patch dropping and the choice of
                objective.
        """
        config = self.config.at(step, fold_seed(self.seed, 1))
        plan, alpha = Plan.of(config), config.alpha_at(step)
        kept = self._kept_patches(batch, step)
        student = self._encode(self.model, batch, kept, seed, plan)
        teacher, distil_tokens = None, plan.masked_text and alpha > 0
        if self.teacher is not None:
            with torch.no_grad():
                read = Plan(distil_tokens, (Rows.MASKED,) if distil_tokens else (), False)
                teacher = self._encode(self.teacher.model, batch, kept, seed, read)
        losses, metrics = {}, {}
        if self.model.scale is not None:
            metrics["logit_scale"] = self.model.logit_scale.detach()
        hard_text = hard_image = mixed_image = None
        if config.itc:
            losses["itc"], hard_text, hard_image = self._contrast(
                batch, student, teacher, alpha, seed, plan.hard_negatives
            )
        if config.sigmoid:
            losses["sigmoid"] = self._sigmoid(batch, student)
        if config.hinge:
            image, text = student.image.embedding, student.text.embedding[: len(batch)]
            losses["hinge"] = hinge(
                image,
                text,
                batch.image_ids,
                margin=config.hinge_margin,
                hardest=config.hinge_hardest and step >= config.hinge_sum_steps,
                group=self.group,
            )
        if Rows.MIXED in plan.fusion:
            mixed_image = self._mixed_images(batch)
        if plan.fusion:
            fused = self._fuse(batch, student, plan, hard_text, hard_image, mixed_image, seed)
        if config.itm:
            num_matched = len(batch) if mixed_image is not None else 3 * len(batch)
            logits = self.model.match_logits(fused.text.values[fused.text.first()[:num_matched]])
            if mixed_image is not None:
                matched = batch.image_ids[mixed_image] == batch.image_ids
                losses["itm"], right = pair_loss(logits, matched)
            else:
                losses["itm"], right = matching_loss(logits, hard_text, hard_image)
            metrics["itm_accuracy"] = right / losses["itm"][1]
        if config.wra:
            rows = plan.sequences(Rows.MIXED, len(batch), matched.device)
            losses["wra"] = alignment_loss(
                fused.text.select(rows), fused.image.select(rows), matched, config.wra_tokens
            )
        if config.mlm:
            losses["mlm"] = self._masked_language(batch, fused.text, plan, teacher, alpha)
        if plan.masked_image:
            losses |= self._masked_regions(batch, fused.image, plan, config)
        return StepOutput(losses, metrics)

    @torch.no_grad()
    def finish_step(self) -> None:
        """After the optimizer step: bounds the scale, moves the teacher, pushes the step's
        embeddings into the queue.
        """
        self.model.clamp_scale()
        if self.teacher is not None:
            self.teacher.update(self.model)
        for image, text, ids in self._to_enqueue:
            self.queue.push(*(_gather(t, self.group) for t in (image, text, ids)))
        self._to_enqueue.clear()

    @staticmethod
    def _encode(
        model: VLPModel,
        batch: Batch,
        kept: Tensor | None,
        seed: int,
        plan: Plan,
    ) -> _Encoded:
        images = batch.visual(model.config.vision.front)
        if plan.masked_image:
            images = Regions.cat([images, batch.masked_regions])
        image = model.encode_image(images, kept, seed=fold_seed(seed, 1))
        texts = [batch.text, batch.masked_text] if plan.masked_text else [batch.text]
        text = model.encode_text(Ragged.cat(texts), seed=fold_seed(seed, 2))
        return _Encoded(image, text, model.image_keys(image.tokens) if plan.fusion else None)

    def _kept_patches(self, batch: Batch, step: int) -> Tensor | None:
        """(B, K) ids of the patches that this step embeds; the same for student and teacher."""
        vision, num_patches = self.model.config.vision, self.model.config.num_patches
        if not self.training or vision.front == "regions":
            return None
        num_keep = vision.num_kept(num_patches)
        if 0 < vision.patch_dropout_steps <= step or num_keep == num_patches:
            return None
        size, seed = len(batch), fold_seed(self.seed, 0)
        return keep_ids(size, num_patches, num_keep, seed=seed, sample_ids=batch.positions).ids

    def _contrast(
        self,
        batch: Batch,
        student: _Encoded,
        teacher: _Encoded | None,
        alpha: float,
        seed: int,
        hard_negatives: bool,
    ) -> tuple[Loss, Tensor | None, Tensor | None]:
        size = len(batch)
        keys = {}
        if self.queue is not None:
            image_keys, text_keys, key_ids = self.queue.entries()
            keys = {"image_keys": image_keys, "text_keys": text_keys, "key_ids": key_ids}
        if teacher is not None:
            keys["teacher"] = (teacher.image.embedding, teacher.text.embedding[:size])
            keys["alpha"] = alpha
            if self.queue is not None and self.training:
                self._to_enqueue.append((*keys["teacher"], batch.image_ids))
        out = contrastive_loss(
            student.image.embedding,
            student.text.embedding[:size],
            self.model.logit_scale,
            # A softmax does not see it; so its gradient is zero, not absent.
            self.model.logit_bias,
            ids=batch.image_ids,
            label_smoothing=self.config.label_smoothing,
            hard_negatives=int(hard_negatives),
            seed=fold_seed(seed, 3),
            group=self.group,
            **keys,
        )
        # Already normalised over all ranks: see `contrastive_loss` on what `group` returns.
        loss = (out.loss, torch.ones((), device=out.loss.device))
        if not hard_negatives:
            return loss, None, None
        return loss, out.hard_text[:, 0], out.hard_image[:, 0]

    def _mixed_images(self, batch: Batch) -> Tensor:
        """(B,) the image that random matching shows with each text: its own, or for half of them
        any other of the batch (UNITER, ViLT), which is still a match where both show the same.
        """
        size = len(batch)
        keys = stream(fold_seed(self.seed, 2), batch.positions)
        own = torch.arange(size, device=keys.device)
        shift = 1 + ((draw(keys, torch.zeros_like(own)) * (size - 1)) >> 32)
        swapped = uniform(draw(keys, torch.ones_like(own))) < 0.5
        return torch.where(swapped, (own + shift) % size, own)

    def _sigmoid(self, batch: Batch, student: _Encoded) -> Loss:
        out = contrastive_loss(
            student.image.embedding,
            student.text.embedding[: len(batch)],
            self.model.logit_scale,
            self.model.logit_bias,
            kind="sigmoid",
            ids=batch.image_ids,
            group=self.group,
        )
        return out.loss, torch.ones((), device=out.loss.device)

    def _fuse(
        self,
        batch: Batch,
        student: _Encoded,
        plan: Plan,
        hard_text: Tensor | None,
        hard_image: Tensor | None,
        mixed_image: Tensor | None,
        seed: int,
    ) -> FusedOutput:
        # A missing negative (-1) runs on row 0 and is left out of the loss: no data-dependent
        # shapes.
        negatives = [
            None if hard is None else hard.clamp(min=0) for hard in (hard_text, hard_image)
        ]
        device = batch.image_ids.device
        texts, images = plan.fusion_rows(len(batch), *negatives, device, mixed_image)
        return self.model.fuse_pairs(
            student.text.tokens.select(texts), student.keys, images, seed=fold_seed(seed, 4)
        )

    def _masked_language(
        self, batch: Batch, fused: Ragged, plan: Plan, teacher: _Encoded | None, alpha: float
    ) -> Loss:
        """Cross-entropy at masked positions only, mixed with the teacher's distribution there."""
        start = fused.cu_seqlens[plan.first_sequence(Rows.MASKED, len(batch))]
        masked = (batch.mlm_labels != -100).nonzero().squeeze(1)
        target = batch.mlm_labels[masked]
        distillation = {}
        if teacher is not None and alpha > 0:
            with torch.no_grad():
                size = len(batch)
                own = torch.arange(size, device=masked.device)
                text = teacher.text.tokens.select(own + size)
                fused_m = self.teacher.model.fuse(text, teacher.keys, own)
                distillation = {
                    "teacher": self.teacher.model.token_head_inputs(fused_m.values[masked]),
                    "alpha": alpha,
                }
        hidden, weight, bias = self.model.token_head_inputs(fused.values[start + masked])
        loss = linear_cross_entropy(hidden, weight, target, bias, reduction="sum", **distillation)
        return loss, torch.tensor(target.shape[0], device=loss.device)

    def _masked_regions(
        self, batch: Batch, fused: Ragged, plan: Plan, config: ObjectivesConfig
    ) -> dict[str, Loss]:
        """What hidden regions were: features, class, distribution of classes."""
        regions = batch.masked_regions
        hidden = regions.hidden.nonzero().squeeze(1)
        start = fused.cu_seqlens[plan.first_sequence(Rows.MASKED_IMAGE, len(batch))]
        tokens = fused.values[start + hidden]
        losses = {}
        if config.mrfr:
            target = regions.features.values[hidden]
            predicted = self.model.region_features(tokens)
            losses["mrfr"] = feature_loss(predicted, target, config.mrm_reduction)
        if config.mrc or config.mrckl:
            if regions.labels is None:
                raise ValueError(
                    "objectives.mrc and objectives.mrckl need the detector's class distributions, "
                    "and the regions have no labels; mrfr needs none"
                )
            logits, labels = self.model.region_logits(tokens), regions.labels[hidden]
            if config.mrc:
                losses["mrc"] = class_loss(logits, labels)
            if config.mrckl:
                losses["mrckl"] = class_divergence(logits, labels, config.mrm_reduction)
        return losses


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks, in rank order; every rank has the same number."""
    if group is None:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)
