"""Defences against clients that lie: what the server does with the deltas and prototypes of a round before it learns.

All are off by default (section ``defence`` of the configuration); docs/robustness.md says what each is good for.
Clients hold different coordinates, so like is compared with like: two deltas on the positions that both clients hold.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy.stats import trim_mean

from framp_core.config import DefenceConfig
from framp_core.deltas import columns
from framp_core.errors import ProtocolError
from framp_core.prototypes import Prototypes

GROUP_FLOATS = 2**24
"""Floats of dense deltas held at once while they are compared."""
FEWEST = 4
"""Trusted clients in a round below which nobody is judged: of two or three nobody can tell who is wrong."""
TYPICAL_SIZE = 1.0
"""Of prototypes, to the order of magnitude: inputs have unit variance, and He et al.'s weights and norms keep it."""
_DIGITS = 6
"""Digits of a cosine; those beyond depend on the order in which a BLAS sums, and so on its threads."""


@dataclass(frozen=True)
class Verdict:
    """What the defences make of one delta.

    Attributes:
        shortened: factor that it is multiplied by, in (0, 1]; 1 leaves it alone.
        agreement: with the cohort, in [-1, 1], over the client's rounds so far; None without screening.
        screened: whether it is left out.
    """

    shortened: float = 1.0
    agreement: float | None = None
    screened: bool = False


def norm(delta: np.ndarray) -> float:
    """Euclidean length, summed in double and in one order whatever the number of threads."""
    return float(np.sqrt(np.einsum("i,i->", delta, delta, dtype=np.float64)))


def shortening(norms: Sequence[float], factor: float) -> list[float]:
    """Factors ``min(1, b / |Delta_i|)`` with the bound ``b = factor * median_j |Delta_j|`` (of two middle ones the
    smaller).

    Norm clipping (Sun et al. 2019, "Can You Really Backdoor Federated Learning?") with a bound that follows the
    cohort, as in Karimireddy et al. 2021. A client moves the server by at most b, whatever it sends. The lengths of
    honest deltas of different capacities are alike (within a factor of two on digits), so one median serves all.

    Args:
        norms: of the deltas of a round.
        factor: multiple of the median, > 0.
    """
    bound = factor * float(np.quantile(norms, 0.5, method="lower")) if norms else 0.0
    return [min(1.0, bound / length) if length > 0 else 1.0 for length in norms]


