"""FIARSE: its gradient against explicit weights, its aggregation through whole runs."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from framp.engines import run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import ClientData, load_client
from framp_core.data.examples import batch_positions
from framp_core.errors import ConfigError
from framp_core.layout import ParameterLayout
from framp_core.local_training import train_locally
from framp_core.methods import METHODS
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.randomness import stream
from framp_core.run_folder import RunFolder

Build = Callable[..., FrampConfig]
PLAIN: dict[str, Scalar] = {"local.mask": "fixed"}
RELEASED: dict[str, Scalar] = {"local.mask": "following"}
SMALL: dict[str, Scalar] = {
    "model.name": "mlp",
    "model.widths": "5",
    "local.learning-rate": 0.2,
    "local.batch-size": 8,
    "local.steps": 15,
}
"""Published FIARSE on a network of four tensors that a test can write out."""


@pytest.fixture(autouse=True)
def _on_one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fiarse(tiny: Build) -> Build:
    """Tiny runs with the settings of the method registry."""

    def build(values: dict[str, Scalar] | None = None, name: str = "run") -> FrampConfig:
        return tiny({**METHODS["fiarse"].settings, **(values or {})}, name)

    return build


def first_client(config: FrampConfig) -> ClientData:
    return load_client(config, 0, config.partition.nodes)


def fresh_model(config: FrampConfig, data: ClientData) -> FlatModel:
    return FlatModel(build_model(config.model, data.shape, data.classes))


def initial(config: FrampConfig) -> np.ndarray:
    data = first_client(config)
    return initial_parameters(build_model(config.model, data.shape, data.classes), config.seed).numpy()


def cut(theta: np.ndarray, layout: ParameterLayout, capacity: Fraction) -> np.ndarray:
    """Largest magnitudes of the whole network by a plain sort; biases and norms always."""
    ranked = sorted(np.flatnonzero(layout.maskable), key=lambda index: -abs(float(theta[index])))
    mask = ~layout.maskable
    mask[ranked[: int(capacity * len(ranked))]] = True
    return mask


def threshold_of(theta: np.ndarray, mask: np.ndarray, layout: ParameterLayout) -> float:
    return min(abs(float(theta[index])) for index in np.flatnonzero(mask & layout.maskable))


def train(
    config: FrampConfig, start: np.ndarray, mask: np.ndarray | None, steps: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Delta, and what the network runs afterwards."""
    data = first_client(config)
    model = fresh_model(config, data)
    result = train_locally(model, start, mask, data, config, np.random.default_rng(7), None, steps)
    return result.delta, model.flat.detach().numpy().copy()


