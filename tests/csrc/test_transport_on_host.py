"""The CUDA sources of transport, run thread by thread on the host, against the fp64 reference.

What this shows is that indices, masks, reductions and fragments are right. It is not a run on a
GPU: see cuda_on_host.h for what it cannot show.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.csrc.test_build import _cuda_home
from vlpfast.ops.reference import transport as reference
from vlpfast.testing import with_gradients

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.nvcc

_DRIVER = """
using namespace vlpfast;
static TransportProblems problems(const void* x, const void* y, const int64_t* sizes, int type,
                                  const bool* x_mask, const bool* y_mask) {
  TransportProblems p = {};
  p.batch = sizes[0]; p.M = sizes[1]; p.N = sizes[2]; p.D = sizes[3];
  p.x = {x, sizes[4], sizes[5]}; p.y = {y, sizes[6], sizes[7]};
  p.type = static_cast<FeatureType>(type); p.x_mask = x_mask; p.y_mask = y_mask;
  return p;
}
extern "C" int64_t need(int M, int N, bool sinkhorn, bool log) {
  return transport_shared_bytes(M, N, sinkhorn, log);
}
extern "C" void solve(const void* x, const void* y, const int64_t* sizes, int type,
                      const bool* x_mask, const bool* y_mask, const float* cost, const float* a,
                      const float* b, const float* f_init, const double* s, float* distance,
                      float* value, float* plan, float* f, float* g, int64_t* iters, float* stats) {
  TransportProblems p = problems(x, y, sizes, type, x_mask, y_mask);
  p.cost = cost; p.a = a; p.b = b; p.f_init = f_init;
  const TransportSchedule schedule{s[0], int(s[1]), int(s[2]), s[3], s[4], s[5], s[6], s[7],
                                   s[8] != 0, s[9] != 0};
  launch_transport(p, schedule, {distance, value, plan, f, g, iters, stats}, nullptr);
}
extern "C" void backward(const void* x, const void* y, const int64_t* sizes, int type,
                         const bool* x_mask, const bool* y_mask, float* plan, float* stats,
                         bool fresh, const float* grad, const bool* matched, float weight,
                         void* grad_x, void* grad_y) {
  const TransportProblems p = problems(x, y, sizes, type, x_mask, y_mask);
  if (fresh) launch_transport_stats(p, plan, stats, nullptr);
  launch_transport_grad(p, plan, stats, grad, matched, weight, grad_x, grad_y, nullptr);
}
extern "C" void wra(const float* distance, const bool* matched, float* loss, int64_t batch,
                    float weight) {
  launch_wra_loss(distance, matched, loss, batch, weight, nullptr);
}
"""


def _on_host(source: str) -> str:
    """CUDA source as C++ for cuda_on_host.h: launches, shared memory."""
    source = re.sub(r"(\w+)<<<(.*?), stream>>>\(", r"on_host::run(\1, \2, ", source, flags=re.S)
    dynamic = r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];"
    source = re.sub(dynamic, r"\1* \2 = reinterpret_cast<\1*>(on_host::shared_memory);", source)
    return source.replace("__shared__", "static")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("on_host")
    parts = ['#include "cuda_on_host.h"']
    for stem in ("transport", "transport_grad"):
        parts.append(_on_host((ROOT / f"csrc/cuda/{stem}.cu").read_text()))
    (folder / "all.cpp").write_text("\n".join([*parts, _DRIVER]))
    command = [
        os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-o", folder / "all.so",
        folder / "all.cpp", "-std=c++20", "-O1", "-ffp-contract=off", "-DVLPFAST_CUDA_ON_HOST",
        f"-I{ROOT}/csrc/include", f"-I{ROOT}/tests/csrc", "-isystem", _cuda_home() / "include",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(folder / "all.so"))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _sizes(x: Tensor, y: Tensor) -> Tensor:
    return torch.tensor(
        [*x.shape[:2], y.shape[1], x.shape[2], *x.stride()[:2], *y.stride()[:2]], dtype=torch.int64
    )


_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def solve(
    library: ctypes.CDLL, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, *,
    beta: float, iters: int, inner: int = 1, tol: float = -1.0, stats: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """distance, plan, f, g, num_iters."""
    (B, M), N = x.shape[:2], y.shape[1]
    outputs = [torch.full(s, torch.nan) for s in ((B,), (B, M, N), (B, M), (B, N))]
    num_iters = torch.full((B,), -1)
    schedule = torch.tensor([1 / beta, iters, inner, tol, 1, 1, 0, 0, 0, beta < 0.1]).double()
    sizes = _sizes(x, y)
    library.solve(
        _pointer(x), _pointer(y), _pointer(sizes), _TYPES[x.dtype], _pointer(x_mask),
        _pointer(y_mask), None, None, None, None, _pointer(schedule), _pointer(outputs[0]), None,
        *map(_pointer, outputs[1:]), _pointer(num_iters), _pointer(stats),
    )  # fmt: skip
    return (*outputs, num_iters)


def backward(
    library: ctypes.CDLL, u: Tensor | None, x: Tensor, y: Tensor, x_mask: Tensor | None,
    y_mask: Tensor | None, plan: Tensor, stats: Tensor | None = None,
    matched: Tensor | None = None, weight: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    fresh = stats is None
    if fresh:
        stats = torch.full((x.shape[0], 2, x.shape[1] + y.shape[1]), torch.nan)
    grads = [torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (x, y)]
    sizes = _sizes(x, y)
    library.backward(
        _pointer(x), _pointer(y), _pointer(sizes), _TYPES[x.dtype], _pointer(x_mask),
        _pointer(y_mask), _pointer(plan), _pointer(stats), fresh, _pointer(u), _pointer(matched),
        ctypes.c_float(weight), *map(_pointer, grads),
    )  # fmt: skip
    return grads[0], grads[1]


def features(B: int, M: int, N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M + N)
    make = lambda *shape: torch.randn(*shape, generator=generator)
    prototypes = make(4, D)
    x = prototypes[torch.arange(B * M).reshape(B, M) % 4] + 0.5 * make(B, M, D)
    y = prototypes[torch.arange(B * N).reshape(B, N) % 3] + 0.5 * make(B, N, D)
    return x.to(dtype), y.to(dtype)


def masks(B: int, M: int, N: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N)
    found = [torch.rand(B, n, generator=generator) < 0.7 for n in (M, N)]
    found[0][:, -1] = found[1][:, 0] = True
    return found[0], found[1]


def truth(x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, **options: float):
    """distance, plan, f, g of the fp64 reference, and the distance as a function of features."""
    x_mask = torch.ones(x.shape[:2], dtype=torch.bool) if x_mask is None else x_mask
    y_mask = torch.ones(y.shape[:2], dtype=torch.bool) if y_mask is None else y_mask
    cost = reference.cosine_cost(x.double(), y.double(), x_mask, y_mask)
    solution = reference.ipot(cost, x_mask, y_mask, tol=None, in_logs=True, **options)
    distance = lambda x, y: (reference.cosine_cost(x, y, x_mask, y_mask) * solution[0]).sum((1, 2))
    return (cost * solution[0]).sum((1, 2)), *solution[:3], distance


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-2))


# One row and column; a warp's 8 columns, 16-row layouts and their neighbours; each register layout
# (16, 32, 64, 160 rows) with more than one step of 128 columns in the first three; odd widths.
SHAPES = [
    (1, 1, 8),
    (5, 7, 5),
    (16, 129, 32),
    (17, 130, 40),
    (33, 36, 24),
    (64, 137, 16),
    (65, 20, 12),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", [0.5, 0.05], ids=["scaling", "log"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-N{}-D{}".format(*s))
def test_ipot(library, shape, beta, dtype):
    M, N, D = shape
    x, y = features(1, M, N, D, dtype)
    options = {"beta": beta, "iters": 6, "inner": 2 if M == 5 else 1}
    for mask in ((None, None), masks(1, M, N)):
        distance, plan, f, g, num_iters = solve(library, x, y, *mask, **options)
        expected = truth(x, y, *mask, **options)
        assert num_iters.tolist() == [6]
        assert error(distance, expected[0]) < 1e-6
        assert error(plan, expected[1]) < 1e-5
        assert (plan[expected[1] == 0] == 0).all()
        assert error(f, expected[2]) < 3e-6
        assert error(g, expected[3]) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=lambda s: "M{}-N{}-D{}".format(*s))
def test_gradients(library, shape, dtype):
    """After the forward's statistics and after their own kernel, which must agree."""
    M, N, D = shape
    x, y = features(2, M, N, D, dtype)
    mask = masks(2, M, N)
    u = torch.tensor([0.7, -1.3])
    stats = torch.full((2, 2, M + N), torch.nan)
    plan = solve(library, x, y, *mask, beta=0.5, iters=3, stats=stats)[1]
    *_, distance = truth(x, y, *mask, beta=0.5, iters=3, inner=1)
    _, expected = with_gradients(distance, (x.double(), y.double()), u.double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for given in (None, stats):
        for grad, want in zip(
            backward(library, u, x, y, *mask, plan, given), expected, strict=True
        ):
            assert error(grad, want) < bound
            assert (grad[want == 0] == 0).all()
    matched = torch.tensor([True, False])
    signed = backward(library, None, x, y, *mask, plan, stats, matched, 0.5)
    _, expected = with_gradients(
        distance, (x.double(), y.double()), torch.tensor([0.5, -0.5]).double()
    )
    for grad, want in zip(signed, expected, strict=True):
        assert error(grad, want) < bound


def test_the_bits_of_a_problem_are_its_own(library):
    """Alone, among others, padded into another register layout, packed in one sequence."""
    x, y = features(3, 9, 12, 16, torch.float32)
    both = torch.full((3, 70, 16), torch.nan)
    both[:, 3:12], both[:, 40:52] = x, y
    x_mask = (torch.arange(70) >= 3) & (torch.arange(70) < 12)
    y_mask = (torch.arange(70) >= 40) & (torch.arange(70) < 52)
    for beta in (0.5, 0.05):
        whole = solve(library, x, y, None, None, beta=beta, iters=4)
        alone = solve(library, x[1:2], y[1:2], None, None, beta=beta, iters=4)
        packed = solve(
            library, both, both, x_mask.repeat(3, 1), y_mask.repeat(3, 1), beta=beta, iters=4
        )
        for full, one in zip(whole, alone, strict=True):
            assert torch.equal(full[1:2], one)
        assert torch.equal(packed[0], whole[0])
        assert torch.equal(packed[1][:, 3:12, 40:52], whole[1])
        assert torch.equal(packed[2][:, 3:12], whole[2])


def test_empty_sides_tolerance_and_nan(library):
    x, y = features(4, 5, 6, 8, torch.float32)
    x[3, 2, 1] = torch.nan
    x_mask, y_mask = torch.ones(4, 5, dtype=torch.bool), torch.ones(4, 6, dtype=torch.bool)
    x_mask[0], y_mask[1] = False, False
    for beta in (0.5, 0.05):
        distance, plan, f, g, num_iters = solve(
            library, x, y, x_mask, y_mask, beta=beta, iters=40, tol=0.05
        )
        assert num_iters[:2].tolist() == [0, 0]
        cost = reference.cosine_cost(x.double(), y.double(), x_mask, y_mask)
        exact = reference.ipot(
            cost, x_mask, y_mask, beta=beta, iters=40, inner=1, tol=0.05, in_logs=True
        )
        assert num_iters[2] == exact.num_iters[2] < 40
        assert distance.isnan().tolist() == [False, False, False, True]
        for output in (distance, plan, f, g):
            assert (output[:2] == 0).all()
            assert output[2].isfinite().all()
    grads = backward(library, torch.ones(4), x, y, x_mask, y_mask, plan)
    for grad in grads:
        assert (grad[:2] == 0).all()
        assert grad[2].isfinite().all()


def test_unaligned_rows(library):
    """Features that begin anywhere give the bits of aligned ones."""
    for dtype in _TYPES:
        x, y = features(2, 6, 7, 24, dtype)
        shifted = [torch.zeros(t.numel() + 1, dtype=dtype)[1:].view(t.shape) for t in (x, y)]
        for target, source in zip(shifted, (x, y), strict=True):
            target.copy_(source)
        expected = solve(library, x, y, None, None, beta=0.5, iters=2)
        actual = solve(library, *shifted, None, None, beta=0.5, iters=2)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        grads = backward(library, torch.ones(2), *shifted, None, None, expected[1])
        for a, e in zip(
            grads, backward(library, torch.ones(2), x, y, None, None, expected[1]), strict=True
        ):
            assert torch.equal(a, e)


@pytest.mark.parametrize("tau", [None, 0.3])
def test_sinkhorn(library, tau):
    generator = torch.Generator().manual_seed(0)
    B, M, N = 2, 9, 19
    cost = torch.rand(B, M, N, generator=generator)
    a = torch.rand(B, M, generator=generator).softmax(1)
    b = torch.rand(B, N, generator=generator).softmax(1)
    a[1, 2] = b[0, 5] = 0
    outputs = [torch.full(s, torch.nan) for s in ((B,), (B,), (B, M, N), (B, M), (B, N))]
    num_iters = torch.full((B,), -1)
    damp = 1.0 if tau is None else tau / (tau + 0.1)
    schedule = torch.tensor([10.0, 12, 1, -1, damp, 1, tau or 0, 0, 1, 1]).double()
    sizes = torch.tensor([B, M, N, 0, 0, 0, 0, 0])
    library.solve(
        None, None, _pointer(sizes), 0, None, None, _pointer(cost), _pointer(a), _pointer(b), None,
        _pointer(schedule), *map(_pointer, outputs), _pointer(num_iters), None,
    )  # fmt: skip
    problem = {"eps": 0.1, "tau_a": tau, "tau_b": None}
    wide = [t.double() for t in (cost, a, b)]
    solution = reference.sinkhorn(*wide, iters=12, tol=None, **problem)
    value = reference.sinkhorn_value(*wide, solution.f, solution.g, **problem)
    distance = (wide[0] * solution.plan).sum((1, 2))
    for actual, expected in zip(outputs, (distance, value, *solution[:3]), strict=True):
        assert error(actual, expected) < 1e-6
    assert num_iters.tolist() == [12, 12]
    assert (outputs[2][1, 2] == 0).all()


def test_wra_loss(library):
    distance = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    matched = torch.arange(1000) % 3 == 0
    loss = torch.full((), torch.nan)
    library.wra(_pointer(distance), _pointer(matched), _pointer(loss), ctypes.c_int64(1000),
                ctypes.c_float(0.25))  # fmt: skip
    expected = 0.25 * torch.where(matched, distance, -distance).double().sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
