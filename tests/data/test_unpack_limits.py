"""Compressed files that would fill the disk are refused."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest

from fedmerge import DataError
from fedmerge.data import load_dataset, unpack
from fedmerge.data.unpack import unpack as unpacked


def test_a_gz_bomb_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "MOST_BYTES", 1 << 21)
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(1 << 22)))
    with pytest.raises(DataError, match="more than 2097152 bytes"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("fault", ["size", "link", "missing"])
def test_only_the_files_wanted_leave_an_archive_and_only_whole_files(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(unpack, "MOST_BYTES", 1 << 10)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name in ("folder/other", "folder/wanted"):
            member = tarfile.TarInfo(name if fault != "missing" else name + "-not")
            member.size = 2000 if fault == "size" else 5
            if fault == "link":
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(tarfile.TarError, match="folder/wanted"):
        unpacked(tmp_path, "folder", ["wanted"], "a.tar.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()
