"""The attention kernels against the reference in fp64: forward and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from vlpfast.kernels import _attention as shared
from vlpfast.kernels import attention as kernels
from vlpfast.kernels._attention_tiles import Blocks
from vlpfast.ops.reference import attention as reference
from vlpfast.testing import assert_same, routes

ROUTES = routes("triton")
on_routes = pytest.mark.parametrize(("impl", "device"), ROUTES)


@dataclass(frozen=True)
class Case:
    """Lengths of the sequences, who reads whom, and which options are given.

    `gaps` lays rows that belong to no sequence before, between and after the sequences.
    """

    q: tuple[int, ...]
    k: tuple[int, ...] | None = None  # None: self-attention, on views of one qkv tensor
    read: tuple[int, ...] | None = None
    blocks: str | None = None
    bias: int = 0  # its number of dimensions
    dropout_p: float = 0.0
    heads: int = 2
    dim: int = 16
    gaps: bool = False


# Interpreted tiles are 16 x 16: 0, 1, primes, one below, at and above a tile; two and three tiles.
RAGGED = (0, 1, 13, 15, 16, 17, 37)
CASES = {
    "self-one": Case((1,), heads=1),
    "self": Case(RAGGED),
    "self-short": Case((3, 0, 16, 7)),
    "self-gaps": Case((5, 0, 17), gaps=True),
    "self-causal": Case((0, 1, 16, 17, 35), blocks="causal"),
    "self-causal-short": Case((3, 13), blocks="causal"),
    "self-prefix": Case((1, 13, 19), blocks="prefix"),
    "self-semi": Case((1, 13, 19), blocks="semi"),
    "self-bias3": Case((5, 0, 17, 1), bias=3),
    "self-bias4": Case((5, 17, 3), bias=4),
    "self-dropout": Case((5, 17), dropout_p=0.3),
    "self-everything": Case((5, 19, 1), bias=3, blocks="semi", dropout_p=0.2, gaps=True),
    "cross": Case((13, 17, 0, 2), (17, 5, 3, 0)),
    # Nobody reads 0; one 1; three 2, in one tile; four 3, in more than one; an empty one is read.
    "grouped": Case((3, 5, 7, 1, 17, 9, 13, 0, 4), (5, 17, 16, 19, 0), (3, 2, 2, 1, 3, 3, 3, 2, 4)),
    "grouped-one-tile": Case((3, 5, 1, 6), (18, 5), (0, 1, 0, 0)),
    "grouped-large": Case((40, 33), (17,), (0, 0)),
    "grouped-gaps": Case((3, 20, 7), (5, 17, 3), (1, 0, 1), gaps=True),
    "grouped-causal": Case((3, 19, 7), (19, 4), (0, 0, 1), blocks="causal"),
    "grouped-semi": Case((3, 19, 7), (18, 4), (0, 0, 1), blocks="semi"),
    "grouped-bias3": Case((3, 19, 7), (18, 4), (0, 0, 1), bias=3),
    "grouped-everything": Case(
        (3, 19, 7), (18, 4), (0, 0, 1), bias=4, blocks="prefix", dropout_p=0.2, gaps=True
    ),
    "grouped-dropout": Case((3, 19, 7), (18, 4), (0, 0, 1), dropout_p=0.4),
    **{f"dim{E}": Case((3, 17), (18, 4), (0, 0), heads=1, dim=E) for E in (32, 48, 64, 80, 128)},
    "self-dim48": Case((3, 17), dim=48),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Interpreted tiles of 16 rows, two of them a tile of the plan, and few programs for dbias."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(kernels, "blocks_for", lambda *_, **__: Blocks(16, 16, 4, 1))
        monkeypatch.setattr(shared, "TILE", 32)
    monkeypatch.setattr(kernels, "_MANY_PROGRAMS", 16)


def spans_of(lens: tuple[int, ...], gaps: bool) -> tuple[Tensor, int]:
    """(sequences, 2) int32, and the number of rows."""
    gap = 2 if gaps else 0
    lengths = torch.tensor(lens)
    first = (lengths + gap).cumsum(0) - lengths
    return torch.stack([first, lengths], 1).int(), sum(lens) + gap * (len(lens) + 1)


class Problem:
    """Tensors of a case on a device, as the kernels take them."""

    def __init__(self, case: Case, device, dtype=torch.float32):
        self.case = case
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
        k_lens = case.q if case.k is None else case.k
        self.q_spans, rows = spans_of(case.q, case.gaps)
        self.k_spans, keys = spans_of(k_lens, case.gaps)
        H, E = case.heads, case.dim
        if case.k is None:
            self.q, self.k, self.v = draw(rows, 3, H, E).unbind(1)
            self.k_spans = self.q_spans
        else:
            self.q = draw(rows, H, E + 3)[..., :E]
            # k as one of two projections, v by heads: strides of the two differ.
            self.k, self.v = draw(keys, 2, H, E)[:, 1], draw(H, keys, E).transpose(0, 1)
        self.grad = draw(rows, H, E)
        self.kv_index = None if case.read is None else torch.tensor(case.read)
        self.max_q, self.max_k = max(case.q), max(k_lens)
        self.q_block = self.k_block = self.bias = None
        if case.blocks in ("prefix", "semi"):
            self.q_block = self._blocks(self.q_spans, rows)
            self.k_block = self.q_block if case.k is None else self._blocks(self.k_spans, keys)
        if case.bias:
            shape = (len(case.q), H, self.max_q, self.max_k)[4 - case.bias :]
            self.bias = draw(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        self.seed = torch.tensor(-(2**40) - 7)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        if case.k is None:
            self.k_spans = self.q_spans

    def _blocks(self, spans: Tensor, rows: int) -> Tensor:
        """Block ids; of "semi", some queries are below all keys and see nothing."""
        blocks = torch.full((rows,), 99)
        for i, (first, n) in enumerate(spans.tolist()):
            place = torch.arange(n)
            ids = (place - n // 2).clamp(min=0) if self.case.blocks == "prefix" else place // 2 + i
            blocks[first : first + n] = ids
        return blocks

    def options(self) -> tuple:
        case = self.case
        plan = shared.make_plan(self.q_spans, self.k_spans.shape[0], self.kv_index, self.q.shape[0])
        return (
            self.q_spans, self.k_spans, self.kv_index, self.q_block, self.k_block, self.bias,
            self.seed, case.blocks == "causal", case.dropout_p, case.dim**-0.5,
            self.max_q, self.max_k, plan,
        )  # fmt: skip

    def run(self) -> dict[str, Tensor]:
        options = self.options()
        out, lse = kernels.attention_fwd(self.q, self.k, self.v, *options)
        dq, dk, dv, dbias = kernels.attention_bwd(
            self.grad, self.q, self.k, self.v, out, lse, *options, self.bias is not None
        )
        results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        return results if dbias is None else {**results, "dbias": dbias}

    def expected(self) -> dict[str, Tensor]:
        """The reference in fp64 on the rows of all sequences, its results put back in place."""
        case = self.case
        rows, keys = (
            torch.cat([torch.arange(a, a + n) for a, n in spans.tolist()]).to(self.q.device)
            for spans in (self.q_spans, self.k_spans)
        )
        cu_q, cu_k = (
            torch.nn.functional.pad(spans[:, 1].cumsum(0), (1, 0))
            for spans in (self.q_spans, self.k_spans)
        )
        q, k, v = (x.double().detach().requires_grad_() for x in (self.q, self.k, self.v))
        inputs = [q, k, v]
        bias = None
        if self.bias is not None:
            bias = self.bias.double().detach().requires_grad_()
            inputs.append(bias)
        options = {
            "cu_q": cu_q, "cu_k": cu_k, "kv_index": self.kv_index,
            "max_q": self.max_q, "max_k": self.max_k, "q_lens": None, "k_lens": None,
            "q_block": None if self.q_block is None else self.q_block[rows],
            "k_block": None if self.k_block is None else self.k_block[keys],
            "causal": case.blocks == "causal", "bias": bias, "scale": case.dim**-0.5,
        }  # fmt: skip
        part = reference.attention(
            q[rows], k[keys], v[keys], seed=self.seed, dropout_p=case.dropout_p, **options
        )
        out = torch.zeros_like(q).index_put((rows,), part)
        grads = torch.autograd.grad(out, inputs, self.grad.double())
        results = {"out": out.detach(), "lse": self._lse(rows, keys, options)}
        return {**results, **dict(zip(["dq", "dk", "dv", "dbias"], grads, strict=False))}

    def _lse(self, rows: Tensor, keys: Tensor, options: dict) -> Tensor:
        """By the definition: a sequence and a query at a time."""
        lse = torch.full(self.q.shape[:2], -torch.inf, dtype=torch.double, device=self.q.device)
        for r, (first, length) in enumerate(self.q_spans.tolist()):
            s = r if self.kv_index is None else int(self.kv_index[r])
            k_first, k_len = self.k_spans[s].tolist()
            k = self.k[k_first : k_first + k_len].double()
            for m in range(length):
                score = torch.einsum("he,nhe->hn", self.q[first + m].double(), k)
                score = score * options["scale"]
                if self.bias is not None:
                    bias = self.bias if self.bias.dim() == 3 else self.bias[r]
                    score = score + bias[:, m, :k_len].double()
                if options["causal"]:
                    score = score[:, : m + 1]
                if self.q_block is not None:
                    ids = self.k_block[k_first : k_first + k_len]
                    score = score[:, ids <= self.q_block[first + m]]
                lse[first + m] = score.logsumexp(1)
        return lse


def check(problem: Problem, tolerance: float = 2e-5) -> None:
    """fp32 sums of at most a hundred terms, and exp2 exact to 2 ulp."""
    actual, expected = problem.run(), problem.expected()
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.is_contiguous(), name
        torch.testing.assert_close(
            value.double(), expected[name], rtol=tolerance, atol=tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


@on_routes
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(impl, device, name):
    check(Problem(CASES[name], device))


@on_routes
@pytest.mark.parametrize("name", ["self", "grouped", "grouped-everything"])
def test_matches_reference_in_fp16(impl, device, name):
    check(Problem(CASES[name], device, torch.float16), tolerance=1e-2)


@on_routes
def test_groups_are_not_tried_in_one_pass_where_they_are_large(impl, device, monkeypatch):
    block = 16 if device.type == "cpu" else 64
    problem = Problem(Case((2 * block, block + 1), (5, 3), (0, 1)), device)
    # Launching it would raise.
    monkeypatch.setattr(kernels.bwd, "attention_bwd_kernel", None)
    check(problem)
    with pytest.raises(TypeError, match="not subscriptable"):
        Problem(Case((2, 17), (5, 3), (0, 1)), device).run()


@on_routes
def test_rows_that_see_nothing(impl, device):
    """Zero output, -inf, and zero gradients, whatever the gradient of the output."""
    problem = Problem(Case((4, 17), (5, 0), (1, 1), dim=16), device)
    problem.grad.fill_(1e30)
    results = problem.run()
    assert (results.pop("lse") == -torch.inf).all()
    for value in results.values():
        assert (value == 0).all()


@on_routes
@pytest.mark.parametrize("name", ["self-everything", "grouped-everything"])
def test_rows_in_no_sequence_are_not_read(impl, device, name):
    clean, dirty = (Problem(replace(CASES[name], heads=1), device) for _ in range(2))
    for x, spans in ((dirty.q, dirty.q_spans), (dirty.k, dirty.k_spans), (dirty.v, dirty.k_spans)):
        x[shared.coverage(spans, x.shape[0]) == 0] = torch.nan
    dirty.grad[shared.coverage(dirty.q_spans, dirty.q.shape[0]) == 0] = torch.nan
    assert_same(dirty.run(), clean.run())


@on_routes
def test_large_scores(impl, device):
    problem = Problem(Case((5, 17), dim=16), device)
    problem.q.mul_(60)
    check(problem, tolerance=2e-4)


@on_routes
@pytest.mark.parametrize("name", ["self-everything", "grouped-everything"])
def test_repeat_is_bit_equal_and_inputs_stay(impl, device, name):
    problem = Problem(replace(CASES[name], heads=1), device)
    inputs = [x.clone() for x in (problem.q, problem.k, problem.v, problem.bias)]
    assert_same(problem.run(), problem.run())
    assert_same([problem.q, problem.k, problem.v, problem.bias], inputs)


@on_routes
@pytest.mark.parametrize("name", ["grouped", "self-causal"])
def test_a_sequence_alone_has_the_same_output(impl, device, name):
    """Whatever shares its tiles; and nothing but zeros is written elsewhere."""
    problem = Problem(CASES[name], device)
    out = problem.run()["out"]
    for r, (first, length) in enumerate(problem.q_spans.tolist()):
        s = r if problem.kv_index is None else int(problem.kv_index[r])
        alone = Problem(CASES[name], device)
        alone.q_spans, alone.k_spans = problem.q_spans[r : r + 1], problem.k_spans[s : s + 1]
        alone.kv_index = (
            None if problem.kv_index is None else torch.zeros_like(problem.kv_index[:1])
        )
        rows = slice(first, first + length)
        part, _ = kernels.attention_fwd(alone.q, alone.k, alone.v, *alone.options())
        torch.testing.assert_close(part[rows], out[rows])
        assert (part[:first] == 0).all()


@on_routes
@pytest.mark.parametrize("case", [Case(()), Case((), (3,), ()), Case((0, 0), (0, 3), (1, 1))])
def test_empty(impl, device, case):
    spans, rows = spans_of(case.q, True)
    k_spans, keys = spans_of(case.q if case.k is None else case.k, True)
    q = torch.ones(rows, 2, 16, device=device)
    k = torch.ones(keys, 2, 16, device=device)
    index = None if case.read is None else torch.tensor(case.read, device=device, dtype=torch.int64)
    spans, k_spans = spans.to(device), k_spans.to(device)
    plan = shared.make_plan(spans, k_spans.shape[0], index, rows)
    options = (spans, k_spans, index, None, None, None, None, False, 0.0, 1.0, 0, 3, plan)
    out, lse = kernels.attention_fwd(q, k, k, *options)
    grads = kernels.attention_bwd(q, q, k, k, out, lse, *options, False)
    assert (lse == -torch.inf).all()
    assert grads[3] is None
    for x in (out, *grads[:3]):
        assert (x == 0).all()


@on_routes
def test_plan(impl, device, monkeypatch):
    monkeypatch.setattr(shared, "TILE", 4)
    spans = torch.tensor([[7, 3], [0, 2], [3, 4], [2, 0]], dtype=torch.int32, device=device)
    index = torch.tensor([2, 0, 2, 0], device=device)
    plan = shared.make_plan(spans, 3, index, 11)
    assert plan.covered.tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert plan.group_start.tolist() == [0, 2, 2, 9]
    assert plan.rows[:9].tolist() == [0, 1, 7, 8, 9, 3, 4, 5, 6]
    assert plan.seqs[:9].tolist() == [1, 1, 0, 0, 0, 2, 2, 2, 2]
    used = [tile for tile in plan.tiles.tolist() if tile[1] < tile[3]]
    assert used == [[0, 0, 0, 2], [2, 2, 2, 9], [2, 6, 2, 9]]
    assert all(tile[0] == 3 for tile in plan.tiles.tolist()[3:])


@on_routes
def test_wide_heads_are_refused(impl, device):
    problem = Problem(Case((3,), heads=1, dim=144), device)
    with pytest.raises(NotImplementedError, match="up to 128 in Triton, got 144"):
        problem.run()
