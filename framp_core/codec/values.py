"""Vectors of weights as bytes, little-endian: float32, bfloat16 or int8."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from framp_core.errors import MaskMismatchError, NonFiniteError

ValueFormat = Literal["float32", "bfloat16", "int8"]
BYTES_PER_VALUE: dict[ValueFormat, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
_INT8_LIMIT = 127


def encode_values(
    values: np.ndarray, value_format: ValueFormat, sizes: Sequence[int], rng: np.random.Generator | None = None
) -> bytes:
    """Write values in one of the formats.

    - float32: exact.
    - bfloat16: rounded to nearest, ties to even; relative error at most 2**-8 for normal numbers.
    - int8: ``q = round(x / s)`` with ``s = max |x| / 127`` per tensor; one float32 scale per tensor goes first, none
      for an empty one: a slim network may lack the tensor altogether.
      The error is at most s / 2, or below s with an rng: then q is rounded up with the probability of its fraction,
      so that its mean is x / s (Alistarh et al. 2017, QSGD).

    NaN and infinity reach the other side as such (in int8 as the scale), and it is the receiver who refuses them.

    Args:
        values: float32 ``(k,)``, tensor after tensor.
        value_format: how to write them.
        sizes: values per tensor, summing to k; a tensor may be empty.
        rng: stream for stochastic rounding; the other formats do not round by it.

    Raises:
        MaskMismatchError: ``sizes`` do not sum to k.
    """
    if values.shape != (sum(sizes),):
        raise MaskMismatchError(
            f"got values of shape {values.shape}, and the mask keeps {sum(sizes)}; pass theta[mask]"
        )
    if value_format == "float32":
        return values.astype("<f4", copy=False).tobytes()
    if value_format == "bfloat16":
        return _to_bfloat16(values).tobytes()
    held = [size for size in sizes if size]
    scales = _scales(values, held)
    return scales.astype("<f4").tobytes() + _to_int8(values, np.repeat(scales, held), rng).tobytes()


def decode_values(data: bytes | memoryview, value_format: ValueFormat, sizes: Sequence[int]) -> np.ndarray:
    """Inverse of :func:`encode_values`, up to its rounding.

    Args:
        data: what :func:`encode_values` wrote.
        value_format: as there.
        sizes: as there; their sum k bounds what is allocated.

    Returns:
        float32 ``(k,)``, writable, not checked for NaN and infinity.

    Raises:
        MaskMismatchError: ``data`` does not hold k values.
    """
    held = [size for size in sizes if size]
    scale_bytes = 4 * len(held) if value_format == "int8" else 0
    expected = scale_bytes + BYTES_PER_VALUE[value_format] * sum(sizes)
    if len(data) != expected:
        raise MaskMismatchError(
            f"got {len(data)} bytes of values; {sum(sizes)} kept weights in {value_format} take {expected}; "
            f"values and mask must come from the same submodel"
        )
    if value_format == "float32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    if value_format == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    scales = np.frombuffer(data[:scale_bytes], "<f4").astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.frombuffer(data[scale_bytes:], np.int8) * np.repeat(scales, held)


def require_finite(values: np.ndarray, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: names ``what`` and how many numbers of it are not finite.
    """
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"{np.count_nonzero(~np.isfinite(values))} of {values.size} numbers in {what} are NaN or infinite; "
            f"lower the learning rate of the side that sent them"
        )


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    upper = bits >> 16
    rounded = (bits + 0x7FFF + (upper & 1)) >> 16
    # Rounding may carry a NaN over to infinity or zero; its upper half with a fraction bit set is a NaN.
    return np.where(np.isnan(values), upper | 0x40, rounded).astype("<u2")


def _scales(values: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Float32 ``max |x| / 127`` per tensor; none is empty."""
    if not sizes:
        return np.zeros(0, dtype=np.float32)
    scales: np.ndarray = np.maximum.reduceat(np.abs(values), np.cumsum([0, *sizes[:-1]])) / np.float32(_INT8_LIMIT)
    return scales


def _to_int8(values: np.ndarray, scales: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = np.nan_to_num(values / scales)  # 0 / 0 in an all-zero tensor, NaN beside a NaN scale
    if rng is None:
        codes = np.rint(ratios)
    else:
        lower = np.floor(ratios)
        codes = lower + (rng.random(ratios.size, dtype=np.float32) < ratios - lower)
    limited: np.ndarray = np.clip(codes, -_INT8_LIMIT, _INT8_LIMIT).astype(np.int8)
    return limited
