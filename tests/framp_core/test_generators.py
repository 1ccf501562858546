import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from framp_core.config import GeneratorConfig, ModelConfig
from framp_core.errors import ModelError
from framp_core.generators import GENERATORS, Generator, build_generator
from framp_core.layout import ParameterLayout
from framp_core.models import build_model

LAYOUT = ParameterLayout.of(
    nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(3, 2))
)
D = 4
PERSONAL = sorted(set(GENERATORS) - {"shared"})
every_generator = pytest.mark.parametrize("name", sorted(GENERATORS))
personal_generators = pytest.mark.parametrize("name", PERSONAL)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def initial() -> torch.Tensor:
    return torch.randn(LAYOUT.size, generator=rng(1))


def small(name: str, seed: int = 0, **changes: object) -> Generator:
    options = {"expert_scope": "all", "hidden": 5, "rank": 2, "chunk_size": 7, "chunk_embedding": 3, **changes}
    return build_generator(GeneratorConfig(name=name, **options), LAYOUT, D, initial(), seed)


def trained(name: str, seed: int = 7, **changes: object) -> Generator:
    """A generator in float64 that is away from its start: fitted, every parameter at random."""
    generator = small(name, **changes).double()
    generator.fit(descriptors(9, seed=4), np.random.default_rng(seed))
    source = rng(seed)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.normal_(generator=source)
    return generator


def descriptors(clients: int, seed: int = 2) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(clients, D, generator=rng(seed)), dim=1)


def relu(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, 0)


