"""The drop-in losses over 2 and 4 processes: against one process, and against open_clip's classes.

Each rank holds two linear towers; after backward the gradients are averaged over ranks, as DDP
does. `SETTINGS` names (local_loss, gather_with_grad).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests._peers import open_clip_losses
from tests.dist._run import run_distributed
from vlpfast.integrations.albef import ITCLoss

B = 5
SETTINGS = {"00": (False, False), "01": (False, True), "10": (True, False), "11": (True, True)}
DIST_IMPLS = ["bidir", "shift", "reduce", "gather"]
CLASSES = ["ClipLoss", "CoCaLoss", "DistillClipLoss"]
FP32 = {"rtol": 1e-5, "atol": 1e-5}
OURS = "vlpfast.integrations.open_clip"


def unit(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def make(module: ModuleType, name: str, **options: object) -> torch.nn.Module:
    if name == "CoCaLoss":
        options |= {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5, "pad_id": 3}
    return getattr(module, name)(**options)


def step(name: str, loss: torch.nn.Module, rows: slice, G: int) -> dict:
    """Values of the losses, and gradients of towers, scale and bias, of these rows of the batch."""
    params = {
        "image": unit("image tower", 8, 16).requires_grad_(),
        "text": unit("text tower", 8, 16).requires_grad_(),
        "scale": torch.tensor(10.0, requires_grad=True),
        "bias": torch.tensor(-5.0, requires_grad=True),
    }
    x = torch.sin(torch.arange(G * 8, dtype=torch.float32)).reshape(G, 8)
    image = F.normalize(x[rows] @ params["image"], dim=1)
    text = F.normalize((x + 0.3 * x.cos())[rows] @ params["text"], dim=1)
    scale, bias = params["scale"], params["bias"]
    if name == "CoCaLoss":
        # The captions are not the decoder's here, but their loss has to pass through unchanged.
        logits, labels = unit("logits", G, 3, 7)[rows], (torch.arange(G * 3) % 7).reshape(G, 3)
        losses = loss(image, text, logits, labels[rows], scale)
    elif name == "DistillClipLoss":
        teacher = (unit("image teacher", G, 6)[rows], unit("text teacher", G, 6)[rows])
        losses = loss(image, text, scale, *teacher, torch.tensor(20.0))
    else:
        losses = (loss(image, text, scale, bias),)
    sum(losses).backward()
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in params.items()}
    return {"values": torch.stack([x.detach() for x in losses]), "grads": grads}


def worker(rank: int, world_size: int, counts: tuple[int, ...], names: list[str]) -> dict:
    """Every class under every setting of this module (peer or ours)."""
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    place = {"rank": rank, "world_size": world_size}
    results = {}
    for module_name in names:
        peer = module_name != OURS
        module = open_clip_losses() if peer else importlib.import_module(module_name)
        losses = {
            (name, setting): make(module, name, local_loss=a, gather_with_grad=b, **place)
            for name in CLASSES
            for setting, (a, b) in SETTINGS.items()
        }
        for impl in DIST_IMPLS:
            losses["SigLipLoss", impl] = make(module, "SigLipLoss", dist_impl=impl, **place)
        for (name, setting), loss in losses.items():
            result = step(name, loss, rows, sum(counts))
            for grad in result["grads"].values():
                dist.all_reduce(grad)
                grad /= world_size
            results["peer" if peer else "ours", name, setting] = result
    return results


@pytest.fixture(scope="module", params=[2, 4], ids=["W2", "W4"])
def even(request: pytest.FixtureRequest) -> list[dict]:
    counts = (B,) * request.param
    return run_distributed(worker, request.param, request.param, counts, ["peer", OURS])


@pytest.fixture(scope="module", params=[(3, 7), (4, 1, 6, 2)], ids=["W2", "W4"])
def uneven(request: pytest.FixtureRequest) -> tuple[tuple[int, ...], list[dict]]:
    counts = request.param
    return counts, run_distributed(worker, len(counts), len(counts), counts, [OURS])


def one_process(name: str, G: int) -> dict:
    return step(name, make(importlib.import_module(OURS), name), slice(0, G), G)


ALL = [(name, setting) for name in CLASSES for setting in SETTINGS]
ALL += [("SigLipLoss", impl) for impl in DIST_IMPLS]
IDS = ["-".join(pair) for pair in ALL]


@pytest.mark.dist
@pytest.mark.parametrize(("name", "setting"), ALL, ids=IDS)
def test_ours_equals_one_process(even, name: str, setting: str) -> None:
    """Every setting and class: gradients of towers, scale and bias, and the mean of the values."""
    single = one_process(name, B * len(even))
    for rank in even:
        torch.testing.assert_close(rank["ours", name, setting]["grads"], single["grads"], **FP32)
    # The captioning loss is a mean over a rank's own tokens, as in open_clip.
    compared = 1 if name == "CoCaLoss" else None
    mean = torch.stack([rank["ours", name, setting]["values"] for rank in even]).mean(0)
    torch.testing.assert_close(mean[:compared], single["values"][:compared], **FP32)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "setting"), ALL, ids=IDS)
def test_values_are_open_clips(even, name: str, setting: str) -> None:
    """What a rank reports is what open_clip reports there, under every setting."""
    for rank in even:
        ours, peer = (rank[who, name, setting]["values"] for who in ("ours", "peer"))
        torch.testing.assert_close(ours, peer, **FP32)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "setting"),
    [pair for pair in ALL if pair[1] not in ("00", "10")],
    ids=[i for i in IDS if i[-2:] not in ("00", "10")],
)
def test_gradients_are_open_clips(even, name: str, setting: str) -> None:
    """With gather_with_grad=True, and for SigLIP under every exchange."""
    for rank in even:
        ours, peer = (rank[who, name, setting]["grads"] for who in ("ours", "peer"))
        torch.testing.assert_close(ours, peer, **FP32)


@pytest.mark.dist
@pytest.mark.parametrize("name", CLASSES)
def test_open_clips_defaults_scale_the_towers(even, name: str) -> None:
    """local_loss=False, gather_with_grad=False: 1/W of ours for the towers, the same for scale."""
    W = len(even)
    for rank in even:
        ours, peer = (rank[who, name, "00"]["grads"] for who in ("ours", "peer"))
        for tower in ("image", "text"):
            torch.testing.assert_close(ours[tower], W * peer[tower], **FP32)
        torch.testing.assert_close(ours["scale"], peer["scale"], **FP32)


@pytest.mark.dist
@pytest.mark.parametrize("name", CLASSES)
def test_open_clips_local_loss_without_grad_points_elsewhere(even, name: str) -> None:
    """local_loss=True, gather_with_grad=False: no multiple of the batch's; its scale's is right."""
    for rank in even:
        ours, peer = (rank[who, name, "10"]["grads"] for who in ("ours", "peer"))
        for tower in ("image", "text"):
            cosine = F.cosine_similarity(ours[tower].flatten(), peer[tower].flatten(), dim=0)
            assert cosine < 0.999
        torch.testing.assert_close(ours["scale"], peer["scale"], **FP32)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "setting"), ALL, ids=IDS)
def test_uneven_batches(uneven, name: str, setting: str) -> None:
    """open_clip hangs or fails here; ours is still the gradient of the concatenated batch."""
    counts, ranks = uneven
    single = one_process(name, sum(counts))
    for rank in ranks:
        torch.testing.assert_close(rank["ours", name, setting]["grads"], single["grads"], **FP32)


def misplaced(rank: int) -> list[str]:
    """Messages of losses that are told another place than they have."""
    module = importlib.import_module(OURS)
    messages = []
    for place in ({"rank": 1 - rank, "world_size": 2}, {"rank": rank, "world_size": 3}):
        for name in (*CLASSES, "SigLipLoss"):
            try:
                step(name, make(module, name, **place), slice(0, B), B)
            except ValueError as error:
                messages.append(str(error))
    return messages


@pytest.mark.dist
def test_rank_and_world_size_must_be_the_groups() -> None:
    for messages in run_distributed(misplaced, 2):
        assert len(messages) == 8
        assert all("default process group" in message for message in messages)


def albef_features(G: int, seed: int) -> list[Tensor]:
    return [unit(f"{name} {seed}", G, 6).double() for name in ("i", "t", "im", "tm")]


def albef_worker(rank: int, counts: tuple[int, ...], gather_batch: bool) -> dict:
    """Three steps of a shared queue; the feature gradients of the last, and the queue."""
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    torch.manual_seed(0)
    module = ITCLoss(6, 16, with_idx=True, gather_batch=gather_batch).double()
    temp = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    for seed in range(3):
        features = [x[rows].clone().requires_grad_() for x in albef_features(sum(counts), seed)]
        idx = (torch.arange(sum(counts)) * 3 + seed)[rows] % 5
        temp.grad = None
        output = module(*features, temp, 0.4, idx)
        output.loss.backward()
    dist.all_reduce(temp.grad)
    return {
        "loss": output.loss.detach(),
        "temp": temp.grad / len(counts),
        "features": [x.grad / len(counts) for x in features[:2]],
        # On one rank alone: no communication may hide in it.
        "state": {k: v.contiguous() for k, v in module.state_dict().items()} if rank == 0 else {},
    }


def albef_single(counts: tuple[int, ...], gather_batch: bool) -> dict:
    """The same in one process: rank by rank against the shared queue, or the whole batch."""
    torch.manual_seed(0)
    module = ITCLoss(6, 16, with_idx=True).double()
    G, W = sum(counts), len(counts)
    starts = [0] if gather_batch else [sum(counts[:r]) for r in range(W)]
    sizes = [G] if gather_batch else counts
    temp = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    for seed in range(3):
        features = [x.requires_grad_() for x in albef_features(G, seed)]
        idx = (torch.arange(G) * 3 + seed) % 5
        temp.grad = None
        module.eval()
        losses = [
            module(*(x[s : s + n] for x in features), temp, 0.4, idx[s : s + n]).loss
            for s, n in zip(starts, sizes, strict=True)
        ]
        (sum(losses) / len(losses)).backward()
        module.train()
        module(*(x.detach() for x in features), 0.07, 0.4, idx)
    return {
        "losses": torch.stack(losses).detach(),
        "temp": temp.grad,
        "features": [x.grad for x in features[:2]],
        "state": module.state_dict(),
    }


@pytest.mark.dist
@pytest.mark.parametrize("counts", [(3, 3), (2, 5), (3, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("gather_batch", [False, True])
def test_albef_queue_is_shared(counts: tuple[int, ...], gather_batch: bool) -> None:
    """Ranks fill one queue in their order, it wraps; the mean gradient is that of one process."""
    ranks = run_distributed(albef_worker, len(counts), counts, gather_batch)
    single = albef_single(counts, gather_batch)
    torch.testing.assert_close(ranks[0]["state"], single["state"])
    losses = torch.stack([rank["loss"] for rank in ranks])
    torch.testing.assert_close(losses.mean(), single["losses"].mean())
    if not gather_batch:
        torch.testing.assert_close(losses, single["losses"])
    for i, expected in enumerate(single["features"]):
        found = torch.cat([rank["features"][i] for rank in ranks])
        torch.testing.assert_close(found, expected)
    for rank in ranks:
        torch.testing.assert_close(rank["temp"], single["temp"])
