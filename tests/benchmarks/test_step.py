"""What the step benchmarks compare computes the same, and their FLOP formula counts what runs.

ALBEF's step has its own test, tests/objectives/test_albef_parity.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import captions, harness, plot, shapes
from benchmarks.step import batches, bench_rerank, clip_steps, flops
from benchmarks.step.albef_eager import AlbefEager
from benchmarks.step.open_clip import open_clip_module, open_clip_weights
from tests._peers import open_clip_losses
from tests.benchmarks.test_harness import fake_row
from vlpfast.models import VLPModel, preset_config
from vlpfast.models.config import ModelConfig
from vlpfast.objectives import ObjectivesConfig, PretrainStep

CPU = torch.device("cpu")


def compact(preset: str, **overrides: object) -> ModelConfig:
    """Two layers a stack, 32 px in patches of 8, 99 words."""
    config = preset_config(preset, "tiny", vocab_size=99, image_size=32, **overrides)
    width = {"dim": 96, "heads": 4, "depth": 2}
    return replace(
        config,
        vision=replace(config.vision, **width),
        text=replace(config.text, **width),
        fusion=replace(config.fusion, **width) if config.fusion.depth else config.fusion,
    )


def test_clip_step_equals_open_clip():
    """Loss and every gradient; texts packed here and padded to 77 tokens there."""
    config = compact("clip")
    torch.manual_seed(0)
    step = PretrainStep(VLPModel(config), ObjectivesConfig(itc=1.0)).train()
    batch = batches.make_batch(config, 8)
    loss, count = step(batch, seed=0, step=0).losses["itc"]
    (loss / count).backward()

    theirs = open_clip_module(config).train()
    theirs.load_state_dict(open_clip_weights(step.model.state_dict()))
    images = batches.normalised(batch.images, config)
    texts = batches.padded_ids(batch.text, batches.CLIP_LEN)
    expected = open_clip_losses().ClipLoss()(*theirs(images, texts))
    expected.backward()

    torch.testing.assert_close(loss / count, expected, rtol=1e-5, atol=1e-6)
    ours = open_clip_weights({name: p.grad for name, p in step.model.named_parameters()})
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            ours[name],
            gradient,
            rtol=1e-4,
            atol=1e-5 * float(gradient.abs().max()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_open_clip_drops_as_many_patches():
    """As FLIP's shapes ask; which ones is each library's own draw."""
    config = compact("clip")
    theirs = open_clip_module(config, patch_dropout=0.75).train()
    kept = []
    theirs.visual.transformer.register_forward_pre_hook(lambda _, args: kept.append(args[0].shape))
    theirs(torch.zeros(2, 3, 32, 32), torch.zeros(2, 77, dtype=torch.int64))
    assert kept[0][:2] == (2, 1 + config.num_patches // 4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rerank_scores_are_equal(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """Grouped by image, and each pair with its own copy of the image."""
    monkeypatch.setattr(bench_rerank, "_config", lambda shape: compact("albef"))
    shape = shapes.Rerank("tiny", False, "tiny", 32, 3, 10, 6)
    inputs = bench_rerank.setup(shape, harness.DTYPES[dtype], CPU)
    runs = bench_rerank.impls(CPU)
    ours, theirs = (runs[name](dict(inputs)) for name in ("vlpfast", "albef_repeated"))
    assert ours.shape == theirs.shape == (3, 6)
    assert theirs.std() > 0
    tolerance = 1e-5 if dtype == "fp32" else 3e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_flops_are_what_the_eager_step_spends(monkeypatch: pytest.MonkeyPatch):
    """Without padding, the published order spends what the formula says and what it wastes: keys
    projected in four passes instead of one, the vocabulary at every position.
    """
    monkeypatch.setattr(captions, "CAPTION_LENS", (9,))
    config, size, queue = compact("albef"), 4, 8
    batch = batches.make_batch(config, size)
    albef = AlbefEager(config, momentum=0.9, queue_size=queue).train()
    albef.enqueue(torch.randn(queue, 128), torch.randn(queue, 128), torch.arange(queue) + 100)
    with FlopCounterMode(display=False) as counter:
        sum(albef(batches.eager_batch(batch, config), 0.4).values()).backward()
    unmasked = size * 9 - int((batch.mlm_labels != -100).sum())
    wasted_words = 4 * unmasked * 2 * 96 * (96 + 99)
    wasted_keys = 3 * 3 * size * flops.keys_flops(config)
    heads = 3 * 3 * size * 2 * 96 * 2  # the matching head, which the formula leaves out
    needed = flops.albef_step_flops(config, batch.text.lens.tolist(), queue)
    expected = needed + wasted_words + wasted_keys + heads
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_clip_flops_count_kept_patches_and_half_of_a_causal_square():
    config = compact("clip")
    whole, quarter = (flops.clip_step_flops(config, [9, 5], kept) for kept in (16, 4))
    patches, _ = flops.vision_flops(config, 12)
    # What 12 patches more cost in the first of two layers, and as keys and values of one query in
    # the second.
    first = 12 * 2 * 12 * 96**2 + 4 * 96 * (17**2 - 5**2)
    last = 12 * 2 * 2 * 96**2 + 4 * 96 * 12
    assert config.vision.depth == 2
    assert whole - quarter == pytest.approx(2 * (2 * patches + 3 * (first + last)))
    square = flops.text_flops(replace(config, text=replace(config.text, causal=False)), [10])
    assert square - flops.text_flops(config, [10]) == 2 * 4 * 96 * 45


def test_captions_follow_the_distribution():
    assert sum(batches.caption_lens(16)) == 16 * 13
    assert sum(batches.caption_lens(4)) == 4 * 13
    assert batches.caption_lens(32) == 2 * batches.caption_lens(16)
    config = compact("albef")
    batch = batches.make_batch(config, 16)
    assert batch.text.lens.tolist() == batches.caption_lens(16)
    masked = batch.mlm_labels != -100
    assert (batch.masked_text.values[masked] == 96).all()
    assert torch.equal(batch.mlm_labels[masked], batch.text.values[masked])
    assert torch.equal(batch.masked_text.values[~masked], batch.text.values[~masked])
    assert not masked[batch.text.first()].any()
    assert not masked[batch.text.last()].any()


def _total(result: object) -> float:
    """The sum of a step's losses, ours or a peer's."""
    return float(result) if isinstance(result, torch.Tensor) else sum(result.losses.values())


@pytest.mark.parametrize("op", ["step_clip", "step_flip", "step_albef"])
def test_a_step_trains_under_the_harness(op: str, monkeypatch: pytest.MonkeyPatch):
    """The second call finds other weights than the first, in both dtypes; the first finds the same
    in every implementation.
    """
    bench = harness.load(op)
    module = clip_steps if op != "step_albef" else bench
    name = "clip_config" if op != "step_albef" else "_config"
    config = compact("clip" if op != "step_albef" else "albef")
    vision = replace(config.vision, patch_dropout=0.5 if op == "step_flip" else 0.0)
    monkeypatch.setattr(module, name, lambda shape: replace(config, vision=vision))
    shape = next(iter(bench.SHAPES.values()))
    small = {"batch": 4, **({"queue_size": 16} if op == "step_albef" else {})}
    assert bench.DIRECTIONS == ("step",)
    for dtype in bench.DTYPES:
        firsts = []
        for run in bench.impls(CPU).values():
            inputs = bench.setup(replace(shape, **small), harness.DTYPES[dtype], CPU)
            call = harness.directed(run, inputs, "step")
            first, second = (_total(call()) for _ in range(2))
            assert first != second
            firsts.append(first)
        if op == "step_clip":  # what is drawn, patches and negatives, is each one's own
            assert max(firsts) == pytest.approx(min(firsts), rel=1e-5 if dtype == "fp32" else 3e-2)


def test_tables_show_samples_per_second():
    row = fake_row(op="step_clip", impl="vlpfast", shape="clip-b32-b16", dtype="fp32", ms_p50=2e3)
    assert "| 2e+03 ms (4x), 8/s |" in plot.table([row], headline=False)
    assert shapes.samples_per_s("keep_ids", "flip-b16-b256-keep98", 1.0) is None
