"""Batch: what a loader hands to a training or evaluation step.

Nothing here decodes, tokenises or masks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vlpfast.images import Images
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions


@dataclass(frozen=True)
class Batch:
    """B image-text pairs.

    Attributes:
        images (B, H, W, 3): uint8, NHWC; normalising is `ops.patch_embed`'s work. With `shown` as
            many as there are, and so are `sizes` and `regions`.
        sizes (B, 2): int64 height and width of each image in the top left corner of its place, on
            the host; None: they fill it.
        text: packed token ids (int64), each sequence with its start and end token.
        image_ids (B,): int64 identity of the image or concept; equal ids are positives of each
            other.
        sample_ids (B,): int64 row numbers in the index, for naming samples.
        positions (B,): int64 places in the training stream (epoch * samples + place), unique per
            draw and independent of batch split and world size: with the run's seed, the key of all
            per-sample randomness.
        shown (1, B) or (2, B): int64, which of the images each text is about, where several texts
            are about one or each about two (the second row); None: text b about image b.
        masked_text: `text` with tokens masked for MLM, or None.
        mlm_labels (T,): int64 original ids at masked positions, -100 elsewhere, or None.
        masked_alone, alone_labels: the same, masked for modelling without the image, or None.
        regions: of the images, what a detector says of them, or None.
        masked_regions: `regions` with some hidden for masked region modelling, or None.
        hidden_patches (B, K): int64 ascending ids of the patches hidden for masked image modelling,
            -1 after the last where images hide unlike many; or None.
        codes (B, P): int64, what a frozen tokenizer makes of each patch of the clean images, or
            None.
        features (B, P, E): what a frozen teacher makes of them, or None.
        prompt: packed token ids of what each image is asked, which `text` answers, or None.
        answer_ids (B,): int64, the number of the answer where `text` is a question; -100 where it
            is none, or its answer is not among the data's; or None.
        answer_sets, answer_scores: packed int64 numbers of all the data's answers that people gave
            to each question, and float32 scores of these; none where the text is no question, or
            None.
        drawn (n,): int64, the rows whose text is their image's codes, which a tokenizer fills in:
            they are made from the prompt alone, without the image; or None.
        class_ids (B,): int64, the class that each image shows (one of those it does), as a number
            of `class_names`; -100 where it shows none; or None.
        class_names: packed token ids of the names of all classes, or None.
    """

    images: Tensor
    text: Ragged
    image_ids: Tensor
    sample_ids: Tensor
    positions: Tensor
    masked_text: Ragged | None = None
    mlm_labels: Tensor | None = None
    masked_alone: Ragged | None = None
    alone_labels: Tensor | None = None
    regions: Regions | None = None
    masked_regions: Regions | None = None
    hidden_patches: Tensor | None = None
    codes: Tensor | None = None
    features: Tensor | None = None
    prompt: Ragged | None = None
    drawn: Tensor | None = None
    class_ids: Tensor | None = None
    class_names: Ragged | None = None
    answer_ids: Tensor | None = None
    answer_sets: Ragged | None = None
    answer_scores: Tensor | None = None
    sizes: Tensor | None = None
    shown: Tensor | None = None

    def __len__(self) -> int:
        return self.positions.shape[0]

    @property
    def image_positions(self) -> Tensor:
        """`positions` of the images, and of second ones others that no sample has: a key for
        each.
        """
        if self.shown is None:
            return self.positions
        keys = torch.stack([self.positions, ~self.positions])[: len(self.shown)]
        places = self.positions.new_zeros(len(self.images))
        return places.index_copy(0, self.shown.flatten(), keys.flatten())

    def visual(self, front: str) -> Tensor | Images | Regions:
        """What a front end of kind `front` reads: regions for "regions", else pixels, with the
        images' sizes where these differ.

        Raises:
            ValueError: it reads regions and the batch has none.
        """
        if front != "regions":
            return self.images if self.sizes is None else Images(self.images, self.sizes)
        if self.regions is None:
            raise ValueError("the model reads regions and the batch has none: set data.regions")
        return self.regions

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with all tensors but `sizes` on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), (Tensor, Ragged, Regions))
            and f.name != "sizes"
        }
        return replace(self, **moved)
