"""Losses on discrete codes of patches: telling hidden ones (BEiT), and learning the codes
themselves (VQ-KD).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.objectives.passes import Loss, Passes
from vlpfast.objectives.table import Rows
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy


def mim(passes: Passes) -> Loss:
    """Masked image modelling: cross-entropy with the codes of hidden patches, by the tower's tokens
    and, where there is one, by the class token's head; a sum of the two for each patch.

    Source: Peng et al. 2022 (BEiT v2), eq. 5 and section 2.3, arXiv:2208.06366.
    """
    rows = Rows.MASKED_IMAGE_ALONE if passes.model.config.one_stack else None
    return _code_loss(passes, rows)


def _code_loss(passes: Passes, rows: Rows | None) -> Loss:
    hidden, ids = _hidden_patches(passes, rows), passes.batch.hidden_patches
    target = passes.batch.codes.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -100).flatten()
    # One product with the codes' weights for both heads.
    inputs = passes.model.code_head_inputs(torch.stack(hidden).flatten(0, 2))
    loss = linear_cross_entropy(*inputs[:2], target.repeat(len(hidden)), inputs[2], reduction="sum")
    return loss, (ids >= 0).sum()


def mvm(passes: Passes) -> Loss:
    """Masked vision modelling: the same of hidden patches of images whose texts can be seen.

    Source: Wang et al. 2022 (BEiT-3), section 2.2, arXiv:2208.10442.
    """
    return _code_loss(passes, Rows.MASKED_IMAGE)


def mpp(passes: Passes) -> Loss:
    """Masked patch prediction: cross-entropy with the mean colour of hidden patches, a mean over
    channels.

    Deviations: the head is one linear map; blocks of patches are hidden, and none is left as it is.

    Source: Kim et al. 2021 (ViLT), section 4.5, arXiv:2102.03334; dandelin/ViLT
    vilt/modules/objectives.py `compute_mpp`.
    """
    ids, side = passes.batch.hidden_patches[..., None], passes.model.config.vision.patch_size
    rows = Rows.MASKED_IMAGE if passes.model.config.one_stack else None
    pixels = passes.batch.images.unfold(1, side, side).unfold(2, side, side)
    colors = pixels.float().mean((-2, -1)).flatten(1, 2)  # (B, P, 3)
    target = colors.take_along_dim(ids.clamp(min=0), 1).long().masked_fill(ids < 0, -100)
    logits = passes.model.color_logits(_hidden_patches(passes, rows)[0])
    loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="sum") / 3
    return loss, (ids >= 0).sum()


def _hidden_patches(passes: Passes, rows: Rows | None) -> list[Tensor]:
    """States (B, K, D) of the hidden patches, any where there is none: fused ones of `rows`, or
    without, each head's of the vision tower.
    """
    batch, plan, image = passes.batch, passes.plan, passes.student.image
    size, ids = len(batch), batch.hidden_patches.clamp(min=0)[..., None]
    if rows is None:
        tokens = [image.tokens] if image.class_head is None else [image.tokens, image.class_head]
        tokens = [t[size * plan.images.index("masked_image") :] for t in tokens]
        tokens = [passes.model.patches(t).take_along_dim(ids, 1) for t in tokens]
        return [passes.model.image_states(tokens[0]), *tokens[1:]]
    fused = passes.fused.image
    # Patches are an image's last tokens, whatever stands before them.
    ends = fused.cu_seqlens[plan.sequences(rows, size, ids.device) + 1][:, None]
    return [fused.values[ends - passes.model.config.num_patches + ids[..., 0]]]


def kmeans(passes: Passes) -> Loss:
    """Squared distance of each cell's feature from its nearest centre, without a gradient: it shows
    how well the centres fit, which `layers.codebook.KMeans` moves after the step.
    """
    tokenizer, tokens = passes.model.tokenizer, passes.student.image.tokens
    distance = tokenizer.fit(tokens[: len(passes.batch)])
    passes.metrics["codes_in_use"] = tokenizer.codebook.in_use.clone()
    count = len(passes.batch) * passes.model.config.num_patches
    return distance, torch.tensor(count, device=distance.device)


def vqkd(passes: Passes) -> Loss:
    """A tokenizer's training: 1 - cosine of decoded and the teacher's features, and the mean square
    of how far vectors are from their codes, of each patch. `metrics` gets the cosine and the share
    of codes that the last step used.

    Source: Peng et al. 2022 (BEiT v2), eq. 3, arXiv:2208.06366; microsoft/unilm
    beit2/modeling_vqkd.py.
    """
    model, target = passes.model, passes.batch.features
    out = model.tokenizer(model.patches(passes.student.image.tokens), passes.seed)
    cosine = F.cosine_similarity(out.features.float(), target.float(), dim=-1)
    count = cosine.numel()
    passes.metrics["vqkd_cosine"] = cosine.mean().detach()
    passes.metrics["codes_in_use"] = model.tokenizer.codebook.in_use.clone()
    loss = (1 - cosine).sum() + passes.config.commitment * out.commitment
    return loss, torch.tensor(count, device=loss.device)
