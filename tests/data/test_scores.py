"""Files of scores, the exact quantile, and what is kept by them."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests._images import encode, picture, write_set, write_tar
from vlpfast.data import scores as scores_module
from vlpfast.data import sidecar
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader, make_tokenizer, open_index
from vlpfast.data.quantile import top_share
from vlpfast.data.scores import finish_scores, iter_scores, kept, scores_in, write_scores

MADE_BY = {"metric": "similarity", "run": "logs/a", "weights": "a.pt", "weights_sha256": "0"}
NUM_SAMPLES = 23


# The quantile


@settings(max_examples=60, deadline=None)
@given(
    scores=arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=True)),
    percent=st.integers(1, 100),
    cut=st.integers(0, 60),
)
def test_top_share_is_an_order_statistic(scores, percent, cut):
    known = np.sort(scores[~np.isnan(scores)])[::-1]
    chunks = lambda: iter((scores[:cut], scores[cut:]))
    if not len(known):
        with pytest.raises(ValueError, match="no score"):
            top_share(chunks, percent / 100)
        return
    place = -(-percent * len(known) // 100)
    assert top_share(chunks, percent / 100) == (known[place - 1], len(known))


def test_top_share_of_many_close_scores():
    """A million scores in one of the 2**16 buckets of the first pass, and a share whose product
    with their number is not a float's.
    """
    rng = np.random.default_rng(0)
    scores = (0.3 + rng.uniform(0, 1e-3, 1_000_000)).astype(np.float32)
    place = 700_000
    found = top_share(lambda: iter(np.array_split(scores, 7)), 0.7)
    assert found == (np.sort(scores)[-place], 1_000_000)


# Files


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of 23 samples in three parts, with scores of its samples' numbers."""
    monkeypatch.setattr(sidecar, "PART_ROWS", 10)
    index = Index.open(write_set(tmp_path, NUM_SAMPLES))
    return index, write_all(index, tmp_path / "scores", np.arange(NUM_SAMPLES) / 100)


def write_all(index, folder, scores, **made_by):
    scores_in(folder).begin(index, MADE_BY | made_by)
    for part in sidecar.parts(index):
        write_scores(scores_in(folder), part, scores[part.first : part.last].astype(np.float32))
    assert finish_scores(scores_in(folder), index)
    return folder


def test_parts_of_a_table(table):
    index, _ = table
    assert [(p.name, p.first, p.last) for p in sidecar.parts(index)] == [
        ("000000", 0, 10),
        ("000001", 10, 20),
        ("000002", 20, 23),
    ]
    odd = index.where({"parity": "odd"})
    rows = [sidecar.rows_in(odd, p).tolist() for p in sidecar.parts(odd)]
    assert rows == [[1, 3, 5, 7, 9], [11, 13, 15, 17, 19], [21]]


def test_parts_of_shards(tmp_path):
    """The middle shard has no valid sample, the last one's second is corrupt."""
    image = encode(picture(0), "PNG")
    for name, images in {"a": [image] * 3, "b": [b"<html>"], "c.d": [image, b"", image]}.items():
        members = [
            (f"{i}.{end}", data)
            for i, png in enumerate(images)
            for end, data in (("png", png), ("txt", b"words"))
        ]
        write_tar(tmp_path / f"{name}.tar", members)
    index = Index.open(tmp_path)
    parts = list(sidecar.parts(index))
    assert [(p.name, p.first, p.last) for p in parts] == [("a", 0, 3), ("b", 3, 3), ("c.d", 3, 5)]
    folder = write_all(index, tmp_path / "scores", np.arange(5) / 10)
    rows, found = map(np.concatenate, zip(*iter_scores(scores_in(folder), index), strict=True))
    assert rows.tolist() == list(range(5))
    np.testing.assert_array_equal(found, (np.arange(5) / 10).astype(np.float32))
    assert sorted(p.name for p in folder.glob("[!.]*")) == [
        *("a.json", "a.npy", "b.json", "b.npy", "c.d.json", "c.d.npy", "scores.json")
    ]


