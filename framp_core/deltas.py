"""The deltas of a round's clients, kept as they came and dense only while somebody looks."""

from collections.abc import Sequence
from typing import overload

import numpy as np

from framp_core.packed_mask import Masks, PackedMask


def dense(kept: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Spread the values at the kept positions over all n, float32 ``(n,)``, zero where nothing was kept."""
    spread = np.zeros(mask.shape, dtype=np.float32)
    spread[mask] = kept
    return spread


class KeptDeltas(Sequence[np.ndarray]):
    """A sequence of dense deltas, float32 ``(n,)`` and zero outside the mask, each made when it is asked for.

    Args:
        kept: Delta_i at the kept positions, float32 ``(m_i.sum(),)``.
        masks: m_i over n positions.
    """

    def __init__(self, kept: Sequence[np.ndarray], masks: Sequence[PackedMask]) -> None:
        self._kept = kept
        self._masks = masks

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "KeptDeltas": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | KeptDeltas":
        if isinstance(index, slice):
            return KeptDeltas(self._kept[index], self._masks[index])
        return dense(self._kept[index], self._masks[index].kept())

    def columns(self, where: slice) -> np.ndarray:
        """A part of all deltas, float32 ``(len(self), where.stop - where.start)``."""
        part = np.zeros((len(self), where.stop - where.start), dtype=np.float32)
        for row, kept, mask in zip(part, self._kept, self._masks, strict=True):
            first, held = mask.count_before(where.start), mask.part(where)
            row[held] = kept[first : first + np.count_nonzero(held)]
        return part


def columns(vectors: Sequence[np.ndarray], where: slice) -> np.ndarray:
    """A part of all vectors, ``(len(vectors), where.stop - where.start)``."""
    if isinstance(vectors, KeptDeltas | Masks):
        return vectors.columns(where)
    return np.stack([vector[where] for vector in vectors])
