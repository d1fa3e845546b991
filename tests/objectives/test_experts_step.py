"""Steps of presets with experts: every objective against rows alone, one call of the stack, who is
trained by which data, captioning's masks.
"""

import re
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
from vlpfast.recipes import vlmo
from vlpfast.train.optim import freeze

MASKED = ObjectivesConfig(itc=0.0, mlm=1.0, mtm=1.0)


def beit3_step(config: ObjectivesConfig = MASKED, **model) -> PretrainStep:
    torch.manual_seed(0)
    model = {"codes": 9 if (config.mim or config.mvm) else 0} | model
    model |= {} if config.itc else {"embed_dim": 0}
    return PretrainStep(
        create_model("beit3", "tiny", vocab_size=50, image_size=16, **model), config
    )


def batch(size: int = 5) -> Batch:
    """With the last word masked for reading without the image, and two of four patches hidden."""
    batch = make_batch(size)
    text = batch.text
    ids, labels, places = text.values.clone(), torch.full_like(text.values, -100), text.last() - 1
    labels[places], ids[places] = text.values[places], 3
    hidden = torch.tensor([[0, 1], [1, 3], [0, 3], [2, 3], [1, 2]])[:size]
    return replace(
        batch,
        masked_alone=text.with_values(ids),
        alone_labels=labels,
        hidden_patches=hidden,
        codes=torch.arange(4 * size).unflatten(0, (size, 4)) % 9,
    )


def test_pairs_and_texts_alone_go_through_one_call():
    step, rows = beit3_step().train(), []
    step.model.fusion.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    out = step(batch(), seed=0, step=0)
    assert Plan.of(MASKED, one_stack=True).fusion == (Rows.MASKED, Rows.MASKED_TEXT_ALONE)
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


FULL = replace(MASKED, mim=1.0, mvm=1.0)


@pytest.mark.parametrize("names", [("mim", "mvm", "mlm", "mtm"), ("mim",), ("mvm", "mtm")])
@torch.no_grad()
def test_masked_images_alone_and_with_texts(names):
    """Hidden patches by the stack on one image, and on it with its text, whatever else is trained;
    all in one call.
    """
    config = replace(FULL, **{n: float(n in names) for n in ("mlm", "mtm", "mim", "mvm")})
    step, data, rows = beit3_step(config).eval(), batch(), []
    step.model.fusion.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    out = step(data, seed=0, step=0)
    assert rows == [5 * len(names)]
    assert set(out.losses) == set(names)
    model, expected = step.model, {"mim": 0.0, "mvm": 0.0}
    for row in range(len(data)):
        one, ids = torch.tensor([row]), data.hidden_patches[row]
        hidden = torch.zeros(1, 4, dtype=torch.bool)
        hidden[0, ids] = True
        tokens = model.encode_image(data.images[row : row + 1], hidden=hidden).tokens
        keys = model.image_keys(tokens)
        words = model.encode_text(data.text.select(one)).tokens
        zero = torch.zeros(1, dtype=torch.int64)
        states = {
            "mim": model.fusion.alone(keys, "image").values,
            "mvm": model.fuse_pairs(words, keys, zero).image.values,
        }
        for name, state in states.items():
            logits = model.code_head(state[1:][ids])
            expected[name] += F.cross_entropy(logits, data.codes[row, ids], reduction="sum")
    for name in {"mim", "mvm"} & set(names):
        assert int(out.losses[name][1]) == 10
        torch.testing.assert_close(out.losses[name][0], expected[name], rtol=1e-4, atol=1e-4)


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


def test_images_alone_train_image_experts_only():
    step = beit3_step(replace(FULL, mlm=0.0, mtm=0.0, mvm=0.0))
    names = trained(step)
    assert step.has_idle_parameters
    assert not any(".text." in name or name.startswith("text") for name in names)
    images = {n for n, _ in step.model.named_parameters() if ".image." in n or "vision" in n}
    assert images <= names


def test_the_three_kinds_of_data_train_everything():
    step = beit3_step(FULL)
    assert not step.has_idle_parameters
    assert {n for n, _ in step.model.named_parameters()} == trained(step)
    assert all(p.grad is not None for p in step.parameters())


