"""UNITER's names against its recurrence in NumPy, fp64, one trimmed pair at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vlpfast import ops
from vlpfast.integrations.uniter import cost_matrix_cosine, ipot, optimal_transport_dist, trace
from vlpfast.testing import assert_compiles, with_gradients

B, M, N, D = 5, 7, 11, 16


def make(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(pads: str = "random") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clustered features; pads at the end, or anywhere."""
    prototypes = make(4, D, seed=0)
    text = prototypes[torch.arange(B * M).reshape(B, M) % 4] + 0.5 * make(B, M, D, seed=1)
    image = prototypes[torch.arange(B * N).reshape(B, N) % 3] + 0.5 * make(B, N, D, seed=2)
    if pads == "random":
        txt_pad, img_pad = make(B, M, seed=3) > 0.8, make(B, N, seed=4) > 0.8
        txt_pad[:, 1] = img_pad[:, 0] = False
    else:
        txt_pad = torch.arange(M) >= torch.tensor([7, 1, 3, 6, 4])[:, None]
        img_pad = torch.arange(N) >= torch.tensor([1, 11, 5, 8, 10])[:, None]
    return text, image, txt_pad, img_pad


def recurrence(cost: np.ndarray, beta: float = 0.5, iteration: int = 50, k: int = 1) -> np.ndarray:
    """Plan of one pair (n, m): the image side first, sigma kept from step to step."""
    n, m = cost.shape
    kernel, plan = np.exp(-cost / beta), np.ones((n, m))
    sigma = np.full(n, 1 / n)
    for _ in range(iteration):
        q = kernel * plan
        for _ in range(k):
            delta = 1 / (m * (sigma @ q))
            sigma = 1 / (n * (q @ delta))
        plan = sigma[:, None] * q * delta
    return plan


def expected(text: Tensor, image: Tensor, txt_pad: Tensor, img_pad: Tensor, **options):
    """Distances, and gradients of sum_b (b + 1) distance_b with each plan held constant."""
    text, image = text.clone().requires_grad_(), image.clone().requires_grad_()
    distances = []
    for b in range(text.shape[0]):
        x, y = text[b][~txt_pad[b]], image[b][~img_pad[b]]
        cosine = (x @ y.T) / (x.norm(dim=1)[:, None] * y.norm(dim=1))
        plan = torch.from_numpy(recurrence((1 - cosine).detach().numpy(), **options))
        distances.append(((1 - cosine) * plan).sum())
    distance = torch.stack(distances)
    weights = 1 + torch.arange(len(distances), dtype=torch.float64)
    return distance.detach(), torch.autograd.grad((distance * weights).sum(), (text, image))


@pytest.mark.parametrize("pads", ["prefix", "random"])
@pytest.mark.parametrize("pad_dtype", [torch.bool, torch.uint8], ids=["bool", "uint8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_distance_and_gradients(pads: str, pad_dtype: torch.dtype, dtype: torch.dtype) -> None:
    text, image, txt_pad, img_pad = problem(pads)
    distance, grads = expected(text, image, txt_pad, img_pad)
    pad = (txt_pad.to(pad_dtype), img_pad.to(pad_dtype))
    (ours,), our_grads = with_gradients(
        lambda x, y: optimal_transport_dist(x, y, *pad),
        (text.to(dtype), image.to(dtype)),
        1 + torch.arange(B, dtype=dtype),
    )
    assert ours.dtype == dtype
    value, grad = (1e-6, 1e-5) if dtype == torch.float32 else (1e-12, 1e-11)
    torch.testing.assert_close(ours.double(), distance, rtol=value, atol=0)
    for one, other in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=grad * other.abs().max())


@pytest.mark.parametrize(
    "options", [{"k": 3}, {"beta": 0.05}, {"beta": 0.1, "iteration": 7, "k": 2}], ids=str
)
def test_options(options: dict) -> None:
    """k > 1 fails in UNITER's own file, and its small beta is silently wrong in fp32."""
    arguments = problem()
    distance, _ = expected(*arguments, **options)
    ours = optimal_transport_dist(*arguments, **options)
    torch.testing.assert_close(ours, distance, rtol=1e-11, atol=0)
    text, image, *pads = arguments
    ours = optimal_transport_dist(text.float(), image.float(), *pads, **options)
    torch.testing.assert_close(ours.double(), distance, rtol=5e-5, atol=0)


def test_bf16_features() -> None:
    text, image, *pads = problem()
    text, image = text.bfloat16(), image.bfloat16()
    distance, _ = expected(text.double(), image.double(), *pads)
    ours = optimal_transport_dist(text, image, *pads)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), distance, rtol=2e-4, atol=0)


