import gzip
import io
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors
from torch_geometric.io import read_planetoid_data
from torch_geometric.transforms import NormalizeFeatures
from typer.testing import CliRunner

from framp import cli
from framp_core import memory
from framp_core.config import DataConfig, GraphConfig
from framp_core.data.graph import load_graph
from framp_core.data.graph.checks import RawGraph, checked, split_of, tidied
from framp_core.errors import ConfigError, DataError


def opened(tmp_path, name, root="", **options):
    return load_graph(DataConfig(name=name, root=str(root), cache=str(tmp_path / "cache")), GraphConfig(**options))


def pairs(edges):
    return {(int(source), int(target)) for source, target in edges.T}


# --- the form of a graph ------------------------------------------------------------------------------------------


@st.composite
def raw_graphs(draw):
    nodes = draw(st.integers(2, 8))
    edges = draw(st.integers(0, 12))
    return RawGraph(
        draw(npst.arrays(np.float32, (nodes, 2), elements=st.floats(-9, 9, width=32))),
        draw(npst.arrays(np.int64, (2, edges), elements=st.integers(0, nodes - 1))),
        np.arange(nodes) % 2,
    )


def slow_component(edges, nodes):
    """The largest component by repeated search, among equals the one with the first node."""
    neighbours = {
        node: {a for a, b in edges if b == node} | {b for a, b in edges if a == node} for node in range(nodes)
    }
    components = []
    for start in range(nodes):
        reached, grown = set(), {start}
        while grown != reached:
            reached = grown
            grown = reached.union(*(neighbours[node] for node in reached))
        components.append(sorted(reached))
    return max(components, key=lambda members: (len(members), -members[0]))


@given(raw_graphs(), st.booleans(), st.booleans())
def test_edges_are_in_one_order_without_loops_and_repeats(raw, undirected, largest):
    expected = {(a, b) for a, b in pairs(raw.edge_index) if a != b}
    if undirected:
        expected |= {(b, a) for a, b in expected}
    kept = slow_component(expected, len(raw.x)) if largest else list(range(len(raw.x)))
    numbers = {node: number for number, node in enumerate(kept)}
    expected = {(numbers[a], numbers[b]) for a, b in expected if a in numbers}
    if len({int(raw.y[node]) for node in kept}) == 1:
        with pytest.raises(DataError, match=r"largest-component=true leaves .* all nodes with a label have label"):
            tidied(checked(raw, "here"), undirected=undirected, largest_component=largest)
        return
    graph = tidied(checked(raw, "here"), undirected=undirected, largest_component=largest)
    assert [tuple(edge) for edge in graph.edge_index.T] == sorted(expected, key=lambda edge: edge[::-1])
    np.testing.assert_array_equal(graph.x, raw.x[kept])
    np.testing.assert_array_equal(graph.y, raw.y[kept])
    assert (graph.x.dtype, graph.edge_index.dtype, graph.y.dtype) == (np.float32, np.int64, np.int64)