def modulated_by_hand(phi: dict[str, np.ndarray], v: np.ndarray) -> list[float]:
    outputs = phi["output.weight"] @ relu(phi["hidden.weight"] @ v + phi["hidden.bias"])
    channels = sum(slot.shape[0] for slot in LAYOUT.slots)
    theta, channel = [], 0
    for slot in LAYOUT.slots:
        for _ in range(slot.shape[0]):
            for _ in range(slot.size // slot.shape[0]):
                shift = outputs[channels + channel] / math.sqrt(slot.fan_in)
                theta.append(phi["theta_0"][len(theta)] * (1 + outputs[channel]) + shift)
            channel += 1
    return theta


def low_rank_by_hand(phi: dict[str, np.ndarray], v: np.ndarray) -> list[float]:
    hidden = relu(phi["hidden.weight"] @ v + phi["hidden.bias"])
    left = iter(phi["left.weight"] @ hidden)
    right = iter(phi["right.weight"] @ hidden + phi["right.bias"])
    theta: list[float] = []
    for slot in LAYOUT.slots:
        if not slot.maskable:
            theta += [phi["theta_0"][slot.offset + index] + next(left) for index in range(slot.size)]
            continue
        u = [[next(left) for _ in range(2)] for _ in range(slot.shape[0])]
        vt = [[next(right) for _ in range(slot.fan_in)] for _ in range(2)]
        for row, column in itertools.product(range(slot.shape[0]), range(slot.fan_in)):
            product = sum(u[row][rank] * vt[rank][column] for rank in range(2)) / math.sqrt(slot.fan_in)
            theta.append(phi["theta_0"][len(theta)] + product)
    return theta


def chunked_by_hand(phi: dict[str, np.ndarray], v: np.ndarray) -> list[float]:
    first_layer = np.concatenate([phi["from_descriptor.weight"], phi["from_embedding.weight"]], axis=1)
    chunks: list[float] = []
    for embedding in phi["embeddings"]:
        hidden = relu(first_layer @ np.concatenate([v, embedding]) + phi["from_descriptor.bias"])
        chunks += list(phi["head.weight"] @ hidden)
    return [shared + personal for shared, personal in zip(phi["theta_0"], chunks, strict=False)]


def dense_by_hand(phi: dict[str, np.ndarray], v: np.ndarray) -> list[float]:
    return list(phi["theta_0"] + phi["output.weight"] @ relu(phi["hidden.weight"] @ v + phi["hidden.bias"]))


def shared_by_hand(phi: dict[str, np.ndarray], v: np.ndarray) -> list[float]:
    return list(phi["theta_0"])


def mixture_by_hand(phi: dict[str, np.ndarray], v: np.ndarray) -> list[float]:
    squares = [sum((a - b) ** 2 for a, b in zip(v, centre, strict=True)) for centre in phi["centres"]]
    return list(phi["theta_0"] + phi["experts"][squares.index(min(squares))])


BY_HAND = {
    "mixture": mixture_by_hand,
    "modulated": modulated_by_hand,
    "low-rank": low_rank_by_hand,
    "chunked": chunked_by_hand,
    "dense": dense_by_hand,
    "shared": shared_by_hand,
}


@every_generator
def test_generate_equals_the_formula_written_out(name):
    generator = trained(name)
    phi = {key: value.numpy() for key, value in generator.state_dict().items()}
    given_descriptors = descriptors(3).double()
    expected = [BY_HAND[name](phi, v) for v in given_descriptors.numpy()]
    assert np.allclose(generator.generate(given_descriptors), expected)


def explicit_jacobian(generator: Generator, v: torch.Tensor, step: float = 1e-6) -> np.ndarray:
    """Central differences, one parameter at a time: (n, size of the generator)."""
    columns = []
    for parameter in generator.parameters():
        flat = parameter.data.view(-1)
        for index in range(flat.numel()):
            value = flat[index].item()
            flat[index] = value + step
            above = generator.generate(v[None])[0]
            flat[index] = value - step
            below = generator.generate(v[None])[0]
            flat[index] = value
            columns.append(((above - below) / (2 * step)).numpy())
    return np.stack(columns, axis=1)


@every_generator
def test_vjp_equals_the_explicit_jacobian(name):
    generator = trained(name)
    given_descriptors = descriptors(3).double()
    cotangents = torch.randn(3, LAYOUT.size, generator=rng(3)).double()
    expected = sum(
        explicit_jacobian(generator, v).T @ u.numpy() for v, u in zip(given_descriptors, cotangents, strict=True)
    )
    gradients = generator.vjp(given_descriptors, cotangents)
    assert [gradient.shape for gradient in gradients] == [parameter.shape for parameter in generator.parameters()]
    assert np.allclose(torch.cat([gradient.flatten() for gradient in gradients]), expected, atol=1e-7)


@every_generator
@settings(derandomize=True, deadline=None, max_examples=10)
@given(clients=st.integers(0, 4), seed=st.integers(0, 9))
def test_batched_equals_one_by_one(name, clients, seed):
    generator = trained(name, seed)
    given_descriptors = descriptors(clients, seed).double()
    cotangents = torch.randn(clients, LAYOUT.size, generator=rng(seed)).double()
    models = generator.generate(given_descriptors)
    assert models.shape == (clients, LAYOUT.size)
    totals = [torch.zeros_like(parameter) for parameter in generator.parameters()]
    for index in range(clients):
        assert torch.allclose(models[index], generator.generate(given_descriptors[index : index + 1])[0])
        one = generator.vjp(given_descriptors[index : index + 1], cotangents[index : index + 1])
        totals = [total + part for total, part in zip(totals, one, strict=True)]
    for total, batched in zip(totals, generator.vjp(given_descriptors, cotangents), strict=True):
        assert torch.allclose(total, batched)


@every_generator
def test_every_client_starts_from_the_initial_vector(name):
    assert torch.equal(small(name).generate(descriptors(3)), initial().repeat(3, 1))


@personal_generators
def test_away_from_the_start_models_differ_between_descriptors(name):
    models = trained(name).generate(descriptors(9, seed=4).double())
    assert not torch.allclose(models, models[:1].expand_as(models))


@personal_generators
def test_personal_part_can_train_from_the_start(name):
    generator = small(name)
    v, cotangent = descriptors(1), torch.randn(1, LAYOUT.size, generator=rng(3))
    gradients = dict(zip((key for key, _ in generator.named_parameters()), generator.vjp(v, cotangent), strict=True))
    assert sum(gradient.norm() for key, gradient in gradients.items() if key != "theta_0") > 0
    with torch.no_grad():
        for key, parameter in generator.named_parameters():
            if key != "theta_0":
                parameter -= 0.1 * gradients[key]
    moved = generator.generate(v) - initial()
    assert (moved * cotangent).sum() < 0, "a step against the gradient must move the model against the cotangent"
    for slot in LAYOUT.slots:
        assert moved[:, slot.slice].norm() > 0, f"{slot.name} cannot leave the start"


@every_generator
def test_at_the_start_theta_0_gets_the_sum_of_the_cotangents(name):
    generator = small(name)
    cotangents = torch.randn(3, LAYOUT.size, generator=rng(3))
    names = [key for key, _ in generator.named_parameters()]
    gradient = generator.vjp(descriptors(3), cotangents)[names.index("theta_0")]
    assert torch.allclose(gradient, cotangents.sum(dim=0), atol=1e-6)


@every_generator
def test_parameters_are_shared_or_personal(name):
    generator = small(name)
    shared = {"theta_0", "experts"} if name == "mixture" else {"theta_0"}
    by_name = {id(parameter): key for key, parameter in generator.named_parameters()}
    assert {by_name[id(parameter)] for parameter in generator.shared_parameters()} == shared
    assert {by_name[id(parameter)] for parameter in generator.personal_parameters()} == {*by_name.values()} - shared


@every_generator
def test_generated_models_do_not_alias_the_generator(name):
    generator = small(name)
    generator.generate(descriptors(1)).zero_()
    assert torch.equal(generator.theta_0, initial())


@every_generator
def test_build_depends_on_the_seed_alone_and_leaves_the_global_state(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small(name).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = small(name).state_dict(), small(name, seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first) == (name not in {"shared", "mixture"})


def test_sizes_by_hand():
    n, channels, hidden = LAYOUT.size, 3 + 3 + 3 + 2 + 2, 5
    first_layer = hidden * (D + 1)
    chunks = math.ceil(n / 7)
    rows, columns, vectors = 3 + 2, 8 + 3, 3 + 3 + 2
    assert {name: small(name).size for name in GENERATORS} == {
        "mixture": n + 4 * n,
        "modulated": n + first_layer + 2 * channels * hidden,
        "low-rank": n + first_layer + (2 * rows + vectors) * hidden + 2 * columns * (hidden + 1),
        "chunked": n + 3 * chunks + first_layer + hidden * 3 + 7 * hidden,
        "dense": n + first_layer + n * hidden,
        "shared": n,
    }


@every_generator
def test_size_at_the_limit_is_built_and_above_it_is_refused(name):
    size = small(name).size
    assert small(name, max_parameters=size).size == size
    with pytest.raises(ModelError, match=f"allows {size - 1:,}"):
        small(name, max_parameters=size - 1)


@pytest.fixture(scope="module")
def resnet18_layout():
    config = ModelConfig(name="resnet18", widths=(64, 128, 256, 512))
    return ParameterLayout.of(build_model(config, (3, 32, 32), 10))


def test_dense_at_resnet18_size_is_refused_before_any_allocation(resnet18_layout, monkeypatch):
    def no_allocation(*_: object, **__: object) -> None:
        raise AssertionError("memory was taken for a generator that is refused")

    monkeypatch.setattr(nn.Module, "to_empty", no_allocation)
    n, d, hidden = 11_173_962, 42, 64
    start = torch.zeros(1).expand(n)
    channels = sum(slot.shape[0] for slot in resnet18_layout.slots)
    dense, modulated = n + hidden * (d + 1) + n * hidden, n + hidden * (d + 1) + 2 * channels * hidden
    with pytest.raises(ModelError) as caught:
        build_generator(GeneratorConfig(name="dense"), resnet18_layout, d, start, 0)
    for part in (f"{dense:,}", "100,000,000", f"generator.name='modulated' ({modulated:,} parameters)"):
        assert part in str(caught.value)


def test_modulated_above_the_limit_is_told_to_shrink():
    with pytest.raises(ModelError, match=r"Lower generator\.hidden or raise"):
        small("modulated", max_parameters=LAYOUT.size)


def test_initial_vector_of_another_model_is_refused():
    with pytest.raises(ModelError, match=rf"shape \(3,\) and the layout {LAYOUT.size} parameters"):
        build_generator(GeneratorConfig(), LAYOUT, D, torch.zeros(3), 0)


def test_the_clusters_of_a_mixture_are_those_of_the_descriptors():
    kinds = np.repeat([0, 1, 2], 4)
    points = torch.from_numpy(10 * np.eye(3, D)[kinds] + np.random.default_rng(0).normal(0, 0.1, (12, D))).float()
    generator = small("mixture", experts=3)
    generator.fit(points, np.random.default_rng(0))
    shares = generator.shares(points).numpy()
    assert (shares.sum(axis=1) == 1).all()
    assert np.array_equal(shares @ shares.T, kinds[:, None] == kinds[None])
    new = generator.shares(points[:1] + 0.3).numpy()
    assert np.array_equal(new, shares[:1]), "a client that was not there at the start goes to the nearest centre"


@pytest.mark.parametrize("clients", [1, 2])
def test_with_fewer_clients_than_experts_the_rest_stay_unused(clients):
    generator = small("mixture", experts=4)
    generator.fit(descriptors(clients), np.random.default_rng(0))
    assert generator.shares(descriptors(50, seed=5)).sum(dim=0).count_nonzero() <= clients


def test_a_mixture_that_saw_nobody_gives_everyone_the_first_expert():
    assert torch.equal(small("mixture").shares(descriptors(5))[:, 0], torch.ones(5))
