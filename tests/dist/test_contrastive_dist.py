"""contrastive_loss over 2 and 4 processes against one process on the concatenated batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.dist._run import run_distributed
from vlpfast.ops._collectives import gather_counts, gather_rows
from vlpfast.ops.contrastive import contrastive_loss

# Splits of the batch over the ranks. Unequal ones too; the last of 4 ranks has no row at all.
SPLITS = {2: [(4, 4), (3, 5)], 4: [(3, 3, 3, 3), (4, 1, 6, 0)]}
CASES = {
    "softmax": {},
    "sigmoid": {"kind": "sigmoid"},
    "ids": {"ids": True, "label_smoothing": 0.1},
    "sigmoid-ids-queue": {"kind": "sigmoid", "ids": True, "queue": True},
    "albef": {"ids": True, "queue": True, "teacher": True, "alpha": 0.4},
}


def features(name: str, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return F.normalize(torch.randn(rows, 4, generator=generator, dtype=torch.float64), dim=1)


def make_options(case: dict, rows: slice, G: int) -> dict:
    """The case's options for the rows of one rank."""
    ids = torch.arange(G) % max(2, G // 2)
    options = {key: case[key] for key in ("kind", "label_smoothing", "alpha") if key in case}
    if case.get("ids"):
        options["ids"] = ids[rows]
    if case.get("queue"):
        options["image_keys"], options["text_keys"] = features("image_q", 3), features("text_q", 3)
        options["key_ids"] = torch.tensor([-100, 1, 0])
    if case.get("teacher"):
        options["teacher"] = (features("image_m", G)[rows], features("text_m", G)[rows])
    return options


def step(case: dict, rows: slice, G: int, group: dist.ProcessGroup | None) -> dict:
    """Loss, statistics and parameter gradients of two linear towers, scale and bias."""
    params = {
        "image": features("image tower", 6).requires_grad_(),
        "text": features("text tower", 6).requires_grad_(),
        "scale": torch.tensor(5.0, dtype=torch.float64, requires_grad=True),
        "bias": torch.tensor(-1.0, dtype=torch.float64, requires_grad=True),
    }
    samples = torch.sin(torch.arange(G * 6, dtype=torch.float64)).reshape(G, 6)
    image = F.normalize(samples[rows] @ params["image"], dim=1)
    text = F.normalize(samples[rows].cos() @ params["text"], dim=1)
    output = contrastive_loss(
        image, text, params["scale"], params["bias"], hard_negatives=2, seed=7, group=group,
        **make_options(case, rows, G),
    )  # fmt: skip
    output.loss.backward()
    return {
        "grads": {name: param.grad for name, param in params.items()},
        "output": [None if x is None else x.detach() for x in output],
    }


def worker(rank: int, splits: list[tuple[int, ...]]) -> list[dict]:
    group = dist.group.WORLD
    results = []
    for counts in splits:
        rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        steps = {name: step(case, rows, sum(counts), group) for name, case in CASES.items()}
        for result in steps.values():
            # What DDP does: the mean over ranks.
            for grad in result["grads"].values():
                dist.all_reduce(grad)
                grad /= len(counts)
        results.append(steps | {"gather": gather(rank, group)})
    return results


def gather(rank: int, group: dist.ProcessGroup) -> tuple[list[int], Tensor, Tensor]:
    """Rank r gathers r + 1 rows of value r and uses all rows with weight 10 + r."""
    rows = torch.full((rank + 1, 2), float(rank), requires_grad=True)
    counts = gather_counts(rank + 1, group, rows.device)
    gathered = gather_rows(rows, counts, group)
    (gathered * (10 + rank)).sum().backward()
    return counts, gathered.detach(), rows.grad


@pytest.fixture(scope="module", params=[2, 4], ids=["W2", "W4"])
def runs(request: pytest.FixtureRequest) -> list[tuple[tuple[int, ...], list[dict]]]:
    """For each split: the rows of each rank, and each rank's results."""
    splits = SPLITS[request.param]
    ranks = run_distributed(worker, request.param, splits)
    return list(zip(splits, zip(*ranks, strict=True), strict=True))


def assert_equals_one_process(counts: tuple[int, ...], ranks: list[dict], name: str) -> None:
    G, W = sum(counts), len(counts)
    single = step(CASES[name], slice(0, G), G, None)
    for i, expected in enumerate(single["output"][:3]):
        mean = sum(rank[name]["output"][i] for rank in ranks) / W
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-14)
    for i, expected in enumerate(single["output"][3:5], start=3):
        if expected is not None:
            lse = torch.cat([rank[name]["output"][i] for rank in ranks])
            torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-14)
    for rank in ranks:
        torch.testing.assert_close(rank[name]["grads"], single["grads"], rtol=1e-11, atol=1e-14)


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", [0, 1], ids=["even", "uneven"])
def test_equals_one_process(runs, split: int, name: str) -> None:
    assert_equals_one_process(*runs[split], name)


@pytest.mark.dist
def test_negatives_are_local_rows(runs) -> None:
    counts, ranks = runs[1]
    for rank, count in enumerate(counts):
        rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        ids = make_options(CASES["albef"], rows, sum(counts))["ids"]
        for drawn in ranks[rank]["albef"]["output"][5:]:
            assert drawn.shape == (count, 2)
            for i, row in enumerate(drawn.tolist()):
                valid = {j for j in range(count) if ids[j] != ids[i]}
                found = [j for j in row if j != -1]
                assert len(set(found)) == len(found) == min(2, len(valid))
                assert set(found) <= valid


@pytest.mark.dist
def test_gather_rows(runs) -> None:
    _, ranks = runs[0]
    W = len(ranks)
    for rank, result in enumerate(ranks):
        counts, gathered, grad = result["gather"]
        assert counts == list(range(1, W + 1))
        assert gathered[:, 1].tolist() == [float(r) for r in range(W) for _ in range(r + 1)]
        assert torch.equal(grad, torch.full((rank + 1, 2), float(sum(range(10, 10 + W)))))


def failing_worker(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("rank 1 fails")


@pytest.mark.dist
def test_failure_reaches_the_caller() -> None:
    with pytest.raises(Exception, match="rank 1 fails"):
        run_distributed(failing_worker, 2)
