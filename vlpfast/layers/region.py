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
        features = _features(regions, keep_ids, self.feature)
        if regions.hidden is not None:
            features = torch.where(regions.hidden[:, None], self.hidden_feature, features)
        what = self.feature_norm(self.feature(features))[0]
        geometry = box_geometry(regions.boxes.to(self.box.weight.dtype))
        where = self.box_norm(self.box(geometry))[0]
        return regions.features.with_values(self.norm(what + where + self.kind)[0])


class AveragedRegionEmbedding(nn.Module):
    """(LN(linear(feature)) + LN(linear(box))) / 2; a hidden region's feature is zero.

    Source: Tan & Bansal 2019 (LXMERT), section 2.1, arXiv:1908.07490; airsplay/lxmert
    src/lxrt/modeling.py `VisualFeatEncoder`.
    """

    def __init__(self, dim: int, feature_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.feature, self.box = nn.Linear(feature_dim, dim), nn.Linear(4, dim)
        self.feature_norm, self.box_norm = (ResidualNorm(dim, norm_eps) for _ in "12")

    def forward(self, regions: Regions, keep_ids: Tensor | None = None) -> Ragged:
        """As `RegionEmbedding.forward`."""
        features = _shown(_features(regions, keep_ids, self.feature), regions)
        what = self.feature_norm(self.feature(features))[0]
        where = self.box_norm(self.box(regions.boxes.to(self.box.weight.dtype)))[0]
        return regions.features.with_values((what + where) / 2)


class SummedRegionEmbedding(nn.Module):
    """LN(linear(feature) + linear(box and its area)); a hidden region's feature is zero. Before an
    image's regions stands the whole of it: the mean of their features, and its own box.

    Source: Lu et al. 2019 (ViLBERT), section 3.1, arXiv:1908.02265;
    facebookresearch/vilbert-multi-task vilbert/vilbert.py `BertImageEmbeddings`.
    """

    def __init__(self, dim: int, feature_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.feature, self.box = nn.Linear(feature_dim, dim), nn.Linear(5, dim)
        self.norm = ResidualNorm(dim, norm_eps)

    def forward(self, regions: Regions, keep_ids: Tensor | None = None) -> Ragged:
        """As `RegionEmbedding.forward`, with a token more of each image: (T + B, dim)."""
        packed, size = regions.features, len(regions)
        features = _shown(_features(regions, keep_ids, self.feature), regions)
        offsets = packed.cu_seqlens.long()
        # Unsafe: offsets are not read on the host. No atomics, unlike `index_add`.
        total = torch.segment_reduce(features, "sum", offsets=offsets, initial=0, unsafe=True)
        mean = total / packed.lens.clamp(min=1)[:, None]
        boxes = regions.boxes.to(self.box.weight.dtype)
        places = torch.cat([boxes, box_geometry(boxes)[:, 6:]], 1)
        whole = places.new_tensor([0.0, 0.0, 1.0, 1.0, 1.0]).expand(size, 5)
        values = self.feature(torch.cat([mean, features])) + self.box(torch.cat([whole, places]))
        values = self.norm(values)[0]
        one_each = torch.arange(size + 1, dtype=torch.int32, device=offsets.device)
        images = Ragged(values[:size], one_each, 1)
        return Ragged.join(images, packed.with_values(values[size:])).whole


def _features(regions: Regions, keep_ids: Tensor | None, linear: nn.Linear) -> Tensor:
    """The features (T, D) that `linear` takes, checked; see `RegionEmbedding.forward`."""
    features, width = regions.features.values, linear.in_features
    if keep_ids is not None:
        raise ValueError("keep_ids drops patches; regions are all kept")
    if regions.boxes is None:
        raise ValueError(
            "regions have no boxes: this front end embeds where a region lies, "
            "(x1, y1, x2, y2) as fractions of the image, beside its feature"
        )
    if features.shape[1:] != (width,):
        raise ValueError(f"regions.features must be (T, {width}), got {tuple(features.shape)}")
    return features.to(linear.weight.dtype)


def _shown(features: Tensor, regions: Regions) -> Tensor:
    """Zero where a region is hidden."""
    return features if regions.hidden is None else features * ~regions.hidden[:, None]


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


class SharedRegionHeads(nn.Module):
    """The same of hidden regions from one transform, by weights of their own; classes, and with
    `num_attributes` attributes, are those of the detector without its background.

    Source: airsplay/lxmert src/lxrt/modeling.py `BertVisualObjHead`.
    """

    def __init__(
        self,
        dim: int,
        feature_dim: int,
        num_classes: int,
        norm_eps: float,
        num_attributes: int = 0,
    ) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(dim, dim), ResidualNorm(dim, norm_eps)
        self.feature = nn.Linear(dim, feature_dim)
        self.classes = nn.Linear(dim, num_classes - 1)
        self.attributes = nn.Linear(dim, num_attributes - 1) if num_attributes else None

    def features(self, hidden: Tensor, embedding: nn.Module) -> Tensor:
        """(n, dim) -> (n, feature_dim)."""
        return self.feature(self._transform(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, dim) -> (n, num_classes - 1)."""
        return self.classes(self._transform(hidden))

    def attribute_logits(self, hidden: Tensor) -> Tensor:
        """(n, dim) -> (n, num_attributes - 1)."""
        return self.attributes(self._transform(hidden))

    def _transform(self, hidden: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(hidden)))[0]


class RegionClassHead(nn.Module):
    """Classes of hidden regions alone.

    Source: facebookresearch/vilbert-multi-task vilbert/vilbert.py `BertImagePredictionHead`.
    """

    def __init__(self, dim: int, feature_dim: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(dim, dim), ResidualNorm(dim, norm_eps)
        self.classes = nn.Linear(dim, num_classes)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, dim) -> (n, num_classes)."""
        return self.classes(self.norm(F.gelu(self.dense(hidden)))[0])


# By `VisionConfig.region_kind`.
REGION_EMBEDDINGS = {
    "uniter": RegionEmbedding,
    "lxmert": AveragedRegionEmbedding,
    "vilbert": SummedRegionEmbedding,
}
REGION_HEADS = {
    "uniter": RegionHeads,
    "lxmert": SharedRegionHeads,
    "vilbert": RegionClassHead,
}
