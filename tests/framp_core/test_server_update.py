from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from framp_core import server_update
from framp_core.config import ExtractionConfig, GeneratorConfig, ModelConfig, ServerConfig
from framp_core.errors import ModelError, NonFiniteError
from framp_core.generators import GENERATORS, Generator, build_generator
from framp_core.masking import extract
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.server_update import GeneratorUpdate

D = 4
MODEL = ModelConfig(name="mlp", widths=(5,))
PLAIN = {"shared_learning_rate": 1.0, "shared_momentum": 0.0, "averaging_decay": 0.0}
every_generator = pytest.mark.parametrize("name", sorted(GENERATORS))


def network() -> FlatModel:
    return FlatModel(build_model(MODEL, (1, 2, 2), 3))


N = network().layout.size


def build(name: str, seed: int = 0) -> Generator:
    flat = network()
    config = GeneratorConfig(name=name, expert_scope="all", hidden=6, chunk_size=9, chunk_embedding=3)
    return build_generator(config, flat.layout, D, initial_parameters(flat.model, seed), seed)


def round_of(clients: int, seed: int = 0) -> tuple[torch.Tensor, list[np.ndarray], list[np.ndarray], list[int]]:
    source = np.random.default_rng(seed)
    descriptors = source.normal(size=(clients, D)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    masks = [source.random(N) < 0.5 for _ in range(clients)]
    deltas = [np.where(mask, source.normal(size=N), 0).astype(np.float32) for mask in masks]
    return torch.from_numpy(descriptors), deltas, masks, [int(count) for count in source.integers(1, 50, clients)]


def after_one_step(config: ServerConfig, name: str = "shared", seed: int = 0, clients: int = 3) -> np.ndarray:
    update = GeneratorUpdate(build(name), config)
    update.step(*round_of(clients, seed))
    return update.generator.theta_0.detach().numpy() - build(name).theta_0.detach().numpy()


def test_shared_uniform_full_masks_is_federated_averaging():
    descriptors, deltas, _, examples = round_of(3)
    generator = build("shared")
    expected = generator.theta_0.detach().numpy() + sum(deltas) / 3
    update = GeneratorUpdate(generator, ServerConfig(weighting="uniform", **PLAIN))
    update.step(descriptors, deltas, [np.ones(N, dtype=bool)] * 3, examples)
    assert np.allclose(generator.theta_0.detach(), expected, atol=1e-6)


def test_examples_weigh_by_share():
    _, deltas, _, examples = round_of(3)
    expected = sum(count * delta for count, delta in zip(examples, deltas, strict=True)) / sum(examples)
    assert np.allclose(after_one_step(ServerConfig(weighting="examples", **PLAIN)), expected, atol=1e-6)
    assert not np.allclose(after_one_step(ServerConfig(weighting="uniform", **PLAIN)), expected, atol=1e-3)


def test_coverage_is_the_mean_over_the_holders_of_each_coordinate():
    _, deltas, masks, _ = round_of(3)
    expected = np.zeros(N)
    for j in range(N):
        held = [delta[j] for delta, mask in zip(deltas, masks, strict=True) if mask[j]]
        expected[j] = np.mean(held) if held else 0.0
    assert not np.logical_or.reduce(masks).all(), "the case of an uncovered coordinate must occur"
    assert np.allclose(after_one_step(ServerConfig(weighting="coverage", **PLAIN)), expected, atol=1e-6)


def test_coverage_counts_a_held_coordinate_whose_delta_is_zero():
    descriptors, deltas, masks, examples = round_of(2)
    deltas, masks = [np.ones(N, np.float32), np.zeros(N, np.float32)], [np.ones(N, bool)] * 2
    generator = build("shared")
    expected = generator.theta_0.detach().numpy() + 0.5
    GeneratorUpdate(generator, ServerConfig(weighting="coverage", **PLAIN)).step(descriptors, deltas, masks, examples)
    assert np.allclose(generator.theta_0.detach(), expected, atol=1e-6)


def test_coverage_with_full_masks_equals_uniform():
    descriptors, deltas, _, examples = round_of(3)
    results = []
    for weighting in ("coverage", "uniform"):
        update = GeneratorUpdate(build("modulated"), ServerConfig(weighting=weighting))
        update.step(descriptors, deltas, [np.ones(N, dtype=bool)] * 3, examples)
        results.append(torch.cat([parameter.detach().flatten() for parameter in update.generator.parameters()]))
    assert torch.allclose(*results, atol=1e-6)
    assert not np.allclose(*(after_one_step(ServerConfig(weighting=w), "modulated") for w in ("coverage", "uniform")))


def test_momentum_of_the_shared_vector_by_hand():
    config = ServerConfig(weighting="uniform", shared_learning_rate=0.5, shared_momentum=0.5, averaging_decay=0.0)
    generator = build("shared")
    start = generator.theta_0.detach().numpy().copy()
    update = GeneratorUpdate(generator, config)
    velocity, expected = np.zeros(N), start
    for seed in (0, 1):
        update.step(*round_of(3, seed))
        velocity = 0.5 * velocity + sum(round_of(3, seed)[1]) / 3
        expected = expected + 0.5 * velocity
    assert np.allclose(generator.theta_0.detach(), expected, atol=1e-6)


def test_shared_momentum_leaves_the_personal_part_alone():
    config = ServerConfig(shared_momentum=0.5, personal_optimizer="sgd")
    update = GeneratorUpdate(build("modulated"), config)
    update.step(*round_of(2))
    assert [key for key in update.state_dict() if "optimizer" in key] == ["shared_optimizer.0.momentum_buffer"]


@every_generator
def test_step_follows_the_vjp_of_each_client(name):
    descriptors, deltas, masks, examples = round_of(3)
    reference, generator = build(name), build(name)
    config = ServerConfig(
        weighting="uniform", personal_optimizer="sgd", personal_learning_rate=0.25, shared_learning_rate=0.5,
        shared_momentum=0.0,
    )  # fmt: skip
    norms = GeneratorUpdate(generator, config).step(descriptors, deltas, masks, examples)
    totals = [torch.zeros_like(parameter) for parameter in reference.parameters()]
    for index, delta in enumerate(deltas):
        cotangent = torch.from_numpy(-delta / 3)[None]
        one = reference.vjp(descriptors[index : index + 1], cotangent)
        totals = [total + part for total, part in zip(totals, one, strict=True)]
    squares = {"shared": 0.0, "personal": 0.0}
    for (key, before), after, gradient in zip(
        reference.named_parameters(), generator.parameters(), totals, strict=True
    ):
        part, rate = ("shared", 0.5) if key in ("theta_0", "experts") else ("personal", 0.25)
        assert torch.allclose(after, before - rate * gradient, atol=1e-6)
        squares[part] += float(gradient.square().sum())
    for part, square in squares.items():
        assert norms[f"{part}_gradient_norm"] == pytest.approx(square**0.5, rel=1e-4)


def test_groups_of_clients_do_not_change_the_sum(monkeypatch):
    config = ServerConfig(weighting="coverage", averaging_decay=0.0)
    whole = after_one_step(config, "modulated", clients=5)
    calls = []
    vjp = Generator.vjp

    def counted(self: Generator, descriptors: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
        calls.append(len(descriptors))
        return vjp(self, descriptors, *rest)

    monkeypatch.setattr(Generator, "vjp", counted)
    monkeypatch.setattr(server_update, "GROUP_FLOATS", 2 * N + 1)
    assert np.allclose(after_one_step(config, "modulated", clients=5), whole, atol=1e-6)
    assert calls == [2, 2, 1]
    monkeypatch.setattr(server_update, "GROUP_FLOATS", 1)
    assert np.allclose(after_one_step(config, "modulated", clients=5), whole, atol=1e-6)
    assert calls[3:] == [1] * 5


def client_loss(flat: FlatModel, theta: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    flat.load(theta * torch.from_numpy(mask))
    inputs = torch.linspace(-1, 1, 24).reshape(6, 1, 2, 2)
    return F.cross_entropy(flat(inputs)[0], torch.tensor([0, 0, 1, 1, 2, 2]))


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, "shared") for name in sorted(GENERATORS)]
    + [(name, "personal") for name in sorted(set(GENERATORS) - {"shared", "mixture"})],
)
@pytest.mark.parametrize("capacity", [0.25, 1.0])
def test_a_step_lowers_the_clients_loss(name, part, capacity):
    rates = {f"{other}_learning_rate": 1e-12 for other in ("shared", "personal")}
    config = ServerConfig(**{**rates, f"{part}_learning_rate": 0.05, "personal_optimizer": "sgd"}, averaging_decay=0)
    generator, flat, descriptor = build(name), network(), torch.full((1, D), 0.5)
    theta = generator.generate(descriptor)[0]
    mask = extract(theta.numpy(), flat.layout, ExtractionConfig(), capacity)
    before = client_loss(flat, theta, mask)
    before.backward()
    delta = np.where(mask, -0.1 * flat.flat_gradient.numpy(), 0).astype(np.float32)
    assert np.abs(delta).max() > 0
    GeneratorUpdate(generator, config).step(descriptor, [delta], [mask], [6])
    after = generator.generate(descriptor)[0]
    assert client_loss(flat, after, mask) < before


