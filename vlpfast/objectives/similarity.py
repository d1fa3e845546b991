"""Similarity to encoded targets: class names here; words are `language`'s, whose vocabulary a
shared encoder encodes; and what a mixture of experts did in a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.models.shared import Kind
from vlpfast.objectives.passes import Loss, Passes
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy
from vlpfast.ops.seed import fold_seed


def classify(passes: Passes) -> Loss:
    """Which of the data's class names an image's class is:

        p(class c | image) = softmax_c(scale * <image, name_c>)

    of embeddings of length 1; the names are encoded as texts, once a step. With `label_smoothing`.

    Source: Zhu et al. 2022 (Uni-Perceiver), eq. 1, arXiv:2112.01522.
    """
    batch, model = passes.batch, passes.model
    if batch.class_ids is None:
        raise ValueError("objectives.classify needs class names: set data.classes")
    names = model.encode_text(batch.class_names, seed=fold_seed(passes.seed, 6), with_tokens=False)
    names = names.embedding
    loss = linear_cross_entropy(
        model.scale_of("classify") * passes.image_embedding,
        names,
        batch.class_ids,
        label_smoothing=passes.config.label_smoothing,
        reduction="sum",
        max_rows=len(batch),
    )
    return loss, (batch.class_ids != -100).sum()


def expert_metrics(passes: Passes) -> dict[str, Tensor]:
    """Of the tokens that went through the encoder, the largest and the smallest share that an
    expert had, and how many experts had any; means over gates. Nothing where there are no experts.
    """
    model, plan, batch = passes.model, passes.plan, passes.batch
    if not model.config.fusion.moe_experts:
        return {}
    image, sizes = passes.student.image.tokens, dict.fromkeys(Kind, 0)
    if "image" in plan.embeds:
        sizes[Kind.IMAGE] = image.shape[0] * (1 + image.shape[1])
    if "text" in plan.embeds:
        sizes[Kind.TEXT] = len(passes.student.text.tokens.values)
    if passes.config.classify:
        sizes[Kind.TEXT] += len(batch.class_names.values)
    words = 2 * model.config.text.vocab_size
    if passes.fused is not None:
        sizes[Kind.FUSED_TEXT] = len(passes.fused.text.values)
        sizes[Kind.FUSED_IMAGE] = len(passes.fused.image.values)
        sizes[Kind.WORD] = words
    if plan.decodes:
        sizes[Kind.CAUSAL_TEXT] = len(batch.text.values)
        sizes[Kind.FUSED_IMAGE] += image.shape[0] * image.shape[1]
        sizes[Kind.WORD] += words
    with torch.no_grad():
        loads = model.fusion.loads({kind: size for kind, size in sizes.items() if size})
        return {
            "expert_load_max": loads.amax(-1).mean(),
            "expert_load_min": loads.amin(-1).mean(),
            "experts_used": (loads > 0).sum(-1).float().mean(),
        }
