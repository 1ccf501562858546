"""ScaleFL: whole runs on the in-process grid against training and averaging by hand."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from client_app.app import app as client_app
from client_app.client import Client
from framp.engines import InProcessGrid
from framp_core.codec import encode_slim
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import ClientData, load_client
from framp_core.data.examples import batch_positions
from framp_core.errors import ConfigError, ModelError
from framp_core.layout import ParameterLayout
from framp_core.methods import METHODS
from framp_core.models import build_model, initial_parameters
from framp_core.packed_mask import PackedMask
from framp_core.prototypes import Prototypes
from framp_core.randomness import stream
from framp_core.run_folder import RunFolder
from framp_core.structured import channel_mask, window
from server_app.app import serve
from server_app.registry import ClientRecord
from server_app.strategies import STRATEGIES, ClientUpdate
from server_app.strategies.heterofl import HeteroFLStrategy
from server_app.strategies.scalefl import ScaleFLStrategy
from tests.server_app.runs import final_theta

WIDTHS = (8, 16, 16)
CHANNELS = {Fraction(1, 16): [3, 5], Fraction(1, 4): [6, 12], Fraction(1): [8, 16, 16]}
"""Channels held of a network of 3,688 weights: 27 + 135 + 80 = 242 for 230.5, 54 + 648 + 180 = 882 for 922, all."""
SETUP: dict[str, Scalar] = {
    "descriptor.name": "histogram",
    "server.clients-per-round": 4,
    "partition.unseen-clients": 0,
    "model.widths": ",".join(map(str, WIDTHS)),
    "capacity.sizes": "1/16,1/4,1",
}
Theta = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("server_app.app.write_report", lambda path: path)  # its figures take longer than the runs


def settings(method: str = "scalefl", **more: Scalar) -> dict[str, Scalar]:
    return {**METHODS[method].settings, **SETUP, **more}


# A run by hand: the network is written out, and every element is averaged by a count of its holders.


def initial(config: FrampConfig) -> Theta:
    model = build_model(config.model, (1, 8, 8), 10)
    layout = ParameterLayout.of(model)
    parts = layout.split(initial_parameters(model, config.seed))
    return {slot.name: part.numpy().copy() for slot, part in zip(layout.slots, parts, strict=True)}


HEADS = ["exits.2", "exits.6", "head"]


def held_corners(channels: list[int]) -> dict[str, tuple[np.ndarray, ...]]:
    """What a client with these channels per stage holds of each tensor."""
    held: dict[str, tuple[np.ndarray, ...]] = {}
    for stage, wide in enumerate(channels):
        narrow = channels[stage - 1] if stage else 1
        held[f"features.{4 * stage}.weight"] = np.ix_(range(wide), range(narrow), range(3), range(3))
        held[f"features.{4 * stage + 1}.weight"] = held[f"features.{4 * stage + 1}.bias"] = np.ix_(range(wide))
        held[f"{HEADS[stage]}.weight"] = np.ix_(range(10), range(wide))
        held[f"{HEADS[stage]}.bias"] = np.ix_(range(10))
    return held


def exits_of(weights: dict[str, torch.Tensor], hidden: torch.Tensor, groups: list[int]) -> list[torch.Tensor]:
    logits = []
    for stage, number in enumerate(groups):
        hidden = F.conv2d(hidden, weights[f"features.{4 * stage}.weight"], padding=1)
        norm = f"features.{4 * stage + 1}"
        hidden = F.relu(F.group_norm(hidden, number, weights[f"{norm}.weight"], weights[f"{norm}.bias"]))
        head = HEADS[stage]
        logits.append(hidden.mean(dim=(2, 3)) @ weights[f"{head}.weight"].T + weights[f"{head}.bias"])
        hidden = F.max_pool2d(hidden, 2)
    return logits


def loss_of(exits: list[torch.Tensor], labels: torch.Tensor, weight: float) -> torch.Tensor:
    total, count = torch.zeros(()), len(exits)
    for depth, logits in enumerate(exits, start=1):
        loss = F.cross_entropy(logits, labels)
        if depth < count:
            teacher, student = (exits[-1] / 3).softmax(1), (logits / 3).softmax(1)
            loss = loss + weight * 9 * (teacher * (teacher / student).log()).mean()
        total = total + depth * loss
    return total / (count * (count + 1) / 2)


def train_by_hand(
    config: FrampConfig, data: ClientData, start: Theta, rng: np.random.Generator, weight: float
) -> Theta:
    """Delta of a client; four normalisation groups, of as many channels each as at full width where they divide."""
    groups = {3: 1, 5: 1, 6: 3, 12: 3, 8: 4, 16: 4}
    weights = {name: torch.tensor(part, requires_grad=True) for name, part in start.items()}
    for positions in batch_positions(len(data.train), config.local.batch_size, config.local.steps, rng):
        images, labels = data.train.batch(positions)
        numbers = [groups[channels] for channels in CHANNELS[data.capacity]]
        loss = loss_of(exits_of(weights, data.train.normaliser(images), numbers), labels, weight)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for part, gradient in zip(weights.values(), gradients, strict=True):
                part -= config.local.learning_rate * gradient
    return {name: part.detach().numpy() - start[name] for name, part in weights.items()}


def by_hand(config: FrampConfig, distilled: Callable[[int], bool]) -> np.ndarray:
    theta = initial(config)
    for server_round in range(1, config.rounds + 1):
        sums = {name: np.zeros_like(part) for name, part in theta.items()}
        holders = {name: np.zeros(part.shape, int) for name, part in theta.items()}
        for index in range(config.partition.clients):
            data = load_client(config, index, config.partition.nodes)
            held = held_corners(CHANNELS[data.capacity])
            start = {name: theta[name][corner] for name, corner in held.items()}
            rng = stream(config.seed, "local-training", data.name, server_round)
            weight = config.local.distillation_weight if distilled(server_round) else 0.0
            for name, delta in train_by_hand(config, data, start, rng, weight).items():
                sums[name][held[name]] += delta
                holders[name][held[name]] += 1
        for name in theta:
            theta[name] += np.where(holders[name] > 0, sums[name] / np.maximum(holders[name], 1), 0)
    return np.concatenate([part.ravel() for part in theta.values()])


def test_a_run_equals_networks_written_out_trained_and_averaged_by_hand(tiny):
    """Two classes per client, whose heads are averaged whole; distillation from round 3 of 4 on."""
    skewed = {"partition.scheme": "classes-per-client", "local.distillation-weight": 5.0, "rounds": 4}
    config = tiny(settings(**skewed))
    theta, run = final_theta(config)
    expected = by_hand(config, lambda server_round: server_round > 2)
    np.testing.assert_allclose(theta, expected, rtol=0, atol=5e-6)
    for distilled in (lambda server_round: server_round > 1, lambda _: False):
        assert np.abs(by_hand(config, distilled) - expected).max() > 1e-4
    for event in run.events():
        assert event.get("refused", []) == []
    assert [event["round"] for event in run.events() if event["kind"] == "evaluate"][-1] == config.rounds


@pytest.mark.parametrize("architecture", [{"model.name": "resnet18", "model.widths": "4,4,8,8"}, {"model.name": "mlp"}])
@pytest.mark.parametrize("value_format", ["float32", "int8"])
def test_runs_of_the_other_architectures_refuse_nothing(tiny, architecture, value_format):
    config = tiny({**settings(), **architecture, "wire.values": value_format, "rounds": 1})
    theta, run = final_theta(config)
    assert [event["refused"] for event in run.events() if event["kind"] in ("train", "evaluate")] == [[], []]
    before = initial(config)
    ends = np.cumsum([part.size for part in before.values()])
    for (name, start), trained in zip(before.items(), np.split(theta, ends[:-1]), strict=True):
        assert (start.ravel() != trained).any(), name


# Degenerate cases


def test_full_size_with_one_exit_is_fedavg(tiny):
    uniform = {**METHODS["fedavg"].settings, **SETUP, "server.weighting": "uniform", "capacity.sizes": "1"}
    skewed = {"partition.scheme": "classes-per-client"}
    expected, _ = final_theta(tiny({**uniform, **skewed}, "fedavg"))
    single, _ = final_theta(tiny(settings(**skewed, **{"model.exits": 1, "capacity.sizes": "1"}), "single"))
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-6)
    narrow, _ = final_theta(tiny(settings(**skewed, **{"model.exits": 1, "capacity.sizes": "1/4"}), "narrow"))
    assert not np.allclose(narrow, expected, rtol=0, atol=1e-3)


def test_one_exit_is_heterofl_where_every_client_holds_every_class(tiny):
    """iid, so that neither the masked cross-entropy nor the average of the head's rows tells them apart."""
    expected, _ = final_theta(tiny(settings("heterofl"), "heterofl"))
    single, _ = final_theta(tiny(settings(**{"model.exits": 1}), "single"))
    np.testing.assert_array_equal(single, expected)
    skewed = {"partition.scheme": "classes-per-client"}
    expected, _ = final_theta(tiny(settings("heterofl", **skewed), "heterofl-skewed"))
    single, _ = final_theta(tiny(settings(**{"model.exits": 1}, **skewed), "single-skewed"))
    assert not np.allclose(single, expected, rtol=0, atol=1e-3)


