"""Steps of FLAVA: all its objectives against rows alone, and what a step leaves untrained."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.test_experts_step import batch
from vlpfast import ops
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.matching import mixed_images
from vlpfast.objectives.plan import Plan, Rows
from vlpfast.recipes import flava


def flava_step(objectives: ObjectivesConfig = flava.OBJECTIVES, **model) -> PretrainStep:
    """Of four patches and nine codes."""
    torch.manual_seed(0)
    model = {"codes": 9} | model
    return PretrainStep(
        create_model("flava", "tiny", vocab_size=50, image_size=16, **model), objectives
    )


def test_each_module_is_called_once():
    step, calls = flava_step().train(), {}
    for name in ("vision", "text", "fusion"):
        count = lambda _m, args, _o, name=name: calls.setdefault(name, []).append(len(args[0]))
        # The vision tower is called by a method of its own where patches are hidden.
        module = step.model.vision.embedding if name == "vision" else getattr(step.model, name)
        module.register_forward_hook(count)
    out = step(batch(), seed=0, step=0)
    assert Plan.of(flava.OBJECTIVES).fusion == (Rows.MIXED, Rows.MASKED, Rows.MASKED_IMAGE)
    assert calls == {"vision": [10], "text": [15], "fusion": [15]}
    assert out.losses.keys() == step.weights.keys() == {"itc", "itm", "mlm", "mtm", "mim", "mvm"}


def test_every_parameter_gets_a_gradient():
    step = flava_step().train()
    assert not step.has_idle_parameters
    out = step(batch(), seed=0, step=0)
    sum(total for total, _ in out.losses.values()).backward()
    assert [name for name, p in step.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("mtm", {"text": [5]}),
        ("mim", {"vision": [5]}),
        ("mlm", {"vision": [5], "text": [5], "fusion": [5]}),
    ],
)
def test_towers_read_only_what_the_objective_does(name, calls):
    off = {other: float(other == name) for other in flava.OBJECTIVES.weights}
    step, seen = flava_step(replace(flava.OBJECTIVES, **off)).train(), {}
    for part in ("vision", "text", "fusion"):
        count = lambda _m, args, _o, part=part: seen.setdefault(part, []).append(len(args[0]))
        module = step.model.vision.embedding if part == "vision" else getattr(step.model, part)
        module.register_forward_hook(count)
    step(batch(), seed=0, step=0)
    assert seen == calls


@pytest.mark.parametrize("names", [("mim", "mvm", "mlm", "mtm", "itm"), ("mim",), ("mtm",)])
@torch.no_grad()
def test_losses_are_those_of_rows_alone(names):
    """Whatever else is trained, each head reads its own text, its own patches, its own pair: towers
    normalised, fusion's as it is.
    """
    off = {name: float(name in names) for name in flava.OBJECTIVES.weights}
    step, data = flava_step(replace(flava.OBJECTIVES, **off)).eval(), batch()
    out = step(data, seed=0, step=0)
    model, mixed, expected = step.model, mixed_images(data, step.seed), dict.fromkeys(names, 0.0)
    zero = torch.zeros(1, dtype=torch.int64)
    for row in range(len(data)):
        one, ids = torch.tensor([row]), data.hidden_patches[row]
        texts = [t.select(one) for t in (data.text, data.masked_text, data.masked_alone)]
        words, masked_words, alone = (model.encode_text(text).tokens for text in texts)
        labels = [
            data.text.with_values(of).select(one).values
            for of in (data.mlm_labels, data.alone_labels)
        ]
        hidden = torch.zeros(1, 4, dtype=torch.bool).index_fill(1, ids, True)
        masked = model.encode_image(data.images[row : row + 1], hidden=hidden).tokens
        clean = [model.encode_image(data.images[i : i + 1]).tokens for i in (row, int(mixed[row]))]
        own, other = (model.image_keys(tokens) for tokens in clean)
        told = model.fuse_pairs(words, model.image_keys(masked), zero).image.values
        spoken = model.fuse(masked_words, own, zero).values
        first = model.fuse_pairs(words, other, zero).image.values[:1]
        same = (data.image_ids[mixed[row]] == data.image_ids[row]).long()[None]
        codes = data.codes[row, ids]
        pairs = {
            "mim": (model.code_logits(model.vision.norm(masked)[0][0, 1 + ids]), codes),
            # Behind fusion's class token and the image's.
            "mvm": (model.code_logits(told[2 + ids]), codes),
            "mlm": (model.token_logits(spoken), labels[0]),
            "mtm": (model.token_logits(model.text.norm(alone.values)[0]), labels[1]),
            "itm": (model.match_head(model.pooler(first).tanh()), same),
        }
        for name in names:
            expected[name] += F.cross_entropy(*pairs[name], reduction="sum")
    assert out.losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(out.losses[name][0], value, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_alignment_passes_over_both_class_tokens():
    names = {"itc": 0.0, "itm": 1.0, "wra": 1.0}
    objectives = ObjectivesConfig(**names, itm_negatives="random", wra_tokens="inner")
    step, data = flava_step(objectives, codes=0).eval(), batch()
    model, mixed = step.model, mixed_images(data, step.seed)
    keys = model.image_keys(model.encode_image(data.images).tokens)
    fused = model.fuse_pairs(model.encode_text(data.text).tokens, keys, mixed)
    expected = 0.0
    for row in range(len(data)):
        words, places = (
            part.select(torch.tensor([row])).values for part in (fused.text, fused.image)
        )
        distance = ops.ipot(words[None, 1:-1], places[None, 2:]).distance[0]
        same = data.image_ids[mixed[row]] == data.image_ids[row]
        expected += distance if same else -distance
    loss, _ = step(data, seed=0, step=0).losses["wra"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_text_towers_of_other_presets_model_texts_alone():
    """ALBEF's text tower has no norm to come: the head reads its tokens."""
    torch.manual_seed(0)
    model = create_model("albef", "tiny", vocab_size=50, image_size=16)
    objectives = ObjectivesConfig(itc=1.0, mlm=1.0, mtm=1.0)
    step, data = PretrainStep(model, objectives).eval(), batch()
    loss, count = step(data, seed=0, step=0).losses["mtm"]
    tokens = model.encode_text(data.masked_alone).tokens.values
    expected = F.cross_entropy(model.token_logits(tokens), data.alone_labels, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert int(count) == 5


@pytest.mark.parametrize("preset", ["clip", "blip", "uni-perceiver"])
def test_who_has_no_stack_for_texts_alone(preset):
    """Causal; whose fusion reads embedded words; whose one encoder compares."""
    model = create_model(preset, "tiny", vocab_size=50, image_size=16)
    with pytest.raises(ValueError, match=r"mtm needs a stack that reads texts alone.*'flava'"):
        PretrainStep(model, ObjectivesConfig(itc=0.0, mtm=1.0))