def raw(x=None, edge_index=None, y=None, class_names=None):
    return RawGraph(
        np.eye(4) if x is None else np.array(x),
        np.array([[0, 1], [1, 2]]) if edge_index is None else np.array(edge_index),
        np.array([0, 1, 0, 1]) if y is None else np.array(y),
        class_names,
    )


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"x": np.ones(4)}, r"x of here is float64 of shape \(4,\); expected numbers of shape \(nodes, features\)"),
        ({"x": np.ones((4, 0))}, r"x of here is float64 of shape \(4, 0\)"),
        ({"x": np.ones((4, 2), dtype=complex)}, "x of here is complex128"),
        ({"x": [["a"], ["b"], ["c"], ["d"]]}, "x of here is <U1"),
        ({"x": [[0, 1], [0, np.nan], [np.inf, 1], [0, 0]]}, "2 values that are not finite.* node 1, feature 1: nan"),
        ({"x": [[0.0], [0], [0], [1e39]]}, r"not finite in float32, the first at node 3, feature 0: 1e\+39"),
        ({"y": [0, 1, 0]}, "y of here has 3 labels and x 4 nodes: node 3 has no label"),
        ({"y": [0, 1, 0, 1, 0]}, "y of here has 5 labels and x 4 nodes: label 4 belongs to no node"),
        ({"y": np.eye(4)}, r"y of here has shape \(4, 4\); expected one label per node, \(4,\)"),
        ({"y": [0, 1, 0.5, 1]}, "node 2 has label 0.5; expected whole numbers from 0 to C - 1"),
        ({"y": ["a", "b", "a", "b"]}, "y of here is <U1, node 0 has a; expected whole numbers"),
        ({"y": [0, 1, -2, 1]}, "node 2 has label -2; expected .* or -1 for a node without a label"),
        ({"y": [0, 1, np.inf, 1]}, "node 2 has label inf; expected whole numbers"),
        ({"y": [-1, 1, -1, 1]}, "all nodes with a label have label 1; expected two classes or more"),
        ({"y": [np.nan] * 4}, "y of here: no node has a label"),
        ({"y": [0, 1, 7, 1]}, "node 2 has label 7; .*no more classes than the 4 nodes, .* Renumber"),
        ({"y": np.array([0, 1, 2**64 - 1, 1], dtype=np.uint64)}, "node 2 has label 18446744073709551615"),
        ({"y": [1, 1, 1, 1]}, "all nodes with a label have label 1; expected two classes or more"),
        ({"edge_index": [0, 1]}, r"edge_index of here has shape \(2,\); expected \(2, edges\)"),
        ({"edge_index": [[0, 1], [1, 2], [2, 3]]}, r"shape \(3, 2\).*\(transpose it\)"),
        ({"edge_index": [[0.0, 1], [1, 2]]}, "edge_index of here is float64; expected whole numbers"),
        ({"edge_index": [[0, 1], [1, 4]]}, "edge 1 runs from node 1 to node 4, and the nodes of x are 0 to 3"),
        ({"edge_index": [[0, -1], [1, 2]]}, "edge 1 runs from node -1 to node 2"),
        ({"class_names": ("a",)}, "class_names of here are 1, 1 of them different, and y has labels up to 1"),
        ({"class_names": ("a", "a")}, "class_names of here are 2, 1 of them different"),
    ],
)
def test_what_is_no_graph_is_refused(given_, message):
    with pytest.raises(DataError, match=message):
        checked(raw(**given_), "here")


def test_what_is_odd_and_allowed():
    assert checked(raw(edge_index=np.empty((2, 0))), "here").edge_index.shape == (2, 0)
    skipping = checked(raw(y=[0, 3, 0, 3]), "here")
    assert skipping.class_names == ("0", "1", "2", "3")
    column = checked(raw(y=[[0], [1], [0], [1]]), "here")
    np.testing.assert_array_equal(column.y, [0, 1, 0, 1])
    assert checked(raw(class_names=("a", "b", "nobody")), "here").class_names == ("a", "b", "nobody")


@pytest.mark.parametrize("none", [-1, np.nan])
def test_nodes_without_a_label_are_kept(none):
    graph = checked(raw(y=[0, none, 2, none]), "here")
    np.testing.assert_array_equal(graph.y, [0, -1, 2, -1])
    assert (graph.y.dtype, graph.class_names, len(graph.x)) == (np.int64, ("0", "1", "2"), 4)


MASKS = {"train_mask": [1, 0, 0, 0], "val_mask": [0, 1, 0, 0], "test_mask": [0, 0, 1, 0]}


def test_masks_become_roles():
    masks = {name: np.array(mask, dtype=bool) for name, mask in MASKS.items()}
    np.testing.assert_array_equal(split_of(masks, 4, "here"), [0, 1, 2, -1])
    np.testing.assert_array_equal(
        split_of({name: mask[:, None].astype(np.uint8) for name, mask in masks.items()}, 4, "here"), [0, 1, 2, -1]
    )
    del masks["val_mask"]
    np.testing.assert_array_equal(split_of(masks, 4, "here"), [0, -1, 2, -1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_mask": None}, "here holds no 'test_mask'; save the masks"),
        ({"test_mask": [1, 0, 1, 0]}, "test_mask of here holds node 0, which train_mask holds too"),
        ({"val_mask": [0, 1, 0]}, r"val_mask of here is int64 of shape \(3,\); expected true or false for each node"),
        ({"val_mask": [0, 2, 0, 0]}, "expected true or false for each node"),
        ({"train_mask": np.zeros((4, 10))}, r"10 splits side by side: save one of them, such as train_mask\[:, 0\]"),
    ],
)
def test_masks_that_are_no_split_are_refused(changed, message):
    masks = {name: np.array(mask) for name, mask in {**MASKS, **changed}.items() if mask is not None}
    with pytest.raises(DataError, match=message):
        split_of(masks, 4, "here")


