"""Loaders: order, resume, crops, parity of the two decoders, corrupt samples, errors."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests._images import encode, picture, write_jsonl, write_set
from vlpfast.data import augment
from vlpfast.data.config import DataConfig
from vlpfast.data.decode import crop_resize, decode_rgb
from vlpfast.data.loader import choose_loader, make_loader, make_tokenizer, open_index

NUM_SAMPLES, BATCH = 23, 4
HAS_DALI = bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))
LOADERS = [
    "torch",
    pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")),
]


class Setup:
    """A small set, opened and tokenised."""

    def __init__(self, path, **options):
        self.config = DataConfig(path=str(path), max_tokens=16, vocab_size=300, **options)
        self.index = open_index(self.config)
        self.tokenizer = make_tokenizer(self.config, self.index)

    def loader(self, **options):
        defaults = {"image_size": 16, "batch_size": BATCH, "seed": 5}
        return make_loader(
            self.index, self.config, tokenizer=self.tokenizer, **{**defaults, **options}
        )

    def batches(self, num_batches=None, **options):
        loader = self.loader(**options)
        try:
            return [b for b, _ in zip(loader, range(num_batches or 10**9), strict=False)]
        finally:
            loader.close()


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), NUM_SAMPLES)


def assert_same(a, b):
    for name in ("images", "image_ids", "sample_ids", "positions"):
        assert getattr(a, name).equal(getattr(b, name)), name
    assert a.text.values.equal(b.text.values)
    assert a.text.cu_seqlens.equal(b.text.cu_seqlens)


@pytest.mark.parametrize("kind", LOADERS)
def test_batch(data_path, kind):
    setup = Setup(data_path, loader=kind, id_key="parity", hflip=0.5)
    (batch,) = setup.batches(1)
    assert batch.images.shape == (BATCH, 16, 16, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.positions.tolist() == list(range(BATCH))
    for row in range(BATCH):
        sample = int(batch.sample_ids[row])
        start, end = batch.text.cu_seqlens[row : row + 2].tolist()
        text = setup.tokenizer.decode(batch.text.values[start:end].tolist())
        assert text in setup.index.captions(sample)
        assert batch.image_ids[row] == setup.index.image_ids[sample]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("start", [0, 1, 5, 6, 11])
def test_resume_anywhere(data_path, kind, start):
    """Step 5 straddles the epoch's edge (23 samples, batches of 4)."""
    options = {
        "loader": kind,
        "zoom_out": 1.5,
        "hflip": 0.5,
        "color_jitter": 0.4,
        "grayscale": 0.3,
    }
    setup = Setup(data_path, **options)
    whole = setup.batches(13)
    for a, b in zip(whole[start:], setup.batches(13 - start, start_step=start), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("world", [2, 4])
def test_world_size_does_not_matter(data_path, world):
    setup = Setup(data_path, hflip=0.5)
    whole, share = setup.batches(7), BATCH // world
    ranks = [setup.batches(7, rank=r, world=world, batch_size=share) for r in range(world)]
    for step, batch in enumerate(whole):
        for row in range(BATCH):
            part, i = ranks[row // share][step], row % share
            assert part.positions[i] == batch.positions[row]
            assert part.images[i].equal(batch.images[row])
            assert part.text.select(torch.tensor([i])).values.equal(
                batch.text.select(torch.tensor([row])).values
            )


@pytest.mark.parametrize("kind", LOADERS)
def test_threads_and_cache_do_not_matter(data_path, kind):
    base = Setup(data_path, loader=kind, workers=1, prefetch=1).batches(12)
    other = Setup(data_path, loader=kind, workers=3, prefetch=6, cache_gib=0.01).batches(12)
    for a, b in zip(base, other, strict=True):
        assert_same(a, b)


def test_cache_keeps_within_its_budget(data_path):
    bytes_of_one = 40 * 32 * 4
    setup = Setup(data_path, cache_gib=3.5 * bytes_of_one / 2**30, workers=1)
    loader = setup.loader()
    for _, _ in zip(range(14), loader, strict=False):
        pass
    loader.close()
    assert len(loader._cache) == 4


def test_draws_differ_between_epochs(data_path):
    setup = Setup(data_path)
    loader = setup.loader(batch_size=NUM_SAMPLES)
    first, second = (loader.draws(step) for step in (0, 1))
    loader.close()
    order = np.argsort(first.samples), np.argsort(second.samples)
    assert (first.samples[order[0]] == second.samples[order[1]]).all()
    assert (first.boxes[order[0]] != second.boxes[order[1]]).any(1).mean() > 0.9
    assert (first.captions[order[0]] != second.captions[order[1]]).any()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_is_one_pass(data_path, kind, world):
    setup = Setup(data_path, loader=kind, hflip=1.0, color_jitter=0.5)
    parts = [setup.batches(train=False, rank=r, world=world) for r in range(world)]
    for rank, batches in enumerate(parts):
        assert len(batches) == len(setup.loader(train=False, rank=rank, world=world))
        assert {len(b) for b in batches[:-1]} <= {BATCH}
    samples = [int(s) for batches in parts for b in batches for s in b.sample_ids]
    assert sorted(samples) == list(range(NUM_SAMPLES))
    batch = parts[0][0]
    for row in range(len(batch)):
        sample = int(batch.sample_ids[row])
        image = decode_rgb(setup.index.image_bytes(sample))
        # The centred 32 x 32 of 40 x 32 pixels.
        expected = crop_resize(image, np.array([4, 0, 32, 32]), 16, "bicubic")
        difference = np.abs(batch.images[row].numpy().astype(int) - expected)
        assert difference[2:-2, 2:-2].max() <= (0 if kind == "torch" else 2)
        ids = batch.text.select(torch.tensor([row])).values.tolist()
        assert setup.tokenizer.decode(ids) == setup.index.captions(sample)[0]


def test_squash_takes_the_whole_image(data_path):
    setup = Setup(data_path, eval_crop="squash")
    batch = setup.batches(1, train=False)[0]
    expected = crop_resize(
        decode_rgb(setup.index.image_bytes(0)), np.array([0, 0, 40, 32]), 16, "bicubic"
    )
    assert (batch.images[0].numpy() == expected).all()


# The two decoders


@pytest.fixture(scope="module")
def modes_path(tmp_path_factory):
    """Photographs-like files of every kind the two decoders may disagree on."""
    folder = tmp_path_factory.mktemp("modes")
    exif = Image.Exif()
    exif[0x0112] = 6
    base = [picture(i, 150, 110) for i in range(12)]
    transparent = base[9].convert("RGBA")
    transparent.putalpha(base[10].convert("L"))
    deep = np.arange(16_500, dtype=np.uint16).reshape(110, 150)
    files = {
        "rgb.jpg": encode(base[0], quality=90),
        "progressive.jpg": encode(base[1], progressive=True),
        "gray.jpg": encode(base[2].convert("L")),
        "cmyk.jpg": encode(base[3].convert("CMYK")),
        "full.jpg": encode(base[4], subsampling=0),
        "rotated.jpg": encode(base[5], exif=exif),
        "rgb.png": encode(base[6], "PNG"),
        "palette.png": encode(base[7].quantize(32), "PNG"),
        "gray.png": encode(base[8].convert("L"), "PNG"),
        "alpha.png": encode(transparent, "PNG"),
        "deep.png": encode(Image.fromarray(deep), "PNG"),
        "rgb.webp": encode(base[11], "WEBP"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rows = [{"image": name, "caption": name} for name in files]
    return write_jsonl(folder / "set.jsonl", rows)


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
@pytest.mark.parametrize("interpolation", ["bicubic", "linear"])
@pytest.mark.parametrize("size", [48, 96, 160])
def test_decoders_agree(modes_path, interpolation, size):
    """Within 2 grey levels inside; the filters treat the border differently, by design of each.

    The border is as wide as the filter's support, in pixels of the result.
    """
    options = {"interpolation": interpolation, "crop_scale": (0.3, 1.0)}
    batches = {
        kind: Setup(modes_path, loader=kind, **options).batches(3, image_size=size)
        for kind in ("torch", "dali")
    }
    setup = Setup(modes_path, **options)
    for a, b in zip(batches["torch"], batches["dali"], strict=True):
        assert a.sample_ids.equal(b.sample_ids)
        assert a.text.values.equal(b.text.values)
        for row, sample in enumerate(a.sample_ids.tolist()):
            difference = (a.images[row].int() - b.images[row].int()).abs()
            plain = bool(setup.index.at("plain", np.array([sample]))[0])
            border = 2 + 2 * size // 60
            inner = difference[border:-border, border:-border]
            assert inner.max() <= (2 if plain else 0), setup.index.name(sample)
            assert difference.float().mean() <= (0.5 if plain else 0), setup.index.name(sample)


def test_auto_is_torch_without_a_gpu(data_path):
    expected = "dali" if HAS_DALI and torch.cuda.is_available() else "torch"
    assert choose_loader(DataConfig(path="x")) == expected


def test_dali_is_not_needed():
    """The package imports, and chooses the other loader, where DALI cannot be imported."""
    code = """
import sys
sys.modules["nvidia"] = None  # importing it, or looking for it, finds nothing
from vlpfast.data import DataConfig, choose_loader
print(choose_loader(DataConfig(path="x")))
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout == "torch\n"


def test_dali_by_name_or_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs the package nvidia-dali"):
        choose_loader(DataConfig(path="x", loader="dali"))
    assert choose_loader(DataConfig(path="x")) == "torch"


# Corrupt samples and errors


@pytest.fixture
def corrupt_path(tmp_path):
    """A set whose samples 3 and 4 lose their pixels after the index was built."""
    path = write_set(tmp_path, 9)
    open_index(DataConfig(path=str(path)))
    for i, data in ((3, b"<html>"), (4, (tmp_path / "4.png").read_bytes()[:-200])):
        (tmp_path / f"{i}.png").write_bytes(data)
    return path


@pytest.mark.parametrize("kind", LOADERS)
def test_corrupt_samples_are_replaced_in_training(corrupt_path, kind):
    setup = Setup(corrupt_path, loader=kind)
    loader = setup.loader(batch_size=3)
    batches = [b for b, _ in zip(loader, range(6), strict=False)]
    loader.close()
    assert sorted(loader.corrupt) == ["3.png", "4.png"]
    assert all(loader.corrupt.values())
    assert all(len(b) == 3 for b in batches)
    samples = torch.cat([b.sample_ids for b in batches])
    assert not set(samples.tolist()) & {3, 4}
    # What takes their place depends on the position alone, and the text fits the image.
    again = setup.batches(3, batch_size=3, start_step=3)
    for a, b in zip(batches[3:], again, strict=True):
        assert_same(a, b)
    for batch in batches:
        for row, sample in enumerate(batch.sample_ids.tolist()):
            ids = batch.text.select(torch.tensor([row])).values.tolist()
            assert setup.tokenizer.decode(ids) in setup.index.captions(sample)


@pytest.mark.parametrize("kind", LOADERS)
def test_corrupt_samples_are_left_out_of_evaluation(corrupt_path, kind):
    setup = Setup(corrupt_path, loader=kind)
    loader = setup.loader(batch_size=4, train=False)
    batches = list(loader)
    loader.close()
    assert [s for b in batches for s in b.sample_ids.tolist()] == [0, 1, 2, 5, 6, 7, 8]
    assert [len(b.text) for b in batches] == [len(b) for b in batches]
    assert sorted(loader.corrupt) == ["3.png", "4.png"]


@pytest.mark.parametrize("kind", LOADERS)
def test_all_corrupt_is_an_error(tmp_path, kind):
    path = write_set(tmp_path, 2)
    setup = Setup(path, loader=kind)
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=r"drawn in its place are corrupt; 2 so far, last [01].png"
    ):
        setup.batches(1)


def test_an_image_of_another_size_is_corrupt(tmp_path):
    """Crops were drawn for the size that the index has."""
    setup = Setup(write_set(tmp_path, 5))
    (tmp_path / "2.png").write_bytes(encode(picture(0, 10, 10), "PNG"))
    loader = setup.loader()
    for _, _ in zip(loader, range(3), strict=False):
        pass
    loader.close()
    assert loader.corrupt == {"2.png": "image is (10, 10), the index says (40, 32)"}


def test_worker_errors_surface(data_path, monkeypatch):
    setup = Setup(data_path)
    loader = setup.loader()
    monkeypatch.setattr(loader.index.__class__, "image_bytes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader))
    loader.close()


def test_where_and_seed(data_path):
    odd = Setup(data_path, where=("parity=odd",))
    batches = odd.batches(4)
    numbers = {odd.index.record(int(s))["number"] for b in batches for s in b.sample_ids}
    assert {n % 2 for n in numbers} == {1}
    assert len(numbers) == 11  # of 23, in 16 draws: the first epoch is complete
    other = odd.batches(4, seed=6)
    assert any(not a.sample_ids.equal(b.sample_ids) for a, b in zip(batches, other, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"hflip": 2.0}, "hflip"),
        ({"zoom_out": 0.5}, "zoom_out"),
        ({"loader": "fast"}, "loader must be one of"),
        ({"interpolation": "nearest"}, "interpolation must be one of"),
        ({"where": ("parity",)}, "field=value"),
        ({"prefetch": 0}, "prefetch"),
        ({"max_tokens": 1}, "max_tokens"),
    ],
)
def test_bad_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(path="x", **options)


# Augmentation


@pytest.mark.parametrize(("width", "height"), [(100, 80), (33, 200), (7, 7), (1, 1), (500, 20)])
def test_crop_boxes(width, height):
    num_boxes, scale, ratio = 2000, (0.3, 0.9), (0.75, 4 / 3)
    w, h = np.full(num_boxes, width), np.full(num_boxes, height)
    boxes = augment.crop_boxes(w, h, np.arange(num_boxes), seed=1, scale=scale, ratio=ratio)
    x, y, w, h = boxes.T
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (x + w <= width).all()
    assert (y + h <= height).all()
    if (width, height) == (100, 80):
        area = w * h / 8000
        assert 0.28 < area.min() < 0.33
        assert 0.85 < area.max() < 0.92
        assert 0.74 < (w / h).min() < 0.8
        assert 1.28 < (w / h).max() < 1.36
        # Places are uniform: the mean offset is half the room.
        assert (x / (100 - w).clip(1)).mean() == pytest.approx(0.5, abs=0.03)


def test_hflip_rate_and_effect():
    images = torch.arange(1000 * 2 * 3 * 3).reshape(1000, 2, 3, 3).to(torch.uint8)
    positions = torch.arange(1000)
    out = augment.hflip(images, seed=1, positions=positions, probability=0.3)
    flipped = (out != images).flatten(1).any(1)
    assert 0.25 < flipped.float().mean() < 0.35
    assert out[flipped].equal(images[flipped].flip(2))
    some = augment.hflip(images[5:9], seed=1, positions=positions[5:9], probability=0.3)
    assert some.equal(out[5:9])


def test_zoom_out_places_the_whole_image_on_white():
    side, num_images = 32, 400
    images = torch.zeros(num_images, side, side, 3, dtype=torch.uint8)
    positions = torch.arange(num_images)
    out = augment.zoom_out(images, seed=1, positions=positions, factor=2.0)
    # Ink is kept: a black square of side / zoom, all of it inside.
    ink = (255 - out[..., 0].float()) / 255
    shares = ink.sum((1, 2)).sqrt() / side
    assert 0.49 < shares.min() < 0.53
    assert shares.max() > 0.97
    # log2(zoom) is uniform in [0, 1].
    assert -shares.log2().mean() == pytest.approx(0.5, abs=0.05)
    # Places are uniform: the centre of mass is the image's on average, and moves.
    rows = (ink.sum(2) * torch.arange(side)).sum(1) / ink.sum((1, 2))
    assert rows.mean() == pytest.approx((side - 1) / 2, abs=0.5)
    assert rows.std() > 1
    pictures = torch.stack([torch.from_numpy(np.array(picture(i))) for i in range(8)])
    same = augment.zoom_out(pictures, seed=1, positions=positions[:8], factor=1.0)
    assert (same.int() - pictures.int()).abs().max() <= 1
    some = augment.zoom_out(images[5:9], seed=1, positions=positions[5:9], factor=2.0)
    assert some.equal(out[5:9])


def test_color_changes():
    images = torch.stack([torch.from_numpy(np.array(picture(i))) for i in range(64)])
    positions = torch.arange(64)
    same = augment.color_jitter(images, seed=1, positions=positions, strength=0.0)
    assert same.equal(images)
    jittered = augment.color_jitter(images, seed=1, positions=positions, strength=0.4)
    assert jittered.dtype == torch.uint8
    change = (jittered.float() - images.float()).abs().mean((1, 2, 3))
    assert change.min() > 0
    assert 5 < change.mean() < 80
    gray = augment.grayscale(images, seed=1, positions=positions, probability=0.5)
    is_gray = (gray == gray[..., :1]).flatten(1).all(1)
    assert 0.3 < is_gray.float().mean() < 0.7
    assert gray[~is_gray].equal(images[~is_gray])
    luma = np.stack([np.array(Image.fromarray(i.numpy()).convert("L")) for i in images[is_gray]])
    assert np.abs(gray[is_gray][..., 0].numpy().astype(int) - luma).max() <= 1


def test_integers_are_uniform():
    bounds = torch.tensor([1, 3, 2**40]).repeat(6000)
    drawn = augment.integers(1, torch.arange(18_000), 0, bounds)
    assert (drawn >= 0).all()
    assert (drawn < bounds).all()
    counts = drawn[1::3].bincount(minlength=3)
    # 2000 expected, standard deviation 36.5.
    assert (counts - 2000).abs().max() < 150
    assert (drawn[2::3].double().mean() / 2**39).item() == pytest.approx(1, abs=0.04)


def test_long_captions_lose_their_tail(tmp_path):
    (tmp_path / "0.png").write_bytes(encode(picture(0), "PNG"))
    rows = [{"image": "0.png", "caption": "word " * 100}]
    setup = Setup(write_jsonl(tmp_path / "set.jsonl", rows))
    (batch,) = setup.batches(1, batch_size=2)
    assert batch.text.lens.tolist() == [16, 16]
    assert batch.text.values[15] == setup.tokenizer.end_id


def test_chosen_captions(tmp_path):
    """Places 1 and 3 of up to four captions; a sample with one caption shows that one."""
    counts = [1, 2, 3, 4]
    rows = []
    for number, count in enumerate(counts):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number), "PNG"))
        captions = [f"caption {place}" for place in range(count)]
        rows.append({"image": f"{number}.png", "captions": captions})
    setup = Setup(write_jsonl(tmp_path / "set.jsonl", rows), captions=(3, 1))
    seen = {number: set() for number in range(4)}
    for batch in setup.batches(20):
        for sample, ids in zip(
            batch.sample_ids.tolist(),
            batch.text.values.split(batch.text.lens.tolist()),
            strict=True,
        ):
            seen[sample].add(int(setup.tokenizer.decode(ids.tolist()).split()[1]))
    assert seen == {0: {0}, 1: {1}, 2: {1}, 3: {1, 3}}
