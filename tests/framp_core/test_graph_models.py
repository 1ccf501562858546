"""Graph networks: what they compute against dense matrices, and how they are described, masked, slimmed and cut."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from framp_core.config import ExtractionConfig, FrampConfig, GeneratorConfig, ModelConfig
from framp_core.errors import ConfigError, ModelError
from framp_core.generators import GENERATORS, build_generator
from framp_core.graph_batch import GraphBatch
from framp_core.layout import CLASSES as HEAD
from framp_core.layout import INPUT, ParameterLayout
from framp_core.local_weights import KeptWeights
from framp_core.masking import extract
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.structured import (
    SlimSize,
    channel_mask,
    held_channels,
    kept_sizes,
    selection_of,
    slim_size,
    slim_widths,
    window,
)
from tests.framp_core.graphs import adjacency, graphs, symmetrically_normalised

SHAPE, CLASSES = (3,), 5
CONFIGS = {name: ModelConfig(name=name, widths=(8, 12), groups=2, heads=4) for name in ("gcn", "sage", "gat")}
architectures = pytest.mark.parametrize("name", CONFIGS)


def config_of(name: str, **changes: object) -> ModelConfig:
    return CONFIGS[name].model_copy(update=changes)


def flat_model(config: ModelConfig, kept: tuple[int, ...] | None = None) -> FlatModel:
    return FlatModel(build_model(config, SHAPE, CLASSES, kept))


def layout_of(config: ModelConfig, kept: tuple[int, ...] | None = None) -> ParameterLayout:
    """As a client describes a network that it does not hold."""
    with torch.device("meta"):
        return ParameterLayout.of(build_model(config, SHAPE, CLASSES, kept))


def random_theta(layout: ParameterLayout) -> torch.Tensor:
    """Attention, norm gains and biases are random as well, so that a channel in the wrong place shows."""
    return torch.from_numpy(np.random.default_rng(0).normal(size=layout.size).astype(np.float32))


def loaded(config: ModelConfig) -> FlatModel:
    flat = flat_model(config)
    flat.load(random_theta(flat.layout))
    return flat


def parts_of(layout: ParameterLayout, theta: torch.Tensor) -> dict[str, torch.Tensor]:
    return {slot.name: part for slot, part in zip(layout.slots, layout.split(theta), strict=True)}


def a_graph() -> GraphBatch:
    """Node 4 is isolated, node 0 has edges out alone, and two edges go both ways."""
    x = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([[0, 0, 1, 2, 2, 3, 5], [1, 2, 2, 1, 3, 5, 3]])
    return GraphBatch(x, edges, torch.tensor([2, 4, 3, 0, 5]))


LABELS = torch.arange(5) % CLASSES


# Against dense matrices


def with_loops(dense: torch.Tensor) -> torch.Tensor:
    return dense.clone().fill_diagonal_(1)


def gcn_by_hand(parts: dict[str, torch.Tensor], x: torch.Tensor, dense: torch.Tensor, heads: int) -> torch.Tensor:
    return (
        symmetrically_normalised(dense + torch.eye(len(x), dtype=dense.dtype)) @ x @ parts["lin.weight"].T
        + parts["bias"]
    )


def sage_by_hand(parts: dict[str, torch.Tensor], x: torch.Tensor, dense: torch.Tensor, heads: int) -> torch.Tensor:
    mean = dense / dense.sum(dim=1, keepdim=True).clamp(min=1)
    return mean @ x @ parts["lin_l.weight"].T + parts["lin_l.bias"] + x @ parts["lin_r.weight"].T


def gat_by_hand(parts: dict[str, torch.Tensor], x: torch.Tensor, dense: torch.Tensor, heads: int) -> torch.Tensor:
    """Head by head; a channel's head is its position divided by the channels per head."""
    edges, outputs = with_loops(dense), []
    for weight, source, target in zip(
        parts["lin.weight"].chunk(heads), parts["att_src"].chunk(heads), parts["att_dst"].chunk(heads), strict=True
    ):
        hidden = x @ weight.T
        scores = F.leaky_relu((hidden @ source)[None, :] + (hidden @ target)[:, None], 0.2)
        weights = edges * scores.exp()
        outputs.append(weights / weights.sum(dim=1, keepdim=True) @ hidden)
    return torch.cat(outputs, dim=1) + parts["bias"]


