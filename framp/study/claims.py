"""What holds in a setting across its sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from framp.compare.results import Results
from framp.compare.statistics import COLUMNS
from framp.compare.tables import shown_pair
from framp_core.methods import METHODS, STRONG, is_ablation
from framp_core.metrics import MEAN, Column

FULL_SIZE = "fedavg"


@dataclass(frozen=True)
class CellOf:
    """A cell of the accuracy tables, a column and a size.

    Attributes:
        column: which accuracy.
        capacity: which size.
        best: the best of the other methods.
        behind: best minus reference as they are shown, in points; at most 0 where the reference is first.
    """

    column: Column
    capacity: str
    best: str
    behind: float


def published(results: Results, reference: str) -> list[str]:
    """The other methods as published, those that ignore budgets left out."""
    return [name for name in _rivals(results, reference) if not name.endswith(STRONG)]


def strengthened(results: Results, reference: str) -> list[str]:
    """The other methods with the tricks of :data:`framp_core.methods.STRENGTHENED`."""
    return [name for name in _rivals(results, reference) if name.endswith(STRONG)]


def cells(results: Results, reference: str, rivals: Sequence[str]) -> list[CellOf]:
    """Every column and size in which reference and rivals were measured, to one decimal.

    Two methods are compared by their means over the seeds that both have.

    Args:
        results: the finished runs.
        reference: whose place is asked.
        rivals: against whom; where they are shown level, the reference counts as first.
    """
    found = []
    for column in COLUMNS:
        for capacity in results.capacities:
            pairs = {name: shown_pair(results, reference, name, column, capacity) for name in rivals}
            behind = {name: round(pair[1] - pair[0], 1) for name, pair in pairs.items() if pair}
            if behind:
                best = max(behind, key=behind.__getitem__)
                found.append(CellOf(column, capacity, best, behind[best]))
    return found


@dataclass(frozen=True)
class SmallAgainstFull:
    """The reference's smallest submodels against full-size FedAvg on the same clients, Local, as fractions.

    Attributes:
        capacity: the smallest size.
        reference: mean over its clients and over the seeds that both have.
        full: FedAvg's on the same clients.
        full_overall: FedAvg's over all clients.
    """

    capacity: str
    reference: float
    full: float
    full_overall: float

    @property
    def reached(self) -> bool:
        """Whether the small submodels do at least as well as the full model on the same clients."""
        return self.reference >= self.full

    @classmethod
    def of(cls, results: Results, reference: str) -> "SmallAgainstFull | None":
        """None without FedAvg or without Local results."""
        capacity = results.capacities[0]
        own, full = results.on_common_seeds((reference, FULL_SIZE), "local", capacity)
        _, overall = results.on_common_seeds((reference, FULL_SIZE), "local", MEAN)
        return cls(capacity, fmean(own), fmean(full), fmean(overall)) if own and overall else None


def _rivals(results: Results, reference: str) -> list[str]:
    return [
        name
        for name in results.methods
        if name != reference and not is_ablation(name, reference) and not METHODS[name].ignores_budget
    ]
