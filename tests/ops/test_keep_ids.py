"""keep_ids: the bits of every implementation, and the promises about what is kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlpfast.ops.keep_ids import _OP, keep_ids
from vlpfast.testing import assert_compiles, assert_same, opcheck, poisoned_allocations, routes

ROUTES = routes("reference", "cpp", "triton", "cuda")
KERNELS = ROUTES[1:]

# (B, P, K): one patch; a prime; below, at and above a power of two (Triton's block) and a warp;
# ViT-B/16 at 224 px with half dropped; nearly none and nearly all kept.
SHAPES = [
    (1, 1, 1),
    (3, 7, 3),
    (2, 31, 5),
    (2, 32, 16),
    (2, 33, 32),
    (3, 127, 64),
    (2, 128, 1),
    (2, 129, 128),
    (5, 196, 98),
    (2, 577, 300),
]


def _mix32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _plain_python(seed: int, sample_id: int, P: int, K: int, valid: list[bool]) -> list[int]:
    """The definition, in Python integers."""
    h = 0
    for word in (seed, seed >> 32, sample_id, sample_id >> 32):
        h = _mix32(h ^ (word & 0xFFFFFFFF))
    bits = math.ceil(math.log2(P))

    def priority(p: int) -> tuple[int, int]:
        key = (_mix32(h ^ _mix32(p)) >> bits << bits) | p
        return (0, key) if valid[p] else (1, p)

    return sorted(sorted(range(P), key=priority)[:K])


@pytest.mark.parametrize(("impl", "device"), ROUTES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-P{}-K{}".format(*s))
@pytest.mark.parametrize("with_valid", [False, True], ids=["all", "valid"])
def test_matches_plain_python(impl, device, shape, with_valid):
    B, P, K = shape
    seed, sample_ids = -(2**62) - 5, torch.tensor([0, -1, 2**40 + 7, 2**63 - 1, 12])[:B]
    valid = torch.ones(B, P, dtype=torch.bool)
    if with_valid:
        valid = torch.rand(B, P, generator=torch.Generator().manual_seed(0)) < 0.5
    out = keep_ids(
        B, P, K, seed=seed, sample_ids=sample_ids.to(device), impl=impl,
        valid=valid.to(device) if with_valid else None,
    )  # fmt: skip
    expected = [
        _plain_python(seed, i, P, K, row)
        for i, row in zip(sample_ids.tolist(), valid.tolist(), strict=True)
    ]
    assert out.ids.tolist() == expected
    inverse = torch.full((B, P), -1).scatter_(1, out.ids.cpu(), torch.arange(K).expand(B, K))
    assert_same(out.inverse.cpu(), inverse)


@pytest.mark.parametrize(("impl", "device"), KERNELS)
@pytest.mark.parametrize("num_valid", [0, 1, 97, 98, 99, 196])
def test_invalid_patches_only_fill_up(impl, device, num_valid):
    B, P, K = 4, 196, 98
    generator = torch.Generator().manual_seed(num_valid)
    order = torch.rand(B, P, generator=generator).argsort(1)
    valid = torch.zeros(B, P, dtype=torch.bool).scatter_(1, order[:, :num_valid], True).to(device)
    out = keep_ids(B, P, K, seed=1, valid=valid, impl=impl)
    kept_valid = valid.gather(1, out.ids).sum(1)
    assert kept_valid.tolist() == [min(K, num_valid)] * B
    # The invalid ones among the kept are the first invalid ones.
    for b in range(B):
        kept_invalid = [p for p in out.ids[b].tolist() if not valid[b, p]]
        assert kept_invalid == (~valid[b]).nonzero()[: K - min(K, num_valid), 0].tolist()


@pytest.mark.parametrize(("impl", "device"), ROUTES)
def test_keeping_all_is_the_identity(impl, device):
    out = keep_ids(3, 49, 49, seed=5, device=device, impl=impl)
    everything = torch.arange(49, device=device).expand(3, 49)
    assert_same(tuple(out), (everything, everything))


@pytest.mark.parametrize(("impl", "device"), KERNELS)
def test_does_not_depend_on_the_batch_split(impl, device):
    sample_ids = torch.arange(2**33, 2**33 + 9, device=device)
    whole = keep_ids(9, 64, 20, seed=3, sample_ids=sample_ids, impl=impl)
    for start, stop in [(0, 1), (1, 5), (5, 9)]:
        part = keep_ids(stop - start, 64, 20, seed=3, sample_ids=sample_ids[start:stop], impl=impl)
        assert_same(tuple(part), (whole.ids[start:stop], whole.inverse[start:stop]))


@pytest.mark.parametrize(("impl", "device"), KERNELS)
def test_ids_beyond_32_bits_and_seeds_differ(impl, device):
    ids = torch.tensor([1, 1 + 2**32, 1 + 2**33], device=device)
    a = keep_ids(3, 196, 98, seed=7, sample_ids=ids, impl=impl).ids
    assert len({tuple(row) for row in a.tolist()}) == 3
    b = keep_ids(3, 196, 98, seed=7 + 2**32, sample_ids=ids, impl=impl).ids
    assert not (a == b).all(1).any()


@pytest.mark.parametrize(("impl", "device"), routes("cpp", "cuda"))
def test_uniform(impl, device):
    B, P, K = 20_000, 49, 24
    kept = (keep_ids(B, P, K, seed=11, device=device, impl=impl).inverse >= 0).double().cpu()
    # Chi-square of the counts, drawn without replacement: P - 1 = 48 degrees of freedom; its
    # 1e-5 tails are 15.6 and 103.
    ratio = K / P
    counts = kept.sum(0)
    chi2 = ((counts - B * ratio) ** 2).sum() / (B * ratio * (1 - ratio)) * (P - 1) / P
    assert 15.6 < chi2 < 103
    # Pairs of patches occur together as often as they should: 5 sigma over all pairs.
    pairs = (kept.T @ kept)[~torch.eye(P, dtype=torch.bool)]
    pair_ratio = K * (K - 1) / (P * (P - 1))
    sigma = math.sqrt(B * pair_ratio * (1 - pair_ratio))
    assert (pairs - B * pair_ratio).abs().max() < 5 * sigma
    # Neighbouring samples overlap as independent ones do.
    overlap = (kept[1:] * kept[:-1]).sum(1).mean()
    assert abs(overlap - K * ratio) < 5 * math.sqrt(K * ratio * (1 - ratio) ** 2 / B)


@pytest.mark.parametrize(("impl", "device"), KERNELS)
def test_seed_may_be_a_tensor(impl, device):
    a = keep_ids(2, 50, 10, seed=-9, device=device, impl=impl)
    b = keep_ids(2, 50, 10, seed=torch.tensor(-9), device=device, impl=impl)
    assert_same(tuple(a), tuple(b))


@pytest.mark.parametrize(("impl", "device"), KERNELS)
def test_strided_and_empty_inputs_and_nothing_mutated(impl, device):
    sample_ids = torch.arange(8, device=device)[::2]
    valid = (torch.arange(4 * 30, device=device).view(30, 4) % 3 > 0).T
    before = valid.clone()
    out = keep_ids(4, 30, 25, seed=0, sample_ids=sample_ids, valid=valid, impl=impl)
    again = keep_ids(4, 30, 25, seed=0, sample_ids=sample_ids.contiguous(), valid=before, impl=impl)
    assert_same(tuple(out), tuple(again))
    assert_same((valid, sample_ids), (before, torch.tensor([0, 2, 4, 6], device=device)))
    empty = keep_ids(0, 30, 25, seed=0, device=device, impl=impl)
    assert empty.ids.shape == (0, 25)
    assert empty.inverse.shape == (0, 30)


@pytest.mark.parametrize(("impl", "device"), routes("cpp", "cuda"))
def test_writes_all_it_returns(impl, device):
    with poisoned_allocations():
        out = keep_ids(3, 65, 64, seed=2, device=device, impl=impl)
    assert 0 <= out.ids.min() <= out.ids.max() < 65
    assert -1 <= out.inverse.min() <= out.inverse.max() < 64


def test_threads_do_not_matter():
    one = keep_ids(700, 196, 98, seed=4, impl="cpp")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = keep_ids(700, 196, 98, seed=4, impl="cpp")
    finally:
        torch.set_num_threads(before)
    assert_same(tuple(three), tuple(one))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_properties(data):
    B = data.draw(st.integers(0, 4))
    P = data.draw(st.integers(1, 300))
    K = data.draw(st.integers(1, P))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    sample_ids = torch.tensor(
        data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=B, max_size=B)),
        dtype=torch.int64,
    )
    valid_ratio = data.draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
    valid = torch.rand(B, P, generator=torch.Generator().manual_seed(P)) < valid_ratio
    out = keep_ids(B, P, K, seed=seed, sample_ids=sample_ids, valid=valid, impl="cpp")
    reference = keep_ids(B, P, K, seed=seed, sample_ids=sample_ids, valid=valid, impl="reference")
    assert_same(tuple(out), tuple(reference))
    assert (out.ids.diff(dim=1) > 0).all()
    assert ((out.inverse >= 0).sum(1) == K).all()
    # Nested: what is kept at K is kept at every larger K.
    more = keep_ids(B, P, P - (P - K) // 2, seed=seed, sample_ids=sample_ids, valid=valid)
    assert (more.inverse.gather(1, out.ids) >= 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_samples": -1}, ValueError, "num_samples must be >= 0, got -1"),
        ({"num_patches": 0}, ValueError, r"num_patches must be in 1\.\.65536, got 0"),
        ({"num_patches": 65537}, ValueError, "num_patches must be in"),
        ({"num_keep": 0}, ValueError, r"num_keep must be in 1\.\.num_patches = 9, got 0"),
        ({"num_keep": 10}, ValueError, "num_keep must be in .* got 10"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, ValueError, "seed must have shape"),
        ({"seed": torch.tensor(0.5)}, TypeError, "seed must be torch.int64, got torch.float32"),
        ({"sample_ids": torch.arange(3)}, ValueError, r"sample_ids must have shape \(2,\)"),
        ({"sample_ids": torch.zeros(2)}, TypeError, "sample_ids must be torch.int64"),
        ({"valid": torch.ones(2, 9)}, TypeError, "valid must be torch.bool"),
        (
            {"valid": torch.ones(2, 8, dtype=torch.bool)},
            ValueError,
            r"valid must have shape \(2, 9\), got \(2, 8\)",
        ),
        ({"sample_ids": torch.arange(2), "device": "meta"}, ValueError, "sample_ids must be on"),
        ({"impl": "fastest"}, ValueError, "impl must be 'auto' or one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"num_samples": 2, "num_patches": 9, "num_keep": 4, "seed": 0} | change
    with pytest.raises(error, match=f"keep_ids: {message}"):
        keep_ids(**arguments)


def test_an_explicit_impl_runs_or_says_why_not():
    with pytest.raises(NotImplementedError, match=r"up to 8192 patches, got 9000|no CUDA GPU"):
        keep_ids(1, 9000, 5, seed=0, impl="triton")
    assert _OP.reason("cpp", torch.device("cuda"), num_patches=5) == (
        "runs on cpu, got cuda tensors"
    )


@pytest.mark.parametrize(("impl", "device"), routes("cpp", "cuda"))
def test_registration(impl, device):
    op = torch.ops.vlpfast.keep_ids.default
    seed, ids = torch.tensor(3, device=device), torch.arange(4, device=device)
    opcheck(op, seed, ids, 17, 5, None)
    opcheck(op, seed, ids, 17, 5, torch.rand(4, 17, device=device) < 0.5)


@pytest.mark.parametrize(("impl", "device"), routes("reference", "cpp", "cuda"))
@pytest.mark.parametrize("seed", [5, torch.tensor(5)], ids=["int", "tensor"])
def test_compiles(impl, device, seed):
    def function(sample_ids, valid, seed):
        return tuple(keep_ids(3, 12, 4, seed=seed, sample_ids=sample_ids, valid=valid, impl=impl))

    ids, valid = torch.arange(3, device=device), torch.rand(3, 12, device=device) < 0.7
    assert_compiles(function, ids, valid, seed)
    assert_compiles(function, ids, None, seed)
