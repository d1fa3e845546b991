"""ITCLoss against ALBEF's contrastive steps in fp64, written out here, over a queue that wraps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.integrations.albef import ITCLoss
from vlpfast.testing import with_gradients

D, K = 6, 11
# Batches of one epoch; 3 does not divide 11, and the last batch is short.
SIZES = [3, 3, 3, 3, 3, 3, 2]


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=-1)


def batch(step: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Four features of a step, and ids of which some come again, within and between batches."""
    B = SIZES[step]
    return tuple(unit(B, D, seed=10 * step + i) for i in range(4)), (torch.arange(B) * 5 + step) % 4


class Albef:
    """ALBEF's step and queue in fp64: lists of columns, the newest overwriting the oldest."""

    def __init__(self, image_queue: Tensor, text_queue: Tensor) -> None:
        self.columns = [(image_queue[:, i], text_queue[:, i], -100) for i in range(K)]
        self.pointer = 0

    def step(self, features, temp: Tensor, alpha: float, ids: list[int] | None):
        """Losses of both directions for features (image, text, image_m, text_m)."""
        image, text, image_m, text_m = features
        B = len(image)
        losses = []
        for side, (query, query_m, batch_m) in enumerate(
            [(image, image_m, text_m), (text, text_m, image_m)]
        ):
            keys = torch.stack([*batch_m, *(column[1 - side] for column in self.columns)])
            key_ids = None if ids is None else [*ids, *(column[2] for column in self.columns)]
            rows = []
            for i in range(B):
                log_p = torch.log_softmax(keys @ query[i] / temp, 0)
                with torch.no_grad():
                    soft = torch.softmax(keys @ query_m[i] / temp, 0)
                    same = [j == i if ids is None else key_ids[j] == ids[i] for j in range(B + K)]
                    hard = torch.tensor(same, dtype=torch.float64)
                    target = alpha * soft + (1 - alpha) * hard / hard.sum()
                rows.append(-(target * log_p).sum())
            losses.append(torch.stack(rows).mean())
        return losses

    def enqueue(self, image_m: Tensor, text_m: Tensor, ids: list[int] | None) -> None:
        for i in range(len(image_m)):
            column = (image_m[i], text_m[i], -100 if ids is None else ids[i])
            self.columns[self.pointer] = column
            self.pointer = (self.pointer + 1) % K


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("with_idx", [False, True], ids=["pretrain", "retrieval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_steps(alpha: float, with_idx: bool, dtype: torch.dtype) -> None:
    """Losses, gradients and the queue of seven steps: the queue is filled nearly twice."""
    ours = ITCLoss(D, K, with_idx=with_idx).to(dtype)
    theirs = Albef(ours.image_queue.double().clone(), ours.text_queue.double().clone())
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    )
    temp = torch.tensor(0.07, dtype=torch.float64)
    for step in range(len(SIZES)):
        features, idx = batch(step)
        idx = idx if with_idx else None
        ids = idx.tolist() if with_idx else None

        def peer(image, text, temp, features=features, ids=ids):
            i2t, t2i = theirs.step((image, text, *features[2:]), temp, alpha, ids)
            return (i2t + t2i) / 2, i2t.detach(), t2i.detach()

        def mine(image, text, temp, features=features, idx=idx):
            momentum = (x.to(dtype) for x in features[2:])
            return ours(image, text, *momentum, temp, alpha, idx)[:3]

        expected, grads = with_gradients(peer, (*features[:2], temp))
        found, our_grads = with_gradients(mine, [x.to(dtype) for x in (*features[:2], temp)])
        for one, other in zip((*found, *our_grads), (*expected, *grads), strict=True):
            torch.testing.assert_close(one.double(), other, **tolerance)
        theirs.enqueue(*features[2:], ids)
        assert ours.queue_ptr.tolist() == [theirs.pointer]
        for i, queue in enumerate((ours.image_queue, ours.text_queue)):
            columns = torch.stack([column[i] for column in theirs.columns], dim=1)
            torch.testing.assert_close(queue.double(), columns, **tolerance)
        if with_idx:
            assert ours.idx_queue.tolist() == [[column[2] for column in theirs.columns]]


def test_empty_slots_match_nothing() -> None:
    """Ids of the start (-100) give no positives: with ids all different, idx changes nothing."""
    features, _ = batch(0)
    with_idx = ITCLoss(D, K, with_idx=True).double()
    without = ITCLoss(D, K).double()
    without.load_state_dict({k: v for k, v in with_idx.state_dict().items() if k != "idx_queue"})
    one = with_idx(*features, 0.07, 0.4, torch.arange(3))
    other = without(*features, 0.07, 0.4)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=0)


def test_evaluation_leaves_the_queue() -> None:
    module = ITCLoss(D, K).double().eval()
    before = copy.deepcopy(module.state_dict())
    module(*batch(0)[0], 0.07)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_idx_as_a_column() -> None:
    features, idx = batch(0)
    module = ITCLoss(D, K, with_idx=True).double().eval()
    loss = module(*features, 0.07, 0.4, idx).loss
    assert torch.equal(module(*features, 0.07, 0.4, idx.view(-1, 1)).loss, loss)


