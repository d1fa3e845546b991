"""The index: every source format, every kind of damage, staleness, selections, tokens."""

import csv
import json
import os
import re
import struct
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from tests._images import encode, picture, write_jsonl, write_set, write_tar
from vlpfast.data import index as index_module
from vlpfast.data.build import atomic, locked, stable_id
from vlpfast.data.decode import decode_rgb, inspect
from vlpfast.data.index import Index
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.data.tools import pack

JPEG = encode(picture(0), "JPEG")
PNG = encode(picture(1), "PNG")


def _json(**fields) -> bytes:
    return json.dumps(fields).encode()


# Formats


def test_jsonl(tmp_path):
    index = Index.open(write_set(tmp_path, 7))
    assert (index.num_samples, index.num_captions) == (7, 13)
    assert index.captions(2) == [f"caption {c} of picture 2" for c in range(3)]
    assert index.record(2) == {"number": 2, "parity": "even"}
    assert index.name(2) == "2.png"
    assert index.image_bytes(2) == (tmp_path / "2.png").read_bytes()
    assert index.image_ids.tolist() == list(range(7))
    assert index.column("width").tolist() == [40] * 7
    assert index.column("height").tolist() == [32] * 7
    assert index.invalid == {}
    assert list(index.iter_captions())[:3] == [
        "caption 0 of picture 0",
        "caption 0 of picture 1",
        "caption 1 of picture 1",
    ]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    ("image_key", "caption_key", "names"),
    [
        ("filepath", "title", {}),
        ("image", "caption", {}),
        ("url", "text", {"image_key": "url", "caption_key": "text"}),
    ],
)
def test_csv(tmp_path, suffix, image_key, caption_key, names):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = tmp_path / f"set{suffix}"
    caption = 'a "red", two-line\nköttbulle' if suffix == ".csv" else 'a "red", köttbulle'
    with path.open("w", newline="", encoding="utf-8") as file:
        if suffix == ".csv":
            csv.writer(file).writerows([[image_key, caption_key, "size"], ["a.jpg", caption, "3"]])
        else:
            file.write(f"{image_key}\t{caption_key}\tsize\r\na.jpg\t{caption}\t3\r\n")
    index = Index.open(path, **names)
    assert index.captions(0) == [caption]
    assert index.record(0) == {"size": "3"}


def test_quotes_in_tsv(tmp_path):
    """A quotation mark that begins a caption is part of it, and does not take in the next rows."""
    (tmp_path / "0.jpg").write_bytes(JPEG)
    captions = ['"Stop" says the sign', '"never closed', "third"]
    rows = "".join(f"{caption}\t0.jpg\n" for caption in captions)
    (tmp_path / "set.tsv").write_text(f"caption\timage\n{rows}")
    assert list(Index.open(tmp_path / "set.tsv").iter_captions()) == captions


def test_json_list(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    rows = [{"image": "a.jpg", "caption": ["one", "two"], "image_id": 17}]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    index = Index.open(tmp_path / "set.json")
    assert index.captions(0) == ["one", "two"]
    assert index.image_ids.tolist() == [17]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats(tmp_path, format):
    long = "d/" + "n" * (90 if format == tarfile.USTAR_FORMAT else 150)
    members = [
        ("a.jpg", JPEG),
        ("a.txt", b"with text\n"),
        ("b.JPG", JPEG),
        ("b.json", _json(caption="with json", x=1)),
        ("dir/c.PnG", PNG),
        ("dir/c.json", _json(captions=["one", "two"])),
        ("dir/c.cls", b"7"),
        (f"{long}.jpg", JPEG),
        (f"{long}.txt", "long ñame".encode()),
    ]
    index = Index.open(write_tar(tmp_path / "x.tar", members, format))
    assert index.num_samples == 4
    assert [index.captions(i) for i in range(4)] == [
        ["with text"],
        ["with json"],
        ["one", "two"],
        ["long ñame"],
    ]
    assert index.record(1) == {"x": 1}
    assert index.name(2) == "x.tar/dir/c.PnG"
    assert [index.image_bytes(i) for i in range(4)] == [JPEG, JPEG, PNG, JPEG]


def test_folder_of_shards(tmp_path):
    for shard in range(3):
        members = [
            m
            for i in range(2)
            for m in ((f"{i}.png", PNG), (f"{i}.json", _json(caption=f"{shard}/{i}")))
        ]
        write_tar(tmp_path / f"{shard}.tar", members)
    index = Index.open(tmp_path)
    assert [index.captions(i)[0] for i in range(6)] == ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]
    assert index.name(5) == "2.tar/1.png"


