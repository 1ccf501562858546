"""Local only: whole runs against clients trained one by one."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from framp.engines import run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import load_client
from framp_core.layout import ParameterLayout
from framp_core.local_training import evaluate, log_prior, train_locally
from framp_core.masking import extract
from framp_core.methods import METHODS
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.packed_mask import PackedMask
from framp_core.prototypes import Prototypes
from framp_core.randomness import stream
from framp_core.run_folder import RunFolder
from server_app.registry import ClientRecord
from server_app.strategies.base import ClientUpdate
from server_app.strategies.local_only import LocalOnlyStrategy

Build = Callable[..., FrampConfig]
NOTHING = Prototypes(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 8), np.float32))


@pytest.fixture(autouse=True)
def _on_one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def alone(tiny: Build) -> Build:
    """Tiny runs with the settings of the method registry."""

    def build(values: dict[str, Scalar] | None = None, name: str = "run") -> FrampConfig:
        return tiny({**METHODS["local"].settings, "capacity.sizes": "1/8,1/2", **(values or {})}, name)

    return build


def initial(config: FrampConfig) -> np.ndarray:
    return initial_parameters(build_model(config.model, (1, 8, 8), 10), config.seed).numpy()


def record(name: str, capacity: Fraction = Fraction(1, 4)) -> ClientRecord:
    return ClientRecord(name, 1, "train", capacity, (1, 8, 8), 10, 50, {}, 5, "digest", np.ones(3, np.float32), 12)


def strategy_of(config: FrampConfig, path: Path) -> LocalOnlyStrategy:
    """A strategy that knows its model and has met no client."""
    strategy = LocalOnlyStrategy(config, RunFolder.create(path / "strategy", config))
    strategy.layout = ParameterLayout.of(build_model(config.model, (1, 8, 8), 10))
    strategy.build(torch.from_numpy(initial(config)), 8, record("any"))
    return strategy


def update_of(client: ClientRecord, mask: np.ndarray, delta: np.ndarray) -> ClientUpdate:
    return ClientUpdate(client, PackedMask.of(mask), delta, NOTHING, loss=1.0, examples=5)


def test_a_run_is_every_client_trained_by_itself(alone: Build) -> None:
    config = alone({"rounds": 3, "server.clients-per-round": 4})
    tensors, _ = run_local(config).read_checkpoint()
    np.testing.assert_array_equal(tensors["initial"], initial(config))
    finals = []
    for index in range(4):
        data = load_client(config, index, config.partition.nodes)
        model = FlatModel(build_model(config.model, data.shape, data.classes))
        theta = initial(config)
        mask = extract(theta, model.layout, config.extraction, data.capacity)
        theta = theta * mask
        for server_round in (1, 2, 3):
            rng = stream(config.seed, "local-training", data.name, server_round)
            theta = theta + train_locally(model, theta, mask, data, config, rng, None).delta
        np.testing.assert_allclose(tensors[f"clients.{data.name}.values"], theta[mask], rtol=0, atol=1e-6)
        packed = tensors[f"clients.{data.name}.mask"].numpy()
        np.testing.assert_array_equal(np.unpackbits(packed, count=mask.size), mask)
        finals.append(theta)
    # Clients 0 and 2 are of one size and start alike; they end apart.
    assert not np.allclose(finals[0], finals[1], rtol=0, atol=1e-3)
    assert len([name for name in tensors if name.startswith("clients.")]) == 2 * 4


def test_who_never_trained_is_measured_with_the_initial_model(alone: Build) -> None:
    config = alone({"rounds": 1, "server.clients-per-round": 1, "local.steps": 40})
    run = run_local(config)
    tensors, _ = run.read_checkpoint()
    (trained,) = {name.split(".")[1] for name in tensors if name.startswith("clients.")}
    rows = [row for event in run.events() if event["kind"] == "evaluate" for row in event["accuracies"]]
    counts = {row["client"]: row["correct"] for row in rows if row["population"] == "local"}
    assert len(counts) == 5
    for index in range(5):
        data = load_client(config, index, config.partition.nodes)
        model = FlatModel(build_model(config.model, data.shape, data.classes))
        theta = initial(config)
        model.load(torch.from_numpy(theta * extract(theta, model.layout, config.extraction, data.capacity)))
        prior = log_prior(data.class_counts(), config.local.absent_class_prior)
        untrained = evaluate(model, data.test, prior[None])[0].correct
        assert (counts[data.name] == untrained) == (data.name != trained)


def test_a_delta_reaches_its_own_client_alone(alone: Build, tmp_path: Path) -> None:
    strategy, start = strategy_of(alone(), tmp_path), initial(alone())
    one, two, unseen = record("one"), record("two"), record("unseen")
    mask = strategy.extract(start, one, 1)
    assert mask.sum() == strategy.layout.kept(one.capacity) + strategy.layout.always_kept_size
    ones = np.ones(int(mask.sum()), np.float32)
    strategy.server_update([update_of(one, mask, ones), update_of(two, mask, -2 * ones)], 1)
    strategy.server_update([update_of(one, mask, 3 * ones)], 2)
    for client, moved in ((one, 4), (two, -2)):
        expected = np.where(mask, start + np.float32(moved), 0)
        for evaluation in (False, True):
            np.testing.assert_allclose(strategy.generate(client, evaluation=evaluation), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(strategy.generate(unseen, evaluation=True), start)


def test_the_mask_is_that_of_the_first_cut(alone: Build, tmp_path: Path) -> None:
    strategy, start = strategy_of(alone(), tmp_path), initial(alone())
    client = record("one")
    mask = strategy.extract(start, client, 1)
    strategy.server_update([update_of(client, mask, -start[mask])], 1)  # every weight is trained to zero
    theta = strategy.generate(client, evaluation=False)
    assert not theta.any()
    np.testing.assert_array_equal(strategy.extract(theta, client, 2), mask)
    again = extract(theta, strategy.layout, alone().extraction, client.capacity)
    assert not np.array_equal(again, mask)
    returned = replace(client, capacity=Fraction(1, 2))  # a device that comes back with another budget
    np.testing.assert_array_equal(strategy.extract(theta, returned, 3), mask)


def test_one_client_alone_is_fedavg_of_one_client(alone: Build, tiny: Build) -> None:
    values: dict[str, Scalar] = {
        "partition.clients": 1,
        "partition.unseen-clients": 0,
        "server.clients-per-round": 1,
        "capacity.sizes": "1",
    }
    local, _ = run_local(alone(values, "local")).read_checkpoint()
    fedavg, _ = run_local(tiny({**METHODS["fedavg"].settings, **values}, "fedavg")).read_checkpoint()
    theta = local["clients.client-0000.values"].numpy()
    np.testing.assert_allclose(theta, fedavg["generator.theta_0"].numpy(), rtol=0, atol=1e-6)
    assert not np.allclose(theta, initial(alone(values)), rtol=0, atol=1e-3)
