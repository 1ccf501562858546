"""Nodes without a label and a graph's own split: who trains, who tests, and who passes messages alone."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import vector_to_parameters
from typer.testing import CliRunner

from framp import cli
from framp.engines import run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data.graph import client_data, load_graph_partition, make_graph_partition
from framp_core.data.graph.checks import UNLABELLED
from framp_core.data.graph.nodes import LabelledNodes
from framp_core.errors import ConfigError, DataError
from framp_core.models import build_model, initial_parameters
from framp_core.randomness import stream
from framp_core.report.html import _environment
from framp_core.rounding import largest_remainder
from tests.small_graph import CLASSES, FEATURES, NODES, save_small_graph

Build = Callable[..., FrampConfig]
WITHOUT = np.arange(NODES) % 5 == 3
ROLES = np.random.default_rng(3).choice(3, NODES, p=(0.3, 0.2, 0.5))


@pytest.fixture
def saved(tiny: Build, tmp_path: Path) -> Build:
    """A small graph under a fifth of whose nodes has no label, with masks and edge weights."""
    settings = save_small_graph(tmp_path / "plain.npz")
    with np.load(tmp_path / "plain.npz") as arrays:
        more = dict(arrays)
    more["y"] = np.where(WITHOUT, -1, more["y"])
    more["edge_attr"] = np.ones(more["edge_index"].shape[1])
    more |= {f"{part}_mask": (role == ROLES) for role, part in enumerate(("train", "val", "test"))}
    np.savez(tmp_path / "g.npz", **more)

    def build(values: dict[str, Scalar] | None = None, name: str = "run", file: str = "g.npz") -> FrampConfig:
        return tiny({**settings, "data.root": str(tmp_path / file), **(values or {})}, name)

    return build


def held(config: FrampConfig) -> dict[str, np.ndarray]:
    _, partition = load_graph_partition(config, config.partition.nodes)
    parts = ("train", "validation", "test", "context")
    return {part: np.concatenate([getattr(client, part) for client in partition.clients]) for part in parts}


def test_nodes_without_a_label_are_held_and_have_no_role(saved: Build) -> None:
    nodes = held(saved())
    assert sorted(np.concatenate(list(nodes.values()))) == list(range(NODES))
    assert sorted(nodes["context"]) == np.flatnonzero(WITHOUT).tolist()
    expected = largest_remainder(NODES - WITHOUT.sum(), np.array([0.4, 0.3, 1 - 0.4 - 0.3])).tolist()
    assert [len(nodes[part]) for part in ("train", "validation", "test")] == expected


def test_the_masks_of_a_file_are_its_split(saved: Build) -> None:
    nodes = held(saved({"graph.split": "file"}))
    for role, part in enumerate(("train", "validation", "test")):
        assert sorted(nodes[part]) == np.flatnonzero((role == ROLES) & ~WITHOUT).tolist()
    assert sorted(nodes["context"]) == np.flatnonzero(WITHOUT).tolist()


def test_with_labels_for_all_the_random_split_is_what_it_was(saved: Build) -> None:
    config = saved(file="plain.npz")
    nodes = held(config)
    counts = largest_remainder(NODES, np.array([0.4, 0.3, 1 - 0.4 - 0.3]))
    roles = stream(config.seed, "node-split").permutation(np.repeat(np.arange(3), counts))
    for role, part in enumerate(("train", "validation", "test")):
        assert sorted(nodes[part]) == np.flatnonzero(roles == role).tolist()
    _, partition = load_graph_partition(config, config.partition.nodes)
    assert not any("context" in client for client in partition.manifest()["clients"])


def logits(config: FrampConfig, nodes: LabelledNodes) -> torch.Tensor:
    model = build_model(config.model, (FEATURES,), CLASSES)
    vector_to_parameters(initial_parameters(model, 0, config.model.initialisation), model.parameters())
    ((batch, _),) = nodes.ordered_batches(0, torch.device("cpu"))
    with torch.no_grad():
        _, result = model.eval()(batch)
    return result


@pytest.mark.parametrize("split", ["random", "file"])
def test_a_node_without_a_label_passes_messages_and_is_no_example(saved: Build, split: str) -> None:
    config = saved({"graph.split": split, "partition.concept-shift-clusters": 2})
    for index in range(config.partition.nodes):
        client = client_data(config, index, config.partition.nodes)
        for examples in (client.train, client.validation, client.test, client.union_test):
            assert (examples.selected_labels >= 0).all()
        assert isinstance(client.train, LabelledNodes)
        (own,) = client.train.subgraphs
        np.testing.assert_array_equal(own.labels == UNLABELLED, WITHOUT[own.nodes])
        assert len(client.known) == len(own)
        # Its features reach the training nodes next to it, and those alone that are within two hops.
        mute = np.flatnonzero(own.labels == UNLABELLED)
        louder = own.features.clone()
        louder[mute] += 10
        changed = replace(client.train, subgraphs=(replace(own, features=louder),))
        moved = (logits(config, client.train) != logits(config, changed)).any(dim=1).numpy()
        adjacency = np.eye(len(own), dtype=bool)
        adjacency[own.edges[1], own.edges[0]] = True
        reached = (adjacency @ adjacency)[:, mute].any(axis=1)[client.train.positions]
        assert moved.any()
        assert not moved[~reached].any()


def test_a_run_counts_the_labelled_test_nodes_of_the_file(
    saved: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server_app.app.write_report", lambda path: None)
    with caplog.at_level(logging.WARNING, "flwr.framp.data"):
        run = run_local(saved({"graph.split": "file"}))
    _, partition = load_graph_partition(run.config, run.config.partition.nodes)
    tested = {row.client: row.total for row in run.clients() if row.population == "local" and row.moment == "before"}
    assert tested == {client.name: len(client.test) for client in partition.clients}
    said = f"{WITHOUT.sum()} of {NODES} nodes: they pass messages, untrained and untested"
    weights = "'edge_attr' not read: all edges count the same"
    assert run.json("manifest.json")["notes"] == {"edge weights": weights, "without a label": said}
    assert [record.getMessage() for record in caplog.records if record.name == "flwr.framp.data"] == [
        f"data: edge weights: {weights}; without a label: {said}"
    ]
    assert said in _environment(run)


def test_inspect_says_what_of_a_file_is_not_used(saved: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "width", 400)

    def shown(values: dict[str, Scalar] | None = None) -> str:
        (tmp_path / "run.toml").write_text(saved(values).to_toml())
        result = CliRunner().invoke(cli.app, ["data", "inspect", str(tmp_path / "run.toml")])
        assert result.exit_code == 0, result.output
        return result.output

    drawn = shown()
    assert "train_mask, val_mask, test_mask not used: the split is random; graph.split=file takes theirs" in drawn
    assert "'edge_attr' not read: all edges count the same" in drawn
    assert f"{WITHOUT.sum()} of {NODES} nodes: they pass messages" in drawn
    own = shown({"graph.split": "file"})
    assert "_mask" not in own
    counts = np.bincount(ROLES[~WITHOUT], minlength=3)  # What the clients hold: without a label nothing is trained on.
    assert counts.sum() < NODES
    said = "the data set's own: {} training, {} validation, {} test nodes, {} in none of them"
    assert said.format(*counts, WITHOUT.sum()) in own


def test_shares_mean_nothing_with_a_split_of_the_file(saved: Build) -> None:
    with pytest.raises(ConfigError, match=r"graph.split='file' takes .* graph.train-share=0.5 means nothing"):
        saved({"graph.split": "file", "graph.train-share": 0.5})
    with pytest.raises(ConfigError, match=r"is images, for which graph.split='file' means nothing"):
        FrampConfig.from_flat({"graph.split": "file"})


def test_masks_without_a_test_node_for_a_client_are_named(saved: Build) -> None:
    config = saved({"graph.split": "file", "partition.clients": 2})
    graph, _ = load_graph_partition(config, 2)
    assert graph.split is not None
    with pytest.raises(DataError, match=r"none of them test data \(graph.split is 'file'\); choose .* other masks"):
        make_graph_partition(config, replace(graph, split=np.minimum(graph.split, 1)))
