"""Hard negatives over all pairs: what is drawn, and what the step makes of them in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests._batches import make_batch
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep, negatives
from vlpfast.objectives.negatives import _draw, _Pairs, _route

GLOBAL = ObjectivesConfig(itc=1.0, itm=1.0, itm_negatives="hard-global")


def pairs(count: int, *, seed: int = 0) -> _Pairs:
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        torch.nn.functional.normalize(torch.randn(count, 6, generator=generator)) for _ in range(2)
    )
    return _Pairs(image, text, torch.arange(count) // 2, 10 * torch.arange(count) + 3)


def test_drawn_from_the_softmax_over_other_ids():
    """Of 4000 draws for each of three rows, each column's share lies within 5 sigma."""
    every, draws = pairs(8), 4000
    query = 3.0 * every.image[:3]
    own = _Pairs(*(part[:3] for part in every))
    other = every.ids[:3, None] != every.ids
    expected = (query @ every.text.T).masked_fill(~other, -torch.inf).softmax(1)
    found = torch.stack([_draw(query, every.text, own, every, seed) for seed in range(draws)])
    share = torch.nn.functional.one_hot(found, 8).double().mean(0)
    sigma = (expected * (1 - expected) / draws).sqrt()
    assert ((share - expected).abs() <= 5 * sigma + 1e-9).all()
    assert (share[~other] == 0).all()


def test_independent_of_order_split_and_blocks(monkeypatch):
    every = pairs(13)
    query = 5.0 * every.image
    whole = _draw(query, every.text, every, every, 7)
    assert len(set(whole.tolist())) > 3
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    moved = _Pairs(*(part[order] for part in every))
    some = order[:5]
    own = _Pairs(*(part[some] for part in every))
    found = _draw(query[some], moved.text, own, moved, 7)
    assert order[found].tolist() == whole[some].tolist()
    monkeypatch.setattr(negatives, "_COLUMNS", 4)
    assert _draw(query, every.text, every, every, 7).tolist() == whole.tolist()


def test_none_where_all_show_the_same():
    every = pairs(5)._replace(ids=torch.zeros(5, dtype=torch.int64))
    assert _draw(every.image, every.text, every, every, 0).tolist() == [-1] * 5


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_routes_bring_every_rank_what_it_asked_for(ranks):
    size = 4
    generator = torch.Generator().manual_seed(ranks)
    wanted = torch.randint(0, ranks * size, (ranks, size), generator=generator)
    routes = [_route(wanted, rank, torch.device("cpu")) for rank in range(ranks)]
    # By hand: what each rank sends, numbered globally, arrives in the order of the senders.
    sent = [(route.rows + rank * size).split(route.sent) for rank, route in enumerate(routes)]
    for rank, route in enumerate(routes):
        arrived = torch.cat([parts[rank] for parts in sent])
        assert [len(parts[rank]) for parts in sent] == route.received
        assert len(arrived) == size
        assert arrived[route.places].tolist() == wanted[rank].tolist()


@pytest.mark.parametrize("preset", ["albef", "blip", "vlmo"])
def test_draws_of_a_step(preset):
    """All three groups count, and draws depend on the step alone, not on a rank's seed."""
    torch.manual_seed(0)
    options = {"codes": 0} if preset == "vlmo" else {}
    model = create_model(preset, "tiny", vocab_size=50, image_size=16, **options)
    step = PretrainStep(model, replace(GLOBAL, lm=1.0) if preset == "blip" else GLOBAL).train()
    batch = make_batch(5)
    out = step(batch, seed=1, step=2)
    assert int(out.losses["itm"][1]) == 15
    again = step(batch, seed=99, step=2)
    assert again.losses["itm"][0].equal(out.losses["itm"][0])
    other = step(batch, seed=1, step=3)
    assert not other.losses["itm"][0].equal(out.losses["itm"][0])


def test_no_negative_is_no_nan():
    batch = make_batch(2)
    batch.image_ids.zero_()
    torch.manual_seed(0)
    step = PretrainStep(create_model("albef", "tiny", vocab_size=50, image_size=16), GLOBAL).train()
    out = step(batch, seed=0, step=0)
    assert int(out.losses["itm"][1]) == 2
    sum(total for total, _ in out.losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in step.model.parameters() if p.grad is not None)


def test_needs_similarities():
    with pytest.raises(ValueError, match="itc > 0"):
        ObjectivesConfig(itc=0.0, itm=1.0, itm_negatives="hard-global")
