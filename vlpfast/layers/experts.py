"""Experts: parts of a block that text and image tokens have each for themselves, in a block where
both meet in one attention.

Tokens of the two modalities are two streams, so that all but the attention runs on whole tensors of
one modality: which expert serves a token is where the token lies, not a state of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.layers.block import Layout, Mlp, ResidualNorm, last_linear, self_attention
from vlpfast.layers.drop_path import path_scale
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged

Modality = Literal["text", "image"]
# Tokens (T, D) of each modality that is there.
Streams = Mapping[Modality, Tensor]
_SITES = {"text": 0, "image": 1}


@dataclass(frozen=True)
class PairLayout:
    """How the tokens of the streams lie in sequences.

    Attributes:
        sequences: of all tokens, in the order of the sequences.
        to_sequence (T,): int64, the place of each of their tokens in the streams, text before
            image; None where there is one stream, which is in that order.
        from_sequence: int64, places of each stream's tokens in the sequences; with `to_sequence`.
        joint: whether blocks that have an expert for both modalities use it.
    """

    sequences: Layout
    to_sequence: Tensor | None = None
    from_sequence: Mapping[Modality, Tensor] | None = None
    joint: bool = False

    @classmethod
    def of(
        cls, text: Ragged, image: Ragged, *, image_first: bool, text_blocks: Tensor | None = None
    ) -> PairLayout:
        """Sequence r is text r and image r, either of which may be empty; image tokens are block 0
        (see `Layout.blocks`), `text_blocks` (T_text,) are those of the text tokens.
        """
        num_text, num_image = text.values.shape[0], image.values.shape[0]
        if not (num_text and num_image):
            one = text if num_text else image
            blocks = text_blocks if num_text else None
            return cls(Layout(one.cu_seqlens, one.max_len, blocks))
        size, device = len(text), text.cu_seqlens.device
        rows = torch.arange(2 * size, device=device).unflatten(0, (2, size))
        pieces = (rows.flip(0) if image_first else rows).mT.flatten()
        both, total = Ragged.cat([text, image]), num_text + num_image
        to_sequence, cu_seqlens = both.token_ids_of(pieces, total)
        places = torch.arange(total, device=device)
        from_sequence = torch.empty_like(places).scatter(0, to_sequence, places)
        blocks = None
        if text_blocks is not None:
            blocks = torch.cat([text_blocks, text_blocks.new_zeros(num_image)])[to_sequence]
        # Every other offset: a text and its image are one sequence.
        sequences = Layout(cu_seqlens[::2].contiguous(), text.max_len + image.max_len, blocks)
        split = {"text": from_sequence[:num_text], "image": from_sequence[num_text:]}
        return cls(sequences, to_sequence, split, joint=True)

    def join(self, streams: Streams) -> Tensor:
        """(T, ...) of all streams, in the order of the sequences."""
        if self.to_sequence is None:
            return next(iter(streams.values()))
        return torch.cat([streams["text"], streams["image"]]).index_select(0, self.to_sequence)

    def split(self, joined: Tensor, wanted: Iterable[Modality]) -> Streams:
        """The inverse of `join`, of the streams that are wanted."""
        if self.from_sequence is None:
            return dict.fromkeys(wanted, joined)
        return {m: joined.index_select(0, self.from_sequence[m]) for m in wanted}


class Experts(nn.Module):
    """A module for text tokens, one for image tokens, and with `joint` one for both where they
    meet.
    """

    def __init__(self, make: Callable[[], nn.Module], *, joint: bool = False) -> None:
        super().__init__()
        self.text, self.image = make(), make()
        self.joint = make() if joint else None

    def of(self, modality: Modality, joint: bool) -> nn.Module:
        """What serves tokens of `modality`."""
        return self.joint if joint and self.joint is not None else getattr(self, modality)


def expert(part: nn.Module, modality: Modality, layout: PairLayout) -> nn.Module:
    """What of `part` serves tokens of `modality`: all of it where it has no experts."""
    return part.of(modality, layout.joint) if isinstance(part, Experts) else part


def expert_norm(
    norm: nn.Module,
    branch: Streams | None,
    residual: Streams,
    layout: PairLayout,
    seed: int,
) -> tuple[Streams, Streams]:
    """`ResidualNorm` of each stream: normed, and the sum with the residual."""
    normed, summed = {}, {}
    for name, rest in residual.items():
        x, rest = (rest, None) if branch is None else (branch[name], rest)
        run = expert(norm, name, layout)
        normed[name], summed[name] = run(x, rest, fold_seed(seed, _SITES[name]))
    return normed, summed


class QueryValueLinear(nn.Linear):
    """Queries, keys and values of which the keys have no bias: no softmax would see it."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        self.query_value_bias = nn.Parameter(torch.zeros(2, dim))

    def forward(self, x: Tensor) -> Tensor:
        query, value = self.query_value_bias
        return F.linear(x, self.weight, torch.cat([query, torch.zeros_like(query), value]))


