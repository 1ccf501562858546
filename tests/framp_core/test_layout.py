import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from framp_core.config import ModelConfig
from framp_core.layout import CLASSES, INPUT, Coupling, ParameterLayout
from framp_core.models import build_model


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 5))


def test_slots_against_a_table_by_hand():
    layout = ParameterLayout.of(small_network())
    rows = [(s.name, s.shape, s.fan_in, s.maskable, s.offset) for s in layout.slots]
    assert rows == [
        ("0.weight", (4, 3, 3, 3), 3 * 3 * 3, True, 0),
        ("1.weight", (4,), 1, False, 108),
        ("1.bias", (4,), 1, False, 112),
        ("3.weight", (5, 16), 16, True, 116),
        ("3.bias", (5,), 1, False, 196),
    ]
    assert (layout.size, layout.maskable_size, layout.always_kept_size) == (201, 108 + 80, 4 + 4 + 5)


def test_vectors_repeat_the_slot_of_each_element():
    layout = ParameterLayout.of(small_network())
    expected_fan_in = [27] * 108 + [1] * 8 + [16] * 80 + [1] * 5
    expected_maskable = [True] * 108 + [False] * 8 + [True] * 80 + [False] * 5
    assert layout.fan_in.tolist() == expected_fan_in
    assert layout.maskable.tolist() == expected_maskable


def test_grouped_convolution_counts_the_inputs_of_its_group():
    layout = ParameterLayout.of(nn.Conv2d(8, 8, 3, groups=8))
    assert [(slot.name, slot.fan_in) for slot in layout.slots] == [("weight", 9), ("bias", 1)]


IMAGE_NETWORKS = [
    ModelConfig(widths=(8, 16), exits=0),
    ModelConfig(name="resnet18", widths=(8, 8, 16, 16), maskable_head_bias=True),
    ModelConfig(name="resnet18", widths=(8, 8, 16, 16), normalisation="batch-statistics", exits=2),
    ModelConfig(name="mlp", widths=(7, 6), exits=0),
]


@pytest.mark.parametrize("config", IMAGE_NETWORKS, ids=lambda config: config.name)
def test_maskable_are_the_weights_of_convolutions_and_linear_layers(config):
    """By the layers' types, and every shape as PyTorch has it: images know no other always-kept ones than vectors."""
    model = build_model(config, (3, 8, 8), 5)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    maskable = {f"{name}.weight" for name in layers} | ({"head.bias"} if config.maskable_head_bias else set())
    offset = 0
    for slot, (name, parameter) in zip(ParameterLayout.of(model).slots, model.named_parameters(), strict=True):
        fan_in = parameter[0].numel() if name in maskable else 1
        expected = (name, tuple(parameter.shape), fan_in, name in maskable, offset)
        assert (slot.name, slot.shape, slot.fan_in, slot.maskable, slot.offset) == expected
        offset += parameter.numel()


def test_what_is_always_kept_is_a_vector_over_its_channels():
    model = nn.Linear(3, 6)
    model.attention = nn.Parameter(torch.zeros(1, 2, 3))
    slots = ParameterLayout.of(model).slots
    assert {slot.name: (slot.shape, slot.fan_in, slot.maskable) for slot in slots} == {
        "weight": ((6, 3), 3, True),
        "bias": ((6,), 1, False),
        "attention": ((6,), 1, False),
    }


@settings(derandomize=True, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    leading=st.lists(st.integers(0, 3), max_size=2),
)
def test_split_takes_the_slices(widths, leading):
    layers = [nn.Linear(narrow, wide) for narrow, wide in pairwise(widths)]
    layout = ParameterLayout.of(nn.Sequential(*layers))
    flat = torch.arange(math.prod(leading) * layout.size, dtype=torch.float32).reshape(*leading, layout.size)
    parts = layout.split(flat)
    for part, slot in zip(parts, layout.slots, strict=True):
        assert torch.equal(part, flat[..., slot.slice].reshape(*leading, *slot.shape))


def test_split_follows_the_order_of_the_parameters():
    model = small_network()
    parts = ParameterLayout.of(model).split(nn.utils.parameters_to_vector(model.parameters()))
    for part, parameter in zip(parts, model.parameters(), strict=True):
        assert torch.equal(part, parameter)


def test_copies_of_a_network_share_its_layout():
    network = small_network()
    network.layout = ParameterLayout.of(network)
    copied = copy.deepcopy(network)
    assert copied.layout is network.layout
    assert copied[0].weight is not network[0].weight


@settings(derandomize=True, deadline=None)
@given(numerator=st.integers(1, 64))
def test_kept_is_the_floor(numerator):
    layout = ParameterLayout.of(small_network())
    assert layout.kept(numerator / 64) == (numerator * 188) // 64


def test_couplings_of_a_network_by_hand():
    model = small_network()
    assert ParameterLayout.of(model).hidden == {}
    model.couplings = {"0": Coupling("stem"), "1": Coupling("stem"), "3": Coupling(CLASSES, "stem")}
    layout = ParameterLayout.of(model)
    assert [slot.coupling for slot in layout.slots] == [
        Coupling("stem", INPUT),
        Coupling("stem"),
        Coupling("stem"),
        Coupling(CLASSES, "stem"),
        Coupling(CLASSES, "stem"),
    ]
    assert layout.hidden == {"stem": 4}
    assert layout.hidden_size == 4
