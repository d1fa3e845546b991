"""attention: every implementation against the fp64 reference, and the reference against a loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlpfast.ops import _attention_sdpa, _attention_spans
from vlpfast.ops.attention import attention, attention_map, gradcam
from vlpfast.testing import (
    assert_compiles,
    assert_same,
    assert_within_budget,
    opcheck,
    poisoned_allocations,
    routes,
    with_gradients,
)

# "cpp" has no fp64 and is measured against budgets in fp32.
IMPLS = ["reference", "sdpa"]
ALL_IMPLS = [*IMPLS, "cpp"]
PRECISION = {"reference": torch.float64, "sdpa": torch.float64, "cpp": torch.float32}


@dataclass(frozen=True)
class Case:
    """Lengths of the sequences and which options are given; `read` maps queries to keys."""

    q: tuple[int, ...]
    k: tuple[int, ...] | None = None  # None: self-attention
    packed: str = "qk"  # which sides are packed
    read: tuple[int, ...] | None = None
    blocks: str | None = None
    bias: int = 0  # its number of dimensions
    heads: int = 2
    dim: int = 8


CASES = {
    "dense": Case((5, 5), packed=""),
    "dense-one": Case((1,), packed="", heads=1, dim=1),
    "dense-lens": Case((5, 3, 0, 7), packed=""),
    "dense-causal": Case((5, 5, 5), packed="", blocks="causal"),
    "dense-causal-lens": Case((5, 2), packed="", blocks="causal"),
    "dense-cross-causal": Case((3, 3), (5, 5), packed="", blocks="causal"),
    "dense-cross-causal-lens": Case((4, 4), (5, 2), packed="", blocks="causal"),
    "dense-bias": Case((4, 4), packed="", bias=3),
    "dense-bias-lens": Case((4, 2), (3, 5), packed="", bias=4),
    "packed": Case((3, 1, 13, 5, 2, 2, 9)),
    "packed-one": Case((7,)),
    "packed-empty-rows": Case((0, 3, 0, 0, 4, 0)),
    "packed-causal": Case((3, 1, 6, 5, 2), blocks="causal"),
    "packed-prefix": Case((3, 1, 6, 5, 2), blocks="prefix"),
    "packed-semi": Case((3, 1, 6, 5, 2), blocks="semi"),
    "packed-bias3": Case((3, 1, 6, 5, 2), bias=3),
    "packed-bias4-causal": Case((3, 1, 6, 5, 2), bias=4, blocks="causal"),
    "cross": Case((3, 1, 6), (4, 4, 4), packed="q"),
    "cross-lens": Case((3, 1, 6), (4, 0, 7), packed="q"),
    "cross-packed-keys": Case((3, 1, 6), (4, 0, 7)),
    "cross-dense-queries": Case((3, 3), (4, 9), packed="k"),
    "fusion": Case((3, 1, 6, 2, 5, 4), (7, 7, 7), packed="q", read=(2, 0, 0, 2, 2, 0)),
    "fusion-lens": Case((3, 1, 0, 2, 5, 4), (7, 0, 3), packed="q", read=(2, 0, 0, 1, 2, 0)),
    "fusion-packed-keys": Case((3, 1, 6, 2), (7, 2), read=(1, 0, 0, 1)),
    "fusion-dense": Case((4, 4, 4), (7, 7), packed="", read=(1, 1, 0)),
    "fusion-blocks": Case((3, 1, 6, 2), (5, 4), packed="q", read=(1, 0, 0, 1), blocks="semi"),
    "fusion-bias": Case((3, 1, 6, 2), (5, 5), packed="q", read=(1, 0, 0, 1), bias=4),
    "self-regrouped": Case((3, 1, 6, 2), read=(1, 0, 0, 2)),
}


def block_ids(kind: str, lens: tuple[int, ...]) -> list[Tensor]:
    """Block ids that start some queries below every key: those rows are fully masked."""
    if kind == "prefix":
        return [(torch.arange(n) - n // 2).clamp(min=0) for n in lens]
    return [torch.arange(n) // 2 + (i % 2) for i, n in enumerate(lens)]


def lay_out(parts: list[Tensor], packed: bool) -> Tensor:
    if packed:
        return torch.cat(parts)
    padded = parts[0].new_zeros(len(parts), max(len(p) for p in parts), *parts[0].shape[1:])
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
        if part.is_floating_point():
            row[len(part) :] = 17.0  # what padding holds must not matter
    return padded


def offsets(lens: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


def build(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict, list]:
    """[q, k, v(, bias)], options, and per query sequence (q, k, v, block ids) for the loop."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.double).to(dtype)
    k_lens = case.q if case.k is None else case.k
    parts = [[draw(n, case.heads, case.dim) for n in lens] for lens in (case.q, k_lens, k_lens)]
    inputs = [lay_out(part, side in case.packed) for part, side in zip(parts, "qkk", strict=True)]
    options: dict = {}
    for side, lens in (("q", case.q), ("k", k_lens)):
        if side in case.packed:
            options[f"cu_{side}"] = offsets(lens)
        elif len(set(lens)) > 1:
            options[f"{side}_lens"] = torch.tensor(lens)
    if case.k is None and case.packed:
        del options["cu_k"]
    read = case.read or range(len(case.q))
    if case.read:
        options["kv_index"] = torch.tensor(case.read)
    blocks = None
    if case.blocks == "causal":
        options["q_block"] = "causal"
        blocks = [torch.arange(n) for n in case.q], [torch.arange(n) for n in k_lens]
    elif case.blocks:
        blocks = block_ids(case.blocks, case.q), block_ids(case.blocks, k_lens)
        options["q_block"] = lay_out(blocks[0], "q" in case.packed)
        if case.k is not None:
            options["k_block"] = lay_out(blocks[1], "k" in case.packed)
        else:
            blocks = blocks[0], blocks[0]
    if case.bias:
        shape = (len(case.q), case.heads, max(case.q), max(k_lens))
        inputs.append(draw(*shape[4 - case.bias :]))
    problems = []
    for r, s in enumerate(read):
        ids = (blocks[0][r], blocks[1][s]) if blocks else None
        problems.append((parts[0][r], parts[1][s], parts[2][s], ids))
    return inputs, options, problems


