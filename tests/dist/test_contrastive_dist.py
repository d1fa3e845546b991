"""contrastive_loss over 2 and 4 processes against one process on the concatenated batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.dist._run import run_distributed
from vlpfast.ops import _contrastive_dist
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


# Dtype of towers and features, and how candidates travel: the reference, the C++ passes with an
# all-gather, and with a ring.
WAYS = {
    "reference": (torch.float64, None),
    "gather": (torch.float32, 1 << 40),
    "ring": (torch.float32, 0),
}


def features(name: str, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=1).to(dtype)


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


def step(
    case: dict,
    rows: slice,
    G: int,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Loss, statistics and parameter gradients of two linear towers, scale and bias."""
    params = {
        "image": features("image tower", 6, dtype).requires_grad_(),
        "text": features("text tower", 6, dtype).requires_grad_(),
        "scale": torch.tensor(5.0, dtype=dtype, requires_grad=True),
        "bias": torch.tensor(-1.0, dtype=dtype, requires_grad=True),
    }
    samples = torch.sin(torch.arange(G * 6, dtype=torch.float64)).reshape(G, 6).to(dtype)
    image = F.normalize(samples[rows] @ params["image"], dim=1)
    text = F.normalize(samples[rows].cos() @ params["text"], dim=1)
    output = contrastive_loss(
        image, text, params["scale"], params["bias"], hard_negatives=2, seed=7, group=group,
        **make_options(case, rows, G),
    )  # fmt: skip
    output.loss.backward()
    return {
        "grads": {name: param.grad.double() for name, param in params.items()},
        "output": [None if x is None else x.detach() for x in output],
    }


def worker(rank: int, splits: list[tuple[int, ...]]) -> list[dict]:
    group = dist.group.WORLD
    results = []
    for counts in splits:
        rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        steps = {}
        for way, (dtype, gather_bytes) in WAYS.items():
            _contrastive_dist._GATHER_BYTES = gather_bytes
            for name, case in CASES.items():
                steps[name, way] = step(case, rows, sum(counts), group, dtype)
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


def assert_equals_one_process(
    counts: tuple[int, ...], ranks: list[dict], name: str, way: str
) -> None:
    G, W = sum(counts), len(counts)
    single = step(CASES[name], slice(0, G), G, None)
    exact = {"rtol": 1e-11, "atol": 1e-14} if way == "reference" else {"rtol": 1e-5, "atol": 2e-6}
    results = [rank[name, way] for rank in ranks]
    for i, expected in enumerate(single["output"][:3]):
        mean = sum(result["output"][i].double() for result in results) / W
        torch.testing.assert_close(mean, expected, **exact)
    for i, expected in enumerate(single["output"][3:5], start=3):
        if expected is not None:
            lse = torch.cat([result["output"][i].double() for result in results])
            torch.testing.assert_close(lse, expected, **exact)
    for result in results:
        torch.testing.assert_close(result["grads"], single["grads"], **exact)


@pytest.mark.dist
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", [0, 1], ids=["even", "uneven"])
def test_equals_one_process(runs, split: int, name: str, way: str) -> None:
    assert_equals_one_process(*runs[split], name, way)


@pytest.mark.dist
@pytest.mark.parametrize("way", ["gather", "ring"])
@pytest.mark.parametrize("split", [0, 1], ids=["even", "uneven"])
def test_draws_do_not_depend_on_the_way(runs, split: int, way: str) -> None:
    for rank in runs[split][1]:
        for name in CASES:
            expected = rank[name, "reference"]["output"][5:]
            assert all(map(torch.equal, rank[name, way]["output"][5:], expected))


@pytest.mark.dist
def test_negatives_are_local_rows(runs) -> None:
    counts, ranks = runs[1]
    for rank, count in enumerate(counts):
        rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        ids = make_options(CASES["albef"], rows, sum(counts))["ids"]
        for drawn in ranks[rank]["albef", "ring"]["output"][5:]:
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


def mismatched_worker(rank: int, impl: str) -> str:
    features = torch.ones(2, 4 + rank)
    try:
        contrastive_loss(features, features, 8.0, group=dist.group.WORLD, impl=impl)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.dist
@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_ranks_differ_in_dimension(impl: str) -> None:
    message = "image must have one D on every rank, got shapes [(2, 4), (2, 5)]"
    assert run_distributed(mismatched_worker, 2, impl) == [message] * 2


def failing_worker(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("rank 1 fails")


@pytest.mark.dist
def test_failure_reaches_the_caller() -> None:
    with pytest.raises(Exception, match="rank 1 fails"):
        run_distributed(failing_worker, 2)