# The server's part


def record(capacity: str) -> ClientRecord:
    shape, classes, descriptor = (1, 8, 8), 10, np.zeros(2, np.float32)
    return ClientRecord("client", 1, "train", Fraction(capacity), shape, classes, 1, {}, 1, "", descriptor, 0)


def prepared(config: FrampConfig) -> ScaleFLStrategy:
    strategy = ScaleFLStrategy(config, RunFolder.create(Path(config.output.folder), config))
    strategy.layout = ParameterLayout.of(build_model(config.model, (1, 8, 8), 10))
    strategy.build(torch.zeros(strategy.layout.size), WIDTHS[-1], record("1"))
    return strategy


@pytest.mark.parametrize("capacity", CHANNELS)
def test_extraction_by_hand(tiny, capacity):
    config = tiny(settings())
    strategy = prepared(config)
    expected = []
    corners = held_corners(CHANNELS[capacity])
    for name, part in initial(config).items():
        held = np.zeros(part.shape, bool)
        if name in corners:
            held[corners[name]] = True
        expected.append(held.ravel())
    mask = strategy.extract(np.zeros(strategy.layout.size, np.float32), record(str(capacity)), 1)
    assert np.array_equal(mask, np.concatenate(expected))
    assert np.array_equal(mask, channel_mask(strategy.layout, window(strategy.layout, capacity)))


