"""Networks with early exits: what they compute, how a capacity cuts them, how they travel."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters

from framp_core.codec import decode_slim, decode_update, encode_slim, encode_update
from framp_core.config import FrampConfig, ModelConfig
from framp_core.errors import ConfigError, MaskMismatchError, ModelError
from framp_core.layout import ParameterLayout
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.structured import (
    SlimSize,
    channel_mask,
    held_channels,
    held_classes,
    kept_channels,
    kept_sizes,
    selection_of,
    slim_size,
    slim_widths,
    window,
)

SHAPE, CLASSES = (3, 8, 8), 5
CONFIGS = {
    "conv": ModelConfig(name="conv", widths=(8, 16, 16), groups=4, exits=0),
    "conv, two exits": ModelConfig(name="conv", widths=(8, 16, 16), groups=4, exits=2),
    "resnet18": ModelConfig(name="resnet18", widths=(8, 8, 16, 16), groups=4, exits=0),
    "mlp": ModelConfig(name="mlp", widths=(16, 16, 8), exits=0),
}
architectures = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
capacities = st.builds(Fraction, st.integers(1, 300), st.just(300))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def layout_of(
    config: ModelConfig, kept: tuple[int, ...] | None = None, shape=SHAPE, classes=CLASSES
) -> ParameterLayout:
    with torch.device("meta"):
        return ParameterLayout.of(build_model(config, shape, classes, kept))


def random_theta(layout: ParameterLayout) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=layout.size).astype(np.float32))


def images() -> torch.Tensor:
    return torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))


# The network


@architectures
def test_exits_read_the_last_stages_and_the_head_is_the_deepest(config):
    flat = FlatModel(build_model(config, SHAPE, CLASSES))
    flat.load(random_theta(flat.layout))
    exits, features = flat.all_exits(images())
    logits, penultimate = flat(images())
    count = config.exits or len(config.widths)
    assert [tuple(exit_.shape) for exit_ in exits] == [(6, CLASSES)] * count == [(6, CLASSES)] * len(flat.layout.exits)
    assert torch.equal(exits[-1], logits)
    assert torch.equal(features, penultimate)
    heads = [slot.shape for slot in flat.layout.slots if slot.name.startswith(("exits.", "head."))]
    assert heads == [shape for width in config.widths[-count:] for shape in ((CLASSES, width), (CLASSES,))]


def test_early_exits_of_a_conv_net_by_hand():
    """Convolution, norm, ReLU; the exit averages that over the image, the next stage halves it first."""
    model = build_model(CONFIGS["conv"], SHAPE, CLASSES)
    vector_to_parameters(random_theta(ParameterLayout.of(model)), model.parameters())
    parameters = list(model.parameters())
    stages, heads, hidden = parameters[:9], parameters[9:], images()
    for stage, logits in enumerate(model.all_exits(images())[0]):
        convolution, gain, bias = stages[3 * stage : 3 * stage + 3]
        weight, offset = heads[2 * stage : 2 * stage + 2]
        hidden = F.relu(F.group_norm(F.conv2d(hidden, convolution, padding=1), 4, gain, bias))
        torch.testing.assert_close(logits, hidden.mean(dim=(2, 3)) @ weight.T + offset)
        hidden = F.max_pool2d(hidden, 2)


@pytest.mark.parametrize("name", ["conv", "resnet18", "mlp"])
def test_exits_change_nothing_before_the_head(name):
    """Weights, features and logits of a network with one exit are those of any other method's."""
    plain, wide = replace_exits(CONFIGS[name], 1), CONFIGS[name]
    assert plain.exits == ModelConfig().exits
    model, with_exits = build_model(plain, SHAPE, CLASSES), build_model(wide, SHAPE, CLASSES)
    values = {slot.name: part for slot, part in parts_of(model)}
    assert not any(name.startswith("exits.") for name in values)
    for slot, part in parts_of(with_exits):
        if slot.name.startswith("features."):
            assert torch.equal(part, values[slot.name])
    vector_to_parameters(initial_parameters(model, 0), model.parameters())
    exits, features = model.all_exits(images())
    assert len(exits) == 1
    assert torch.equal(exits[0], model(images())[0])
    assert torch.equal(features, model(images())[1])


def replace_exits(config: ModelConfig, exits: int) -> ModelConfig:
    return config.model_copy(update={"exits": exits})


def parts_of(model):
    layout = ParameterLayout.of(model)
    return zip(layout.slots, layout.split(initial_parameters(model, 0)), strict=True)


