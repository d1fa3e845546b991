"""attention against torch's `scaled_dot_product_attention` as towers and fusion layers call it.

Dense sequences as they are. Texts padded with a mask of keys, as BERT and CLIP run them; ours are
packed. Cross-attention from image tokens and the weights of keys and values: ALBEF copies the
tokens of an image to each text and projects every copy ("sdpa"); "grouped" projects once and lays
the texts of an image side by side, still in plain PyTorch; "products" is that without softmax and
padding, the matrix products alone.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.captions import caption_lens
from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import Attention

OP = "attention"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("fwd", "bwd", "both")
BASELINE = "sdpa"


def _lens(shape: Attention) -> list[int]:
    if shape.kind == "dense":
        return [shape.num_queries] * shape.batch
    return caption_lens(shape.batch)


def setup(shape: Attention, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Packed queries, the same padded, and keys: of each sequence itself, or an image's tokens."""
    width, lens = shape.heads * shape.head_dim, _lens(shape)
    draw = lambda *size: torch.randn(*size, dtype=dtype, device=device).requires_grad_()
    inputs = {
        "shape": shape,
        "cu": torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32),
        "valid": torch.arange(shape.num_queries, device=device)
        < torch.tensor(lens, device=device)[:, None],
    }
    if shape.kind == "cross":
        num_images = shape.batch // shape.readers
        return inputs | {
            "q": draw(sum(lens), shape.heads, shape.head_dim),
            "q_padded": draw(shape.batch, shape.num_queries, shape.heads, shape.head_dim),
            "image": draw(num_images, shape.num_keys, width),
            "weight": (draw(2 * width, width) / width**0.5).detach().requires_grad_(),
            "reads": torch.arange(num_images, device=device).repeat_interleave(shape.readers),
        }
    # q, k and v are one product of the layer's, as its projection gives them.
    return inputs | {
        "qkv": draw(sum(lens), 3, shape.heads, shape.head_dim),
        "qkv_padded": draw(shape.batch, shape.num_queries, 3, shape.heads, shape.head_dim),
    }


def _keys_values(inputs: Inputs, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(images, N, H, E) each."""
    shape = inputs["shape"]
    both = F.linear(tokens, inputs["weight"]).unflatten(-1, (2, shape.heads, shape.head_dim))
    return both.unbind(-3)


def _fused(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """(B, M, H, E) through torch's (B, H, M, E)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _sdpa(inputs: Inputs) -> Tensor:
    shape = inputs["shape"]
    if shape.kind == "cross":
        copies = inputs["image"][inputs["reads"]]
        return _fused(inputs["q_padded"], *_keys_values(inputs, copies))
    qkv = inputs["qkv_padded"].unbind(2)
    if shape.kind == "text":
        return _fused(*qkv, attn_mask=inputs["valid"][:, None, None])
    return _fused(*qkv, is_causal=shape.kind == "causal")


def _grouped(inputs: Inputs) -> Tensor:
    if inputs["shape"].kind != "cross":
        raise NotImplementedError("only queries that share keys can be grouped")
    q = inputs["q_padded"].unflatten(0, (-1, inputs["shape"].readers)).flatten(1, 2)
    return _fused(q, *_keys_values(inputs, inputs["image"]))


def _products(inputs: Inputs) -> Tensor:
    shape = inputs["shape"]
    if shape.kind != "cross":
        raise NotImplementedError("the products alone are told from the rest for cross-attention")
    k, v = (x.transpose(1, 2) for x in _keys_values(inputs, inputs["image"]))
    q = inputs["q"]
    rows = len(q) // len(k)
    q = q[: rows * len(k)].unflatten(0, (-1, rows)).transpose(1, 2)
    return (q @ k.transpose(-1, -2)) @ v


def _own(name: str) -> Run:
    attention = importlib.import_module("vlpfast.ops.attention").attention

    def run(inputs: Inputs) -> Tensor:
        shape, options = inputs["shape"], {"cu_q": inputs["cu"], "impl": name}
        options["max_q"] = shape.num_queries
        if shape.kind == "cross":
            k, v = _keys_values(inputs, inputs["image"])
            return attention(inputs["q"], k, v, kv_index=inputs["reads"], **options)
        causal = "causal" if shape.kind == "causal" else None
        return attention(*inputs["qkv"].unbind(1), q_block=causal, **options)

    return run


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, then the peers."""
    op = importlib.import_module("vlpfast.ops.attention")._OP
    # Its own "sdpa" is the baseline's kernels over our arguments.
    ours = {name: _own(name) for name in own_impls(op, device) if name != "sdpa"}
    return {**ours, "sdpa": _sdpa, "grouped": _grouped, "products": _products}


def _sizes(shape: Attention) -> tuple[int, int, int]:
    """Query tokens, key tokens, and pairs of a query and a key it sees."""
    lens = _lens(shape)
    if shape.kind == "cross":
        keys = shape.batch // shape.readers * shape.num_keys
        return sum(lens), keys, sum(lens) * shape.num_keys
    pairs = sum(n * (n + 1) // 2 if shape.kind == "causal" else n * n for n in lens)
    return sum(lens), sum(lens), pairs


def bytes(shape: Attention, dtype: torch.dtype, direction: str) -> int:
    """Forward: queries and keys (image tokens and weights) read, the result written. Backward:
    these and the result's gradient read, gradients written.
    """
    width = shape.heads * shape.head_dim
    queries, keys, _ = _sizes(shape)
    source = keys * width + 2 * width**2 if shape.kind == "cross" else 2 * keys * width
    forward = (2 * queries * width + source) * dtype.itemsize
    backward = (3 * queries * width + 2 * source) * dtype.itemsize
    return {"fwd": forward, "bwd": backward, "both": forward + backward}[direction]


def flops(shape: Attention, direction: str) -> int:
    """Products of seen pairs, two forward and four backward, and the projection of an image's keys
    and values, one forward and two backward.
    """
    width = shape.heads * shape.head_dim
    _, keys, pairs = _sizes(shape)
    forward = 4 * width * pairs + (4 * keys * width**2 if shape.kind == "cross" else 0)
    return {"fwd": 1, "bwd": 2, "both": 3}[direction] * forward