def by_hand(config: FrampConfig, start: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Delta of explicit matrices in double precision. The mask is hard in value and has the paper's slope, or none.

    ``-2 * theta / (|x| + theta)`` has the derivative ``2 * theta / (|x| + theta)^2``; the product rule is autograd's.
    """
    differentiated = config.local.mask == "threshold-controlled"
    data = first_client(config)
    layout = fresh_model(config, data).layout
    maskable, kept = torch.from_numpy(layout.maskable), torch.from_numpy(mask)
    threshold = threshold_of(start, mask, layout)
    first = torch.from_numpy(start * mask).double()
    weights = first
    for positions in batch_positions(len(data.train), 8, config.local.steps, np.random.default_rng(7)):
        images, labels = data.train.batch(positions)
        x = weights.clone().requires_grad_()
        hard = kept & (~maskable | (x.abs() >= threshold))
        slope = -2 * threshold / (x.abs() + threshold)
        soft = hard * (1 + differentiated * maskable * (slope - slope.detach()))
        hidden, hidden_bias, head, head_bias = layout.split(x * soft)
        features = F.relu(data.train.normaliser(images).double().flatten(1) @ hidden.T + hidden_bias)
        F.cross_entropy(features @ head.T + head_bias, labels).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        weights = weights - config.local.learning_rate * x.grad
    difference: np.ndarray = (weights - first).numpy()
    return difference


@pytest.mark.parametrize("mask_in_training", ["threshold-controlled", "following"])
@pytest.mark.parametrize("capacity", ["1/8", "1/2", "1"])
def test_gradient_and_shrinking_mask_are_those_of_explicit_weights(
    fiarse: Build, capacity: str, mask_in_training: str
) -> None:
    config = fiarse({**SMALL, "local.mask": mask_in_training})
    start, layout = initial(config), fresh_model(config, first_client(config)).layout
    mask = cut(start, layout, Fraction(capacity))
    delta, shown = train(config, start, mask)
    np.testing.assert_allclose(delta, by_hand(config, start, mask), rtol=0, atol=2e-5)
    for other in {"fixed", "threshold-controlled", "following"} - {mask_in_training}:
        assert np.abs(delta - train(fiarse({**SMALL, "local.mask": other}), start, mask)[0]).max() > 1e-2

    trained = start * mask + delta
    fallen = mask & layout.maskable & (np.abs(trained) < threshold_of(start, mask, layout))
    assert 0 < fallen.sum() < mask.sum()
    np.testing.assert_allclose(shown, np.where(fallen, 0, trained), rtol=0, atol=1e-6)
    assert not shown[fallen].any()


@pytest.mark.parametrize("values", [{}, RELEASED])
def test_a_weight_that_fell_keeps_its_value(fiarse: Build, values: dict[str, Scalar]) -> None:
    config = fiarse({**SMALL, **values})
    start, layout = initial(config), fresh_model(config, first_client(config)).layout
    mask = cut(start, layout, Fraction(1, 2))
    early, _ = train(config, start, mask, steps=5)
    late, shown = train(config, start, mask, steps=15)
    fallen = mask & layout.maskable & (np.abs(start + early) < threshold_of(start, mask, layout))
    assert fallen.sum() > 3
    assert early[fallen].all()
    np.testing.assert_array_equal(late[fallen], early[fallen])
    assert not shown[fallen].any()
    others = mask & ~fallen
    assert (late[others] != early[others]).mean() > 0.5


def test_the_factor_is_one_and_a_half_at_the_threshold_and_one_on_biases(fiarse: Build) -> None:
    config, released, plain = (fiarse({**SMALL, "local.steps": 1, **extra}) for extra in ({}, RELEASED, PLAIN))
    layout = fresh_model(config, first_client(config)).layout
    start = np.where(layout.maskable, np.copysign(0.125, initial(config)), 0.0).astype(np.float32)
    expected = np.where(layout.maskable, 1.5, 1.0) * train(plain, start, None)[0]
    assert np.abs(expected[layout.maskable]).max() > 0.01
    assert np.abs(expected[~layout.maskable]).max() > 0.01
    np.testing.assert_allclose(train(config, start, None)[0], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(train(released, start, None)[0], train(plain, start, None)[0])


@pytest.mark.parametrize("values", [{}, RELEASED])
def test_a_threshold_of_zero_is_plain_training_bit_for_bit(fiarse: Build, values: dict[str, Scalar]) -> None:
    config, plain = fiarse({**SMALL, **values}), fiarse({**SMALL, **PLAIN})
    start, layout = initial(config), fresh_model(config, first_client(config)).layout
    mask = cut(start, layout, Fraction(1, 2))
    assert not np.array_equal(train(config, start, mask)[0], train(plain, start, mask)[0])
    start[np.flatnonzero(mask & layout.maskable)[0]] = 0
    for got, expected in zip(train(config, start, mask), train(plain, start, mask), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_dropped_weights_stay_zero_under_momentum_and_decay(fiarse: Build) -> None:
    config = fiarse({**SMALL, "local.momentum": 0.9, "local.weight-decay": 0.01})
    start = initial(config)
    mask = cut(start, fresh_model(config, first_client(config)).layout, Fraction(1, 4))
    delta, shown = train(config, start, mask)
    assert not delta[~mask].any()
    assert not shown[~mask].any()
    assert delta[mask].any()


def theta_of(run: RunFolder) -> np.ndarray:
    theta: np.ndarray = run.read_checkpoint()[0]["generator.theta_0"].numpy()
    return theta


def round_by_hand(config: FrampConfig, theta: np.ndarray, server_round: int) -> np.ndarray:
    """All four clients train; each coordinate moves by the mean delta of those that hold it."""
    deltas, masks = [], []
    for index in range(4):
        data = load_client(config, index, config.partition.nodes)
        model = fresh_model(config, data)
        masks.append(cut(theta, model.layout, data.capacity))
        rng = stream(config.seed, "local-training", data.name, server_round)
        deltas.append(train_locally(model, theta, masks[-1], data, config, rng, None).delta)
    moved = theta.copy()
    for position in range(theta.size):
        held = [delta[position] for delta, mask in zip(deltas, masks, strict=True) if mask[position]]
        moved[position] += sum(held) / len(held) if held else 0
    return moved


def test_a_run_averages_each_coordinate_over_its_holders(fiarse: Build) -> None:
    values: dict[str, Scalar] = {"server.clients-per-round": 4, "capacity.sizes": "1/16,1/4", "local.steps": 4}
    config = fiarse(values)
    theta = initial(config)
    for server_round in (1, 2):
        theta = round_by_hand(config, theta, server_round)
    run = run_local(config)
    np.testing.assert_allclose(theta_of(run), theta, rtol=0, atol=1e-6)
    assert (theta == initial(config)).any()  # held by nobody
    uniform = run_local(fiarse({**values, "server.weighting": "uniform"}, "uniform"))
    assert not np.allclose(theta_of(uniform), theta, rtol=0, atol=1e-4)


def test_at_capacity_one_with_fixed_masks_it_is_fedavg(fiarse: Build, tiny: Build) -> None:
    values: dict[str, Scalar] = {"capacity.sizes": "1", "server.clients-per-round": 4}
    fedavg = theta_of(run_local(tiny({**METHODS["fedavg"].settings, "server.weighting": "uniform", **values}, "avg")))
    fixed = theta_of(run_local(fiarse({**values, **PLAIN, "method": "framp"}, "fixed")))
    np.testing.assert_allclose(fixed, fedavg, rtol=0, atol=1e-6)
    for method in ("fiarse", "fiarse-released"):
        moving = theta_of(run_local(tiny({**METHODS[method].settings, **values}, method)))
        assert not np.allclose(moving, fedavg, rtol=0, atol=1e-6)


def test_no_prototypes_travel(fiarse: Build, tiny: Build) -> None:
    def prototype_bytes(run: RunFolder) -> tuple[list[int], list[int]]:
        rows = [row for event in run.events() if event["kind"] == "train" for row in event["clients"]]
        return [row["down"]["prototypes"] for row in rows], [row["up"]["prototypes"] for row in rows]

    down, up = prototype_bytes(run_local(fiarse()))
    assert set(down) == {0}
    assert set(up) == {4}  # their number, 0
    down, up = prototype_bytes(run_local(tiny(name="framp")))
    assert max(down) > 300
    assert min(up) > 300


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("fiarse", "generator.name", "modulated"),
        ("fiarse", "local.alignment-weight", 0.1),
        ("fiarse", "local.mask", "following"),
        ("fiarse-released", "local.mask", "threshold-controlled"),
        ("fiarse-released", "local.mask", "fixed"),
    ],
)
def test_what_would_be_another_method_is_refused(tiny: Build, method: str, key: str, value: Scalar) -> None:
    config = tiny({**METHODS[method].settings, key: value})
    with pytest.raises(ConfigError, match=rf"method='{method}' .* {key}=.*not {value!r}"):
        run_local(config)
    assert not Path(config.output.folder).exists()
