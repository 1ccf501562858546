"""What masks have in common: selection per layer, overlap between clients."""

from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np

from framp_core.layout import ParameterLayout


def jaccard_matrix(packed: np.ndarray) -> np.ndarray:
    """Pairwise Jaccard index |a & b| / |a | b| of masks; two empty masks count as equal.

    Args:
        packed: ``np.packbits`` of each mask, uint8 ``(clients, ceil(m / 8))``.

    Returns:
        Float64 ``(clients, clients)``, symmetric, ones on the diagonal.
    """
    sizes = np.bitwise_count(packed).sum(axis=1, dtype=np.int64)
    overlap = np.eye(len(packed))
    for row in range(len(packed)):
        shared = np.bitwise_count(packed[row] & packed[row + 1 :]).sum(axis=1, dtype=np.int64)
        joint = sizes[row] + sizes[row + 1 :] - shared
        index = np.divide(shared, joint, out=np.ones(len(shared)), where=joint > 0)
        overlap[row, row + 1 :] = overlap[row + 1 :, row] = index
    return overlap


def mask_statistics(layout: ParameterLayout, masks: Iterable[tuple[str, Fraction, np.ndarray]]) -> dict[str, Any]:
    """Tables for the report's mask figures.

    Args:
        layout: description of the masks.
        masks: client name, capacity and mask ``(n,)`` of every client; looked at one by one.

    Returns:
        ``layers`` (name and size of each maskable tensor, in order), ``selection`` (per capacity, the kept fraction
        of each layer, mean over the clients of that capacity), ``clients``, ``capacities`` and ``overlap`` (Jaccard
        index over maskable weights, clients by capacity and name).
    """
    slots = [slot for slot in layout.slots if slot.maskable]
    fractions: dict[str, list[list[float]]] = defaultdict(list)
    packed: dict[tuple[Fraction, str], np.ndarray] = {}
    for name, capacity, mask in masks:
        fractions[str(capacity)].append([float(mask[slot.slice].mean()) for slot in slots])
        packed[capacity, name] = np.packbits(mask[layout.maskable])
    order = sorted(packed)
    sizes = sorted({capacity for capacity, _ in order})
    rows = np.stack([packed[key] for key in order]) if order else np.zeros((0, 0), np.uint8)
    return {
        "layers": [{"name": slot.name, "size": slot.size} for slot in slots],
        "selection": {str(size): np.mean(fractions[str(size)], axis=0).tolist() for size in sizes},
        "clients": [name for _, name in order],
        "capacities": [str(capacity) for capacity, _ in order],
        "overlap": jaccard_matrix(rows).round(4).tolist(),
    }
