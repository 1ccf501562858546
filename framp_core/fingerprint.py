"""A fingerprint of the code that client and server must share."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import framp_core

SHARED_PACKAGES = ("client_app", "framp_core")
RUN_PACKAGES = (*SHARED_PACKAGES, "server_app")
"""All code that numbers depend on; ``framp`` holds the command, the engines and what compares finished runs."""


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """SHA-256 over the relative paths and bytes of every ``*.py`` of ``client_app`` and ``framp_core``.

    The packages are looked for beside the ``framp_core`` that this process imported, so a stale copy of the
    project elsewhere on the import path shows up as another fingerprint.
    """
    root = code_root()
    digest = hashlib.sha256()
    for package in SHARED_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def code_files(packages: Iterable[str] = RUN_PACKAGES) -> dict[str, str]:
    """SHA-256 of every ``*.py`` of the packages, by relative path."""
    root = code_root()
    paths = (path for package in packages for path in sorted((root / package).rglob("*.py")))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def code_root() -> Path:
    """The folder that holds the running ``framp_core``."""
    return Path(framp_core.__file__).parent.parent
