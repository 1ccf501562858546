"""HeteroFL and FedRolex: whole runs on the in-process grid against training and averaging by hand."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from client_app import client as client_module
from framp_core.codec import encode_slim
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import load_client
from framp_core.errors import ConfigError, MaskMismatchError
from framp_core.layout import ParameterLayout
from framp_core.local_training import train_locally
from framp_core.methods import METHODS
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.packed_mask import PackedMask
from framp_core.prototypes import Prototypes
from framp_core.randomness import stream
from framp_core.run_folder import RunFolder
from framp_core.structured import channel_mask, window
from server_app.registry import ClientRecord
from server_app.strategies import ClientUpdate
from server_app.strategies.fedrolex import FedRolexStrategy
from server_app.strategies.heterofl import HeteroFLStrategy
from tests.server_app.runs import final_theta

Build = Callable[..., FrampConfig]
FIRST, SECOND = 8, 16  # channels of the conv net in 4 normalisation groups
SETUP: dict[str, Scalar] = {
    "descriptor.name": "histogram",
    "server.clients-per-round": 4,
    "partition.unseen-clients": 0,
    "model.widths": f"{FIRST},{SECOND}",
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def settings(method: str, **more: Scalar) -> dict[str, Scalar]:
    return {**METHODS[method].settings, **SETUP, **more}


def initial(config: FrampConfig) -> dict[str, np.ndarray]:
    model = build_model(config.model, (1, 8, 8), 10)
    layout = ParameterLayout.of(model)
    parts = layout.split(initial_parameters(model, config.seed))
    return {slot.name: part.numpy().copy() for slot, part in zip(layout.slots, parts, strict=True)}


def lists_of_indices(first: list[int], second: list[int], classes: list[int]) -> dict[str, tuple[np.ndarray, ...]]:
    """What a client holds of each tensor of the conv net (1 -> FIRST -> SECOND -> 10)."""
    return {
        "features.0.weight": np.ix_(first, [0], range(3), range(3)),
        "features.1.weight": np.ix_(first),
        "features.1.bias": np.ix_(first),
        "features.4.weight": np.ix_(second, first, range(3), range(3)),
        "features.5.weight": np.ix_(second),
        "features.5.bias": np.ix_(second),
        "head.weight": np.ix_(classes, second),
        "head.bias": np.ix_(classes),
    }


def by_hand(config: FrampConfig, first_channel: Callable[[int], int]) -> np.ndarray:
    """Every client trains an ordinary small network cut out with lists of indices; every element is a plain mean."""
    theta = initial(config)
    for server_round in range(1, config.rounds + 1):
        sums = {name: np.zeros_like(part) for name, part in theta.items()}
        holders = {name: np.zeros(part.shape, int) for name, part in theta.items()}
        for index in range(config.partition.clients):
            data = load_client(config, index, config.partition.nodes)
            part = {Fraction(1): 1, Fraction(1, 4): 2, Fraction(1, 16): 4}[data.capacity]
            channels = [
                sorted((first_channel(server_round) + step) % wide for step in range(wide // part))
                for wide in (FIRST, SECOND)
            ]
            held = lists_of_indices(*channels, list(range(10)))
            slim_widths = {"widths": (FIRST // part, SECOND // part), "groups": 4 // part}
            slim_config = config.model.model_copy(update=slim_widths)
            model = FlatModel(build_model(slim_config, data.shape, data.classes))
            values = np.concatenate([theta[name][held[name]].ravel() for name in theta])
            rng = stream(config.seed, "local-training", data.name, server_round)
            delta = torch.from_numpy(train_locally(model, values, None, data, config, rng, None).delta)
            labels = np.flatnonzero(data.class_counts()).tolist()
            owned = lists_of_indices(*channels, labels)
            for slot, kept in zip(model.layout.slots, model.layout.split(delta), strict=True):
                full = np.zeros_like(theta[slot.name])
                full[held[slot.name]] = kept.numpy()
                sums[slot.name][owned[slot.name]] += full[owned[slot.name]]
                holders[slot.name][owned[slot.name]] += 1
        for name in theta:
            theta[name] += np.where(holders[name] > 0, sums[name] / np.maximum(holders[name], 1), 0)
    return np.concatenate([part.ravel() for part in theta.values()])


@pytest.mark.parametrize(
    ("method", "first_channel"),
    [("heterofl", lambda _: 0), ("fedrolex", lambda r: r - 1), ("fedrolex-clipped", lambda r: r - 1)],
)
@pytest.mark.parametrize("sizes", ["1/16,1/4,1", "1/16,1/4"])
def test_runs_equal_small_networks_trained_and_averaged_by_hand(tiny, method, first_channel, sizes):
    """Two classes per client, so that the head's rows have other holders than the channels that feed them."""
    two_classes = {"partition.scheme": "classes-per-client", "capacity.sizes": sizes, "rounds": 3}
    config = tiny(settings(method, **two_classes), method)
    theta, run = final_theta(config)
    expected = by_hand(config, first_channel)
    np.testing.assert_allclose(theta, expected, rtol=0, atol=2e-6)
    assert not np.allclose(expected, by_hand(config, lambda r: 5), rtol=0, atol=1e-3)
    assert [event["round"] for event in run.events() if event["kind"] == "evaluate"][-1] == config.rounds


