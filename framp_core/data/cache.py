"""Decoded data sets on disk: built once, shared by all processes of the machine."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from framp_core.errors import DataError

CACHE_VERSION = 2


def cache_root(folder: str) -> Path:
    """The cache folder: ``folder``, or ``framp`` in the user's cache folder when it is empty.

    The user's cache folder is ``$XDG_CACHE_HOME``, by default ``~/.cache``.
    """
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "framp"


def file_stamps(root: Path, files: Iterable[Path]) -> list[tuple[str, int, int, int]]:
    """Name below ``root``, size in bytes, and the nanoseconds of its last modification and last change of each file.

    What unpacks or copies files may give many of them one time of modification, and uncompressed images of one shape
    have one size; the time of change no program can set, and it changes when a file is moved onto the name of another.
    """
    stamps = []
    for file in files:
        status = file.stat()
        stamps.append((str(file.relative_to(root)), status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return stamps


def content_digest(*arrays: np.ndarray) -> str:
    """SHA-256 of the type, shape and numbers (little endian) of some arrays; the same on every machine."""
    digest = hashlib.sha256()
    for array in arrays:
        ordered = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"{ordered.dtype.str}{array.shape}".encode())
        digest.update(ordered.reshape(-1).data)
    return digest.hexdigest()


def names_digest(names: Sequence[str]) -> str:
    """SHA-256 of the names of the classes, in order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def cached(folder: str, identity: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Return the folder that holds what ``build`` wrote for ``identity``, building it on first use.

    A folder appears under its final name only when complete. A file lock lets one process build while the others
    wait for it.

    Args:
        folder: cache folder; empty for the default of :func:`cache_root`.
        identity: JSON-able description of all that the content depends on; its SHA-256 names the folder.
        build: fills the empty folder that it is given.

    Raises:
        DataError: the cache folder cannot be written.
    """
    text = json.dumps({**identity, "cache-version": CACHE_VERSION}, sort_keys=True)
    root = cache_root(folder)
    target = root / hashlib.sha256(text.encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{target.name}.lock"):
            if not target.is_dir():
                for left in root.glob(f"{target.name}.partial-*"):  # Of a process that was killed: here is the lock.
                    shutil.rmtree(left, ignore_errors=True)
                _build(target, build)
    except OSError as error:
        raise DataError(
            f"the cache folder {str(root)!r} cannot be written ({error}); set data.cache to a folder that can be, "
            f"with room for the decoded data"
        ) from error
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        build(partial)
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
