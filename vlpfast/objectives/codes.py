"""Losses on discrete codes of patches: telling hidden ones (BEiT), and learning the codes
themselves (VQ-KD).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.objectives.passes import Loss, Passes
from vlpfast.objectives.plan import Rows
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy


def mim(passes: Passes) -> Loss:
    """Masked image modelling: cross-entropy with the codes of hidden patches, by the tower's tokens
    and, where there is one, by the class token's head; a sum of the two for each patch.

    Source: Peng et al. 2022 (BEiT v2), eq. 5 and section 2.3, arXiv:2208.06366.
    """
    return _code_loss(passes, _masked_tokens(passes))


def mvm(passes: Passes) -> Loss:
    """Masked vision modelling: the same from the fused tokens of the image with its text, whatever
    `mim_reads`.

    Source: Wang et al. 2022 (BEiT-3), section 2.2, arXiv:2208.10442.
    """
    return _code_loss(passes, [_fused_images(passes, Rows.MASKED_IMAGE)])


def _code_loss(passes: Passes, heads: list[Tensor]) -> Loss:
    """Cross-entropy with the codes of hidden patches, of each head's tokens (B, N, D)."""
    batch = passes.batch
    ids = batch.hidden_patches
    hidden = [passes.model.patches(tokens).take_along_dim(ids[..., None], 1) for tokens in heads]
    target = batch.codes.gather(1, ids).flatten()
    # One product with the codes' weights for both heads.
    inputs = passes.model.code_head_inputs(torch.stack(hidden).flatten(0, 2))
    loss = linear_cross_entropy(*inputs[:2], target.repeat(len(heads)), inputs[2], reduction="sum")
    return loss, torch.tensor(target.shape[0], device=loss.device)


def mpp(passes: Passes) -> Loss:
    """Masked patch prediction: cross-entropy with the mean colour of hidden patches, a mean over
    channels.

    Deviations: the head is one linear map; blocks of patches are hidden, and none is left as it is.

    Source: Kim et al. 2021 (ViLT), section 4.5, arXiv:2102.03334; dandelin/ViLT
    vilt/modules/objectives.py `compute_mpp`.
    """
    ids, side = passes.batch.hidden_patches[..., None], passes.model.config.vision.patch_size
    pixels = passes.batch.images.unfold(1, side, side).unfold(2, side, side)
    colors = pixels.float().mean((-2, -1)).flatten(1, 2)  # (B, P, 3)
    target = colors.take_along_dim(ids, 1).long()
    tokens = passes.model.patches(_masked_tokens(passes)[0]).take_along_dim(ids, 1)
    logits = passes.model.color_logits(tokens)
    loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="sum") / 3
    return loss, torch.tensor(ids.numel(), device=loss.device)


def _masked_tokens(passes: Passes) -> list[Tensor]:
    """Tokens (B, N, D) of the masked images by each head: fused, the stack's on images alone, or
    the vision tower's.
    """
    size, plan, image = len(passes.batch), passes.plan, passes.student.image
    if passes.config.mim_reads == "pair":
        return [_fused_images(passes, Rows.MASKED_IMAGE)]
    if passes.model.config.one_stack:
        return [_fused_images(passes, Rows.MASKED_IMAGE_ALONE)]
    heads = [image.tokens] if image.class_head is None else [image.tokens, image.class_head]
    return [tokens[size if plan.clean_image else 0 :] for tokens in heads]


def _fused_images(passes: Passes, rows: Rows) -> Tensor:
    """Fused image tokens (B, N, D) of `rows`."""
    fused, size = passes.fused.image, len(passes.batch)
    # Images are of one length, and rows without one come last.
    first, length = passes.plan.first_sequence(rows, size), fused.max_len
    tokens = fused.values[first * length : (first + size) * length]
    return tokens.unflatten(0, (size, length))


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
