"""The files of a run: written whole, read bounded, and never through a link that lies in the run folder.

A run folder may come from somebody else. Whoever names it vouches for the way to it, links included; what lies in it is
read and written only if it is a plain file in a real folder. A path that a user gives is resolved first.

Reading is bounded, far above what honest runs need: 256 MiB for a file that is read whole and for a line, 64 GiB for
one that is read line by line or mapped.
"""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from framp_core.errors import ConfigError, RunFolderError, WriteError

WHOLE_LIMIT = 2**28
"""Bytes of a file that is read whole, and of a line; 10,000 clients of 1,000 examples have a manifest of 170 MB."""
STREAM_LIMIT = 2**36
"""Bytes of a file that is read line by line or mapped; 1,000 rounds of 100 clients are 70 MB of events."""
LEFTOVER = ".tmp"
"""How the name ends of what is not written whole yet."""
_RANDOM_BYTES = 8
"""Of the name of a new file, before that end."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# --- what is there ------------------------------------------------------------------------------------------------


def resolved(path: Path | str) -> Path:
    """A path that a user gives, absolute, with ``~`` and the links on the way to it resolved.

    Raises:
        ConfigError: its links lead in a circle, or there is no such home folder.
    """
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"the path {str(path)!r} leads nowhere ({error}); give another one") from error


def has_file(path: Path) -> bool:
    """Whether a file lies here.

    Raises:
        RunFolderError: something else does: a link, a pipe, a device, a socket or a folder.
    """
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise _unlike(path, mode, "a plain file")
    return mode is not None


def has_folder(path: Path) -> bool:
    """Whether a real folder lies here.

    Raises:
        RunFolderError: something else does, such as a link to a folder.
    """
    mode = _mode(path)
    if mode is not None and not stat.S_ISDIR(mode):
        raise _unlike(path, mode, "a folder")
    return mode is not None


def make_folder(path: Path) -> Path:
    """A folder in one that exists, made if it is missing.

    Raises:
        RunFolderError: something else lies here, such as a link to a folder.
        WriteError: it cannot be made.
    """
    if not has_folder(path):
        with writing(path):
            path.mkdir(exist_ok=True)
    return path


def _mode(path: Path) -> int | None:
    """Of what lies here itself, links not followed; None if nothing does."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unlike(path: Path, mode: int, expected: str) -> RunFolderError:
    kind = _KINDS.get(stat.S_IFMT(mode), "a plain file")
    return RunFolderError(
        f"{str(path)!r} is {kind}, expected {expected}: what lies in a run folder is never followed out of it, nor "
        f"waited for; remove it, or put {expected} in its place"
    )


def _unreadable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{str(path)!r} cannot be read ({error.strerror or error}); read it as a user who may")


# --- reading ------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, limit: int = STREAM_LIMIT) -> Iterator[BufferedReader]:
    """Open a plain file of at most ``limit`` bytes.

    Raises:
        RunFolderError: it is missing, is not a plain file, is too large, or cannot be read.
    """
    if not has_file(path):
        raise RunFolderError(f"there is no file {str(path)!r}; was it moved? Restore it")
    try:
        with open(_opened(path, os.O_RDONLY), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise RunFolderError(
                    f"{str(path)!r} has {size:,} bytes, and at most {limit:,} are read; restore what the run wrote"
                )
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def read_bytes(path: Path, limit: int = WHOLE_LIMIT) -> bytes:
    """Read a whole file; see :func:`reading`."""
    with reading(path, limit) as file:
        return file.read(limit)


def read_text(path: Path) -> str:
    """Read a whole file of UTF-8; see :func:`reading`.

    Raises:
        RunFolderError: it is not UTF-8 either.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{str(path)!r} is not UTF-8 ({error}); restore what the run wrote") from error


def lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """The lines of a file, one at a time; a last one without its end is left out. See :func:`reading`.

    Args:
        path: the file.
        start: bytes of it to pass over, whole lines.

    Raises:
        RunFolderError: a line has more than ``WHOLE_LIMIT`` bytes, too.
    """
    with reading(path) as file:
        file.seek(start)
        while (line := file.readline(WHOLE_LIMIT + 1)).endswith(b"\n"):
            yield line
        if len(line) > WHOLE_LIMIT:
            raise RunFolderError(
                f"{str(path)!r} has a line of more than {WHOLE_LIMIT:,} bytes, the most that is read; restore what the "
                f"run wrote"
            )


def read_json(path: Path) -> Any:
    """Read a JSON file; see :func:`reading` and :func:`parse_json`."""
    return parse_json(read_bytes(path), repr(str(path)))


def parse_json(text: bytes | str, what: str) -> Any:
    """Read JSON that may be anybody's.

    Args:
        text: the JSON.
        what: it is, for the message.

    Raises:
        RunFolderError: it is not JSON, or nests deeper or has longer numbers than Python reads.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise RunFolderError(f"{what} is nested too deeply to be what a run wrote; restore it") from error
    except ValueError as error:
        raise RunFolderError(f"{what} is not JSON ({error}); the file was changed after the run; restore it") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


# --- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name what could not be written, whatever library was about to.

    Raises:
        WriteError: from the system's error or safetensors'.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise WriteError(f"{str(path)!r} cannot be written ({reason})") from error


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A new file in the same folder, to be filled; it takes the name of ``path`` once it is whole and on the disk.

    Args:
        path: of a file, which may exist.
        durable: have it on the disk before it takes its name.

    Raises:
        RunFolderError: something that is not a file or a link lies here.
        WriteError: it cannot be written; what was there is unchanged and nothing is left of the new file.
    """
    mode = _mode(path)
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise _unlike(path, mode, "a plain file")
    temporary = path.with_name(f"{path.name[:40]}.{secrets.token_hex(_RANDOM_BYTES)}{LEFTOVER}")
    with writing(path):
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
            yield temporary
            if durable:
                sync(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def leftovers(folder: Path) -> list[Path]:
    """What :func:`replacing` left in a folder where a process was killed in it; other files that end so are not its."""
    return list(folder.glob(f"*.{'[0-9a-f]' * 2 * _RANDOM_BYTES}{LEFTOVER}"))


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file whole or not at all; see :func:`replacing`."""
    with replacing(path, durable) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 whole or not at all; see :func:`replacing`."""
    write_bytes(path, text.encode())


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file, all or nothing; it is made if it is missing.

    Raises:
        RunFolderError: it is not a plain file.
        WriteError: it cannot be written; it is as long as before.
    """
    has_file(path)
    with writing(path), open(_opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(length)
            raise


def cut_last_line(path: Path) -> None:
    """Drop what a killed process left of its last line.

    Raises:
        RunFolderError: it is not a plain file.
        WriteError: it cannot be written.
    """
    with reading(path) as file:
        size = end = file.seek(0, os.SEEK_END)
        kept = -1
        while end and kept < 0:
            start = max(0, end - 2**16)
            file.seek(start)
            kept, end = file.read(end - start).rfind(b"\n"), start
    length = end + kept + 1
    if length < size:
        with writing(path), open(_opened(path, os.O_WRONLY), "wb", buffering=0) as file:
            file.truncate(length)


def sync(path: Path) -> None:
    """Have a file or a folder on the disk before anything that relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _opened(path: Path, flags: int) -> int:
    """A descriptor of a plain file: what lies here was looked at, and may have been exchanged since."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _unlike(path, mode, "a plain file")
    return descriptor
