"""The one description of a model's flat parameter vector, and of the channels that couple its layers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

INPUT, CLASSES = "input", "classes"
"""Channel groups that no submodel slices: the image (flattened or not) or a node's features, and the head's rows."""


@dataclass(frozen=True)
class Coupling:
    """Which channels the first two dimensions of a layer's tensors stand for.

    Channels that must be kept or dropped together form a group: what a layer writes, its normalisation scales, and
    the next layer reads; in a residual network also the sum that the identity shortcuts of a stage tie together.

    Attributes:
        rows: group of dimension 0.
        columns: group of dimension 1 of the layer's weight.
    """

    rows: str
    columns: str = INPUT


@dataclass(frozen=True)
class ParameterSlot:
    """One tensor of the model inside the flat vector.

    Attributes:
        name: dotted name as in ``Module.named_parameters``.
        shape: shape of the tensor, ``(size,)`` if it is always kept; dimension 0 is the output channel.
        fan_in: number of inputs that feed one output channel (1 for vectors).
        maskable: whether ranking and masking apply: to a parameter called ``weight`` of two or more dimensions, which
            convolutions and linear layers have. Norm parameters, attention vectors and biases (but for those that the
            network names) are always kept.
        offset: position of the first element in the flat vector.
        coupling: channel groups of dimensions 0 and 1; None for a network that does not describe its channels.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    maskable: bool
    offset: int
    coupling: Coupling | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        """Where the tensor lies in the flat vector."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class ParameterLayout:
    """Names, shapes, fan-ins, maskable flags and slices of a flat parameter vector theta in R^n.

    Generators write into this vector, masks select from it, the codec sends it, and
    :class:`framp_core.models.FlatModel` runs it. The order is that of ``Module.named_parameters``.
    """

    slots: tuple[ParameterSlot, ...]
    slim_by_budget: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The layout itself: it never changes, and its cached vectors take 5 bytes per parameter."""
        return self

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterLayout":
        """Describe ``model``: one slot per parameter, in the order of ``named_parameters``.

        What is always kept has one element per output channel, whatever its shape in the network (graph attention has
        ``(1, heads, channels per head)``), and is described as a vector, so that it is sliced with its channels.

        A network whose submodels can be slices of channels has an attribute ``couplings``: the :class:`Coupling` of
        each layer with parameters, by the layer's dotted name. One whose biases are ranked like weights names their
        layers in ``maskable_biases``, and one that is slimmed by its weights rather than its width says so in
        ``slim_by_budget``.
        """
        couplings: Mapping[str, Coupling] = getattr(model, "couplings", {})
        biases = {f"{layer}.bias" for layer in getattr(model, "maskable_biases", ())}
        slots, offset = [], 0
        for name, parameter in model.named_parameters():
            layer, _, own_name = name.rpartition(".")
            maskable = name in biases or (own_name == "weight" and parameter.dim() > 1)
            shape = tuple(parameter.shape) if maskable else (parameter.numel(),)
            slots.append(ParameterSlot(name, shape, math.prod(shape[1:]), maskable, offset, couplings.get(layer)))
            offset += parameter.numel()
        return cls(tuple(slots), getattr(model, "slim_by_budget", False))

    @cached_property
    def size(self) -> int:
        """n, the number of all parameters."""
        return sum(slot.size for slot in self.slots)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of elements per slot, the argument of ``torch.split``."""
        return [slot.size for slot in self.slots]

    @cached_property
    def maskable(self) -> np.ndarray:
        """Boolean vector of length n, true where ranking and masking apply."""
        return np.repeat([slot.maskable for slot in self.slots], self.sizes)

    @cached_property
    def maskable_size(self) -> int:
        """Number of maskable weights."""
        return sum(slot.size for slot in self.slots if slot.maskable)

    @cached_property
    def maskable_sizes(self) -> list[int]:
        """Number of elements per maskable slot."""
        return [slot.size for slot in self.slots if slot.maskable]

    @cached_property
    def always_kept_size(self) -> int:
        """Number of parameters that no mask drops."""
        return self.size - self.maskable_size

    @cached_property
    def fan_in(self) -> np.ndarray:
        """Float32 vector of length n: the fan-in of the slot each element belongs to."""
        return np.repeat(np.array([slot.fan_in for slot in self.slots], dtype=np.float32), self.sizes)

    @cached_property
    def hidden(self) -> dict[str, int]:
        """Number of channels of each hidden group, in layout order; empty if the network does not describe them."""
        return {
            slot.coupling.rows: slot.shape[0] for slot in self.slots if slot.coupling and slot.coupling.rows != CLASSES
        }

    @cached_property
    def exits(self) -> list[frozenset[str]]:
        """Hidden groups that each head needs, the shallowest head first; one entry without early exits.

        They are those of all layers up to the last one that writes what the head reads.
        """
        layers = [slot.coupling for slot in self.slots if slot.coupling]
        written = [coupling.rows for coupling in layers if coupling.rows != CLASSES]
        ends = {group: position for position, group in enumerate(written, start=1)}
        read = dict.fromkeys(coupling.columns for coupling in layers if coupling.rows == CLASSES)
        return [frozenset(written[: ends.get(group, 0)]) for group in read]

    @cached_property
    def hidden_size(self) -> int:
        """Number of hidden channels of all groups together."""
        return sum(self.hidden.values())

    def kept(self, capacity: float | Fraction) -> int:
        """Maskable weights that a client of this capacity holds: k = floor(capacity * maskable_size)."""
        return math.floor(capacity * self.maskable_size)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Split a vector ``(..., n)`` into tensors ``(..., *shape)``, one per slot.

        ``torch.split`` rather than one slice per slot: its backward pass concatenates once, whereas every slice
        would allocate a gradient of the whole vector.
        """
        parts = torch.split(flat, self.sizes, dim=-1)
        return [part.reshape(*flat.shape[:-1], *slot.shape) for part, slot in zip(parts, self.slots, strict=True)]
