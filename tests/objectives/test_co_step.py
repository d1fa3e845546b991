"""Steps of two-stream presets: masked words, hidden regions and matching from one row of a pair,
LXMERT's losses, and what errors say.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch, make_regions
from vlpfast.data.batch import Batch
from vlpfast.data.masking import mask_regions
from vlpfast.models import VLPModel, preset_config
from vlpfast.objectives import PretrainStep
from vlpfast.objectives.matching import mixed_images
from vlpfast.objectives.plan import Plan, Rows
from vlpfast.objectives.regions import class_loss, feature_loss, weighted_class_loss
from vlpfast.recipes import lxmert, vilbert

OBJECTIVES = {"lxmert": lxmert.OBJECTIVES, "vilbert": vilbert.OBJECTIVES}
PRESETS = pytest.mark.parametrize("preset", OBJECTIVES)
MASKING = pytest.mark.parametrize("masking", ["together", "apart"])


def co_step(preset: str, **changes) -> PretrainStep:
    torch.manual_seed(0)
    config = preset_config(preset, "tiny", vocab_size=50)
    if preset == "vilbert":
        config = replace(config, vision=replace(config.vision, dim=48, heads=3))
    return PretrainStep(VLPModel(config), replace(OBJECTIVES[preset], **changes))


def co_batch(size: int = 5) -> Batch:
    batch, regions = make_batch(size), make_regions(size)
    hidden = mask_regions(regions, probability=0.4, seed=3, positions=batch.positions)
    return replace(batch, regions=regions, masked_regions=hidden)


@MASKING
@PRESETS
def test_every_parameter_gets_a_gradient(preset, masking):
    step = co_step(preset, masking=masking).train()
    out = step(co_batch(), seed=0, step=0)
    assert out.losses.keys() == set(OBJECTIVES[preset].weights)
    sum(total for total, _ in out.losses.values()).backward()
    assert [name for name, p in step.named_parameters() if p.grad is None] == []


@PRESETS
def test_together_is_one_row_a_pair_and_one_call_a_module(preset):
    step, batch = co_step(preset).train(), co_batch()
    rows = {name: [] for name in ("text", "vision", "fusion")}
    for name, seen in rows.items():
        module = getattr(step.model, name)
        module.register_forward_pre_hook(lambda _m, args, s=seen: s.append(len(args[0])))
    step(batch, seed=0, step=0)
    assert rows == {name: [len(batch)] for name in rows}
    assert Plan.of(step.config).fusion == (Rows.TOGETHER,)


@MASKING
@PRESETS
def test_losses_are_those_of_rows_alone(preset, masking):
    step, batch = co_step(preset, masking=masking).eval(), co_batch()
    model, out, together = step.model, step(batch, seed=0, step=0), masking == "together"
    mixed = mixed_images(batch, step.seed)
    assert not mixed.equal(torch.arange(5))
    offset = int(preset == "vilbert")

    def pair(text, regions):
        zero = torch.zeros(1, dtype=torch.int64)
        tokens = model.encode_text(text).tokens
        fused = model.fuse_pairs(tokens, model.image_keys(model.encode_image(regions).tokens), zero)
        return fused, fused.image.values[offset:]

    match, words, states, shown = [], [], [], []
    for row in range(len(batch)):
        own, image = torch.tensor([row]), mixed[row : row + 1]
        clean, masked = batch.text.select(own), batch.masked_text.select(own)
        if together:
            fused, places = pair(masked, batch.masked_regions[image])
            words.append(model.token_logits(fused.text.values))
            shown.append(batch.masked_regions[image])
        else:
            words.append(model.token_logits(pair(masked, batch.regions[own])[0].text.values))
            shown.append(batch.masked_regions[own])
            _, places = pair(clean, shown[-1])
            fused, _ = pair(clean, batch.regions[image])
        match.append(model.match(fused))
        states.append(places)
    states, hidden = torch.cat(states), torch.cat([s.hidden for s in shown])
    labels = torch.cat([s.labels for s in shown])
    matched = (batch.image_ids[mixed] == batch.image_ids).long()
    expected = {
        "itm": (F.cross_entropy(torch.cat(match), matched, reduction="sum"), 5),
        "mlm": (F.cross_entropy(torch.cat(words), batch.mlm_labels, reduction="sum"), 5),
    }
    if preset == "lxmert":
        truth = torch.cat([s.features.values for s in shown])[hidden]
        total = F.smooth_l1_loss(model.region_features(states[hidden]), truth, reduction="sum")
        expected["mrfr"] = total, 64 * hidden.sum()
        confidence, best = labels[:, 1:].max(1)
        # All regions count, hidden or not, over the share that is hidden.
        losses = F.cross_entropy(model.region_logits(states), best, reduction="none")
        expected["mrc"] = (confidence * losses).sum(), 0.15 * len(states)
    else:
        log_p = model.region_logits(states[hidden]).log_softmax(1)
        truth = labels[hidden]
        expected["mrckl"] = (truth * (truth.log() - log_p)).sum(), hidden.sum()
    assert expected.keys() == out.losses.keys()
    for name, (total, count) in expected.items():
        torch.testing.assert_close(out.losses[name][0], total, rtol=1e-4, atol=1e-4, msg=name)
        assert float(out.losses[name][1]) == pytest.approx(float(count)), name


def test_hidden_regions_alone_count_as_the_paper_has_it():
    step, batch = co_step("lxmert", mrm_reduction="paper", masking="apart").eval(), co_batch()
    total, count = step(batch, seed=0, step=0).losses["mrc"]
    hidden = batch.masked_regions.hidden
    assert int(count) == int(hidden.sum()) < len(hidden)
    assert total.isfinite()


def test_classes_without_background():
    """A head of C - 1 classes has the foreground's; a certain class counts in full."""
    labels = torch.tensor([[0.8, 0.05, 0.15], [0.0, 1.0, 0.0]])
    logits = torch.randn(2, 2)
    own = F.cross_entropy(logits, torch.tensor([1, 0]), reduction="none")
    torch.testing.assert_close(class_loss(logits, labels)[0], own.sum())
    total, count = weighted_class_loss(logits, labels, 0.5)
    torch.testing.assert_close(total, 0.15 * own[0] + own[1])
    assert float(count) == 1.0
    with pytest.raises(ValueError, match=r"labels must have 2 classes, or one more.*got 4"):
        class_loss(logits, torch.rand(2, 4))