def test_early_exits_start_with_the_scale_of_a_head():
    config = ModelConfig(widths=(64, 64), exits=0)
    exits = {slot.name: part for slot, part in parts_of(build_model(config, SHAPE, 200)) if "exits" in slot.name}
    weight, bias = exits.values()
    assert weight.var().item() == pytest.approx(1 / 64, rel=5 * math.sqrt(2 / weight.numel()))
    assert not bias.any()


@pytest.mark.parametrize(
    ("name", "widths", "exits"), [("conv", (8, 16), 3), ("mlp", (6,), 2), ("resnet18", (8,) * 4, 5)]
)
def test_more_exits_than_stages_are_refused(name, widths, exits):
    config = ModelConfig(name=name, widths=widths, exits=exits)
    with pytest.raises(ModelError, match=rf"model\.exits={exits}.*{len(widths)} stages; choose 1 .* or 0"):
        build_model(config, SHAPE, CLASSES)
    build_model(replace_exits(config, len(widths)), SHAPE, CLASSES)


@pytest.mark.parametrize(("key", "value"), [("model.exits", -1), ("local.distillation-weight", -0.1)])
def test_negative_settings_are_refused(key, value):
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        FrampConfig.from_flat({key: value})


# Which groups an exit needs


def test_groups_of_each_exit():
    conv = layout_of(CONFIGS["conv"]).exits
    assert conv == [{"features.0"}, {"features.0", "features.4"}, {"features.0", "features.4", "features.8"}]
    assert layout_of(CONFIGS["conv, two exits"]).exits == conv[1:]
    assert layout_of(replace_exits(CONFIGS["conv"], 1)).exits == conv[2:]
    stem, *later = layout_of(CONFIGS["resnet18"]).exits
    assert stem == {"features.0", "features.3.hidden", "features.4.hidden"}
    for (smaller, larger), block in zip(pairwise([stem, *later]), (5, 7, 9), strict=True):
        assert larger - smaller == {
            f"features.{block}.hidden",
            f"features.{block}.output",
            f"features.{block + 1}.hidden",
        }
        assert smaller < larger


# Size by capacity


def weights_held(layout: ParameterLayout, selection: np.ndarray) -> int:
    sizes = zip(layout.slots, kept_sizes(layout, selection), strict=True)
    return sum(held for slot, held in sizes if slot.maskable)


def weights_by_loops(config: ModelConfig, widths: list[int]) -> int:
    """Weights of a slim conv net or MLP with an exit after each of the stages that have one."""
    first, kernel = (SHAPE[0], 9) if config.name == "conv" else (math.prod(SHAPE), 1)
    body = sum(kernel * narrow * wide for narrow, wide in pairwise([first, *widths]))
    return body + sum(CLASSES * wide for wide in widths[len(config.widths) - (config.exits or len(config.widths)) :])


def size_by_loops(config: ModelConfig, capacity: Fraction) -> tuple[int, Fraction]:
    """Exit and width, every pair looked at; sizes from formulas of the architecture."""
    full, exits = list(config.widths), config.exits or len(config.widths)
    before = len(full) - exits  # stages before the first that has an exit
    base = weights_by_loops(replace_exits(config, 1), full)
    factors = {depth: base / weights_by_loops(config, full[: before + depth]) for depth in range(1, exits + 1)}
    distance = {depth: abs(factor - math.sqrt(1 / capacity)) for depth, factor in factors.items()}
    depth = max(depth for depth in factors if distance[depth] == min(distance.values()))
    best = None
    for steps in range(1, 33):
        widths = [math.ceil(Fraction(steps, 32) * channels) for channels in full[: before + depth]]
        off = abs(weights_by_loops(config, widths) - capacity * base)
        if best is None or off < best[0]:
            best = off, Fraction(steps, 32)
    return depth, best[1]


@settings(derandomize=True, deadline=None)
@given(config=st.sampled_from([CONFIGS["conv"], CONFIGS["conv, two exits"], CONFIGS["mlp"]]), capacity=capacities)
def test_size_is_that_of_a_search_by_loops(config, capacity):
    size = slim_size(layout_of(config), capacity)
    if capacity == 1:
        assert size == SlimSize(Fraction(1), config.exits or 3)
    else:
        depth, width = size_by_loops(config, capacity)
        expected = [math.ceil(width * channels) for channels in config.widths]
        found = [kept_channels(channels, size.squared_width) for channels in config.widths]
        assert (size.exits, found) == (depth, expected)