BY_HAND = {"gcn": gcn_by_hand, "sage": sage_by_hand, "gat": gat_by_hand}


def norm_by_hand(parts: dict[str, torch.Tensor], x: torch.Tensor, groups: int) -> torch.Tensor:
    grouped = x.reshape(len(x), groups, -1)
    centred = grouped - grouped.mean(dim=2, keepdim=True)
    scaled = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    return scaled.reshape(x.shape) * parts["weight"] + parts["bias"]


def layers_by_hand(config: ModelConfig, parts: dict[str, torch.Tensor], batch: GraphBatch) -> list[torch.Tensor]:
    """Values at all nodes behind every layer, float64."""
    hidden, x = [], batch.x.double()
    for layer in range(len(config.widths)):
        own = {
            name.removeprefix(f"features.{layer}."): part.double()
            for name, part in parts.items()
            if name.startswith(f"features.{layer}.")
        }
        conv = {name.removeprefix("conv."): part for name, part in own.items() if name.startswith("conv.")}
        x = BY_HAND[config.name](conv, x, adjacency(batch), config.heads)
        if config.normalisation == "group":
            norm = {name.removeprefix("norm."): part for name, part in own.items() if name.startswith("norm.")}
            x = norm_by_hand(norm, x, config.groups)
        x = x.relu()
        hidden.append(x)
    return hidden


@architectures
@pytest.mark.parametrize("normalisation", ["group", "none"])
@settings(derandomize=True, deadline=None, max_examples=40)
@given(batch=graphs(*SHAPE))
def test_exits_and_features_are_those_of_dense_matrices(name, normalisation, batch):
    """The early exit reads the first layer, the head the second; both at the seeds, in their order."""
    flat = loaded(config_of(name, normalisation=normalisation, exits=0))
    parts = parts_of(flat.layout, flat.flat.detach())
    hidden = [x[batch.seeds] for x in layers_by_hand(config_of(name, normalisation=normalisation), parts, batch)]
    exits, features = flat.all_exits(batch)
    torch.testing.assert_close(features, hidden[-1].float(), rtol=1e-4, atol=1e-4)
    for logits, values, place in zip(exits, hidden, ("exits.0", "head"), strict=True):
        expected = values @ parts[f"{place}.weight"].double().T + parts[f"{place}.bias"]
        torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(flat(batch)[0], exits[-1])
    assert torch.equal(flat(batch)[1], features)


@architectures
def test_messages_run_from_source_to_target(name):
    """An edge from 0 to 1: node 1 sees node 0, and not the other way round."""
    flat = loaded(config_of(name, normalisation="none"))
    before = GraphBatch(torch.ones(2, *SHAPE), torch.tensor([[0], [1]]), torch.tensor([0, 1]))
    logits = flat(before)[0]
    for changed, seen in ((0, [True, True]), (1, [False, True])):
        x = before.x.clone()
        x[changed] += 1
        differs = (flat(before.carrying(x))[0] != logits).any(dim=1)
        assert differs.tolist() == seen


# The description


def test_parameters_and_what_is_maskable_against_a_table():
    vectors = {"norm.weight": 8, "norm.bias": 8}
    expected = {
        "gcn": {"conv.bias": 8, "conv.lin.weight": (8, 3), **vectors},
        "sage": {"conv.lin_l.weight": (8, 3), "conv.lin_l.bias": 8, "conv.lin_r.weight": (8, 3), **vectors},
        "gat": {"conv.att_src": 8, "conv.att_dst": 8, "conv.bias": 8, "conv.lin.weight": (8, 3), **vectors},
    }
    for name, table in expected.items():
        slots = [slot for slot in layout_of(CONFIGS[name]).slots if slot.name.startswith("features.0.")]
        found = {slot.name.removeprefix("features.0."): slot for slot in slots}
        assert list(found) == list(table)
        for key, shape in table.items():
            maskable = isinstance(shape, tuple)
            assert found[key].shape == (shape if maskable else (shape,))
            assert (found[key].maskable, found[key].fan_in) == (maskable, 3 if maskable else 1)


