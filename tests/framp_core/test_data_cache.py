from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest

from framp_core.data.cache import cache_root, cached, file_stamps
from framp_core.errors import DataError


def test_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root("") == tmp_path / "framp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root("") == tmp_path / "home" / ".cache" / "framp"
    assert cache_root("/elsewhere") == Path("/elsewhere")


def test_builds_once_per_identity(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "data").write_text(str(len(built)))

    first = cached(str(tmp_path), {"name": "a"}, build)
    assert cached(str(tmp_path), {"name": "a"}, build) == first
    assert cached(str(tmp_path), {"name": "b"}, build) != first
    assert len(built) == 2
    assert (first / "data").read_text() == "1"


def test_simultaneous_users_build_once(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        sleep(0.1)
        (folder / "data").write_text("done")

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: cached(str(tmp_path), {"name": "a"}, build), range(4)))
    assert len(built) == 1
    assert {(folder / "data").read_text() for folder in folders} == {"done"}


def test_a_failed_build_leaves_nothing_and_the_next_one_starts_afresh(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise DataError("bad image")

    with pytest.raises(DataError, match="bad image"):
        cached(str(tmp_path), {"name": "a"}, fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    folder = cached(str(tmp_path), {"name": "a"}, lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache' cannot be written .* set data\.cache"):
        cached(str(tmp_path / "file" / "cache"), {"name": "a"}, lambda folder: None)


def test_stamps_change_with_a_file(tmp_path):
    file = tmp_path / "a" / "x.png"
    file.parent.mkdir()
    file.write_bytes(b"123")
    before = file_stamps(tmp_path, [file])
    assert before == [("a/x.png", 3, file.stat().st_mtime_ns)]
    file.write_bytes(b"1234")
    assert file_stamps(tmp_path, [file]) != before
