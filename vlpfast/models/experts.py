"""The stack with experts by modality (VLMo, BEiT-3): of pairs, of texts alone, of images alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlpfast.layers.block import ResidualNorm
from vlpfast.layers.experts import ExpertBlock, Experts, PairLayout, Streams, expert_norm
from vlpfast.models.config import FusionConfig
from vlpfast.models.outputs import FusedOutput
from vlpfast.models.towers import ConcatTower
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged


class ExpertTower(nn.Module):
    """One stack that is fusion encoder, text tower and image tower: which it is depends on what a
    row holds.
    """

    image_keys = ConcatTower.image_keys
    alone = ConcatTower.alone

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.image_first = config.order == "image"
        self.modality = nn.Parameter(torch.empty(2, config.dim)) if config.modality_types else None
        self.blocks = nn.ModuleList(
            ExpertBlock(
                config.dim,
                config.heads,
                experts=config.experts,
                mlp_ratio=config.mlp_ratio,
                norm=config.norm,
                norm_eps=config.norm_eps,
                activation=config.activation,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                layer_scale=config.layer_scale,
                joint=number >= config.depth - config.joint_experts,
            )
            for number in range(config.depth)
        )
        make = lambda: ResidualNorm(config.dim, config.norm_eps, config.dropout)
        self.norm = Experts(make) if config.experts == "multiway" else make()

    def forward(
        self,
        text: Ragged,
        keys: Ragged,
        kv_index: Tensor,
        seed: int = 0,
        *,
        text_blocks: Tensor | None = None,
    ) -> FusedOutput:
        """As `ConcatTower.forward`; a text or an image may be empty."""
        image = keys.select(kv_index)
        streams = {"text": text.values, "image": image.values}
        if self.modality is not None:
            streams = {m: x + self.modality[i] for i, (m, x) in enumerate(streams.items())}
        # By shape, which the host knows.
        residual: Streams = {m: x for m, x in streams.items() if x.shape[0]}
        layout = PairLayout.of(text, image, image_first=self.image_first, text_blocks=text_blocks)
        branch = None
        for number, block in enumerate(self.blocks):
            branch, residual = block(branch, residual, layout, fold_seed(seed, number))
        out, _ = expert_norm(self.norm, branch, residual, layout, fold_seed(seed, -1))
        streams |= out
        return FusedOutput(
            text.with_values(streams["text"]),
            replace(image, values=streams["image"], max_len=keys.max_len),
        )