def run(impl: str, options: dict, **more: object):
    """A function of (q, k, v(, bias)) alone."""
    return lambda q, k, v, bias=None: attention(q, k, v, bias=bias, impl=impl, **options, **more)


def one_at_a_time(problems: list, bias: Tensor | None) -> list[Tensor]:
    """The definition, one sequence, one head, one query at a time."""
    outs = []
    for r, (q, k, v, ids) in enumerate(problems):
        out = torch.zeros_like(q)
        for m in range(q.shape[0]):
            for h in range(q.shape[1]):
                seen = [n for n in range(len(k)) if ids is None or ids[1][n] <= ids[0][m]]
                if not seen:
                    continue
                scores = k[seen, h] @ q[m, h] / q.shape[-1] ** 0.5
                if bias is not None:
                    scores = scores + (bias if bias.dim() == 3 else bias[r])[h, m, seen]
                out[m, h] = torch.softmax(scores, 0) @ v[seen, h]
        outs.append(out)
    return outs


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_matches_one_sequence_at_a_time(name, impl):
    inputs, options, problems = build(CASES[name])
    out = run(impl, options)(*inputs)
    bias = inputs[3] if len(inputs) == 4 else None
    expected = one_at_a_time(problems, bias)
    if "cu_q" in options:
        torch.testing.assert_close(out, torch.cat(expected))
    else:
        for row, part in zip(out, expected, strict=True):
            torch.testing.assert_close(row[: len(part)], part)
            assert (row[len(part) :] == 0).all()


LABELS = ["out", "dq", "dk", "dv", "dbias"]


