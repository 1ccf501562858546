import shutil
from pathlib import Path

import pytest

from framp_core import fingerprint


def test_fingerprint_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fingerprint.code_root()
    for package in fingerprint.SHARED_PACKAGES:
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    original = fingerprint.code_fingerprint()
    monkeypatch.setattr(fingerprint, "code_root", lambda: tmp_path)
    uncached = fingerprint.code_fingerprint.__wrapped__
    assert uncached() == original
    with (tmp_path / "client_app" / "app.py").open("a") as file:
        file.write("\n# another line\n")
    assert uncached() != original