# --- files of the user's own --------------------------------------------------------------------------------------

ARRAYS = {
    "x": np.random.default_rng(0).random((5, 3), dtype=np.float32),
    "edge_index": np.array([[0, 1, 3, 3], [1, 2, 4, 3]]),
    "y": np.array([0, 1, 0, 1, 2]),
}


def test_a_file_becomes_a_graph_of_memory_maps(tmp_path):
    np.savez(tmp_path / "g.npz", **ARRAYS, class_names=["a", "b", "c"], more=np.array([object()]))
    graph = opened(tmp_path, "graph-file", tmp_path / "g.npz")
    assert (len(graph), graph.shape, graph.classes, graph.class_names) == (5, (3,), 3, ("a", "b", "c"))
    np.testing.assert_array_equal(graph.features, ARRAYS["x"])
    np.testing.assert_array_equal(graph.labels, ARRAYS["y"])
    np.testing.assert_array_equal(graph.edges, [[1, 0, 2, 1, 4, 3], [0, 1, 1, 2, 3, 4]])
    np.testing.assert_array_equal(graph.starts, [0, 1, 3, 4, 5, 6])
    for array in (graph.features, graph.edges, graph.labels):
        assert isinstance(array.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_options_change_the_graph_and_the_cache_keeps_them_apart(tmp_path):
    np.savez(tmp_path / "g.npz", **ARRAYS)
    directed = opened(tmp_path, "graph-file", tmp_path / "g.npz", undirected=False)
    assert pairs(directed.edges) == {(0, 1), (1, 2), (3, 4)}
    largest = opened(tmp_path, "graph-file", tmp_path / "g.npz", largest_component=True)
    assert pairs(largest.edges) == {(0, 1), (1, 0), (1, 2), (2, 1)}
    np.testing.assert_array_equal(largest.features, ARRAYS["x"][:3])
    assert largest.classes == 3
    np.savez(tmp_path / "g.npz", **{**ARRAYS, "y": np.array([1, 0, 1, 0, 2])})
    os.utime(tmp_path / "g.npz", ns=(1, 1))
    assert opened(tmp_path, "graph-file", tmp_path / "g.npz").labels[0] == 1


def test_bytes_changed_anywhere_in_an_archive_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "whole.npz", **ARRAYS)
    content, refused = (tmp_path / "whole.npz").read_bytes(), 0
    for place in rng.integers(len(content) - 20, size=60):
        changed = bytearray(content)
        changed[place : place + 20] = rng.bytes(20)
        path = tmp_path / f"changed-{place}.npz"
        path.write_bytes(changed)
        try:
            opened(tmp_path, "graph-file", path)
        except DataError:
            refused += 1
    assert refused > 30


SPLIT_FILE = {
    **ARRAYS,
    "train_mask": np.array([1, 0, 0, 0, 0], bool),
    "val_mask": np.array([0, 1, 0, 0, 0], bool),
    "test_mask": np.array([0, 0, 1, 1, 0], bool),
    "edge_attr": np.ones((4, 2)),
    "node\x1b[31m_year": np.zeros(5),
}


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_what_a_file_holds_and_nobody_reads_is_said(tmp_path, suffix):
    file = tmp_path / f"g.{suffix}"
    np.savez(file, **SPLIT_FILE) if suffix == "npz" else save_numpy(SPLIT_FILE, file)
    drawn = opened(tmp_path, "graph-file", file)
    assert drawn.split is None
    order = ", ".join(
        name for name in (np.load(file).files if suffix == "npz" else sorted(SPLIT_FILE)) if "mask" in name
    )
    assert drawn.notes == {
        "masks": f"{order} not used: the split is random; graph.split=file takes theirs",
        "edge weights": "'edge_attr' not read: all edges count the same",
        "not read": r"'node\x1b[31m_year'",
    }
    own = opened(tmp_path, "graph-file", file, split="file")
    np.testing.assert_array_equal(own.split, [0, 1, 2, 2, -1])
    assert set(own.notes) == {"edge weights", "not read"}
    np.testing.assert_array_equal(
        opened(tmp_path, "graph-file", file, split="file", largest_component=True).split, [0, 1, 2]
    )


