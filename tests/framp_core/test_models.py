import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from framp_core.config import ModelConfig
from framp_core.errors import ModelError
from framp_core.layout import CLASSES, INPUT, ParameterLayout
from framp_core.models import FlatModel, build_model, initial_parameters, slim_groups

RESNET18 = ModelConfig(name="resnet18", widths=(64, 128, 256, 512))
TINY = {
    "conv": ModelConfig(name="conv", widths=(4, 6), groups=2),
    "mlp": ModelConfig(name="mlp", widths=(7, 6)),
    "resnet18": ModelConfig(name="resnet18", widths=(4, 4, 6, 6), groups=2),
}


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_resnet18_has_the_published_number_of_parameters():
    layout = ParameterLayout.of(build_model(RESNET18, (3, 32, 32), 10))
    # FIARSE ranks the head's bias as well: 11,164,352 maskable here and its 10 make 11,164,362 there.
    assert (layout.size, layout.maskable_size) == (11_173_962, 11_164_352)


def test_conv_net_has_the_published_number_of_parameters():
    widths = (32, 64, 96, 96)
    model = build_model(ModelConfig(widths=widths), (3, 16, 16), 10)
    convolutions = 9 * (3 * 32 + 32 * 64 + 64 * 96 + 96 * 96)
    assert ParameterLayout.of(model).size == convolutions + 2 * sum(widths) + 96 * 10 + 10 == 159_082


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_forward_returns_logits_and_the_features_they_come_from(config):
    model = build_model(config, (3, 8, 8), 5)
    logits, features = model(images(2, 3, 8, 8))
    assert logits.shape == (2, 5)
    assert features.shape == (2, model.feature_size) == (2, config.widths[-1])
    assert torch.allclose(logits, model.head(features))


def test_conv_net_takes_images_down_to_one_pixel():
    model = build_model(ModelConfig(widths=(4, 4, 4, 4), groups=1), (1, 1, 1), 3)
    assert model(images(2, 1, 1, 1))[0].shape == (2, 3)


@pytest.mark.parametrize("name", ["conv", "resnet18"])
def test_widths_that_the_groups_do_not_divide_are_refused(name):
    config = ModelConfig(name=name, widths=(8, 8, 12, 8), groups=8)
    with pytest.raises(ModelError, match=r"12 channels .* 8 normalisation groups.*model\.groups"):
        build_model(config, (3, 8, 8), 5)


def test_resnet18_needs_four_widths():
    with pytest.raises(ModelError, match="four stages"):
        build_model(ModelConfig(name="resnet18", widths=(8, 8)), (3, 8, 8), 5)


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_flat_gradient_equals_ordinary_autograd(config):
    model = build_model(config, (3, 8, 8), 5)
    layout = ParameterLayout.of(model)
    theta = initial_parameters(model, 0)
    inputs, labels = images(6, 3, 8, 8), torch.arange(6) % 5

    parameters = {
        slot.name: part.requires_grad_() for slot, part in zip(layout.slots, layout.split(theta), strict=True)
    }
    logits, _ = torch.func.functional_call(model, parameters, (inputs,))
    expected = torch.autograd.grad(F.cross_entropy(logits, labels), list(parameters.values()))

    flat = FlatModel(model)
    flat.load(theta.detach())
    F.cross_entropy(flat(inputs)[0], labels).backward()
    assert torch.allclose(flat.flat_gradient, parameters_to_vector(expected), atol=1e-6)
    assert flat.flat_gradient.abs().sum() > 0


def test_an_optimizer_on_the_flat_vector_trains_the_network():
    flat = FlatModel(build_model(TINY["mlp"], (1, 2, 2), 3))
    flat.load(initial_parameters(flat.model, 0))
    before = flat.flat.detach().clone()
    inputs = torch.ones(1, 1, 2, 2)
    flat(inputs)[0][0, 0].backward()
    gradient = flat.flat_gradient.clone()
    torch.optim.SGD([flat.flat], lr=0.5).step()
    expected = before - 0.5 * gradient
    assert torch.allclose(flat.flat, expected)
    assert torch.equal(parameters_to_vector(flat.model.parameters()), flat.flat)


def test_flat_gradient_accumulates_until_zeroed():
    flat = FlatModel(build_model(TINY["mlp"], (1, 2, 2), 3))
    flat.load(initial_parameters(flat.model, 0))
    inputs = torch.ones(1, 1, 2, 2)
    flat(inputs)[0].sum().backward()
    once = flat.flat_gradient.clone()
    flat(inputs)[0].sum().backward()
    assert torch.allclose(flat.flat_gradient, 2 * once)


