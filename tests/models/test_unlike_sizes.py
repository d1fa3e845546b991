"""Images of unlike sizes through ViLT: against transformers, against each image alone, and what
training drops of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch
from tests.models.test_concat import vilt_pair
from vlpfast.images import Images
from vlpfast.layers.embedding import bilinear_positions
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.objectives import PretrainStep
from vlpfast.ragged import Ragged
from vlpfast.recipes import vilt

SIZES = torch.tensor([[32, 32], [24, 40], [8, 56], [40, 16]])


def pictures(sizes: torch.Tensor = SIZES, fill: int = 77) -> Images:
    """Random ones; beyond its own rows and columns an image's place holds `fill`."""
    generator = torch.Generator().manual_seed(0)
    height, width = sizes.amax(0).tolist()
    pixels = torch.full((len(sizes), height, width, 3), fill, dtype=torch.uint8)
    for place, (rows, columns) in zip(pixels, sizes.tolist(), strict=True):
        place[:rows, :columns] = torch.randint(0, 256, (rows, columns, 3), generator=generator)
    return Images(pixels, sizes)


def model_of(**vision) -> VLPModel:
    torch.manual_seed(0)
    config = preset_config("vilt", "tiny", vocab_size=50, image_size=32)
    shape = {"dim": 32, "heads": 2}
    return VLPModel(
        replace(
            config,
            vision=replace(config.vision, **shape, **vision),
            text=replace(config.text, **shape),
            fusion=replace(config.fusion, **shape, depth=2),
        )
    )


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 9), (6, 2), (1, 1)])
def test_positions_are_torchs(grid):
    torch.manual_seed(0)
    table, (rows, columns) = torch.randn(16, 5), grid
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    ours = bilinear_positions(table, place, torch.tensor(grid).expand(len(place), 2))
    square = table.T.view(1, 5, 4, 4)
    theirs = F.interpolate(square, size=grid, mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours, theirs[0].flatten(1).T)
    if grid == (4, 4):
        assert ours.equal(table)