@settings(derandomize=True, deadline=None)
@given(config=st.sampled_from(list(CONFIGS.values())), first=capacities, second=capacities)
def test_larger_capacities_get_deeper_and_at_one_depth_wider_networks(config, first, second):
    layout = layout_of(config)
    small, large = (slim_size(layout, capacity) for capacity in sorted((first, second)))
    assert small.exits <= large.exits
    if small.exits == large.exits:
        assert small.squared_width <= large.squared_width
        masks = [channel_mask(layout, window(layout, capacity)) for capacity in sorted((first, second))]
        assert not (masks[0] & ~masks[1]).any()


PRESETS = {
    "digits": (ModelConfig(widths=(16, 32, 64), exits=0), (1, 8, 8), 10),
    "cifar10-small": (ModelConfig(widths=(32, 64, 96, 96), exits=0), (3, 32, 32), 10),
    "paper-cifar10": (ModelConfig(name="resnet18", widths=(64, 128, 256, 512), exits=0), (3, 32, 32), 10),
    "paper-cifar100": (ModelConfig(name="resnet18", widths=(64, 128, 256, 512), exits=0), (3, 32, 32), 100),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("capacity", ["1/64", "1/16", "1/4", "1/2", "1"])
def test_networks_of_the_presets_meet_their_budgets(preset, capacity):
    """Within 8 % of the budget, which counts no early exits; at capacity 1 these come on top of it."""
    config, shape, classes = PRESETS[preset]
    layout = layout_of(config, None, shape, classes)
    base = layout_of(replace_exits(config, 1), None, shape, classes).maskable_size
    held = weights_held(layout, window(layout, Fraction(capacity)))
    assert abs(held / (Fraction(capacity) * base) - 1) < Fraction(8, 100)


def test_small_clients_are_thinner_and_shallower():
    """Exits 2, 3, 3, 4 of the conv net; ResNet-18's stages grow fourfold, so that each pair of sizes shares an exit."""
    sizes = [Fraction(1, 64), Fraction(1, 16), Fraction(1, 4), Fraction(1)]
    for preset, exits, widths in (
        ("cifar10-small", [2, 3, 3, 4], [(10, 20), (11, 22, 33), (23, 46, 69), (32, 64, 96, 96)]),
        ("paper-cifar10", [3, 3, 4, 4], [(16, 32, 64), (32, 64, 128), (32, 64, 128, 256), (64, 128, 256, 512)]),
    ):
        config, shape, classes = PRESETS[preset]
        layout = layout_of(config, None, shape, classes)
        assert [slim_size(layout, capacity).exits for capacity in sizes] == exits
        assert [slim_widths(config.widths, layout, capacity) for capacity in sizes] == widths


@settings(derandomize=True, deadline=None)
@given(config=st.sampled_from(list(CONFIGS.values())), capacity=capacities)
def test_with_one_exit_the_size_is_heterofls(config, capacity):
    layout = layout_of(replace_exits(config, 1))
    assert slim_size(layout, capacity) == SlimSize(capacity, 1)
    assert held_channels(layout, slim_size(layout, capacity)) == {
        group: kept_channels(channels, capacity) for group, channels in layout.hidden.items()
    }


# Extraction


def test_mask_of_a_conv_net_that_ends_early_by_hand():
    """The first two stages at 3/8 of their width, exits 1 and 2; nothing of stage 3, nor its head's bias."""
    layout = layout_of(CONFIGS["conv"])
    first, second, classes, nothing = range(3), range(6), range(CLASSES), []
    kept = {
        "features.0.weight": np.ix_(first, range(3), range(3), range(3)),
        "features.1.weight": np.ix_(first),
        "features.1.bias": np.ix_(first),
        "features.4.weight": np.ix_(second, first, range(3), range(3)),
        "features.5.weight": np.ix_(second),
        "features.5.bias": np.ix_(second),
        "features.8.weight": nothing,
        "features.9.weight": nothing,
        "features.9.bias": nothing,
        "exits.2.weight": np.ix_(classes, first),
        "exits.2.bias": np.ix_(classes),
        "exits.6.weight": np.ix_(classes, second),
        "exits.6.bias": np.ix_(classes),
        "head.weight": nothing,
        "head.bias": nothing,
    }
    expected = []
    for slot in layout.slots:
        part = np.zeros(slot.shape, bool)
        part[kept[slot.name]] = True
        expected.append(part.ravel())
    channels = held_channels(layout, SlimSize(Fraction(3, 8) ** 2, 2))
    selection = np.concatenate([np.arange(layout.hidden[group]) < count for group, count in channels.items()])
    mask = channel_mask(layout, selection)
    assert np.array_equal(mask, np.concatenate(expected))
    assert np.array_equal(selection_of(layout, mask), selection)


def test_biases_of_absent_layers_are_dropped():
    layout = layout_of(CONFIGS["mlp"])
    channels = held_channels(layout, SlimSize(Fraction(1), 1))
    selection = np.concatenate([np.arange(layout.hidden[group]) < count for group, count in channels.items()])
    held = {slot.name: size for slot, size in zip(layout.slots, kept_sizes(layout, selection), strict=True) if size}
    assert held == {
        "features.1.weight": 16 * 192,
        "features.1.bias": 16,
        "exits.2.weight": CLASSES * 16,
        "exits.2.bias": CLASSES,
    }


@settings(derandomize=True, deadline=None, max_examples=40)
@given(config=st.sampled_from(list(CONFIGS.values())), capacity=capacities)
def test_kept_values_are_the_flat_vector_of_the_network_that_the_client_builds(config, capacity):
    """Tensor by tensor of the same shape: leading corners of those tensors of the full network that are held."""
    layout = layout_of(config)
    selection = window(layout, capacity)
    slim = layout_of(config, slim_widths(config.widths, layout, capacity))
    theta = random_theta(layout)
    kept = theta[torch.from_numpy(channel_mask(layout, selection))]
    assert [size for size in kept_sizes(layout, selection) if size] == slim.sizes
    held = [part for part, size in zip(layout.split(theta), kept_sizes(layout, selection), strict=True) if size]
    for full, small, slot in zip(held, slim.split(kept), slim.slots, strict=True):
        assert torch.equal(full[tuple(slice(length) for length in slot.shape)], small)


@pytest.mark.parametrize("name", ["conv", "resnet18", "mlp"])
def test_the_network_that_ends_early_computes_the_exits_of_the_full_one(name):
    """At full width: what it holds are stages and exits of the full network, unchanged."""
    config = CONFIGS[name]
    full = FlatModel(build_model(config, SHAPE, CLASSES))
    theta = random_theta(full.layout)
    full.load(theta)
    for exits in range(1, len(config.widths) + 1):
        channels = held_channels(full.layout, SlimSize(Fraction(1), exits))
        selection = np.concatenate([np.full(full.layout.hidden[group], count > 0) for group, count in channels.items()])
        slim = FlatModel(build_model(config, SHAPE, CLASSES, config.widths[:exits]))
        slim.load(theta[torch.from_numpy(channel_mask(full.layout, selection))])
        for given_, expected in zip(slim.all_exits(images())[0], full.all_exits(images())[0], strict=False):
            torch.testing.assert_close(given_, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slim(images())[0], full.all_exits(images())[0][exits - 1], rtol=1e-5, atol=1e-5)
        assert (exits == len(config.widths)) == torch.allclose(slim(images())[0], full(images())[0], atol=1e-3)


# Messages


@pytest.mark.parametrize("value_format", ["float32", "bfloat16", "int8"])
@architectures
def test_a_network_that_ends_early_travels_both_ways(config, value_format):
    """Down with the full layout; up with the client's, which lacks the tensors of later stages altogether."""
    layout, capacity = layout_of(config), Fraction(1, 32)
    assert slim_size(layout, capacity).exits < len(layout.exits)
    selection = window(layout, capacity)
    mask = channel_mask(layout, selection)
    values = random_theta(layout).numpy()[mask]
    down = decode_slim(encode_slim(values, mask, layout, value_format).blob, layout, capacity)
    assert np.array_equal(down.selection, selection)
    slim = layout_of(config, slim_widths(config.widths, layout, capacity))
    held = held_classes(np.array([0, 7, 0, 1, 0]))
    up = encode_update(values, held, slim, np.ones(slim.size, bool), value_format)
    received = decode_update(up.blob, layout, mask, CLASSES, feature_size=0).delta_kept
    np.testing.assert_array_equal(received, down.values)
    np.testing.assert_allclose(received, values, rtol=0, atol=np.abs(values).max() / 100)


def test_networks_of_another_depth_are_refused():
    layout = layout_of(CONFIGS["conv"])
    small, large = Fraction(1, 32), Fraction(3, 4)
    assert slim_size(layout, small).exits < slim_size(layout, large).exits
    for sent, held in ((small, large), (large, small)):
        mask = channel_mask(layout, window(layout, sent))
        blob = encode_slim(np.zeros(mask.sum(), np.float32), mask, layout, "float32").blob
        with pytest.raises(MaskMismatchError, match=r"channels of features\..* a client of capacity .* holds"):
            decode_slim(blob, layout, held)
