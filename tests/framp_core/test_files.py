import json
import os
import resource
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framp_core import files
from framp_core.errors import RunFolderError, WriteError

OLD, NEW = b"what was there\n", b"n" * 5000


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """As on a full disk, no file grows beyond so many bytes; Python turns the signal into an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def a_socket(path: Path) -> None:
    # A socket's path may have 107 bytes alone.
    descriptor = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    os.close(descriptor)


STRANGE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": a_socket,
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_plain_file_is_named_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "events.jsonl"
    STRANGE[kind](path)
    before = path.lstat()
    for work in (files.read_bytes, files.has_file, lambda at: list(files.lines(at)), lambda at: files.append(at, NEW)):
        with pytest.raises(RunFolderError, match=rf"events.jsonl' is {kind}, expected a plain file"):
            work(path)
    if kind != "a link":
        with pytest.raises(RunFolderError, match=rf"is {kind}"):
            files.write_bytes(path, NEW)
    assert path.lstat() == before
    assert os.listdir(tmp_path) == ["events.jsonl"]


def test_a_device_is_neither_read_nor_replaced() -> None:
    zero = Path("/dev/zero")
    for work in (files.read_bytes, lambda at: files.write_bytes(at, NEW), lambda at: files.append(at, NEW)):
        with pytest.raises(RunFolderError, match=r"is a device"):
            work(zero)
    assert stat.S_ISCHR(zero.lstat().st_mode)


@pytest.mark.parametrize("target", ["there", "not there"])
def test_a_link_gives_way_to_the_file_and_is_not_followed(tmp_path: Path, target: str) -> None:
    foreign, path = tmp_path / "foreign", tmp_path / "run" / "report.html"
    path.parent.mkdir()
    if target == "there":
        foreign.write_bytes(OLD)
    path.symlink_to(foreign)
    (path.parent / "report.html.tmp").symlink_to(foreign)
    files.write_bytes(path, NEW)
    assert (path.is_symlink(), path.read_bytes()) == (False, NEW)
    assert (foreign.read_bytes() == OLD) if target == "there" else not foreign.exists()


def test_a_link_to_a_folder_is_not_filled(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (tmp_path / "figures").symlink_to(foreign)
    for work in (files.make_folder, files.has_folder):
        with pytest.raises(RunFolderError, match=r"figures' is a link, expected a folder"):
            work(tmp_path / "figures")
    assert files.make_folder(tmp_path / "new").is_dir()
    files.make_folder(tmp_path / "new")


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_written_whole_and_appended_to(tmp_path_factory: pytest.TempPathFactory, one: bytes, other: bytes) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    files.write_bytes(path, one)
    files.append(path, other)
    assert files.read_bytes(path) == one + other
    assert b"".join(files.lines(path)) == (one + other)[: (one + other).rfind(b"\n") + 1]
    files.cut_last_line(path)
    assert path.read_bytes() == (one + other)[: (one + other).rfind(b"\n") + 1]


@pytest.mark.parametrize("whole", [b"", b"kept\n"])
def test_a_last_line_longer_than_what_is_looked_at_at_a_time_is_cut(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(whole + b"x" * (2**17 + 5))
    files.cut_last_line(path)
    assert path.read_bytes() == whole


def test_a_new_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "file", "é")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert files.read_text(tmp_path / "file") == "é"


@pytest.mark.parametrize("work", [files.write_bytes, files.append])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, work: Callable[[Path, bytes], None]) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with no_file_beyond(1000), pytest.raises(WriteError, match=r"file' cannot be written \(File too large\)"):
        work(path, NEW)
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]
    work(path, NEW)
    assert path.read_bytes().endswith(NEW)


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "masks.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # Sparse: it takes no room.
    with pytest.raises(RunFolderError, match=r"has 1,099,511,627,776 bytes, and at most 268,435,456 are"):
        files.read_bytes(path)
    with pytest.raises(RunFolderError, match=r"at most 68,719,476,736 are read"):
        next(files.lines(path))
    path.write_bytes(b"1234\n12345\n")
    monkeypatch.setattr(files, "WHOLE_LIMIT", 6)
    assert list(files.lines(path)) == [b"1234\n", b"12345\n"]
    monkeypatch.setattr(files, "WHOLE_LIMIT", 4)
    with pytest.raises(RunFolderError, match=r"a line of more than 4 bytes"):
        list(files.lines(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("1" * 5000, r"is not JSON \(Exceeds the limit"),
        ("[NaN]", "NaN is no number of JSON"),
        ('{"a"', "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
    ],
)
def test_json_that_python_does_not_read_is_named(text: str | bytes, words: str) -> None:
    with pytest.raises(RunFolderError, match=rf"^the file {words}|{words}"):
        files.parse_json(text, "the file")
    assert files.parse_json(json.dumps({"a": [10**4000]}), "it") == {"a": [10**4000]}
    assert sys.get_int_max_str_digits() >= 4000


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert not files.has_file(tmp_path / "no" / "file")
    with pytest.raises(RunFolderError, match=r"there is no file"):
        files.read_bytes(tmp_path / "file")
    with pytest.raises(WriteError, match=r"cannot be written \(No such file"):
        files.append(tmp_path / "no" / "file", NEW)
