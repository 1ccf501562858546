import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from framp_core.config import ModelConfig
from framp_core.errors import MaskMismatchError, ModelError
from framp_core.layout import ParameterLayout
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.structured import (
    by_group,
    channel_mask,
    held_classes,
    kept_channels,
    kept_sizes,
    selection_of,
    slim_widths,
    window,
    without_other_classes,
)

SHAPE, CLASSES = (3, 8, 8), 5
CONFIGS = {
    "conv": ModelConfig(name="conv", widths=(4, 8), groups=2),
    "resnet18": ModelConfig(name="resnet18", widths=(4, 4, 8, 8), groups=2),
    "mlp": ModelConfig(name="mlp", widths=(6, 4)),
    "conv without norm": ModelConfig(name="conv", widths=(4, 8), normalisation="none"),
    "resnet18 without norm": ModelConfig(name="resnet18", widths=(4, 4, 8, 8), normalisation="none"),
}
architectures = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def layout_of(config: ModelConfig) -> ParameterLayout:
    return ParameterLayout.of(build_model(config, SHAPE, CLASSES))


def widths(config: ModelConfig, capacity: Fraction) -> list[int]:
    return [kept_channels(channels, capacity) for channels in config.widths]


def random_theta(config: ModelConfig) -> torch.Tensor:
    """Norm gains and biases are random as well, so that a channel in the wrong place shows."""
    return torch.from_numpy(np.random.default_rng(0).normal(size=layout_of(config).size).astype(np.float32))


def images() -> torch.Tensor:
    return torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("channels", "capacity", "expected"),
    [(64, "1/64", 8), (64, "1/16", 16), (64, "1/4", 32), (64, "1", 64), (10, "1/4", 5), (5, "1/4", 3), (1, "1/64", 1)],
)
def test_kept_channels_of_known_widths(channels, capacity, expected):
    assert kept_channels(channels, Fraction(capacity)) == expected


@settings(derandomize=True, deadline=None)
@given(channels=st.integers(1, 600), over=st.integers(1, 400), under=st.integers(1, 400))
def test_kept_channels_is_the_least_whole_number_that_reaches_the_width(channels, over, under):
    capacity = Fraction(min(over, under), max(over, under))
    kept = kept_channels(channels, capacity)
    assert 1 <= kept <= channels
    assert kept**2 >= capacity * channels**2 > (kept - 1) ** 2


def test_nested_windows_are_prefixes_and_rolling_ones_wrap():
    layout = layout_of(CONFIGS["conv"])
    nested = by_group(layout, window(layout, Fraction(1, 4)))
    assert [kept.tolist() for kept in nested.values()] == [[True] * 2 + [False] * 2, [True] * 4 + [False] * 4]
    rolled = by_group(layout, window(layout, Fraction(1, 4), shift=7))
    assert [np.flatnonzero(kept).tolist() for kept in rolled.values()] == [[0, 3], [0, 1, 2, 7]]


@architectures
def test_windows_of_smaller_capacities_lie_inside_those_of_larger_ones(config):
    layout = layout_of(config)
    masks = [channel_mask(layout, window(layout, Fraction(size))) for size in ("1/64", "1/16", "1/4", "1")]
    for small, large in pairwise(masks):
        assert not (small & ~large).any()
        assert small.sum() < large.sum()
    assert masks[-1].all()