def assert_near_reference(impl: str, options: dict, inputs: list[Tensor], **more: object) -> None:
    """Output and gradients of `impl` against the reference in fp64."""
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    reference = run("reference", options, **more)
    truth = with_gradients(reference, [x.double() for x in inputs], grad.double())
    eager = with_gradients(reference, inputs, grad)
    with poisoned_allocations():
        actual = with_gradients(run(impl, options, **more), inputs, grad)
    flat = [[*outs, *grads] for outs, grads in (actual, truth, eager)]
    for label, a, t, e in zip(LABELS, *flat, strict=False):
        assert_within_budget(a, t, e, name=label)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("impl", "device"), routes("sdpa", "cpp", "triton"))
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name, impl, device, dropout_p, dtype):
    if impl == "sdpa" and dropout_p:
        pytest.skip("torch's dropout draws from a generator")
    if impl == "triton" and device.type == "cpu":
        pytest.skip("interpreted in tests/kernels/test_attention_kernels.py, on fewer cases")
    inputs, options, _ = build(CASES[name], dtype)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    inputs = [x.to(device) for x in inputs]
    assert_near_reference(impl, options, inputs, dropout_p=dropout_p, seed=5)


# Around a vector of queries (16 lanes and fewer), a block of them (64) and a tile of rows (6).
SIZES = [1, 5, 6, 7, 15, 16, 17, 31, 61, 64, 65, 131]


@pytest.mark.parametrize("head_dim", [1, 16, 24, 64, 80])
def test_cpp_around_its_blocks(head_dim):
    """Every size as a query sequence and as a key sequence, several on one, heads of any width."""
    for packed in ("q", "qk"):
        read = (0, 1, 1, 2, 0, 5, 5, 5, 11, 4, 3, 7)
        inputs, options, _ = build(
            Case(tuple(SIZES), tuple(SIZES[::-1]), packed=packed, read=read, dim=head_dim),
            torch.float32,
        )
        assert_near_reference("cpp", options, inputs, dropout_p=0.1, seed=8)


@pytest.mark.parametrize("case", [Case((131, 70), blocks="causal"), Case((70, 9), bias=3)])
def test_cpp_masks_over_several_blocks(case):
    inputs, options, _ = build(case, torch.float32)
    assert_near_reference("cpp", options, inputs)


def test_cpp_is_the_same_on_any_number_of_threads_and_alone():
    inputs, options, _ = build(Case((3, 40, 16, 22), (33, 9), read=(1, 0, 0, 1)), torch.float32)
    options.update(dropout_p=0.2, seed=3, impl="cpp")
    bias = torch.randn(2, 40, 33)
    grad = torch.randn_like(inputs[0])
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            function = lambda q, k, v, b: attention(q, k, v, bias=b, **options)
            results.append(with_gradients(function, [*inputs, bias], grad))
    finally:
        torch.set_num_threads(before)
    assert_same(*results)
    q, k, v = inputs
    first = attention(q[:3], k[33:], v[33:], bias=bias, cu_q=options["cu_q"][:2],
                      cu_k=torch.tensor([0, 9], dtype=torch.int32), dropout_p=0.2, seed=3,
                      impl="cpp")  # fmt: skip
    assert torch.equal(first, results[0][0][0][:3])


def test_layers_of_a_step_share_their_spans(monkeypatch):
    made = []
    original = _attention_spans._make
    monkeypatch.setattr(
        _attention_spans, "_make", lambda *a, **k: made.append(1) or original(*a, **k)
    )
    (q, k, v), options, _ = build(CASES["fusion"], torch.float32)
    first = attention(q, k, v, **options)
    for _ in range(3):
        assert torch.equal(attention(q, k, v, **options), first)
    assert len(made) == 1
    options["kv_index"][0] = 1  # changed in place: what was remembered does not hold
    assert not torch.equal(attention(q, k, v, **options), first)
    assert len(made) == 2


