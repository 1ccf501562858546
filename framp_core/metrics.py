"""Accuracy of clients, and what is said about a size from it (DESIGN section 5).

A row counts the examples of one client, so rows can be collected in any order and from any number of workers. Every
client weighs the same, however many examples it has.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from framp_core.config_values import parse_capacity
from framp_core.errors import ProtocolError

Role = Literal["train", "unseen"]
Population = Literal["local", "union", "validation"]
Moment = Literal["before", "after"]
Column = Literal["local", "union", "unseen", "validation"]

POPULATIONS: tuple[Population, ...] = ("local", "validation", "union")
COLUMNS: tuple[Column, ...] = ("local", "union", "unseen", "validation")
MEAN = "mean"


@dataclass(frozen=True)
class ClientAccuracy:
    """One measurement of one client's own submodel.

    Attributes:
        client: name of the client.
        role: whether the client trains, or is only evaluated ("unseen").
        capacity: gamma as a fraction, such as ``"1/16"``.
        round: training rounds before the measurement.
        population: data it was measured on: the client's own test data, the union of all clients' test data, or
            the client's own validation data.
        moment: before or after local fine-tuning.
        correct: examples classified correctly.
        total: examples, >= 1.

    Raises:
        ProtocolError: the counts contradict each other.
    """

    client: str
    role: Role
    capacity: str
    round: int
    population: Population
    moment: Moment
    correct: int
    total: int

    def __post_init__(self) -> None:
        _check_counts(self.client, self.population, [self.correct], self.total)

    @classmethod
    def read(cls, row: Mapping[str, Any], round: int) -> Self:
        """From a row of an event, or of clients.csv."""
        return cls(
            client=row["client"],
            role=row["role"],
            capacity=row["capacity"],
            round=round,
            population=row["population"],
            moment=row["moment"],
            correct=int(row["correct"]),
            total=int(row["total"]),
        )

    @property
    def accuracy(self) -> float:
        """Fraction of the examples classified correctly, in [0, 1]."""
        return self.correct / self.total

    @property
    def column(self) -> Column | None:
        """Column of the results table; None for what no column shows (an unseen client on the union)."""
        return column_of(self.role, self.population)


@dataclass(frozen=True)
class PriorCounts:
    """One client's submodel under several strengths of the class prior, counted in one pass over the same examples.

    Attributes:
        client: name of the client.
        role: whether the client trains, or is only evaluated ("unseen").
        capacity: gamma as a fraction.
        population: data it was measured on.
        correct: examples classified correctly at each strength, ``evaluation.prior-strengths`` in order.
        total: examples, >= 1.

    Raises:
        ProtocolError: the counts contradict each other.
    """

    client: str
    role: Role
    capacity: str
    population: Population
    correct: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        _check_counts(self.client, self.population, self.correct, self.total)

    @property
    def column(self) -> Column | None:
        """Column of the results table; see :attr:`ClientAccuracy.column`."""
        return column_of(self.role, self.population)


@dataclass(frozen=True)
class PriorCurve:
    """What the strength of the class prior at deployment does, from the content of prior_curve.json.

    Attributes:
        strengths: of the prior, ascending.
        clients: counts of every client and population.
    """

    strengths: tuple[float, ...]
    clients: tuple[PriorCounts, ...]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """Read the content of prior_curve.json."""
        rows = [{**row, "correct": tuple(row["correct"])} for row in content["clients"]]
        return cls(tuple(content["strengths"]), tuple(PriorCounts(**row) for row in rows))

    def mean(self, column: Column, capacity: str) -> list[float]:
        """Mean accuracy over the clients of a size (or ``"mean"``: all) at each strength; empty if there are none."""
        rows = [row for row in self.clients if row.column == column and capacity in (MEAN, row.capacity)]
        shares = [[count / row.total for count in row.correct] for row in rows]
        return [math.fsum(each) / len(rows) for each in zip(*shares, strict=True)]


def accuracies(event: Mapping[str, Any]) -> list[ClientAccuracy]:
    """The measurements in one ``"evaluate"`` event."""
    return [ClientAccuracy.read(row, event["round"]) for row in event["accuracies"]]


def column_of(role: Role, population: Population) -> Column | None:
    """Column of the results table that a measurement counts in; None for an unseen client on the union."""
    if role == "train":
        return population
    return "unseen" if population == "local" else None


def _check_counts(client: str, population: str, correct: Sequence[int], total: int) -> None:
    for count in correct:
        if not 0 <= count <= total or total < 1:
            raise ProtocolError(
                f"{client} reports {count} correct of {total} {population} examples; "
                "expected at least one example and 0 <= correct <= total"
            )


@dataclass(frozen=True)
class Spread:
    """Accuracy over clients, each client weighing the same.

    Attributes:
        mean: mean over clients, in [0, 1].
        std: population standard deviation over clients.
        worst_decile: mean over the worst tenth of the clients, rounded up to whole clients.
        clients: clients covered.
    """

    mean: float
    std: float
    worst_decile: float
    clients: int

    @classmethod
    def over(cls, accuracies: Sequence[float]) -> "Spread | None":
        """Statistics of at least one client's accuracy; None for no client. The order does not matter."""
        if not accuracies:
            return None
        ordered, count = sorted(accuracies), len(accuracies)
        mean = math.fsum(ordered) / count
        worst = ordered[: math.ceil(count / 10)]
        return cls(
            mean=mean,
            std=math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / count),
            worst_decile=math.fsum(worst) / len(worst),
            clients=count,
        )


@dataclass(frozen=True)
class SizeSummary:
    """One row of the results table; a column without a client is None.

    Attributes:
        capacity: gamma as a fraction, or ``"mean"`` for all clients together.
        local: training clients on their own test data.
        union: training clients on the union of all clients' test data.
        unseen: clients that never trained, on their own test data.
        validation: training clients on their own validation data.
    """

    capacity: str
    local: Spread | None
    union: Spread | None
    unseen: Spread | None
    validation: Spread | None

    def column(self, name: Column) -> Spread | None:
        """The spread of one column."""
        spread: Spread | None = getattr(self, name)
        return spread


def by_capacity(capacities: Iterable[str]) -> list[str]:
    """Distinct capacities in ascending order, as they are written.

    Raises:
        ConfigError: one is none.
    """
    return sorted(set(capacities), key=parse_capacity)


def summarise(rows: Iterable[ClientAccuracy]) -> list[SizeSummary]:
    """Summarise one evaluation: one row per capacity, ascending, then ``"mean"`` over all clients.

    Args:
        rows: measurements of one round and one moment, in any order. No rows give the mean row alone, all None.

    Raises:
        ValueError: rows of several rounds or moments, or a client twice in one population.
    """
    rows = list(rows)
    if len({(row.round, row.moment) for row in rows}) > 1:
        raise ValueError("summarise() was given several rounds or moments; pass the rows of one evaluation")
    if len({(row.client, row.population) for row in rows}) < len(rows):
        raise ValueError("summarise() was given a client twice in one population; pass one row for each")
    sizes = by_capacity(row.capacity for row in rows)
    return [_summary(size, [row for row in rows if row.capacity == size]) for size in sizes] + [_summary(MEAN, rows)]


def _summary(capacity: str, rows: Sequence[ClientAccuracy]) -> SizeSummary:
    local, union, unseen, validation = (
        Spread.over([row.accuracy for row in rows if row.column == column]) for column in COLUMNS
    )
    return SizeSummary(capacity, local, union, unseen, validation)