@architectures
def test_couplings_are_a_chain_of_layers(name):
    layout = layout_of(config_of(name, exits=0))
    chain = {"features.0": INPUT, "features.1": "features.0"}
    sizes = {INPUT: 3, "features.0": 8, "features.1": 12, HEAD: CLASSES}
    assert layout.hidden == {"features.0": 8, "features.1": 12}
    assert layout.exits == [{"features.0"}, {"features.0", "features.1"}]
    for slot in layout.slots:
        layer = ".".join(slot.name.split(".")[:2])
        rows, columns = {"exits.0": (HEAD, "features.0"), "head.weight": (HEAD, "features.1")}.get(
            layer, (layer, chain.get(layer))
        )
        if slot.name == "head.bias":
            rows = HEAD
        assert slot.coupling.rows == rows
        assert slot.shape[0] == sizes[rows]
        if len(slot.shape) > 1:
            assert slot.coupling.columns == columns
            assert slot.shape[1] == sizes[columns]


@architectures
def test_flat_gradient_equals_ordinary_autograd(name):
    flat = loaded(CONFIGS[name])
    plain = build_model(CONFIGS[name], SHAPE, CLASSES)
    for parameter, part in zip(plain.parameters(), flat.layout.split(flat.flat.detach()), strict=True):
        parameter.data = part.clone().view(parameter.shape)
    for model in (flat, plain):
        F.cross_entropy(model(a_graph())[0], LABELS).backward()
    for slot, parameter in zip(flat.layout.slots, plain.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(flat.flat_gradient[slot.slice], parameter.grad.flatten(), rtol=1e-4, atol=1e-6)
        assert parameter.grad.any(), slot.name


@architectures
@pytest.mark.parametrize("generator", sorted(GENERATORS))
def test_every_generator_writes_graph_networks(name, generator):
    model = build_model(CONFIGS[name], SHAPE, CLASSES)
    layout, start = ParameterLayout.of(model), initial_parameters(model, 0)
    built = build_generator(GeneratorConfig(name=generator), layout, 4, start, 0)
    theta = built(torch.eye(4)[:2])
    assert theta.shape == (2, layout.size)
    torch.testing.assert_close(theta[0], start, rtol=1e-4, atol=1e-4)


# The start


@architectures
@pytest.mark.parametrize("initialisation", ["he", "uniform"])
def test_weights_start_with_the_scale_of_their_inputs_and_attention_at_zero(name, initialisation):
    model = build_model(config_of(name, widths=(64, 128)), (30,), 100)
    parts = parts_of(ParameterLayout.of(model), initial_parameters(model, 0, initialisation))
    for key, part in parts.items():
        if part.dim() > 1:
            fan_in = part.shape[1]
            variance = 1 / 3 / fan_in if initialisation == "uniform" else (1 if "head" in key else 2) / fan_in
            # At most that of normal values: a sample variance of m has the relative standard error sqrt(2 / m); five.
            assert part.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / part.numel()))
        elif key.endswith("norm.weight"):
            assert torch.equal(part, torch.ones_like(part))
        elif initialisation == "uniform" and key.endswith(("lin_l.bias", "head.bias")):
            assert 0 < part.abs().max() <= parts[key.replace("bias", "weight")].shape[1] ** -0.5
        else:
            assert not part.any(), key


def test_attention_learns_from_its_start_at_zero():
    """att_dst adds the same to all logits of a softmax while the slopes of leaky_relu are equal: its gradient is 0."""
    flat = flat_model(config_of("gat", normalisation="none"))
    flat.load(initial_parameters(flat.model, 0))

    def gradient() -> dict[str, torch.Tensor]:
        flat.flat_gradient.zero_()
        F.cross_entropy(flat(a_graph())[0], LABELS).backward()
        return parts_of(flat.layout, flat.flat_gradient)

    first = gradient()
    for layer in (0, 1):
        assert first[f"features.{layer}.conv.att_src"].abs().max() > 1e-4
        assert first[f"features.{layer}.conv.att_dst"].abs().max() < 1e-7
    torch.optim.SGD([flat.flat], lr=0.5).step()
    second = gradient()
    assert all(second[f"features.{layer}.conv.att_dst"].abs().max() > 1e-4 for layer in (0, 1))


