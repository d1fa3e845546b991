"""Keys and values: of earlier tokens, kept while a text is written, and of images, normalised for
each layer of a stack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.ops.attention import attention


class KeyCache:
    """Self-attention keys and values of the tokens decoded so far, of every layer that asks.

    A layer's memory is taken when it first asks, so any stacks can share one cache.

    Args:
        rows: R sequences, which grow together.
        max_len: tokens that fit.

    Attributes:
        length: tokens of each sequence that all layers hold; `advance` moves it.
        prefix: tokens of each that all layers hold beside them, an image's in the same sequence;
            what writes them counts them.
    """

    def __init__(self, rows: int, max_len: int) -> None:
        self.rows, self.max_len, self.length, self.prefix = rows, max_len, 0, 0
        self._kept: dict[nn.Module, Tensor] = {}

    def attend(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None = None
    ) -> Tensor:
        """Attention of n further tokens of each sequence to all before and, causally, themselves.

        Args:
            layer: whose keys these are.
            q, k, v (R * n, H, E): sequences one after the other.
            blocks (R * n,): where these are the first tokens, which of them see each other
                (`ops.attention`), in place of causally; all that follow see them.

        Returns: (R * n, H, E).
        """
        q, k, v = (t.unflatten(0, (self.rows, -1)) for t in (q, k, v))
        if layer not in self._kept:
            room = self.max_len + (0 if blocks is None else k.shape[1])
            self._kept[layer] = k.new_zeros(2, self.rows, room, *k.shape[2:])
        start = self.prefix + self.length
        end = start + k.shape[1]
        kept = self._kept[layer]
        kept[0, :, start:end] = k
        kept[1, :, start:end] = v
        visible = {}
        if blocks is not None:
            visible = dict.fromkeys(("q_block", "k_block"), blocks.view(self.rows, -1))
        elif k.shape[1] > 1:
            place = torch.arange(end, dtype=torch.int32, device=k.device).expand(self.rows, -1)
            visible = {"q_block": place[:, start:].contiguous(), "k_block": place.contiguous()}
        return attention(q, kept[0, :, :end], kept[1, :, :end], **visible).flatten(0, 1)

    def advance(self, tokens: int) -> None:
        """After all layers have seen `tokens` further tokens of each sequence."""
        self.length += tokens

    def select(self, rows: Tensor) -> None:
        """Sequence r becomes what sequence `rows[r]` (R,) int64 was (beams that are continued)."""
        for kept in self._kept.values():
            end = self.prefix + self.length
            kept[:, :, :end] = kept[:, rows, :end]


class KeyNorm(nn.Module):
    """A LayerNorm of its own before the keys and values of each layer, still by one GEMM.

        W_l (g_l * x^ + b_l) + c_l = (W_l diag(g_l)) x^ + (W_l b_l + c_l),   x^ = normalised x

    Source: open_clip transformer.py, `ln_1_kv` of CoCa's decoder.
    """

    def __init__(self, dim: int, depth: int, eps: float) -> None:
        super().__init__()
        self.depth, self.eps = depth, eps
        self.weight = nn.Parameter(torch.ones(depth * dim))
        self.bias = nn.Parameter(torch.zeros(depth * dim))

    def forward(self, tokens: Tensor, projection: nn.Linear) -> Tensor:
        """tokens (B, N, D) -> (B, N, depth * out), as `projection` of all layers' rows."""
        scale, shift = (t.unflatten(0, (self.depth, -1)) for t in (self.weight, self.bias))
        weight = projection.weight.unflatten(0, (self.depth, -1))
        bias = projection.bias + (weight @ shift[..., None]).flatten()
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps)
        return F.linear(normed, (weight * scale[:, None]).flatten(0, 1), bias)