@pytest.mark.parametrize("method", ["heterofl", "fedrolex"])
def test_full_width_is_fedavg(tiny, method, monkeypatch):
    """Every client holds every class here (iid), and FedAvg's uniform weights are coverage of one and all."""
    monkeypatch.setattr("server_app.app.write_report", lambda path: path)  # its figures take longer than the runs
    fedavg = settings("fedavg", **{"server.weighting": "uniform", "local.masked-cross-entropy": True})
    expected, _ = final_theta(tiny(fedavg, "fedavg"))
    wide, _ = final_theta(tiny(settings(method, **{"capacity.sizes": "1"}), "wide"))
    np.testing.assert_allclose(wide, expected, rtol=0, atol=1e-6)
    narrow, _ = final_theta(tiny(settings(method, **{"capacity.sizes": "1/4"}), "narrow"))
    assert not np.allclose(narrow, expected, rtol=0, atol=1e-3)
    skewed = {"partition.scheme": "classes-per-client", "capacity.sizes": "1"}
    rows, _ = final_theta(tiny(settings(method, **skewed), "rows"))
    averaged, _ = final_theta(tiny({**fedavg, "partition.scheme": "classes-per-client"}, "averaged"))
    assert not np.allclose(rows, averaged, rtol=0, atol=1e-3), "rows of classes are averaged over their holders alone"


def record(capacity: str) -> ClientRecord:
    shape, classes, descriptor = (1, 8, 8), 10, np.zeros(2, np.float32)
    return ClientRecord("client", 1, "train", Fraction(capacity), shape, classes, 1, {}, 1, "", descriptor, 0)


def prepared(config: FrampConfig, strategy_class: type[HeteroFLStrategy], theta: torch.Tensor) -> HeteroFLStrategy:
    strategy = strategy_class(config, RunFolder.create(Path(config.output.folder), config))
    strategy.layout = ParameterLayout.of(build_model(config.model, (1, 8, 8), 10))
    strategy.build(theta, SECOND, record("1"))
    return strategy


def test_extraction_by_hand(tiny):
    config = tiny(settings("fedrolex"))
    theta = torch.zeros(ParameterLayout.of(build_model(config.model, (1, 8, 8), 10)).size)
    strategy = prepared(config, FedRolexStrategy, theta)
    nested = prepared(tiny(settings("heterofl"), "nested"), HeteroFLStrategy, theta)
    start = [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]
    for server_round, channels in {
        1: start,
        2: [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]],
        7: [[0, 1, 6, 7], [6, 7, 8, 9, 10, 11, 12, 13]],
        9: [[0, 1, 2, 3], [8, 9, 10, 11, 12, 13, 14, 15]],
        17: start,
    }.items():
        expected = []
        for slot in strategy.layout.slots:
            held = np.zeros(slot.shape, bool)
            held[lists_of_indices(*channels, list(range(10)))[slot.name]] = True
            expected.append(held.ravel())
        mask = strategy.extract(theta.numpy(), record("1/4"), server_round)
        assert np.array_equal(mask, np.concatenate(expected))
        prefix = nested.extract(theta.numpy(), record("1/4"), server_round)
        assert np.array_equal(mask, prefix) == (channels == start)


