"""Regions: what an object detector says of B images, packed like text, any number in each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vlpfast.ragged import Ragged


@dataclass(frozen=True)
class Regions:
    """Regions of B images, T in all.

    Attributes:
        features: packed (T, D) feature vectors, floating point.
        boxes (T, 4): (x1, y1, x2, y2) as fractions of the image's sides, or None.
        labels (T, C): the detector's class distribution, column 0 background; or None.
        attributes (T, A): its distribution of attributes, column 0 none; or None.
        hidden (T,): bool, True on regions whose features the model must not see; None hides none.
    """

    features: Ragged
    boxes: Tensor | None = None
    labels: Tensor | None = None
    hidden: Tensor | None = None
    attributes: Tensor | None = None

    def __post_init__(self) -> None:
        count = self.features.values.shape[0]
        for name, width in (("boxes", 4), ("labels", None), ("hidden", None), ("attributes", None)):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.shape[0] != count or (width and tensor.shape[1:] != (width,)):
                expected = f"({count}, {width})" if width else f"({count}, ...)"
                raise ValueError(f"regions.{name} must be {expected}, got {tuple(tensor.shape)}")

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def cat(cls, parts: Sequence[Regions]) -> Regions:
        """The images of all parts, one after the other; all have the same fields but `hidden`."""
        hidden = [
            torch.zeros_like(p.features.values[:, 0], dtype=torch.bool)
            if p.hidden is None
            else p.hidden
            for p in parts
        ]
        boxes, labels, attributes = (
            None
            if getattr(parts[0], name) is None
            else torch.cat([getattr(p, name) for p in parts])
            for name in ("boxes", "labels", "attributes")
        )
        features = Ragged.cat([p.features for p in parts])
        return cls(features, boxes, labels, torch.cat(hidden), attributes)

    def __getitem__(self, rows: Tensor | Sequence[int]) -> Regions:
        """Images `rows` (R,) int64, in that order."""
        rows = torch.as_tensor(rows, device=self.features.cu_seqlens.device)
        token_ids, _ = self.features.token_ids_of(rows)
        others = (self.boxes, self.labels, self.hidden, self.attributes)
        return Regions(
            self.features.select(rows), *(None if t is None else t[token_ids] for t in others)
        )

    def hide(self, hidden: Tensor) -> Regions:
        """The same regions, those in `hidden` (T,) bool hidden."""
        return replace(self, hidden=hidden)

    def to(self, *args, **kwargs) -> Regions:
        """`Tensor.to` for every tensor; for devices, not dtypes."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Regions(**{n: v if v is None else v.to(*args, **kwargs) for n, v in moved.items()})
