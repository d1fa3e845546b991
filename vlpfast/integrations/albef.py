"""ALBEF's image-text contrastive step (ITC): momentum targets, a queue, ids, hard negatives.

The rest of ALBEF's forward (encoders, momentum encoders, matching, masked language) stays in the
caller's model; `vlpfast.objectives` has a whole step.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast import ops
from vlpfast.objectives.teacher import FeatureQueue
from vlpfast.ops._collectives import gather_counts, gather_rows
from vlpfast.ops.contrastive import ContrastiveOutput

# An id that no sample has: what ALBEF fills its queue of ids with.
_NO_ID = -100


class ITCLoss(nn.Module):
    """The contrastive loss of ALBEF and of its retrieval fine-tuning, with their queue.

        z = feat @ [feat_m of this rank's batch, queue].T / temp           both directions
        loss = mean_i -sum_j (alpha softmax_j(z_m,i) + (1 - alpha) y_ij) log softmax_j(z_i)

    z_m has the momentum features as queries; y marks the row's own pair, or with `idx` all entries
    of its id, divided by their number.

    The state dict is ALBEF's: image_queue and text_queue (D, K), queue_ptr (1,) and, if `with_idx`,
    idx_queue (1, K), under this module's prefix; attributes of these names are views of that shape.
    In memory entries are rows. As in ALBEF the queue starts as random unit vectors that count as
    negatives, with ids -100 that match nothing. Unlike ALBEF's, it takes any batch size.

    In training mode the momentum features of a forward enter the queue at the start of the next one
    (or when the state dict or a queue is read), which is what ALBEF's "after the loss" amounts to
    without its two copies of the queue: run the backward of a step before the next forward.

    Args:
        embed_dim: D.
        queue_size: K (ALBEF: 65536).
        with_idx: have the queue of ids, as ALBEF's retrieval model.
        hard_negatives: k, negatives to draw for each row for the matching loss.
        gather_batch: take the momentum features of all ranks as candidates. ALBEF takes this
            rank's, and sees the others' through the queue.
        group: ranks that fill one queue together; None: torch.distributed's default group where it
            is initialised, else this process alone.

    Source: Li et al. 2021 (ALBEF), eq. 1-2 and 6, arXiv:2107.07651; models/model_pretrain.py and
        models/model_retrieval.py of salesforce/ALBEF.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        queue_size: int = 65536,
        *,
        with_idx: bool = False,
        hard_negatives: int = 0,
        gather_batch: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or queue_size < 1:
            raise ValueError(
                f"embed_dim and queue_size must be >= 1, got {embed_dim} and {queue_size}"
            )
        self.with_idx, self.hard_negatives = with_idx, hard_negatives
        self.gather_batch, self._group = gather_batch, group
        self.queue = FeatureQueue(queue_size, embed_dim)
        self.queue.image.copy_(F.normalize(torch.randn(queue_size, embed_dim), dim=1))
        self.queue.text.copy_(F.normalize(torch.randn(queue_size, embed_dim), dim=1))
        self.queue.ids.fill_(_NO_ID)
        self.queue.pushed = queue_size
        self._to_enqueue: tuple[Tensor, Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(_push)
        self.register_state_dict_post_hook(_to_albef_names)
        self.register_load_state_dict_pre_hook(_from_albef_names)

    def forward(
        self,
        image_feat: Tensor,
        text_feat: Tensor,
        image_feat_m: Tensor,
        text_feat_m: Tensor,
        temp: Tensor | float,
        alpha: float = 0.0,
        idx: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
    ) -> ContrastiveOutput:
        """The step of one batch; ALBEF's `loss_ita` is the result's `loss`.

        Args:
            image_feat, text_feat (B, D): L2-normalised embeddings.
            image_feat_m, text_feat_m (B, D): the momentum model's, never differentiated.
            temp: temperature, what similarities are DIVIDED by; one element, clamped by the caller
                (ALBEF: to [0.001, 0.5] before each step).
            alpha: weight of the momentum targets in [0, 1].
            idx (B,) or (B, 1): int64 image ids >= 0; needed if, and only if, `with_idx`.
            seed: of the hard negatives, another one each step; needed if `hard_negatives` > 0.

        Returns:
            ContrastiveOutput; `hard_text` and `hard_image` (B, k) are rows of this batch, -1 where
            no pair of another id exists.
        """
        if self.with_idx != (idx is not None):
            raise ValueError(
                f"with_idx={self.with_idx} {'needs' if self.with_idx else 'takes no'} idx, got "
                f"{'None' if idx is None else 'a tensor'}"
            )
        if not isinstance(temp, Tensor) and not temp > 0:
            raise ValueError(f"temp must be > 0, got {temp}")
        self._enqueue()
        ids = None if idx is None else idx.reshape(-1)
        image_keys, text_keys, key_ids = self.queue.entries()
        output = ops.contrastive_loss(
            image_feat,
            text_feat,
            1 / temp,
            ids=ids,
            image_keys=image_keys,
            text_keys=text_keys,
            key_ids=key_ids if self.with_idx else None,
            teacher=(image_feat_m, text_feat_m),
            alpha=alpha,
            hard_negatives=self.hard_negatives,
            seed=seed,
            group=self._ranks() if self.gather_batch else None,
        )
        if self.training:
            no_ids = self.queue.ids.new_full(image_feat.shape[:1], _NO_ID)
            self._to_enqueue = self._of_all_ranks(
                image_feat_m, text_feat_m, no_ids if ids is None else ids
            )
        return output

    @property
    def image_queue(self) -> Tensor:
        """(D, K) view of the images' momentum features."""
        self._enqueue()
        return self.queue.image.T

    @property
    def text_queue(self) -> Tensor:
        """(D, K) view of the texts' momentum features."""
        self._enqueue()
        return self.queue.text.T

    @property
    def idx_queue(self) -> Tensor:
        """(1, K) view of the ids; only if `with_idx`."""
        if not self.with_idx:
            raise AttributeError("idx_queue needs with_idx=True")
        self._enqueue()
        return self.queue.ids[None]

    @property
    def queue_ptr(self) -> Tensor:
        """(1,) int64: the column that the next batch starts at."""
        self._enqueue()
        return torch.tensor([self.queue.pushed % self.queue.size], device=self.queue.ids.device)

    def _ranks(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self._group is None and dist.is_initialized() else self._group

    @torch.no_grad()
    def _of_all_ranks(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of all ranks, in rank order. Every rank is here, which it need not be later:
        checkpoints are often written by one.
        """
        group = self._ranks()
        if group is None:
            # Copies: the caller may reuse its memory before they are pushed.
            return tuple(row.detach().clone() for row in rows)
        counts = gather_counts(rows[0].shape[0], group, rows[0].device)
        return tuple(gather_rows(row, counts, group) for row in rows)

    def _enqueue(self) -> None:
        """Pushes what the last forward left."""
        if self._to_enqueue is not None:
            self.queue.push(*self._to_enqueue)
            self._to_enqueue = None


def _push(module: ITCLoss, *_: object) -> None:
    module._enqueue()


def _to_albef_names(
    module: ITCLoss, state: MutableMapping[str, Tensor], prefix: str, _: object
) -> None:
    image, text, ids, pushed = (
        state.pop(f"{prefix}queue.{name}") for name in ("image", "text", "ids", "_extra_state")
    )
    state[f"{prefix}image_queue"], state[f"{prefix}text_queue"] = image.T, text.T
    if module.with_idx:
        state[f"{prefix}idx_queue"] = ids[None]
    state[f"{prefix}queue_ptr"] = torch.tensor([pushed % module.queue.size])


def _from_albef_names(
    module: ITCLoss,
    state: MutableMapping[str, Tensor],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    *_: object,
) -> None:
    # What was seen before must not be pushed over what is loaded.
    module._enqueue()
    own = {"image_queue": module.image_queue, "text_queue": module.text_queue}
    own["queue_ptr"] = module.queue_ptr
    if module.with_idx:
        own["idx_queue"] = module.idx_queue
    missing += [prefix + name for name in own if prefix + name not in state]
    found = {name: state.pop(prefix + name, value) for name, value in own.items()}
    ids = found["idx_queue"][0] if module.with_idx else module.queue.ids
    queue = {"image": found["image_queue"].T, "text": found["text_queue"].T, "ids": ids}
    queue["_extra_state"] = module.queue.size + int(found["queue_ptr"])
    state.update({f"{prefix}queue.{name}": value for name, value in queue.items()})