def test_evaluation_generator_is_the_moving_average():
    update = GeneratorUpdate(build("modulated"), ServerConfig(averaging_decay=0.75))
    assert update.evaluation_generator is not update.generator
    update.step(*round_of(2, 0))
    expected = [parameter.detach().clone() for parameter in update.generator.parameters()]
    for seed in (1, 2):
        update.step(*round_of(2, seed))
        expected = [0.75 * old + 0.25 * new for old, new in zip(expected, update.generator.parameters(), strict=True)]
    for averaged, by_hand in zip(update.evaluation_generator.parameters(), expected, strict=True):
        assert torch.allclose(averaged, by_hand, atol=1e-6)
    assert not torch.allclose(update.evaluation_generator.theta_0, update.generator.theta_0, atol=1e-3)


def test_without_averaging_the_generator_itself_is_evaluated():
    update = GeneratorUpdate(build("modulated"), ServerConfig(averaging_decay=0))
    assert update.evaluation_generator is update.generator


@pytest.mark.parametrize("decay", [0.0, 0.8])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@every_generator
def test_interrupted_and_restored_equals_uninterrupted(name, optimizer, decay, tmp_path):
    config = ServerConfig(shared_optimizer=optimizer, personal_optimizer=optimizer, averaging_decay=decay)
    straight = GeneratorUpdate(build(name), config)
    for seed in range(4):
        straight.step(*round_of(3, seed))

    first = GeneratorUpdate(build(name), config)
    for seed in range(2):
        first.step(*round_of(3, seed))
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    saved = load_file(tmp_path / "state.safetensors")
    second = GeneratorUpdate(build(name, seed=9), config)
    second.load_state_dict(saved)
    for seed in range(2, 4):
        second.step(*round_of(3, seed))

    expected, resumed = straight.state_dict(), second.state_dict()
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    written = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(written[key], saved[key]) for key in written), "loading must copy"