# Masks


def steps(config: ModelConfig, mask: torch.Tensor, theta: torch.Tensor, count: int = 3) -> torch.Tensor:
    flat = flat_model(config)
    weights = KeptWeights(flat, theta * mask, mask)
    optimizer = torch.optim.SGD([weights.latent], lr=0.1)
    for _ in range(count):
        flat.flat_gradient.zero_()
        F.cross_entropy(flat(a_graph())[0], LABELS).backward()
        weights.pull_back()
        optimizer.step()
    return flat.flat.detach().clone()


@architectures
def test_a_mask_of_ones_trains_the_dense_network(name):
    config, theta = CONFIGS[name], random_theta(layout_of(CONFIGS[name]))
    mask = torch.from_numpy(extract(theta.numpy(), layout_of(config), ExtractionConfig(), Fraction(1)))
    assert mask.all()
    plain = build_model(config, SHAPE, CLASSES)
    nn.utils.vector_to_parameters(theta.clone(), plain.parameters())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(a_graph())[0], LABELS).backward()
        optimizer.step()
    expected = nn.utils.parameters_to_vector(plain.parameters())
    torch.testing.assert_close(steps(config, mask, theta), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, theta, atol=1e-3)


@architectures
def test_dropped_weights_change_nothing_and_stay_zero(name):
    config, layout = CONFIGS[name], layout_of(CONFIGS[name])
    theta = random_theta(layout)
    mask = torch.from_numpy(extract(theta.numpy(), layout, ExtractionConfig(), Fraction(1, 4)))
    assert mask.sum() == layout.kept(Fraction(1, 4)) + layout.always_kept_size
    other = torch.where(mask, theta, 9.0)
    trained = steps(config, mask, theta)
    assert torch.equal(trained, steps(config, mask, other))
    assert not trained[~mask].any()
    assert not torch.equal(trained[mask], theta[mask])
    flat = flat_model(config)
    flat.load(other * mask)
    hidden = layers_by_hand(config, parts_of(layout, torch.where(mask, theta, 0.0)), a_graph())[-1]
    torch.testing.assert_close(flat(a_graph())[1], hidden[a_graph().seeds].float(), rtol=1e-4, atol=1e-4)


# Width


@architectures
@pytest.mark.parametrize("normalisation", ["group", "none"])
def test_slim_network_computes_and_learns_what_the_masked_dense_one_does(name, normalisation):
    """A quarter: 4 of 8 and 6 of 12 channels, two whole heads of four and one whole normalisation group of two."""
    config, capacity = config_of(name, normalisation=normalisation), Fraction(1, 4)
    dense, slim = flat_model(config), flat_model(config, (4, 6))
    layout, theta = dense.layout, random_theta(dense.layout)

    def run(shift: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = torch.from_numpy(channel_mask(layout, window(layout, capacity, shift)))
        dense.load(theta * mask)
        slim.load(theta[mask])
        outputs = []
        for model in (dense, slim):
            model.flat_gradient.zero_()
            logits = model(a_graph())[0]
            F.cross_entropy(logits, LABELS).backward()
            outputs.append(logits.detach())
        return *outputs, dense.flat_gradient[mask].clone(), slim.flat_gradient.clone()

    together, apart, dense_gradient, slim_gradient = run(0)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense_gradient, slim_gradient, rtol=1e-4, atol=1e-5)
    # One channel further, half heads and half groups are kept, and are cut anew.
    together, apart, *_ = run(1)
    cut_anew = name == "gat" or normalisation == "group"
    assert torch.allclose(together, apart, rtol=1e-4, atol=1e-5) == (not cut_anew)


