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


ALL = {"mra": 1.0, "qa": 1.0}


def all_step(**changes) -> tuple[PretrainStep, Batch]:
    """LXMERT with all its heads, and a batch with attributes, questions and captions."""
    torch.manual_seed(0)
    config = preset_config("lxmert", "tiny", vocab_size=50, answers=4)
    config = replace(config, vision=replace(config.vision, region_attributes=6))
    step = PretrainStep(VLPModel(config), replace(lxmert.ALL, **changes))
    batch = co_batch(6)
    generator = torch.Generator().manual_seed(5)
    attributes = torch.randn(len(batch.regions.boxes), 6, generator=generator).softmax(1)
    answers = torch.tensor([2, -100, 0, 3, 1, -100])
    return step, replace(
        batch,
        regions=replace(batch.regions, attributes=attributes),
        masked_regions=replace(batch.masked_regions, attributes=attributes),
        answer_ids=answers,
    )


@pytest.mark.parametrize("reduction", ["code", "paper"])
def test_attributes_and_answers_by_straight_lines(reduction):
    step, batch = all_step(mrm_reduction=reduction)
    step.eval()
    model, out, mixed = step.model, step(batch, seed=0, step=0), mixed_images(batch, step.seed)
    qa = attribute = torch.zeros(())
    asked, right, regions = 0, 0, 0
    for row in range(len(batch)):
        own, image = torch.tensor([row]), mixed[row : row + 1]
        shown = batch.masked_regions[image]
        tokens = model.encode_text(batch.masked_text.select(own)).tokens
        keys = model.image_keys(model.encode_image(shown).tokens)
        fused = model.fuse_pairs(tokens, keys, torch.zeros(1, dtype=torch.int64))
        logits = model.attribute_logits(fused.image.values)
        confidence, best = shown.attributes[:, 1:].max(1)
        counted = torch.ones_like(shown.hidden) if reduction == "code" else shown.hidden
        losses = confidence * F.cross_entropy(logits, best, reduction="none")
        attribute = attribute + losses[counted].sum()
        regions += (0.15 if reduction == "code" else 1) * int(counted.sum())
        label = int(batch.answer_ids[row])
        if label >= 0 and batch.image_ids[image] == batch.image_ids[own]:
            scores = model.answer_logits(fused.text.values[:1])
            qa = qa - scores.log_softmax(1)[0, label]
            asked, right = asked + 1, right + int(scores.argmax() == label)
    assert 0 < asked < 4
    for name, total, count in (("mra", attribute, regions), ("qa", qa, asked)):
        torch.testing.assert_close(out.losses[name][0], total, rtol=1e-4, atol=1e-4)
        assert float(out.losses[name][1]) == pytest.approx(count)
    assert float(out.metrics["qa_accuracy"]) == pytest.approx(right / asked)


def test_all_heads_get_a_gradient_also_without_questions():
    step, batch = all_step()
    assert not step.has_idle_parameters
    for answers in (batch.answer_ids, torch.full((6,), -100)):
        step.zero_grad()
        out = step.train()(replace(batch, answer_ids=answers), seed=0, step=0)
        assert out.losses.keys() == step.weights.keys() == set(lxmert.ALL.weights)
        sum(total for total, _ in out.losses.values()).backward()
        assert [name for name, p in step.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in step.parameters())
    assert int(out.losses["qa"][1]) == 0
    assert all_step(qa=0.0)[0].has_idle_parameters
    assert all_step(mra=0.0)[0].has_idle_parameters


def test_labels_that_are_missing_are_named():
    step, batch = all_step()
    with pytest.raises(ValueError, match=r"objectives\.qa needs questions .*set data\.tasks"):
        step(replace(batch, answer_ids=None), seed=0, step=0)
    fewer = replace(batch.masked_regions, attributes=batch.masked_regions.attributes[:, :5])
    with pytest.raises(ValueError, match=r"attributes must have .*region_attributes 6 .* got 5"):
        step(replace(batch, masked_regions=fewer), seed=0, step=0)
    bare = replace(batch.masked_regions, attributes=None)
    with pytest.raises(ValueError, match=r"objectives\.mra needs .*attributes\.npy"):
        step(replace(batch, masked_regions=bare), seed=0, step=0)


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
        ("lxmert", {"wra": 1.0}, r"'together' is one row .*'qa'\]; wra needs 'apart'"),
        ("lxmert", {"wra": 1.0, "masking": "apart"}, r"wra needs fused image tokens"),
        ("lxmert", {"mra": 1.0}, r"no attribute head: set model\.vision\.region_attr"),
        ("lxmert", {"qa": 1.0}, r"qa needs an answer head; .*no answer head: set data\.answers"),
        ("lxmert", {"qa_targets": "all"}, r"qa_targets must be 'one' or 'scores', got 'all'"),
        ("lxmert", {"momentum": 0.9}, r"; a teacher \(objectives\.momentum\) needs 'apart'"),
    ],
    ids=str,
)
def test_objectives_that_cannot_be_served_are_named(preset, change, message):
    with pytest.raises(ValueError, match=message):
        co_step(preset, **change)
