"""Clients as one program: the numbers of training them one by one, but for the order of additions."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from framp_core.cohort import StackedNetworks, stackable
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import load_client
from framp_core.errors import ModelError
from framp_core.layout import Coupling
from framp_core.local_training import LocalResult, LocalTask, client_prototypes, train_locally
from framp_core.masking import extract
from framp_core.models import Block, FeaturesAndHead, FlatModel, build_model, initial_parameters
from framp_core.prototypes import Prototypes
from tests.small_graph import save_small_graph

CLIENTS = 5
TOLERANCE = 1e-4
"""Largest difference of two deltas in parts of the largest change of a weight, after eight steps of SGD."""
OF_ADAM = 10 * TOLERANCE
"""Adam divides by the gradient's size, which makes the smallest gradients' rounding errors as large as any change."""

BASE: dict[str, Scalar] = {
    "partition.clients": CLIENTS,
    "partition.unseen-clients": 0,
    "model.widths": "8,8",
    "model.groups": 4,
    "local.steps": 8,
    "local.device": "cpu",
}
RESIDUAL: dict[str, Scalar] = {"model.name": "resnet18", "model.widths": "4,4,8,8", "capacity.sizes": "1/4,1"}
CASES: dict[str, dict[str, Scalar]] = {
    "the method": {},
    "plain": {"local.nested-share": 0.0, "local.alignment-weight": 0.0, "local.prior-strength": 0.0},
    "momentum and decay": {"local.momentum": 0.9, "local.weight-decay": 1e-3, "local.learning-rate": 0.03},
    "gradients clipped": {"local.gradient-clip": 0.5, "local.momentum": 0.9, "local.learning-rate": 0.03},
    "Adam": {"local.optimizer": "adam", "local.learning-rate": 1e-3},
    "cosine": {"local.alignment-distance": "cosine", "local.alignment-weight": 1.0},
    "FIARSE": {"local.mask": "threshold-controlled", "local.nested-share": 0.0},
    "FIARSE released": {"local.mask": "following", "local.nested-share": 0.0},
    "masked cross-entropy": {"local.masked-cross-entropy": True},
    "ScaleFL": {"model.exits": 0, "local.distillation-weight": 0.1},
    "batch statistics": {"model.normalisation": "batch-statistics"},
    "augmentation": {"data.augment": True},
    # Norms over a few values of a last stage of one pixel make it chaotic: hence one step.
    "residual": RESIDUAL | {"local.steps": 1, "model.groups": 1},
    "linear": {"model.name": "mlp"},
}


@pytest.fixture(autouse=True)
def _on_one_thread() -> None:
    torch.set_num_threads(1)


def config_of(values: dict[str, Scalar] | None = None) -> FrampConfig:
    return FrampConfig.from_flat({**BASE, **(values or {})})


def network(config: FrampConfig) -> FlatModel:
    return FlatModel(build_model(config.model, (1, 8, 8), 10), precision=config.local.precision)


def tasks(config: FrampConfig, *numbers: int) -> list[LocalTask]:
    """Tasks of the clients with these numbers, each with values, mask, data and stream of its own."""
    model = build_model(config.model, (1, 8, 8), 10)
    layout = FlatModel(model).layout
    aligned = config.local.alignment_weight > 0
    means = np.random.default_rng(3).normal(size=(4, model.feature_size)).astype(np.float32)
    prototypes = Prototypes(np.arange(4), np.ones(4, dtype=np.int64), means) if aligned else None
    made = []
    for number in numbers:
        client, theta = load_client(config, number, CLIENTS), initial_parameters(model, number).numpy()
        mask = extract(theta, layout, config.extraction, client.capacity)
        made.append(LocalTask(theta, mask, client, config, np.random.default_rng(number), prototypes))
    return made


def together(config: FrampConfig, *numbers: int) -> list[LocalResult]:
    results = StackedNetworks(network(config), len(numbers)).train(tasks(config, *numbers))
    assert all(isinstance(result, LocalResult) for result in results)
    return results  # type: ignore[return-value]


def one_by_one(config: FrampConfig, *numbers: int) -> list[LocalResult]:
    """The slow way; each result before the next client overwrites the network."""
    model = network(config)
    return [train_locally(model, *task) for task in tasks(config, *numbers)]


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("name", CASES)
def test_clients_together_train_as_they_do_one_by_one(name: str) -> None:
    config, tolerance = config_of(CASES[name]), OF_ADAM if name == "Adam" else TOLERANCE
    assert len({load_client(config, number, CLIENTS).capacity for number in range(CLIENTS)}) > 1
    for mine, alone, task in zip(
        together(config, *range(CLIENTS)), one_by_one(config, *range(CLIENTS)), tasks(config, *range(CLIENTS)),
        strict=True,
    ):  # fmt: skip
        assert difference(mine.delta, alone.delta) < tolerance
        assert mine.loss == pytest.approx(alone.loss, rel=tolerance)
        assert (mine.examples, mine.steps) == (alone.examples, alone.steps)
        assert task.mask is not None
        assert not mine.delta[~task.mask].any()


def test_the_tolerance_tells_another_batch_from_the_same_one() -> None:
    config = config_of()
    first, *others = tasks(config, 2, 3, 4)
    changed = StackedNetworks(network(config), 3).train([first._replace(rng=np.random.default_rng(99)), *others])
    assert isinstance(changed[0], LocalResult)
    assert difference(changed[0].delta, one_by_one(config, 2)[0].delta) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["the method", "residual"])
def test_the_same_clients_together_give_the_same_numbers_and_others_beside_them_the_last_bits(name: str) -> None:
    config = config_of(CASES[name])
    reference = together(config, *range(CLIENTS))
    for mine, again in zip(reference, together(config, *range(CLIENTS)), strict=True):
        np.testing.assert_array_equal(mine.delta, again.delta)
    for numbers in ((2, 3), (0, 1, 4), (4, 0, 2, 3), (3, 2, 1, 0, 4)):
        for number, result in zip(numbers, together(config, *numbers), strict=True):
            assert difference(result.delta, reference[number].delta) < TOLERANCE
            assert result.loss == pytest.approx(reference[number].loss, rel=TOLERANCE)


def test_the_trained_weights_are_those_that_the_network_would_run() -> None:
    config = config_of(CASES["FIARSE"] | {"local.learning-rate": 0.5})
    mine = [result.weights.clone() for result in together(config, 2, 3, 4)]
    model = network(config)
    for task, weights in zip(tasks(config, 2, 3, 4), mine, strict=True):
        alone = train_locally(model, *task)
        assert difference(weights.numpy(), alone.weights.numpy()) < TOLERANCE
        assert int((alone.weights.numpy() != task.values + alone.delta)[task.mask].sum()) > 0


def test_a_training_that_diverges_stops_no_other() -> None:
    config = config_of()
    given = tasks(config, 0, 1, 2)
    given[1] = given[1]._replace(values=given[1].values * np.float32(1e30))
    results = StackedNetworks(network(config), 3).train(given)
    assert isinstance(results[1], ModelError)
    assert given[1].data.name in str(results[1])
    for number in (0, 2):
        kept = results[number]
        assert isinstance(kept, LocalResult)
        np.testing.assert_array_equal(kept.delta, together(config, 0, 1, 2)[number].delta)


@pytest.mark.parametrize("name", ["the method", "residual", "linear", "ScaleFL", "batch statistics"])
def test_networks_for_images_are_stacked(name: str) -> None:
    assert stackable(load_client(config_of(), 0, CLIENTS).train, network(config_of(CASES[name])).model)


class Doubling(Block):
    """Mixes channels."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + inputs.flip(1)

    def couplings(self, name: str, inputs: str) -> dict[str, Coupling]:
        return {}


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(8), nn.Dropout(0.5), nn.Softmax(dim=1), nn.GELU(), nn.Flatten(2), Doubling()]
)
def test_a_network_with_a_layer_that_might_mix_channels_or_draws_is_not_stacked(layer: nn.Module) -> None:
    def is_stackable(third: nn.Module) -> bool:
        features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), third, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return stackable(load_client(config_of(), 0, CLIENTS).train, FeaturesAndHead(features, 8, 10))

    assert is_stackable(nn.Identity())
    assert not is_stackable(layer)


