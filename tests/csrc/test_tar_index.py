"""_host.index_tar against Python's tarfile, on every format and on damaged archives."""

from __future__ import annotations

import io
import itertools
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlpfast import _ext

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def _index(path):
    names, name_offsets, offsets, sizes, error = _ext.host().index_tar(str(path))
    blob = names.tobytes()
    decoded = [
        blob[start:stop].decode("utf-8", "surrogateescape")
        for start, stop in itertools.pairwise(name_offsets)
    ]
    return list(zip(decoded, offsets.tolist(), sizes.tolist(), strict=True)), error


def _truth(path):
    with tarfile.open(path) as archive:
        return [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]


def _write(path, members, tar_format=tarfile.GNU_FORMAT, **kwargs):
    with tarfile.open(path, "w", format=tar_format, **kwargs) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


MEMBERS = [
    ("000.jpg", b"x" * 1000),
    ("000.txt", b""),
    ("folder/001.json", b"{}" * 256),
    ("d" * 90 + "/" + "n" * 60 + ".png", b"y" * 513),
    ("last", b"z"),
]
LONG = [("e" * 300 + "/" + "ü" * 80 + ".png", b"abc"), ("after", b"1" * 511)]


@pytest.mark.parametrize("name", FORMATS)
def test_matches_tarfile(name, tmp_path):
    path = tmp_path / "a.tar"
    _write(path, MEMBERS + (LONG if name != "ustar" else []), FORMATS[name])
    members, error = _index(path)
    assert error is None
    assert members == _truth(path)
    assert len(members) >= len(MEMBERS)


def test_only_regular_files_are_listed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in [
            ("d", tarfile.DIRTYPE),
            ("s", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("f", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "x" * 150 if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(info)
        info = tarfile.TarInfo("file")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert _index(path) == (_truth(path), None)
    assert [m[0] for m in _index(path)[0]] == ["file"]


def test_pax_global_header_and_size(tmp_path):
    path = tmp_path / "a.tar"
    _write(path, MEMBERS, tarfile.PAX_FORMAT, pax_headers={"comment": "a global header"})
    assert _index(path) == (_truth(path), None)


def test_sizes_in_base_256(tmp_path):
    """GNU tar writes sizes of 8 GiB and more in base 256; a sparse file of that size is free."""
    path = tmp_path / "a.tar"
    size = 9 * 2**30
    info = tarfile.TarInfo("big")
    info.size = size
    with open(path, "wb") as out:
        out.write(info.tobuf(tarfile.GNU_FORMAT))
        out.truncate(512 + size)
        out.seek(512 + size)
        small = tarfile.TarInfo("small")
        out.write(small.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert _index(path) == ([("big", 512, size), ("small", 1024 + size, 0)], None)


def test_truncated_archive_gives_whole_members_and_the_reason(tmp_path):
    path = tmp_path / "a.tar"
    _write(path, MEMBERS)
    whole, content = _truth(path), path.read_bytes()
    name, offset, size = whole[2]
    path.write_bytes(content[: offset + size - 1])
    members, error = _index(path)
    assert members == whole[:2]
    assert error == (
        f"truncated: '{name}' needs bytes up to {offset + size}, "
        f"the file ends at {offset + size - 1}"
    )
    path.write_bytes(content[: offset - 100])
    assert _index(path) == (whole[:2], f"truncated: the header at byte {offset - 512} is cut")


def test_damage_is_named(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"\xff\xd8\xff not a tar at all" * 100)
    assert _index(path) == ([], "not a tar header at byte 0")
    path.write_bytes(b"")
    assert _index(path) == ([], None)
    with pytest.raises(FileNotFoundError, match=r"nothing\.tar"):
        _index(tmp_path / "nothing.tar")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 1100), max_size=6),
    lengths=st.lists(st.integers(1, 270), min_size=6, max_size=6),
    name=st.sampled_from(["gnu", "pax"]),
    cut=st.integers(0, 4000),
)
def test_any_archive_cut_anywhere(tmp_path_factory, sizes, lengths, name, cut):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    members = [(f"{i}" + "a" * lengths[i], bytes(size)) for i, size in enumerate(sizes)]
    _write(path, members, FORMATS[name])
    truth = _truth(path)
    assert _index(path) == (truth, None)
    path.write_bytes(path.read_bytes()[:cut])
    assert _index(path)[0] == [m for m in truth if m[1] + m[2] <= cut]