@architectures
def test_rolling_windows_cover_every_channel_equally_often_in_as_many_rounds_as_channels(config):
    layout = layout_of(config)
    rounds, capacity = math.lcm(*layout.hidden.values()), Fraction(1, 16)
    visits = by_group(layout, sum(window(layout, capacity, shift).astype(int) for shift in range(rounds)))
    for group, channels in layout.hidden.items():
        assert visits[group].tolist() == [rounds * kept_channels(channels, capacity) // channels] * channels
        first = sum(by_group(layout, window(layout, capacity, shift))[group].astype(int) for shift in range(channels))
        assert first.min() >= 1


def test_mask_of_a_conv_net_by_hand():
    """Each tensor is cut with lists of indices, the whole image and all classes kept."""
    layout = layout_of(CONFIGS["conv"])
    first, second = [0, 3], [0, 1, 2, 7]
    kept = {
        "features.0.weight": np.ix_(first, range(3), range(3), range(3)),
        "features.1.weight": np.ix_(first),
        "features.1.bias": np.ix_(first),
        "features.4.weight": np.ix_(second, first, range(3), range(3)),
        "features.5.weight": np.ix_(second),
        "features.5.bias": np.ix_(second),
        "head.weight": np.ix_(range(CLASSES), second),
        "head.bias": np.ix_(range(CLASSES)),
    }
    expected = []
    for slot in layout.slots:
        part = np.zeros(slot.shape, bool)
        part[kept[slot.name]] = True
        expected.append(part.ravel())
    mask = channel_mask(layout, window(layout, Fraction(1, 4), shift=7))
    assert np.array_equal(mask, np.concatenate(expected))


@architectures
@pytest.mark.parametrize("shift", [0, 3])
def test_kept_values_are_the_flat_vector_of_the_slim_network(config, shift):
    """Tensor by tensor, what index lists cut out of the full network has shape and place of the slim network's."""
    capacity = Fraction(1, 4)
    layout, theta = layout_of(config), random_theta(config)
    selection = window(layout, capacity, shift)
    slim = ParameterLayout.of(build_model(config, SHAPE, CLASSES, widths(config, capacity)))
    kept = theta[torch.from_numpy(channel_mask(layout, selection))]
    assert kept.numel() == slim.size < layout.size
    assert [slot.name for slot in slim.slots] == [slot.name for slot in layout.slots]
    assert kept_sizes(layout, selection) == slim.sizes
    lists = {group: np.flatnonzero(channels) for group, channels in by_group(layout, selection).items()}
    for full, small, slot in zip(layout.split(theta), slim.split(kept), layout.slots, strict=True):
        groups = [slot.coupling.rows, slot.coupling.columns][: len(slot.shape)]
        axes = [lists.get(group, np.arange(length)) for group, length in zip(groups, slot.shape, strict=False)]
        axes += [np.arange(length) for length in slot.shape[len(axes) :]]
        assert torch.equal(full[np.ix_(*axes)], small)


@architectures
def test_slim_network_computes_what_the_masked_dense_one_does(config):
    """With whole normalisation groups kept; one channel further, half groups are, and the two differ."""
    capacity = Fraction(1, 4)
    layout, theta, inputs = layout_of(config), random_theta(config), images()
    dense = FlatModel(build_model(config, SHAPE, CLASSES))
    slim = FlatModel(build_model(config, SHAPE, CLASSES, widths(config, capacity)))

    def logits(shift: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.from_numpy(channel_mask(layout, window(layout, capacity, shift)))
        dense.load(theta * mask)
        slim.load(theta[mask])
        return dense(inputs)[0], slim(inputs)[0]

    torch.testing.assert_close(*logits(0), rtol=1e-4, atol=1e-4)
    together, apart = logits(1)
    if config.name == "mlp" or config.normalisation == "none":
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    else:
        assert not torch.allclose(together, apart, rtol=1e-2, atol=1e-2)


def test_width_of_resnet18_leaves_about_the_capacity_of_its_parameters():
    config = ModelConfig(name="resnet18", widths=(64, 128, 256, 512))
    with torch.device("meta"):
        layout = ParameterLayout.of(build_model(config, (3, 32, 32), 10))
    for size in ("1/64", "1/16", "1/4"):
        held = sum(kept_sizes(layout, window(layout, Fraction(size)))) / layout.size
        assert Fraction(size) < held < 1.05 * Fraction(size)


def test_group_norm_cancels_heterofls_scaler():
    """Activations divided by the width come out of GroupNorm as they were, up to eps against their variance."""
    norm = nn.GroupNorm(2, 4)
    activations = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    for width in (1 / 8, 1 / 2):
        torch.testing.assert_close(norm(activations / width), norm(activations), rtol=0, atol=1e-4)
        tiny = activations * 1e-3  # a variance of 1e-6, below eps: there the scaler would show
        assert (norm(tiny / width) - norm(tiny)).abs().max() > 0.1


@architectures
@pytest.mark.parametrize("shift", [0, 5])
def test_selection_is_read_back_from_its_mask(config, shift):
    layout = layout_of(config)
    selection = window(layout, Fraction(1, 16), shift)
    mask = channel_mask(layout, selection)
    assert np.array_equal(selection_of(layout, mask), selection)
    for position in (np.flatnonzero(mask)[-1], np.flatnonzero(~mask)[0]):
        broken = mask.copy()
        broken[position] ^= True
        with pytest.raises(MaskMismatchError, match="whole channels"):
            selection_of(layout, broken)


def test_networks_that_do_not_describe_their_channels_are_refused():
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    for call in (
        lambda: window(layout, Fraction(1, 4)),
        lambda: channel_mask(layout, np.zeros(0, bool)),
        lambda: selection_of(layout, np.ones(layout.size, bool)),
    ):
        with pytest.raises(ModelError, match="couplings"):
            call()


def test_only_head_rows_of_the_held_classes_are_left():
    config = CONFIGS["mlp"]
    layout = layout_of(config)
    mask = channel_mask(layout, window(layout, Fraction(1, 4)))
    before = mask.copy()
    left = without_other_classes(layout, mask, np.array([1, 4]))
    assert np.array_equal(mask, before)
    kept = [[True, True, False, False] if label in (1, 4) else [False] * 4 for label in range(CLASSES)]
    weight, bias = layout.slots[-2:]
    assert left[weight.slice].reshape(weight.shape).tolist() == kept
    assert left[bias.slice].tolist() == [False, True, False, False, True]
    assert np.array_equal(left[: weight.offset], mask[: weight.offset])


def test_held_classes_are_prototypes_without_features():
    held = held_classes(np.array([0, 3, 0, 1]))
    assert held.classes.tolist() == [1, 3]
    assert held.counts.tolist() == [3, 1]
    assert held.means.shape == (2, 0)


def test_a_slim_network_trains_as_the_masked_dense_one_where_there_is_no_norm():
    """The slim gradient is that of the dense network at the kept positions."""
    config, capacity = CONFIGS["mlp"], Fraction(1, 4)
    layout = layout_of(config)
    mask = torch.from_numpy(channel_mask(layout, window(layout, capacity, 1)))
    theta = initial_parameters(build_model(config, SHAPE, CLASSES), 0)
    gradients = []
    for model, start in (
        (FlatModel(build_model(config, SHAPE, CLASSES)), theta * mask),
        (FlatModel(build_model(config, SHAPE, CLASSES, widths(config, capacity))), theta[mask]),
    ):
        model.load(start)
        nn.functional.cross_entropy(model(images())[0], torch.arange(6) % CLASSES).backward()
        gradients.append(model.flat_gradient)
    torch.testing.assert_close(gradients[0][mask], gradients[1], rtol=1e-4, atol=1e-6)
    assert gradients[1].abs().max() > 0


@pytest.mark.parametrize("capacity", [Fraction(1, 64), Fraction(1, 16), Fraction(1, 4), Fraction(9, 10)])
def test_a_width_by_budget_holds_what_is_nearest_the_capacity(capacity):
    config = ModelConfig(name="mlp", widths=(32, 32), slim_width="budget")
    layout = ParameterLayout.of(build_model(config, (1, 20, 20), CLASSES))

    def held(first, second):
        return 400 * first + first * second + second * CLASSES

    budget = capacity * layout.maskable_size
    nearest = min(range(1, 33), key=lambda width: (abs(held(width, width) - budget), width))
    kept = slim_widths(config.widths, layout, capacity)
    assert kept == (nearest, nearest)
    assert channel_mask(layout, window(layout, capacity))[layout.maskable].sum() == held(*kept)
    # The published widths hold more, and the whole network is whole under both rules.
    published = ParameterLayout.of(build_model(config.model_copy(update={"slim_width": "root"}), (1, 20, 20), CLASSES))
    assert channel_mask(published, window(published, capacity))[layout.maskable].sum() >= held(*kept)
    assert window(layout, Fraction(1)).all()
