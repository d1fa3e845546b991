"""Answers to questions: whatever a preset's pooling, one image or two, against rows alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch, make_regions
from vlpfast.data.batch import Batch
from vlpfast.models import create_model, list_presets
from vlpfast.models.presets import preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.ragged import Ragged

QA = ObjectivesConfig(itc=0.0, qa=1.0)
FUSED = [name for name in list_presets() if "a fusion tower" in preset_config(name).parts]
ANSWERS = 4


def qa_step(preset: str, objectives: ObjectivesConfig = QA, **model) -> PretrainStep:
    torch.manual_seed(0)
    model = {"answers": ANSWERS, "vocab_size": 50, "image_size": 32} | model
    step = PretrainStep(create_model(preset, "tiny", **model), objectives).eval()
    with torch.no_grad():
        step.model.answer_head.answers.weight.normal_()
    return step


def asked(step: PretrainStep, images: int = 1, size: int = 5) -> Batch:
    """Of the texts the second is no question; the answers of the others have scores."""
    batch = make_batch(size, image_size=step.model.config.image_size)
    more = {}
    if step.model.config.vision.front == "regions":
        vision = step.model.config.vision
        more["regions"] = make_regions(size, dim=vision.region_dim, classes=vision.region_classes)
    if images == 2:
        more["images"] = torch.cat([batch.images, 255 - batch.images.flip(0)])
        more["shown"] = torch.arange(2 * size).unflatten(0, (2, size))
    return replace(
        batch,
        answer_ids=torch.tensor([2, -100, 0, 3, 1]),
        answer_sets=Ragged.from_lists([[2, 0], [], [0], [3, 1, 2], [1]]),
        answer_scores=torch.tensor([1.0, 0.3, 0.6, 0.9, 0.9, 0.3, 0.3]),
        **more,
    )


def logits_alone(step: PretrainStep, batch: Batch) -> torch.Tensor:
    """(B, A): each question with each of its images by itself, what is pooled side by side."""
    model, rows, size = step.model, [], len(batch)
    shown = torch.arange(size)[None] if batch.shown is None else batch.shown
    visual = batch.visual(model.config.vision.front)
    for row in range(size):
        text = model.encode_text(batch.text.select(torch.tensor([row])), num_embedded=0).tokens
        pooled = []
        for image in shown[:, row].tolist():
            tokens = model.encode_image(visual[torch.tensor([image])], num_embedded=0).tokens
            fused = model.fuse_pairs(text, model.image_keys(tokens), torch.tensor([0]))
            pooled.append(model.pool(*model.first_tokens(fused)))
        head = model.answer_head
        hidden = head.norm(F.gelu(head.dense(torch.cat(pooled, 1))))[0]
        rows.append(head.answers(hidden))
    return torch.cat(rows)


@pytest.mark.parametrize("preset", FUSED)
@torch.no_grad()
def test_one_answer_by_rows_alone(preset):
    step = qa_step(preset)
    batch = asked(step)
    out, logits = step(batch, seed=0, step=0), logits_alone(step, batch)
    loss = F.cross_entropy(logits, batch.answer_ids, reduction="sum")
    torch.testing.assert_close(out.losses["qa"][0], loss, rtol=1e-4, atol=1e-4)
    assert int(out.losses["qa"][1]) == 4
    right = (logits.argmax(1) == batch.answer_ids).float().sum() / 4
    torch.testing.assert_close(out.metrics["qa_accuracy"], right)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("preset", ["albef", "beit3", "vilt"])
@torch.no_grad()
def test_scores_by_a_dense_target(preset, images):
    step = qa_step(preset, replace(QA, qa_targets="scores"), answer_images=images)
    batch = asked(step, images)
    out, logits = step(batch, seed=0, step=0), logits_alone(step, batch)
    target = torch.zeros(5, ANSWERS)
    target[batch.answer_sets.row_ids(), batch.answer_sets.values] = batch.answer_scores
    counted = torch.tensor([0, 2, 3, 4])
    # As published: the mean over questions and answers, times the number of answers.
    mean = F.binary_cross_entropy_with_logits(logits[counted], target[counted]) * ANSWERS
    loss, count = out.losses["qa"]
    torch.testing.assert_close(loss / count, mean, rtol=1e-4, atol=1e-5)
    told = target[counted].gather(1, logits[counted].argmax(1, keepdim=True)).mean()
    torch.testing.assert_close(out.metrics["qa_accuracy"], told)


@torch.no_grad()
def test_two_images_in_one_call_of_each_tower():
    """Both are encoded, and read, at once; exchanged, they give other answers."""
    step, calls = qa_step("albef", answer_images=2), []
    for tower in (step.model.vision, step.model.text, step.model.fusion):
        tower.register_forward_hook(lambda *_: calls.append(1))
    batch = asked(step, 2)
    loss = step(batch, seed=0, step=0).losses["qa"][0]
    assert len(calls) == 3
    expected = F.cross_entropy(logits_alone(step, batch), batch.answer_ids, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    first, second = batch.images.chunk(2)
    other = replace(batch, images=torch.cat([second, first]))
    assert (step(other, seed=0, step=0).losses["qa"][0] - loss).abs() > 1e-3


def test_second_images_have_patches_of_their_own():
    step = qa_step("albef", answer_images=2)
    batch = asked(step, 2)
    places = batch.image_positions
    assert len(places) == 10
    assert len(places.unique()) == 10
    assert torch.equal(asked(step).image_positions, batch.positions)


@pytest.mark.parametrize(
    ("preset", "masking"), [("albef", "apart"), ("uniter", "together"), ("vilt", "apart")]
)
@torch.no_grad()
def test_several_questions_read_an_image_that_is_encoded_once(preset, masking):
    step, encoded = qa_step(preset, replace(QA, masking=masking)), []
    batch = asked(step)
    chosen = torch.tensor([2, 0, 2, 2, 0])
    images = torch.tensor([1, 3, 4])
    few = {"images": batch.images[images], "shown": chosen[None]}
    few |= {"regions": batch.regions[images]} if batch.regions is not None else {}
    few = replace(batch, **few)
    step.model.vision.register_forward_hook(lambda _m, args, _o: encoded.append(len(args[0])))
    loss = step(few, seed=0, step=0).losses["qa"][0]
    assert encoded == [3]
    whole = {"images": batch.images[images[chosen]]}
    whole |= {"regions": batch.regions[images[chosen]]} if batch.regions is not None else {}
    expected = step(replace(batch, **whole), seed=0, step=0).losses["qa"][0]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    positions = replace(few, positions=10 + chosen).image_positions
    # None is about the second.
    assert positions[[0, 2]].tolist() == [10, 12]
    both = PretrainStep(step.model, replace(step.config, itm=1.0, itm_negatives="random"))
    with pytest.raises(ValueError, match=r"several texts about one image .* alone, got \['itm', "):
        both(few, seed=0, step=0)


def test_beside_matching_the_matched_rows_serve_both():
    objectives = replace(QA, itc=1.0, itm=1.0)
    step, rows = qa_step("albef", objectives), []
    step.model.fusion.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    batch = asked(step)
    out = step(batch, seed=0, step=0)
    assert rows == [15]
    with torch.no_grad():
        logits = logits_alone(step, batch)
    loss = F.cross_entropy(logits, batch.answer_ids, reduction="sum")
    torch.testing.assert_close(out.losses["qa"][0], loss, rtol=1e-4, atol=1e-4)


def test_a_batch_without_answers_has_a_gradient_of_zero():
    step = qa_step("albef", replace(QA, qa_targets="scores"))
    nobody = {"answer_sets": Ragged.from_lists([[]] * 5), "answer_scores": torch.zeros(0)}
    loss, count = step(replace(asked(step), **nobody), seed=0, step=0).losses["qa"]
    loss.backward()
    assert (int(count), float(loss.detach())) == (0, 0.0)
    assert step.model.answer_head.answers.weight.grad.abs().max() == 0


def test_what_two_images_exclude_is_named():
    with pytest.raises(ValueError, match=r"two images .* objectives\.qa alone.*\['itc', 'qa'\]"):
        qa_step("albef", replace(QA, itc=1.0), answer_images=2)
    with pytest.raises(ValueError, match=r"answer_images must be 1 or 2, got 3"):
        preset_config("albef", answer_images=3)
    with pytest.raises(ValueError, match=r"answers are told from fused text and image"):
        preset_config("clip", answers=3)


def test_data_that_do_not_fit_are_named():
    step = qa_step("albef", replace(QA, qa_targets="scores"))
    with pytest.raises(ValueError, match=r"objectives\.qa needs questions with answers: set data"):
        step(replace(asked(step), answer_sets=None), seed=0, step=0)
    with pytest.raises(ValueError, match=r"answer_images is 1, and .* about 2 of its images each"):
        step(asked(step, 2), seed=0, step=0)
    two = qa_step("albef", answer_images=2)
    with pytest.raises(ValueError, match=r"answer_images is 2, and .* about 1 of its images each"):
        two(asked(two), seed=0, step=0)