@torch.no_grad()
def test_equals_transformers():
    ours, theirs = vilt_pair()
    texts = [[7, 5, 6, 8], [7, 8], [7, *range(10, 24), 8], [7, 3, 8]]
    words = torch.zeros(4, 16, dtype=torch.int64)
    for row, text in zip(words, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    images = pictures()
    mask = torch.zeros(images.pixels.shape[:3], dtype=torch.int64)
    for row, (height, width) in zip(mask, SIZES.tolist(), strict=True):
        row[:height, :width] = 1
    pixels = (images.pixels / 255 - 0.5) / 0.5 * mask[..., None]
    expected = theirs(
        input_ids=words,
        attention_mask=(words != 0).long(),
        pixel_values=pixels.permute(0, 3, 1, 2),
        pixel_mask=mask,
    )
    tokens = ours.encode_text(Ragged.from_lists(texts)).tokens
    keys = ours.image_keys(ours.encode_image(images).tokens)
    assert keys.lens.tolist() == [17, 16, 8, 11]
    out = ours.fuse_pairs(tokens, keys, torch.arange(4))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(
        out.text.values, expected.last_hidden_state[:, :16][words != 0], **close
    )
    pooled = ours.pool(out.text.values[out.text.first()])
    torch.testing.assert_close(pooled, expected.pooler_output, **close)


@torch.no_grad()
def test_each_is_as_alone_and_nothing_else_is_read():
    model = model_of().eval()
    images = pictures()
    packed = model.encode_image(images).tokens
    assert packed.values.equal(model.encode_image(pictures(fill=200)).tokens.values)
    for row, (height, width) in enumerate(SIZES.tolist()):
        own = images.pixels[row : row + 1, :height, :width].contiguous()
        alone = model.encode_image(Images(own, SIZES[row : row + 1])).tokens
        first, end = packed.cu_seqlens[row : row + 2].tolist()
        torch.testing.assert_close(packed.values[first:end], alone.values)
    square = model.encode_image(images.pixels[:1, :32, :32].contiguous()).tokens
    torch.testing.assert_close(packed.values[:17], square[0], rtol=1e-5, atol=1e-6)
    some = model.encode_image(images[torch.tensor([2, 0])]).tokens
    torch.testing.assert_close(some.values, packed.select(torch.tensor([2, 0])).values)


@torch.no_grad()
def test_kept_patches_are_an_images_own():
    model = model_of().eval()
    whole = model.encode_image(pictures()).tokens
    # The second image has 15 patches, the third 7, the last 10: what they do not have comes last.
    for kept in ([[0, 3, 9], [1, 2, 14], [0, 3, 6], [2, 5, 9]], [list(range(11))] * 4):
        ids = torch.tensor(kept)
        packed = model.encode_image(pictures(), ids).tokens
        for row, count in enumerate((16, 15, 7, 10)):
            own = torch.cat([torch.tensor([0]), ids[row][ids[row] < count] + 1])
            first, end = packed.cu_seqlens[row : row + 2].tolist()
            expected = whole.values[whole.cu_seqlens[row] + own]
            torch.testing.assert_close(packed.values[first:end], expected)


def step_of(most: int) -> PretrainStep:
    return PretrainStep(model_of(max_patches=most), vilt.OBJECTIVES)


def unlike_batch():
    images = pictures(SIZES[[0, 1, 2, 3, 1]])
    return replace(make_batch(5), images=images.pixels, sizes=images.sizes)


def test_training_sees_so_many_of_each():
    step, batch = step_of(9).train(), unlike_batch()
    kept = step._kept_patches(batch, 0)
    counts = (batch.sizes // 8).prod(1)
    assert kept.shape == (5, 9)
    for ids, count in zip(kept, counts.tolist(), strict=True):
        own = ids[ids < count]
        assert len(own) == min(9, count)
        assert own.equal(ids[: len(own)])
    # As in another batch.
    rows = torch.tensor([3, 1])
    part = replace(
        batch,
        images=batch.images[rows],
        sizes=batch.sizes[rows],
        positions=batch.positions[rows],
        text=batch.text.select(rows),
    )
    assert step._kept_patches(part, 0).equal(kept[rows])
    assert step_of(16).train()._kept_patches(batch, 0) is None
    assert step.eval()._kept_patches(batch, 0) is None


def test_a_step_trains_all_parameters():
    step, batch = step_of(9).train(), unlike_batch()
    out = step(batch.to("cpu"), seed=0, step=0)
    assert out.losses.keys() == set(vilt.OBJECTIVES.weights)
    sum(total for total, _ in out.losses.values()).backward()
    idle = [n for n, p in step.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert idle == []
    again = step_of(9).train()
    other = again(unlike_batch(), seed=0, step=0)
    for name, (total, _) in out.losses.items():
        assert total.equal(other.losses[name][0])


def test_a_step_of_squares_is_the_same():
    """Sizes that fill the tensor change nothing."""
    batch = make_batch(5, image_size=32)
    sized = replace(batch, sizes=torch.full((5, 2), 32))
    one, two = (step_of(0).eval()(b, seed=0, step=0).losses for b in (batch, sized))
    for name, (total, count) in one.items():
        torch.testing.assert_close(two[name][0], total, rtol=1e-5, atol=1e-5)
        assert count.equal(two[name][1])


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"sides must be multiples of the patches' 8, got \[12, 8"):
        model_of().encode_image(pictures(torch.tensor([[8, 8], [12, 8]])))
    with pytest.raises(ValueError, match=r"sizes must be in 1 .. \(8, 8\), got \[8, 9\]"):
        Images(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.tensor([[8, 9]]))
    with pytest.raises(ValueError, match=r"'clip' reads images of one size; .*: 'vilt'"):
        create_model("clip", "tiny", image_size=32).encode_image(pictures())
    pixels = torch.zeros(1, 8, 640, 3, dtype=torch.uint8)
    batch = replace(make_batch(1), images=pixels, sizes=torch.tensor([[8, 640]]))
    step = step_of(9).train()
    with pytest.raises(ValueError, match="an image has 80 patches: at most 4 times the 16"):
        step._kept_patches(batch, 0)