def test_a_tensor_is_averaged_over_those_that_reach_it(tiny):
    """Deltas 1, 0 and 4 of sizes 1, 1/4 and 1/16; classes play no part, and a delta of zero counts."""
    strategy = prepared(tiny(settings()))
    updates = []
    for capacity, delta in (("1", 1.0), ("1/4", 0.0), ("1/16", 4.0)):
        mask = strategy.extract(np.zeros(strategy.layout.size, np.float32), record(capacity), 1)
        held = Prototypes(np.array([3]), np.array([9]), np.zeros((1, 0), np.float32))
        kept = np.full(mask.sum(), delta, np.float32)
        updates.append(ClientUpdate(record(capacity), PackedMask.of(mask), kept, held, 0.0, 1))
    strategy.server_update(updates, 1)
    theta = strategy.generate(record("1"), evaluation=False)
    parts = {slot.name: theta[slot.slice].reshape(slot.shape) for slot in strategy.layout.slots}
    np.testing.assert_allclose(parts["features.1.weight"], [5 / 3] * 3 + [1 / 2] * 3 + [1.0] * 2, rtol=1e-6)
    np.testing.assert_allclose(parts["exits.6.weight"][0], [5 / 3] * 5 + [1 / 2] * 7 + [1.0] * 4, rtol=1e-6)
    np.testing.assert_allclose(parts["exits.6.bias"], [5 / 3] * 10, rtol=1e-6)
    assert (parts["features.8.weight"] == 1).all()
    assert (parts["head.bias"] == 1).all()


