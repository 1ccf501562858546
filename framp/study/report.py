"""What a study writes: study.md over all settings, and an export for the documentation."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from framp.compare import tables
from framp.compare.report import (
    Compared,
    ablation_section,
    accuracy_note,
    content,
    mean_over_seeds,
    sentence,
    test_note,
)
from framp.compare.results import Results
from framp.compare.statistics import COLUMNS
from framp.study.claims import SmallAgainstFull, cells, published, strengthened
from framp.study.plan import PlannedSetting, Study
from framp_core import files
from framp_core.errors import RunFolderError
from framp_core.methods import METHODS
from framp_core.metrics import MEAN
from framp_core.report.figures import FOLDER, POPULATIONS
from framp_core.report.tables import MISSING, Cell, Table, percent

MARKDOWN, JSON, CSV = "study.md", "study.json", "study.csv"
FIGURES = ("accuracy_by_size", "prior_curve", "learning_curves", "prototypes")
CSV_KEYS = tuple(f"{column}{part}" for column in COLUMNS for part in ("", "_std", "_seeds"))


@dataclass(frozen=True)
class Part:
    """One setting and what came of it."""

    setting: PlannedSetting
    compared: Compared

    @property
    def reference(self) -> str:
        """Key of the reference."""
        return self.setting.comparison.reference

    @property
    def results(self) -> Results:
        """The finished runs."""
        return self.compared.results


def write_study(study: Study, parts: Sequence[Part]) -> Path:
    """Write study.md, study.json and study.csv into the study's folder.

    None of them names a path of this machine.

    Args:
        study: what was asked for.
        parts: its settings with a finished run, in order.

    Returns:
        The path of study.md.
    """
    done = {part.setting.name for part in parts}
    page = [
        f"# {study.title}", *([study.text.strip()] if study.text else []), f"```bash\n{study.command}\n```",
        *(f"> Setting {each.name} is missing: it failed, or it is not done yet."
          for each in study.settings if each.name not in done),
        "## Overview", *_overview(parts),
        *(text for part in parts for text in _section(part)),
        *_reading(parts),
    ]  # fmt: skip
    files.write_text(study.out / JSON, json.dumps(_content(study, parts), indent=1) + "\n")
    files.write_text(study.out / CSV, _csv(parts))
    files.write_text(study.out / MARKDOWN, "\n\n".join(page) + "\n")
    return study.out / MARKDOWN


def export_study(study: Study, target: Path) -> Path:
    """Copy page, figures and data of a finished study, none of which names a path of this machine.

    Args:
        study: whose folder holds study.md.
        target: folder to write, such as ``docs/results/NAME``; files of the same names are replaced.

    Returns:
        The path of the copied study.md.

    Raises:
        RunFolderError: the target cannot be written.
    """
    names = [Path(name) for name in (MARKDOWN, JSON, CSV)]
    for setting in study.settings:
        names += [Path(setting.name, FOLDER, f"{figure}.png") for figure in FIGURES]
    try:
        for name in names:
            if files.has_file(study.out / name):
                target.mkdir(parents=True, exist_ok=True)
                for folder in reversed(name.parents[:-1]):
                    files.make_folder(target / folder)
                files.write_bytes(target / name, files.read_bytes(study.out / name))
    except OSError as error:
        raise RunFolderError(f"{str(target)!r} cannot be written ({error}); give --export a folder that can") from error
    return target / MARKDOWN


def summary_tables(parts: Sequence[Part]) -> list[tables.Uncut]:
    """The overview for the terminal."""
    return [tables.Uncut(titled) for titled in _overview_tables(parts)]


def _overview(parts: Sequence[Part]) -> list[str]:
    said = (
        "Mean over all clients and over seeds, in percent, of the reference, and the cells (column and size) in which "
        "it is first of the methods that keep to the budget, shown with one decimal, ties counting as first."
    )
    return [said, *(f"**{each.title}**\n\n{tables.markdown(each.table)}" for each in _overview_tables(parts))]


def _overview_tables(parts: Sequence[Part]) -> list[tables.Titled]:
    headings = ("Setting", "Reference", *(POPULATIONS[column][0] for column in COLUMNS))
    rows = tuple(
        (Cell(part.setting.title), Cell(tables.title(part.reference)),
         *(tables.over_seeds(part.results.over_seeds(part.reference, column, MEAN)) for column in COLUMNS))
        for part in parts
    )  # fmt: skip
    claims = tuple((Cell(part.setting.title), *_claims(part)) for part in parts)
    claimed = ("Setting", "First, as published", "First, strengthened", "Smallest size", "Full-size FedAvg", "Reached")
    return [
        tables.Titled("Accuracy of the reference, %", Table(headings, rows, labels=2)),
        tables.Titled("Where the reference is first; its smallest size against full-size FedAvg, Local, %",
                      Table(claimed, claims)),
    ]  # fmt: skip


def _claims(part: Part) -> tuple[Cell, ...]:
    groups = (published(part.results, part.reference), strengthened(part.results, part.reference))
    counts = []
    for rivals in groups:
        found = cells(part.results, part.reference, rivals)
        first = sum(cell.behind <= 0 for cell in found)
        counts.append(Cell(f"{first} of {len(found)}" if found else MISSING))
    small = SmallAgainstFull.of(part.results, part.reference)
    if small is None:
        return (*counts, Cell(MISSING), Cell(MISSING), Cell(MISSING))
    reached = Cell("yes" if small.reached else "no", f"({tables.points(small.reference - small.full)})")
    return (*counts, Cell(percent(small.reference)), Cell(percent(small.full)), reached)


def _section(part: Part) -> list[str]:
    setting, compared = part.setting, part.compared
    comparison = compared.comparison
    own = ", ".join(f"`{key}={value}`" for key, value in setting.comparison.public_overrides().items())
    parts = [f"## {setting.title}", *([setting.text.strip()] if setting.text else []),
             f"{sentence(comparison, compared.results)} Settings over the preset "
             f"{comparison.preset.stem if comparison.preset else 'digits'}: {own or 'none'}. {_rates(part)}",
             *(f"> {note}" for note in compared.notes)]  # fmt: skip
    accuracies = [*tables.accuracy_tables(compared.shown, part.reference), *tables.prior_tables(compared.shown)]
    parts += [f"**{each.title}**\n\n{tables.markdown(each.table, each.best)}" for each in accuracies]
    parts += _first_places(part) + _small(part)
    if compared.against:
        name = METHODS[part.reference].title
        parts.append(f"**{name} against the others, points, all sizes together**")
        parts.append(tables.markdown(tables.overall_table(compared.against, "Against")))
    parts += ablation_section(compared, "###")
    return parts + [
        f"![{drawn.title}]({setting.name}/{FOLDER}/{drawn.path.name})\n\n{drawn.caption}"
        for drawn in compared.figures
        if drawn.path.stem in FIGURES
    ]


def _rates(part: Part) -> str:
    tuning = part.compared.tuning
    rates = {
        tables.title(name): sorted({run.learning_rate for run in part.results.of(name)})
        for name in part.results.methods
    }
    listed = "; ".join(f"{name} {', '.join(f'{rate:g}' for rate in found)}" for name, found in rates.items())
    if tuning is None:
        return f"Learning rates, not tuned: {listed}."
    where = f"in the setting {tuning.setting}" if tuning.setting else "here"
    rounds = f", after {tuning.plan.rounds} rounds" if tuning.plan.rounds else ""
    edge = [tables.title(name) for name in tuning.at_edge()]
    warned = f" At the edge of the grid, beyond which a better one may lie: {', '.join(edge)}." if edge else ""
    return (
        f"Learning rates, chosen {where} from {', '.join(f'{rate:g}' for rate in tuning.plan.grid)} by validation "
        f"accuracy on seed {tuning.plan.seed}{rounds}: {listed}.{warned}"
    )


def _first_places(part: Part) -> list[str]:
    said = []
    groups = {
        "the methods as published": published(part.results, part.reference),
        "the strengthened methods": strengthened(part.results, part.reference),
    }
    for who, rivals in groups.items():
        found = cells(part.results, part.reference, rivals)
        behind = [cell for cell in found if cell.behind > 0]
        if not found:
            continue
        where = "; ".join(
            f"{POPULATIONS[cell.column][0]} {cell.capacity} ({tables.title(cell.best)} by {cell.behind:.1f})"
            for cell in behind
        )
        first = f"- Against {who}: first in {len(found) - len(behind)} of {len(found)} cells"
        said.append(f"{first}. Not first: {where}." if behind else f"{first}.")
    return ["\n".join(said)] if said else []


def _small(part: Part) -> list[str]:
    small = SmallAgainstFull.of(part.results, part.reference)
    if small is None:
        return []
    word = "reaches" if small.reached else "does not reach"
    return [
        f"- {METHODS[part.reference].title} at {small.capacity} {word} full-size FedAvg's Local: "
        f"{percent(small.reference)} against {percent(small.full)} on the same clients "
        f"(FedAvg on all clients: {percent(small.full_overall)})."
    ]


def _reading(parts: Sequence[Part]) -> list[str]:
    """What every table of the page means, once."""
    if not parts:
        return []
    methods = dict.fromkeys(name for part in parts for name in part.results.methods)
    tested = any(part.compared.against for part in parts)
    return [
        "## Reading this page",
        accuracy_note("mean ± standard deviation over seeds", _prior(parts), methods),
        *([test_note("all tests of a setting against other methods")] if tested else []),
    ]


def _prior(parts: Sequence[Part]) -> str:
    """Which logits get the client's class prior, with the settings in which that is not as usual."""
    local, union = [], []
    for part in parts:
        comparison = part.setting.comparison
        evaluation = comparison.config(part.reference, comparison.seeds[0], comparison.out).evaluation
        if evaluation.local_prior_strength != 1:
            local.append(f"{evaluation.local_prior_strength:g} in {part.setting.title}")
        if evaluation.union_prior_strength != 0:
            union.append(f"{evaluation.union_prior_strength:g} in {part.setting.title}")
    return (
        "Local and Unseen: the client's log class prior is added to every method's logits, with strength "
        f"{'; '.join(['1', *local])} (`evaluation.local-prior-strength`). Union: no prior"
        f"{'; strength ' + '; '.join(union) if union else ''}."
    )


def _content(study: Study, parts: Sequence[Part]) -> dict[str, Any]:
    settings = {}
    for part in parts:
        data = content(part.compared)
        rates = {name: sorted({run.learning_rate for run in part.results.of(name)}) for name in part.results.methods}
        kept = {key: value for key, value in data.items() if key != "runs"}
        overrides = part.setting.comparison.public_overrides()
        settings[part.setting.name] = {
            "title": part.setting.title, "overrides": overrides, "learning_rates": rates,
            "code": sorted({run.fingerprint for run in part.results.runs}), **kept,
        }  # fmt: skip
    return {"title": study.title, "command": study.command, "settings": settings}


def _csv(parts: Sequence[Part]) -> str:
    """One line per setting, method and size: mean and standard deviation over seeds."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "method", "capacity", *CSV_KEYS])
    for part in parts:
        for name in part.results.methods:
            for capacity in (*part.results.capacities, MEAN):
                row = mean_over_seeds(part.results, name, capacity)
                writer.writerow([part.setting.name, name, capacity, *(row[key] for key in CSV_KEYS)])
    return text.getvalue()
