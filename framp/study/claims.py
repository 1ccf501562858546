"""What holds in a setting across its sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from framp.compare.results import Results
from framp.compare.statistics import COLUMNS
from framp_core.methods import METHODS, STRONG, is_ablation
from framp_core.metrics import MEAN, Column
from framp_core.report.tables import percent

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
    """Every column and size in which reference and rivals were measured, mean over seeds, to one decimal.

    Args:
        results: the finished runs.
        reference: whose place is asked.
        rivals: against whom; where they are shown level, the reference counts as first.
    """
    found = []
    for column in COLUMNS:
        for capacity in results.capacities:
            own = _shown(results, reference, column, capacity)
            others = {name: shown for name in rivals if (shown := _shown(results, name, column, capacity)) is not None}
            if own is not None and others:
                best = max(others, key=others.__getitem__)
                found.append(CellOf(column, capacity, best, round(others[best] - own, 1)))
    return found


@dataclass(frozen=True)
class SmallAgainstFull:
    """The reference's smallest submodels against full-size FedAvg on the same clients, Local, as fractions.

    Attributes:
        capacity: the smallest size.
        reference: mean over its clients and over seeds.
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
        places = ((reference, capacity), (FULL_SIZE, capacity), (FULL_SIZE, MEAN))
        values = [results.over_seeds(name, "local", size) for name, size in places]
        return cls(capacity, *map(fmean, values)) if all(values) else None


def _rivals(results: Results, reference: str) -> list[str]:
    return [
        name
        for name in results.methods
        if name != reference and not is_ablation(name, reference) and not METHODS[name].ignores_budget
    ]


def _shown(results: Results, method: str, column: Column, capacity: str) -> float | None:
    values = results.over_seeds(method, column, capacity)
    return float(percent(fmean(values))) if values else None
