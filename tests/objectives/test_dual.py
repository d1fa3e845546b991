"""The objectives of siglip, align and vse++ as the step computes them, and who may ask for them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.contrast import gathered_hinge as hinge
from vlpfast.objectives.teacher import Teacher

HINGE = ObjectivesConfig(itc=0.0, hinge=1.0)


def a_step(preset: str, objectives: ObjectivesConfig) -> PretrainStep:
    torch.manual_seed(0)
    model = create_model(preset, "tiny", vocab_size=50, image_size=16).double()
    return PretrainStep(model, objectives).double().train()


def similarities(step: PretrainStep, batch) -> torch.Tensor:
    image = step.model.encode_image(batch.images).embedding
    return image @ step.model.encode_text(batch.text).embedding.T


@pytest.mark.parametrize("hardest", [True, False], ids=["vse++", "vse0"])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_hinge_is_the_double_loop(size, hardest):
    """Two captions of one image are no negatives of each other; a pair of equal images with other
    ids ties.
    """
    batch = make_batch(size, masked=False)
    if size > 2:
        batch.images[1] = batch.images[0]
    step = a_step("vse++", replace(HINGE, hinge_margin=0.3, hinge_hardest=hardest))
    loss, count = step(batch, seed=0, step=0).losses["hinge"]
    s, ids = similarities(step, batch).tolist(), batch.image_ids.tolist()
    total = 0.0
    for query in range(size):
        others = [j for j in range(size) if ids[j] != ids[query]]
        for costs in (
            [max(0.0, 0.3 + s[query][j] - s[query][query]) for j in others],
            [max(0.0, 0.3 + s[j][query] - s[query][query]) for j in others],
        ):
            total += (max(costs, default=0.0)) if hardest else sum(costs)
    assert count == 1
    assert loss.item() == pytest.approx(total, rel=1e-9)
    assert size == 1 or total > 0


def test_the_first_steps_may_count_all_negatives():
    batch = make_batch(7, masked=False)
    step = a_step("vse++", replace(HINGE, hinge_sum_steps=3))
    all_negatives = a_step("vse++", replace(HINGE, hinge_hardest=False))
    hardest = a_step("vse++", HINGE)
    for number, peer in ((0, all_negatives), (2, all_negatives), (3, hardest), (4, hardest)):
        loss, expected = (
            s(batch, seed=0, step=number).losses["hinge"][0].item() for s in (step, peer)
        )
        assert loss == expected


def test_of_tied_negatives_one_has_the_gradient():
    image = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.1]], dtype=torch.float64))
    text = image.clone().requires_grad_()
    loss, _ = hinge(image, text, torch.arange(3), margin=0.2, hardest=True, group=None)
    (grad,) = torch.autograd.grad(loss, text)
    near = 0.2 + image[0] @ image[1] - 1  # of query 0; those of 1 and 2 have a negative at cosine 1
    assert loss.item() == pytest.approx(2 * (near.item() + 0.2 + 0.2))
    # An image moves its text and one negative oppositely; text 0 has one of two equal images.
    torch.testing.assert_close(grad.sum(0), image[1] - image[0])


def test_sigmoid_is_siglips_loss():
    batch = make_batch(6, masked=False)
    step = a_step("siglip", ObjectivesConfig(itc=0.0, sigmoid=1.0))
    loss, count = step(batch, seed=0, step=0).losses["sigmoid"]
    same = batch.image_ids[:, None] == batch.image_ids
    logits = step.model.logit_scale * similarities(step, batch) + step.model.logit_bias
    expected = -F.logsigmoid(torch.where(same, logits, -logits)).sum() / 6
    assert count == 1
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_align_smooths_labels():
    batch = replace(make_batch(6, masked=False), image_ids=torch.arange(6))
    step = a_step("align", ObjectivesConfig(label_smoothing=0.1))
    loss, _ = step(batch, seed=0, step=0).losses["itc"]
    logits = similarities(step, batch) / step.model.scale
    targets = torch.arange(6)
    expected = sum(F.cross_entropy(z, targets, label_smoothing=0.1) for z in (logits, logits.T)) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("preset", "objectives"),
    [
        ("vse++", HINGE),
        ("align", ObjectivesConfig(label_smoothing=0.1)),
        ("siglip", ObjectivesConfig(itc=0.0, sigmoid=1.0)),
        ("siglip", ObjectivesConfig()),
        ("clip", ObjectivesConfig(hinge=0.5)),
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(preset, objectives):
    step = a_step(preset, objectives)
    out = step(make_batch(masked=False), seed=0, step=0)
    sum(step.weights[name] * total for name, (total, _) in out.losses.items()).backward()
    step.finish_step()
    assert [name for name, p in step.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("preset", "objectives", "message"),
    [
        (
            "clip",
            ObjectivesConfig(itc=0.0, sigmoid=1.0),
            "objectives.sigmoid needs a learned bias; preset 'clip' has no learned bias; "
            "presets that have: 'siglip'",
        ),
        (
            "vse++",
            ObjectivesConfig(),
            r"objectives.itc needs a learned scale; preset 'vse\+\+' has no learned scale; "
            ".*'clip'",
        ),
        ("siglip", ObjectivesConfig(mlm=1.0), "objectives.mlm needs a fusion tower; .*'albef'"),
        ("clip", HINGE, r"the learned scale of preset 'clip' would.*as preset 'vse\+\+'"),
    ],
)
def test_an_objective_that_the_wiring_cannot_serve(preset, objectives, message):
    with pytest.raises(ValueError, match=message):
        a_step(preset, objectives)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"at least one of itc, sigmoid, hinge, itm, mlm"):
        ObjectivesConfig(itc=0.0)
    with pytest.raises(ValueError, match=r"hinge_margin must be >= 0, got -1"):
        ObjectivesConfig(itc=0.0, hinge=1.0, hinge_margin=-1)
    with pytest.raises(ValueError, match="only itc and mlm learn from a teacher"):
        ObjectivesConfig(itc=0.0, hinge=1.0, momentum=0.9)


def test_a_teacher_follows_batch_statistics():
    model = torch.nn.BatchNorm1d(3)
    teacher = Teacher(model, 0.9)
    model(torch.randn(8, 3) + 5)
    with torch.no_grad():
        model.weight.fill_(2.0)
    teacher.update(model)
    torch.testing.assert_close(teacher.model.running_mean, model.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(teacher.model.weight, torch.full((3,), 1.1))
