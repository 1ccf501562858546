"""Structured submodels: whole channels are kept or dropped, so that what is left is a slimmer network.

A selection is a bool vector over the hidden channels of all groups, group after group (``ParameterLayout.hidden``).
The mask it gives is, tensor by tensor, the outer product of the kept rows and the kept columns; image channels and
classes are always whole, and the biases and norm parameters of dropped channels are dropped with them. Channels keep
their order, so ``theta[mask]`` is the flat vector of the same architecture with fewer channels.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import reduce

import numpy as np

from framp_core.errors import MaskMismatchError, ModelError
from framp_core.layout import CLASSES, ParameterLayout
from framp_core.prototypes import Prototypes


def kept_channels(channels: int, capacity: Fraction) -> int:
    """Channels that a client holds of a group: ``ceil(sqrt(capacity) * channels)``, exact in whole numbers.

    A layer's weights grow with the product of its input and output channels, so a width of ``sqrt(capacity)`` leaves
    about ``capacity`` of the parameters; rounding up, the input and the head make it somewhat more.

    Args:
        channels: C, at least 1.
        capacity: gamma in (0, 1].
    """
    return 1 + math.isqrt(math.ceil(capacity * channels**2) - 1)


def window(layout: ParameterLayout, capacity: Fraction, shift: int = 0) -> np.ndarray:
    """Select ``kept_channels`` consecutive channels of every group, starting at ``shift`` and wrapping around.

    Args:
        layout: description of the full model.
        capacity: gamma in (0, 1].
        shift: first channel, modulo the channels of each group.

    Returns:
        Selection, bool ``(hidden_size,)``.

    Raises:
        ModelError: the network does not describe its channels.
    """
    groups = []
    for channels in _hidden(layout).values():
        kept = np.zeros(channels, dtype=bool)
        kept[(shift + np.arange(kept_channels(channels, capacity))) % channels] = True
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
    """Classes and image counts of a client, as prototypes without features (f = 0).

    The features of a slim network are not those of the full one, so no means travel; which classes a client holds
    must be known all the same to average the head.

    Args:
        counts: int ``(C,)``, training images per class.
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
        yield axes
