"""The learning rate of every method, from one grid, by validation accuracy on a seed that no test uses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console

from framp.compare.plan import LEARNING_RATE, Comparison, PlannedRun
from framp.compare.runner import Failure, execute
from framp_core.errors import ConfigError
from framp_core.metrics import MEAN
from framp_core.run_folder import SUMMARY, RunFolder

FOLDER = "tuning"
RATE = "-rate"


@dataclass(frozen=True)
class TuningPlan:
    """What is tried.

    Attributes:
        seed: of the tuning runs.
        grid: learning rates of the clients, ascending.
        rounds: of each tuning run; 0: as many as the comparison's.
    """

    seed: int
    grid: tuple[float, ...]
    rounds: int = 0

    @classmethod
    def of(cls, comparison: Comparison, grid: Sequence[float], seed: int | None = None, rounds: int = 0) -> Self:
        """Check what was asked for.

        Args:
            comparison: what is compared.
            grid: learning rates in any order.
            seed: the tuning seed; None: the largest seed of the comparison plus 1000.
            rounds: of each tuning run; 0: as many as the comparison's.

        Raises:
            ConfigError: the seed is one of the comparison's, the grid is empty, names a rate twice or one that is not
                finite and above 0, an override sets the learning rate, the clients have no validation data, or the
                settings of a tuning run are invalid.
        """
        rates = tuple(sorted(grid))
        seed = max(comparison.seeds) + 1000 if seed is None else seed
        if not rates or len(set(rates)) < len(rates):
            raise ConfigError(f"--grid {','.join(f'{rate:g}' for rate in rates)!r}: give one or more rates, each once")
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ConfigError(f"--grid {','.join(f'{rate:g}' for rate in rates)!r}: a rate is finite and above 0")
        if seed in comparison.seeds:
            raise ConfigError(f"--tuning-seed {seed} is also a test seed; tuning on it would choose by the test")
        if LEARNING_RATE in {key.replace("_", "-") for key in comparison.overrides}:
            raise ConfigError(f"--tune chooses {LEARNING_RATE}, and -o sets it; use one of the two")
        fraction = comparison.config(comparison.methods[0], seed, comparison.out).partition.validation_fraction
        if fraction == 0:
            raise ConfigError("--tune needs validation data: partition.validation-fraction is 0; set it, to 0.1 say")
        plan = cls(seed, rates, rounds)
        plan.runs(comparison)
        return plan

    def runs(self, comparison: Comparison) -> dict[tuple[str, float], PlannedRun]:
        """The tuning runs by method and rate, all methods with a rate before the next one.

        Raises:
            ConfigError: the settings of one are invalid.
        """
        return {
            (method, rate): _planned(comparison, method, rate, self)
            for rate in self.grid
            for method in comparison.tuned
        }


@dataclass(frozen=True)
class Tuning:
    """What was tried and chosen.

    Attributes:
        plan: grid and seed.
        validation: method -> mean validation accuracy over training clients, one per learning rate; None for a run
            that failed.
        failures: tuning runs that failed.
        setting: the setting of the study that it was done in, if that is another one.
    """

    plan: TuningPlan
    validation: dict[str, tuple[float | None, ...]]
    failures: tuple[Failure, ...]
    setting: str = ""

    @property
    def chosen(self) -> dict[str, float]:
        """Learning rate of each method: the best, the smaller of equals; none for a method whose runs all failed."""
        best = {}
        for method, scores in self.validation.items():
            known = [(score, -rate) for score, rate in zip(scores, self.plan.grid, strict=True) if score is not None]
            if known:
                best[method] = -max(known)[1]
        return best

    def missed(self, failures: Sequence[Failure]) -> list[Failure]:
        """Those of the failed tuning runs whose method has no rate at all."""
        return [failure for failure in failures if failure.run.rpartition(RATE)[0] not in self.chosen]

    def rates(self, comparison: Comparison) -> dict[str, float]:
        """Learning rate of each method of a comparison that has one, ablations included."""
        taken = {name: self.chosen.get(comparison.learning_rate_of(name)) for name in comparison.methods}
        return {name: rate for name, rate in taken.items() if rate is not None}

    def at_edge(self) -> list[str]:
        """Methods whose choice is the smallest or largest of the grid, so that a better one may lie outside."""
        return [method for method, rate in self.chosen.items() if rate in (self.plan.grid[0], self.plan.grid[-1])]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content of tuning.json."""
        return {
            "key": LEARNING_RATE,
            "seed": self.plan.seed,
            "grid": list(self.plan.grid),
            "rounds": self.plan.rounds or None,
            "setting": self.setting or None,
            "validation": {method: list(scores) for method, scores in self.validation.items()},
            "chosen": self.chosen,
        }


def tune(comparison: Comparison, plan: TuningPlan, workers: int | None, console: Console) -> Tuning:
    """Run every method but ablations with every learning rate of the plan; finished tuning runs are kept.

    Args:
        comparison: what is compared.
        plan: grid and seed.
        workers: see :func:`framp.compare.runner.execute`.
        console: where progress is shown.

    Raises:
        RunFolderError: see :func:`framp.compare.runner.execute`.
    """
    runs = plan.runs(comparison)
    failures = execute(list(runs.values()), workers, console, "tuning")
    failed = {failure.run for failure in failures}
    scores = {key: None if run.name in failed else _validation(run) for key, run in runs.items()}
    validation = {method: tuple(scores[method, rate] for rate in plan.grid) for method in comparison.tuned}
    return Tuning(plan, validation, tuple(failures))


def _planned(comparison: Comparison, method: str, rate: float, plan: TuningPlan) -> PlannedRun:
    folder = comparison.out / FOLDER / f"{method}{RATE}{rate:g}"
    config = comparison.config(method, plan.seed, folder, rate)
    return PlannedRun(method, config.model_copy(update={"rounds": plan.rounds or config.rounds}))


def _validation(run: PlannedRun) -> float | None:
    if not run.is_finished():
        return None
    rows = RunFolder.open(run.folder).json(SUMMARY)["rows"]
    score: float | None = next(row for row in rows if row["capacity"] == MEAN)["validation"]
    return score
