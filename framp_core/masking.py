"""From scores to the mask of a submodel: the k weights of the largest score, exactly k, ties by lowest index.

``numpy.partition`` finds the threshold in linear time; on the CPU it beats ``torch.topk`` at millions of weights.
"""

from fractions import Fraction

import numpy as np

from framp_core.config import ExtractionConfig
from framp_core.errors import ModelError, NonFiniteError
from framp_core.layout import ParameterLayout
from framp_core.rounding import largest_remainder


def scores(theta: np.ndarray, layout: ParameterLayout, fan_in_exponent: float) -> np.ndarray:
    """Importance of every parameter: ``|theta| * fan_in ** fan_in_exponent`` of its layer.

    Args:
        theta: full model, float32 ``(n,)``.
        layout: description of ``theta``.
        fan_in_exponent: 0 ranks by magnitude (FIARSE, Wu et al. 2024); 0.5 undoes the scale that initialisation
            gives each layer.

    Returns:
        Non-negative float32 vector ``(n,)``.
    """
    result: np.ndarray = np.abs(theta)
    for slot in layout.slots:
        result[slot.slice] *= np.float32(slot.fan_in**fan_in_exponent)
    return result


def global_top_k(scores: np.ndarray, layout: ParameterLayout, k: int) -> np.ndarray:
    """Keep the k maskable weights of the largest score under one threshold for the whole network.

    Masks of one score vector are nested: a smaller k keeps a subset of a larger one.

    Args:
        scores: float32 ``(n,)``; the values at always-kept positions play no part.
        layout: description of the vector.
        k: number of maskable weights to keep, in [0, maskable_size].

    Returns:
        Boolean mask ``(n,)``: all always-kept parameters and exactly k maskable weights.

    Raises:
        ModelError: k is out of range.
        NonFiniteError: a score is NaN or infinite.
    """
    _check(scores, layout, k)
    mask = _largest(scores, k, layout.maskable)
    mask |= ~layout.maskable
    return mask


def layer_top_k(scores: np.ndarray, layout: ParameterLayout, k: int) -> np.ndarray:
    """Keep k maskable weights in total, shared among the layers in proportion to their sizes.

    A layer's share is ``k * size / maskable_size``, rounded by largest remainder (ties by layer order). Because of
    the rounding, masks of different k are nested only up to single weights per layer.

    Args:
        scores: float32 ``(n,)``; the values at always-kept positions play no part.
        layout: description of the vector.
        k: number of maskable weights to keep, in [0, maskable_size].

    Returns:
        Boolean mask ``(n,)``: all always-kept parameters and exactly k maskable weights.

    Raises:
        ModelError: k is out of range.
        NonFiniteError: a score is NaN or infinite.
    """
    _check(scores, layout, k)
    mask = ~layout.maskable
    layers = [slot for slot in layout.slots if slot.maskable]
    shares = largest_remainder(k, np.array([slot.size for slot in layers]))
    for slot, share in zip(layers, shares, strict=True):
        mask[slot.slice] = _largest(scores[slot.slice], int(share), layout.maskable[slot.slice])
    return mask


def extract(
    theta: np.ndarray, layout: ParameterLayout, config: ExtractionConfig, capacity: float | Fraction
) -> np.ndarray:
    """Cut a full model to a client's capacity.

    Args:
        theta: full model, float32 ``(n,)``.
        layout: description of ``theta``.
        config: which extraction; ``full`` keeps everything whatever the capacity.
        capacity: gamma in (0, 1]; ``floor(gamma * maskable_size)`` maskable weights are kept.

    Returns:
        Boolean mask ``(n,)``, true where the client holds the parameter.

    Raises:
        ModelError: the capacity leaves no maskable weight, or exceeds 1.
        NonFiniteError: ``theta`` holds NaN or infinity.
    """
    _require_finite(theta, "the generated model")
    if config.name == "full":
        return np.ones(layout.size, dtype=bool)
    k = layout.kept(capacity)
    if k == 0:
        raise ModelError(
            f"capacity {capacity} of {layout.maskable_size} maskable weights leaves none; "
            f"give the client at least 1/{layout.maskable_size} or choose a larger model"
        )
    select = global_top_k if config.name == "global-top-k" else layer_top_k
    return select(scores(theta, layout, config.fan_in_exponent), layout, k)


def _largest(values: np.ndarray, k: int, eligible: np.ndarray) -> np.ndarray:
    """Mark the first k of the eligible values in the order (value descending, index ascending)."""
    if k == 0:
        return np.zeros(values.size, dtype=bool)
    ranked = values[eligible]
    place = ranked.size - k
    ranked.partition(place)
    threshold = ranked[place]
    kept: np.ndarray = (values > threshold) & eligible
    tied = np.flatnonzero((values == threshold) & eligible)
    kept[tied[: k - np.count_nonzero(kept)]] = True
    return kept


def _check(scores: np.ndarray, layout: ParameterLayout, k: int) -> None:
    if not 0 <= k <= layout.maskable_size:
        raise ModelError(
            f"cannot keep {k} of {layout.maskable_size} maskable weights; k = floor(capacity * "
            f"{layout.maskable_size}) needs a capacity in (0, 1]"
        )
    _require_finite(scores, "the score vector")


def _require_finite(values: np.ndarray, what: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        raise NonFiniteError(
            f"{what} holds {values.size - np.count_nonzero(finite)} values that are NaN or infinite (the first at "
            f"index {int(np.argmin(finite))}) and cannot be ranked; lower the learning rates of the server"
        )
