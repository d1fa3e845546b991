"""Steps of single-stream presets: random matching, alignment, sampled patches, one objective a
step, and what errors say.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch
from vlpfast import ops
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.matching import mixed_images
from vlpfast.objectives.plan import Plan, Rows
from vlpfast.objectives.regions import alignment_loss
from vlpfast.ragged import Ragged

VILT = ObjectivesConfig(
    itc=0.0, itm=1.0, mlm=1.0, wra=0.1, itm_negatives="random", wra_tokens="inner"
)


def vilt_step(config: ObjectivesConfig = VILT, image_size: int = 64) -> PretrainStep:
    torch.manual_seed(0)
    model = create_model("vilt", "tiny", vocab_size=50, image_size=image_size)
    return PretrainStep(model, config)


def test_all_rows_go_through_one_call():
    step, batch = vilt_step().train(), make_batch(image_size=64)
    rows = []
    step.model.fusion.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    out = step(batch, seed=0, step=0)
    assert Plan.of(VILT).fusion == (Rows.MIXED, Rows.MASKED)
    assert rows == [2 * len(batch)]
    assert out.losses.keys() == step.weights.keys() == {"itm", "mlm", "wra"}
    assert [int(count) for _, count in out.losses.values()] == [5, 5, 5]


def test_every_parameter_gets_a_gradient():
    step = vilt_step().train()
    out = step(make_batch(image_size=64), seed=0, step=0)
    sum(total for total, _ in out.losses.values()).backward()
    assert [name for name, p in step.named_parameters() if p.grad is None] == []


def test_losses_are_those_of_rows_alone():
    step, batch = vilt_step(image_size=16).eval(), make_batch()
    out = step(batch, seed=0, step=0)
    model, mixed = step.model, mixed_images(batch, step.seed)
    keys = model.image_keys(model.encode_image(batch.images).tokens)
    itm = wra = mlm = 0.0
    first = 0
    for row in range(len(batch)):
        one, image = torch.tensor([row]), mixed[row : row + 1]
        fused = model.fuse_pairs(model.encode_text(batch.text.select(one)).tokens, keys, image)
        matched = batch.image_ids[mixed[row]] == batch.image_ids[row]
        itm += F.cross_entropy(model.match(fused.text), matched.long()[None], reduction="sum")
        # ViLT: neither start and end of the text, nor the image's class token.
        words, places = fused.text.values[1:-1], fused.image.values[1:]
        distance = ops.ipot(words[None], places[None]).distance[0]
        wra += distance if matched else -distance
        masked = model.fuse(model.encode_text(batch.masked_text.select(one)).tokens, keys, one)
        labels = batch.mlm_labels[first : first + len(masked.values)]
        first += len(masked.values)
        logits = model.token_logits(masked.values)
        mlm += F.cross_entropy(logits, labels, reduction="sum")
    for name, expected in (("itm", itm), ("wra", wra), ("mlm", mlm)):
        torch.testing.assert_close(out.losses[name][0], expected, rtol=1e-4, atol=1e-4)


def test_half_of_the_pairs_get_another_image_whatever_the_batch_split():
    step, batch = vilt_step(), make_batch(400, image_size=16)
    mixed = mixed_images(batch, step.seed)
    own = torch.arange(400)
    # Three standard deviations of a fair coin.
    assert abs(int((mixed != own).sum()) - 200) < 30
    others = (mixed - own)[mixed != own] % 400
    assert len(others.unique()) > 100
    again = mixed_images(replace(batch, text=batch.text), step.seed)
    assert mixed.equal(again)
    half = mixed_images(replace(batch, images=batch.images[:200], positions=own[:200]), step.seed)
    assert ((half != own[:200]) == (mixed != own)[:200]).all()


def test_another_image_of_the_same_id_is_a_match():
    batch = make_batch(2)
    batch.image_ids.zero_()
    step = vilt_step(image_size=16).eval()
    matched = []
    step.model.match_head.register_forward_hook(lambda _m, _a, logits: matched.append(logits))
    out = step(batch, seed=0, step=0)
    expected = F.cross_entropy(matched[0], torch.ones(2, dtype=torch.int64), reduction="sum")
    torch.testing.assert_close(out.losses["itm"][0], expected)


def test_one_pair_has_no_other_image():
    step = vilt_step(image_size=16).train()
    out = step(make_batch(1), seed=0, step=0)
    assert all(total.isfinite() for total, _ in out.losses.values())
    assert mixed_images(make_batch(1), step.seed).tolist() == [0]


@pytest.mark.parametrize("tokens", ["all", "inner"])
def test_alignment_takes_the_tokens_asked_for(tokens):
    torch.manual_seed(0)
    text, image = (
        Ragged.from_padded(torch.randn(2, 5, 8), torch.tensor(lens)) for lens in ([4, 5], [3, 5])
    )
    matched = torch.tensor([True, False])
    total, count = alignment_loss(text, image, matched, tokens)
    inner = tokens == "inner"
    distances = []
    for row in range(2):
        words, places = (part.pad()[0][row, : part.lens[row]] for part in (text, image))
        words, places = (words[1:-1], places[1:]) if inner else (words, places)
        distances.append(ops.ipot(words[None], places[None]).distance[0])
    torch.testing.assert_close(total, distances[0] - distances[1])
    assert int(count) == 2


def test_patches_are_sampled_in_training_only():
    step, batch = vilt_step(), make_batch(image_size=64)
    step.model.vision.register_forward_hook(lambda _m, _a, out: lens.append(out.shape[1]))
    lens = []
    step.train()(batch, seed=0, step=0)
    step.eval()(batch, seed=0, step=0)
    assert step.model.config.num_patches == 64
    assert lens == [1 + 53, 1 + 64]


def test_mix_trains_one_objective_a_step_by_its_ratio():
    config = replace(VILT, mix=(("itm", 3.0), ("mlm", 1.0)))
    drawn = Counter(tuple(config.at(step, seed=5).weights) for step in range(1000))
    assert drawn.keys() == {("itm", "wra"), ("mlm",)}
    # Four standard deviations.
    assert abs(drawn["mlm",] - 250) < 55
    step = vilt_step(config, image_size=16).train()
    assert step.has_idle_parameters
    seen = [tuple(step(make_batch(), seed=0, step=number).losses) for number in range(12)]
    assert set(seen) == {("itm", "wra"), ("mlm",)}
    assert seen[3] == tuple(step(make_batch(seed=1), seed=9, step=3).losses)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"itc": 1.0}, r"itc needs a joint space; preset 'vilt' has no joint space; presets that"),
        ({"mrfr": 1.0}, r"mrfr needs region heads; preset 'vilt' has no region heads"),
    ],
    ids=str,
)
def test_objectives_a_preset_cannot_serve_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        vilt_step(replace(VILT, **weights))


def test_alignment_needs_a_joint_sequence():
    albef = create_model("albef", "tiny", vocab_size=50, image_size=16)
    with pytest.raises(ValueError, match=r"wra needs fused image tokens;.*presets that.*'vilt'"):
        PretrainStep(albef, VILT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"itm_negatives": "hard"}, "itm_negatives 'random'"),
        ({"itm": 0.0}, "wra aligns the pairs of random matching"),
        ({"mix": (("itm", 1.0),)}, r"mix must name.*\['itm', 'mlm'\], got \['itm'\]"),
        ({"mix": (("itm", 1.0), ("mlm", 0.0))}, "ratios > 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_say_so(change, message):
    with pytest.raises(ValueError, match=message):
        replace(VILT, **change)
