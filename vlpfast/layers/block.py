"""The transformer block and its parts, over dense (B, N, D) or packed (T, D) tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.layers.drop_path import path_scale
from vlpfast.layers.keys import KeyCache
from vlpfast.ops.attention import attention
from vlpfast.ops.bias_gelu import bias_gelu
from vlpfast.ops.residual_norm import residual_norm
from vlpfast.ops.seed import fold_seed

if TYPE_CHECKING:
    from vlpfast.layers.moe import Routes
    from vlpfast.ragged import Ragged


@dataclass(frozen=True)
class Layout:
    """How tokens lie in memory and which of them see each other; None everywhere: dense, all
    visible.

    Attributes:
        cu_seqlens (B + 1,): int32 offsets of packed sequences.
        max_len: host-side upper bound of their lengths.
        blocks: one int per token, a key is visible iff its block is not above the query's; or
            "causal".
        bias (H, N, N): added to the scores of self-attention; of packed sequences N is `max_len`.
        cache: earlier tokens' keys, for packed sequences of `max_len` tokens each that go on from
            there; what they see is then all before and up to themselves.
        routes: kinds of tokens, for blocks with experts (`layers.moe`).
    """

    cu_seqlens: Tensor | None = None
    max_len: int | None = None
    blocks: Tensor | Literal["causal"] | None = None
    bias: Tensor | None = None
    cache: KeyCache | None = None
    routes: Routes | None = None


class CrossKeys(NamedTuple):
    """Keys and values of one layer, (B, N, H, E) each, and for every query sequence the row it
    reads; or packed, (T, H, E), with their offsets and the bound of their lengths.
    """

    k: Tensor
    v: Tensor
    kv_index: Tensor
    cu_k: Tensor | None = None
    max_k: int | None = None


class Leaving(NamedTuple):
    """The one token of each sequence that a stack's last block still makes, where nothing reads the
    others: the block asks, projects and sums for it alone.

    Attributes:
        layout: how these tokens lie.
        places (R,): int64, where they are among packed tokens; None: the first of dense sequences.
    """

    layout: Layout
    places: Tensor | None = None

    @classmethod
    def of(cls, text: Ragged, place: Literal["first", "last"]) -> Leaving:
        """The first or last token of packed sequences, none of which is empty."""
        offsets = torch.arange(len(text) + 1, dtype=torch.int32, device=text.cu_seqlens.device)
        return cls(Layout(offsets, 1), text.first() if place == "first" else text.last())

    def take(self, tokens: Tensor) -> Tensor:
        """Of dense (B, N, D) or packed (T, D): (B, 1, D) or (R, D)."""
        return tokens[:, :1] if self.places is None else tokens[self.places]


class ResidualNorm(nn.Module):
    """normed, summed = LayerNorm(residual + dropout(x)), residual + dropout(x)."""

    def __init__(self, dim: int, eps: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps, self.dropout = eps, dropout

    def forward(
        self, x: Tensor, residual: Tensor | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        dropout_p = self.dropout if self.training else 0.0
        out = residual_norm(
            x, residual, self.weight, self.bias, dropout_p=dropout_p, seed=seed, eps=self.eps
        )
        return out.normed, out.residual

    def plain(self, x: Tensor) -> Tensor:
        """LayerNorm(x): nothing is added or dropped."""
        return residual_norm(x, None, self.weight, self.bias, eps=self.eps).normed


class ScaledLinear(nn.Linear):
    """LayerScale on a linear map: scale * (x W^T + b), `scale` one learned number an output.

    The weights are scaled, D x D numbers, not the tokens.

    Source: Touvron et al. 2021 (CaiT), section 2.1, arXiv:2103.17239.
    """

    def __init__(self, in_features: int, out_features: int, init: float) -> None:
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.full((out_features,), init))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale[:, None], self.bias * self.scale)


def last_linear(in_features: int, out_features: int, layer_scale: float) -> nn.Linear:
    """What ends a branch of a block."""
    if layer_scale:
        return ScaledLinear(in_features, out_features, layer_scale)
    return nn.Linear(in_features, out_features)


def attend(q: Tensor, k: Tensor, v: Tensor, asks: Layout, read: Layout, **options) -> Tensor:
    """q (..., H, E) of tokens that lie as `asks` says, k and v of those that lie as `read` does
    -> (..., H * E); `options` of `ops.attention`.
    """
    bounds = {"cu_q": asks.cu_seqlens, "max_q": asks.max_len}
    bounds |= {"cu_k": read.cu_seqlens, "max_k": read.max_len}
    return attention(q, k, v, **bounds, **options).flatten(-2)


def self_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout_p: float, seed: int
) -> Tensor:
    """q, k, v (..., H, E) of the same tokens, which lie as `layout` says -> (..., H * E)."""
    blocks = layout.blocks
    visible = {"q_block": blocks, "k_block": None if isinstance(blocks, str) else blocks}
    options = {"bias": layout.bias, "dropout_p": dropout_p, "seed": seed}
    return attend(q, k, v, layout, layout, **visible, **options)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values;
    `sub_norm_eps` as in `Mlp`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float = 0.0,
        layer_scale: float = 0.0,
        sub_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = None if sub_norm_eps is None else ResidualNorm(dim, sub_norm_eps)
        self.out = last_linear(dim, dim, layer_scale)

    def forward(
        self, x: Tensor, layout: Layout, seed: int = 0, leaving: Leaving | None = None
    ) -> Tensor:
        """`leaving` sees all tokens of its sequence."""
        if leaving is not None:
            return self.out(self._mix_leaving(x, layout, seed, leaving))
        return self.out(self.mix(self.qkv(x), layout, seed))

    def _mix_leaving(self, x: Tensor, layout: Layout, seed: int, leaving: Leaving) -> Tensor:
        """As `mix`, of the tokens that leave: all others are keys and values only."""
        split = x.shape[-1], 2 * x.shape[-1]
        of_q, of_kv = zip(self.qkv.weight.split(split), self.qkv.bias.split(split), strict=True)
        q = F.linear(leaving.take(x), *of_q).unflatten(-1, (self.heads, -1))
        k, v = F.linear(x, *of_kv).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        options = {"dropout_p": self.dropout if self.training else 0.0, "seed": seed}
        mixed = attend(q, k, v, leaving.layout, layout, **options)
        return mixed if self.norm is None else self.norm(mixed)[0]

    def mix(self, qkv: Tensor, layout: Layout, seed: int) -> Tensor:
        """Heads' mixed values (..., D), side by side, of projections (..., 3 D)."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if layout.cache is not None:
            blocks = layout.blocks if isinstance(layout.blocks, Tensor) else None
            return layout.cache.attend(self, q, k, v, blocks).flatten(-2)
        mixed = self_attention(q, k, v, layout, self.dropout if self.training else 0.0, seed)
        return mixed if self.norm is None else self.norm(mixed)[0]


