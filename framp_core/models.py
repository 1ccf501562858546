"""Client architectures. Each is split into ``features`` and ``head``; penultimate features are an output."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import ModelConfig
from framp_core.errors import ModelError
from framp_core.layout import ParameterLayout
from framp_core.randomness import stream


class FeaturesAndHead(nn.Module):
    """A network f followed by a linear head.

    Args:
        features: maps a batch of inputs to penultimate features ``(batch, feature_size)``.
        feature_size: width of the penultimate features.
        classes: number of classes.
    """

    def __init__(self, features: nn.Module, feature_size: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(feature_size, classes)
        self.feature_size = feature_size

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(batch, classes)`` and penultimate features ``(batch, feature_size)``."""
        features = self.features(inputs)
        return self.head(features), features


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    if channels % groups:
        raise ModelError(
            f"{channels} channels cannot be cut into {groups} normalisation groups; "
            f"choose model.groups as a divisor of every width in model.widths"
        )
    return nn.GroupNorm(groups, channels)


def conv_net(channels: int, widths: Sequence[int], groups: int, image_size: int) -> nn.Module:
    """3x3 convolutions with GroupNorm and ReLU; the image is halved after each but the last while it is > 2."""
    layers: list[nn.Module] = []
    size = image_size
    for index, (narrow, wide) in enumerate(pairwise((channels, *widths))):
        layers += [nn.Conv2d(narrow, wide, 3, padding=1, bias=False), _norm(wide, groups), nn.ReLU()]
        if index < len(widths) - 1 and size > 2:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp(inputs: int, widths: Sequence[int]) -> nn.Module:
    """Fully connected layers with ReLU on the flattened image."""
    layers: list[nn.Module] = [nn.Flatten()]
    for narrow, wide in pairwise((inputs, *widths)):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016), post-activation, 1x1 shortcut where shapes change."""

    def __init__(self, narrow: int, wide: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.norm1 = _norm(wide, groups)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm2 = _norm(wide, groups)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or narrow != wide:
            self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), _norm(wide, groups))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(batch, narrow, h, w)`` to ``(batch, wide, h / stride, w / stride)``."""
        hidden = F.relu(self.norm1(self.conv1(inputs)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))


def resnet18(channels: int, widths: Sequence[int], groups: int) -> nn.Module:
    """ResNet-18 with a CIFAR stem (3x3, stride 1, no pooling): 11,173,962 parameters with a head of 10 classes."""
    if len(widths) != 4:
        raise ModelError(f"resnet18 has four stages; model.widths gives {len(widths)}: {tuple(widths)}")
    stem = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), _norm(widths[0], groups), nn.ReLU()]
    blocks: list[nn.Module] = []
    for stage, (narrow, wide) in enumerate(pairwise((widths[0], *widths))):
        blocks += [
            BasicBlock(narrow, wide, 1 if stage == 0 else 2, groups),
            BasicBlock(wide, wide, 1, groups),
        ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_model(config: ModelConfig, input_shape: tuple[int, int, int], classes: int) -> FeaturesAndHead:
    """Build the client architecture.

    Args:
        config: name, widths and normalisation groups.
        input_shape: channels, height and width of an image.
        classes: number of classes of the head.

    Raises:
        ModelError: the widths do not fit the architecture or the groups.
    """
    channels, height, width = input_shape
    if config.name == "conv":
        features = conv_net(channels, config.widths, config.groups, min(height, width))
    elif config.name == "resnet18":
        features = resnet18(channels, config.widths, config.groups)
    else:
        features = mlp(channels * height * width, config.widths)
    return FeaturesAndHead(features, config.widths[-1], classes)


def initial_parameters(model: nn.Module, seed: int) -> Tensor:
    """A freshly initialised flat vector ``(n,)`` that depends on ``seed`` alone.

    Maskable weights: N(0, 2 / fan_in) (He et al. 2015), the head: N(0, 1 / fan_in). Norm gains are 1, biases 0.
    """
    values = []
    slots = ParameterLayout.of(model).slots
    for position, slot in enumerate(slots):
        if slot.maskable:
            gain = 1.0 if slot.name.startswith("head.") else 2.0
            scale = (gain / slot.fan_in) ** 0.5
            draw = stream(seed, "initial-parameters", position).normal(0.0, scale, slot.size)
            values.append(torch.from_numpy(draw.astype("float32")))
        else:
            values.append(torch.full((slot.size,), 1.0 if slot.name.endswith("weight") else 0.0))
    return torch.cat(values)


class FlatModel:
    """A network whose parameters and gradients are views of two flat vectors.

    Writing ``flat`` changes the network, and ``backward`` fills ``flat_gradient``; masking a submodel is then one
    multiplication, and neither the network nor autograd knows of it.

    Attributes:
        model: the network.
        layout: description of ``flat``.
        flat: parameters ``(n,)``; a leaf whose ``grad`` is the flat gradient, fit for ``torch.optim``.
    """

    def __init__(self, model: FeaturesAndHead, device: torch.device | str = "cpu") -> None:
        self.model = model.to(device)
        self.layout = ParameterLayout.of(model)
        self.flat = nn.Parameter(torch.zeros(self.layout.size, device=device))
        self.flat.grad = torch.zeros_like(self.flat)
        values, gradients = self.layout.split(self.flat.data), self.layout.split(self.flat.grad)
        for parameter, value, gradient in zip(model.parameters(), values, gradients, strict=True):
            parameter.data = value
            parameter.grad = gradient

    @property
    def flat_gradient(self) -> Tensor:
        """Gradient ``(n,)`` of the last ``backward``; it accumulates until zeroed."""
        assert self.flat.grad is not None
        return self.flat.grad

    def load(self, parameters: Tensor) -> None:
        """Copy a vector ``(n,)`` into the network."""
        with torch.no_grad():
            self.flat.copy_(parameters)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and penultimate features of a batch."""
        logits, features = self.model(inputs)
        return logits, features
