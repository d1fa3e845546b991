"""Mixture of experts by attributes: what a token is (its modality, its task, whether it is causal)
chooses the experts, so a gate is read once for each kind of token, not once per token.

Two chosen linear experts are one linear map, the weighted sum of their weights: per kind one GEMM
as large as a dense layer's, whatever the number of experts.

Letters: G kinds of tokens, A attributes, n experts, k chosen of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.layers.block import Block, Layout, SelfAttention
from vlpfast.ops.bias_gelu import bias_gelu
from vlpfast.ops.reference.counter import draw, stream, uniform
from vlpfast.ops.seed import fold_seed

ATTRIBUTES = 8


@dataclass(frozen=True)
class Routes:
    """Which tokens are of which kind, and what each kind is.

    Attributes:
        attributes (G, A): fp32, a row of zeros and ones per kind.
        sizes: tokens of each kind, known on the host.
        order (T,): int64, the tokens kind by kind; None where they lie so.
        inverse (T,): int64, undoes `order`.
    """

    attributes: Tensor
    sizes: tuple[int, ...]
    order: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, attributes: Tensor, places: list[Tensor]) -> Routes:
        """Routes of tokens that lie at `places`, a tensor of packed indices for each kind."""
        order = torch.cat(places)
        return cls(attributes, tuple(len(p) for p in places), order, order.argsort())


class Choice(NamedTuple):
    """Of each kind, the chosen experts (G, k) int64 and their shares (G, k) fp32, which sum to
    one.
    """

    experts: Tensor
    shares: Tensor


class Gate(nn.Module):
    """Attributes -> experts: softmax(W norm(tag(attributes))), its k largest rescaled to sum to 1.

    In training normal noise with a standard deviation of 1 / n is added before the softmax.

    Source: Zhu et al. 2022 (Uni-Perceiver-MoE), arXiv:2206.04674, section 3.2;
        fundamentalvision/Uni-Perceiver uniperceiver/task_moe/gate.py.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.tag = nn.Linear(ATTRIBUTES, dim)
        self.norm = nn.LayerNorm(dim)
        self.expert = nn.Linear(dim, num_experts, bias=False)
        self.top_k = min(top_k, num_experts)

    def forward(self, attributes: Tensor, seed: int | None = None) -> Choice:
        """`seed` keys the noise; None: without."""
        # A handful of rows: full precision costs nothing and rounds no decision.
        with torch.autocast(attributes.device.type, enabled=False):
            logits = self.expert(self.norm(self.tag(attributes.to(self.tag.weight.dtype))))
            if self.training and seed is not None:
                logits = logits + _normal(logits, seed) / logits.shape[-1]
            shares, experts = logits.softmax(-1).topk(self.top_k)
            return Choice(experts, shares / shares.sum(-1, keepdim=True))


class ExpertLinear(nn.Module):
    """n linear maps; a kind of tokens goes through the weighted sum of those chosen for it."""

    def __init__(self, num_experts: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_dim))

    def merged(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """Weight (G, out, in) and bias (G, out) of each kind."""
        shares = choice.shares.to(self.weight.dtype)
        weight = (shares[:, :, None, None] * self.weight[choice.experts]).sum(1)
        return weight, (shares[:, :, None] * self.bias[choice.experts]).sum(1)

    def forward(self, x: Tensor, routes: Routes, choice: Choice) -> Tensor:
        weight, bias = self.merged(choice)
        alike = len(self.weight) == 1
        return _by_kind(x, routes, lambda part, g: F.linear(part, weight[g], bias[g]), alike)


class MoeMlp(nn.Module):
    """The block's MLP with both layers by one choice of experts."""

    def __init__(
        self, dim: int, hidden: int, activation: str, num_experts: int, top_k: int
    ) -> None:
        super().__init__()
        self.gate = Gate(dim, num_experts, top_k)
        self.fc1 = ExpertLinear(num_experts, dim, hidden)
        self.fc2 = ExpertLinear(num_experts, hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor, routes: Routes, seed: int = 0) -> Tensor:
        choice = self.gate(routes.attributes, seed)
        (w1, b1), (w2, b2) = self.fc1.merged(choice), self.fc2.merged(choice)

        def run(part: Tensor, g: int) -> Tensor:
            hidden = bias_gelu(F.linear(part, w1[g]), b1[g], kind=self.activation)
            return F.linear(hidden, w2[g], b2[g])

        return _by_kind(x, routes, run, alike=len(self.fc1.weight) == 1)


class MoeAttention(SelfAttention):
    """Self-attention whose two projections are experts, each with its own gate."""

    def __init__(self, dim: int, heads: int, dropout: float, num_experts: int, top_k: int) -> None:
        super().__init__(dim, heads, dropout)
        self.qkv = ExpertLinear(num_experts, dim, 3 * dim)
        self.out = ExpertLinear(num_experts, dim, dim)
        self.qkv_gate = Gate(dim, num_experts, top_k)
        self.out_gate = Gate(dim, num_experts, top_k)

    def forward(self, x: Tensor, layout: Layout, seed: int = 0) -> Tensor:
        routes = layout.routes
        choices = [
            gate(routes.attributes, fold_seed(seed, number))
            for number, gate in enumerate((self.qkv_gate, self.out_gate))
        ]
        mixed = self.mix(self.qkv(x, routes, choices[0]), layout, seed)
        return self.out(mixed, routes, choices[1])


class MoeBlock(Block):
    """A block with experts in self-attention and MLP; its layout carries `Routes`."""

    def __init__(self, dim: int, heads: int, *, num_experts: int, top_k: int, **options) -> None:
        super().__init__(dim, heads, **options)
        hidden, activation = self.mlp.fc1.out_features, self.mlp.activation
        self.attention = MoeAttention(dim, heads, self.attention.dropout, num_experts, top_k)
        self.mlp = MoeMlp(dim, hidden, activation, num_experts, top_k)

    def feed_forward(self, x: Tensor, layout: Layout, seed: int) -> Tensor:
        return self.mlp(x, layout.routes, seed)

    def load(self, routes: Routes) -> Tensor:
        """(3, n) share of the tokens' choices that each expert has, of the MLP and the attention's
        two projections; a row sums to one.
        """
        gates = (self.mlp.gate, self.attention.qkv_gate, self.attention.out_gate)
        sizes = routes.attributes.new_tensor(routes.sizes) / sum(routes.sizes)
        loads = []
        for gate in gates:
            experts, _ = gate(routes.attributes)
            chosen = F.one_hot(experts, gate.expert.out_features).to(sizes.dtype).mean(1)
            loads.append(sizes @ chosen)
        return torch.stack(loads)


def _by_kind(
    x: Tensor, routes: Routes, run: Callable[[Tensor, int], Tensor], alike: bool
) -> Tensor:
    """`run(tokens, kind)` of every kind, put back where its tokens lie; `alike`: it does the same
    to all.
    """
    if alike or len(routes.sizes) == 1:
        return run(x, 0)
    if routes.order is not None:
        x = x[routes.order]
    out = torch.cat([run(part, kind) for kind, part in enumerate(x.split(routes.sizes))])
    return out if routes.inverse is None else out[routes.inverse]


def _normal(like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers of the shape of `like` (G, n), a function of seed and place."""
    places = torch.arange(like.numel(), device=like.device).view_as(like)
    key = stream(seed, torch.zeros_like(places))
    # 1 - u lies in (0, 1].
    radius = (-2 * (1 - uniform(draw(key, 2 * places))).log()).sqrt()
    return (radius * (math.tau * uniform(draw(key, 2 * places + 1))).cos()).to(like.dtype)