@pytest.mark.parametrize(("rounds", "first"), [(1, 2), (3, 2), (4, 3), (8, 4), (10, 4), (20, 7), (100, 27)])
def test_distillation_starts_once_a_quarter_of_the_rounds_are_over(tiny, rounds, first):
    """In the first round whose number, counted from 0 as in the released code, is above a quarter of the rounds."""
    assert [number > rounds / 4 for number in (first - 2, first - 1)] == [False, True]
    strategy = prepared(tiny(settings(rounds=rounds)))
    off = [number for number in range(1, rounds + 1) if strategy.train_instructions(record("1"), number)]
    assert off == list(range(1, min(first, rounds + 1)))
    assert strategy.train_instructions(record("1"), 1) == {"local.distillation-weight": 0.0}


def test_a_client_predicts_with_its_deepest_exit(tiny):
    """By the weights of its second exit every image is of class 7; the first exit, which it holds too, says 2."""
    config = tiny(settings(**{"capacity.sizes": "1/16", "evaluation.local-prior-strength": 0.0}))
    strategy, theta = prepared(config), initial(config)
    theta["exits.6.bias"][7] = theta["exits.2.bias"][2] = theta["head.bias"][4] = 1e6
    values = np.concatenate([part.ravel() for part in theta.values()])
    mask = strategy.extract(values, record("1/16"), 1)
    client = Client.of(config.to_flat(), {"partition-id": 0, "num-partitions": 4}, {})
    counts = client.evaluate(encode_slim(values[mask], mask, strategy.layout, "float32").blob, 1, final=False)
    labels = client.data.test.selected_labels
    assert counts["local-correct"] == (labels == 7).sum() != (labels == 2).sum()


def test_bytes_are_those_of_the_smaller_network(tiny):
    config = tiny(settings(**{"capacity.sizes": "1/16"}))
    _, run = final_theta(config)
    size = 27 + 2 * 3 + 135 + 2 * 5 + 10 * (3 + 1) + 10 * (5 + 1)
    for event in (event for event in run.events() if event["kind"] == "train"):
        for row in event["clients"]:
            assert row["held"] == size
            assert row["down"]["values"] == row["up"]["values"] == 4 * size
            assert row["down"]["mask"] <= 1 + 5  # 40 channels as bits
    assert run.json("masks.json")["selection"]["1/16"][-1] == 0  # the head


# Settings


@pytest.mark.parametrize(
    ("strategy", "key", "value"),
    [
        (ScaleFLStrategy, "generator.name", "modulated"),
        (ScaleFLStrategy, "server.weighting", "uniform"),
        (ScaleFLStrategy, "local.alignment-weight", 0.1),
        (HeteroFLStrategy, "model.exits", 0),
    ],
)
def test_settings_of_another_method_are_refused(tiny, strategy, key, value):
    method = next(name for name, known in STRATEGIES.items() if known is strategy)
    strategy.check(tiny(settings(method)))
    with pytest.raises(ConfigError, match=f"method='{method}' .* {key}=.*not {value!r}"):
        strategy.check(tiny({**settings(method), key: value}))


def test_more_exits_than_stages_fail_with_the_valid_numbers(tiny):
    config = tiny(settings(**{"model.exits": 4}))
    with pytest.raises(ModelError) as caught, InProcessGrid(client_app, 4, config.to_flat()) as grid:
        serve(grid, config)
    assert "choose 1 (the head alone) to 3" in str(caught.value)