def test_a_file_with_nothing_else_has_no_notes(tmp_path):
    np.savez(tmp_path / "g.npz", **ARRAYS, class_names=["a", "b", "c"])
    assert opened(tmp_path, "graph-file", tmp_path / "g.npz").notes == {}
    with pytest.raises(DataError, match=r"graph\.split='file' and .*g\.npz' holds no 'train_mask'"):
        opened(tmp_path, "graph-file", tmp_path / "g.npz", split="file")
    with pytest.raises(DataError, match="digits have no split of their own"):
        opened(tmp_path, "graph-digits", split="file")


def test_a_saved_pyg_graph_is_read_from_either_format(tmp_path):
    from torch_geometric.data import Data

    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    data = Data(**tensors)
    np.savez(tmp_path / "g.npz", x=data.x, edge_index=data.edge_index, y=data.y)
    save_file({"x": data.x.bfloat16(), "edge_index": data.edge_index, "y": data.y}, tmp_path / "h.safetensors")
    first, second = (
        opened(tmp_path, "graph-file", tmp_path / "g.npz"),
        opened(tmp_path, "graph-file", tmp_path / "h.safetensors"),
    )
    np.testing.assert_array_equal(first.edges, second.edges)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(second.features, data.x.bfloat16().float())


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_missing_array_is_named_with_what_there_is(tmp_path, suffix):
    file = tmp_path / f"g.{suffix}"
    arrays = {"features": ARRAYS["x"], "edge_index": ARRAYS["edge_index"]}
    np.savez(file, **arrays) if suffix == "npz" else save_numpy(arrays, file)
    with pytest.raises(DataError, match=r"holds 'edge_index', 'features', and not 'x', 'y'.* np\.savez"):
        opened(tmp_path, "graph-file", file)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk that is no graph", pickle.dumps({"x": 1})])
def test_an_unreadable_file_is_refused(tmp_path, suffix, content):
    file = tmp_path / f"g.{suffix}"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read .*np\.savez"):
        opened(tmp_path, "graph-file", file)


def test_pickled_arrays_and_single_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "g.npz", **{**ARRAYS, "x": np.array([[object()]] * 5)})
    with pytest.raises(DataError, match=r"cannot be read .*allow_pickle=False"):
        opened(tmp_path, "graph-file", tmp_path / "g.npz")
    np.save(tmp_path / "x.npy", ARRAYS["x"])
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(DataError, match="cannot be read"):
        opened(tmp_path, "graph-file", tmp_path / "x.npz")


def test_a_path_that_is_no_graph_file_says_what_is_wanted(tmp_path):
    for root, message in (
        ("", "data.root is empty.*absolute file"),
        (tmp_path / "absent.npz", "'absent.npz' is missing"),
        (tmp_path, "is missing in"),
    ):
        with pytest.raises(DataError, match=message):
            opened(tmp_path, "graph-file", root)
    (tmp_path / "g.pt").touch()
    with pytest.raises(DataError, match=r"neither \.npz nor \.safetensors"):
        opened(tmp_path, "graph-file", tmp_path / "g.pt")


