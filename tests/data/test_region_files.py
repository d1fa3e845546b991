"""Detectors' files: both TSV layouts and UNITER's LMDB become the table that their arrays say, in
the order of the index; what is missing or broken is named and left out.
"""

import base64
import io
import json

import numpy as np
import pytest

from tests._images import write_set
from vlpfast import cli
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import open_index
from vlpfast.data.region_files import RegionLmdb, RegionTsv, write_regions
from vlpfast.data.regions import RegionTable, open_regions

WIDTH, HEIGHT, DIM = 40, 32, 5


@pytest.fixture
def source(tmp_path):
    return write_set(tmp_path, 4, width=WIDTH, height=HEIGHT)


def detections(number: int) -> dict[str, np.ndarray]:
    """What a detector would say of image `number`."""
    rng = np.random.default_rng(number)
    count = number + 1
    corners = np.sort(rng.random((count, 2, 2)), 1) * [WIDTH, HEIGHT]
    return {
        "objects_id": rng.integers(0, 1600, count),
        "objects_conf": rng.random(count, np.float32),
        "attrs_id": rng.integers(0, 400, count),
        "attrs_conf": rng.random(count, np.float32),
        "boxes": corners.reshape(count, 4).astype(np.float32),
        "features": rng.random((count, DIM), np.float32),
    }


def tsv_line(number: int, name: str, *, lxmert: bool) -> str:
    found = detections(number)
    text = {key: base64.b64encode(array.tobytes()).decode() for key, array in found.items()}
    count = str(len(found["features"]))
    if not lxmert:
        cells = (name, str(WIDTH), str(HEIGHT), count, text["boxes"], text["features"])
    else:
        objects = [text[k] for k in ("objects_id", "objects_conf", "attrs_id", "attrs_conf")]
        cells = (name, str(HEIGHT), str(WIDTH), *objects, count, text["boxes"], text["features"])
    return "\t".join(cells) + "\n"


def uniter_arrays(number: int) -> dict[str, np.ndarray]:
    found = detections(number)
    corners = found["boxes"] / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    boxes = np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1)
    labels = np.random.default_rng(number).dirichlet(np.ones(7), len(corners))
    arrays = {"features": found["features"], "norm_bb": boxes, "soft_labels": labels}
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def packed(arrays: dict[str, np.ndarray], *, compressed: bool) -> bytes:
    if compressed:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()
    msgpack, msgpack_numpy = pytest.importorskip("msgpack"), pytest.importorskip("msgpack_numpy")
    return msgpack.packb(arrays, default=msgpack_numpy.encode, use_bin_type=True)


