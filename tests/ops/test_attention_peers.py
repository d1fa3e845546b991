"""attention and the packages it can stand in for: their kernels as implementations, and the shapes
and rules of their own tests.
"""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vlpfast import _ext
from vlpfast.ops import _attention_peers
from vlpfast.ops.attention import _OP, attention
from vlpfast.testing import with_gradients

PEERS = ("flash_attn", "xformers")


def offsets(lens: list[int]) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


def draw(lens: list[int], heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sum(lens), heads, dim).to(dtype)


class _Mask:
    """Stands for xformers' BlockDiagonalMask: remembers the lengths."""

    causal = False

    @classmethod
    def from_seqlens(cls, q_lens: list[int], k_lens: list[int]) -> _Mask:
        mask = cls()
        mask.q_lens, mask.k_lens = q_lens, k_lens
        return mask


class _CausalMask(_Mask):
    causal = True


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, deterministic):
    assert deterministic
    assert max_q >= int(cu_q.diff().max())
    assert max_k >= int(cu_k.diff().max())
    blocks = "causal" if causal else None
    return attention(
        q, k, v, cu_q=cu_q, cu_k=cu_k, q_block=blocks, scale=softmax_scale, impl="reference"
    )


def _memory_efficient(q, k, v, mask, *, scale):
    lens = offsets(mask.q_lens), offsets(mask.k_lens)
    blocks = "causal" if mask.causal else None
    q, k, v = (x.squeeze(0) for x in (q, k, v))
    out = attention(q, k, v, cu_q=lens[0], cu_k=lens[1], q_block=blocks, scale=scale)
    return out[None]


@pytest.fixture
def packages(monkeypatch):
    """The two packages' functions, with their signatures, computed by the reference."""
    bias = SimpleNamespace(BlockDiagonalMask=_Mask, BlockDiagonalCausalMask=_CausalMask)
    fakes = {
        "flash_attn": SimpleNamespace(flash_attn_varlen_func=_varlen),
        "xformers.ops": SimpleNamespace(memory_efficient_attention=_memory_efficient),
        "xformers.ops.fmha.attn_bias": bias,
    }
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("peer", PEERS)
def test_arguments_reach_the_package(peer, packed, causal, packages):
    lens = [5, 2, 3] if packed else [4, 4, 4]
    q, k, v = (draw(lens, 2, 8) for _ in range(3))
    cu = offsets(lens)
    expected = attention(q, k, v, cu_q=cu, q_block="causal" if causal else None, scale=0.3)
    options = {"cu_q": cu, "cu_k": cu, "max_q": 5, "max_k": 5, "scale": 0.3, "causal": causal}
    if not packed:
        q, k, v = (x.unflatten(0, (3, 4)) for x in (q, k, v))
        options |= {"cu_q": None, "cu_k": None}
    out = getattr(_attention_peers, peer)(q, k, v, **options)
    torch.testing.assert_close(out.flatten(0, -3), expected)
    assert out.shape == q.shape


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("runs on cuda", {"device": torch.device("cpu")}),
        ("got torch.float64", {"dtype": torch.float64}),
        ("up to 256, got 320", {"head_dim": 320}),
        ("counter", {"dropout_p": 0.1}),
        ("kv_index: every", {"given": ["kv_index"]}),
        ("bias: has no gradient", {"given": ["bias"]}),
        ("q_block: has no blocks", {"given": ["q_block", "k_block"]}),
        ("k_lens: takes packed", {"given": ["k_lens"]}),
        ("counts from the end", {"given": ["causal"], "aligned": False}),
    ],
)
@pytest.mark.parametrize("peer", PEERS)
def test_reasons(peer, words, change):
    arguments = {
        "device": torch.device("cuda"),
        "dtype": torch.bfloat16,
        "head_dim": 64,
        "dropout_p": 0.0,
        "given": ["cu_q", "cu_k", "causal", "max_q", "max_k", "scale"],
        "aligned": True,
    }
    rejects = _attention_peers.rejects(peer)
    assert rejects(**arguments) is None
    assert words in rejects(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("peer", PEERS)
def test_package_matches_reference(peer, causal):
    reason = _OP.implementations[peer].missing()
    if reason:
        pytest.skip(reason)
    lens = [5, 30, 77]
    options = {"cu_q": offsets(lens).cuda(), "q_block": "causal" if causal else None}
    inputs = [draw(lens, 3, 64, torch.bfloat16).cuda() for _ in range(3)]
    check_rule(inputs, peer, options)


def check_rule(inputs: list[Tensor], impl: str, options: dict) -> None:
    """flash-attn's rule: against fp32, the forward is off by at most twice and gradients by at most
    three times what explicit attention in the inputs' own dtype is off by, plus a rounding.
    """
    grad = torch.randn_like(inputs[0])
    run = lambda impl: lambda q, k, v: attention(q, k, v, impl=impl, **options)
    wide = [x.float() for x in inputs]
    truth = with_gradients(run("reference"), wide, grad.float())
    eager = with_gradients(run("reference"), inputs, grad)
    actual = with_gradients(run(impl), inputs, grad)
    flat = [[*outs, *grads] for outs, grads in (actual, truth, eager)]
    for name, factor, a, t, e in zip(("out", "dq", "dk", "dv"), (2, 3, 3, 3), *flat, strict=True):
        if not t.numel():
            continue
        error, allowed = (a.float() - t).abs().max(), factor * (e.float() - t).abs().max()
        assert error <= allowed + 1e-5 * t.abs().max().clamp(min=1), (name, error, allowed)


needs_cpp = pytest.mark.skipif(_ext.cpp_missing() is not None, reason="cpp: not built")
# Of tests/test_flash_attn.py, test_flash_attn_output and test_flash_attn_varlen_output, on fewer
# heads: (queries, keys), head sizes, causal only where queries and keys align.
FLASH_LENS = [
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 512),
    (512, 256),
    (1, 147),
    (3, 799),
    (127, 512),
]
FLASH_DIMS = (32, 59, 64, 80, 96, 111, 128)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("num_queries", "num_keys"), FLASH_LENS)
def test_flash_attn_grid(num_queries, num_keys, dtype):
    """Lengths of each sequence are drawn as theirs: between the bound less 20 and the bound."""
    random.seed(num_keys)
    torch.manual_seed(num_keys)
    q_lens, k_lens = (
        [max(1, random.randint(bound - 20, bound)) for _ in range(2)]
        for bound in (num_queries, num_keys)
    )
    dim = FLASH_DIMS[num_keys % len(FLASH_DIMS)]
    inputs = [draw(lens, 2, dim, dtype) for lens in (q_lens, k_lens, k_lens)]
    check_rule(inputs, "cpp", {"cu_q": offsets(q_lens), "cu_k": offsets(k_lens)})


