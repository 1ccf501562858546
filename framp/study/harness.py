"""A study from its settings to its page."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from framp.compare.harness import carry_out, raise_for
from framp.compare.runner import Failure
from framp.compare.tuning import Tuning, TuningPlan
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
    tuned: dict[str, Tuning] = {}
    for number, setting in enumerate(study.settings, start=1):
        console.rule(f"{number}/{len(study.settings)} {setting.name}", align="left")
        if setting.tuned_in and setting.tuned_in not in tuned:
            console.print(f"left out: no run of {setting.tuned_in} finished, so it chose no learning rates")
            continue
        compared, failed = carry_out(setting.comparison, rates_of(setting, tuned), workers, console)
        failures += failed
        if compared:
            parts.append(Part(setting, compared))
            tuned |= {setting.name: compared.tuning} if compared.tuning else {}
    written = write_study(study, parts)
    for each in summary_tables(parts):
        console.print()
        console.print(each, crop=False)
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
