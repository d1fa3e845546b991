"""Towers that are no transformers: a convolutional network and a recurrent one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlpfast.layers.cnn import ResNet, backbone
from vlpfast.models.config import ModelConfig, TextConfig, VisionConfig
from vlpfast.ragged import Ragged


class CnnTower(nn.Module):
    """uint8 images -> tokens (B, N, D): the places of the last feature map, or one vector."""

    def __init__(self, config: VisionConfig, model: ModelConfig) -> None:
        super().__init__()
        self.mean_pool = config.pool == "mean"
        self.register_buffer("mean", 255 * torch.tensor(model.image_mean), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(model.image_std), persistent=False)
        self.cnn = backbone(config.cnn, grid=self.mean_pool)
        if self.cnn.out_dim != config.dim:
            raise ValueError(
                f"vision.dim must be {self.cnn.out_dim} for vision.cnn={config.cnn!r}, "
                f"got {config.dim}"
            )

    def init_weights(self) -> None:
        """Draws the residual network's weights; a network of timm keeps what timm gave it."""
        if isinstance(self.cnn, ResNet):
            self.cnn.init_weights()

    def forward(self, images: Tensor, keep_ids: Tensor | None = None, seed: int = 0) -> Tensor:
        if keep_ids is not None:
            raise ValueError("keep_ids drops patches, and a CNN has none")
        pixels = (images - self.mean) / self.std
        return self.cnn(pixels.movedim(3, 1)).flatten(2).mT

    def pool(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        return tokens.mean(1) if self.mean_pool else tokens[:, 0]


class GruTower(nn.Module):
    """Packed token ids -> packed states (T, D) of a gated recurrent unit over word vectors.

    Source: Faghri et al. 2018 (VSE++), section 4.1, arXiv:1707.05612; fartashf/vsepp model.py.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.context_length = config.context_length
        self.token = nn.Parameter(torch.empty(config.vocab_size, config.word_dim))
        self.gru = nn.GRU(config.word_dim, config.dim, config.depth, batch_first=True)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Words U(-0.1, 0.1) as VSE++; the unit as torch."""
        nn.init.uniform_(self.token, -0.1, 0.1)
        self.gru.reset_parameters()

    def forward(self, text: Ragged, seed: int = 0) -> Ragged:
        """Raises ValueError where a sequence may be longer than `context_length`."""
        if text.max_len > self.context_length:
            raise ValueError(
                f"text must have at most {self.context_length} tokens, got {text.max_len}"
            )
        words = nn.functional.embedding(text.values, self.token)
        # Time is what a recurrence runs over, so sequences stand side by side. Padding comes after
        # the tokens: no state of a token has seen it.
        places = text.row_ids() * text.max_len + text.positions()
        padded = words.new_zeros(len(text) * text.max_len, words.shape[1])
        padded = padded.index_copy(0, places, words).unflatten(0, (len(text), text.max_len))
        return text.with_values(self.gru(padded)[0].flatten(0, 1)[places])