def pairwise_cosines(deltas: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> np.ndarray:
    """``cos_ij = <Delta_i, Delta_j> / (|Delta_i on m_j| |Delta_j on m_i|)``, float64 ``(c, c)``.

    That is the cosine over the positions that both hold, NaN where a pair shares no position or one of the two did not
    move there. The shared vector's part of a client's vector-Jacobian product is the delta itself (for the generators
    ``shared`` and ``mixture``; scaled per channel for ``modulated``), so this is the cosine of what two clients would
    do to it.

    Args:
        deltas: float32 ``(n,)`` each, zero outside the mask.
        masks: bool ``(n,)`` each.
    """
    clients, size = len(deltas), len(masks[0])
    products, squares = np.zeros((clients, clients)), np.zeros((clients, clients))
    for first, last in pairwise([*range(0, size, max(1, GROUP_FLOATS // clients)), size]):
        delta, held = columns(deltas, slice(first, last)), columns(masks, slice(first, last)).astype(np.float32)
        products += delta @ delta.T
        squares += delta**2 @ held.T
    lengths = np.sqrt(squares * squares.T)
    return np.round(np.divide(products, lengths, out=np.full_like(products, np.nan), where=lengths > 0), _DIGITS)


def agreement(cosines: np.ndarray, trimmed_share: float, trusted: np.ndarray) -> np.ndarray:
    """How far each client goes the way of the others, ``(c,)``: 1 like the median client, 0 not at all, -1 against.

    ``s_i`` is the mean of ``cos_ij`` over the other trusted clients j, a share of the largest and of the smallest left
    out, so that a few liars who agree among themselves cannot vouch for each other. It is divided by the median of the
    trusted clients' ``s_j`` and cut to [-1, 1]: clients whose classes differ have small cosines, all of them, and how
    small depends on the data. Comparing each update with the aggregate's direction, from which those found before are
    left out, is the idea of Munoz-Gonzalez et al. 2019 (adaptive model averaging, AFA); mean and threshold differ.

    Args:
        cosines: of :func:`pairwise_cosines`.
        trimmed_share: in [0, 0.5).
        trusted: bool ``(c,)``, the clients that others are compared with.

    Returns:
        NaN where nothing can be told: for a client that shares no position with a trusted one or did not move, and for
        all where fewer than four are trusted or half of those agree with nobody (the median is not positive).
    """
    others = np.where(trusted, cosines, np.nan)
    np.fill_diagonal(others, np.nan)
    known = [row[np.isfinite(row)] for row in others]
    means = np.array([float(trim_mean(row, trimmed_share)) if row.size else np.nan for row in known])
    reference = means[trusted & np.isfinite(means)]
    middle = np.median(reference) if reference.size >= FEWEST else 0.0
    return np.clip(means / middle, -1, 1) if middle > 0 else np.full(len(cosines), np.nan)


def combined_prototypes(
    local: Sequence[Prototypes], rule: Literal["median", "trimmed-mean"], trimmed_share: float
) -> Prototypes:
    """The prototypes of a round, per class over the clients that sent it and coordinate by coordinate.

    Coordinate-wise median and trimmed mean are those of Yin et al. 2018. All clients weigh the same: how many examples
    a client has is its own claim. The count of a class is that of all examples together.

    Args:
        local: prototypes of the clients, all f wide.
        rule: which of the two.
        trimmed_share: share of the clients left out at each end of a coordinate, in [0, 0.5), rounded down.
    """
    classes = np.unique(np.concatenate([each.classes for each in local])) if local else np.zeros(0, np.int64)
    means, counts = [], []
    for label in classes:
        sent = np.concatenate([each.means[each.classes == label] for each in local]).astype(np.float64)
        means.append(np.median(sent, axis=0) if rule == "median" else trim_mean(sent, trimmed_share, axis=0))
        counts.append(sum(int(each.counts[each.classes == label].sum()) for each in local))
    width = local[0].means.shape[1] if local else 0
    stacked = np.stack(means).astype(np.float32) if means else np.zeros((0, width), np.float32)
    return Prototypes(classes, np.array(counts, np.int64), stacked)


class Defence:
    """The defences of a run, and what they remember of each client.

    Args:
        config: which are on.

    Attributes:
        agreements: of each client that was judged, by name: ``a <- memory * a + (1 - memory) * agreement``, from its
            first agreement on; a round that cannot tell leaves it as it was. A checkpoint has to hold it.
        sizes: :attr:`framp_core.prototypes.Prototypes.size` of each client's last prototypes that were taken, by name.
            A checkpoint has to hold it.
    """

    def __init__(self, config: DefenceConfig) -> None:
        self.config = config
        self.agreements: dict[str, float] = {}
        self.sizes: dict[str, float] = {}

    def absurd_prototypes(self, local: Mapping[str, Prototypes]) -> dict[str, ProtocolError]:
        """Why the prototypes of some clients of a round are refused, by name; the sizes of the others are remembered.

        Args:
            local: prototypes of the round's clients, by name.
        """
        sizes = {name: own.size for name, own in local.items() if own.means.size}
        bound, factor = self.largest_size(sizes), self.config.largest_prototype
        absurd = {
            name: ProtocolError(
                f"the features in the prototypes have a root mean square of {size:.3g}, and {bound:.3g} is the largest "
                f"that is taken (defence.largest-prototype={factor:g} times the median client's, and at least times "
                f"{TYPICAL_SIZE:g}); raise it if honest clients send such"
            )
            for name, size in sizes.items()
            if size > bound
        }
        self.sizes |= {name: size for name, size in sizes.items() if name not in absurd}
        return absurd

    def largest_size(self, sizes: Mapping[str, float]) -> float:
        """The size up to which prototypes are taken: ``b * max(1, median)``, b of the configuration.

        The median (of two middle ones the smaller) is over all clients known so far, one vote each, with the size that
        it sends now or sent last, and one vote of :data:`TYPICAL_SIZE`. So it follows features that grow, whoever is
        sampled; it is out of reach for a minority of the clients, though they be alone in a round or in a class; and
        a client that is alone has to be within b of the typical size. That is the least bound, too: where most features
        are dead, the others are not absurd.

        Args:
            sizes: of the round's prototypes, by name of the client; those that sent none left out.
        """
        if not self.config.largest_prototype:
            return math.inf
        votes = [TYPICAL_SIZE, *{**self.sizes, **sizes}.values()]
        return self.config.largest_prototype * max(TYPICAL_SIZE, float(np.quantile(votes, 0.5, method="lower")))

    def judge(
        self, names: Sequence[str], deltas: Sequence[np.ndarray], masks: Sequence[np.ndarray], norms: Sequence[float]
    ) -> list[Verdict]:
        """Judge the deltas of a round.

        Args:
            names: of the clients.
            deltas: Delta_i, float32 ``(n,)``, zero outside the mask.
            masks: m_i, bool ``(n,)``.
            norms: lengths of the deltas.
        """
        factors = shortening(norms, self.config.norm_bound) if self.config.norm_bound else [1.0] * len(names)
        if self.config.screening == "none" or not names:
            return [Verdict(factor) for factor in factors]
        threshold = self.config.screening_threshold
        trusted = np.array([self.agreements.get(name, 1.0) >= threshold for name in names])
        now = agreement(pairwise_cosines(deltas, masks), self.config.trimmed_share, trusted)
        remembered = [self._remember(name, float(value)) for name, value in zip(names, now, strict=True)]
        return [Verdict(factor, value, value < threshold) for factor, value in zip(factors, remembered, strict=True)]

    def prototypes(self, local: Iterable[Prototypes]) -> list[Prototypes]:
        """What the bank of prototypes takes in: the clients' own, or one robust combination of them."""
        local = list(local)
        if self.config.prototypes == "mean" or not local:
            return local
        return [combined_prototypes(local, self.config.prototypes, self.config.trimmed_share)]

    def _remember(self, name: str, now: float) -> float:
        memory, before = self.config.screening_memory, self.agreements.get(name, now)
        if not np.isnan(now):
            self.agreements[name] = memory * before + (1 - memory) * now
        return self.agreements.get(name, 1.0)
