"""Whole runs on a graph: the server knows nothing of it, and every method serves it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from framp.engines import run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data.graph import load_graph_partition
from framp_core.errors import ConfigError, DataError
from framp_core.graph_batch import GraphBatch
from framp_core.methods import settings_of
from framp_core.models import build_model, initial_parameters
from tests.server_app.runs import final_theta, measured
from tests.small_graph import CLASSES, FEATURES, save_small_graph

Build = Callable[..., FrampConfig]


@pytest.fixture
def graph_run(tiny: Build, tmp_path: Path) -> Build:
    settings = save_small_graph(tmp_path / "small.npz")

    def build(values: dict[str, Scalar] | None = None, name: str = "run", method: str = "framp") -> FrampConfig:
        return tiny(settings_of(method, {**settings, **(values or {})}), name)

    return build


@pytest.mark.parametrize(
    ("method", "network"),
    [
        *((method, "gcn") for method in ("framp", "fiarse", "heterofl", "fedrolex", "scalefl", "fedavg", "local")),
        ("fiarse-released", "gcn"),
        *((method, "gcn") for method in ("heterofl-budget", "fedrolex-budget")),
        *((method, network) for method in ("framp", "heterofl", "fedrolex", "scalefl") for network in ("sage", "gat")),
    ],
)
def test_every_method_trains_every_network_on_a_graph(graph_run: Build, method: str, network: str) -> None:
    run = run_local(graph_run({"model.name": network, "capacity.sizes": "1/16,1/4,1"}, method=method))
    last = run.json("summary.json")["rows"][-1]
    trained = [row for row in run.events() if row["kind"] == "train"]
    assert [row["learnt"] for row in trained] == [True, True]
    assert not any(row.get("refused") for row in run.events())
    assert 0 < last["union"] < 1
    assert last["unseen_clients"] == 1


def test_same_numbers_with_one_and_two_workers(graph_run: Build) -> None:
    values: dict[str, Scalar] = {"model.dropout": 0.5, "graph.full-batch-nodes": 5, "local.batch-size": 4}
    first = measured(run_local(graph_run(values, "one")))
    assert first == measured(run_local(graph_run({**values, "engine.workers": 2}, "two")))
    assert first != measured(run_local(graph_run({**values, "graph.neighbours": "1,1"}, "fewer")))


def test_one_client_is_centralised_training(graph_run: Build) -> None:
    config = graph_run(
        {
            "partition.clients": 1,
            "partition.unseen-clients": 0,
            "server.clients-per-round": 1,
            "rounds": 3,
            "local.learning-rate": 0.5,
        },
        method="fedavg",
    )
    graph, partition = load_graph_partition(config, 1)
    network = build_model(config.model, (FEATURES,), CLASSES)
    vector_to_parameters(initial_parameters(network, config.seed), network.parameters())
    seeds = torch.from_numpy(partition.clients[0].train)
    inputs = GraphBatch(torch.from_numpy(graph.features.copy()), torch.from_numpy(graph.edges.copy()), seeds)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(config.rounds * config.local.steps):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs)[0], torch.from_numpy(graph.labels[partition.clients[0].train])).backward()
        optimizer.step()
    expected = parameters_to_vector(network.parameters()).detach().numpy()
    np.testing.assert_allclose(final_theta(config)[0], expected, atol=1e-5)
    start = initial_parameters(build_model(config.model, (FEATURES,), CLASSES), config.seed).numpy()
    assert np.abs(expected - start).max() > 0.01


def test_a_graph_learns_its_planted_classes(graph_run: Build) -> None:
    values: dict[str, Scalar] = {"rounds": 25, "local.learning-rate": 0.5, "evaluation.every": 25, "local.steps": 5}
    learnt = run_local(graph_run(values, method="fedavg")).json("summary.json")["rows"][-1]
    values["local.learning-rate"] = 1e-6
    blind = run_local(graph_run(values, "blind", "fedavg")).json("summary.json")["rows"][-1]

    assert learnt["union"] > 2 / CLASSES > blind["union"]


def test_bad_data_are_named_once_before_anything_is_written(graph_run: Build, tmp_path: Path) -> None:
    for root, words in ((tmp_path / "none.npz", "'none.npz' is missing"), (tmp_path / "small.txt", "neither .npz")):
        (tmp_path / "small.txt").write_text("x")
        with pytest.raises(DataError, match=words):
            run_local(graph_run({"data.root": str(root)}))
    with pytest.raises(DataError, match="a multiple of 3"):
        run_local(graph_run({"partition.overlap": 3}))
    assert not (tmp_path / "run").exists()


def test_batch_statistics_are_refused_before_anything_is_written(graph_run: Build, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch-statistics"):
        graph_run({"model.normalisation": "batch-statistics"})
    assert not (tmp_path / "run").exists()
