"""Detected regions: their front end, and the heads that predict hidden ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.layers.block import ResidualNorm
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions


def box_geometry(boxes: Tensor) -> Tensor:
    """(T, 4) corners -> (T, 7): x1, y1, x2, y2, width, height, area, in fractions of the image."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return torch.cat([boxes, torch.stack([width, height, width * height], 1)], 1)


class RegionEmbedding(nn.Module):
    """LN(LN(linear(feature)) + LN(linear(box)) + kind); a hidden region's feature is learned.

    Source: Chen et al. 2020 (UNITER), section 3.1, arXiv:1909.11740; ChenRocks/UNITER
    model/model.py `UniterImageEmbeddings`.
    """

    def __init__(self, dim: int, feature_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.feature, self.box = nn.Linear(feature_dim, dim), nn.Linear(7, dim)
        self.feature_norm, self.box_norm, self.norm = (ResidualNorm(dim, norm_eps) for _ in "123")
        self.hidden_feature = nn.Parameter(torch.empty(feature_dim))
        self.kind = nn.Parameter(torch.empty(dim))

    def forward(self, regions: Regions, keep_ids: Tensor | None = None) -> Ragged:
        """Regions of B images -> packed tokens (T, dim).

        Raises:
            ValueError: there are no boxes, or features of another width; or some are to be dropped.
        """
        features, width = regions.features.values, self.feature.in_features
        if keep_ids is not None:
            raise ValueError("keep_ids drops patches; regions are all kept")
        if regions.boxes is None:
            raise ValueError(
                "regions have no boxes: this front end embeds where a region lies, "
                "(x1, y1, x2, y2) as fractions of the image, beside its feature"
            )
        if features.shape[1:] != (width,):
            raise ValueError(f"regions.features must be (T, {width}), got {tuple(features.shape)}")
        features = features.to(self.feature.weight.dtype)
        if regions.hidden is not None:
            features = torch.where(regions.hidden[:, None], self.hidden_feature, features)
        what = self.feature_norm(self.feature(features))[0]
        geometry = box_geometry(regions.boxes.to(self.box.weight.dtype))
        where = self.box_norm(self.box(geometry))[0]
        return regions.features.with_values(self.norm(what + where + self.kind)[0])


class RegionHeads(nn.Module):
    """What hidden regions were: their features, by the front end's projection transposed, and their
    classes.

    Source: ChenRocks/UNITER model/pretrain.py `RegionFeatureRegression`, `RegionClassification`.
    """

    def __init__(self, dim: int, feature_dim: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        self.feature_dense, self.class_dense = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.feature_norm, self.class_norm = (ResidualNorm(dim, norm_eps) for _ in "12")
        self.feature_bias = nn.Parameter(torch.zeros(feature_dim))
        self.classes = nn.Linear(dim, num_classes)

    def features(self, hidden: Tensor, embedding: RegionEmbedding) -> Tensor:
        """(n, dim) -> (n, feature_dim)."""
        x = self.feature_norm(F.gelu(self.feature_dense(hidden)))[0]
        return F.linear(x, embedding.feature.weight.T, self.feature_bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, dim) -> (n, num_classes)."""
        return self.classes(self.class_norm(F.gelu(self.class_dense(hidden)))[0])
