"""Local training, descriptors, prototypes and evaluation on graphs, against what anyone would write by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from framp_core.config import FrampConfig
from framp_core.data import ClientData, load_client, load_partition
from framp_core.data.graph import LabelledNodes, Subgraph
from framp_core.descriptors import build_descriptor
from framp_core.graph_batch import GraphBatch
from framp_core.local_training import client_prototypes, evaluate, train_locally
from framp_core.models import FlatModel, build_model, initial_parameters
from tests.small_graph import CLASSES, FEATURES, save_small_graph

Build = Callable[..., FrampConfig]
PLAIN = {"local.prior-strength": 0.0, "local.alignment-weight": 0.0, "local.nested-share": 0.0}


@pytest.fixture
def graph_config(tiny: Build, tmp_path: Path) -> Build:
    settings = save_small_graph(tmp_path / "small.npz")
    return lambda **values: tiny({**settings, **{key.replace("__", "."): value for key, value in values.items()}})


def client_of(config: FrampConfig, index: int = 0) -> ClientData:
    return load_client(config, index, config.partition.nodes)


def subgraph_of(data: ClientData) -> Subgraph:
    assert isinstance(data.train, LabelledNodes)
    return data.train.subgraphs[0]


def flat_model(config: FrampConfig) -> FlatModel:
    return FlatModel(build_model(config.model, (FEATURES,), CLASSES))


def initial(config: FrampConfig) -> Tensor:
    return initial_parameters(build_model(config.model, (FEATURES,), CLASSES), seed=3)


def trained(config: FrampConfig, mask: np.ndarray | None = None, seed: int = 7, torch_seed: int = 0) -> np.ndarray:
    data, rng, model, start = client_of(config), np.random.default_rng(seed), flat_model(config), initial(config)
    torch.manual_seed(torch_seed)
    before = torch.get_rng_state()
    delta = train_locally(model, start.numpy(), mask, data, config, rng, None).delta
    assert torch.equal(torch.get_rng_state(), before)
    return delta


def ordinary_training(config: FrampConfig) -> np.ndarray:
    """A PyG network on the whole subgraph, loss at all training nodes, PyTorch's optimizer."""
    data = client_of(config)
    own, network = subgraph_of(data), build_model(config.model, (FEATURES,), CLASSES)
    vector_to_parameters(initial(config).clone(), network.parameters())
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimizer = kinds[config.local.optimizer](network.parameters(), lr=config.local.learning_rate)
    seeds = torch.from_numpy(data.train.positions)  # type: ignore[attr-defined]
    for _ in range(config.local.steps):
        logits, _ = network(GraphBatch(own.features, own.edges, seeds))
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.from_numpy(own.labels)[seeds]).backward()
        optimizer.step()
    return (parameters_to_vector(network.parameters()).detach() - initial(config)).numpy()


@pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_capacity_1_is_ordinary_training_on_the_whole_subgraph(graph_config: Build, name: str, optimizer: str) -> None:
    config = graph_config(model__name=name, local__optimizer=optimizer, local__steps=5, **PLAIN)
    expected = ordinary_training(config)
    np.testing.assert_allclose(trained(config), expected, atol=1e-5)
    ones = np.ones(len(expected), dtype=bool)
    np.testing.assert_array_equal(trained(config, ones), trained(config))
    assert np.abs(trained(graph_config(model__name=name, local__optimizer=optimizer)) - expected).max() > 1e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_dropped_weights_stay_zero(graph_config: Build, optimizer: str) -> None:
    config = graph_config(local__optimizer=optimizer, local__weight_decay=0.01, local__steps=5)
    layout = flat_model(config).layout
    mask = ~layout.maskable | (np.random.default_rng(1).random(layout.size) < 0.3)
    delta = trained(config, mask)
    assert not delta[~mask].any()
    assert np.count_nonzero(delta[mask]) > 0.5 * mask.sum()


def test_dropout_draws_from_the_clients_stream_alone(graph_config: Build) -> None:
    config, off = graph_config(model__dropout=0.5), graph_config(model__dropout=0.0)
    first = trained(config)
    np.testing.assert_array_equal(trained(config, torch_seed=1), first)
    assert not np.array_equal(trained(config, seed=8), first)
    # Without dropout the stream decides nothing: every step sees the whole subgraph.
    np.testing.assert_array_equal(trained(replace_nested(off), seed=8), trained(replace_nested(off)))


def replace_nested(config: FrampConfig) -> FrampConfig:
    return config.model_copy(update={"local": config.local.model_copy(update={"nested_share": 0.0})})


def test_dropout_ends_with_training(graph_config: Build) -> None:
    config = graph_config(model__dropout=0.5)
    model, data = flat_model(config), client_of(config)
    train_locally(model, initial(config).numpy(), None, data, config, np.random.default_rng(0), None)
    first, second = client_prototypes(model, data), client_prototypes(model, data)
    np.testing.assert_array_equal(first.means, second.means)
    with pytest.raises(RuntimeError, match="boom"):
        train_locally(model, initial(config).numpy(), None, replace(data, train=Broken(data)), config,
                      np.random.default_rng(0), None)  # fmt: skip
    assert not model.model.training


class Broken:
    def __init__(self, data: ClientData) -> None:
        self.selected_labels = data.train.selected_labels

    def __len__(self) -> int:
        return len(self.selected_labels)

    def training_batches(self, *_: object) -> None:
        raise RuntimeError("boom")


