"""Attention pooling: learned queries read all tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlpfast.layers.block import Mlp, ResidualNorm
from vlpfast.ops.attention import attention


class MapPooler(nn.Module):
    """Tokens (B, N, D) -> (B, D) by multi-head attention of one learned query, then a residual MLP.

        x = out(attention(q(probe), k(tokens), v(tokens)));  pooled = x + mlp(norm(x))

    Source: Zhai et al. 2022, arXiv:2106.04560, section 3.2 (MAP head), as SigLIP has it.
    """

    def __init__(
        self, dim: int, heads: int, *, mlp_ratio: float, norm_eps: float, activation: str
    ) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.zeros(dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm = ResidualNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation)

    def forward(self, tokens: Tensor) -> Tensor:
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q = self.q(self.probe.to(tokens.dtype)).unflatten(-1, (self.heads, -1))
        mixed = attention(q.to(k.dtype).expand(tokens.shape[0], 1, -1, -1), k, v)
        x = self.out(mixed.flatten(-2)).squeeze(1)
        return x + self.mlp(self.norm(x)[0])


class QueryPooler(nn.Module):
    """Tokens (B, N, D) -> (B, Q, D): learned queries read all tokens by one multi-head attention.

        x = out(attention(q(norm_q(query)), k(norm_k(tokens)), v(norm_k(tokens))))

    Source: Yu et al. 2022 (CoCa), section 3.2, arXiv:2205.01917; norms as open_clip transformer.py
    `AttentionalPooler`.
    """

    def __init__(self, dim: int, heads: int, num_queries: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(num_queries, dim))
        self.norm_q = ResidualNorm(dim, norm_eps)
        self.norm_k = ResidualNorm(dim, norm_eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        k, v = self.kv(self.norm_k(tokens)[0]).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q = self.q(self.norm_q(self.query)[0]).unflatten(-1, (self.heads, -1))
        mixed = attention(q.to(k.dtype).expand(tokens.shape[0], -1, -1, -1), k, v)
        return self.out(mixed.flatten(-2))