def test_totals(tmp_path, monkeypatch):
    monkeypatch.setattr(sidecar, "PART_ROWS", 10)
    monkeypatch.setattr(scores_module, "NAMED", 3)
    index = Index.open(write_set(tmp_path, NUM_SAMPLES))
    scores = np.arange(NUM_SAMPLES, dtype=np.float32)
    scores[[2, 3, 12, 13, 20, 21, 22]] = np.nan
    scores_in(tmp_path / "s").begin(index, MADE_BY)
    for part in sidecar.parts(index):
        assert finish_scores(scores_in(tmp_path / "s"), index) is None
        corrupt = {
            f"{i}.png": "broken" for i in range(part.first + 2, min(part.last, part.first + 4))
        }
        write_scores(scores_in(tmp_path / "s"), part, scores[part.first : part.last], corrupt)
    done = finish_scores(scores_in(tmp_path / "s"), index)
    assert done == scores_in(tmp_path / "s").description()
    assert (done["num_scored"], done["num_unscored"], done["num_corrupt"]) == (16, 7, 5)
    assert done["range"] == [0.0, 19.0]
    assert done["mean"] == pytest.approx(np.nanmean(scores))
    # The summary names some, each part's file all of its own.
    assert list(done["corrupt"]) == ["2.png", "3.png", "12.png"]
    assert list(json.loads((tmp_path / "s" / "000002.json").read_text())["corrupt"]) == ["22.png"]


def test_begin_refuses_other_scores(table):
    index, folder = table
    scores_in(folder).begin(index, MADE_BY | {"run": "moved/a", "weights": "moved.pt"})
    with pytest.raises(ValueError, match="metric 'similarity', expected 'match'"):
        scores_in(folder).begin(index, MADE_BY | {"metric": "match"})
    with pytest.raises(ValueError, match="weights_sha256 '0', expected '1'"):
        scores_in(folder).begin(index, MADE_BY | {"weights_sha256": "1"})


def test_wrong_scores_are_not_written(table):
    index, folder = table
    part = sidecar.part(index, 0)
    for wrong in (np.zeros(9, np.float32), np.zeros(10)):
        with pytest.raises(ValueError, match=r"expected float32 \(10,\)"):
            write_scores(scores_in(folder), part, wrong)


# What is kept


def kept_rows(index, folder, **rule):
    return np.asarray(kept(index, folder, **rule).rows).tolist()


def test_kept(table):
    index, folder = table
    assert kept_rows(index, folder) == list(range(NUM_SAMPLES))
    assert kept_rows(index, folder, min_score=0.07) == list(range(7, NUM_SAMPLES))
    # ceil(0.3 * 23) = 7
    assert kept_rows(index, folder, keep_fraction=0.3) == list(range(16, NUM_SAMPLES))
    assert kept_rows(index, folder, keep_fraction=0.3, min_score=0.2) == [20, 21, 22]
    assert kept_rows(index, folder, keep_fraction=0.3, min_score=0.1) == list(range(16, 23))
    assert kept_rows(index, folder, keep_fraction=1e-9) == [22]


def test_share_is_of_the_selection(table):
    index, folder = table
    odd = index.where({"parity": "odd"})
    # ceil(0.25 * 11) = 3 of 1, 3, .., 21
    assert kept_rows(odd, folder, keep_fraction=0.25) == [17, 19, 21]
    even = index.where({"parity": "even"})
    assert kept_rows(even, folder, keep_fraction=0.25) == [18, 20, 22]


def test_ties_and_unread_samples(tmp_path):
    index = Index.open(write_set(tmp_path, 8))
    scores = np.array([0.5, np.nan, 0.9, 0.5, -0.0, 0.5, 0.0, np.nan])
    folder = write_all(index, tmp_path / "scores", scores)
    # Two of six: the second ties with two others.
    assert kept_rows(index, folder, keep_fraction=0.3) == [0, 2, 3, 5]
    assert kept_rows(index, folder, min_score=0.0) == [0, 2, 3, 4, 5, 6]
    assert kept_rows(index, folder) == [0, 2, 3, 4, 5, 6]