class CrossAttention(nn.Module):
    """Queries from packed text; keys and values were projected once per image by the stack (see
    `models.fusion`).
    """

    def __init__(
        self, dim: int, heads: int, dropout: float = 0.0, layer_scale: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(dim, dim)
        self.out = last_linear(dim, dim, layer_scale)

    def forward(self, x: Tensor, layout: Layout, keys: CrossKeys, seed: int = 0) -> Tensor:
        q, read = self.q(x).unflatten(-1, (self.heads, -1)), Layout(keys.cu_k, keys.max_k)
        dropout_p = self.dropout if self.training else 0.0
        options = {"kv_index": keys.kv_index, "dropout_p": dropout_p, "seed": seed}
        return self.out(attend(q, keys.k, keys.v, layout, read, **options))


class Mlp(nn.Module):
    """Linear, bias + GELU, Linear; with `sub_norm_eps` a LayerNorm before the last (Sub-LN).

    Source of Sub-LN: Wang et al. 2022 (Magneto), section 3.1, arXiv:2210.06423.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str,
        layer_scale: float = 0.0,
        sub_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.norm = None if sub_norm_eps is None else ResidualNorm(hidden, sub_norm_eps)
        self.fc2 = last_linear(hidden, dim, layer_scale)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.fc1.weight)
        hidden = bias_gelu(hidden, self.fc1.bias, kind=self.activation)
        return self.fc2(hidden if self.norm is None else self.norm(hidden)[0])


class Block(nn.Module):
    """Self-attention, optional cross-attention, MLP, with residual sums; `mlp_between` puts another
    MLP before the cross-attention.

    The state that passes between blocks is (branch, residual): the last branch's output, not yet
    added, and the sum of all before it, so that sum and norm are one op. A post-norm block leaves
    the branch empty (None).
    `drop_path` is the probability with which a sample goes without a branch, in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float,
        norm: str,
        norm_eps: float,
        activation: str,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        cross: bool = False,
        layer_scale: float = 0.0,
        mlp_between: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.post_norm, self.drop_path = norm == "post", drop_path
        sub_norm_eps = norm_eps if norm == "sub" else None
        self.attention = SelfAttention(dim, heads, attention_dropout, layer_scale, sub_norm_eps)
        self.norm1 = ResidualNorm(dim, norm_eps, dropout)
        hidden = int(dim * mlp_ratio)
        self.mlp_between = (
            Mlp(dim, hidden, activation, layer_scale, sub_norm_eps) if mlp_between else None
        )
        self.norm_between = ResidualNorm(dim, norm_eps, dropout) if mlp_between else None
        self.cross = CrossAttention(dim, heads, attention_dropout, layer_scale) if cross else None
        self.norm_cross = ResidualNorm(dim, norm_eps, dropout) if cross else None
        self.mlp = Mlp(dim, hidden, activation, layer_scale, sub_norm_eps)
        self.norm2 = ResidualNorm(dim, norm_eps, dropout)

    def forward(
        self,
        branch: Tensor | None,
        residual: Tensor | None,
        layout: Layout,
        keys: CrossKeys | None = None,
        seed: int = 0,
        leaving: Leaving | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """With `leaving` the state of those tokens."""
        after, asks = (layout, ()) if leaving is None else (leaving.layout, (leaving,))
        branches = [(self.norm1, lambda x: self.attention(x, layout, fold_seed(seed, 1), *asks))]
        if self.mlp_between is not None:
            branches.append((self.norm_between, self.mlp_between))
        if self.cross is not None:
            branches.append(
                (self.norm_cross, lambda x: self.cross(x, after, keys, fold_seed(seed, 2)))
            )
        branches.append((self.norm2, lambda x: self.feed_forward(x, after, fold_seed(seed, 0))))
        for site, (norm, run) in enumerate(branches, start=3):
            x = residual
            if not self.post_norm:
                summed = (residual, None) if branch is None else (branch, residual)
                x, residual = norm(*summed, fold_seed(seed, site))
            branch = self._keep(run(x), after, fold_seed(seed, site, 0))
            if leaving is not None and site == 3:
                residual = leaving.take(residual)
            if self.post_norm:
                (residual, _), branch = norm(branch, residual, fold_seed(seed, site)), None
        return branch, residual

    def _keep(self, branch: Tensor, layout: Layout, seed: int) -> Tensor:
        """Stochastic depth on a branch's output."""
        if not (self.training and self.drop_path):
            return branch
        return branch * path_scale(layout.cu_seqlens, branch, self.drop_path, seed)

    def feed_forward(self, x: Tensor, layout: Layout, seed: int) -> Tensor:
        """The MLP's branch."""
        return self.mlp(x)
