"""A comparison takes a finished run for its own only if it was on the same data, wherever they lie."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from framp.compare.plan import PlannedRun
from framp.engines import run_local
from framp_core.config import FrampConfig
from framp_core.errors import RunFolderError
from tests.small_graph import save_small_graph


def test_a_finished_run_on_another_graph_is_not_taken_for_this_one(
    tiny: Callable[..., FrampConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_app.app.write_report", lambda path: None)

    def planned(root: Path) -> PlannedRun:
        return PlannedRun("framp", tiny({**settings, "data.root": str(root)}))

    settings = save_small_graph(tmp_path / "g.npz")
    assert not planned(tmp_path / "g.npz").is_finished()
    run_local(planned(tmp_path / "g.npz").config)
    assert planned(tmp_path / "g.npz").is_finished()

    with np.load(tmp_path / "g.npz") as arrays:
        np.savez_compressed(tmp_path / "same.npz", **arrays)
        np.savez(tmp_path / "other.npz", **{**arrays, "x": arrays["x"] + 1})
    assert planned(tmp_path / "same.npz").is_finished()
    with pytest.raises(
        RunFolderError, match=r"on other data than those in .*other\.npz' \(changed: features\)\. Results"
    ):
        planned(tmp_path / "other.npz").is_finished()
    assert planned(tmp_path / "absent.npz").is_finished()
