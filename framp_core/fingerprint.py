"""A fingerprint of the code that client and server must share."""

import hashlib
from functools import lru_cache
from pathlib import Path

import framp_core

SHARED_PACKAGES = ("client_app", "framp_core")


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


def code_root() -> Path:
    """The folder that holds the running ``framp_core``."""
    return Path(framp_core.__file__).parent.parent
