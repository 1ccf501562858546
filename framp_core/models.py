"""Client architectures. Each is split into ``features`` and ``head``; penultimate features are an output."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import GRAPH_MODELS, ModelConfig
from framp_core.errors import ModelError
from framp_core.extra import extra
from framp_core.graph_batch import GraphBatch, Inputs
from framp_core.layout import CLASSES, INPUT, Coupling, ParameterLayout, ParameterSlot
from framp_core.randomness import stream

PrecisionName = Literal["float32", "bfloat16"]
Norm = Callable[[int], nn.Module]
"""Builds the normalisation of a layer from its number of channels."""


class BatchStatistics(nn.BatchNorm2d):
    """Batch norm by the statistics of the batch at hand, in training and in test alike.

    ``y = (x - mean) / sqrt(variance + eps) * gain + bias``, mean and variance (population form) over the images and
    pixels of each channel. Nothing is kept between batches, so there is nothing to average over submodels (FIARSE's
    ``BetaResNet18_sbn``, Wu et al. 2024); the result for an image depends on the images beside it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(b, channels, h, w)`` to the same shape.

        Raises:
            ModelError: a single image of a single pixel, which has no variance.
        """
        if inputs.shape[0] * inputs.shape[2:].numel() == 1:
            raise ModelError(
                "model.normalisation='batch-statistics' got one image of one pixel, which has no statistics: a client "
                "holds a single image and the network shrinks it to 1x1; use larger images, more images per client "
                "or model.normalisation='group'"
            )
        return super().forward(inputs)


class FeaturesAndHead(nn.Module):
    """A network f followed by a linear head, and early exits on the way if asked for.

    An early exit is an average pool over the image, or the values of the nodes asked about, and a linear layer.
    ScaleFL's released code puts three 3x3 convolutions in between; at the width of their stages these would hold 2.3 M
    weights beside the 11.2 M of a ResNet-18, 0.11 M beside the 0.15 M of its first stage, and outweigh small networks
    outright.

    The flat vector holds features, early exits and head in this order, so that the network which ends at an early exit
    is described by a part of it, in order: that exit is its head.

    Args:
        features: maps a batch of images, or a :class:`GraphBatch` of as many seeds, to penultimate features
            ``(batch, feature_size)``.
        feature_size: width of the penultimate features.
        classes: number of classes.
        couplings: channel groups of every layer with parameters, for methods that slice channels; empty if unknown.
        early: channels that each early exit reads, by the position in ``features`` of the layer that writes them.
        maskable_head_bias: whether the head's bias is ranked and masked like a weight.
        dropout: share of the penultimate features that the head does not see in training, likewise at early exits; the
            features that are returned are whole.
        slim_by_budget: see :func:`framp_core.structured.slim_size`.

    Attributes:
        maskable_biases: layers whose bias is maskable, see :meth:`framp_core.layout.ParameterLayout.of`.
        batch_statistics: whether the result for an image depends on the images beside it.
    """

    def __init__(
        self,
        features: nn.Sequential,
        feature_size: int,
        classes: int,
        couplings: Mapping[str, Coupling] | None = None,
        early: Mapping[int, int] | None = None,
        maskable_head_bias: bool = False,
        dropout: float = 0.0,
        slim_by_budget: bool = False,
    ) -> None:
        super().__init__()
        self.early = dict(early or {})
        self.features = features
        self.exits = nn.ModuleDict({str(place): nn.Linear(width, classes) for place, width in self.early.items()})
        self.head = nn.Linear(feature_size, classes)
        self.dropout = nn.Dropout(dropout)
        self.feature_size = feature_size
        self.couplings = dict(couplings or {})
        self.maskable_biases = ("head",) if maskable_head_bias else ()
        self.slim_by_budget = slim_by_budget
        self.batch_statistics = any(isinstance(layer, BatchStatistics) for layer in features.modules())

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return logits ``(batch, classes)`` and penultimate features ``(batch, feature_size)``."""
        features = self.features(inputs)
        return self.head(self.dropout(features)), features

    def all_exits(self, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
        """Return the logits of every exit, the head's last, and the penultimate features."""
        logits, hidden = [], inputs
        for place, layer in enumerate(self.features):
            hidden = layer(hidden)
            if place in self.early:
                logits.append(self.exits[str(place)](self.dropout(_pooled(hidden))))
        assert isinstance(hidden, Tensor)
        return [*logits, self.head(self.dropout(hidden))], hidden


def _pooled(hidden: Inputs) -> Tensor:
    """What an early exit reads of a hidden layer, ``(batch, channels)``."""
    if isinstance(hidden, GraphBatch):
        return hidden.at_seeds()
    return F.adaptive_avg_pool2d(hidden, 1).flatten(1) if hidden.dim() == 4 else hidden


class Block(nn.Module, ABC):
    """Several layers that stand as one in ``features``, and that say themselves which channels they share.

    This class is meant to be subclassed.

    Attributes:
        by_channel: whether all that the block does besides its convolutions, norms and linear layers, it does to each
            channel by itself, in training as in evaluation, with parameters of its own, if any, whose first dimension
            is the channels; then clients' networks can be stacked (:mod:`framp_core.cohort`).
    """

    by_channel: ClassVar[bool] = False

    @abstractmethod
    def couplings(self, name: str, inputs: str) -> dict[str, Coupling]:
        """Channel groups of the block's layers with parameters, the layer that writes the block's output last.

        Args:
            name: dotted name of the block.
            inputs: channel group that the block reads.
        """


def _group_norm(channels: int, groups: int) -> nn.GroupNorm:
    if channels % groups:
        raise ModelError(
            f"{channels} channels cannot be cut into {groups} normalisation groups; "
            f"choose model.groups as a divisor of every width in model.widths"
        )
    return nn.GroupNorm(groups, channels)


def slim_groups(channels: int, kept: int, groups: int) -> int:
    """Groups of GroupNorm where ``kept`` of ``channels`` channels are left, of ``groups`` groups at full width.

    As many channels per group as at full width; where they do not divide ``kept``, the largest number of groups that
    does and is smaller. Attention heads are counted likewise.
    """
    return next(number for number in range(max(1, kept * groups // channels), 0, -1) if kept % number == 0)


def conv_net(channels: int, widths: Sequence[int], norms: Sequence[Norm], image_size: int) -> nn.Sequential:
    """3x3 convolutions with normalisation and ReLU; the image is halved after each but the last while it is > 2."""
    layers: list[nn.Module] = []
    size = image_size
    for index, (narrow, wide) in enumerate(pairwise((channels, *widths))):
        layers += [nn.Conv2d(narrow, wide, 3, padding=1, bias=False), norms[index](wide), nn.ReLU()]
        if index < len(widths) - 1 and size > 2:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Fully connected layers with ReLU on the flattened image."""
    layers: list[nn.Module] = [nn.Flatten()]
    for narrow, wide in pairwise((inputs, *widths)):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers)


class BasicBlock(Block):
    """Residual block of two 3x3 convolutions (He et al. 2016), post-activation, 1x1 shortcut where shapes change."""

    by_channel = True

    def __init__(self, narrow: int, wide: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.norm1 = norm(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm2 = norm(wide)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or narrow != wide:
            self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), norm(wide))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(batch, narrow, h, w)`` to ``(batch, wide, h / stride, w / stride)``."""
        hidden = F.relu(self.norm1(self.conv1(inputs)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))

    def couplings(self, name: str, inputs: str) -> dict[str, Coupling]:
        """See :meth:`Block.couplings`; an identity shortcut ties the block's output to its input."""
        hidden, output = f"{name}.hidden", inputs if isinstance(self.shortcut, nn.Identity) else f"{name}.output"
        layers = {
            "conv1": Coupling(hidden, inputs),
            "norm1": Coupling(hidden),
            "conv2": Coupling(output, hidden),
            "norm2": Coupling(output),
        }
        if output != inputs:
            layers |= {"shortcut.0": Coupling(output, inputs), "shortcut.1": Coupling(output)}
        return {f"{name}.{layer}": coupling for layer, coupling in layers.items()}


def resnet18(channels: int, widths: Sequence[int], norms: Sequence[Norm]) -> nn.Sequential:
    """ResNet-18 with a CIFAR stem (3x3, stride 1, no pooling): 11,173,962 parameters with a head of 10 classes.

    Fewer than four widths build its first stages.
    """
    stem = [nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), norms[0](widths[0]), nn.ReLU()]
    blocks: list[nn.Module] = []
    for stage, (narrow, wide) in enumerate(pairwise((widths[0], *widths))):
        blocks += [
            BasicBlock(narrow, wide, 1 if stage == 0 else 2, norms[stage]),
            BasicBlock(wide, wide, 1, norms[stage]),
        ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _stage_ends(features: nn.Sequential) -> list[int]:
    """Positions of the layers that end a stage: every second residual block, or every ReLU, or every graph layer."""
    residual = [place for place, layer in enumerate(features) if isinstance(layer, BasicBlock)]
    return residual[1::2] or [place for place, layer in enumerate(features) if isinstance(layer, nn.ReLU | Block)]


def _couplings(features: nn.Sequential, early: Mapping[int, int]) -> dict[str, Coupling]:
    """Channel groups of all layers: every convolution or linear layer opens one, and blocks say theirs."""
    couplings: dict[str, Coupling] = {}
    group = INPUT
    for child, layer in features.named_children():
        name = f"features.{child}"
        if isinstance(layer, Block):
            couplings |= layer.couplings(name, group)
            group = couplings[next(reversed(couplings))].rows
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            couplings[name] = Coupling(name, group)
            group = name
        elif isinstance(layer, nn.GroupNorm | BatchStatistics):
            couplings[name] = Coupling(group)
        if int(child) in early:
            couplings[f"exits.{child}"] = Coupling(CLASSES, group)
    return couplings | {"head": Coupling(CLASSES, group)}


def build_model(
    config: ModelConfig, input_shape: tuple[int, ...], classes: int, kept: Sequence[int] | None = None
) -> FeaturesAndHead:
    """Build the client architecture.

    Args:
        config: the whole section ``model``.
        input_shape: channels, height and width of an image, or the number of a node's features alone.
        classes: number of classes of the head.
        kept: channels left of each of ``config.widths``, for a slimmer network of the same architecture whose
            normalisation groups and attention heads are those of :func:`slim_groups`; of the first ones alone for a
            network that ends at an early exit. None builds the full one.

    Raises:
        ModelError: the shape does not fit the architecture, the widths do not fit it or the groups or heads, or there
            are more exits than stages.
        ConfigError: a graph network is asked for, and PyTorch Geometric is not installed.
    """
    stages = len(config.widths)
    _require_stages(config)
    widths = config.widths if kept is None else tuple(kept)
    features = _features(config, input_shape, widths)
    ends = list(zip(_stage_ends(features), widths, strict=True))[:-1]
    early = dict(ends[stages - (config.exits or stages) :])
    couplings = _couplings(features, early)
    return FeaturesAndHead(
        features,
        widths[-1],
        classes,
        couplings,
        early,
        config.maskable_head_bias,
        config.dropout,
        config.slim_width == "budget",
    )


def _features(config: ModelConfig, input_shape: tuple[int, ...], widths: Sequence[int]) -> nn.Sequential:
    norms = _norms(config, widths)
    if config.name in GRAPH_MODELS:
        return _graph_features(config, input_shape, widths, norms)
    if len(input_shape) != 3:
        raise ModelError(
            f"model.name={config.name!r} reads images (channels, height, width), and an example has the shape "
            f"{input_shape}; for the nodes of a graph choose {', '.join(GRAPH_MODELS)}"
        )
    channels, height, width = input_shape
    if config.name == "conv":
        return conv_net(channels, widths, norms, min(height, width))
    if config.name == "resnet18":
        return resnet18(channels, widths, norms)
    return mlp(channels * height * width, widths)


def _graph_features(
    config: ModelConfig, input_shape: tuple[int, ...], widths: Sequence[int], norms: Sequence[Norm]
) -> nn.Sequential:
    if len(input_shape) != 1:
        raise ModelError(
            f"model.name={config.name!r} reads nodes of (features,), and an example has the shape {input_shape}; "
            f"for images choose conv, resnet18, mlp"
        )
    extra("torch_geometric.nn")
    from framp_core.graph_models import graph_net

    return graph_net(config, input_shape[0], widths, norms)


def _require_stages(config: ModelConfig) -> None:
    stages = len(config.widths)
    if config.name == "resnet18" and stages != 4:
        raise ModelError(f"resnet18 has four stages; model.widths gives {stages}: {config.widths}")
    if config.exits > stages:
        raise ModelError(
            f"model.exits={config.exits}, and {config.name} with model.widths={','.join(map(str, config.widths))} has "
            f"{stages} stages; choose 1 (the head alone) to {stages}, or 0 for one exit per stage"
        )


def _norms(config: ModelConfig, widths: Sequence[int]) -> list[Norm]:
    """The normalisation of each of ``config.widths``, of which ``widths`` channels are left."""
    if config.batch_statistics:
        return [BatchStatistics] * len(widths)
    if config.normalisation == "none":
        return [nn.Identity] * len(widths)
    return [
        partial(_group_norm, groups=config.groups if left == full else slim_groups(full, left, config.groups))
        for full, left in zip(config.widths[: len(widths)], widths, strict=True)
    ]


def initial_parameters(model: nn.Module, seed: int, initialisation: Literal["he", "uniform"] = "he") -> Tensor:
    """A freshly initialised flat vector ``(n,)`` that depends on ``seed`` alone. Norm gains are 1, norm biases 0.

    ``he``: convolution and linear weights N(0, 2 / fan_in) (He et al. 2015), head and exits N(0, 1 / fan_in), biases 0.
    ``uniform``: these weights and their biases U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), fan_in that of the weight:
    what PyTorch's layers start with, and FIARSE. A bias that is no part of its weight's layer starts at 0 (``gcn``,
    ``gat``), as do attention vectors: at first every node attends to all its neighbours alike. There ``att_src`` has a
    gradient and ``att_dst`` has none, since all that it could do is to shift the logits of a softmax; it gets one as
    soon as ``att_src`` has moved.
    """
    values = []
    slots = ParameterLayout.of(model).slots
    fan_ins = {_layer_of(slot): slot.fan_in for slot in slots if len(slot.shape) > 1}
    for position, slot in enumerate(slots):
        rng, fan_in = stream(seed, "initial-parameters", position), fan_ins.get(_layer_of(slot))
        if initialisation == "uniform" and fan_in:
            draw = rng.uniform(-(fan_in**-0.5), fan_in**-0.5, slot.size)
        elif len(slot.shape) > 1:
            gain = 1.0 if slot.name.startswith(("head.", "exits.")) else 2.0
            draw = rng.normal(0.0, (gain / slot.fan_in) ** 0.5, slot.size)
        else:
            draw = np.full(slot.size, 1.0 if slot.name.endswith("weight") else 0.0)
        values.append(torch.from_numpy(draw.astype("float32")))
    return torch.cat(values)


def _layer_of(slot: ParameterSlot) -> str:
    return slot.name.rpartition(".")[0]


class FlatModel:
    """A network whose parameters and gradients are views of two flat vectors.

    Writing ``flat`` changes the network, and ``backward`` fills ``flat_gradient``; masking a submodel is then one
    multiplication, and neither the network nor autograd knows of it. The network is in eval mode: who wants its dropout
    says ``model.train()`` for the time.

    Args:
        model: the network.
        device: where it goes.
        precision: of convolutions and matrix products, forward and backward; parameters, gradients, logits and features
            are float32 in either (``torch.autocast``).

    Attributes:
        layout: description of ``flat``.
        flat: parameters ``(n,)``; a leaf whose ``grad`` is the flat gradient, fit for ``torch.optim``. A subclass may
            stand for K networks in one (:meth:`arranged`), and has K times as many.
    """

    def __init__(
        self, model: FeaturesAndHead, device: torch.device | str = "cpu", precision: PrecisionName = "float32"
    ) -> None:
        self.model = model.to(device).eval()
        self.layout = ParameterLayout.of(model)
        self.precision: PrecisionName = precision
        self.flat = nn.Parameter(torch.zeros(self.layout.size, device=device))
        self.flat.grad = torch.zeros_like(self.flat)
        values, gradients = self.layout.split(self.flat.data), self.layout.split(self.flat_gradient)
        for parameter, value, gradient in zip(model.parameters(), values, gradients, strict=True):
            parameter.data = value.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)

    @property
    def flat_gradient(self) -> Tensor:
        """Gradient, shaped like ``flat``, of the last ``backward``; it accumulates until zeroed."""
        assert self.flat.grad is not None
        return self.flat.grad

    def arranged(self, rows: Tensor) -> Tensor:
        """Vectors of the K networks, ``(K, n)``, in the order of ``flat``; here K is 1."""
        return rows.flatten()

    def rows(self, arranged: Tensor) -> Tensor:
        """Inverse of :meth:`arranged`."""
        return arranged.view(1, -1)

    def places(self, arranged: Tensor) -> list[list[Tensor]]:
        """Views of a vector in the order of ``flat``: for each network, the parts that make up its ``(n,)``."""
        return [[arranged]]

    def load(self, parameters: Tensor) -> None:
        """Take over values of the shape of ``flat``."""
        with torch.no_grad():
            self.flat.copy_(parameters)

    def load_product(self, parameters: Tensor, mask: Tensor) -> None:
        """Take over ``parameters * mask``, both of the shape of ``flat``, without memory for the product."""
        with torch.no_grad():
            torch.mul(parameters, mask, out=self.flat)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Logits of the head and penultimate features of a batch."""
        with self.autocast():
            logits, features = self.model(inputs)
        return logits.float(), features.float()

    def all_exits(self, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
        """Logits of every exit, the head's last, and penultimate features of a batch."""
        with self.autocast():
            exits, features = self.model.all_exits(inputs)
        return [logits.float() for logits in exits], features.float()

    def autocast(self) -> torch.autocast:
        """Around the layers: convolutions and matrix products in bfloat16 if ``precision`` says so."""
        return torch.autocast(self.flat.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