def write_lmdb(folder, values: dict[str, bytes]):
    lmdb = pytest.importorskip("lmdb")
    values = values | {"__keys__": json.dumps(list(values)).encode()}
    with (
        lmdb.open(str(folder), map_size=2**24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for name, value in values.items():
            transaction.put(name.encode(), value)
    return folder


def table_of(source, files, **options) -> tuple[RegionTable, dict]:
    folder = source.with_name(source.name + ".regions")
    summary = write_regions(Index.open(source), files, folder, progress=False, **options)
    return RegionTable.open(folder, 4), summary


@pytest.mark.parametrize("lxmert", [True, False])
def test_tsv_becomes_a_table(tmp_path, source, lxmert):
    # In two files, in another order, in upper case, called by a field.
    for part, numbers in (("a", (3, 0)), ("b", (2, 1))):
        lines = "".join(tsv_line(n, str(n), lxmert=lxmert) for n in numbers)
        (tmp_path / f"{part}.tsv").write_text(lines)
    files = RegionTsv([tmp_path / "a.tsv", tmp_path / "b.tsv"], progress=False)
    table, summary = table_of(source, files, name_key="number")
    assert (summary["num_images"], summary["num_regions"], summary["num_without"]) == (4, 10, 0)
    for number in range(4):
        found, expected = table.at(np.array([number])), detections(number)
        np.testing.assert_allclose(found.features.values, expected["features"], rtol=1e-3)
        fractions = expected["boxes"] / [WIDTH, HEIGHT, WIDTH, HEIGHT]
        np.testing.assert_allclose(found.boxes, fractions, rtol=1e-6)
        if not lxmert:
            assert found.labels is None
            assert found.attributes is None
            continue
        for shares, what in ((found.labels, "objects"), (found.attributes, "attrs")):
            confidence, ids = shares[:, 1:].max(1)
            assert ids.tolist() == expected[f"{what}_id"].tolist()
            np.testing.assert_allclose(confidence, expected[f"{what}_conf"], rtol=1e-3, atol=1e-7)
            np.testing.assert_allclose(shares.sum(1), np.ones(number + 1), rtol=2e-3)


@pytest.mark.parametrize("compressed", [True, False])
def test_lmdb_becomes_a_table(tmp_path, source, compressed):
    values = {f"{n}.npz": packed(uniter_arrays(n), compressed=compressed) for n in range(4)}
    table, summary = table_of(source, RegionLmdb(write_lmdb(tmp_path / "db", values)))
    assert summary["num_regions"] == 10
    for number in range(4):
        found, expected = table.at(np.array([number])), uniter_arrays(number)
        np.testing.assert_array_equal(found.features.values, expected["features"])
        np.testing.assert_array_equal(found.boxes, expected["norm_bb"][:, :4])
        np.testing.assert_array_equal(found.labels, expected["soft_labels"])


def test_what_is_missing_or_broken_is_named_and_left_out(tmp_path, source):
    cells = tsv_line(2, "2", lxmert=False).split("\t")
    cut = "\t".join([*cells[:-1], cells[-1].rstrip("\n")[:-8] + "\n"])
    name, width, *others = tsv_line(3, "3", lxmert=False).split("\t")
    flat = "\t".join([name, width, "wide", *others[1:]])
    lines = [tsv_line(0, "0", lxmert=False), cut, flat]
    (tmp_path / "regions.tsv").write_text("".join(lines))
    table, summary = table_of(source, RegionTsv([tmp_path / "regions.tsv"], progress=False))
    assert summary["num_without"] == 3
    assert summary["without"]["1.png"] == "the files do not have '1'"
    assert "features: not base64 of 3 rows" in summary["without"]["2.png"]
    assert summary["without"]["3.png"] == "height: expected a number > 0, got b'wide'"
    assert np.diff(table.offsets).tolist() == [1, 0, 0, 0]
    written = source.with_name(source.name + ".regions") / "without.json"
    assert json.loads(written.read_text()) == summary["without"]
    index = open_index(DataConfig(path=str(source), regions="files"))
    assert [index.name(i) for i in range(len(index))] == ["0.png"]


def test_images_of_other_widths_are_left_out(tmp_path, source):
    values = {f"{n}.npz": packed(uniter_arrays(n), compressed=True) for n in range(4)}
    wrong = uniter_arrays(1) | {"features": np.zeros((2, DIM + 1), np.float16)}
    values["1.npz"] = packed(wrong, compressed=True)
    values["2.npz"] = values["2.npz"][:-100]
    values["3.npz"] = packed({"features": np.zeros((1, DIM))}, compressed=True)
    _, summary = table_of(source, RegionLmdb(write_lmdb(tmp_path / "db", values)))
    assert "expected widths" in summary["without"]["1.png"]
    assert "not an npz archive" in summary["without"]["2.png"]
    assert "expected features and norm_bb" in summary["without"]["3.png"]


def test_the_command_writes_what_training_reads(tmp_path, source, capsys):
    paths = [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    for path, numbers in zip(paths, ((3, 0), (2,)), strict=True):
        path.write_text("".join(tsv_line(n, str(n), lxmert=True) for n in numbers))
    assert cli.main(["data", "regions", str(source), *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert "num_regions: 8" in out
    assert "without: 1.png: the files do not have '1'" in out
    index = open_index(DataConfig(path=str(source), regions="files"))
    assert open_regions(index, "files").at(index.rows).features.lens.tolist() == [1, 3, 4]
    assert cli.main(["data", "regions", str(source), str(tmp_path / "none.tsv")]) != 0
    assert "expected TSV files, or one LMDB folder" in capsys.readouterr().err


def test_files_that_cannot_be_used(tmp_path, source):
    path = tmp_path / "regions.tsv"
    path.write_text("img_id\timg_h\n")
    with pytest.raises(ValueError, match=r"regions\.tsv:1: expected 6 columns .* found 2"):
        RegionTsv([path], progress=False)
    path.write_text(tsv_line(0, "another", lxmert=True))
    with pytest.raises(ValueError, match=r"no image has regions; first reason: 0\.png"):
        table_of(source, RegionTsv([path], progress=False))
    with pytest.raises(ValueError, match="has no field 'img_id', found"):
        table_of(source, RegionTsv([path], progress=False), name_key="img_id")
