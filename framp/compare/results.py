"""What the finished runs of a comparison say, read from their folders alone."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from framp.compare.plan import PlannedRun
from framp_core.errors import RunFolderError
from framp_core.methods import METHODS
from framp_core.metrics import MEAN, ClientAccuracy, Column, PriorCurve, by_capacity, summarise
from framp_core.run_folder import ENVIRONMENT, MANIFEST, MASKS, PRIOR_CURVE, SUMMARY, RunFolder

UNSEEN: Column = "unseen"


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        method: key of :data:`framp_core.methods.METHODS`.
        seed: root seed.
        learning_rate: of the clients.
        summary: content of summary.json.
        rows: measurements before fine-tuning, of every evaluated round.
        masks: content of masks.json, or None.
        partition: digest of the partition.
        fingerprint: of the code that made it.
        priors: content of prior_curve.json, or None.
        prototypes: of the rounds that were kept, see :meth:`framp_core.run_folder.RunFolder.prototypes`.
    """

    method: str
    seed: int
    learning_rate: float
    summary: dict[str, Any]
    rows: tuple[ClientAccuracy, ...]
    masks: dict[str, Any] | None
    partition: str
    fingerprint: str
    priors: PriorCurve | None = None
    prototypes: Mapping[int, Mapping[str, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def read(cls, run: PlannedRun) -> Self:
        """Read the folder of a finished run.

        Raises:
            RunFolderError: a file is missing or damaged.
        """
        folder = RunFolder.open(run.folder)
        return cls(
            method=run.method,
            seed=run.config.seed,
            learning_rate=run.config.local.learning_rate,
            summary=folder.json(SUMMARY),
            rows=tuple(row for row in folder.clients() if row.moment == "before"),
            masks=folder.json(MASKS) if folder.has(MASKS) else None,
            partition=folder.json(MANIFEST)["digest"],
            fingerprint=folder.json(ENVIRONMENT)["fingerprint"],
            priors=PriorCurve.of(folder.json(PRIOR_CURVE)) if folder.has(PRIOR_CURVE) else None,
            prototypes=folder.prototypes(),
        )

    def as_served(self) -> Self:
        """The same without the column "unseen" if the method has no model for a client that never trained."""
        if METHODS[self.method].serves_unseen:
            return self
        rows = [{**row, **{key: None for key in row if key.startswith(UNSEEN)}} for row in self.summary["rows"]]
        priors = self.priors and replace(
            self.priors, clients=tuple(row for row in self.priors.clients if row.column != UNSEEN)
        )
        kept = tuple(row for row in self.rows if row.column != UNSEEN)
        return replace(self, summary={**self.summary, "rows": rows}, rows=kept, priors=priors)

    def row(self, capacity: str) -> dict[str, Any] | None:
        """The row of the results table for a size, or for ``"mean"``."""
        return next((row for row in self.summary["rows"] if row["capacity"] == capacity), None)

    @cached_property
    def last(self) -> list[ClientAccuracy]:
        """The measurements of the last evaluation."""
        return [row for row in self.rows if row.round == self.summary["evaluated_round"]]

    def curve(self, column: Column) -> list[tuple[int, float]]:
        """Evaluated rounds and the mean over clients there."""
        rounds = sorted({row.round for row in self.rows})
        spreads = [(each, summarise(row for row in self.rows if row.round == each)[-1].column(column))
                   for each in rounds]  # fmt: skip
        return [(each, spread.mean) for each, spread in spreads if spread is not None]


@dataclass(frozen=True)
class Results:
    """The finished runs of a comparison.

    Attributes:
        methods: those with a finished run, in the order that was asked for.
        seeds: those with a finished run, likewise.
        runs: one per method and seed; a pair may be missing.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[RunResult, ...]

    @classmethod
    def read(cls, planned: Sequence[PlannedRun]) -> Self:
        """Read those of the runs that are finished.

        Raises:
            RunFolderError: none is finished, the runs of a seed do not have the same partition, or a file is damaged.
        """
        runs = tuple(RunResult.read(run).as_served() for run in planned if run.is_finished())
        if not runs:
            raise RunFolderError("no run of this comparison is finished, so there is nothing to compare")
        for seed in {run.seed for run in runs}:
            _check_same_partition([run for run in runs if run.seed == seed])
        return cls(
            methods=tuple(dict.fromkeys(run.method for run in planned if run.method in {done.method for done in runs})),
            seeds=tuple(dict.fromkeys(run.seed for run in runs)),
            runs=runs,
        )

    def only(self, methods: Container[str]) -> Self:
        """The same without the other methods."""
        runs = tuple(run for run in self.runs if run.method in methods)
        return type(self)(tuple(name for name in self.methods if name in methods), self.seeds, runs)

    def of(self, method: str) -> list[RunResult]:
        """The runs of a method, by seed as asked for."""
        return [run for run in self.runs if run.method == method]

    @cached_property
    def capacities(self) -> list[str]:
        """Sizes of all runs, ascending."""
        return by_capacity(row.capacity for run in self.runs for row in run.rows)

    def accuracies(self, method: str, seed: int, column: Column, capacity: str) -> dict[str, float]:
        """Accuracy of each client at the last evaluation; empty if the run is missing.

        Args:
            method: which method.
            seed: which seed.
            column: which accuracy.
            capacity: size of the clients, or ``"mean"`` for all.
        """
        return {
            row.client: row.accuracy
            for run in self.of(method)
            if run.seed == seed
            for row in run.last
            if row.column == column and capacity in (MEAN, row.capacity)
        }

    def over_seeds(self, method: str, key: str, capacity: str) -> list[float]:
        """One number of the results table for each seed of a method, where it is known."""
        return list(self._by_seed(method, key, capacity).values())

    def on_common_seeds(self, methods: Sequence[str], key: str, capacity: str) -> list[list[float]]:
        """One number of the results table by method and seed, for the seeds in which all of the methods have it."""
        found = [self._by_seed(name, key, capacity) for name in methods]
        common = [seed for seed in self.seeds if all(seed in each for each in found)]
        return [[each[seed] for seed in common] for each in found]

    def _by_seed(self, method: str, key: str, capacity: str) -> dict[int, float]:
        rows = [(run.seed, run.row(capacity)) for run in self.of(method)]
        return {seed: float(row[key]) for seed, row in rows if row is not None and row[key] is not None}

    @cached_property
    def strengths(self) -> list[float]:
        """Strengths of the class prior that runs were measured at, ascending."""
        return sorted({strength for run in self.runs if run.priors for strength in run.priors.strengths})

    def at_strength(self, method: str, column: Column, capacity: str, strength: float) -> list[float]:
        """Mean accuracy over clients for each seed of a method, at one strength of the class prior."""
        curves = [
            (run.priors.strengths.index(strength), run.priors.mean(column, capacity))
            for run in self.of(method)
            if run.priors and strength in run.priors.strengths
        ]
        return [means[place] for place, means in curves if means]


def _check_same_partition(runs: Sequence[RunResult]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.partition != first.partition:
            raise RunFolderError(
                f"{run.method} and {first.method} have different partitions for seed {first.seed} "
                f"({run.partition[:12]} and {first.partition[:12]}), so their clients cannot be compared; "
                "was the data set changed between the runs? Remove the older one and do it again"
            )