def test_heads_of_a_slim_network_are_the_first_ones_of_the_full():
    layout, slim = layout_of(CONFIGS["gat"]), build_model(CONFIGS["gat"], SHAPE, CLASSES, (4, 6))
    theta = random_theta(layout)
    kept = theta[torch.from_numpy(channel_mask(layout, window(layout, Fraction(1, 4))))]
    nn.utils.vector_to_parameters(kept, slim.parameters())
    full = parts_of(layout, theta)
    for layer, (heads, channels) in enumerate([(2, 2), (2, 3)]):
        conv = slim.features[layer].conv
        for vector in ("att_src", "att_dst"):
            expected = full[f"features.{layer}.conv.{vector}"].view(1, 4, channels)[:, :heads]
            assert torch.equal(getattr(conv, vector), expected)


@pytest.mark.parametrize(
    ("kept", "heads", "channels"),
    [(128, 8, 16), (16, 1, 16), (32, 2, 16), (8, 1, 8), (44, 2, 22), (50, 2, 25), (51, 3, 17), (53, 1, 53)],
)
def test_heads_follow_the_channels_that_are_left(kept, heads, channels):
    """128 channels in 8 heads are 16 each; what is no multiple of 16 is cut into equal heads of more, or is one."""
    model = build_model(ModelConfig(name="gat", widths=(128,)), SHAPE, CLASSES, (kept,))
    assert (model.features[0].conv.heads, model.features[0].conv.out_channels) == (heads, channels)


sliced = st.sampled_from(
    [config_of(name, widths=(32, 48), exits=exits, groups=1) for name in CONFIGS for exits in (0, 1)]
)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(config=sliced, sixty_fourths=st.integers(4, 64))
def test_kept_values_are_the_flat_vector_of_the_network_that_the_client_builds(config, sixty_fourths):
    layout, capacity = layout_of(config), Fraction(sixty_fourths, 64)
    selection = window(layout, capacity)
    mask, theta = channel_mask(layout, selection), random_theta(layout)
    assert np.array_equal(selection_of(layout, mask), selection)
    slim = layout_of(config, slim_widths(config.widths, layout, capacity))
    assert [size for size in kept_sizes(layout, selection) if size] == slim.sizes
    held = [part for part, size in zip(layout.split(theta), kept_sizes(layout, selection), strict=True) if size]
    for full, small, slot in zip(held, slim.split(theta[torch.from_numpy(mask)]), slim.slots, strict=True):
        assert torch.equal(full[tuple(slice(length) for length in slot.shape)], small)


# Depth


@architectures
def test_small_clients_end_after_the_first_layer(name):
    """d_1 = n / held(1, 1), and exit 1 is taken where it is nearer sqrt(1 / gamma) than d_2, which is below 1."""
    config = ModelConfig(name=name, widths=(128, 128), exits=0)
    with torch.device("meta"):
        layout = ParameterLayout.of(build_model(config, (100,), CLASSES))
    first, second = (2 * 128 * 100, 2 * 128 * 128) if name == "sage" else (128 * 100, 128 * 128)
    exit_, base = 128 * CLASSES, first + second + 128 * CLASSES
    factors = [base / (first + exit_), base / (first + second + 2 * exit_)]
    for denominator in (64, 16, 4):
        distances = [abs(factor - math.sqrt(denominator)) for factor in factors]
        size = slim_size(layout, Fraction(1, denominator))
        assert size.exits == 2 - (distances[0] < distances[1])
        widths = slim_widths(config.widths, layout, Fraction(1, denominator))
        assert len(widths) == size.exits
        held = sum(
            kept
            for slot, kept in zip(
                layout.slots, kept_sizes(layout, window(layout, Fraction(1, denominator))), strict=True
            )
            if slot.maskable
        )
        assert held == pytest.approx(base / denominator, rel=0.15)
    assert slim_size(layout, Fraction(1, 64)).exits == 1
    assert slim_size(layout, Fraction(1)).exits == 2


@architectures
def test_the_network_that_ends_early_computes_the_exits_of_the_full_one(name):
    config = config_of(name, exits=0)
    full = loaded(config)
    for exits in (1, 2):
        channels = held_channels(full.layout, SlimSize(Fraction(1), exits))
        selection = np.concatenate([np.full(full.layout.hidden[group], count > 0) for group, count in channels.items()])
        slim = flat_model(config, config.widths[:exits])
        slim.load(full.flat.detach()[torch.from_numpy(channel_mask(full.layout, selection))])
        expected = full.all_exits(a_graph())[0]
        torch.testing.assert_close(slim.all_exits(a_graph())[0], expected[:exits])
        torch.testing.assert_close(slim(a_graph())[0], expected[exits - 1])
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)