class ExpertAttention(nn.Module):
    """Self-attention over the sequences of both streams, each of which may have its projections."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        split: bool,
        key_bias: bool = True,
        dropout: float = 0.0,
        layer_scale: float = 0.0,
        sub_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        qkv = (lambda: nn.Linear(dim, 3 * dim)) if key_bias else (lambda: QueryValueLinear(dim))
        self.qkv = _part(qkv, split)
        self.norm = (
            None if sub_norm_eps is None else _part(lambda: ResidualNorm(dim, sub_norm_eps), split)
        )
        self.out = _part(lambda: last_linear(dim, dim, layer_scale), split)

    def forward(
        self, x: Streams, layout: PairLayout, seed: int = 0, wanted: Iterable[Modality] = ()
    ) -> Streams:
        """Of the streams that are `wanted`, by default all; all are read."""
        projected = {name: expert(self.qkv, name, layout)(tokens) for name, tokens in x.items()}
        q, k, v = layout.join(projected).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        dropout_p = self.dropout if self.training else 0.0
        mixed = self_attention(q, k, v, layout.sequences, dropout_p, seed)
        mixed = layout.split(mixed, wanted or x)
        if self.norm is not None:
            mixed = {name: expert(self.norm, name, layout)(y)[0] for name, y in mixed.items()}
        return {name: expert(self.out, name, layout)(y) for name, y in mixed.items()}


class ExpertBlock(nn.Module):
    """A pre-norm `Block` with experts by modality.

    Args:
        experts: "mome" has the MLP and its norm per modality (VLMo); "multiway" all projections and
            norms too: only the attention's product is common (BEiT-3 as released).
        joint: one more MLP and norm, for both modalities where they meet (VLMo's last layers).
        norm: "pre", or "sub" for the norms of Magneto (see `Mlp`).
        drop_path: probability with which a sample goes without a branch, in training; of "mome",
            each of its two MLPs has a draw of its own, as VLMo's code.

    Source: Bao et al. 2022 (VLMo), section 3.2, arXiv:2111.02358; Wang et al. 2022 (BEiT-3),
    section 2.1, arXiv:2208.10442, and torchscale model/BEiT3.py, component/multiway_network.py.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        experts: Literal["mome", "multiway"],
        mlp_ratio: float,
        norm: Literal["pre", "sub"],
        norm_eps: float,
        activation: str,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        joint: bool = False,
        layer_scale: float = 0.0,
        key_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path, self.mlps_apart = drop_path, experts == "mome"
        multiway, sub_norm_eps = experts == "multiway", norm_eps if norm == "sub" else None
        self.attention = ExpertAttention(
            dim,
            heads,
            split=multiway,
            key_bias=key_bias,
            dropout=attention_dropout,
            layer_scale=layer_scale,
            sub_norm_eps=sub_norm_eps,
        )
        self.norm1 = _part(lambda: ResidualNorm(dim, norm_eps, dropout), multiway)
        self.mlp = Experts(
            lambda: Mlp(dim, int(dim * mlp_ratio), activation, layer_scale, sub_norm_eps),
            joint=joint,
        )
        self.norm2 = Experts(lambda: ResidualNorm(dim, norm_eps, dropout), joint=joint)

    def forward(
        self,
        branch: Streams | None,
        residual: Streams,
        layout: PairLayout,
        seed: int = 0,
        leaving: Iterable[Modality] = (),
    ) -> tuple[Streams, Streams]:
        """`leaving`: the streams that are wanted, by default all."""
        normed, residual = expert_norm(self.norm1, branch, residual, layout, fold_seed(seed, 3))
        branch = self.attention(normed, layout, fold_seed(seed, 1), leaving)
        branch = self._keep(branch, layout, fold_seed(seed, 5))
        residual = {m: residual[m] for m in branch}
        normed, residual = expert_norm(self.norm2, branch, residual, layout, fold_seed(seed, 4))
        branch = {m: expert(self.mlp, m, layout)(x) for m, x in normed.items()}
        joint = layout.joint and self.mlp.joint is not None
        return self._keep(
            branch, layout, fold_seed(seed, 6), self.mlps_apart and not joint
        ), residual

    def _keep(self, branch: Streams, layout: PairLayout, seed: int, apart: bool = False) -> Streams:
        """Stochastic depth on a branch's outputs; `apart`: each stream for itself."""
        if not (self.training and self.drop_path):
            return branch
        bounds, like = layout.sequences.cu_seqlens, next(iter(branch.values()))
        count = like.shape[0] if layout.to_sequence is None else layout.to_sequence.shape[0]
        tokens = like[:1].expand(count, -1)
        kept = {}
        for name, x in branch.items():
            salt = fold_seed(seed, _SITES[name]) if apart else seed
            scale = path_scale(bounds, tokens, self.drop_path, salt)
            kept[name] = x * layout.split(scale, (name,))[name]
        return kept


def _part(make: Callable[[], nn.Module], split: bool) -> nn.Module:
    return Experts(make) if split else make()
