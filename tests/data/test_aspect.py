"""Images that keep their aspect ratio: sizes by hand, pixels by Pillow, the loader's batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests._images import picture, write_jsonl
from vlpfast.data.augment import aspect_sizes
from vlpfast.data.config import DataConfig
from vlpfast.data.loader import choose_loader, make_loader, make_tokenizer, open_index
from vlpfast.recipes import get

SHAPES = [(40, 32), (96, 32), (20, 60), (33, 31), (500, 40)]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # ViLT's rule: shorter side 384, longer at most 639, both down to multiples of 32.
        ((640, 480), (384, 512)),
        ((480, 640), (512, 384)),
        ((384, 384), (384, 384)),
        ((500, 375), (384, 512)),
        ((1000, 400), (256, 608)),
        ((100, 1000), (608, 64)),
        ((10_000, 10), (32, 608)),
    ],
)
def test_sizes_by_hand(shape, expected):
    width, height = (np.array([side]) for side in shape)
    found = aspect_sizes(width, height, shorter=384, max_aspect=1333 / 800, multiple=32)
    assert tuple(found[0].tolist()) == expected


@pytest.fixture
def source(tmp_path):
    rows = []
    for number, (width, height) in enumerate(SHAPES):
        picture(number, width, height).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": [f"picture {number}"]})
    return write_jsonl(tmp_path / "set.jsonl", rows)


def batch_of(config: DataConfig, **options):
    index = open_index(config)
    tokenizer = make_tokenizer(config, index)
    loader = make_loader(
        index, config, tokenizer=tokenizer, image_size=32, batch_size=5, seed=0, **options
    )
    try:
        return next(iter(loader))
    finally:
        loader.close()


@pytest.mark.parametrize("train", [True, False])
def test_batches_hold_whole_images(source, train):
    config = DataConfig(
        path=str(source), vocab_size=300, crop_scale=(1.0, 1.0), max_aspect=2.0, size_multiple=8
    )
    batch = batch_of(config, train=train)
    assert sorted(batch.sample_ids.tolist()) == list(range(5))
    largest = batch.sizes.amax(0).tolist()
    assert batch.images.shape == (5, *largest, 3)
    for row, sample in enumerate(batch.sample_ids.tolist()):
        width, height = SHAPES[sample]
        rows, columns = batch.sizes[row].tolist()
        assert max(rows, columns) <= 64
        assert rows % 8 == columns % 8 == 0
        image = picture(sample, width, height)
        image = image.resize((columns, height), Image.Resampling.BICUBIC)
        expected = np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC))
        assert batch.images[row, :rows, :columns].numpy().tolist() == expected.tolist()
        assert not batch.images[row, rows:].any()
        assert not batch.images[row, :, columns:].any()
    moved = batch.to("cpu")
    assert moved.sizes is batch.sizes
    assert moved.visual("patches").sizes.equal(batch.sizes)


def test_crops_have_the_size_of_their_own_shape(source):
    config = DataConfig(path=str(source), vocab_size=300, max_aspect=2.0, size_multiple=8)
    batch = batch_of(config)
    assert (batch.sizes.amin(1) <= 32).all()
    assert len({tuple(size) for size in batch.sizes.tolist()}) > 1


def test_squares_by_default(source):
    batch = batch_of(DataConfig(path=str(source), vocab_size=300))
    assert batch.sizes is None
    assert batch.images.shape == (5, 32, 32, 3)
    assert isinstance(batch.visual("patches"), torch.Tensor)


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match="max_aspect > 1 is of images of unlike sizes: hflip"):
        DataConfig(path="x", max_aspect=2.0, hflip=0.5)
    with pytest.raises(ValueError, match="loader not 'dali'"):
        DataConfig(path="x", max_aspect=2.0, loader="dali")
    with pytest.raises(ValueError, match=r"max_aspect must be >= 1, got 0\.5"):
        DataConfig(path="x", max_aspect=0.5)
    assert choose_loader(DataConfig(path="x", max_aspect=2.0)) == "torch"
    base = get("vilt_base")
    assert base.data.max_aspect == 1333 / 800
    assert base.data.size_multiple == base.model.vision.patch_size