def test_a_damaged_cache_is_named(tmp_path):
    opened(tmp_path, "graph-digits")
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    (folder / "edges.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match=f"{folder.name}.* is damaged .* delete that folder"):
        opened(tmp_path, "graph-digits")


# --- graphs that come with a data set -----------------------------------------------------------------------------


def test_digits_hear_their_nearest_neighbours(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    graph = opened(tmp_path, "graph-digits", undirected=False)
    np.testing.assert_array_equal(graph.features, (pixels / 16).astype(np.float32))
    np.testing.assert_array_equal(graph.labels, labels)
    assert (np.bincount(graph.edges[1]) == 10).all()
    assert (graph.edges[0] != graph.edges[1]).all()
    ink = np.array([[sum(image[8 * row : 8 * row + 8]) for row in range(8)] for image in pixels])
    lengths = np.linalg.norm(ink[graph.edges[0]] - ink[graph.edges[1]], axis=1).reshape(-1, 10)
    # Equally near neighbours may be exchanged, so it is the distances that must agree with scikit-learn.
    expected, _ = NearestNeighbors(n_neighbors=10).fit(ink).kneighbors()
    np.testing.assert_allclose(np.sort(lengths, axis=1), expected)
    assert 0.7 < (labels[graph.edges[0]] == labels[graph.edges[1]]).mean() < 0.85
    undirected = opened(tmp_path, "graph-digits")
    assert pairs(undirected.edges) == pairs(graph.edges) | pairs(graph.edges[::-1])


NODES = 520
"""Of a ring in Planetoid's format, which sets 500 nodes aside for validation."""


def write_planetoid(folder, name, test_nodes, nodes=NODES, classes=3):
    """Files as Planetoid has them: allx and ally for all but the test nodes, tx and ty in the order of test.index."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    x, y = (
        rng.integers(0, 2, (nodes, 4)).astype(np.float32),
        np.eye(classes, dtype=np.int32)[np.arange(nodes) % classes],
    )
    x[0] = 0
    known = min(test_nodes)
    graph = {node: [(node + 1) % nodes, (node - 1) % nodes] for node in range(nodes)}
    graph[0] += [0, 7]
    graph[1].append(2)
    parts = {"x": x[:2], "tx": x[test_nodes], "allx": x[:known]}
    content = {part: scipy.sparse.csr_matrix(value) for part, value in parts.items()}
    content |= {"y": y[:2], "ty": y[test_nodes], "ally": y[:known], "graph": graph}
    for part, value in content.items():
        (folder / f"ind.{name}.{part}").write_bytes(pickle.dumps(value, protocol=2))
    (folder / f"ind.{name}.test.index").write_text("".join(f"{node}\n" for node in test_nodes))
    return x, y.argmax(axis=1)


@pytest.mark.parametrize(("name", "folder"), [("cora", "Cora"), ("pubmed", "PubMed"), ("citeseer", "CiteSeer")])
def test_planetoid_files_are_read_and_left_alone(tmp_path, name, folder):
    x, y = write_planetoid(tmp_path / "data" / folder / "raw", name, test_nodes=[519, 517, 518])
    before = sorted((tmp_path / "data").rglob("*"))
    graph = opened(tmp_path, name, tmp_path / "data")
    sums = x.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(graph.features, x / np.maximum(sums, 1), rtol=1e-6)
    assert set(graph.features.sum(axis=1).round(6)) == {0.0, 1.0}
    np.testing.assert_array_equal(graph.labels, y)
    ring = {(node, (node + step) % NODES) for node in range(NODES) for step in (-1, 1)}
    assert pairs(graph.edges) == ring | {(0, 7), (7, 0)}
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_citeseer_nodes_without_features_are_class_0(tmp_path):
    write_planetoid(tmp_path / "CiteSeer" / "raw", "citeseer", test_nodes=[519, 517])
    graph = opened(tmp_path, "citeseer", tmp_path)
    assert not graph.features[518].any()
    assert graph.labels[518] == 0


def test_missing_and_damaged_planetoid_files_are_named(tmp_path):
    write_planetoid(tmp_path / "Cora" / "raw", "cora", test_nodes=[519, 517, 518])
    (tmp_path / "Cora" / "raw" / "ind.cora.graph").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"cora is damaged .*Planetoid files of cora must lie in"):
        opened(tmp_path, "cora", tmp_path)
    (tmp_path / "Cora" / "raw" / "ind.cora.graph").unlink()
    with pytest.raises(DataError, match=r"'ind\.cora\.graph' is missing in .*Cora/raw.*data\.root is.*Planetoid\("):
        opened(tmp_path, "cora", tmp_path)


def as_pyg_reads(tmp_path, root, name, folder):
    """Our own cleaning of the tensors that PyG's reader and ``NormalizeFeatures`` make."""
    data = NormalizeFeatures()(read_planetoid_data(str(root / folder / "raw"), name))
    np.savez(tmp_path / "pyg.npz", x=data.x, edge_index=data.edge_index, y=data.y)
    return opened(tmp_path, "graph-file", tmp_path / "pyg.npz")


def test_the_public_split_of_planetoid_is_pygs(tmp_path):
    write_planetoid(tmp_path / "Cora" / "raw", "cora", test_nodes=[519, 517, 518])
    graph = opened(tmp_path, "cora", tmp_path, split="file")
    data = read_planetoid_data(str(tmp_path / "Cora" / "raw"), "cora")
    for role, mask in enumerate((data.train_mask, data.val_mask, data.test_mask)):
        np.testing.assert_array_equal(graph.split == role, mask)
    assert np.bincount(graph.split + 1).tolist() == [15, 2, 500, 3]


def assert_same_graph(graph, expected):
    np.testing.assert_array_equal(graph.features, expected.features)
    np.testing.assert_array_equal(graph.labels, expected.labels)
    np.testing.assert_array_equal(graph.edges, expected.edges)


@pytest.mark.parametrize("test_nodes", [[519, 517, 518], [519, 516]])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_planetoid_files_are_what_pyg_makes_of_them(tmp_path, test_nodes, protocol):
    name, folder = ("citeseer", "CiteSeer") if len(test_nodes) == 2 else ("pubmed", "PubMed")
    raw_folder = tmp_path / folder / "raw"
    write_planetoid(raw_folder, name, test_nodes)
    for file in raw_folder.glob("*[!x]"):
        file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes()), protocol))
    assert_same_graph(opened(tmp_path, name, tmp_path), as_pyg_reads(tmp_path, tmp_path, name, folder))


