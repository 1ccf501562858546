"""What masks have in common: selection per layer, overlap between clients."""

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from framp_core.layout import ParameterLayout


def jaccard_matrix(masks: np.ndarray) -> np.ndarray:
    """Pairwise Jaccard index |a & b| / |a | b| of boolean rows ``(clients, m)``; two empty masks count as equal.

    Returns:
        Float64 ``(clients, clients)``, symmetric, ones on the diagonal.
    """
    packed = np.packbits(masks, axis=1)
    sizes = masks.sum(axis=1, dtype=np.int64)
    overlap = np.eye(len(masks))
    for row in range(len(masks)):
        shared = np.bitwise_count(packed[row] & packed[row + 1 :]).sum(axis=1, dtype=np.int64)
        joint = sizes[row] + sizes[row + 1 :] - shared
        index = np.divide(shared, joint, out=np.ones(len(shared)), where=joint > 0)
        overlap[row, row + 1 :] = overlap[row + 1 :, row] = index
    return overlap


def mask_statistics(layout: ParameterLayout, masks: Sequence[tuple[str, Fraction, np.ndarray]]) -> dict[str, Any]:
    """Tables for the report's mask figures.

    Args:
        layout: description of the masks.
        masks: client name, capacity and mask ``(n,)`` of every client.

    Returns:
        ``layers`` (name and size of each maskable tensor, in order), ``selection`` (per capacity, the kept fraction
        of each layer, mean over the clients of that capacity), ``clients``, ``capacities`` and ``overlap`` (Jaccard
        index over maskable weights, clients by capacity and name).
    """
    ordered = sorted(masks, key=lambda item: (item[1], item[0]))
    slots = [slot for slot in layout.slots if slot.maskable]
    fractions: dict[str, list[list[float]]] = defaultdict(list)
    for _, capacity, mask in ordered:
        fractions[str(capacity)].append([float(mask[slot.slice].mean()) for slot in slots])
    maskable = np.stack([mask[layout.maskable] for _, _, mask in ordered]) if ordered else np.zeros((0, 0), bool)
    return {
        "layers": [{"name": slot.name, "size": slot.size} for slot in slots],
        "selection": {capacity: np.mean(rows, axis=0).tolist() for capacity, rows in fractions.items()},
        "clients": [name for name, _, _ in ordered],
        "capacities": [str(capacity) for _, capacity, _ in ordered],
        "overlap": jaccard_matrix(maskable).round(4).tolist(),
    }
