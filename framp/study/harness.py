"""A study from its settings to its page."""

from pathlib import Path

from rich.console import Console

from framp.compare.harness import carry_out, raise_for
from framp.compare.runner import Failure
from framp.compare.tuning import Tuning, TuningPlan, tune
from framp.study.plan import PlannedSetting, Study
from framp.study.report import Part, summary_tables, write_study


def run_study(study: Study, workers: int | None, console: Console) -> Path:
    """Do what is missing of a study, setting by setting, and write its page.

    A setting whose runs fail does not stop the others.

    Args:
        study: what is asked for.
        workers: runs at a time; None: one per core.
        console: where progress and the summary are shown.

    Returns:
        The path of study.md.

    Raises:
        RunFolderError: a run's folder holds something else, or another process works on a setting.
        EngineError: runs failed; what the others gave is written all the same.
    """
    parts: list[Part] = []
    failures: list[Failure] = []
    for number, setting in enumerate(study.settings, start=1):
        console.rule(f"{number}/{len(study.settings)} {setting.name}", align="left")
        compared, failed = carry_out(setting.comparison, _rates(study, setting, workers, console), workers, console)
        parts += [Part(setting, compared)] if compared else []
        failures += failed
    written = write_study(study, parts)
    for each in summary_tables(parts):
        console.print()
        console.print(each, crop=False)
    raise_for(failures, study.out)
    return written


def _rates(study: Study, setting: PlannedSetting, workers: int | None, console: Console) -> TuningPlan | Tuning | None:
    """How this setting chooses its learning rates, or the ones that an earlier setting chose: its runs are done."""
    if not setting.tuned_in:
        return setting.plan
    source, plan = next((each, each.plan) for each in study.settings if each.name == setting.tuned_in and each.plan)
    found = tune(source.comparison, plan, workers, console)
    methods = setting.comparison.methods
    return Tuning(found.plan, {name: found.validation[name] for name in methods}, (), source.name)