def test_a_delta_of_zero_counts_as_held(tiny):
    """Coverage comes from the masks: 1 and 0 average to 1/2 where both hold the element, and to 1 where one does."""
    config = tiny(settings("heterofl"))
    layout = ParameterLayout.of(build_model(config.model, (1, 8, 8), 10))
    strategy = prepared(config, HeteroFLStrategy, torch.zeros(layout.size))
    updates = []
    for capacity, delta, classes in (("1", 1.0, [0, 1]), ("1/4", 0.0, [1, 2])):
        mask = strategy.extract(np.zeros(layout.size), record(capacity), 1)
        held = Prototypes(np.array(classes), np.ones(2, np.int64), np.zeros((2, 0), np.float32))
        kept = np.full(mask.sum(), delta, np.float32)
        updates.append(ClientUpdate(record(capacity), PackedMask.of(mask), kept, held, 0.0, 1))
    strategy.server_update(updates, 1)
    theta = strategy.generate(record("1"), evaluation=False)
    parts = {slot.name: theta[slot.slice].reshape(slot.shape) for slot in layout.slots}
    assert parts["features.1.weight"].tolist() == [0.5] * 4 + [1.0] * 4
    corner = np.full((SECOND, FIRST), 1.0)
    corner[: SECOND // 2, : FIRST // 2] = 0.5
    assert (parts["features.4.weight"] == corner[:, :, None, None]).all()
    assert parts["head.bias"].tolist() == [1.0, 0.5] + [0.0] * 8
    assert parts["head.weight"][:3].tolist() == [[1.0] * 16, [0.5] * 8 + [1.0] * 8, [0.0] * 16]


@pytest.mark.parametrize("method", ["heterofl", "fedrolex"])
def test_messages_of_a_slim_client_are_small(tiny, method):
    """Values of the slim network alone, 8 and 16 channels as bits, no means; masks.json as for every method."""
    config = tiny(settings(method, **{"capacity.sizes": "1/4", "partition.unseen-clients": 1}))
    _, run = final_theta(config)
    slim = build_model(config.model.model_copy(update={"widths": (4, 8), "groups": 2}), (1, 8, 8), 10)
    size = ParameterLayout.of(slim).size
    for event in (event for event in run.events() if event["kind"] == "train"):
        assert event["refused"] == []
        for row in event["clients"]:
            assert row["down"]["mask"] <= math.ceil((4 + 8 + 16) / 8)
            assert row["down"] == {"values": 4 * size, "mask": row["mask_alone"], "framing": 7 + 2 * 4 + 4}
            assert row["up"]["values"] == 4 * size
            assert row["up"]["prototypes"] == 4 + 10 * (4 + 4)
    masks = run.json("masks.json")
    assert masks["selection"]["1/4"] == [1 / 2, 1 / 4, 1 / 2]
    assert len(masks["clients"]) == 5
    assert (run.path / "report.html").exists()


def test_the_client_builds_the_slim_network_alone(tiny, monkeypatch):
    built = []
    original = build_model

    def watched(config, shape, classes, kept=None):
        model = original(config, shape, classes, kept)
        parameter = next(model.parameters())
        if not parameter.is_meta:
            built.append(sum(parameter.numel() for parameter in model.parameters()))
        return model

    monkeypatch.setattr(client_module, "build_model", watched)
    client_module._flat_model.cache_clear()
    final_theta(tiny(settings("heterofl", **{"capacity.sizes": "1/4"})))
    small = original(tiny(SETUP).model, (1, 8, 8), 10, (FIRST // 2, SECOND // 2))
    assert built == [sum(parameter.numel() for parameter in small.parameters())]


def test_the_client_refuses_a_slim_network_above_its_capacity(tiny):
    config = tiny({**SETUP, "capacity.sizes": "1/4"})
    layout = ParameterLayout.of(build_model(config.model, (1, 8, 8), 10))
    client = client_module.Client.of(config.to_flat(), {"partition-id": 0, "num-partitions": 4}, {})
    mask = channel_mask(layout, window(layout, Fraction(1, 2)))
    blob = encode_slim(np.zeros(mask.sum(), np.float32), mask, layout, "float32").blob
    with pytest.raises(MaskMismatchError, match="holds 4"):
        client.assignment(blob, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("generator.name", "modulated"), ("server.weighting", "uniform"), ("local.alignment-weight", 0.1)],
)
def test_settings_of_another_method_are_refused(tiny, key, value):
    config = tiny({**settings("heterofl"), key: value})
    with pytest.raises(ConfigError, match=f"method='heterofl' .* {key}=.*not {value!r}"):
        HeteroFLStrategy.check(config)
