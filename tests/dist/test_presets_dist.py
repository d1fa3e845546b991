"""Presets by DistributedDataParallel over 2 processes, against one process: those that no other
file here has. All of them go through one pair of processes.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests._batches import make_batch, make_regions
from tests.dist._run import run_distributed
from tests.dist.test_step_dist import rows_of
from vlpfast.data.batch import Batch
from vlpfast.data.masking import mask_regions
from vlpfast.models import VLPModel, preset_config
from vlpfast.models.config import ModelConfig
from vlpfast.objectives import ObjectivesConfig, PretrainStep, matching
from vlpfast.ragged import Ragged
from vlpfast.recipes import (
    flava,
    kmeans,
    lxmert,
    metalm,
    pali,
    pixel_bert,
    uni_perceiver,
    unified_io,
    vilt,
    x_lxmert,
)
from vlpfast.train.distributed import World

# As their recipes train them.
CASES = {
    # Not as its recipe: questions about two images, with scores.
    "albef": ObjectivesConfig(itc=0.0, qa=1.0, qa_targets="scores"),
    "align": ObjectivesConfig(label_smoothing=0.1),
    "clip": ObjectivesConfig(),
    "flava": flava.OBJECTIVES,
    "flip": ObjectivesConfig(),
    "kmeans": kmeans.OBJECTIVES,
    "lxmert": lxmert.ALL,
    "metalm": metalm.OBJECTIVES,
    "pali": pali.OBJECTIVES,
    "pixel-bert": pixel_bert.OBJECTIVES,
    "uni-perceiver": uni_perceiver.OBJECTIVES,
    "uni-perceiver-moe": uni_perceiver.OBJECTIVES,
    "unified-io": unified_io.OBJECTIVES,
    # Not as its recipe: negatives of other ranks that are regions, as many as an image has.
    "uniter": ObjectivesConfig(itm=1.0, itm_negatives="hard-global"),
    "vilt": vilt.OBJECTIVES,
    "x-lxmert": x_lxmert.OBJECTIVES,
}
ROWS, PATCHES, CODES, WORLD = 6, 4, 9, 2
NAMES = Ragged.from_lists([[1, 5, 2], [1, 6, 7, 2], [1, 8, 2]])


def model_of(preset: str) -> VLPModel:
    """Small, and where training drops patches, one of four."""
    config = preset_config(preset, "tiny", vocab_size=50, image_size=16)
    if preset == "kmeans":
        # Which inputs centres begin as and are moved to depends on the split; so none are.
        book = replace(config.codebook, size=5, revive_below=0.0)
        config = replace(config, codebook=book)
    if preset == "lxmert":
        config = replace(config, answers=3)
    if preset == "albef":
        config = replace(config, answers=3, answer_images=2, embed_dim=0)
    if preset == "uniter":
        config = replace(config, embed_dim=16, region_heads=False)
    if config.codes:
        config = replace(config, codes=CODES)
    if config.text.image_codes:
        config = replace(config, text=replace(config.text, image_codes=CODES))
    vision = {"region_attributes": 5} if preset == "lxmert" else {}
    dropped = {"max_patches": PATCHES - 1} if config.vision.max_patches else {}
    torch.manual_seed(0)
    model = VLPModel(replace(config, **_narrow(config, dropped | vision))).double()
    if model.tokenizer is not None:
        model.tokenizer.codebook.steps += 1
    return model


def _narrow(config: ModelConfig, vision: dict) -> dict:
    parts = {}
    for name, more in (("vision", vision), ("text", {}), ("fusion", {})):
        stack = getattr(config, name)
        if name == "vision" and stack.front == "cnn":
            continue
        parts[name] = replace(stack, dim=32, heads=2, depth=min(stack.depth, 2), **more)
    return parts


def batch_of(number: int, rank: int, world: int, preset: str) -> Batch:
    """Every `world`-th pair of a batch, with all that any of the objectives reads."""
    generator = torch.Generator().manual_seed(number)
    integers = lambda high, *shape: torch.randint(0, high, shape, generator=generator)
    whole = make_batch(ROWS, seed=number)
    prompts = Ragged.from_lists([[1, *range(4, 5 + row), 2] for row in range(ROWS)])
    regions = make_regions(ROWS, seed=number)
    attributes = torch.rand(len(regions.boxes), 5, generator=generator).softmax(1)
    regions = replace(regions, attributes=attributes)
    masked = mask_regions(regions, probability=0.4, seed=3, positions=whole.positions)
    # The last word of each text.
    last = whole.text.last() - 1
    alone = whole.text.with_values(whole.text.values.index_fill(0, last, 3))
    labels = torch.full_like(whole.text.values, -100).index_copy(0, last, whole.text.values[last])
    codes, hidden = integers(CODES, ROWS, PATCHES), integers(PATCHES, ROWS, 1)
    classes = torch.tensor([2, 0, -100, 1, 2, 1])
    own = torch.arange(rank, ROWS, world)
    # Of ViLT alone: images of unlike sizes, in two steps of three.
    shapes = torch.tensor([[16, 16], [8, 16], [16, 16], [16, 8], [8, 8], [16, 16]])
    share = replace(
        rows_of(whole, rank, world),
        prompt=prompts.select(own),
        codes=codes[own],
        hidden_patches=hidden[own],
        regions=regions[own],
        masked_regions=masked[own],
        answer_ids=torch.tensor([2, -100, 0, 1, -100, 2])[own],
        class_ids=classes[own],
        class_names=NAMES,
        masked_alone=alone.select(own),
        alone_labels=whole.text.with_values(labels).select(own).values,
        sizes=shapes[own] if preset == "vilt" and number else None,
    )
    if preset == "albef":
        told = [{2: 1.0}, {}, {0: 0.3, 1: 0.9}, {1: 0.6}, {}, {0: 1.0, 2: 0.3}]
        told = [told[row] for row in own.tolist()]
        share = replace(
            share,
            images=torch.cat([share.images, 255 - share.images]),
            shown=torch.arange(2 * len(own)).unflatten(0, (2, len(own))),
            answer_sets=Ragged.from_lists([list(answers) for answers in told]),
            answer_scores=torch.tensor([s for a in told for s in a.values()]),
        )
    return drawing(share, number) if preset == "unified-io" else share


def drawing(batch: Batch, number: int) -> Batch:
    """The texts of some rows are their images' codes: of each rank one row, in step 2 all of the
    second rank's and none of the first's.
    """
    places = batch.positions % 1000
    chosen = (places % 2 == 1) if number == 2 else (places % 3 == 0)
    texts = [batch.text.select(row).values.tolist() for row in torch.arange(len(batch))[:, None]]
    drawn = chosen.nonzero()[:, 0]
    for row in drawn.tolist():
        texts[row] = [1, *(50 + batch.codes[row]).tolist(), 2]
    return replace(batch, text=Ragged.from_lists(texts), drawn=drawn)


def partners(batch: Batch, seed: int) -> Tensor:
    """In place of random matching, whose other images are those of a rank: for two thirds of the
    pairs the image of the pair `WORLD` places on, which every split has on the same rank.
    """
    places = batch.positions % 1000
    shown = torch.where(places // WORLD == 1, places, (places + WORLD) % ROWS)
    return (shown[:, None] == places).int().argmax(1)


def train(rank: int, world: int, preset: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after steps of SGD, and the sum over steps and ranks of each loss."""
    config = CASES[preset]
    group = dist.group.WORLD if world > 1 else None
    step = PretrainStep(model_of(preset), config, group).train()
    module = World(rank, world, torch.device("cpu")).wrap(step)
    sums: dict[str, Tensor] = {}
    for number in range(8 if config.mix else 3):
        batch = batch_of(number, rank, world, preset)
        with patch.object(matching, "mixed_images", partners):
            losses = module(batch, seed=number, step=number).losses
        total = 0.0
        for name, (loss, count) in losses.items():
            count = count.double()
            if world > 1:
                dist.all_reduce(count)
            mean = loss * world / count
            total = total + config.weights[name] * mean
            sums[name] = sums.get(name, 0.0) + mean.detach() / world
        total.backward()
        with torch.no_grad():
            for parameter in step.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
        step.finish_step()
    if world > 1:
        for value in sums.values():
            dist.all_reduce(value)
    return step.state_dict(), sums


def train_all(rank: int, world: int) -> dict[str, tuple]:
    return {preset: train(rank, world, preset) for preset in CASES}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, tuple]]:
    return run_distributed(train_all, WORLD, WORLD)


# Losses on regions are sums in fp32, also of an fp64 model.
RTOL = {"lxmert": 1e-6}


@pytest.mark.dist
@pytest.mark.parametrize("preset", CASES)
def test_training_equals_one_process(preset, ranks):
    expected, expected_sums = train(0, 1, preset)
    assert expected_sums.keys() == CASES[preset].weights.keys()
    rtol = RTOL.get(preset, 1e-8)
    for rank in ranks:
        weights, sums = rank[preset]
        torch.testing.assert_close(sums, expected_sums, rtol=rtol, atol=1e-10)
        for name, value in weights.items():
            torch.testing.assert_close(
                value, expected[name], rtol=10 * rtol, atol=rtol / 10, msg=name
            )