def test_resuming_without_the_optimizer_state_would_differ():
    config = ServerConfig()
    straight, resumed = GeneratorUpdate(build("modulated"), config), GeneratorUpdate(build("modulated"), config)
    for update in (straight, resumed):
        update.step(*round_of(3, 0))
    state = {key: value for key, value in resumed.state_dict().items() if not key.startswith("shared_optimizer")}
    fresh = GeneratorUpdate(build("modulated"), config)
    fresh.load_state_dict(state)
    for update in (straight, fresh):
        update.step(*round_of(3, 1))
    assert not torch.allclose(straight.generator.theta_0, fresh.generator.theta_0)


@pytest.mark.parametrize(
    "written_by",
    [
        GeneratorUpdate(build("low-rank"), ServerConfig()),
        GeneratorUpdate(build("modulated"), ServerConfig(averaging_decay=0)),
        GeneratorUpdate(build("modulated"), ServerConfig(shared_optimizer="adam")),
    ],
    ids=["generator", "averaging", "optimizer"],
)
def test_state_of_another_configuration_is_refused(written_by):
    written_by.step(*round_of(2))
    with pytest.raises(ModelError, match="resume with the configuration"):
        GeneratorUpdate(build("modulated"), ServerConfig()).load_state_dict(written_by.state_dict())


def test_averaged_state_is_refused_without_averaging():
    state = GeneratorUpdate(build("modulated"), ServerConfig()).state_dict()
    with pytest.raises(ModelError, match="averaging-decay is 0"):
        GeneratorUpdate(build("modulated"), ServerConfig(averaging_decay=0)).load_state_dict(state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["modulated", "mixture"])
def test_non_finite_gradient_leaves_everything_as_it_was(name, bad):
    update = GeneratorUpdate(build(name), ServerConfig())
    update.step(*round_of(2, 0))
    before = {key: value.clone() for key, value in update.state_dict().items()}
    descriptors, deltas, masks, examples = round_of(2, 1)
    deltas[1][3] = bad
    masks[1][3] = True
    with pytest.raises(NonFiniteError, match="gradient is not finite"):
        update.step(descriptors, deltas, masks, examples)
    after = update.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    update.step(*round_of(2, 2))


def test_step_needs_clients_and_equal_lengths():
    update = GeneratorUpdate(build("shared"), ServerConfig())
    descriptors, deltas, masks, examples = round_of(2)
    with pytest.raises(ModelError, match="at least one client"):
        update.step(descriptors[:0], [], [], [])
    with pytest.raises(ModelError, match="given are 2, 2, 1 and 2"):
        update.step(descriptors, deltas, masks[:1], examples)


def test_weighting_by_examples_needs_examples():
    with pytest.raises(ModelError, match="at least one example"):
        GeneratorUpdate(build("shared"), ServerConfig(weighting="examples")).step(*round_of(2)[:3], [3, 0])


def test_shared_generator_has_one_optimizer_and_no_personal_gradient():
    update = GeneratorUpdate(build("shared"), ServerConfig())
    norms = update.step(*round_of(2))
    assert norms["personal_gradient_norm"] == 0.0
    assert norms["shared_gradient_norm"] > 0
    assert not [key for key in update.state_dict() if key.startswith("personal_optimizer")]


def test_non_zero_is_the_mean_over_the_clients_that_moved_a_coordinate():
    descriptors, deltas, masks, examples = round_of(3)
    deltas[0] *= np.arange(N) % 2  # every other coordinate is held and stays
    moved = np.stack([delta != 0 for delta in deltas]).sum(axis=0)
    expected = np.where(moved > 0, np.sum(deltas, axis=0) / np.maximum(moved, 1), 0)

    def step(weighting: str) -> np.ndarray:
        generator = build("shared")
        before = generator.theta_0.detach().numpy().copy()
        GeneratorUpdate(generator, ServerConfig(weighting=weighting, **PLAIN)).step(
            descriptors, deltas, masks, examples
        )
        return generator.theta_0.detach().numpy() - before

    np.testing.assert_allclose(step("non-zero"), expected, atol=1e-6)
    assert not np.allclose(step("coverage"), expected, atol=1e-3)
