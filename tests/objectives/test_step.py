"""PretrainStep against a straight-line ALBEF step in fp64, and what each objective promises by
itself.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch
from vlpfast.models import create_model
from vlpfast.models.presets import preset_config
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.plan import Plan, Rows
from vlpfast.ops.contrastive import contrastive_loss
from vlpfast.ops.seed import fold_seed

ALBEF = ObjectivesConfig(itc=1.0, itm=1.0, mlm=1.0, momentum=0.9, queue_size=8, alpha=0.4)


def albef_step(
    config: ObjectivesConfig = ALBEF, dtype: torch.dtype = torch.float32
) -> PretrainStep:
    torch.manual_seed(0)
    model = create_model("albef", "tiny", vocab_size=50, image_size=16).to(dtype)
    return PretrainStep(model, config).to(dtype)


def soft_cross_entropy(logits, targets):
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()


class StraightLineAlbef:
    """ALBEF's pre-training step in its published order: images copied per pass, target matrices
    formed, one call each.
    """

    def __init__(self, model, config):
        self.model, self.config = model, config
        self.model_m = copy.deepcopy(model)
        self.queue = [[], [], []]

    def losses(self, batch, alpha, hard_text, hard_image):
        model, model_m, size = self.model, self.model_m, len(batch)
        image, text = model.encode_image(batch.images), model.encode_text(batch.text)
        scale = 1 / model.scale
        with torch.no_grad():
            image_m, text_m = model_m.encode_image(batch.images), model_m.encode_text(batch.text)
            queue_image, queue_text, queue_ids = (torch.stack(q) if q else None for q in self.queue)
            all_text = torch.cat([text_m.embedding, *([queue_text] if self.queue[0] else [])])
            all_image = torch.cat([image_m.embedding, *([queue_image] if self.queue[0] else [])])
            all_ids = torch.cat([batch.image_ids, *([queue_ids] if self.queue[0] else [])])
            positive = (batch.image_ids[:, None] == all_ids).to(scale.dtype)
            positive /= positive.sum(1, keepdim=True)
            target_i2t = (
                alpha * F.softmax(scale * image_m.embedding @ all_text.T, 1)
                + (1 - alpha) * positive
            )
            target_t2i = (
                alpha * F.softmax(scale * text_m.embedding @ all_image.T, 1)
                + (1 - alpha) * positive
            )
        itc = (
            soft_cross_entropy(scale * image.embedding @ all_text.T, target_i2t)
            + soft_cross_entropy(scale * text.embedding @ all_image.T, target_t2i)
        ) / 2
        self.new_entries = (image_m.embedding, text_m.embedding, batch.image_ids)

        def fuse(m, tokens, image_tokens):
            return m.fuse(tokens, m.image_keys(image_tokens), torch.arange(len(tokens)))

        positive_logits = model.match(fuse(model, text.tokens, image.tokens))
        negative_image = model.match(fuse(model, text.tokens, image.tokens[hard_image]))
        negative_text = model.match(fuse(model, text.tokens.select(hard_text), image.tokens))
        logits = torch.cat([positive_logits, negative_image, negative_text])
        itm = F.cross_entropy(logits, torch.tensor([1] * size + [0] * 2 * size))

        hidden = fuse(model, model.encode_text(batch.masked_text).tokens, image.tokens).values
        with torch.no_grad():
            hidden_m = fuse(
                model_m, model_m.encode_text(batch.masked_text).tokens, image_m.tokens
            ).values
            soft = F.softmax(model_m.token_logits(hidden_m), dim=-1)
        logits = model.token_logits(hidden)
        hard = F.cross_entropy(logits, batch.mlm_labels, ignore_index=-100)
        distilled = -(F.log_softmax(logits, dim=-1) * soft).sum(-1)[batch.mlm_labels != -100].mean()
        return {"itc": itc, "itm": itm, "mlm": (1 - alpha) * hard + alpha * distilled}

    @torch.no_grad()
    def finish(self):
        self.model.scale.clamp_(0.001, 0.5)
        for old, new in zip(self.model_m.parameters(), self.model.parameters(), strict=True):
            old.copy_(self.config.momentum * old + (1 - self.config.momentum) * new)
        size = self.config.queue_size
        for entries, new in zip(self.queue, self.new_entries, strict=True):
            for row in new:
                entries.append(row)
            del entries[:-size]


def test_albef_step_equals_the_published_order():
    """Three steps of SGD with a queue of 8 and batches of 5, so that the queue wraps."""
    step = albef_step(dtype=torch.float64).train()
    plain = StraightLineAlbef(copy.deepcopy(step.model), ALBEF)
    for number in range(3):
        batch, seed = make_batch(5, seed=number), fold_seed(7, number)
        with torch.no_grad():
            drawn = draw_negatives(step, batch, seed)
        out = step(batch, seed=seed, step=number)
        losses = {name: total / count for name, (total, count) in out.losses.items()}
        expected = plain.losses(batch, 0.4, *drawn)
        for name in ("itc", "itm", "mlm"):
            torch.testing.assert_close(losses[name], expected[name], rtol=1e-10, atol=1e-12)
        for model, loss in (
            (step.model, sum(losses.values())),
            (plain.model, sum(expected.values())),
        ):
            model.zero_grad()
            loss.backward()
        for (name, ours), theirs in zip(
            step.model.named_parameters(), plain.model.parameters(), strict=True
        ):
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        for model in (step.model, plain.model):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        step.finish_step()
        plain.finish()
    for ours, theirs in zip(
        step.teacher.model.parameters(), plain.model_m.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def draw_negatives(step, batch, seed):
    """The negatives that `step` will draw for this batch and seed."""
    student = [
        step.model.encode_image(batch.images).embedding,
        step.model.encode_text(batch.text).embedding,
    ]
    teacher = [
        step.teacher.model.encode_image(batch.images),
        step.teacher.model.encode_text(batch.text),
    ]
    out = contrastive_loss(
        *student,
        step.model.logit_scale,
        ids=batch.image_ids,
        teacher=tuple(t.embedding for t in teacher),
        alpha=0.4,
        hard_negatives=1,
        seed=fold_seed(seed, 3),
    )
    return out.hard_text[:, 0], out.hard_image[:, 0]


def test_plan_merges_passes():
    plan = Plan.of(ALBEF)
    assert plan.fusion == (Rows.MATCHED, Rows.NEGATIVE_IMAGE, Rows.NEGATIVE_TEXT, Rows.MASKED)
    hard_text, hard_image = torch.tensor([1, 0]), torch.tensor([1, 0])
    texts, images = plan.fusion_rows(2, hard_text, hard_image, torch.device("cpu"))
    assert texts.tolist() == [0, 1, 0, 1, 1, 0, 2, 3]
    assert images.tolist() == [0, 1, 1, 0, 0, 1, 0, 1]
    assert Plan.of(ObjectivesConfig()) == Plan(masked_text=False, fusion=(), hard_negatives=False)


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