def test_a_hostile_planetoid_file_runs_nothing(tmp_path):
    write_planetoid(tmp_path / "Cora" / "raw", "cora", test_nodes=[519, 517, 518])
    hostile = f"cos\nsystem\n(Vtouch {tmp_path / 'mark'}\ntR."
    (tmp_path / "Cora" / "raw" / "ind.cora.allx").write_text(hostile)
    options = {"data.name": "cora", "data.root": tmp_path, "data.cache": tmp_path / "cache"}
    options |= {"partition.scheme": "metis", "model.name": "gcn", "model.widths": "8,8"}
    arguments = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    with pytest.raises(DataError, match=r"asks for 'os\.system'; only arrays"):
        CliRunner().invoke(cli.app, ["data", "inspect", *arguments], catch_exceptions=False)
    assert not (tmp_path / "mark").exists()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("index", "message"),
    [("517\n517\n", "not all different"), ("-4\n-3\n-2", "names nodes"), ("9\n" * 10**5, "damaged")],
)
def test_a_test_index_that_fits_nothing_is_damaged(tmp_path, index, message):
    write_planetoid(tmp_path / "Cora" / "raw", "cora", test_nodes=[519, 517, 518])
    (tmp_path / "Cora" / "raw" / "ind.cora.test.index").write_text(index)
    with pytest.raises(DataError, match=f"cora is damaged .*{message}|{message}"):
        opened(tmp_path, "cora", tmp_path)


def test_test_nodes_far_apart_take_no_memory(tmp_path):
    write_planetoid(tmp_path / "CiteSeer" / "raw", "citeseer", test_nodes=[519, 517])
    (tmp_path / "CiteSeer" / "raw" / "ind.citeseer.test.index").write_text(f"517\n{10**15}\n")
    with pytest.raises(DataError, match=r"names nodes 517 to 1000000000000000; reading it takes .* are free"):
        opened(tmp_path, "citeseer", tmp_path)


