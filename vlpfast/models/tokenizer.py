"""Visual tokenizers: a vision tower's patches to discrete codes, and codes to the features of a
teacher (VQ-KD); or a CNN's cells to k-means centres.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlpfast.layers.codebook import Codebook, KMeans
from vlpfast.models.config import CodebookConfig, VisionConfig
from vlpfast.models.stack import init_tower
from vlpfast.models.towers import PatchDecoder


class Tokenized(NamedTuple):
    """codes (B, P) int64; features (B, P, E) decoded from them; commitment: see `Quantized`."""

    codes: Tensor
    features: Tensor
    commitment: Tensor


class VisualTokenizer(nn.Module):
    """Patch tokens (B, P, D) -> narrow vectors -> codes -> a few blocks -> features (B, P, E).

    Source: Peng et al. 2022 (BEiT v2), section 2.1, arXiv:2208.06366; microsoft/unilm
    beit2/modeling_vqkd.py. Deviation: the decoder has no class token.
    """

    def __init__(self, config: CodebookConfig, vision: VisionConfig, num_patches: int) -> None:
        super().__init__()
        self.stack = replace(vision, depth=config.decoder_depth)
        self.encode = _two_layers(vision.dim, config.dim)
        self.codebook = Codebook(
            config.size, config.dim, decay=config.decay, revive_below=config.revive_below
        )
        self.decoder = PatchDecoder(self.stack, config.dim, num_patches)
        self.decode = _two_layers(vision.dim, config.target_dim)

    def init_weights(self) -> None:
        """The decoder's blocks as the vision tower's, all other maps N(0, 0.02)."""
        init_tower(self.decoder, self.stack)
        for layer in (*self.encode, self.decoder.embed, *self.decode):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def narrow(self, tokens: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, d), in full precision: codes lie close together."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.encode(tokens.to(self.encode[0].weight.dtype))

    def codes(self, tokens: Tensor) -> Tensor:
        """(B, P, D) -> (B, P) int64."""
        narrow = self.narrow(tokens)
        return self.codebook.codes(narrow.flatten(0, 1)).view(narrow.shape[:2])

    def forward(self, tokens: Tensor, seed: int = 0) -> Tokenized:
        narrow = self.narrow(tokens)
        codes, vectors, commitment = self.codebook(narrow.flatten(0, 1))
        features = self.decode(self.decoder(vectors.view(narrow.shape), seed))
        return Tokenized(codes.view(narrow.shape[:2]), features, commitment)


class CellTokenizer(nn.Module):
    """Cells (B, P, D) of a CNN's last feature map -> the nearest of k-means centres.

    Source: Cho et al. 2020 (X-LXMERT), section 4.1, arXiv:2009.11278; allenai/x-lxmert
    feature_extraction/run_kmeans.py, which clusters a detector's features of all images at once.
    """

    def __init__(self, config: CodebookConfig, num_patches: int) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.codebook = KMeans(
            config.size, config.dim, decay=config.decay, revive_below=config.revive_below
        )

    def init_weights(self) -> None:
        """Nothing: centres begin as inputs."""

    def codes(self, tokens: Tensor) -> Tensor:
        """(B, P, D) -> (B, P) int64."""
        return self.codebook.codes(self._cells(tokens)).view(tokens.shape[:2])

    def fit(self, tokens: Tensor) -> Tensor:
        """0-d sum of the squared distances of cells (B, P, D) from their centres, which in training
        the codebook's `update` moves.
        """
        return self.codebook(self._cells(tokens).detach()).commitment

    def _cells(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] != self.num_patches:
            raise ValueError(
                f"the CNN's feature map has {tokens.shape[1]} cells, image_size and "
                f"vision.patch_size say {self.num_patches}: set vision.patch_size to its stride"
            )
        return tokens.flatten(0, 1)


def _two_layers(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out))