def test_opcheck():
    for name in ("packed-bias3", "fusion-lens"):
        (q, k, v, *bias), options, _ = build(CASES[name], torch.float32)
        spans = _attention_spans.spans_of(
            q, k, q_lens=None, k_lens=options.get("k_lens"), cu_q=options["cu_q"],
            cu_k=options.get("cu_k", options["cu_q"] if k.dim() == 3 else None),
            kv_index=options.get("kv_index"), plan=False,
        )  # fmt: skip
        k, v = (x.flatten(0, -3) for x in (k, v))
        rest = (*spans[:3], None, None, bias[0] if bias else None, torch.tensor(1), False, 0.1, 0.3)
        out, lse = torch.ops.vlpfast.attention_fwd(q, k, v, *rest)
        opcheck(torch.ops.vlpfast.attention_fwd.default, q, k, v, *rest)
        bwd = torch.ops.vlpfast.attention_bwd.default
        opcheck(bwd, torch.ones_like(out), q, k, v, lse, *rest, bool(bias))


@pytest.mark.parametrize(
    "name", ["dense-lens", "packed-semi", "packed-bias4-causal", "fusion-lens"]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(name, dropout_p):
    inputs, options, _ = build(replace(CASES[name], heads=1, dim=2))
    options.update(dropout_p=dropout_p, seed=5)
    torch.autograd.gradcheck(run("reference", options), [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize(
    ("impl", "dropout_p"),
    [("reference", 0.0), ("reference", 0.4), ("sdpa", 0.0), ("cpp", 0.0), ("cpp", 0.4)],
)
@pytest.mark.parametrize("blocks", [None, "causal", "semi"])
def test_packed_equals_padded(impl, dropout_p, blocks):
    lens = (3, 1, 6, 5, 2)
    results = []
    for packed in ("qk", ""):
        inputs, options, _ = build(Case(lens, packed=packed, blocks=blocks), PRECISION[impl])
        out = run(impl, options, dropout_p=dropout_p, seed=3)(*inputs)
        results.append(
            torch.cat([row[:n] for row, n in zip(out, lens, strict=True)]) if not packed else out
        )
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_kv_index_equals_copies(impl):
    (q, k, v), options, _ = build(CASES["fusion"], PRECISION[impl])
    index = options.pop("kv_index")
    grad = torch.randn_like(q)
    shared = with_gradients(run(impl, {**options, "kv_index": index}), [q, k, v], grad)
    copied = with_gradients(
        lambda q, k, v: run(impl, options)(q, k[index], v[index]), [q, k, v], grad
    )
    for a, b in zip(shared[0] + shared[1], copied[0] + copied[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(
    ("blocks", "visible"),
    [
        ([0, 0, 0, 0, 0], lambda m, n: True),
        ([0, 1, 2, 3, 4], lambda m, n: n <= m),
        ([0, 0, 0, 1, 2], lambda m, n: n < 3 or n <= m),  # a prefix of 3, then causal
        ([0, 0, 1, 1, 2], lambda m, n: n // 2 <= m // 2),  # runs of 2
    ],
    ids=["bidirectional", "causal", "prefix", "semi-causal"],
)
def test_block_ids(impl, blocks, visible):
    (q, k, v), _, _ = build(Case((5, 5), packed=""), PRECISION[impl])
    mask = torch.tensor([[visible(m, n) for n in range(5)] for m in range(5)])
    out = attention(q, k, v, q_block=torch.tensor([blocks, blocks]), impl=impl)
    scores = torch.einsum("bmhe,bnhe->bhmn", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhmn,bnhe->bmhe", weights, v))


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("packed", ["", "q"])
def test_masked_rows(impl, packed):
    (q, k, v), options, _ = build(Case((3, 3), (4, 4), packed=packed), PRECISION[impl])
    blocks = torch.tensor([[5, 5, 5], [5, 0, 5]])  # the middle query of the second sees nothing
    options["q_block"] = blocks.flatten() if packed else blocks
    options.update(k_block=torch.ones(2, 4, dtype=torch.int64), k_lens=torch.tensor([0, 4]))
    (out,), (dq, dk, dv) = with_gradients(run(impl, options), [q, k, v])
    dead = torch.tensor([1, 1, 1, 0, 1, 0], dtype=torch.bool)
    for x in (out, dq):
        assert (x.reshape(6, -1)[dead] == 0).all()
        assert (x.reshape(6, -1)[~dead] != 0).all()
    assert (dk[0] == 0).all()
    assert (dv[0] == 0).all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(("tokens", "rows", "keys"), [(0, 0, 2), (0, 3, 2), (4, 2, 0)])
def test_empty(impl, tokens, rows, keys):
    """No sequences; only empty sequences; no keys at all."""
    q = torch.randn(tokens, 2, 4, requires_grad=True)
    k = torch.randn(1, keys, 2, 4, requires_grad=True)
    cu = torch.linspace(0, tokens, rows + 1).to(torch.int32)
    index = torch.zeros(rows, dtype=torch.int64)
    out = attention(q, k, k, cu_q=cu, kv_index=index, impl=impl)
    assert out.shape == q.shape
    assert (out == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert (grad == 0).all()


def test_dropout_mask_is_the_counter():
    """One weight of each (sequence, head, query, key), drawn with Python integers."""

    def mix(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ x >> 16

    def keep(seed: int, r: int, h: int, m: int, n: int) -> bool:
        key = mix(mix(mix(mix(seed & 0xFFFFFFFF) ^ seed >> 32) ^ r))
        for position in (h, m, n):
            key = mix(key ^ mix(position))
        return key >> 8 >= round(0.25 * 2**24)

    seed, size = 123456789012345, 5
    q = torch.zeros(2, size, 3, size)
    v = torch.eye(size)[:, None].expand(2, size, 3, size)
    out = attention(q, q, v, dropout_p=0.25, seed=seed)  # out[r, m, h, n] is the weight itself
    expected = [
        [[[keep(seed, r, h, m, n) for n in range(size)] for h in range(3)] for m in range(size)]
        for r in range(2)
    ]
    torch.testing.assert_close(out, torch.tensor(expected) / (size * 0.75))


def test_dropout_statistics():
    q, v = torch.zeros(8, 32, 4, 2), torch.ones(8, 32, 4, 2)
    out = attention(q, q, v, dropout_p=0.3, seed=torch.tensor(7))[..., 0]
    # 8*32*4*32 draws: the standard error of the mean is 0.0036; of the variance of rows, 6 %.
    assert abs(out.mean() - 1) < 0.015
    assert abs(out.var() / (0.3 / 0.7 / 32) - 1) < 0.25
    for dim in (0, 1, 2):
        patterns = out.transpose(0, dim).flatten(1)
        assert len(patterns.unique(dim=0)) == out.shape[dim]


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_non_contiguous_repeatable_unmutated(impl):
    qkv = torch.randn(9, 3, 2, 8)
    before = qkv.clone()
    q, k, v = qkv.unbind(1)
    cu = torch.tensor([0, 2, 6, 9], dtype=torch.int32)
    out = attention(q, k, v, cu_q=cu, impl=impl)
    assert torch.equal(out, attention(q, k, v, cu_q=cu, impl=impl))
    assert torch.equal(out, attention(*(x.contiguous() for x in (q, k, v)), cu_q=cu, impl=impl))
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_large_logits_and_scale(impl):
    q = torch.tensor([[[[300.0]], [[-300.0]]]])
    v = torch.tensor([[[[1.0]], [[2.0]]]])
    out = attention(q, q, v, scale=10.0, impl=impl)  # scores of +-900,000: a hard choice
    torch.testing.assert_close(out, v)
    flat = attention(q, q, v, scale=0.0, impl=impl)
    torch.testing.assert_close(flat, torch.full_like(v, 1.5))


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_host_bound_need_not_be_tight(impl):
    for name in ("packed", "packed-causal", "packed-semi", "cross-packed-keys", "fusion-lens"):
        inputs, options, _ = build(CASES[name], PRECISION[impl])
        tight = run(impl, options)(*inputs)
        loose = run(impl, options, max_q=20, max_k=20)(*inputs)
        torch.testing.assert_close(tight, loose)


def test_mask_only_where_needed(monkeypatch):
    calls = []
    original = _attention_sdpa.scaled_dot_product_attention
    monkeypatch.setattr(
        _attention_sdpa,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(kwargs) or original(*args, **kwargs),
    )
    for name in (
        "dense",
        "dense-causal",
        "packed-causal",
        "fusion",
        "packed",
        "dense-cross-causal",
    ):
        calls.clear()
        inputs, options, _ = build(CASES[name])
        run("sdpa", options)(*inputs)
        assert all((c["attn_mask"] is None) == (name != "packed") for c in calls)
        assert all(c["is_causal"] == ("causal" in name) for c in calls)


@pytest.mark.parametrize(
    ("name", "dropout_p"),
    [("dense", 0.0), ("packed-bias3", 0.0), ("packed-semi", 0.2), ("fusion-lens", 0.0)],
)
def test_compiles(name, dropout_p):
    inputs, options, _ = build(CASES[name], torch.float32)
    bounds = {"max_q": max(CASES[name].q), "max_k": max(CASES[name].k or CASES[name].q)}
    function = run("auto", options, dropout_p=dropout_p, seed=torch.tensor(3), **bounds)
    assert_compiles(function, *(x.requires_grad_() for x in inputs))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_sequences_are_independent(data):
    """Reordering the sequences reorders the outputs; hiding keys is dropping them."""
    lens = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=7))
    k_lens = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    read = data.draw(
        st.lists(st.integers(0, len(k_lens) - 1), min_size=len(lens), max_size=len(lens))
    )
    order = data.draw(st.permutations(range(len(lens))))
    dense = build(Case(tuple(lens), (5,) * len(k_lens), packed="q", read=tuple(read)))[0]
    k, v = dense[1:]
    queries = dense[0].split(lens)
    outs = []
    for rows in (range(len(lens)), order):
        out = attention(
            torch.cat([queries[r] for r in rows]),
            k,
            v,
            cu_q=offsets([lens[r] for r in rows]),
            k_lens=torch.tensor(k_lens),
            kv_index=torch.tensor([read[r] for r in rows]),
        )
        outs.append(dict(zip(rows, out.split([lens[r] for r in rows]), strict=True)))
    dropped = attention(
        dense[0],
        torch.cat([x[:n] for x, n in zip(k, k_lens, strict=True)]),
        torch.cat([x[:n] for x, n in zip(v, k_lens, strict=True)]),
        cu_q=offsets(lens),
        cu_k=offsets(k_lens),
        kv_index=torch.tensor(read),
    ).split(lens)
    for r in range(len(lens)):
        torch.testing.assert_close(outs[0][r], outs[1][r])
        torch.testing.assert_close(outs[0][r], dropped[r])


def test_map_is_what_attention_applies():
    for name in ("dense-lens", "packed-semi", "fusion-lens"):
        (q, k, v), options, problems = build(CASES[name])
        weights = attention_map(q, k, **options)
        values = torch.zeros(len(problems), weights.shape[-1], *v.shape[-2:], dtype=v.dtype)
        for row, (_, _, part, _) in zip(values, problems, strict=True):
            row[: len(part)] = part
        out = torch.einsum("rhmn,rnhe->rmhe", weights, values)
        expected = attention(q, k, v, **options)
        if "cu_q" in options:
            out = torch.cat([row[: len(p[0])] for row, p in zip(out, problems, strict=True)])
        torch.testing.assert_close(out, expected)
        sums = weights.sum(-1)
        assert ((sums - 1).abs().minimum(sums.abs()) < 1e-12).all()


def test_gradcam_is_weight_times_positive_gradient():
    (q, k, v), options, _ = build(CASES["dense-lens"])
    weights = attention_map(q, k, **options).requires_grad_()
    out = torch.einsum("rhmn,rnhe->rmhe", weights, v)
    (grad_weights,) = torch.autograd.grad(out.sin().sum(), weights)
    expected = weights.detach() * grad_weights.relu()
    grad_out = out.detach().cos()
    cam = gradcam(q, k, v, grad_out, reduce_heads=False, **options)
    torch.testing.assert_close(cam, expected)
    torch.testing.assert_close(gradcam(q, k, v, grad_out, **options), expected.mean(1))
    assert (cam >= 0).all()


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, r"q must be.*\(2, 3\)", {"q": torch.zeros(2, 3)}),
        (TypeError, "q must be floating.*int64", {"q": torch.zeros(2, 3, 2, 4, dtype=torch.int64)}),
        (ValueError, r"k must have 2 heads of 4.*\(2, 5, 2, 3\)", {"k": torch.zeros(2, 5, 2, 3)}),
        (
            ValueError,
            r"v must be \(2, 5, 2, 4\), got \(2, 4, 2, 4\)",
            {"v": torch.zeros(2, 4, 2, 4)},
        ),
        (
            TypeError,
            "v must be torch.float32, got torch.float64",
            {"v": torch.zeros(2, 5, 2, 4).double()},
        ),
        (ValueError, "packed q needs cu_q", {"q": torch.zeros(6, 2, 4)}),
        (ValueError, "cu_q goes with packed", {"cu_q": torch.tensor([0, 6])}),
        (ValueError, r"k_lens must be \(2,\), got \(3,\)", {"k_lens": torch.tensor([1, 2, 3])}),
        (TypeError, "k_lens must be int32 or int64", {"k_lens": torch.ones(2)}),
        (ValueError, r"kv_index must be \(2,\), got \(1,\)", {"kv_index": torch.tensor([0])}),
        (ValueError, "kv_index is needed", {"q": torch.zeros(3, 3, 2, 4)}),
        (
            ValueError,
            r"kv_index must be in \[0, 2\), got 0 to 2",
            {"kv_index": torch.tensor([0, 2])},
        ),
        (
            ValueError,
            r"cu_q must ascend from 0 to 6, the tokens of q, got \[0, 4, 3, 6\]",
            {"q": torch.zeros(6, 2, 4), "cu_q": torch.tensor([0, 4, 3, 6])},
        ),
        (
            ValueError,
            r"cu_k must ascend from 0 to 7, the tokens of k, got \[0, 3, 6\]",
            {"k": torch.zeros(7, 2, 4), "v": torch.zeros(7, 2, 4), "cu_k": torch.tensor([0, 3, 6])},
        ),
        (
            ValueError,
            r"q_block must be \(2, 3\)",
            {"q_block": torch.zeros(2, 5, dtype=torch.int64)},
        ),
        (ValueError, "q_block is 'causal'", {"q_block": "prefix"}),
        (ValueError, "k_block needs q_block", {"k_block": torch.zeros(2, 5, dtype=torch.int64)}),
        (ValueError, r"bias must be \(2, 3, 5\) or", {"bias": torch.zeros(3, 5)}),
        (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0, "seed": 1}),
        (ValueError, "needs a seed", {"dropout_p": 0.1}),
        (ValueError, "impl must be", {"impl": "magic"}),
        (NotImplementedError, "counter", {"impl": "sdpa", "dropout_p": 0.1, "seed": 1}),
    ],
)
def test_bad_arguments(error, words, change):
    arguments = {
        "q": torch.zeros(2, 3, 2, 4),
        "k": torch.zeros(2, 5, 2, 4),
        "v": torch.zeros(2, 5, 2, 4),
    }
    with pytest.raises(error, match=words):
        attention(**{**arguments, **change})
