"""Captioning objectives against straight-line computations."""

import pytest
import torch

from tests._batches import make_batch
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.language import next_token_loss


def step_of(preset: str, config: ObjectivesConfig, dtype=torch.float32) -> PretrainStep:
    torch.manual_seed(0)
    model = create_model(preset, "tiny", vocab_size=50, image_size=16)
    return PretrainStep(model, config).to(dtype)


COCA = ObjectivesConfig(itc=1.0, lm=2.0)


def backward(out) -> None:
    sum(total / count for total, count in out.losses.values()).backward()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_is_the_mean_over_each_next_token(smoothing):
    step = step_of("coca", ObjectivesConfig(lm=1.0, lm_label_smoothing=smoothing), torch.float64)
    batch, model = make_batch(masked=False), step.model
    total, count = step.eval()(batch, seed=0, step=0).losses["lm"]
    keys = model.image_keys(model.encode_image(batch.images).tokens)
    expected = []
    for row in range(5):
        text = batch.text.select(torch.tensor([row]))
        logits = model.next_token_logits(model.decode(text, keys, torch.tensor([row])).values)
        for place in range(len(text.values) - 1):
            log_p = logits[place].log_softmax(0)
            hard = -log_p[text.values[place + 1]]
            expected.append((1 - smoothing) * hard - smoothing * log_p.mean())
    assert count == len(expected)
    torch.testing.assert_close(total, torch.stack(expected).sum(), rtol=1e-10, atol=0)


def test_coca_runs_each_module_once_and_trains_all():
    step = step_of("coca", COCA).train()
    calls = dict.fromkeys(("vision", "text", "fusion"), 0)
    for name in calls:
        getattr(step.model, name).register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    out = step(make_batch(masked=False), seed=0, step=0)
    assert calls == {"vision": 1, "text": 1, "fusion": 1}
    assert out.losses.keys() == {"itc", "lm"}
    backward(out)
    idle = [n for n, p in step.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_a_writer_of_its_own_needs_no_text_tower():
    """BLIP's decoder has self-attention of its own, and reads embedded words."""
    step, called = step_of("blip", ObjectivesConfig(itc=0.0, lm=1.0)).train(), []
    step.model.text.register_forward_hook(lambda *_: called.append("text"))
    step.model.decoder.register_forward_hook(lambda *_: called.append("decoder"))
    backward(step(make_batch(masked=False), seed=0, step=0))
    assert called == ["decoder"]
    assert step.model.text.embedding.token.grad.any()


def test_what_is_not_to_be_predicted_does_not_count():
    step = step_of("coca", COCA).eval()
    batch, model = make_batch(masked=False), step.model
    keys = model.image_keys(model.encode_image(batch.images).tokens)
    states = model.decode(batch.text, keys, torch.arange(5))
    hidden = batch.text.with_values(batch.text.values.clone())
    first = batch.text.first() + 1
    hidden.values[first] = -100
    whole, all_tokens = next_token_loss(model, states, batch.text)
    rest, fewer = next_token_loss(model, states, hidden)
    logits = model.next_token_logits(states.values[first - 1])
    left_out = torch.nn.functional.cross_entropy(logits, batch.text.values[first], reduction="sum")
    assert all_tokens - fewer == 5
    torch.testing.assert_close(whole - rest, left_out)


def test_a_model_that_does_not_write_says_so():
    with pytest.raises(ValueError, match=r"objectives\.lm needs a text decoder; preset 'clip' has"):
        step_of("clip", COCA)
    with pytest.raises(ValueError, match=r"objectives\.itm needs a fusion tower; preset 'coca' "):
        step_of("coca", ObjectivesConfig(itc=1.0, itm=1.0))


BLIP = ObjectivesConfig(
    itc=1.0, itm=1.0, lm=1.0, lm_label_smoothing=0.1, momentum=0.9, queue_size=8, alpha=0.4
)


def test_blip_runs_each_module_once_projects_keys_once_and_trains_all():
    step = step_of("blip", BLIP).train()
    modules = {name: getattr(step.model, name) for name in ("vision", "text", "fusion", "decoder")}
    modules["keys"] = step.model.fusion.image_kv
    calls = dict.fromkeys(modules, 0)
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    out = step(make_batch(masked=False), seed=0, step=1)
    assert calls == dict.fromkeys(calls, 1)
    assert out.losses.keys() == {"itc", "itm", "lm"}
    backward(out)
    idle = [n for n, p in step.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@torch.no_grad()
def test_blip_matching_against_rows_one_by_one():
    """All pairs of the batch scored alone; the step's loss is that of the negatives it drew."""
    step = step_of("blip", BLIP, torch.float64).eval()
    batch, model = make_batch(masked=False), step.model
    drawn = []
    total, count = step(batch, seed=0, step=0).losses["itm"]
    model.fusion.register_forward_hook(lambda _m, args, _o: drawn.append(args[2]))
    model.fusion.register_forward_pre_hook(lambda _m, args: drawn.append(args[0]))
    again, _ = step(batch, seed=0, step=0).losses["itm"]
    texts, images = drawn
    torch.testing.assert_close(again, total, rtol=0, atol=0)
    clean = model.encode_text(batch.text).tokens
    keys = model.image_keys(model.encode_image(batch.images).tokens)
    expected = 0
    for row, image in enumerate(images):
        one = texts.select(torch.tensor([row]))
        # Which text of the batch it is: rows of the text half are themselves, in order.
        own = clean.select(torch.tensor([row % 5]))
        if row < 10:
            torch.testing.assert_close(one.values, own.values, rtol=0, atol=0)
        logits = model.match(model.fuse(one, keys, image[None]))[0]
        expected = expected - logits.log_softmax(0)[int(row < 5)]
    assert count == 15
    assert images[:5].tolist() == images[10:].tolist() == list(range(5))
    ids = batch.image_ids
    assert (ids[images[5:10]] != ids).all()
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)


def test_teacher_moves_shared_tensors_once_and_keeps_them_shared():
    step = step_of("blip", BLIP).train()
    teacher = step.teacher.model
    assert teacher.decoder.blocks[0].mlp is teacher.text.blocks[0].mlp
    shared = step.model.text.blocks[0].mlp.fc1.weight
    before = shared.detach().clone()
    with torch.no_grad():
        shared.add_(1.0)
    step.finish_step()
    moved = teacher.text.blocks[0].mlp.fc1.weight
    torch.testing.assert_close(moved.detach(), before + 0.1, rtol=1e-5, atol=1e-6)
    other = step_of("blip", BLIP)
    other.load_state_dict(step.state_dict())
    assert other.model.decoder.blocks[0].mlp is other.model.text.blocks[0].mlp
    torch.testing.assert_close(other.model.decoder.blocks[0].mlp.fc1.weight, shared)
