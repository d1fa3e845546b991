"""The stream: permutations, epochs, ranks, windows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlpfast.data.plan import StreamPlan, permute, share


@settings(max_examples=60, deadline=None)
@given(num_items=st.integers(1, 700), seed=st.integers(0, 2**63 - 1), key=st.integers(0, 2**40))
def test_is_a_permutation(num_items, seed, key):
    items = torch.arange(num_items)
    result = permute(num_items, seed, torch.full_like(items, key), items)
    assert result.sort().values.equal(items)


@pytest.mark.parametrize("num_items", [1, 2, 3, 4, 5, 63, 64, 65, 4095, 4096, 4097])
def test_is_a_permutation_at_powers_of_two(num_items):
    items = torch.arange(num_items)
    result = permute(num_items, 1, torch.zeros_like(items), items)
    assert result.sort().values.equal(items)


def test_items_are_uniform():
    """Each item lands on each place equally often over keys: chi-square of 16 x 16 counts."""
    num_items, num_keys = 16, 4000
    keys = torch.arange(num_keys).repeat_interleave(num_items)
    items = torch.arange(num_items).repeat(num_keys)
    result = permute(num_items, 7, keys, items)
    counts = np.zeros((num_items, num_items))
    np.add.at(counts, (items.numpy(), result.numpy()), 1)
    expected = num_keys / num_items
    # 15 x 15 degrees of freedom: mean 225, standard deviation 21.2; 5 standard deviations allowed.
    assert ((counts - expected) ** 2 / expected).sum() < 331


def test_neighbours_are_scattered():
    """The mean distance of neighbours is that of independent draws, N / 3."""
    num_items = 20_000
    items = torch.arange(num_items)
    result = permute(num_items, 3, torch.zeros_like(items), items)
    distance = result.diff().abs().double().mean().item() / num_items
    assert distance == pytest.approx(1 / 3, abs=0.01)


def test_five_billion_samples():
    num_samples = 5_000_000_000
    plan = StreamPlan(num_samples, batch_size=4096, seed=5)
    samples = plan.samples(plan.positions(1_000_000))
    assert samples.min() >= 0
    assert samples.max() < num_samples
    assert len(np.unique(samples)) == 4096
    assert samples.mean() / num_samples == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("window", [0, 1, 7, 16, 101, 500])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_epochs_are_complete_and_disjoint(world, window):
    num_samples, epochs = 101, 3  # a prime, so that no batch divides it
    plans = [StreamPlan(num_samples, 5, 9, rank, world, window) for rank in range(world)]
    drawn = {}
    steps = -(-epochs * num_samples // (5 * world))
    for plan in plans:
        for step in range(steps):
            positions = plan.positions(step)
            drawn |= dict(zip(positions.tolist(), plan.samples(positions).tolist(), strict=True))
    orders = [[drawn[e * num_samples + i] for i in range(num_samples)] for e in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(num_samples))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_global_batch_does_not_depend_on_world_size(world):
    one = StreamPlan(1000, 12, 3)
    many = [StreamPlan(1000, 12 // world, 3, rank, world) for rank in range(world)]
    for step in (0, 1, 83, 84, 1000):
        parts = np.concatenate([plan.positions(step) for plan in many])
        assert sorted(parts) == one.positions(step).tolist()
        assert set(many[0].samples(parts)) == set(one.samples(one.positions(step)))


def test_seeds_differ():
    a, b = (StreamPlan(1000, 500, seed).samples(np.arange(500)) for seed in (0, 1))
    assert (a == b).mean() < 0.02


def test_window_reads_one_stretch_at_a_time():
    plan = StreamPlan(1000, 10, 1, window=100)
    order = plan.samples(np.arange(1000))
    for start in range(0, 1000, 100):
        block = order[start : start + 100]
        assert block.max() - block.min() == 99
        assert (np.diff(block) == 1).mean() < 0.1
    # The blocks differ in their inner order and are not in order themselves.
    assert (np.diff(order[::100] // 100) == 1).mean() < 0.6
    assert len({tuple(order[s : s + 100] % 100) for s in range(0, 1000, 100)}) == 10


@pytest.mark.parametrize("window", [2, 3, 6])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_batches_consist_of_whole_blocks(world, window):
    # Steps 0..9 pass the end of the first epoch.
    plans = [StreamPlan(120, 12, 4, rank, world, window) for rank in range(world)]
    for step in range(10):
        for plan in plans:
            blocks = np.sort(plan.samples(plan.positions(step)).reshape(-1, window))
            assert (blocks == blocks[:, :1] + np.arange(window)).all()
            assert (blocks[:, 0] % window == 0).all()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_share_is_exact(world):
    parts = [share(20, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == list(range(20))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_samples"):
        StreamPlan(0, 1, 0)
    with pytest.raises(ValueError, match="batch_size"):
        StreamPlan(1, 0, 0)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        StreamPlan(1, 1, 0, rank=2, world=2)
    with pytest.raises(ValueError, match="window"):
        StreamPlan(1, 1, 0, window=-1)