@needs_cpp
@pytest.mark.parametrize("dim", FLASH_DIMS)
@pytest.mark.parametrize("length", [97, 128, 200, 257])
def test_flash_attn_causal_grid(length, dim):
    torch.manual_seed(dim)
    lens = [length, length - 20, 1]
    inputs = [draw(lens, 2, dim, torch.bfloat16) for _ in range(3)]
    check_rule(inputs, "cpp", {"cu_q": offsets(lens), "q_block": "causal"})


@needs_cpp
@pytest.mark.parametrize(
    ("q_lens", "k_lens"),
    [([5, 0, 7], [9, 4, 3]), ([5, 2, 7], [9, 0, 3]), ([0, 0], [0, 0]), ([3], [0])],
)
def test_flash_attn_empty_sequences(q_lens, k_lens):
    """Empty queries and keys as in test_flash_attn_varlen: finite, and zero where no key is."""
    inputs = [draw(lens, 2, 16) for lens in (q_lens, k_lens, k_lens)]
    options = {"cu_q": offsets(q_lens), "cu_k": offsets(k_lens), "impl": "cpp"}
    run = lambda q, k, v: attention(q, k, v, **options)
    (out,), grads = with_gradients(run, inputs, torch.randn_like(inputs[0]))
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    start = 0
    for n, keys in zip(q_lens, k_lens, strict=True):
        assert keys or not out[start : start + n].any()
        start += n


# Of tests/test_mem_eff_attention.py, generate_test_shapes_B_Mq_Mkv_H_K_Kv with equal head sizes:
# theirs by name, and a draw of their random ones.
XFORMERS_SHAPES = [
    *[(16, m, n, 1, 32) for m in (32, 256) for n in (32, 64, 256, 1024)],
    *[(1, m, m, 3, 32) for m in (2, 3, 15, 31, 32, 34, 68, 72, 90, 132, 136)],
    (4, 1, 16, 2, 128),
    (1, 16, 1024, 1, 64),
    (2, 1024, 16, 1, 64),
    (1, 128, 128, 12, 40),
    (2, 82, 82, 8, 64),
    (3, 197, 197, 1, 64),
]


def _random_shapes(count: int) -> list[tuple[int, ...]]:
    draw = random.Random(0)
    sizes = lambda: (draw.randint(1, 4), draw.randint(1, 257), draw.randint(1, 257))
    return [(*sizes(), draw.choice([1, 3, 5]), 8 * draw.randint(1, 16)) for _ in range(count)]


@needs_cpp
@pytest.mark.parametrize("shape", XFORMERS_SHAPES + _random_shapes(30), ids=str)
def test_xformers_grid(shape):
    torch.manual_seed(0)
    batch, num_queries, num_keys, heads, dim = shape
    inputs = [
        torch.randn(batch, n, heads, dim, dtype=torch.bfloat16)
        for n in (num_queries, num_keys, num_keys)
    ]
    check_rule(inputs, "cpp", {"scale": 0.5 * dim**-0.5} if dim % 3 == 0 else {})


@needs_cpp
def test_xformers_nans_in_padding():
    """Keys that no sequence has, beyond `k_lens` and between packed ones, do not leak as NaN."""
    q, k, v = (torch.randn(2, 5, 2, 16) for _ in range(3))
    k_lens = torch.tensor([3, 5])
    expected = attention(q, k, v, k_lens=k_lens, impl="cpp")
    for x in (k, v):
        x[0, 3:] = torch.nan
    torch.testing.assert_close(attention(q, k, v, k_lens=k_lens, impl="cpp"), expected)