def test_initial_parameters_depend_on_the_seed_alone():
    torch.manual_seed(1)
    model = build_model(TINY["conv"], (3, 8, 8), 5)
    before = torch.get_rng_state()
    first = initial_parameters(model, 3)
    assert torch.equal(before, torch.get_rng_state()), "the global random state must be left alone"
    torch.manual_seed(2)
    assert torch.equal(first, initial_parameters(build_model(TINY["conv"], (3, 8, 8), 5), 3))
    assert not torch.equal(first, initial_parameters(model, 4))


def test_initial_parameters_have_the_stated_scale():
    model = build_model(ModelConfig(widths=(32, 64), groups=8), (3, 8, 8), 100)
    layout = ParameterLayout.of(model)
    parts = dict(zip((slot.name for slot in layout.slots), layout.split(initial_parameters(model, 0)), strict=True))
    for name, variance in {
        "features.0.weight": 2 / 27,
        "features.4.weight": 2 / (32 * 9),
        "head.weight": 1 / 64,
    }.items():
        # The relative standard error of a sample variance of m normal values is sqrt(2 / m); five of them.
        tolerance = 5 * math.sqrt(2 / parts[name].numel())
        assert parts[name].var().item() == pytest.approx(variance, rel=tolerance)
        assert abs(parts[name].mean().item()) < 5 * math.sqrt(variance / parts[name].numel())
    assert torch.equal(parts["features.1.weight"], torch.ones(32))
    assert torch.equal(parts["features.1.bias"], torch.zeros(32))
    assert torch.equal(parts["head.bias"], torch.zeros(100))


def test_every_normalisation_is_group_norm():
    norms = [
        layer for layer in build_model(TINY["resnet18"], (3, 8, 8), 5).modules() if isinstance(layer, nn.GroupNorm)
    ]
    assert len(norms) == 1 + 8 * 2 + 3


@pytest.mark.parametrize("name", ["conv", "resnet18"])
def test_without_normalisation_the_convolutions_stay_where_they_are(name):
    """It computes what the grouped network does once its norms let everything through."""
    grouped, plain = (
        build_model(TINY[name].model_copy(update={"normalisation": each}), (3, 8, 8), 5) for each in ("group", "none")
    )
    assert not any(isinstance(layer, nn.GroupNorm) for layer in plain.modules())
    slots = {slot.name: slot for slot in ParameterLayout.of(grouped).slots}
    for slot in ParameterLayout.of(plain).slots:
        assert (slot.shape, slot.coupling, slot.maskable) == (
            slots[slot.name].shape,
            slots[slot.name].coupling,
            slots[slot.name].maskable,
        )
    assert {slot.name for slot in ParameterLayout.of(plain).slots} == {
        name for name, slot in slots.items() if slot.maskable or name == "head.bias"
    }
    for module in grouped.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda inputs: inputs
    plain.load_state_dict(grouped.state_dict(), strict=False)
    assert torch.equal(plain(images(2, 3, 8, 8))[0], grouped(images(2, 3, 8, 8))[0])


def test_flat_models_are_in_eval_mode():
    assert not any(layer.training for layer in FlatModel(build_model(TINY["resnet18"], (3, 8, 8), 5)).model.modules())