def test_graphs_and_dropout_before_the_head_are_not_stacked(tmp_path: Path) -> None:
    images, dropping = load_client(config_of(), 0, CLIENTS).train, network(config_of()).model
    dropping.dropout.p = 0.5
    assert not stackable(images, dropping)
    few: dict[str, Scalar] = {"partition.clients": 2, "partition.unseen-clients": 0}
    graph = FrampConfig.from_flat(save_small_graph(tmp_path / "small.npz") | few)
    assert not stackable(load_client(graph, 0, graph.partition.nodes).train, network(config_of()).model)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_bfloat16_is_near_and_leaves_weights_in_float32(side_by_side: bool) -> None:
    train = together if side_by_side else one_by_one
    low, exact = train(config_of({"local.precision": "bfloat16"}), 0, 1, 2), train(config_of(), 0, 1, 2)
    for mine, reference in zip(low, exact, strict=True):
        assert mine.delta.dtype == np.float32
        assert 1e-4 < np.linalg.norm(mine.delta - reference.delta) / np.linalg.norm(reference.delta) < 0.2
        assert mine.weights.dtype == torch.float32


def test_capacity_one_is_stacked_without_a_mask() -> None:
    config = config_of({"capacity.sizes": "1"})
    given = [task._replace(mask=None) for task in tasks(config, 0, 1, 2)]
    assert {task.data.capacity for task in given} == {Fraction(1)}
    for mine, masked in zip(StackedNetworks(network(config), 3).train(given), together(config, 0, 1, 2), strict=True):
        assert isinstance(mine, LocalResult)
        np.testing.assert_array_equal(mine.delta, masked.delta)


