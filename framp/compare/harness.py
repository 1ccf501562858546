"""A comparison from its runs to its report."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from framp.compare.plan import Comparison
from framp.compare.report import MARKDOWN, Compared, print_comparison, write_comparison, write_tuning
from framp.compare.results import Results
from framp.compare.runner import Failure, execute
from framp.compare.tuning import Tuning, TuningPlan, tune
from framp_core.data import require_output_outside
from framp_core.errors import EngineError, RunFolderError


def compare_methods(comparison: Comparison, plan: TuningPlan | None, workers: int | None, console: Console) -> Path:
    """Do what is missing of a comparison, write its tables and figures, and print the tables.

    Args:
        comparison: what is compared.
        plan: how learning rates are chosen; None: they stay as configured.
        workers: runs at a time; None: one per core.
        console: where progress and tables are shown.

    Returns:
        The path of comparison.md.

    Raises:
        ConfigError: the settings of a run are invalid; then nothing is started.
        RunFolderError: a run's folder holds something else, or another process works on this comparison.
        EngineError: runs failed; what the others gave is written all the same.
    """
    compared, failures = carry_out(comparison, plan, workers, console)
    if compared:
        print_comparison(console, compared)
    raise_for(failures, comparison.out)
    return comparison.out / MARKDOWN


def carry_out(
    comparison: Comparison, plan: TuningPlan | Tuning | None, workers: int | None, console: Console
) -> tuple[Compared | None, list[Failure]]:
    """Do what is missing of a comparison, and write its tables and figures.

    Args:
        comparison: what is compared.
        plan: how learning rates are chosen, or the ones that were chosen elsewhere; None: they stay as configured.
        workers: runs at a time; None: one per core.
        console: where progress is shown.

    Returns:
        What was written, None if no run finished; and the runs that failed. A tuning run does not count there if its
        method has another rate: the method goes on with that one, and the page has a note.

    Raises:
        ConfigError: the settings of a run are invalid; then nothing is started.
        DataError: the folder lies among the images that are read.
        RunFolderError: a run's folder holds something else, or another process works on this comparison.
    """
    require_output_outside(comparison.runs()[0].config)
    with _alone(comparison.out):
        tuning = tune(comparison, plan, workers, console) if isinstance(plan, TuningPlan) else plan
        tried = list(tuning.failures) if tuning and tuning is not plan else []
        if tuning:
            write_tuning(comparison, tuning)
        runs = comparison.runs(tuning.rates(comparison) if tuning else None)
        failed = execute(runs, workers, console)
        failures = [*(tuning.missed(tried) if tuning else []), *failed]
        # A failed run's folder may hold what cannot be read, or another run.
        sound = [run for run in runs if run.name not in {failure.run for failure in failed}]
        if not any(run.is_finished() for run in sound):
            return None, failures
        return write_comparison(comparison, Results.read(sound), tuning, [*tried, *failed]), failures


def raise_for(failures: Sequence[Failure], out: Path) -> None:
    """Say which runs failed.

    Raises:
        EngineError: there are some.
    """
    if failures:
        names = ", ".join(failure.run for failure in failures)
        raise EngineError(
            f"{len(failures)} runs failed: {names}. Their logs lie beside their folders in {str(out)!r}; "
            "the same command does them again and keeps the others"
        )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time: a second one would take the first one's unfinished runs for interrupted ones."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(
            f"another framp compare works in {str(out)!r}; wait for it, or give another --out"
        ) from error
    except OSError as error:
        raise RunFolderError(f"{str(out)!r} cannot be written ({error}); give --out a folder that can") from error
    try:
        yield
    finally:
        lock.release()