def couplings(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Groups of rows and columns of every weight of more than one dimension."""
    slots = ParameterLayout.of(build_model(config, (3, 8, 8), 5)).slots
    return {
        slot.name.removesuffix(".weight"): (slot.coupling.rows, slot.coupling.columns)
        for slot in slots
        if len(slot.shape) > 1
    }


def test_couplings_of_conv_and_mlp_are_chains():
    assert couplings(TINY["conv"]) == {
        "features.0": ("features.0", INPUT),
        "features.4": ("features.4", "features.0"),
        "head": (CLASSES, "features.4"),
    }
    assert couplings(TINY["mlp"]) == {
        "features.1": ("features.1", INPUT),
        "features.3": ("features.3", "features.1"),
        "head": (CLASSES, "features.3"),
    }


def test_identity_shortcuts_of_resnet18_tie_the_blocks_of_a_stage():
    """Stem and both blocks of stage 1 write one sum; every later stage opens one with its 1x1 shortcut."""
    found, stem = couplings(TINY["resnet18"]), "features.0"
    stages = [stem, "features.5.output", "features.7.output", "features.9.output"]
    for number, block in enumerate(range(3, 11)):
        path, output = f"features.{block}", stages[number // 2]
        inputs = stages[(number - 1) // 2] if number else stem
        assert found.pop(f"{path}.conv1") == (f"{path}.hidden", inputs)
        assert found.pop(f"{path}.conv2") == (output, f"{path}.hidden")
        if number % 2 == 0 and number:
            assert found.pop(f"{path}.shortcut.0") == (output, inputs)
    assert found == {stem: (stem, INPUT), "head": (CLASSES, stages[-1])}


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_every_parameter_is_coupled_to_groups_of_its_size(config):
    layout = ParameterLayout.of(build_model(config, (3, 8, 8), 5))
    sizes = {**layout.hidden, CLASSES: 5, INPUT: 3 * 8 * 8 if config.name == "mlp" else 3}
    for slot in layout.slots:
        groups = (slot.coupling.rows, slot.coupling.columns)[: len(slot.shape)]
        assert [sizes[group] for group in groups] == list(slot.shape[:2])


@pytest.mark.parametrize(
    ("channels", "kept", "groups", "expected"),
    [
        (16, 16, 8, 8),
        (16, 4, 8, 2),
        (16, 2, 8, 1),
        (64, 8, 8, 1),
        (64, 4, 8, 1),
        (12, 9, 4, 3),
        (12, 7, 4, 1),
        (6, 4, 6, 4),
    ],
)
def test_slim_groups_keep_the_channels_per_group_where_they_can(channels, kept, groups, expected):
    """12 in 4 groups are 3 each: 9 make 3 groups; of 7, two groups would be uneven, so 1."""
    assert slim_groups(channels, kept, groups) == expected


def test_slim_networks_have_the_widths_that_are_left():
    model = build_model(TINY["resnet18"], (3, 8, 8), 5, (2, 2, 3, 3))
    norms = [(layer.num_channels, layer.num_groups) for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    first, with_shortcut = 4, 4 + 1  # norms of a stage
    assert norms == [(2, 1)] * (1 + first + with_shortcut) + [(3, 1)] * (2 * with_shortcut)
    assert model.feature_size == 3
    assert model(images(2, 3, 8, 8))[0].shape == (2, 5)


def parts_of(config: ModelConfig, initialisation: str) -> dict[str, torch.Tensor]:
    model = build_model(config, (3, 8, 8), 100)
    layout = ParameterLayout.of(model)
    values = layout.split(initial_parameters(model, 0, initialisation))
    return {slot.name: part for slot, part in zip(layout.slots, values, strict=True)}


def test_uniform_initialisation_is_that_of_pytorchs_layers():
    parts = parts_of(ModelConfig(widths=(32, 64)), "uniform")
    for name, fan_in in {"features.0.weight": 27, "features.4.weight": 288, "head.weight": 64, "head.bias": 64}.items():
        bound = fan_in**-0.5
        assert 0.9 * bound < parts[name].abs().max() <= bound
        # A uniform variable's square has mean b^2 / 3 and variance 4 b^4 / 45; five standard errors.
        tolerance = 5 * math.sqrt(4 / 5 / parts[name].numel())
        assert parts[name].square().mean().item() == pytest.approx(bound**2 / 3, rel=tolerance)
    torch.manual_seed(0)
    assert nn.Conv2d(3, 4000, 3).weight.std().item() == pytest.approx((1 / 27 / 3) ** 0.5, rel=0.02)
    assert torch.equal(parts["features.1.weight"], torch.ones(32))
    assert torch.equal(parts["features.1.bias"], torch.zeros(32))
    assert not torch.equal(parts["head.bias"], parts_of(ModelConfig(widths=(32, 64)), "he")["head.bias"])


def test_a_maskable_head_bias_changes_what_is_ranked_and_nothing_else():
    plain, ranked = (build_model(ModelConfig(maskable_head_bias=on), (3, 8, 8), 5) for on in (False, True))
    before, after = ParameterLayout.of(plain).slots, ParameterLayout.of(ranked).slots
    assert [slot.name for slot, other in zip(before, after, strict=True) if slot != other] == ["head.bias"]
    assert (before[-1].maskable, after[-1].maskable, after[-1].fan_in) == (False, True, 1)
    assert torch.equal(initial_parameters(plain, 0), initial_parameters(ranked, 0))
