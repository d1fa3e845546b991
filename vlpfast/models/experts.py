"""The stack with experts by modality (VLMo, BEiT-3): of pairs, of texts alone, of images alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlpfast.layers.block import ResidualNorm
from vlpfast.layers.drop_path import path_rates
from vlpfast.layers.experts import (
    ExpertBlock,
    Experts,
    Modality,
    PairLayout,
    Streams,
    expert_norm,
)
from vlpfast.layers.position_bias import RelativeBias, pair_displacements
from vlpfast.models.config import FusionConfig, ModelConfig
from vlpfast.models.fusion import ConcatTower
from vlpfast.models.outputs import FusedOutput
from vlpfast.models.stack import run_blocks
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged


class ExpertTower(nn.Module):
    """One stack that is fusion encoder, text tower and image tower: which it is depends on what the
    rows hold.

    Rows of one modality may stand among pairs, but not where the stack has a relative bias, or
    experts for both modalities.
    """

    image_keys = ConcatTower.image_keys
    alone = ConcatTower.alone

    def __init__(self, config: FusionConfig, model: ModelConfig | None = None) -> None:
        """`model` gives the relative bias its window and its longest text."""
        super().__init__()
        self.image_first = config.order == "image"
        self.fork = config.depth - config.joint_experts
        self.modality = nn.Parameter(torch.empty(2, config.dim)) if config.modality_types else None
        self.relative_bias = None
        if config.relative_bias:
            side, length = model.image_size // model.vision.patch_size, model.text.context_length
            kinds = pair_displacements(side, length)
            self.relative_bias = RelativeBias(config.heads, *kinds, config.depth)
            self.first_word = 1 + side * side
        rates = path_rates(config.drop_path_rate, config.depth)
        self.blocks = nn.ModuleList(
            ExpertBlock(
                **config.block,
                experts=config.experts,
                key_bias=config.key_bias,
                joint=number >= self.fork,
                drop_path=rates[number],
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
        images: bool = True,
    ) -> FusedOutput:
        """As `ConcatTower.forward`; a text or an image may be empty. Without `images`, nothing is
        made of image tokens after the last attention.
        """
        image = keys.select(kv_index)
        layout = PairLayout.of(text, image, image_first=self.image_first, text_blocks=text_blocks)
        streams = self._streams(text, image)
        branch, residual = None, {m: x for m, x in streams.items() if x.shape[0]}
        layouts = self._layouts(layout, residual)
        # Of the last block, without images, the texts alone.
        leaving = ("text",) if not images and "text" in residual else None
        state = run_blocks(self.blocks, (branch, residual), layouts, seed, leaving=leaving)
        streams |= self._finish(state, layout, seed)
        fused = replace(image, values=streams["image"], max_len=keys.max_len)
        return FusedOutput(text.with_values(streams["text"]), fused if images else None)

    def alone_twice(self, part: Ragged, modality: Modality, seed: int = 0) -> tuple[Ragged, Ragged]:
        """`alone`, and the same with the experts for both modalities in the layers that have them,
        over the same earlier layers (VLMo's two heads).
        """
        nothing = Ragged.empty(part.values)
        text, image = (part, nothing) if modality == "text" else (nothing, part)
        layout = PairLayout.of(text, image, image_first=self.image_first)
        streams = {modality: self._streams(text, image)[modality]}
        layouts, last = self._layouts(layout, streams), self.blocks[self.fork :]
        shared = run_blocks(self.blocks[: self.fork], (None, streams), layouts, seed)
        outs = []
        for joint in (False, True):
            here = [replace(each, joint=joint) for each in layouts]
            state = run_blocks(last, shared, here, seed, first=self.fork)
            outs.append(part.with_values(self._finish(state, layout, seed)[modality]))
        return outs[0], outs[1]

    def _streams(self, text: Ragged, image: Ragged) -> dict[str, Tensor]:
        streams = {"text": text.values, "image": image.values}
        if self.modality is None:
            return streams
        return {m: x + self.modality[i] for i, (m, x) in enumerate(streams.items())}

    def _layouts(self, layout: PairLayout, streams: Streams) -> list[PairLayout]:
        """`layout` with each layer's bias."""
        if self.relative_bias is None:
            return [layout] * len(self.blocks)
        first = 0 if "image" in streams else self.first_word
        biases = self.relative_bias(slice(first, first + layout.sequences.max_len))
        return [
            replace(layout, sequences=replace(layout.sequences, bias=bias))
            for bias in biases.unbind()
        ]

    def _finish(
        self, state: tuple[Streams | None, Streams], layout: PairLayout, seed: int
    ) -> Streams:
        return expert_norm(self.norm, *state, layout, fold_seed(seed, -1))[0]
