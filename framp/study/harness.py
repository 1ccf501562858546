"""A study from its settings to its page."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from framp.compare.harness import carry_out, raise_for
from framp.compare.runner import Failure
from framp.compare.tuning import Tuning, TuningPlan
from framp.study.plan import PlannedSetting, Study
from framp.study.report import Part, export_study, summary_tables, write_study
from framp_core.errors import EngineError, FrampError, RunFolderError


def run_study(study: Study, workers: int | None, console: Console, export: Path | None = None) -> Path:
    """Do what is missing of a study, setting by setting, and write its page after each of them.

    A setting that fails does not stop the others.

    Args:
        study: what is asked for.
        workers: runs at a time; None: one per core.
        console: where progress and the summary are shown.
        export: folder for a copy of page, figures and data, see :func:`framp.study.report.export_study`; None: none.

    Returns:
        The path of study.md.

    Raises:
        RunFolderError: the study's folder or the export cannot be written.
        EngineError: settings or runs failed; what the others gave is written and exported all the same.
    """
    try:
        study.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{str(study.out)!r} cannot be written ({error}); give --out a folder that can") from error
    parts: list[Part] = []
    failures: list[Failure] = []
    stopped: list[str] = []
    tuned: dict[str, Tuning] = {}
    for number, setting in enumerate(study.settings, start=1):
        console.rule(f"{number}/{len(study.settings)} {setting.name}", align="left")
        if setting.tuned_in and setting.tuned_in not in tuned:
            console.print(f"left out: no run of {setting.tuned_in} finished, so it chose no learning rates")
            continue
        try:
            compared, failed = carry_out(setting.comparison, rates_of(setting, tuned), workers, console)
        except FrampError as error:
            console.print(f"{type(error).__name__}: {error}", highlight=False, markup=False, soft_wrap=True)
            stopped.append(f"setting {setting.name!r}: {error}")
            continue
        failures += failed
        if compared:
            parts.append(Part(setting, compared))
            tuned |= {setting.name: compared.tuning} if compared.tuning else {}
            write_study(study, parts)
    written = write_study(study, parts)
    for each in summary_tables(parts):
        console.print()
        console.print(each, crop=False)
    console.print(f"study: {written}", markup=False, soft_wrap=True)
    if export is not None and parts:
        console.print(f"exported: {export_study(study, export)}", markup=False, soft_wrap=True)
    if stopped:
        raise EngineError("; ".join([*stopped, *(f"run {failure.run} failed" for failure in failures)]))
    raise_for(failures, study.out)
    return written


def rates_of(setting: PlannedSetting, tuned: Mapping[str, Tuning]) -> TuningPlan | Tuning | None:
    """How a setting chooses its learning rates, or the ones that an earlier setting chose.

    Args:
        setting: which setting.
        tuned: what earlier settings chose, by their names.
    """
    if not setting.tuned_in:
        return setting.plan
    found = tuned[setting.tuned_in]
    scores = {name: found.validation[name] for name in setting.comparison.tuned}
    return replace(found, validation=scores, failures=(), setting=setting.tuned_in)