def test_padding_and_empty_side() -> None:
    """Padding may hold NaN; a side of padding alone gives distance 0 and no gradient."""
    text, image, txt_pad, img_pad = problem()
    clean = optimal_transport_dist(text, image, txt_pad, img_pad)
    dirty = (text.masked_fill(txt_pad[..., None], torch.nan), image)
    assert torch.equal(optimal_transport_dist(*dirty, txt_pad, img_pad), clean)
    txt_pad[1] = True
    (ours,), grads = with_gradients(
        lambda x, y: optimal_transport_dist(x, y, txt_pad, img_pad), (text, image)
    )
    assert ours[1] == 0
    assert torch.equal(ours[2:], clean[2:])
    assert all((grad[1] == 0).all() and grad.isfinite().all() for grad in grads)


def test_plan_and_the_parts_compose() -> None:
    """UNITER's own composition of its four functions gives the distance."""
    text, image, txt_pad, img_pad = problem()
    joint_pad = txt_pad[:, :, None] | img_pad[:, None, :]
    cost = cost_matrix_cosine(text, image).masked_fill(joint_pad, 0)
    lengths = ((~txt_pad).sum(1).double(), (~img_pad).sum(1).double())
    plan = ipot(cost, lengths[0], txt_pad, lengths[1], img_pad, joint_pad, 0.5, 50, 1)
    assert plan.shape == (B, N, M)
    for b in range(B):
        rows, columns = ~txt_pad[b], ~img_pad[b]
        own = recurrence(cost[b][rows][:, columns].numpy())
        found = plan[b].T[rows][:, columns]
        torch.testing.assert_close(found, torch.from_numpy(own), rtol=1e-10, atol=1e-16)
    assert (plan[joint_pad.mT] == 0).all()
    torch.testing.assert_close(
        trace(cost @ plan),
        optimal_transport_dist(text, image, txt_pad, img_pad),
        rtol=1e-12,
        atol=0,
    )


def test_uniters_loss_is_wra_loss() -> None:
    """Its pre-training adds 0.1 * (sum of matched - sum of unmatched) / B."""
    text, image, txt_pad, img_pad = problem()
    matched = torch.tensor([True, False, False, True, True])
    distance = optimal_transport_dist(text, image, txt_pad, img_pad)
    total = 0.1 * (distance[matched].sum() - distance[~matched].sum()) / B
    loss = ops.wra_loss(text, image, ~txt_pad, ~img_pad, matched)
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)


def test_cost_and_trace() -> None:
    x, y = make(2, 3, 4, seed=1), make(2, 5, 4, seed=2)
    x[0, 0] *= 1e-9
    cost = cost_matrix_cosine(x, y, eps=1e-3)
    for b, i, j in np.ndindex(2, 3, 5):
        norms = max(x[b, i].norm().item(), 1e-3) * max(y[b, j].norm().item(), 1e-3)
        assert cost[b, i, j].item() == pytest.approx(1 - (x[b, i] @ y[b, j]).item() / norms)
    square = make(2, 4, 4, seed=3)
    assert trace(square).tolist() == pytest.approx([m.trace().item() for m in square])
    with torch.autocast("cpu", torch.bfloat16):
        assert cost_matrix_cosine(x.float(), y.float()).dtype == torch.float32
    torch.autograd.gradcheck(cost_matrix_cosine, (x.requires_grad_(), y.requires_grad_()))


def test_compiles() -> None:
    text, image, *pads = problem()
    inputs = (text.float().requires_grad_(), image.float().requires_grad_())
    assert_compiles(optimal_transport_dist, *inputs, *pads, iteration=3)


def test_bad_input() -> None:
    text, image, txt_pad, img_pad = problem()
    with pytest.raises(TypeError, match="txt_pad must be bool or uint8"):
        optimal_transport_dist(text, image, txt_pad.long(), img_pad)
    with pytest.raises(ValueError, match="mask must be"):
        optimal_transport_dist(text, image, txt_pad[:, :3], img_pad)
    with pytest.raises(ValueError, match="beta must be > 0"):
        optimal_transport_dist(text, image, txt_pad, img_pad, beta=0)
    with pytest.raises(ValueError, match="x and y must be"):
        cost_matrix_cosine(text, image[..., 1:])
    with pytest.raises(ValueError, match="eps must be > 0"):
        cost_matrix_cosine(text, image, eps=0)
    with pytest.raises(ValueError, match="x must be"):
        trace(text)
    cost, joint_pad = torch.ones(B, M, N), torch.zeros(B, M, N, dtype=torch.bool)
    lengths = (torch.full((B,), float(M)), torch.full((B,), float(N)))
    with pytest.raises(ValueError, match="y_pad must be"):
        ipot(cost, lengths[0], txt_pad, lengths[1], txt_pad, joint_pad, 0.5, 50, 1)
    with pytest.raises(ValueError, match="iteration must be > 0"):
        ipot(cost, lengths[0], txt_pad, lengths[1], img_pad, joint_pad, 0.5, 0, 1)