def test_prototypes_are_class_means_over_the_training_nodes(graph_config: Build) -> None:
    config = graph_config()
    model, data = flat_model(config), client_of(config)
    model.load(initial(config))
    own = subgraph_of(data)
    _, features = model(GraphBatch(own.features, own.edges, torch.arange(len(own))))
    held = data.train.positions  # type: ignore[attr-defined]
    found = client_prototypes(model, data)
    for place, label in enumerate(found.classes):
        members = [node for node in held if own.labels[node] == label]
        expected = features.detach().numpy()[members].mean(axis=0)
        np.testing.assert_allclose(found.means[place], expected, atol=1e-5)
        assert found.counts[place] == len(members)
    assert found.classes.tolist() == sorted(set(own.labels[held].tolist()))


def test_union_counts_each_clients_test_nodes_in_its_own_subgraph(graph_config: Build) -> None:
    config = graph_config()
    model = flat_model(config)
    model.load(initial(config))
    expected = 0
    clients = [client_of(config, index) for index in range(config.partition.clients)]
    for data in clients:
        own = subgraph_of(data)
        seeds = torch.from_numpy(data.test.positions)  # type: ignore[attr-defined]
        logits, _ = model(GraphBatch(own.features, own.edges, seeds))
        expected += int((logits.argmax(dim=1) == torch.from_numpy(own.labels)[seeds]).sum())
    (found,) = evaluate(model, clients[0].union_test, torch.zeros(1, CLASSES))
    assert (found.correct, found.total) == (expected, sum(len(data.test) for data in clients))
    assert 0 < found.correct < found.total


def test_a_clients_subgraph_has_no_edges_to_other_clients(graph_config: Build) -> None:
    """The logits of its test nodes are those of its own subgraph, not of the whole graph."""
    config = graph_config()
    model, data = flat_model(config), client_of(config)
    model.load(initial(config))
    graph, _ = load_partition(config, config.partition.nodes)
    own = subgraph_of(data)
    held = data.test.positions  # type: ignore[attr-defined]
    ((batch, _),) = list(data.test.ordered_batches(1, torch.device("cpu")))
    whole = GraphBatch(*(torch.from_numpy(array.copy()) for array in (graph.features, graph.edges, own.nodes[held])))
    assert torch.equal(batch.x[batch.seeds], whole.x[whole.seeds])
    assert (model(batch)[0] - model(whole)[0]).abs().max() > 1e-3


# --- descriptors ---------------------------------------------------------------------------------------------------


def propagated(own: Subgraph, hops: int) -> np.ndarray:
    dense = np.eye(len(own))
    for source, target in own.edges.T.tolist():
        dense[target, source] += 1
    scale = np.diag(dense.sum(axis=1) ** -0.5)
    return np.linalg.matrix_power(scale @ dense @ scale, hops) @ own.features.double().numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("hops", [0, 1, 2])
def test_graph_moments_by_hand(graph_config: Build, hops: int) -> None:
    config = graph_config(descriptor__name="moments", descriptor__encoder_width=5, graph__hops=hops)
    descriptor, data = build_descriptor(config, (FEATURES,), CLASSES), client_of(config)
    own = subgraph_of(data)
    weights = descriptor.encoder.projection.weight.detach().double().numpy()  # type: ignore[attr-defined]
    features = np.maximum(propagated(own, hops) @ weights.T, 0)
    degrees = np.array([sum(target == node for target in own.edges[1].tolist()) for node in range(len(own))])
    logs = np.log(1 + degrees)
    shape = [logs.mean(), np.sqrt(((logs - logs.mean()) ** 2).mean()), logs.max(), np.mean(degrees == 0)]
    spread = np.sqrt(((features - features.mean(axis=0)) ** 2).mean(axis=0))
    blocks = [data.class_counts(), features.mean(axis=0), spread, np.array(shape)]
    vector = descriptor.describe(data)
    np.testing.assert_allclose(vector, np.concatenate([unit(block) for block in blocks]) / 2, atol=1e-5)
    assert descriptor.size == len(vector) == CLASSES + 2 * 5 + 4


def test_class_moments_read_training_nodes_alone(graph_config: Build) -> None:
    config = graph_config(descriptor__encoder_width=5)
    descriptor, data = build_descriptor(config, (FEATURES,), CLASSES), client_of(config)
    own, held = subgraph_of(data), data.train.positions  # type: ignore[attr-defined]
    weights = descriptor.encoder.projection.weight.detach().double().numpy()  # type: ignore[attr-defined]
    features = np.maximum(propagated(own, 2) @ weights.T, 0)
    shares = data.class_counts() / len(held)
    means = [
        np.sqrt(shares[label]) * features[[node for node in held if own.labels[node] == label]].mean(axis=0)
        if shares[label]
        else np.zeros(5)
        for label in range(CLASSES)
    ]
    expected = unit(np.concatenate([np.sqrt(shares), *means]))
    np.testing.assert_allclose(descriptor.describe(data), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["class-moments", "moments", "histogram", "warmup"])
def test_descriptors_of_graphs_are_repeatable_unit_vectors_that_differ(graph_config: Build, name: str) -> None:
    config = graph_config(descriptor__name=name, model__dropout=0.5)
    first, again, other = (
        build_descriptor(config, (FEATURES,), CLASSES).describe(client_of(config, index)) for index in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert np.abs(first - other).max() > 1e-3


def test_warmup_is_the_mean_embedding_of_all_nodes(graph_config: Build) -> None:
    config = graph_config(descriptor__name="warmup")
    descriptor, data = build_descriptor(config, (FEATURES,), CLASSES), client_of(config)
    vector, own = descriptor.describe(data), subgraph_of(data)
    model = descriptor.model  # type: ignore[attr-defined]
    _, features = model(GraphBatch(own.features, own.edges, torch.arange(len(own))))
    np.testing.assert_allclose(vector, unit(features.detach().double().numpy().mean(axis=0)), atol=1e-5)