# Dropout


@architectures
def test_dropout_acts_in_train_mode_alone_on_layers_exits_and_head(name):
    flat, plain = loaded(config_of(name, dropout=0.5, exits=0)), loaded(config_of(name, exits=0))
    for given_, expected in zip(flat.all_exits(a_graph())[0], plain.all_exits(a_graph())[0], strict=True):
        assert torch.equal(given_, expected)
    flat.model.train()
    torch.manual_seed(5)
    exits, features = flat.all_exits(a_graph())
    # The same draws in the same order: first layer, its exit, second layer, head.
    torch.manual_seed(5)
    hidden, network, expected = a_graph(), plain.model, []
    for layer, classifier in zip(network.features[:2], (network.exits["0"], network.head), strict=True):
        hidden = layer(hidden.carrying(F.dropout(hidden.x, 0.5)))
        expected.append(classifier(F.dropout(hidden.at_seeds(), 0.5)))
    assert torch.equal(features, hidden.at_seeds()), "the features that are aligned are whole"
    for given_, wanted in zip(exits, expected, strict=True):
        assert torch.equal(given_, wanted)
    flat.model.eval()
    assert torch.equal(flat(a_graph())[0], plain(a_graph())[0])


# Refusals


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("conv", (7,), r"'conv' reads images .*\(7,\).* choose gcn, sage, gat"),
        ("mlp", (7,), r"'mlp' reads images"),
        ("gcn", (3, 8, 8), r"'gcn' reads nodes .*\(3, 8, 8\).* choose conv, resnet18, mlp"),
    ],
)
def test_shapes_of_another_kind_of_data_are_refused(name, shape, message):
    with pytest.raises(ModelError, match=message):
        build_model(ModelConfig(name=name, widths=(8, 8)), shape, CLASSES)


def test_widths_that_the_heads_do_not_divide_are_refused():
    with pytest.raises(ModelError, match=r"12 channels .* 8 attention heads.*model\.heads"):
        build_model(config_of("gat", heads=8), SHAPE, CLASSES)


@architectures
def test_groups_of_a_single_channel_are_refused(name):
    with pytest.raises(ModelError, match=r"8 channels in 8 groups .*fewer model\.groups"):
        build_model(config_of(name, widths=(8,), groups=8), SHAPE, CLASSES)
    with pytest.raises(ModelError, match=r"1 channels in 1 groups .*larger capacity\.sizes"):
        build_model(config_of(name, widths=(8,)), SHAPE, CLASSES, (1,))
    build_model(config_of(name, widths=(8,), normalisation="none"), SHAPE, CLASSES, (1,))


@architectures
def test_more_exits_than_layers_are_refused(name):
    with pytest.raises(ModelError, match=r"model\.exits=3.*2 stages"):
        build_model(config_of(name, exits=3), SHAPE, CLASSES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.dropout": 0.5}, r"model\.dropout=0\.5 is for graphs.*'conv' reads images; set it to 0"),
        (
            {
                "data.name": "cora",
                "partition.scheme": "metis",
                "model.name": "gcn",
                "model.normalisation": "batch-statistics",
            },
            r"'batch-statistics' is for images.*'gcn' reads a graph.*'group' or 'none'",
        ),
    ],
)
def test_settings_of_another_kind_of_data_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        FrampConfig.from_flat(values)


def test_without_torch_geometric_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(ConfigError, match=r"needs torch_geometric.*pip install 'framp\[graph\]'"):
        build_model(CONFIGS["gat"], SHAPE, CLASSES)


def test_images_need_no_torch_geometric():
    code = (
        "import sys; sys.modules['torch_geometric'] = None\n"
        "from framp_core.config import ModelConfig\n"
        "from framp_core.models import build_model\n"
        "build_model(ModelConfig(), (1, 8, 8), 10)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