@pytest.mark.parametrize("batch_bytes", [2**18, 1], ids=["whole", "eight at a time"])
@pytest.mark.parametrize("name", ["the method", "residual", "ScaleFL", "linear"])
def test_prototypes_together_are_those_one_by_one_whatever_the_number_of_images(
    name: str, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framp_core.cohort.IN_CACHE_BYTES", batch_bytes)
    config, counts = config_of(CASES[name] | {"capacity.sizes": "1/4,1"}), (3, 20, 17)
    stack, model = StackedNetworks(network(config), len(counts)), network(config)
    results = stack.train(tasks(config, *range(len(counts))))
    clients = [load_client(config, number, CLIENTS) for number in range(len(counts))]
    few = [replace(each, train=each.train.first(count)) for each, count in zip(clients, counts, strict=True)]
    for mine, client, result in zip(stack.prototypes(few), few, results, strict=True):
        assert isinstance(result, LocalResult)
        model.load(result.weights)
        alone = client_prototypes(model, client)
        np.testing.assert_array_equal(mine.classes, alone.classes)
        np.testing.assert_array_equal(mine.counts, alone.counts)
        assert difference(mine.means, alone.means) < TOLERANCE
    others = stack.prototypes(few[::-1])  # Under other weights than those that the images were trained with.
    assert difference(others[2].means, stack.prototypes(few)[0].means) > 10 * TOLERANCE


def test_the_compiled_program_is_one_graph_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, counter = torch.compile, CompileCounter()

    def traced(function, *, mode: str, dynamic: bool):  # type: ignore[no-untyped-def]
        assert mode == "default"
        return compiler(function, backend=counter, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
    config = config_of(CASES["ScaleFL"])
    stack = StackedNetworks(network(config), 3, compiled=True)
    for _ in range(2):  # The second training meets new objectives and data, and needs no other program.
        for mine, plain in zip(stack.train(tasks(config, 2, 3, 4)), together(config, 2, 3, 4), strict=True):
            assert isinstance(mine, LocalResult)
            np.testing.assert_array_equal(mine.delta, plain.delta)
    assert counter.frame_count == 1
