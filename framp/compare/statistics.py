"""Paired tests of one method against others, and what they may be said to show.

Clients of the same name in runs of the same seed hold the same data, so a pair is the difference of two methods on
one client of one seed. The clients of one run share a server model, so their differences are not independent: a
p-value over clients says how sure the difference is for models like these, not how it varies from one training to the
next. That is what the paired t-test over the differences of the seeds asks, at the price of having few of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit
from scipy.stats import ttest_1samp, wilcoxon

from framp.compare.results import Results
from framp_core.methods import is_ablation
from framp_core.metrics import MEAN, Column
from framp_core.randomness import stream

COLUMNS: tuple[Column, ...] = ("local", "union", "unseen")
LEVEL = 0.05
MINIMUM_PAIRS = 6
"""With five pairs the smallest two-sided p of the signed-rank test is 1/16, so a test could show nothing."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class PairedTest:
    """The reference against one method, on one column and size.

    Attributes:
        method: the other method.
        column: which accuracy.
        capacity: gamma as a fraction, or ``"mean"`` for all clients together.
        pairs: clients, over all seeds, that both methods were measured on.
        difference: mean over the pairs of reference minus method, as a fraction of 1.
        low: lower end of its bootstrap 95 % interval over clients.
        high: upper end.
        by_seed: the mean difference of each seed, in the order of the seeds.
        p: two-sided p of Wilcoxon's signed-rank test; None with fewer than :data:`MINIMUM_PAIRS` pairs.
        p_holm: corrected for all tests of the comparison, or of the ablations; None where ``p`` is.
        ablation: whether the method is an ablation of the reference.
    """

    method: str
    column: Column
    capacity: str
    pairs: int
    difference: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    p: float | None
    p_holm: float | None
    ablation: bool

    @property
    def over_seeds(self) -> "SeedTest | None":
        """The same difference tested over seeds; None for one seed, or if all differ by the same."""
        return SeedTest.of(self.by_seed)

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below :data:`LEVEL`."""
        return self.p_holm is not None and self.p_holm < LEVEL


@dataclass(frozen=True)
class SeedTest:
    """Paired t-test of the differences of seeds: each training counts once, however many clients it has.

    Attributes:
        low: lower end of the 95 % t interval of the mean over seeds.
        high: upper end.
        p: two-sided p, not corrected.
    """

    low: float
    high: float
    p: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> "SeedTest | None":
        """The interval ``mean ± t(0.975, n - 1) * s / sqrt(n)`` and the p of n differences.

        None if n < 2, or if all are the same: an interval without width would read as certainty.
        """
        values, count = np.array(differences), len(differences)
        if count < 2 or np.ptp(values) <= 1e-12:
            return None
        half = float(stdtrit(count - 1, 0.975) * values.std(ddof=1) / np.sqrt(count))
        p = float(ttest_1samp(values, 0.0).pvalue)
        return cls(float(values.mean()) - half, float(values.mean()) + half, p)


def compare(results: Results, reference: str) -> list[PairedTest]:
    """Test the reference against every other method on every column, on all clients together and by size.

    Holm's correction is over the tests against other methods, and on its own over those against ablations, which ask
    another question. Which tests are left out for want of pairs does not depend on their outcome.

    Args:
        results: the finished runs.
        reference: a method with at least one of them.

    Returns:
        The tests against other methods, then those against ablations.
    """
    others = [name for name in results.methods if name != reference]
    families = [[name for name in others if is_ablation(name, reference) is ablation] for ablation in (False, True)]
    return [test for family in families for test in _tests(results, reference, family)]


def _tests(results: Results, reference: str, methods: Sequence[str]) -> list[PairedTest]:
    found = [
        (method, column, capacity, by_seed)
        for method in methods
        for column in COLUMNS
        for capacity in (*results.capacities, MEAN)
        if (by_seed := paired_differences(results, reference, method, column, capacity))
    ]
    flat = [np.concatenate(list(by_seed.values())) for *_, by_seed in found]
    raw = [signed_rank_p(values) if len(values) >= MINIMUM_PAIRS else None for values in flat]
    corrected = iter(holm([p for p in raw if p is not None]))
    return [
        PairedTest(
            method, column, capacity, len(values), float(values.mean()),
            *bootstrap_interval(values, stream(0, "comparison-bootstrap", method, column, capacity)),
            by_seed=tuple(float(own.mean()) for own in by_seed.values()),
            p=p, p_holm=None if p is None else next(corrected), ablation=is_ablation(method, reference),
        )
        for (method, column, capacity, by_seed), values, p in zip(found, flat, raw, strict=True)
    ]  # fmt: skip


def paired_differences(
    results: Results, reference: str, method: str, column: Column, capacity: str
) -> Mapping[int, np.ndarray]:
    """Reference minus method for each client that both measured, by seed; seeds without a pair are left out."""
    found = {}
    for seed in results.seeds:
        ours, theirs = (results.accuracies(name, seed, column, capacity) for name in (reference, method))
        common = sorted(ours.keys() & theirs.keys())
        if common:
            found[seed] = np.array([ours[client] - theirs[client] for client in common])
    return found


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; pairs without a difference are dropped, and 1 if all are.

    Args:
        differences: ``(pairs,)``.
    """
    # Accuracies are fractions of small counts: equal ones must not differ, nor ties break, by rounding.
    rounded = np.round(differences, 12)
    return float(wilcoxon(rounded).pvalue) if rounded.any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_j)."""
    count, largest = len(p_values), 0.0
    corrected = [0.0] * count
    for rank, index in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def bootstrap_interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile interval of the mean, over :data:`RESAMPLES` resamples of the values.

    Args:
        values: ``(pairs,)``, at least one.
        rng: source of the resamples.
    """
    drawn = rng.integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