def test_smooth_l1_is_quadratic_near_zero_and_linear_far():
    predicted, target = torch.tensor([[0.5, -3.0]]), torch.zeros(1, 2)
    total, count = feature_loss(predicted, target, "code", "smooth_l1")
    assert float(total) == pytest.approx(0.5 * 0.25 + 2.5)
    assert int(count) == 2


def test_together_serves_any_of_its_objectives():
    """Masked words alone keep their own image; hidden regions alone the clean text."""
    batch = co_batch()
    off = {"itm": 0.0, "mrfr": 0.0, "mrc": 0.0}
    for change, names in ((off, ("mlm",)), ({"itm": 0.0, "mlm": 0.0}, ("mrfr", "mrc"))):
        one, two = (
            co_step("lxmert", **change, masking=how).eval()(batch, seed=0, step=0).losses
            for how in ("together", "apart")
        )
        assert one.keys() == set(names)
        for name in names:
            torch.testing.assert_close(one[name], two[name])


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("vilbert", {"mrfr": 1.0}, r"mrfr needs a region feature head.*: 'lxmert', 'uniter'"),
        ("lxmert", {"mrckl": 1.0}, r"mrckl needs a background class.*: 'uniter', 'vilbert'"),
        ("lxmert", {"wra": 1.0}, r"'together' is one row .*'mrfr'\]; wra needs 'apart'"),
        ("lxmert", {"wra": 1.0, "masking": "apart"}, r"wra needs fused image tokens"),
        ("lxmert", {"momentum": 0.9}, r"; a teacher \(objectives\.momentum\) needs 'apart'"),
    ],
    ids=str,
)
def test_objectives_that_cannot_be_served_are_named(preset, change, message):
    with pytest.raises(ValueError, match=message):
        co_step(preset, **change)
