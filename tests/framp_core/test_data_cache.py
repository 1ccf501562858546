import os
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
    assert before == [("a/x.png", 3, file.stat().st_mtime_ns, file.stat().st_ctime_ns)]
    file.write_bytes(b"1234")
    assert file_stamps(tmp_path, [file]) != before


def test_stamps_change_where_two_files_of_one_size_and_time_change_places(tmp_path):
    """As of uncompressed images of one shape that came out of one archive."""
    files = [tmp_path / name for name in ("x.bmp", "y.bmp")]
    for file in files:
        file.write_bytes(file.name.encode())
        os.utime(file, (10**9, 10**9))
    before = file_stamps(tmp_path, files)
    assert {stamp[1:3] for stamp in before} == {(5, 10**18)}
    sleep(0.05)  # Longer than the tick of the file system's clock.
    files[0].rename(tmp_path / "z")
    files[1].rename(files[0])
    (tmp_path / "z").rename(files[1])
    assert [stamp[:3] for stamp in file_stamps(tmp_path, files)] == [stamp[:3] for stamp in before]
    assert file_stamps(tmp_path, files) != before


def test_what_a_killed_build_has_left_is_removed(tmp_path):
    target = cached(str(tmp_path), {"name": "a"}, lambda folder: None)
    target.rename(tmp_path / f"{target.name}.partial-killed")
    (tmp_path / f"{target.name}.partial-killed" / "half").touch()
    (tmp_path / "another.partial-x").mkdir()
    assert cached(str(tmp_path), {"name": "a"}, lambda folder: None) == target
    assert {path.name for path in tmp_path.iterdir()} == {target.name, f"{target.name}.lock", "another.partial-x"}