def test_neighbours_that_many_nodes_share_take_no_memory(tmp_path, monkeypatch):
    """A file of 40 kB in which 5,000 nodes have one list of 5,000 neighbours between them."""
    write_planetoid(tmp_path / "Cora" / "raw", "cora", test_nodes=[519, 517, 518])
    shared = list(range(5000))
    file = tmp_path / "Cora" / "raw" / "ind.cora.graph"
    file.write_bytes(pickle.dumps(dict.fromkeys(shared, shared), protocol=2))
    assert file.stat().st_size < 50_000
    monkeypatch.setattr(memory, "available_memory", lambda: 10**8)
    tracemalloc.start()
    with pytest.raises(DataError, match="have 25,000,000 neighbours in all"):
        opened(tmp_path, "cora", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**8


@pytest.mark.skipif("FRAMP_PLANETOID" not in os.environ, reason="FRAMP_PLANETOID is the folder around Cora/raw")
def test_cora_is_what_everybody_calls_cora(tmp_path):
    graph = opened(tmp_path, "cora", Path(os.environ["FRAMP_PLANETOID"]))
    assert (len(graph), graph.edges.shape, graph.shape, graph.classes) == (2708, (2, 2 * 5278), (1433,), 7)
    assert sorted(np.bincount(graph.labels)) == [180, 217, 298, 351, 418, 426, 818]
    expected = as_pyg_reads(tmp_path, Path(os.environ["FRAMP_PLANETOID"]), "cora", "Cora")
    assert_same_graph(graph, expected)
    same = (graph.labels[graph.edges[0]] == graph.labels[graph.edges[1]]).mean()
    assert round(float(same), 2) == 0.81
    largest = opened(tmp_path, "cora", Path(os.environ["FRAMP_PLANETOID"]), largest_component=True)
    assert (len(largest), largest.edges.shape[1]) == (2485, 2 * 5069)


def write_arxiv(root, names=False):
    """A tiny ogbn-arxiv in ogb's layout: gzipped tables without header, one graph."""
    rng = np.random.default_rng(0)
    tables = {
        "edge": np.array([[0, 1], [1, 2], [2, 0], [4, 3]]),
        "num-node-list": np.array([[5]]),
        "num-edge-list": np.array([[4]]),
        "node-feat": rng.standard_normal((5, 3)).round(6),
        "node-label": np.array([[4], [0], [1], [2], [3]]),
        "node_year": np.array([[2000]] * 5),
    }
    raw_folder = root / "ogbn_arxiv" / "raw"
    raw_folder.mkdir(parents=True)
    for name, table in tables.items():
        pandas.DataFrame(table).to_csv(raw_folder / f"{name}.csv.gz", index=False, header=False)
    if names:
        (root / "ogbn_arxiv" / "mapping").mkdir()
        mapping = pandas.DataFrame({"label idx": range(5), "arxiv category": [f"arxiv cs {c}" for c in "abcde"]})
        mapping.to_csv(root / "ogbn_arxiv" / "mapping" / "labelidx2arxivcategeory.csv.gz", index=False)
    return tables


@pytest.mark.parametrize("names", [False, True])
def test_arxiv_is_read_from_the_raw_tables(tmp_path, names, capfd):
    tables = write_arxiv(tmp_path, names)
    graph = opened(tmp_path, "ogbn-arxiv", tmp_path, undirected=False)
    np.testing.assert_array_equal(graph.features, tables["node-feat"].astype(np.float32))
    np.testing.assert_array_equal(graph.labels, tables["node-label"][:, 0])
    assert pairs(graph.edges) == {(0, 1), (1, 2), (2, 0), (4, 3)}
    assert graph.class_names == (tuple(f"arxiv cs {c}" for c in "abcde") if names else tuple("01234"))
    assert capfd.readouterr() == ("", "")


def test_arxiv_has_a_split_by_years(tmp_path):
    write_arxiv(tmp_path)
    with pytest.raises(
        DataError, match=r"'train\.csv\.gz', 'valid\.csv\.gz', 'test\.csv\.gz' is missing in .*split/time"
    ):
        opened(tmp_path, "ogbn-arxiv", tmp_path, split="file")
    folder = tmp_path / "ogbn_arxiv" / "split" / "time"
    folder.mkdir(parents=True)
    for part, nodes in (("train", [4, 0]), ("valid", [2]), ("test", [1])):
        pandas.DataFrame(nodes).to_csv(folder / f"{part}.csv.gz", index=False, header=False)
    np.testing.assert_array_equal(opened(tmp_path, "ogbn-arxiv", tmp_path, split="file").split, [0, 2, 1, -1, 0])
    assert opened(tmp_path, "ogbn-arxiv", tmp_path).split is None


def test_missing_and_damaged_arxiv_tables_are_named(tmp_path):
    write_arxiv(tmp_path)
    folder = tmp_path / "ogbn_arxiv" / "raw"
    (folder / "edge.csv.gz").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"ogbn-arxiv is damaged .*arxiv\.zip"):
        opened(tmp_path, "ogbn-arxiv", tmp_path)
    (folder / "node-label.csv.gz").unlink()
    with pytest.raises(DataError, match=r"'node-label\.csv\.gz' is missing in .*arxiv\.zip.*rename"):
        opened(tmp_path, "ogbn-arxiv", tmp_path)


QUIETLY = """
import sys, threading
started = []
start = threading.Thread.start
threading.Thread.start = lambda thread: (started.append(thread), start(thread))
from framp_core.config import DataConfig, GraphConfig
from framp_core.data.graph import load_graph
assert not {"ogb", "torch_geometric", "pymetis", "networkx"} & set(sys.modules)
load_graph(DataConfig(name="ogbn-arxiv", root=sys.argv[1], cache=sys.argv[2]), GraphConfig())
assert "ogb" in sys.modules and "outdated" not in sys.modules
# tqdm, which ogb uses, watches its own bars in a thread.
assert not [thread for thread in started if type(thread).__module__ != "tqdm._monitor"], started
"""


