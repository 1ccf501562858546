"""The synthetic graph for benchmarks is what its docstring says, and graph-file reads it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from framp_core.config import DataConfig, GraphConfig
from framp_core.data.graph import load_graph

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "synthetic_arxiv.py"


def written(file: Path, *options: str) -> dict[str, np.ndarray]:
    subprocess.run([sys.executable, str(SCRIPT), str(file), "--tiny", *options], check=True, capture_output=True)
    with np.load(file) as archive:
        return dict(archive)


def test_the_tiny_graph_is_of_the_promised_kind(tmp_path: Path) -> None:
    arrays = written(tmp_path / "synthetic.npz")
    assert "synthetic" in str(arrays["synthetic"])
    assert arrays["x"].shape == (1693, 128)
    assert arrays["edge_index"].shape == (2, 11_662)
    source, target = arrays["edge_index"]
    assert len(np.unique(np.minimum(source, target) * 1693 + np.maximum(source, target))) == 11_662
    assert (arrays["y"][source] == arrays["y"][target]).mean() == pytest.approx(0.65, abs=0.03)
    sizes = np.bincount(arrays["y"], minlength=40)
    assert sizes.min() >= 1
    assert sizes.max() > 10 * np.median(sizes)
    degrees = np.bincount(target, minlength=1693)
    assert degrees.max() > 10 * degrees.mean()  # At random it would be about three times the mean.
    data = DataConfig(name="graph-file", root=str(tmp_path / "synthetic.npz"), cache=str(tmp_path / "cache"))
    graph = load_graph(data, GraphConfig())
    assert (len(graph), graph.classes, graph.edges.shape[1]) == (1693, 40, 2 * 11_662)


def test_the_seed_decides(tmp_path: Path) -> None:
    first, again, other = (
        written(tmp_path / f"{number}.npz", "--seed", seed)["edge_index"] for number, seed in enumerate("112")
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "g.pt")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "does not end in .npz" in done.stderr