def vlmo_step(config: ObjectivesConfig, **model) -> PretrainStep:
    torch.manual_seed(0)
    model = {"codes": 9 if (config.mim or config.mvm) else 0, "context_length": 16} | model
    return PretrainStep(create_model("vlmo", "tiny", vocab_size=50, image_size=16, **model), config)


def test_vlmo_averages_the_contrast_of_both_heads():
    step, data = vlmo_step(ObjectivesConfig(itc=1.0)).eval(), batch()
    with torch.no_grad():
        step.model.joint_heads.scale.fill_(1.0)
        out = step(data, seed=0, step=0)
        image, text = step.model.encode_image(data.images), step.model.encode_text(data.text)
        same = (data.image_ids[:, None] == data.image_ids).float()
        target, losses = same / same.sum(1, keepdim=True), []
        for name, scale in (
            ("embedding", step.model.logit_scale),
            ("joint_embedding", torch.tensor(1.0).exp()),
        ):
            logits = scale * getattr(image, name) @ getattr(text, name).T
            losses += [F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)]
    torch.testing.assert_close(out.losses["itc"][0], sum(losses) / 4, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        step.model.joint_heads.scale.fill_(9.0)
    step.finish_step()
    assert step.model.joint_heads.scale.exp().item() == pytest.approx(100.0, rel=1e-5)


def test_vlmo_last_stage_trains_everything():
    step = vlmo_step(ObjectivesConfig(itc=1.0, itm=1.0, mlm=0.25))
    assert not step.has_idle_parameters
    names = trained(step)
    # Of five pairs and one step: the bias of words further apart than any here has no gradient.
    assert {n for n, _ in step.model.named_parameters()} == names


def test_vlmo_second_stage_moves_words_and_their_experts_only():
    step = vlmo_step(vlmo.TEXTS)
    assert step.has_idle_parameters
    before = trained(step)
    assert any(".attention." in name for name in before)
    step.zero_grad(set_to_none=True)
    freeze(step.model, vlmo.FROZEN)
    names = trained(step)
    assert names == {n for n, p in step.model.named_parameters() if p.requires_grad}
    moved = {re.sub(r"blocks\.\d+|(weight|bias|scale)$", "", n) for n in names}
    assert moved == {
        "text.embedding.token",
        "text.embedding.token_type",
        "text.embedding.norm.",
        "fusion.relative_bias.table",
        "fusion..norm2.text.",
        "fusion..mlp.text.fc1.",
        "fusion..mlp.text.fc2.",
        "token_head.",
        "token_head.dense.",
        "token_head.norm.",
    }
    # Of displacements those between words alone.
    grad = step.model.fusion.relative_bias.table.grad.unflatten(0, (4, -1))
    moved = grad.abs().sum((0, 2)).nonzero().flatten()
    assert moved.min() >= (2 * 2 - 1) ** 2 + 3 + 2


def test_a_head_without_its_objective_is_idle():
    assert vlmo_step(ObjectivesConfig(itc=1.0, mlm=0.25)).has_idle_parameters
    assert vlmo_step(ObjectivesConfig(itc=1.0, itm=1.0)).has_idle_parameters
    assert beit3_step(MASKED, codes=9).has_idle_parameters
    assert beit3_step(replace(FULL, mlm=0.0, mtm=0.0, mim=0.0)).has_idle_parameters


def test_vlmo_stages_are_apart():
    with pytest.raises(ValueError, match="in stages of their own"):
        vlmo_step(ObjectivesConfig(itc=1.0, mlm=1.0, mtm=1.0))
    assert vlmo_step(ObjectivesConfig(itc=0.0, mim=1.0)).has_idle_parameters


def test_contrast_trains_everything():
    step = beit3_step(ObjectivesConfig(itc=1.0), mlm_head=False)
    assert not step.has_idle_parameters
    assert {n for n, _ in step.model.named_parameters()} == trained(step)


def test_what_presets_cannot_serve():
    clip = create_model("clip", "tiny", vocab_size=50, image_size=16)
    with pytest.raises(ValueError, match=r"mtm needs a stack that reads texts alone.*'beit3'"):
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