def test_reading_arxiv_asks_no_server_and_says_nothing(tmp_path):
    write_arxiv(tmp_path)
    command = [sys.executable, "-c", QUIETLY, str(tmp_path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_not_installed_is_named_with_how_to_install_it(tmp_path, monkeypatch):
    write_arxiv(tmp_path)
    monkeypatch.setitem(sys.modules, "ogb.io.read_graph_raw", None)
    with pytest.raises(ConfigError, match=r"ogb\.io\.read_graph_raw .*pip install 'framp\[graph\]'"):
        opened(tmp_path, "ogbn-arxiv", tmp_path)


# --- files that claim more than they hold, or hold more than fits -------------------------------------------------


def write_npz(path, arrays, **headers):
    """Arrays as ``np.savez`` writes them, under the header that is given for a name instead of its own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                content, {**np.lib.format.header_data_from_array_1_0(array), **headers.get(name, {})}
            )
            archive.writestr(f"{name}.npy", content.getvalue() + array.tobytes())


@pytest.mark.parametrize("claimed", [{"shape": (10**6, 10**6)}, {"descr": "<U100000000"}, {"shape": (4, 3)}])
def test_an_array_that_is_not_as_long_as_it_says_is_refused(tmp_path, claimed):
    write_npz(tmp_path / "g.npz", ARRAYS)
    assert len(opened(tmp_path, "graph-file", tmp_path / "g.npz")) == 5
    write_npz(tmp_path / "h.npz", ARRAYS, x=claimed)
    with pytest.raises(DataError, match=r"x\.npy says that it is .* and has 60 bytes"):
        opened(tmp_path, "graph-file", tmp_path / "h.npz")


def test_an_archive_that_unpacks_to_more_than_the_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "g.npz", **{**ARRAYS, "x": np.zeros((5, 10**6), np.float32)})
    assert (tmp_path / "g.npz").stat().st_size < 10**5
    monkeypatch.setattr(memory, "available_memory", lambda: 50 * 10**6)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(
        DataError, match=r"g\.npz' has 2\..*e-05 GB, and its arrays 0\.02 GB; reading it takes 0\.06 GB"
    ):
        opened(tmp_path, "graph-file", tmp_path / "g.npz")


def test_a_table_of_weights_is_said_and_one_that_is_no_file_is_refused(tmp_path):
    write_arxiv(tmp_path)
    weights = tmp_path / "ogbn_arxiv" / "raw" / "edge-feat.csv.gz"
    weights.write_bytes(gzip.compress(b"1.5\n" * 4))
    said = opened(tmp_path, "ogbn-arxiv", tmp_path).notes
    assert said == {"edge weights": "'edge_feat' not read: all edges count the same"}
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(DataError, match=r"'edge-feat\.csv\.gz' is missing"):
        opened(tmp_path, "ogbn-arxiv", tmp_path)


@pytest.mark.parametrize("table", ["node-feat", "edge-feat"])
def test_a_table_that_unpacks_to_more_than_the_memory_is_refused(tmp_path, monkeypatch, table):
    write_arxiv(tmp_path)
    file = tmp_path / "ogbn_arxiv" / "raw" / f"{table}.csv.gz"
    file.write_bytes(gzip.compress(b"0,0,0\n" * 10**6))
    monkeypatch.setattr(memory, "available_memory", lambda: 8 * 10**6)
    with pytest.raises(DataError, match=rf"{table}\.csv\.gz' unpacks to 0\.00.* GB or more; reading it takes"):
        opened(tmp_path, "ogbn-arxiv", tmp_path)


def test_a_header_of_gigabytes_is_refused_before_it_is_unpacked(tmp_path):
    """A few hundred kB that unpack to one header of 200 MB."""
    write_npz(tmp_path / "g.npz", {name: array for name, array in ARRAYS.items() if name != "x"})
    length = 2 * 10**8
    with (
        zipfile.ZipFile(tmp_path / "g.npz", "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as entry,
    ):
        entry.write(b"\x93NUMPY\x02\x00" + length.to_bytes(4, "little"))
        for _ in range(200):
            entry.write(b" " * 10**6)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"g\.npz' cannot be read \(EOF: reading array header, expected 200000000"):
        opened(tmp_path, "graph-file", tmp_path / "g.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**7


@pytest.mark.parametrize("names", [[b"a", "\u00e9".encode(), b"c"], ["a", "\u00e9", "c"]])
def test_class_names_may_be_saved_as_bytes(tmp_path, names):
    np.savez(tmp_path / "g.npz", **ARRAYS, class_names=np.array(names))
    assert opened(tmp_path, "graph-file", tmp_path / "g.npz").class_names == ("a", "\u00e9", "c")
