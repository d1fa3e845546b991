"""open_clip's loss classes with its own signatures, on `ops.contrastive_loss`.

With several ranks every contrastive loss follows one convention: after DDP's mean over ranks, the
gradient of towers, scale and bias equals that of one process on the concatenated batch. open_clip's
does so for `gather_with_grad=True` only; docs/integrations.md has the table of its four settings.
CoCaLoss's caption loss is the rank's own, as open_clip's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast import ops
from vlpfast.ops._collectives import gather_counts, gather_rows


class ClipLoss(nn.Module):
    """Softmax contrastive loss (CLIP) of the pairs of all ranks; see `ops.contrastive_loss`.

    No logits are formed, so open_clip's `get_logits` and `get_ground_truth` do not exist here. The
    loss is fp32 (fp64 for fp64 features) whatever the dtype of the features. Ranks may hold
    batches of different sizes.

    Args:
        local_loss: what is reported, as in open_clip: this rank's rows (True) or the mean over all
            ranks (False, one all-reduce of a scalar). The gradient is the same.
        gather_with_grad: accepted; the gradient always flows back through the gather.
        cache_labels: accepted; there are no labels.
        rank, world_size: must be those of the default process group if world_size > 1.
        use_horovod: not offered.

    Raises:
        NotImplementedError: use_horovod=True.

    Source: Radford et al. 2021 (CLIP), fig. 3, arXiv:2103.00020; signature of open_clip 3.3.0,
        src/open_clip/loss.py.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise NotImplementedError("use_horovod=True is not offered: torch.distributed only")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of image_features (B, D) and text_features (B, D), L2-normalised.

        Args:
            logit_scale: what similarities are multiplied by, one element.
            logit_bias: added to them; without effect on a softmax, its gradient is 0.
            output_dict: return {"contrastive_loss": loss} instead of loss.
        """
        loss = self._contrastive(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _contrastive(
        self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        group = _checked_group(self.rank, self.world_size)
        return self._reported(ops.contrastive_loss(image, text, scale, bias, group=group).loss)

    def _reported(self, loss: Tensor) -> Tensor:
        """`loss` with its gradient, and the value that open_clip's setting reports."""
        if self.world_size == 1 or self.local_loss:
            return loss
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return _with_value(loss, mean / self.world_size)


class CoCaLoss(ClipLoss):
    """Contrastive and captioning loss of CoCa; returns (contrastive_loss, caption_loss), weighted.

    Over several ranks the contrastive loss is that of `ClipLoss`. The captioning loss is, as in
    open_clip, the mean over this rank's own tokens: DDP's mean over ranks weighs ranks alike,
    and differs from one process where ranks hold different numbers of tokens.

    Args:
        caption_loss_weight: factor of the captioning loss.
        clip_loss_weight: factor of the contrastive loss; 0 leaves it out.
        pad_id: label that is not counted. Where all labels are pad_id the captioning loss is 0
            (open_clip's is NaN).
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: see `ClipLoss`.

    Source: Yu et al. 2022 (CoCa), eq. 3, arXiv:2205.01917; signature of open_clip 3.3.0.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.caption_loss_weight, self.clip_loss_weight = caption_loss_weight, clip_loss_weight
        self.pad_id = pad_id

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
        *,
        head: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both losses.

        Args:
            image_features, text_features (B, D): L2-normalised.
            logits (B, L, V): of the decoder; with `head`, its hidden states (B, L, D_h) instead.
            labels (B, L): int64, pad_id where there is no token.
            logit_scale: what similarities are multiplied by, one element.
            output_dict: return {"contrastive_loss": ..., "caption_loss": ...}.
            head (V, D_h): output embedding. With it the logits of padding are never computed and
                those of tokens never stored; see `ops.linear_cross_entropy`. Not in open_clip.
        """
        clip_loss = torch.zeros((), device=logits.device)
        if self.clip_loss_weight:
            clip_loss = self._contrastive(image_features, text_features, logit_scale)
        clip_loss = self.clip_loss_weight * clip_loss
        caption_loss = self.caption_loss_weight * self._caption(logits, labels, head)
        if output_dict:
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss

    def _caption(self, logits: Tensor, labels: Tensor, head: Tensor | None) -> Tensor:
        if logits.dim() != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                "logits must be (B, L, V) and labels (B, L), got "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        if head is not None:
            return ops.linear_cross_entropy(logits, head, labels, ignore_index=self.pad_id)
        # Per token, so that half precision neither overflows nor is summed in.
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=self.pad_id, reduction="none"
        )
        dtype = torch.float64 if losses.dtype == torch.float64 else torch.float32
        return losses.sum(dtype=dtype) / (labels != self.pad_id).sum().clamp(min=1)