def test_kept_rows_are_written_once(table, monkeypatch):
    index, folder = table
    first = kept_rows(index, folder, keep_fraction=0.3)
    monkeypatch.setattr(scores_module, "_write_kept", None)
    assert kept_rows(index, folder, keep_fraction=0.3) == first
    with pytest.raises(TypeError):
        kept_rows(index, folder, keep_fraction=0.31)
    with pytest.raises(TypeError):
        kept_rows(index.where({"parity": "odd"}), folder, keep_fraction=0.3)


def test_scores_of_other_data(table, tmp_path):
    _, folder = table
    (tmp_path / "other").mkdir()
    fewer = Index.open(write_set(tmp_path / "other", 22))
    with pytest.raises(ValueError, match=r"scores of 23 samples, .* has 22"):
        kept(fewer, folder)
    (tmp_path / "renamed").mkdir()
    path = write_set(tmp_path / "renamed", NUM_SAMPLES)
    renamed = Index.open(path.rename(path.with_name("val.jsonl")))
    with pytest.raises(ValueError, match="other names or sizes"):
        kept(renamed, folder)


def test_a_copy_is_the_same_data(table, tmp_path):
    _, folder = table
    shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-copy"))
    copy = Index.open(tmp_path.with_name(tmp_path.name + "-copy") / "set.jsonl")
    assert kept_rows(copy, folder, min_score=0.2) == [20, 21, 22]
    moved = tmp_path.with_name(tmp_path.name + "-copy") / "scores"
    assert scores_in(moved).identity() == scores_in(folder).identity()


def test_unfinished_and_damaged_scores(table):
    index, folder = table
    np.save(folder / "000001.npy", np.zeros(9, np.float32))
    with pytest.raises(ValueError, match=r"000001.npy: expected float32 \(10,\)"):
        kept(index, folder, min_score=0.1)
    (folder / "000001.npy").unlink()
    with pytest.raises(ValueError, match=r"has no 000001.npy: run `vlpfast data score` to its end"):
        kept(index, folder, min_score=0.1)
    (folder / "scores.json").unlink()
    with pytest.raises(ValueError, match="no folder of scores"):
        kept(index, folder)
    assert not list(index.folder.glob("kept-*"))


def test_nothing_kept(table):
    index, folder = table
    with pytest.raises(ValueError, match=r"score of at least 0.5; .* in \[0.0, 0.2199"):
        kept(index, folder, min_score=0.5)
    scores = np.full(NUM_SAMPLES, np.nan)
    none = write_all(index, folder.with_name("none"), scores)
    with pytest.raises(ValueError, match="no score to keep by"):
        kept(index, none, keep_fraction=0.5)


# In a run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "s", "keep_fraction": 0.0}, r"keep_fraction must be in \(0, 1\], got 0"),
        ({"scores": "s", "keep_fraction": 1.01}, "keep_fraction must be"),
        ({"scores": "s", "keep_fraction": math.nan}, "keep_fraction must be"),
        ({"keep_fraction": 0.5}, "name their folder in scores"),
        ({"min_score": 0.28}, "name their folder in scores"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(path="x", **options)


@pytest.mark.parametrize("window", [0, 4])
def test_an_epoch_is_the_kept_samples(table, window):
    index, folder = table
    config = DataConfig(
        path=str(index.source),
        scores=str(folder),
        keep_fraction=0.5,
        where=("parity=even",),
        loader="torch",
        workers=1,
        max_tokens=16,
        vocab_size=300,
        window=window,
    )
    chosen = open_index(config)
    # ceil(0.5 * 12) of 0, 2, .., 22
    wanted = [12, 14, 16, 18, 20, 22]
    options = {
        "tokenizer": make_tokenizer(config, chosen),
        "image_size": 16,
        "batch_size": 1,
        "seed": 3,
        "world": 2,
    }
    loaders = [make_loader(chosen, config, rank=rank, **options) for rank in (0, 1)]
    streams = [iter(loader) for loader in loaders]
    for _ in range(3):
        epoch = [next(s).sample_ids for _ in range(3) for s in streams]
        assert sorted(chosen.record(int(i))["number"] for i in epoch) == wanted
    for loader in loaders:
        loader.close()
    assert open_index(config.unfiltered()).num_samples == NUM_SAMPLES
