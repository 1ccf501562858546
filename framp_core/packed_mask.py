"""A mask as bits: an eighth of the memory, unpacked only where somebody looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np


@dataclass(frozen=True)
class PackedMask:
    """A mask of m positions.

    Attributes:
        bits: uint8 ``(ceil(m / 8),)``, ``numpy.packbits`` of the mask.
        size: m.
    """

    bits: np.ndarray
    size: int

    @classmethod
    def of(cls, kept: np.ndarray) -> Self:
        """Pack a mask, bool ``(m,)``."""
        return cls(np.packbits(kept), kept.size)

    def kept(self) -> np.ndarray:
        """The mask, bool ``(m,)``."""
        return np.unpackbits(self.bits, count=self.size).view(np.bool_)

    def part(self, where: slice) -> np.ndarray:
        """``kept()[where]`` without the rest of it; ``where`` has both ends and no step."""
        first = where.start // 8
        bits = np.unpackbits(self.bits[first : -(-where.stop // 8)])
        return bits[where.start - 8 * first : where.stop - 8 * first].view(np.bool_)

    def count_before(self, position: int) -> int:
        """Kept positions below ``position``."""
        whole = position // 8
        counted = int(np.bitwise_count(self.bits[:whole]).sum(dtype=np.int64))
        return counted + int(np.count_nonzero(self.part(slice(8 * whole, position))))


class Masks(Sequence[np.ndarray]):
    """A sequence of masks, bool ``(m,)``, each unpacked when it is asked for."""

    def __init__(self, packed: Sequence[PackedMask]) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Masks": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | Masks":
        return Masks(self.packed[index]) if isinstance(index, slice) else self.packed[index].kept()

    def columns(self, where: slice) -> np.ndarray:
        """A part of all masks, bool ``(len(self), where.stop - where.start)``."""
        return np.stack([mask.part(where) for mask in self.packed])