class DistillClipLoss(ClipLoss):
    """Contrastive loss and distillation from another CLIP; returns (contrastive, distill).

        distill = mean_i -sum_j softmax_j(teacher's logits_i) log softmax_j(student's logits_i)

    averaged over both directions. The student's logits are linear in its embeddings, so with
    o_i = sum_j softmax_j(teacher's logits_i) text_j, an attention output,

        distill = contrastive + logit_scale mean_i <image_i, text_i - o_i>     (image to text)

    and no matrix of logits is needed. Arguments as `ClipLoss`.

    Source: class of this name in open_clip 3.3.0, src/open_clip/loss.py.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both losses.

        Args:
            image_features, text_features (B, D): the student's, L2-normalised.
            logit_scale: the student's, one element.
            dist_image_features, dist_text_features (B, D_m): the teacher's, never differentiated.
            dist_logit_scale: the teacher's, one element.
            output_dict: return {"contrastive_loss": ..., "distill_loss": ...}.
        """
        shapes = tuple(dist_image_features.shape), tuple(dist_text_features.shape)
        if len(shapes[0]) != 2 or shapes[0][0] != len(image_features) or shapes[0] != shapes[1]:
            raise ValueError(
                "dist_image_features and dist_text_features must be "
                f"(B={len(image_features)}, D_m), got {shapes[0]} and {shapes[1]}"
            )
        group = _checked_group(self.rank, self.world_size)
        loss = ops.contrastive_loss(image_features, text_features, logit_scale, group=group).loss
        excess = self._excess(
            image_features,
            text_features,
            logit_scale,
            dist_image_features.detach(),
            dist_text_features.detach(),
            torch.as_tensor(dist_logit_scale).detach(),
            group,
        )
        contrastive, distill = self._reported(loss), self._reported(loss + excess)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _excess(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        image_m: Tensor,
        text_m: Tensor,
        scale_m: Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """What the teacher's targets add to the contrastive loss, this rank's share of the mean."""
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        with torch.autocast(image.device.type, enabled=False):
            image, text, image_m, text_m = (x.to(dtype) for x in (image, text, image_m, text_m))
            rows = (image, text, image_m, text_m)
            share = 1 / max(1, image.shape[0])
            if group is not None:
                counts = gather_counts(image.shape[0], group, image.device)
                rows = tuple(gather_rows(x, counts, group) for x in rows)
                share = len(counts) / max(1, sum(counts))
            all_image, all_text, all_image_m, all_text_m = rows
            scale_m = scale_m.to(image)
            expected_text = _expected(image_m, all_text_m, all_text, scale_m)
            expected_image = _expected(text_m, all_image_m, all_image, scale_m)
            difference = image * (text - expected_text) + text * (image - expected_image)
            scale = torch.as_tensor(scale).reshape(()).to(image)
            return scale * difference.sum() * (share / 2)


class SigLipLoss(nn.Module):
    """Pairwise sigmoid loss (SigLIP) of the pairs of all ranks; see `ops.contrastive_loss`.

    Args:
        cache_labels: accepted; there are no labels.
        rank, world_size: must be those of the default process group if world_size > 1.
        dist_impl: "bidir", "shift", "reduce", "gather" or None. open_clip's four ways of exchanging
            texts give the same loss and gradient; here the op chooses.

    Source: Zhai et al. 2023 (SigLIP), alg. 1, arXiv:2303.15343; signature of open_clip 3.3.0.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        known = ("bidir", "shift", "reduce", "gather")
        if dist_impl is not None and dist_impl not in known:
            raise ValueError(f"dist_impl must be None or one of {known}, got {dist_impl!r}")
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl = dist_impl

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of image_features (B, D) and text_features (B, D), L2-normalised.

        Args:
            logit_scale: what similarities are multiplied by, one element.
            logit_bias: added to them, one element, or None.
            output_dict: return {"contrastive_loss": loss} instead of loss.
        """
        group = _checked_group(self.rank, self.world_size)
        out = ops.contrastive_loss(
            image_features, text_features, logit_scale, logit_bias, kind="sigmoid", group=group
        )
        # open_clip reports this rank's images against all texts; the op's loss also counts this
        # rank's texts against all images. Over all ranks both have one mean and one gradient.
        loss = _with_value(out.loss, out.image_to_text)
        return {"contrastive_loss": loss} if output_dict else loss


def _expected(query: Tensor, keys: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """softmax(scale * query @ keys.T) @ values, (B, D), by torch's attention kernels."""
    # One width for all three, as the kernels without a matrix of scores ask for; zeros add nothing.
    width = max(query.shape[1], values.shape[1])
    q, k, v = (F.pad(x, (0, width - x.shape[1]))[None, None] for x in (scale * query, keys, values))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[0, 0, :, : values.shape[1]]


def _with_value(loss: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `loss`."""
    return value.detach() + (loss - loss.detach())


def _checked_group(rank: int, world_size: int) -> dist.ProcessGroup | None:
    """The default group, if it is the one that rank and world_size describe; None for one rank."""
    if world_size == 1:
        return None
    if not dist.is_initialized():
        raise ValueError(
            f"world_size={world_size} needs torch.distributed.init_process_group before the loss"
        )
    actual = (dist.get_rank(), dist.get_world_size())
    if (rank, world_size) != actual:
        raise ValueError(
            f"rank and world_size must be the default process group's {actual}, "
            f"got {(rank, world_size)}"
        )
    return dist.group.WORLD
