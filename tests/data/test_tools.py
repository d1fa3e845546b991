"""`data check` and `data pack`."""

import json
import tarfile

import pytest

from tests._images import encode, picture, write_jsonl, write_set, write_tar
from vlpfast.data.index import Index
from vlpfast.data.tools import check, pack


def test_check_counts(tmp_path):
    path = write_set(tmp_path, 7)
    report = check(path)
    assert report == {
        "source": str(path),
        "num_samples": 7,
        "num_captions": 13,
        "num_image_ids": 7,
        "image_mib": pytest.approx(
            sum(f.stat().st_size for f in tmp_path.glob("*.png")) / 2**20, abs=1e-3
        ),
        "min_side": 32,
        "max_side": 40,
        "num_corrupt": 0,
        "corrupt": {},
    }
    json.dumps(report)


def test_check_names_the_corrupt(tmp_path):
    path = write_set(tmp_path, 4)
    (tmp_path / "2.png").write_bytes(b"<html>")
    report = check(path)
    assert (report["num_samples"], report["num_corrupt"]) == (3, 1)
    assert report["corrupt"] == {"2.png": "not an image: starts with b'<html>'"}


def test_check_sees_what_changed_under_an_index(tmp_path):
    """An index knows its table's time, not its images': `check` reads everything anew."""
    path = write_set(tmp_path, 3)
    assert Index.open(path).num_samples == 3
    (tmp_path / "0.png").write_bytes(b"")
    assert check(path)["corrupt"] == {"0.png": "image is empty (0 bytes)"}


def test_check_reports_when_all_is_corrupt(tmp_path):
    path = write_set(tmp_path, 2)
    for i in range(2):
        (tmp_path / f"{i}.png").unlink()
    report = check(path)
    assert (report["num_samples"], report["num_corrupt"], report["max_side"]) == (0, 2, 0)


@pytest.mark.parametrize(
    ("options", "num_shards"), [({}, 1), ({"samples_per_shard": 3}, 3), ({"max_shard_mb": 1e-3}, 7)]
)
def test_pack_keeps_everything(tmp_path, options, num_shards):
    path = write_set(tmp_path, 7)
    (tmp_path / "5.jpg").write_bytes(encode(picture(5)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["image"] = "5.jpg"
    rows.insert(3, {"image": "none.png", "captions": ["x"], "number": 0, "parity": ""})
    source = Index.open(write_jsonl(path, rows))
    summary = pack(path, tmp_path / "out", **options)
    assert summary["num_shards"] == num_shards == len(list((tmp_path / "out").glob("*.tar")))
    assert summary["num_samples"] == 7
    assert list(summary["corrupt"]) == ["none.png"]
    packed = Index.open(tmp_path / "out")
    for i in range(7):
        assert packed.image_bytes(i) == source.image_bytes(i)
        assert packed.captions(i) == source.captions(i)
        assert source.record(i).items() <= packed.record(i).items()
    assert packed.image_ids.tolist() == source.image_ids.tolist() == [0, 1, 2, 4, 5, 6, 7]
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000000.png", "000000000.json"]


def test_pack_again(tmp_path):
    """Shards can be cut anew, and identities last."""
    pack(write_set(tmp_path, 5), tmp_path / "a")
    pack(tmp_path / "a", tmp_path / "b", samples_per_shard=2)
    a, b = Index.open(tmp_path / "a"), Index.open(tmp_path / "b")
    assert [a.record(i) for i in range(5)] == [b.record(i) for i in range(5)]
    assert a.image_ids.tolist() == b.image_ids.tolist()


def test_pack_refuses(tmp_path):
    path = write_set(tmp_path, 2)
    (tmp_path / "out").mkdir()
    write_tar(tmp_path / "out" / "x.tar", [])
    with pytest.raises(ValueError, match="already holds shards"):
        pack(path, tmp_path / "out")
    with pytest.raises(ValueError, match="samples_per_shard"):
        pack(path, tmp_path / "new", samples_per_shard=0)
    (tmp_path / "0.png").write_bytes(encode(picture(0), "GIF"))
    with pytest.raises(ValueError, match=r"0.png: shards hold JPEG, PNG or WebP, got b'GIF8'"):
        pack(path, tmp_path / "gif")
    assert not list((tmp_path / "gif").glob("*.tar"))
