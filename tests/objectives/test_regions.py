"""UNITER's steps: hidden regions, their losses as paper and as code, and what regions must have."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch, make_regions
from vlpfast.data.batch import Batch
from vlpfast.data.masking import mask_regions
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.regions import class_divergence, class_loss, feature_loss
from vlpfast.regions import Regions

UNITER = ObjectivesConfig(
    itc=0.0, itm=1.0, mlm=1.0, wra=0.1, mrfr=1.0, mrc=1.0, mrckl=1.0, itm_negatives="random"
)


def uniter_step(config: ObjectivesConfig = UNITER) -> PretrainStep:
    torch.manual_seed(0)
    return PretrainStep(create_model("uniter", "tiny", vocab_size=50, image_size=16), config)


def uniter_batch(size: int = 5, seed: int = 0) -> Batch:
    batch, regions = make_batch(size, seed=seed), make_regions(size, seed=seed)
    hidden = mask_regions(regions, seed=3, positions=batch.positions)
    return replace(batch, regions=regions, masked_regions=hidden)


def test_base_has_the_published_size():
    with torch.device("meta"):
        model = VLPModel(preset_config("uniter", "base"))
    heads = (model.match_head, model.token_head, model.region_heads)
    count = sum(p.numel() for p in model.parameters())
    count -= sum(p.numel() for head in heads for p in head.parameters())
    assert count / 1e6 == pytest.approx(109.90, abs=0.01)


def test_every_parameter_gets_a_gradient_and_the_regressor_is_the_front_end():
    step = uniter_step().train()
    out = step(uniter_batch(), seed=0, step=0)
    assert out.losses.keys() == set(UNITER.weights)
    sum(total for total, _ in out.losses.values()).backward()
    assert [name for name, p in step.named_parameters() if p.grad is None] == []
    weight = step.model.vision.embedding.feature.weight
    hidden = torch.randn(3, step.model.config.fusion.dim)
    before = step.model.region_features(hidden)
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(step.model.region_features(hidden), 2 * before)


def test_losses_are_those_of_images_alone():
    """Conditional masking: hidden regions go with the whole text, masked words with all regions."""
    step, batch = uniter_step().eval(), uniter_batch()
    model, out = step.model, step(batch, seed=0, step=0)
    features, logits, words = [], [], []
    for row in range(len(batch)):
        one, zero = torch.tensor([row]), torch.zeros(1, dtype=torch.int64)
        text = model.encode_text(batch.text.select(one)).tokens
        regions = batch.masked_regions[one]
        fused = model.fuse_pairs(text, model.image_keys(model.encode_image(regions).tokens), zero)
        tokens = fused.image.values[regions.hidden]
        features.append(model.region_features(tokens))
        logits.append(model.region_logits(tokens))
        masked = model.encode_text(batch.masked_text.select(one)).tokens
        clean = model.encode_image(batch.regions[one]).tokens
        words.append(model.token_logits(model.fuse(masked, model.image_keys(clean), zero).values))
    hidden = batch.masked_regions.hidden
    truth = batch.regions.features.values[hidden], batch.regions.labels[hidden]
    features, logits = torch.cat(features), torch.cat(logits)
    expected = {
        "mrfr": feature_loss(features, truth[0], "code"),
        "mrc": class_loss(logits, truth[1]),
        "mrckl": class_divergence(logits, truth[1], "code"),
        "mlm": (F.cross_entropy(torch.cat(words), batch.mlm_labels, reduction="sum"), 5),
    }
    for name, (total, count) in expected.items():
        torch.testing.assert_close(out.losses[name][0], total, rtol=1e-4, atol=1e-4, msg=name)
        assert int(out.losses[name][1]) == int(count)


def test_reductions_differ_by_the_number_of_dimensions_alone():
    predicted, target = torch.randn(3, 7), torch.randn(3, 7)
    labels = torch.randn(3, 7).softmax(1)
    for loss, other in ((feature_loss, target), (class_divergence, labels)):
        (paper, regions), (code, elements) = (
            loss(predicted, other, how) for how in ("paper", "code")
        )
        torch.testing.assert_close(paper, code)
        assert (int(regions), int(elements)) == (3, 21)
    expected = sum((predicted[r] - target[r]).square().sum() for r in range(3))
    torch.testing.assert_close(feature_loss(predicted, target, "paper")[0], expected)
    log_p = predicted.log_softmax(1)
    divergence = (labels * (labels.log() - log_p)).sum()
    torch.testing.assert_close(class_divergence(predicted, labels, "paper")[0], divergence)


def test_background_is_never_the_class():
    labels = torch.tensor([[0.8, 0.05, 0.15], [0.1, 0.7, 0.2]])
    logits = torch.randn(2, 3)
    expected = F.cross_entropy(logits, torch.tensor([2, 1]), reduction="sum")
    torch.testing.assert_close(class_loss(logits, labels)[0], expected)


def test_the_model_does_not_see_what_is_hidden():
    model, regions = uniter_step().eval().model, make_regions(2)
    count = regions.features.values.shape[0]
    hidden = torch.arange(count) == 1
    other = regions.features.values.clone()
    other[1] += 1
    changed = replace(regions, features=regions.features.with_values(other))
    one, two = (model.encode_image(r.hide(hidden)).tokens.values for r in (regions, changed))
    assert one.equal(two)
    seen = model.encode_image(changed).tokens.values
    assert (seen[1] - one[1]).abs().max() > 1e-3
    assert seen[2:].equal(one[2:])
    # Its box it sees.
    boxes = regions.boxes.clone()
    boxes[1] = torch.tensor([0.0, 0.0, 0.1, 0.9])
    moved = model.encode_image(replace(changed, boxes=boxes).hide(hidden)).tokens.values
    assert (moved[1] - one[1]).abs().max() > 1e-3


def test_some_regions_are_hidden_of_each_image_and_by_position():
    regions = make_regions(300)
    positions = torch.arange(300)
    hidden = mask_regions(regions, seed=1, positions=positions).hidden
    of_image = torch.zeros(300).index_add(0, regions.features.row_ids(), hidden.float())
    assert (of_image >= 1).all()
    rows = torch.tensor([7, 3])
    alone = mask_regions(regions[rows], seed=1, positions=positions[rows]).hidden
    assert alone.equal(regions.hide(hidden)[rows].hidden)
    assert not hidden.equal(mask_regions(regions, seed=2, positions=positions).hidden)
    assert mask_regions(regions, probability=1.0, seed=1, positions=positions).hidden.all()


def test_regions_that_do_not_fit_say_what_is_missing():
    step, batch = uniter_step(), uniter_batch()
    bare = replace(batch.regions, boxes=None)
    with pytest.raises(ValueError, match="regions have no boxes"):
        step.model.encode_image(bare)
    with pytest.raises(ValueError, match=r"set data\.regions"):
        step(replace(batch, regions=None), seed=0, step=0)
    regions, masked = (replace(r, labels=None) for r in (batch.regions, batch.masked_regions))
    unlabelled = replace(batch, regions=regions, masked_regions=masked)
    with pytest.raises(ValueError, match="class distributions, and the regions have no labels"):
        step(unlabelled, seed=0, step=0)
    with pytest.raises(ValueError, match=r"regions\.features must be \(T, 64\), got \(\d+, 9\)"):
        step.model.encode_image(make_regions(2, dim=9))
    with pytest.raises(TypeError, match="preset 'uniter' reads regions, got Tensor"):
        step.model.encode_image(batch.images)
    with pytest.raises(TypeError, match="preset 'vilt' reads pixels, got Regions"):
        create_model("vilt", vocab_size=50).encode_image(batch.regions)
    with pytest.raises(ValueError, match=r"regions\.boxes must be \(\d+, 4\), got \(1, 4\)"):
        Regions(batch.regions.features, torch.zeros(1, 4))


def test_feature_regression_needs_no_labels():
    config = replace(UNITER, mrc=0.0, mrckl=0.0)
    batch = uniter_batch()
    batch = replace(
        batch,
        regions=replace(batch.regions, labels=None),
        masked_regions=replace(batch.masked_regions, labels=None),
    )
    out = uniter_step(config)(batch, seed=0, step=0)
    assert out.losses["mrfr"][0].isfinite()
