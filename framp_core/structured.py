"""Structured submodels: whole channels are kept or dropped, so that what is left is a slimmer network.

A selection is a bool vector over the hidden channels of all groups, group after group (``ParameterLayout.hidden``).
The mask it gives is, tensor by tensor, the outer product of the kept rows and the kept columns; input channels and
classes are always whole, and the biases and norm parameters of dropped channels are dropped with them. A layer whose
input group keeps nothing is dropped with its bias, which is how a network ends at an early exit. Channels keep their
order, so ``theta[mask]`` is the flat vector of the same architecture with fewer channels and, maybe, fewer stages.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, reduce

import numpy as np

from framp_core.errors import MaskMismatchError, ModelError
from framp_core.layout import CLASSES, ParameterLayout
from framp_core.prototypes import Prototypes

WIDTH_STEPS = 32
"""Widths of a network with early exits are multiples of 1/32: fine enough to meet a budget within some percent."""

BUDGET_STEPS = 256
"""And 1/256 where no exits are, finer than a channel of 128, so that a budget can be met on wide inputs."""


@dataclass(frozen=True)
class SlimSize:
    """How much of the network a client holds.

    Attributes:
        squared_width: r squared, where r in (0, 1] is the share of the channels that is left of every group.
        exits: number of heads, counted from the input; the network ends at the last of them.
    """

    squared_width: Fraction
    exits: int


def kept_channels(channels: int, squared_width: Fraction) -> int:
    """Channels that are left of a group: ``ceil(sqrt(squared_width) * channels)``, exact in whole numbers.

    Args:
        channels: C, at least 1.
        squared_width: square of the width ratio, in (0, 1].
    """
    return 1 + math.isqrt(math.ceil(squared_width * channels**2) - 1)


@lru_cache(maxsize=64)
def slim_size(layout: ParameterLayout, capacity: Fraction) -> SlimSize:
    """Width and depth for a capacity, the same on server and client since it follows from the layout alone.

    With one exit the width is ``sqrt(capacity)``, HeteroFL's: a layer's weights grow with the product of its input and
    output channels, so that about ``capacity`` of them is left; rounding up, the input and the head make it somewhat
    more, and several times more where the input is wide (7.4 times at 1/64 for a GCN on Cora's 1,433 features). With
    ``slim_by_budget`` it is the multiple of 1 / ``BUDGET_STEPS`` for which the weights held are nearest
    ``capacity * n``, the smaller of equals. Capacity 1 is the whole network, early exits included.

    Otherwise (ScaleFL) depth and width divide the weights by about the same factor. Leaving out the stages beyond exit
    e divides them by ``d_e = n / held(e, 1)``, and e is the exit whose d_e is nearest ``sqrt(1 / capacity)``, the
    deeper of equals. The width is the multiple r of 1 / ``WIDTH_STEPS`` for which ``held(e, r)`` is nearest
    ``capacity * n``, the smaller of equals. Here ``held`` counts the maskable weights of a submodel, its exits among
    them, and n those of the network without early exits, of which the capacities of all methods are fractions.

    The nearest of all pairs (e, r) would leave the depth to the rounding of widths: with ``r^2 = capacity * d_e``
    several exits meet a budget, and a small client could get one wide stage or all stages at a few channels. The
    published sizes (widths 0.7, 0.7, 0.75, 1 at exits 1 to 4) cut both axes as well.

    Args:
        layout: description of the full model.
        capacity: gamma in (0, 1].

    Raises:
        ModelError: the network does not describe its channels.
    """
    _hidden(layout)
    exits = len(layout.exits)
    if exits == 1 and layout.slim_by_budget and capacity < 1:
        return SlimSize(_nearest_width(layout, 1, capacity * layout.maskable_size, BUDGET_STEPS) ** 2, 1)
    if exits == 1 or capacity == 1:
        return SlimSize(capacity, exits)
    weights, factor = layout.maskable_size - _early_exit_weights(layout), math.sqrt(1 / capacity)
    distances = [abs(weights / _held_weights(layout, exit_, Fraction(1)) - factor) for exit_ in range(exits, 0, -1)]
    depth = exits - distances.index(min(distances))
    return SlimSize(_nearest_width(layout, depth, capacity * weights, WIDTH_STEPS) ** 2, depth)


def held_channels(layout: ParameterLayout, size: SlimSize) -> dict[str, int]:
    """Channels that a submodel keeps of each hidden group; none of the groups beyond its last exit."""
    needed = layout.exits[size.exits - 1]
    return {
        group: kept_channels(channels, size.squared_width) if group in needed else 0
        for group, channels in _hidden(layout).items()
    }


def slim_widths(widths: Sequence[int], layout: ParameterLayout, capacity: Fraction) -> tuple[int, ...]:
    """Channels left of each stage of a network of these widths, for the stages that a client holds.

    Args:
        widths: channels of every stage of the full network.
        layout: description of the full network.
        capacity: gamma in (0, 1].
    """
    size = slim_size(layout, capacity)
    stages = len(widths) - (len(layout.exits) - size.exits)
    return tuple(kept_channels(channels, size.squared_width) for channels in widths[:stages])


def window(layout: ParameterLayout, capacity: Fraction, shift: int = 0) -> np.ndarray:
    """Select consecutive channels of every group that a client holds, starting at ``shift`` and wrapping around.

    How many is :func:`slim_size`'s to say.

    Args:
        layout: description of the full model.
        capacity: gamma in (0, 1].
        shift: first channel, modulo the channels of each group.

    Returns:
        Selection, bool ``(hidden_size,)``.

    Raises:
        ModelError: the network does not describe its channels.
    """
    return _window(layout, slim_size(layout, capacity), shift)


def _window(layout: ParameterLayout, size: SlimSize, shift: int = 0) -> np.ndarray:
    held, groups = held_channels(layout, size), []
    for group, channels in _hidden(layout).items():
        kept = np.zeros(channels, dtype=bool)
        kept[(shift + np.arange(held[group])) % channels] = True
        groups.append(kept)
    return np.concatenate(groups)


def channel_mask(layout: ParameterLayout, selection: np.ndarray) -> np.ndarray:
    """Mask of a selection, bool ``(n,)``: true where the channels of all dimensions are kept."""
    mask = np.empty(layout.size, dtype=bool)
    for slot, axes in zip(layout.slots, _kept_axes(layout, selection), strict=True):
        mask[slot.slice] = reduce(np.logical_and.outer, axes).ravel()
    return mask


def kept_sizes(layout: ParameterLayout, selection: np.ndarray) -> list[int]:
    """Kept parameters per tensor, without a vector of n elements."""
    return [math.prod(int(axis.sum()) for axis in axes) for axes in _kept_axes(layout, selection)]


def selection_of(layout: ParameterLayout, mask: np.ndarray) -> np.ndarray:
    """Inverse of :func:`channel_mask`.

    Raises:
        MaskMismatchError: the mask is not one of whole channels.
    """
    groups = {
        slot.coupling.rows: mask[slot.slice].reshape(slot.shape[0], -1).any(axis=1)
        for slot in layout.slots
        if slot.coupling
    }
    selection = np.concatenate([groups[name] for name in _hidden(layout)])
    if not np.array_equal(channel_mask(layout, selection), mask):
        raise MaskMismatchError("the mask does not keep whole channels; make it with structured.channel_mask")
    return selection


def by_group(layout: ParameterLayout, selection: np.ndarray) -> dict[str, np.ndarray]:
    """Cut a selection into the kept channels of each hidden group, bool ``(channels,)``."""
    groups = _hidden(layout)
    return dict(zip(groups, np.split(selection, np.cumsum(list(groups.values()))[:-1]), strict=True))


def without_other_classes(layout: ParameterLayout, mask: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Drop the head's rows of classes that a client does not hold, from a copy of its mask.

    Args:
        layout: description of the mask.
        mask: bool ``(n,)``.
        classes: int64, ids of the classes held.
    """
    left = mask.copy()
    for slot in layout.slots:
        if slot.coupling and slot.coupling.rows == CLASSES:
            held = np.isin(np.arange(slot.shape[0]), classes)
            left[slot.slice] &= np.repeat(held, slot.size // slot.shape[0])
    return left


def held_classes(counts: np.ndarray) -> Prototypes:
    """Classes and counts of a client, as prototypes without features (f = 0).

    The features of a slim network are not those of the full one, so no means travel; which classes a client holds
    must be known all the same to average the head.

    Args:
        counts: int ``(C,)``, training examples per class.
    """
    classes = np.flatnonzero(counts).astype(np.int64)
    return Prototypes(classes, counts[classes].astype(np.int64), np.zeros((classes.size, 0), dtype=np.float32))


def _hidden(layout: ParameterLayout) -> dict[str, int]:
    if not layout.hidden:
        raise ModelError(
            "this network does not say which channels its layers share, so it cannot be sliced; give it `couplings` "
            "(framp_core/layout.py), or choose a method that masks single weights"
        )
    return layout.hidden


def _kept_axes(layout: ParameterLayout, selection: np.ndarray) -> Iterator[list[np.ndarray]]:
    """For each tensor what is kept along each of its dimensions, bool vectors."""
    kept = by_group(layout, selection)
    for slot in layout.slots:
        axes = [np.ones(length, dtype=bool) for length in slot.shape]
        if slot.coupling:
            for axis, group in enumerate((slot.coupling.rows, slot.coupling.columns)[: len(axes)]):
                axes[axis] = kept.get(group, axes[axis])
            if not kept.get(slot.coupling.columns, np.True_).any():
                axes[0] = np.zeros_like(axes[0])
        yield axes


def _early_exit_weights(layout: ParameterLayout) -> int:
    """Maskable weights of all heads but the last."""
    heads = [slot.size for slot in layout.slots if slot.maskable and slot.coupling and slot.coupling.rows == CLASSES]
    return sum(heads[:-1])


def _held_weights(layout: ParameterLayout, exits: int, width: Fraction) -> Fraction:
    """Maskable weights of a submodel, those of its exits among them; a whole number."""
    kept = kept_sizes(layout, _window(layout, SlimSize(width**2, exits)))
    return Fraction(sum(number for slot, number in zip(layout.slots, kept, strict=True) if slot.maskable))


def _nearest_width(layout: ParameterLayout, exits: int, budget: Fraction, steps: int) -> Fraction:
    """Multiple of 1 / ``steps`` with the weights nearest the budget, the smaller of equals; they grow with it."""
    widths = [Fraction(step, steps) for step in range(1, steps + 1)]
    place = bisect_left(widths[:-1], budget, key=lambda width: _held_weights(layout, exits, width))
    return min(
        widths[max(0, place - 1) : place + 1], key=lambda width: abs(_held_weights(layout, exits, width) - budget)
    )
