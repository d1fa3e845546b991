"""Similarity to encoded targets: losses by straight-line code, temperatures per task, what runs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch
from vlpfast.data.batch import Batch
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.ragged import Ragged

ALL = ObjectivesConfig(itc=1.0, mlm=1.0, lm=1.0, classify=1.0)
NAMES = [[1, 5, 2], [1, 6, 7, 2], [1, 8, 2], [1, 9, 5, 6, 2]]


def step_of(config: ObjectivesConfig = ALL, preset: str = "uni-perceiver") -> PretrainStep:
    torch.manual_seed(0)
    model = preset_config(preset, "tiny", vocab_size=50, image_size=16)
    shape = {"dim": 32, "heads": 2}
    model = replace(
        model,
        vision=replace(model.vision, **shape),
        text=replace(model.text, **shape),
        fusion=replace(model.fusion, **shape, depth=2),
        embed_dim=16,
    )
    step = PretrainStep(VLPModel(model), config)
    with torch.no_grad():
        for number, scale in enumerate(step.model.task_scale.values()):
            scale.add_(0.3 * (number + 1))
    return step


def batch_with_classes() -> Batch:
    batch = make_batch()
    names = Ragged.from_lists(NAMES)
    return replace(batch, class_ids=torch.tensor([2, 0, -100, 3, 2]), class_names=names)


def one(text: Ragged, row: int) -> Ragged:
    return text.select(torch.tensor([row]))


@pytest.mark.parametrize("preset", ["uni-perceiver", "uni-perceiver-moe"])
def test_losses_are_those_of_rows_alone(preset):
    step, batch = step_of(preset=preset).eval(), batch_with_classes()
    out = step(batch, seed=0, step=0)
    model, tower = step.model, step.model.fusion
    image = torch.cat([model.encode_image(batch.images[i : i + 1]).embedding for i in range(5)])
    text = torch.cat([model.encode_text(one(batch.text, i)).embedding for i in range(5)])
    logits = model.scale.exp() * image @ text.T
    same = (batch.image_ids[:, None] == batch.image_ids).float()
    target = same / same.sum(1, keepdim=True)
    itc = F.cross_entropy(logits, target) / 2 + F.cross_entropy(logits.T, target) / 2
    names = [model.encode_text(Ragged.from_lists([name])).embedding for name in NAMES]
    logits = model.task_scale["classify"].exp() * image @ torch.cat(names).T
    classify = F.cross_entropy(logits, batch.class_ids, reduction="sum")
    words, mlm, lm, first = model.encode_words(), 0.0, 0.0, 0
    for row in range(5):
        masked = model.encode_text(one(batch.masked_text, row), num_embedded=0).tokens
        keys = model.image_keys(model.encode_image(batch.images[row : row + 1]).tokens)
        hidden = model.fuse(masked, keys, torch.tensor([0])).values
        features = F.normalize(tower.project(hidden), dim=1)
        labels = batch.mlm_labels[first : first + len(hidden)]
        first += len(hidden)
        logits = model.task_scale["mlm"].exp() * features @ words.T
        mlm = mlm + F.cross_entropy(logits, labels, reduction="sum")
        # Every next word by the words before it alone: no mask is needed to hide the others.
        ids = one(batch.text, row).values
        for length in range(1, len(ids)):
            clean = model.encode_text(Ragged.from_lists([ids[:length].tolist()]), num_embedded=0)
            blocks = torch.arange(1, length + 1)
            out_ = tower(clean.tokens, keys, torch.tensor([0]), text_blocks=blocks)
            feature = F.normalize(tower.project(out_.text.values[-1]), dim=0)
            logits = model.task_scale["lm"].exp() * feature @ words.T
            lm = lm + F.cross_entropy(logits, ids[length])
    for name, expected in (("itc", itc), ("classify", classify), ("mlm", mlm), ("lm", lm)):
        torch.testing.assert_close(out.losses[name][0], expected, rtol=1e-4, atol=1e-4)
    assert [int(out.losses[name][1]) for name in ("classify", "mlm")] == [4, 5]


@pytest.mark.parametrize("preset", ["uni-perceiver", "uni-perceiver-moe"])
def test_every_parameter_gets_a_gradient(preset):
    step = step_of(preset=preset).train()
    out = step(batch_with_classes(), seed=0, step=0)
    sum(total for total, _ in out.losses.values()).backward()
    assert [name for name, p in step.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in step.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("task", "scale"),
    [
        ("itc", "scale"),
        ("mlm", "task_scale.mlm"),
        ("lm", "task_scale.lm"),
        ("classify", "task_scale.classify"),
    ],
)
def test_each_task_has_its_own_temperature(task, scale):
    config = ObjectivesConfig(**{"itc": 0.0, task: 1.0})
    step = step_of(config).train()
    step(batch_with_classes(), seed=0, step=0).losses[task][0].backward()
    scales = {n for n, p in step.model.named_parameters() if "scale" in n and p.grad is not None}
    assert scales == {scale}


@pytest.mark.parametrize("tasks", [("itc",), ("mlm",), ("lm", "mlm"), ("mlm", "lm", "classify")])
def test_idle_scales_are_told(tasks):
    """What gets no gradient, data-parallel training must know of."""
    step = step_of(ObjectivesConfig(**{"itc": 0.0, **dict.fromkeys(tasks, 1.0)})).train()
    out = step(batch_with_classes(), seed=0, step=0)
    sum(total for total, _ in out.losses.values()).backward()
    idle = [name for name, p in step.named_parameters() if p.grad is None]
    assert idle
    assert step.has_idle_parameters


def test_temperatures_are_bounded():
    step = step_of()
    with torch.no_grad():
        for scale in step.model.task_scale.values():
            scale.fill_(9.0)
    step.finish_step()
    for task in step.model.task_scale:
        torch.testing.assert_close(step.model.scale_of(task), torch.tensor(100.0))
    clip = create_model("clip", vocab_size=50, image_size=16)
    assert torch.equal(clip.scale_of("classify"), clip.logit_scale)


@pytest.mark.parametrize(
    ("objective", "sequences"),
    [
        # Images and texts alone; texts with images, then 50 words; images, then 4 names.
        ("itc", [5, 5]),
        ("mlm", [5, 50]),
        ("lm", [5, 50]),
        ("classify", [5, 4]),
    ],
)
def test_a_step_encodes_what_its_task_needs(objective, sequences):
    config = ObjectivesConfig(**{"itc": 0.0, objective: 1.0})
    step = step_of(config).train()
    seen = []
    step.model.fusion.blocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(len(args[2].cu_seqlens) - 1)
    )
    step(batch_with_classes(), seed=0, step=0)
    assert seen == sequences


def test_experts_report_their_load():
    step, batch = step_of(preset="uni-perceiver-moe").train(), batch_with_classes()
    metrics = step(batch, seed=0, step=0).metrics
    assert 1 / 8 <= float(metrics["expert_load_max"]) <= 1 / 2
    assert 0 <= float(metrics["expert_load_min"]) <= 1 / 8
    assert 2 <= float(metrics["experts_used"]) <= 8
    assert "expert_load_max" not in step_of().train()(batch, seed=0, step=0).metrics


def test_classes_train_two_towers_too():
    torch.manual_seed(0)
    clip = create_model("clip", vocab_size=50, image_size=16)
    step = PretrainStep(clip, ObjectivesConfig(itc=0.0, classify=1.0)).train()
    out = step(batch_with_classes(), seed=0, step=0)
    out.losses["classify"][0].backward()
    assert [name for name, p in step.named_parameters() if p.grad is None] == []


def test_what_is_missing_is_said():
    vilt = create_model("vilt", vocab_size=50, image_size=16)
    with pytest.raises(ValueError, match="classify needs a joint space; preset 'vilt' has no"):
        PretrainStep(vilt, ObjectivesConfig(itc=0.0, classify=1.0))
    with pytest.raises(ValueError, match="itm needs a matching head; preset 'uni-perceiver' has"):
        step_of(ObjectivesConfig(itm=1.0))
    with pytest.raises(ValueError, match=r"set data\.classes"):
        step_of()(make_batch(), seed=0, step=0)