def test_hard_negatives_have_other_ids() -> None:
    module = ITCLoss(D, K, with_idx=True, hard_negatives=2).double()
    features = tuple(unit(6, D, seed=i) for i in range(4))
    idx = torch.tensor([4, 4, 1, 2, 4, 1])
    for seed in range(20):
        output = module(*features, 0.07, 0.4, idx, seed=seed)
        for drawn in (output.hard_text, output.hard_image):
            assert drawn.shape == (6, 2)
            assert (idx[drawn] != idx[:, None]).all()
            assert (drawn[:, 0] != drawn[:, 1]).all()
    alone = module(*(x[:2] for x in features), 0.07, 0.4, idx[:2], seed=0)
    assert (alone.hard_text == -1).all()


@pytest.mark.parametrize("with_idx", [False, True], ids=["pretrain", "retrieval"])
def test_state_dict_is_albefs(with_idx: bool) -> None:
    """Its names and layouts under a prefix; loading gives the next step to the bit."""
    model = torch.nn.ModuleDict({"itc": ITCLoss(D, K, with_idx=with_idx).double()})
    for step in range(2):
        features, idx = batch(step)
        model["itc"](*features, 0.07, 0.4, idx if with_idx else None)
    state = copy.deepcopy(model.state_dict())
    shapes = {"image_queue": (D, K), "text_queue": (D, K), "queue_ptr": (1,)}
    shapes |= {"idx_queue": (1, K)} if with_idx else {}
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        f"itc.{name}": shape for name, shape in shapes.items()
    }
    assert state["itc.queue_ptr"].dtype == torch.int64
    assert state["itc.queue_ptr"].tolist() == [6]
    # The second batch is in it, though no third step has run.
    torch.testing.assert_close(state["itc.image_queue"][:, 3:6], batch(1)[0][2].T)

    other = torch.nn.ModuleDict({"itc": ITCLoss(D, K, with_idx=with_idx).double()})
    other["itc"](*features, 0.07, 0.4, idx if with_idx else None)
    other.load_state_dict(state)
    for step in range(2, 5):
        features, idx = batch(step)
        arguments = (*features, 0.07, 0.4, idx if with_idx else None)
        assert torch.equal(other["itc"](*arguments).loss, model["itc"](*arguments).loss)
    assert torch.equal(other["itc"].image_queue, model["itc"].image_queue)


def test_state_dict_errors_have_albefs_names() -> None:
    state = ITCLoss(D, K, with_idx=True).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"idx_queue"'):
        ITCLoss(D, K).load_state_dict(state)
    del state["idx_queue"], state["queue_ptr"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"queue_ptr", "idx_queue"'):
        ITCLoss(D, K, with_idx=True).load_state_dict(state)
    module = ITCLoss(D, K, with_idx=True)
    assert module.load_state_dict(state, strict=False).missing_keys == ["queue_ptr", "idx_queue"]
    assert module.queue_ptr.tolist() == [0]


def test_backward_after_the_next_forward() -> None:
    """Right, or an error from autograd; never a gradient against the overwritten queue."""
    module = ITCLoss(D, K).double()
    features, _ = batch(0)
    later = copy.deepcopy(module)
    image = features[0].clone().requires_grad_()
    module(image, *features[1:], 0.07, 0.4).loss.backward()
    expected, image.grad = image.grad, None
    loss = later(image, *features[1:], 0.07, 0.4).loss
    for step in range(1, 5):
        later(*batch(step)[0], 0.07, 0.4)
    try:
        loss.backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        torch.testing.assert_close(image.grad, expected, rtol=0, atol=0)


def test_bad_input() -> None:
    features, idx = batch(0)
    with pytest.raises(ValueError, match="with_idx=True needs idx"):
        ITCLoss(D, K, with_idx=True).double()(*features, 0.07)
    with pytest.raises(ValueError, match="with_idx=False takes no idx"):
        ITCLoss(D, K).double()(*features, 0.07, 0.4, idx)
    with pytest.raises(ValueError, match="embed_dim and queue_size"):
        ITCLoss(D, 0)
    with pytest.raises(ValueError, match="keys must be"):
        ITCLoss(D + 1, K).double()(*features, 0.07)
    with pytest.raises(ValueError, match="hard_negatives needs a seed"):
        ITCLoss(D, K, hard_negatives=1).double()(*features, 0.07)
    with pytest.raises(ValueError, match="temp must be > 0"):
        ITCLoss(D, K).double()(*features, 0.0)
    assert not hasattr(ITCLoss(D, K), "idx_queue")


def test_caller_may_reuse_its_memory() -> None:
    """What is pushed later is what was passed."""
    module = ITCLoss(D, K).double()
    features, _ = batch(0)
    expected = features[2].T.clone()
    module(*features, 0.07)
    features[2].zero_()
    assert torch.equal(module.image_queue[:, :3], expected)