# Damage

_DAMAGE = {
    "empty": (b"", "empty"),
    "zeros": (bytes(500), "not an image"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not an image"),
    "cut_jpeg": (JPEG[:-20], "truncated JPEG"),
    "cut_half": (JPEG[: len(JPEG) * 3 // 4], "truncated JPEG"),
    "cut_header": (JPEG[:30], "not an image|truncated"),
    "cut_png": (PNG[:-20], "truncated PNG"),
    "cut_webp": (encode(picture(2), "WEBP")[:-40], "truncated WEBP|not an image"),
}


@pytest.mark.parametrize("kind", list(_DAMAGE))
@pytest.mark.parametrize("container", ["tar", "jsonl"])
def test_damaged_images(tmp_path, kind, container):
    data, reason = _DAMAGE[kind]
    if container == "tar":
        members = [("0.jpg", JPEG), ("0.txt", b"good"), ("1.jpg", data), ("1.txt", b"bad")]
        index = Index.open(write_tar(tmp_path / "x.tar", members))
    else:
        (tmp_path / "0.jpg").write_bytes(JPEG)
        (tmp_path / "1.jpg").write_bytes(data)
        rows = [{"image": f"{i}.jpg", "caption": "c"} for i in range(2)]
        index = Index.open(write_jsonl(tmp_path / "set.jsonl", rows))
    assert index.num_samples == 1
    assert list(index.invalid) == ["1.jpg"]
    with pytest.raises(ValueError, match=reason) as error:
        inspect(data)
    assert index.invalid["1.jpg"] == str(error.value)


def test_thumbnail_does_not_hide_truncation():
    """The end marker of an EXIF thumbnail is not the image's."""
    thumbnail = encode(picture(3).resize((8, 8)), "JPEG")
    segment = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    whole = JPEG[:2] + segment + JPEG[2:]
    assert inspect(whole) == (40, 32, True)
    with pytest.raises(ValueError, match="truncated"):
        inspect(whole[:-10])
    assert inspect(whole + bytes(10_000)) == (40, 32, True)


def test_verify_decode_finds_damage_inside(tmp_path):
    broken = bytearray(PNG)
    broken[len(PNG) // 2] ^= 0xFF  # the zlib checksum no longer fits
    assert inspect(bytes(broken))[:2] == (40, 32)
    members = [("0.png", PNG), ("0.txt", b"a"), ("1.png", bytes(broken)), ("1.txt", b"b")]
    path = write_tar(tmp_path / "x.tar", members)
    assert Index.open(path, verify="header").num_samples == 2
    index = Index.open(path, verify="decode")
    assert index.num_samples == 1
    assert "does not decode" in index.invalid["1.png"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.jpg", JPEG), ("1.txt", b"  \n")], "empty caption"),
        ([("1.jpg", JPEG), ("1.txt", b"caf\xe9")], "not UTF-8"),
        ([("1.jpg", JPEG), ("1.json", b'{"caption": "caf\xe9"}')], "not UTF-8"),
        ([("1.jpg", JPEG), ("1.json", b'{"caption": "\\ud800"}')], "not UTF-8"),
        ([("1.jpg", JPEG), ("1.json", b"{caption")], "not JSON"),
        ([("1.jpg", JPEG), ("1.json", b"[1]")], "not an object"),
        ([("1.jpg", JPEG), ("1.json", _json(captions=[]))], "empty caption"),
        ([("1.jpg", JPEG)], "no caption"),
        ([("1.txt", b"alone")], "no image"),
    ],
)
def test_damaged_captions(tmp_path, members, reason):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", JPEG), ("0.txt", b"good"), *members])
    index = Index.open(path)
    assert index.num_samples == 1
    assert [reason in r for r in index.invalid.values()] == [True]


def test_interleaved_members_are_named(tmp_path):
    names = ["a.jpg", "b.jpg", "a.txt", "b.txt"]
    data = {"jpg": JPEG, "txt": b"text"}
    write_tar(tmp_path / "x.tar", [(n, data[n[-3:]]) for n in names])
    index = Index.open(tmp_path / "x.tar", allow_empty=True)
    assert index.num_samples == 0
    assert list(index.invalid) == ["a.jpg", "b.jpg", "x.tar/a", "x.tar/b"]
    with pytest.raises(ValueError, match="no valid sample"):
        Index.open(tmp_path / "x.tar")


@pytest.mark.parametrize("keep", [700, 1200, 2000, 3300, 4900])
def test_cut_tar(tmp_path, keep):
    members = [m for i in range(3) for m in ((f"{i}.jpg", JPEG), (f"{i}.txt", b"text"))]
    path = write_tar(tmp_path / "x.tar", members, tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    index = Index.open(path, allow_empty=True)
    assert index.num_samples < 3
    assert index.invalid
    for i in range(index.num_samples):
        assert index.image_bytes(i) == JPEG
        assert index.captions(i) == ["text"]


_LOST = {
    "damaged_header": (lambda tar, at: tar[:at] + b"\xff" * 8 + tar[at + 8 :], "damaged or cut"),
    "cut_header": (lambda tar, at: tar[: at + 100], "damaged or cut"),
    "no_end_marker": (lambda tar, at: tar[:at], "without an end marker"),
    "zero_block": (lambda tar, at: tar[:at] + bytes(512) + tar[at:], "behind the end marker"),
    "concatenated": (lambda tar, at: tar[:at] + bytes(10240) + tar, "behind the end marker"),
}


@pytest.mark.parametrize("kind", list(_LOST))
def test_lost_members_are_named(tmp_path, kind):
    """What tarfile takes for the end of an archive, though samples lie behind it."""
    damage, reason = _LOST[kind]
    members = [m for i in range(3) for m in ((f"{i}.jpg", JPEG), (f"{i}.txt", b"text"))]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path) as tar:
        offset = tar.getmember("1.jpg").offset
    damaged = damage(path.read_bytes(), offset)
    path.write_bytes(damaged)
    index = Index.open(path)
    assert index.num_samples == 1
    assert list(index.invalid) == ["x.tar"]
    assert f"beyond byte {offset} of {len(damaged)}" in index.invalid["x.tar"]
    assert reason in index.invalid["x.tar"]


@pytest.mark.parametrize("num_zeros", [512, 1024, 10240, 3 * 2**20])
def test_end_of_tar(tmp_path, num_zeros):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", JPEG), ("0.txt", b"text")])
    with tarfile.open(path) as tar:
        end = (tar.getmember("0.txt").offset_data // 512 + 1) * 512
    path.write_bytes(path.read_bytes()[:end] + bytes(num_zeros))
    index = Index.open(path)
    assert (index.num_samples, index.invalid) == (1, {})


def test_cut_text_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", JPEG), ("0.txt", b"a longer text")])
    with tarfile.open(path) as tar:
        end = tar.getmember("0.txt").offset_data + 8
    path.write_bytes(path.read_bytes()[:end])
    index = Index.open(path, allow_empty=True)
    assert index.num_samples == 0
    assert "inside a text" in index.invalid["0.jpg"]


def test_not_a_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nonsense" * 200)
    with pytest.raises(ValueError, match=r"x.tar: no valid sample.*cannot be read"):
        Index.open(tmp_path / "x.tar")


def test_missing_image_is_named(tmp_path):
    path = write_set(tmp_path, 3)
    (tmp_path / "1.png").unlink()
    index = Index.open(path)
    assert index.num_samples == 2
    assert index.invalid == {"1.png": f"missing file: {tmp_path / '1.png'}"}
    assert index.captions(1) == ["caption 0 of picture 2", *index.captions(1)[1:]]


# Usage errors


_MISFITS = [
    ({"img": "0.jpg", "caption": "c"}, r"no key with an image path.*\['caption'"),
    ({"image": "0.jpg", "text": "c"}, r"no key with a caption.*'image', 'text'"),
    ({"image": "0.jpg", "caption": 3}, r"'caption' must be a string.*got 3"),
    ({"image": 3, "caption": "c"}, r"'image' must be a path, got 3"),
    ([1], r"expected a JSON object, found list"),
]


@pytest.mark.parametrize(("row", "message"), _MISFITS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_wrong_keys_are_named(tmp_path, suffix, row, message):
    path = tmp_path / f"set{suffix}"
    path.write_text(json.dumps(row) if suffix == ".jsonl" else json.dumps([row]))
    place = r"set.jsonl:1: " if suffix == ".jsonl" else r"set.json\[0\]: "
    with pytest.raises(
        ValueError, match=place + message + ".*--data.image-key.*--data.caption-key"
    ):
        Index.open(path)
    assert not list(tmp_path.glob("*.index*/")), "a failed build leaves nothing behind"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *((json.dumps(row), message) for row, message in _MISFITS),
        ('{"image": "0.jpg", "caption": null}', "empty caption"),
        ('{"image": "0.jpg", "captions": [null]}', "empty caption"),
        ('{"image": "\\ud800.jpg", "caption": "c"}', "path is not UTF-8"),
        ('{"image": "0.jpg", "capt', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_one_bad_row_is_left_out(tmp_path, row, message):
    (tmp_path / "0.jpg").write_bytes(JPEG)
    good = json.dumps({"image": "0.jpg", "caption": "c"})
    (tmp_path / "set.jsonl").write_text(f"{good}\n{row}\n{good}\n")
    index = Index.open(tmp_path / "set.jsonl")
    assert index.num_samples == 2
    ((name, reason),) = index.invalid.items()
    assert name in ("0.jpg", f"{tmp_path}/set.jsonl:2")
    assert re.search(message, reason)


def test_nulls_among_captions(tmp_path):
    (tmp_path / "0.jpg").write_bytes(JPEG)
    row = {"image": "0.jpg", "captions": ["one", None, "two"]}
    assert Index.open(write_jsonl(tmp_path / "set.jsonl", [row])).captions(0) == ["one", "two"]


def test_keys_of_records_in_shards(tmp_path):
    good = [("0.jpg", JPEG), ("0.json", _json(caption="c"))]
    for name, fields, message in [
        ("1", {"text": "c"}, "no 'caption' or 'captions' key, found \\['text'\\]"),
        ("2", {"caption": 3}, "must be a string"),
    ]:
        bad = [(f"{name}.jpg", JPEG), (f"{name}.json", _json(**fields))]
        with pytest.raises(ValueError, match=rf"{name}.jpg: .*{message}"):
            Index.open(write_tar(tmp_path / f"first-{name}.tar", [*bad, *good]))
        index = Index.open(write_tar(tmp_path / f"second-{name}.tar", [*good, *bad]))
        assert index.num_samples == 1
        assert re.search(message, index.invalid[f"{name}.jpg"])


def test_long_fields_of_csv(tmp_path):
    (tmp_path / "0.jpg").write_bytes(JPEG)
    path = tmp_path / "set.csv"
    rows = ["image,caption,more", "0.jpg,long," + "x" * 200_000]
    rows += ["0.jpg,too long," + "x" * (2**24 + 1), "0.jpg,short,x"]
    path.write_text("\n".join(rows))
    index = Index.open(path)
    assert list(index.iter_captions()) == ["long", "short"]
    assert "field larger than field limit" in index.invalid[f"{path}:3"]


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Index.open(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"without \*.tar shards"):
        Index.open(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown format"):
        Index.open(tmp_path / "x.zip")
    (tmp_path / "x.jsonl").write_text("{nope\n")
    with pytest.raises(ValueError, match=r"x.jsonl:1: not JSON"):
        Index.open(tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a list of objects, found dict"):
        Index.open(tmp_path / "x.json")


# Staleness, selections, tokens


def test_built_once_and_rebuilt_when_stale(tmp_path, monkeypatch, caplog):
    path = write_set(tmp_path, 3)
    Index.open(path)
    built = []
    build = index_module.build_tables
    monkeypatch.setattr(
        index_module, "build_tables", lambda *a, **k: (built.append(1), build(*a, **k))
    )
    assert Index.open(path).num_samples == 3
    assert not built
    with path.open("a") as file:
        file.write(json.dumps({"image": "0.png", "caption": "again"}) + "\n")
    assert Index.open(path).num_samples == 4
    assert len(built) == 1
    assert "is stale (fingerprint changed): rebuilding" in caplog.text
    os.utime(path, ns=(1, 1))
    Index.open(path)
    Index.open(path, verify="decode")
    assert len(built) == 3
    Index.open(path, verify="header")
    assert len(built) == 3


def test_where_and_ids(tmp_path):
    index = Index.open(write_set(tmp_path, 7))
    odd = index.where({"parity": "odd"})
    assert [odd.record(i)["number"] for i in range(odd.num_samples)] == [1, 3, 5]
    assert odd.image_ids.tolist() == [1, 3, 5]
    assert odd.captions(1) == index.captions(3)
    assert index.where({"number": ["2", "5"], "parity": "odd"}).num_samples == 1
    with pytest.raises(ValueError, match=r"no sample has.*fields are \['number', 'parity'\]"):
        index.where({"parity": "none"})
    ids = index.with_ids("parity").image_ids
    assert len(set(ids.tolist())) == 2
    assert ids[1] == ids[3] == stable_id("odd")
    assert odd.with_ids("parity").image_ids.tolist() == [stable_id("odd")] * 3
    with pytest.raises(ValueError, match=r"0.png has no field 'none', found"):
        index.with_ids("none")


@pytest.mark.parametrize("nothing", [{}, {"image_id": None}, {"image_id": ""}])
def test_rows_without_identity(tmp_path, nothing):
    """A row without identity is like no other, those with one included."""
    (tmp_path / "0.jpg").write_bytes(JPEG)
    row = {"image": "0.jpg", "caption": "c"}
    rows = [row | nothing, row | {"image_id": 0}, row | nothing, row | {"image_id": 2}]
    rows += [row | {"image_id": 0}, row | {"image_id": "x"}]
    index = Index.open(write_jsonl(tmp_path / "some.jsonl", rows))
    ids = index.image_ids.tolist()
    assert len(set(ids)) == 5
    assert ids[1] == ids[4] == 0
    assert (ids[3], ids[5]) == (2, stable_id("x"))
    assert min(ids) >= 0
    none = Index.open(write_jsonl(tmp_path / "none.jsonl", [row | nothing] * 3))
    assert none.image_ids.tolist() == [0, 1, 2]
    if nothing:
        assert len(set(index.with_ids("image_id").image_ids.tolist())) == 5
    pack(tmp_path / "some.jsonl", tmp_path / "packed")
    assert Index.open(tmp_path / "packed").image_ids.tolist() == ids


def test_rows_without_captions_are_known_by_their_images(tmp_path):
    (tmp_path / "0.jpg").write_bytes(JPEG)
    ids = [{"image_id": 0}, {"image_id": ""}, {}, {"image_id": None}]
    path = write_jsonl(tmp_path / "set.jsonl", [{"image": "0.jpg"} | row for row in ids])
    index = Index.open(path, require_captions=False)
    assert index.image_ids.tolist() == [0] + [stable_id("0.jpg")] * 3


def test_stable_ids():
    assert stable_id(5) == 5
    assert stable_id("5") != 5
    # The hash is part of the format of what is stored.
    assert stable_id("dog") == 7824293080659498834
    assert all(0 <= stable_id(v) < 2**63 for v in ("", "ñ", "\ud800", [1, 2], 3.5, True, -4, 2**63))


def test_tokens(tmp_path):
    index = Index.open(write_set(tmp_path, 7))
    tokenizer = Tokenizer.train(index.iter_captions(), 300)
    table = index.tokens(tokenizer, 12)
    first, count = index.caption_ranges(np.array([2, 0]))
    assert (first.tolist(), count.tolist()) == ([3, 0], [3, 1])
    text = table.ragged(first)
    expected = tokenizer.encode([index.captions(2)[0], index.captions(0)[0]], 12)
    assert text.values.tolist() == expected[0] + expected[1]
    assert text.cu_seqlens.tolist() == [0, len(expected[0]), len(expected[0]) + len(expected[1])]
    assert text.max_len == max(map(len, expected))
    # Cached by tokenizer and length.
    assert index.tokens(tokenizer, 12).values.tolist() == table.values.tolist()
    assert len(index.tokens(tokenizer, 4).values) == 4 * 13
    odd = index.where({"parity": "odd"})
    (start,), _ = odd.caption_ranges(np.array([0]))
    assert start == 1


def test_built_by_one_of_many(tmp_path, monkeypatch):
    """Openers at the same time wait for the one that builds: the lock holds for threads too."""
    path = write_set(tmp_path, 20)
    built = []
    build = index_module.build_tables
    monkeypatch.setattr(
        index_module, "build_tables", lambda *a, **k: (built.append(1), build(*a, **k))
    )
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda _: Index.open(path).num_samples, range(4)))
    assert sizes == [20] * 4
    assert len(built) == 1


def test_tokens_are_written_by_one_of_many(tmp_path, monkeypatch):
    index = Index.open(write_set(tmp_path, 20))
    tokenizer = Tokenizer.train(index.iter_captions(), 300)
    encoded, encode_all = [], tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda *a: (encoded.append(1), time.sleep(0.1), encode_all(*a))[2]
    )
    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(lambda _: index.tokens(tokenizer, 12), range(4)))
    assert len(encoded) == 1
    assert all(t.values.tolist() == tables[0].values.tolist() for t in tables)


def test_temporary_paths_of_equal_processes_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with atomic(tmp_path / "x") as first, atomic(tmp_path / "x") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    targets = ("a", "a.index", "a.index.index")
    left = {}
    for target in targets:
        with atomic(tmp_path / target) as temporary:
            temporary.write_text("")
        left[target] = temporary
        temporary.mkdir()
        (temporary / "size.npy").write_bytes(b"")
    with locked(tmp_path / "a.index"):
        assert left["a.index"].exists(), "new: its writer may live"
    for path in left.values():
        os.utime(path, (1, 1))
    with locked(tmp_path / "a.index"):
        assert not left["a.index"].exists()
    assert all(left[target].exists() for target in targets if target != "a.index")


# Decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1", "LA", "RGBA", "I;16"])
def test_modes_become_rgb(mode):
    image = picture(4)
    gray = np.asarray(image.convert("L"))
    expected, tolerance = np.asarray(image), 0.0
    if mode == "RGBA":
        image.putalpha(128)
        expected = (expected.astype(float) * 128 + 255 * 127) / 255
        data, tolerance = encode(image, "PNG"), 1.0
    elif mode == "CMYK":
        data, tolerance = encode(image.convert("CMYK"), "TIFF"), 1.0
    elif mode == "P":
        paletted = image.quantize(64)
        expected, data = np.asarray(paletted.convert("RGB")), encode(paletted, "PNG")
    elif mode == "1":
        expected = np.asarray(image.convert("1").convert("RGB"))
        data = encode(image.convert("1"), "PNG")
    elif mode == "I;16":
        data = encode(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")
        expected = np.repeat(gray[..., None], 3, -1)
    elif mode in ("L", "LA"):
        data = encode(image.convert(mode), "PNG")
        expected = np.repeat(gray[..., None], 3, -1)
    else:
        data = encode(image, "PNG")
    decoded = np.asarray(decode_rgb(data)).astype(float)
    assert decoded.shape == (32, 40, 3)
    assert np.abs(decoded - expected).max() <= tolerance
    plain = inspect(data)[2]
    assert plain == (mode in ("RGB", "L", "P", "1"))


def test_transparent_is_white():
    image = picture(5).convert("RGBA")
    image.putalpha(0)
    for data in (encode(image, "PNG"), encode(image.quantize(16), "PNG")):
        assert (np.asarray(decode_rgb(data)) == 255).all()
        assert not inspect(data)[2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(6), "JPEG", exif=exif)
    width, height, plain = inspect(data)
    assert decode_rgb(data).size == (width, height)
    assert (width, height) == ((40, 32) if orientation < 5 else (32, 40))
    assert plain


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_sizes_agree(format, orientation):
    """The index's size is the decoded one, wherever a format keeps its orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(6), format, exif=exif)
    size = (40, 32) if orientation < 5 else (32, 40)
    assert inspect(data)[:2] == inspect(data, full=True)[:2] == decode_rgb(data).size == size
    if format == "PNG":
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        last = data.index(b"IEND") - 4
        late = data[:start] + data[end:last] + data[start:end] + data[last:]
        assert inspect(late)[:2] == decode_rgb(late).size == size


def test_orientation_beside_odd_tags():
    """Only the orientation is read of the EXIF, and nothing is written from it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    data = encode(picture(6), "JPEG", exif=exif)
    # The entry of the maker, a string, says that it is an XResolution of another type.
    odd = data.replace(b"\x0f\x01\x02\x00", b"\x1a\x01\x02\x00", 1)
    odd = odd if odd != data else data.replace(b"\x01\x0f\x00\x02", b"\x01\x1a\x00\x02", 1)
    assert odd != data
    assert inspect(odd, full=True) == inspect(data)
    assert (np.asarray(decode_rgb(odd)) == np.asarray(decode_rgb(data))).all()


def test_exif_that_cannot_be_read():
    data = encode(picture(6), "JPEG", exif=b"Exif\0\0nonsense" + bytes(20))
    plain = encode(picture(6), "JPEG")
    assert inspect(data, full=True) == (40, 32, True)
    assert (np.asarray(decode_rgb(data)) == np.asarray(decode_rgb(plain))).all()


@pytest.mark.parametrize("error", [struct.error, TypeError, AssertionError, IndexError])
def test_any_error_of_the_decoder_is_a_reason(monkeypatch, error):
    def load(image):
        raise error("odd")

    monkeypatch.setattr(JpegImageFile, "load", load)
    with pytest.raises(ValueError, match=r"^odd$"):
        decode_rgb(JPEG)
    with pytest.raises(ValueError, match=r"^does not decode: odd$"):
        inspect(JPEG, full=True)
