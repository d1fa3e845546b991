"""What a step calls, computes and keeps; that its numbers are ALBEF's is test_albef_parity.py."""

from dataclasses import replace

import pytest
import torch

from tests._batches import make_batch
from vlpfast.models import create_model
from vlpfast.models.presets import preset_config
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.plan import Plan, Rows

ALBEF = ObjectivesConfig(itc=1.0, itm=1.0, mlm=1.0, momentum=0.9, queue_size=8, alpha=0.4)


def albef_step(
    config: ObjectivesConfig = ALBEF, dtype: torch.dtype = torch.float32
) -> PretrainStep:
    torch.manual_seed(0)
    model = create_model("albef", "tiny", vocab_size=50, image_size=16).to(dtype)
    return PretrainStep(model, config).to(dtype)


def test_plan_merges_passes():
    plan = Plan.of(ALBEF)
    assert plan.fusion == (Rows.MATCHED, Rows.NEGATIVE_IMAGE, Rows.NEGATIVE_TEXT, Rows.MASKED)
    hard_text, hard_image = torch.tensor([1, 0]), torch.tensor([1, 0])
    texts, images = plan.fusion_rows(2, hard_text, hard_image, torch.device("cpu"))
    assert texts.tolist() == [0, 1, 0, 1, 1, 0, 2, 3]
    assert images.tolist() == [0, 1, 1, 0, 0, 1, 0, 1]
    contrast = Plan(("text",), ("image",), embeds=("image", "text"), image_tokens=False)
    assert Plan.of(ObjectivesConfig()) == contrast


def test_each_module_runs_once_a_step():
    step = albef_step(ObjectivesConfig(itc=1.0, itm=1.0, mlm=1.0)).train()
    calls = dict.fromkeys(("vision", "text", "fusion"), 0)
    for name in calls:
        getattr(step.model, name).register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    step(make_batch(), seed=0, step=0)
    assert calls == {"vision": 1, "text": 1, "fusion": 1}


@pytest.mark.parametrize("size", [1, 2])
def test_no_negative_is_no_nan(size):
    """One pair, or two pairs of one image, have no negative: ITM counts the matched rows only."""
    batch = make_batch(size)
    batch.image_ids.zero_()
    step = albef_step().train()
    out = step(batch, seed=0, step=0)
    assert int(out.losses["itm"][1]) == size
    sum(total for total, _ in out.losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in step.model.parameters() if p.grad is not None)


def test_every_parameter_gets_a_gradient():
    step = albef_step().train()
    out = step(make_batch(), seed=0, step=0)
    sum(total for total, _ in out.losses.values()).backward()
    idle = [name for name, p in step.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert all(p.grad is None for p in step.teacher.parameters())


@pytest.mark.parametrize(
    "weights", [{"itc": 1.0}, {"itc": 1.0, "itm": 2.0}, {"itc": 0.0, "mlm": 1.0}], ids=str
)
def test_only_what_is_enabled_is_computed(weights):
    step = albef_step(ObjectivesConfig(**weights)).train()
    calls = []
    step.model.fusion.register_forward_hook(lambda *_: calls.append("fusion"))
    out = step(make_batch(), seed=0, step=0)
    enabled = {name for name, weight in weights.items() if weight}
    assert out.losses.keys() == step.weights.keys() == enabled
    assert bool(calls) == bool(enabled - {"itc"})


def test_evaluation_leaves_no_trace():
    step = albef_step().eval()
    step(make_batch(), seed=0, step=0)
    step.finish_step()
    assert step.queue.filled == 0


def test_queue_wraps_and_reports_what_is_filled():
    step = albef_step().train()
    for number in range(3):
        step(make_batch(5, seed=number), seed=number, step=number)
        step.finish_step()
    assert step.queue.filled == 8
    newest = make_batch(5, seed=2).image_ids
    slots = torch.arange(10, 15) % 8
    torch.testing.assert_close(step.queue.ids[slots], newest)
    other = albef_step()
    other.load_state_dict(step.state_dict())
    assert other.queue.filled == 8
    assert other.queue.pushed == 15


def test_patches_are_dropped_in_training_only_and_by_position():
    torch.manual_seed(0)
    step = PretrainStep(
        create_model("flip", "tiny", vocab_size=50, image_size=32), ObjectivesConfig()
    )
    seen = []
    step.model.vision.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    batch = make_batch(4, image_size=32, masked=False)
    step.train()(batch, seed=1, step=0)
    step.train()(batch, seed=2, step=1)
    step.train()(make_batch(4, image_size=32, seed=1, masked=False), seed=1, step=0)
    step.eval()(batch, seed=1, step=0)
    assert seen[0].shape == (4, 8)
    torch.testing.assert_close(seen[0], seen[1])
    assert (seen[0] != seen[2]).any()
    assert seen[3] is None


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"patch_dropout": 0.5}, 98),
        ({"patch_dropout": 0.5, "keep_multiple": 32}, 95),
        ({"patch_dropout": 0.75, "keep_multiple": 32}, 63),
        ({"patch_dropout": 0.75, "keep_multiple": 16, "class_token": False, "pool": "mean"}, 48),
        ({"patch_dropout": 0.1, "keep_multiple": 512}, 196),
        ({"max_patches": 100, "keep_multiple": 8}, 95),
        ({"keep_multiple": 32}, 196),
    ],
)
def test_kept_tokens_fill_tiles_where_asked(options, kept):
    vision = replace(preset_config("clip", "base").vision, patch_size=16, **options)
    assert vision.num_kept(196) == kept


def test_the_last_steps_may_see_whole_images():
    torch.manual_seed(0)
    config = preset_config("flip", "tiny", vocab_size=50, image_size=32)
    vision = replace(config.vision, patch_dropout_steps=3)
    step = PretrainStep(VLPModel(replace(config, vision=vision)), ObjectivesConfig()).train()
    kept = []
    step.model.vision.register_forward_pre_hook(lambda _, args: kept.append(args[1] is not None))
    batch = make_batch(4, image_size=32, masked=False)
    for number in (0, 2, 3, 4):
        step(batch, seed=1, step=number)
    assert kept == [True, True, False, False]


def test_objectives_that_do_not_fit_say_what_is_missing():
    clip = create_model("clip", "tiny", vocab_size=50, image_size=16)
    with pytest.raises(ValueError, match=r"objectives.itm needs a fusion tower; preset 'clip'"):
        PretrainStep(clip, ObjectivesConfig(itc=1.0, itm=1.0))
    with pytest.raises(ValueError, match="need a teacher"):
        ObjectivesConfig(queue_size=8)
    with pytest.raises(ValueError, match="at least one"):
        ObjectivesConfig(itc=0.0)
