"""Steps of presets with experts: every objective against rows alone, one call of the stack, who is
trained by which data, captioning's masks.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch
from vlpfast.data.batch import Batch
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.plan import Plan, Rows
from vlpfast.ragged import Ragged

MASKED = ObjectivesConfig(itc=0.0, mlm=1.0, mtm=1.0)


def beit3_step(config: ObjectivesConfig = MASKED, **model) -> PretrainStep:
    torch.manual_seed(0)
    model = {"embed_dim": 0} | model if not config.itc else model
    return PretrainStep(
        create_model("beit3", "tiny", vocab_size=50, image_size=16, **model), config
    )


def batch(size: int = 5) -> Batch:
    """With the last word masked for reading without the image."""
    batch = make_batch(size)
    text = batch.text
    ids, labels, places = text.values.clone(), torch.full_like(text.values, -100), text.last() - 1
    labels[places], ids[places] = text.values[places], 3
    return replace(batch, masked_alone=text.with_values(ids), alone_labels=labels)


def test_pairs_and_texts_alone_go_through_one_call():
    step, rows = beit3_step().train(), []
    step.model.fusion.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    out = step(batch(), seed=0, step=0)
    assert Plan.of(MASKED).fusion == (Rows.MASKED, Rows.MASKED_TEXT_ALONE)
    assert rows == [10]
    assert out.losses.keys() == step.weights.keys() == {"mlm", "mtm"}
    assert [int(count) for _, count in out.losses.values()] == [5, 5]


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_losses_are_those_of_rows_alone(causal):
    step = beit3_step(replace(MASKED, mlm_causal=causal)).eval()
    data, model = batch(), step.model
    out = step(data, seed=0, step=0)
    expected = {"mlm": 0.0, "mtm": 0.0}
    for row in range(len(data)):
        one = torch.tensor([row])
        image = model.image_keys(model.encode_image(data.images[row : row + 1]).tokens)
        for name, text, labels in (
            ("mlm", data.masked_text, data.mlm_labels),
            ("mtm", data.masked_alone, data.alone_labels),
        ):
            words = model.encode_text(text.select(one)).tokens
            if name == "mtm":
                state = model.fusion.alone(words, "text")
            else:
                blocks = words.positions() + 1 if causal else None
                zero = torch.zeros(1, dtype=torch.int64)
                state = model.fuse_pairs(words, image, zero, text_blocks=blocks).text
            target = text.with_values(labels).select(one).values
            logits = F.linear(state.values, model.token_head.weight, model.token_head.bias)
            expected[name] += F.cross_entropy(logits, target, reduction="sum")
    for name, value in expected.items():
        torch.testing.assert_close(out.losses[name][0], value, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_captioned_word_does_not_see_later_words():
    step = beit3_step(ObjectivesConfig(itc=0.0, mlm=1.0, mlm_causal=True)).eval()
    data = batch()
    changed = data.masked_text.values.clone()
    changed[data.masked_text.last()] = 7
    later = replace(data, masked_text=data.masked_text.with_values(changed))
    before, after = (step(each, seed=0, step=0).losses["mlm"][0] for each in (data, later))
    assert before == after
    full = beit3_step(ObjectivesConfig(itc=0.0, mlm=1.0)).eval()
    before, after = (full(each, seed=0, step=0).losses["mlm"][0] for each in (data, later))
    assert before != after


@torch.no_grad()
def test_contrast_is_of_the_stack_on_each_modality():
    step, data = beit3_step(ObjectivesConfig(itc=1.0), mlm_head=False).eval(), batch()
    out = step(data, seed=0, step=0)
    image, text = step.model.encode_image(data.images), step.model.encode_text(data.text)
    logits = step.model.logit_scale * image.embedding @ text.embedding.T
    same = (data.image_ids[:, None] == data.image_ids).float()
    target = same / same.sum(1, keepdim=True)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(out.losses["itc"][0], expected, rtol=1e-5, atol=1e-5)


def trained(step: PretrainStep) -> set[str]:
    step.train()
    out = step(batch(), seed=0, step=0)
    sum(total for total, _ in out.losses.values()).backward()
    return {n for n, p in step.model.named_parameters() if p.grad is not None and p.grad.any()}


def test_texts_alone_train_text_experts_only():
    step = beit3_step(replace(MASKED, mlm=0.0))
    names = trained(step)
    assert step.has_idle_parameters
    assert not any(".image." in name or name.startswith("vision") for name in names)
    texts = {n for n, _ in step.model.named_parameters() if ".text." in n or n.startswith("text")}
    assert texts <= names


def test_contrast_trains_everything():
    step = beit3_step(ObjectivesConfig(itc=1.0), mlm_head=False)
    assert not step.has_idle_parameters
    assert {n for n, _ in step.model.named_parameters()} == trained(step)


def test_what_presets_cannot_serve():
    clip = create_model("clip", "tiny", vocab_size=50, image_size=16)
    with pytest.raises(ValueError, match=r"mtm needs one stack for both.*'beit3'"):
        PretrainStep(clip, replace(MASKED, mlm=0.0))
    albef = create_model("albef", "tiny", vocab_size=50, image_size=16)
    with pytest.raises(ValueError, match="mlm_causal needs one stack for both"):
        PretrainStep(albef, replace(MASKED, mtm=0.0, mlm_causal=True))
    with pytest.raises(ValueError, match="itm needs a matching head"):
        beit3_step(replace(MASKED, itm=1.0, itm_negatives="random"))
    with pytest.raises(ValueError, match="mlm_causal"):
        ObjectivesConfig(itc=1.0, mlm_causal=True)
    with pytest.raises(ValueError, match=r"mtm_probability.*1\.5"):
        replace(MASKED, mtm_probability=1.5)


def test_empty_sequence():
    words = Ragged.from_lists([[1, 2], [3]])
    nothing = Ragged.empty(words.values)
    assert Ragged.cat([words, nothing]).lens.tolist() == [2, 1, 0]
    assert nothing.select(torch.zeros(3, dtype=torch.int64)).cu_seqlens.tolist() == [0, 0, 0, 0]
