"""What a comparison writes: comparison.md with its figures, comparison.json, comparison.csv."""

import csv
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from framp.compare import tables
from framp.compare.figures import draw_figures
from framp.compare.plan import LEARNING_RATE, PRESETS, Comparison
from framp.compare.results import Results
from framp.compare.runner import Failure
from framp.compare.statistics import COLUMNS, LEVEL, MINIMUM_PAIRS, RESAMPLES, PairedTest, compare
from framp.compare.tuning import Tuning
from framp_core.methods import METHODS
from framp_core.metrics import MEAN
from framp_core.report.figures import FOLDER, Drawn
from framp_core.report.tables import human_seconds

MARKDOWN, JSON, CSV, TUNING = "comparison.md", "comparison.json", "comparison.csv", "tuning.json"
CSV_KEYS = (
    *(f"{column}{part}" for column in (*COLUMNS, "validation") for part in ("", "_std", "_clients")),
    "bytes_down",
    "bytes_up",
    "parameters_held",
)


def write_comparison(
    comparison: Comparison, results: Results, tuning: Tuning | None, failures: Sequence[Failure], console: Console
) -> Path:
    """Write everything that is said about a comparison, and print its tables.

    Args:
        comparison: what was asked for.
        results: the finished runs.
        tuning: how the learning rates were chosen, or None if they were not.
        failures: runs that did not finish.
        console: where the tables go.

    Returns:
        The path of comparison.md.
    """
    tests = compare(results, comparison.reference)
    notes = _notes(comparison, results, failures)
    figures = draw_figures(comparison.out, results, comparison.reference)
    parts = [
        f"# {_subject(comparison)}", _sentence(comparison, results), f"```bash\n{command(comparison, tuning)}\n```",
        *(f"> {note}" for note in notes),
        "## Methods", tables.markdown(tables.method_table(results, tuning)), *_tuning(tuning),
        "## Accuracy", _accuracy_note(comparison, results), *_titled(tables.accuracy_tables(results)),
        f"## {_name(comparison)} against the others", *_tests(results, tests),
        "## What it costs", _COST_NOTE, *_titled(tables.cost_tables(results)),
        "## Figures", *map(_figure, figures),
    ]  # fmt: skip
    _write(comparison.out / JSON, json.dumps(_content(comparison, results, tests, tuning, notes), indent=2) + "\n")
    _write(comparison.out / CSV, _csv(results))
    _write(comparison.out / MARKDOWN, "\n\n".join(parts) + "\n")
    _print(console, comparison, results, tests, notes)
    return comparison.out / MARKDOWN


def write_tuning(comparison: Comparison, tuning: Tuning) -> None:
    """Write tuning.json: what was tried, on which seed, and what was chosen."""
    _write(comparison.out / TUNING, json.dumps(tuning.to_dict(), indent=2) + "\n")


def command(comparison: Comparison, tuning: Tuning | None) -> str:
    """The command that does this comparison again, without its folder."""
    words = ["framp", "compare"]
    if comparison.preset:
        shipped = comparison.preset.parent == PRESETS
        words += ["--preset", comparison.preset.stem] if shipped else [str(comparison.preset)]
    words += ["--methods", ",".join(comparison.methods), "--seeds", ",".join(map(str, comparison.seeds))]
    if comparison.reference != comparison.methods[0]:
        words += ["--reference", comparison.reference]
    if tuning:
        words += ["--tune", "--grid", ",".join(f"{rate:g}" for rate in tuning.plan.grid)]
        words += ["--tuning-seed", str(tuning.plan.seed)]
    for key, value in comparison.overrides.items():
        words += ["-o", f"{key}={value}"]
    return shlex.join(words)


_COST_NOTE = (
    "Bytes are counted on the messages themselves; their mean is over all exchanges. Parameters held include the "
    "always-kept ones; their mean is over the training clients."
)


def _subject(comparison: Comparison) -> str:
    return f"{len(comparison.methods)} methods on {comparison.preset.stem if comparison.preset else 'digits'}"


def _name(comparison: Comparison) -> str:
    return METHODS[comparison.reference].title


def _figure(drawn: Drawn) -> str:
    return f"### {drawn.title}\n\n![{drawn.title}]({FOLDER}/{drawn.path.name})\n\n{drawn.caption}"


def _sentence(comparison: Comparison, results: Results) -> str:
    config = comparison.config(comparison.reference, comparison.seeds[0], comparison.out)
    seconds = sum(run.summary["seconds"] for run in results.runs)
    part = config.partition
    return (
        f"{part.clients} training and {part.unseen_clients} unseen clients, {part.scheme} partition of "
        f"{config.data.name}, {config.rounds} rounds of {min(config.server.clients_per_round, part.clients)} clients "
        f"and {config.local.steps} local steps of batch {config.local.batch_size}; seeds "
        f"{', '.join(map(str, results.seeds))}. A seed fixes partition, sizes and initial weights, the same for every "
        f"method (the digests of the partitions were compared). Rounds and evaluations of all {len(results.runs)} "
        f"runs took {human_seconds(seconds)}."
    )


def _notes(comparison: Comparison, results: Results, failures: Sequence[Failure]) -> list[str]:
    notes = [f"Run {failure.run} failed (status {failure.status}) and is missing below." for failure in failures]
    for name in comparison.methods:
        missing = [str(seed) for seed in comparison.seeds if seed not in {run.seed for run in results.of(name)}]
        if missing:
            notes.append(f"{METHODS[name].title} has no finished run of seed {', '.join(missing)}.")
    for key, methods in comparison.replaced().items():
        notes.append(f"The override of {key} replaces what these methods fix: {', '.join(methods)}.")
    refused = {run.method: run.summary["refused"] for run in results.runs if run.summary["refused"]}
    if refused:
        notes.append(f"Replies were refused in runs of {', '.join(refused)}; see the reports of these runs.")
    if len({run.fingerprint for run in results.runs}) > 1:
        notes.append(
            "The runs were made by different versions of the code, so their numbers may differ for that alone."
        )
    return notes


def _tuning(tuning: Tuning | None) -> list[str]:
    if tuning is None:
        return []
    said = (
        f"`{LEARNING_RATE}` was chosen for each method from the grid below, by mean validation accuracy (%) of the "
        f"training clients on seed {tuning.plan.seed}, which no result below uses."
    )
    return [said, tables.markdown(tables.tuning_table(tuning))]


def _accuracy_note(comparison: Comparison, results: Results) -> str:
    config = comparison.config(comparison.reference, comparison.seeds[0], comparison.out)
    several = len(results.seeds) > 1
    over = "mean and standard deviation over seeds" if several else f"seed {results.seeds[0]} alone"
    parts = [
        f"Mean over clients at the last round; {over}. The column Mean is over all clients. Local: training clients "
        "on their own test images. Union: the same on all clients' test images. Unseen: clients that never trained, on "
        "their own test images. Every method's logits get the client's log class prior with strength "
        f"{config.evaluation.local_prior_strength:g} (Local, Unseen) and "
        f"{config.evaluation.union_prior_strength:g} (Union).",
        "Bold: the best of the methods that keep to the budget." if len(results.methods) > 1 else "",
    ]
    if any(METHODS[name].ignores_budget for name in results.methods):
        parts.append(f"{tables.IGNORES_BUDGET}: ignores budgets; every client holds the full model whatever its size.")
    return " ".join(part for part in parts if part)


def test_note(tests: Sequence[PairedTest]) -> str:
    """What the tests test, and what they do not."""
    counted = sum(test.p is not None for test in tests)
    return (
        f"Positive: better than the method of that line. A pair is one client of one seed under both methods. p: "
        f"two-sided Wilcoxon signed-rank test over the pairs, Holm's correction over all {counted} tests of this "
        f"comparison (sizes and all clients together); * p < {LEVEL:g} after correction. Fewer than {MINIMUM_PAIRS} "
        f"pairs are not tested. Interval: bootstrap over clients, {RESAMPLES:,} resamples. Clients of one seed share "
        "a server and its model, so they are not independent: the tests and intervals speak of clients under these "
        "trained models, not of another training. This weighs most on Union, where all clients have the same test "
        "images: clients with the same submodel repeat one number there. By seed: the mean over seeds, the standard "
        "deviation over them, and each seed's own difference, which say how much a training varies."
    )


def _tests(results: Results, tests: Sequence[PairedTest]) -> list[str]:
    if not tests:
        return ["There is nothing to test: fewer than two methods have finished runs of one seed."]
    overall = [test for test in tests if test.capacity == MEAN]
    sizes = [test for test in tests if test.capacity != MEAN]
    folded = f"<details><summary>Each size</summary>\n\n{tables.markdown(tables.test_table(sizes))}\n\n</details>"
    return [test_note(tests), tables.markdown(tables.test_table(overall)),
            *_titled(tables.difference_tables(results, tests)), folded]  # fmt: skip


def _titled(found: Sequence[tables.Titled]) -> list[str]:
    return [f"**{each.title}**\n\n{tables.markdown(each.table, each.best)}" for each in found]


def _print(
    console: Console, comparison: Comparison, results: Results, tests: Sequence[PairedTest], notes: Sequence[str]
) -> None:
    accuracies, costs = tables.accuracy_tables(results), tables.cost_tables(results)
    differences = tables.difference_tables(results, tests)
    for each in [*costs, *accuracies, *differences, *tables.brief_tests(tests, _name(comparison))]:
        console.print()
        console.print(tables.Uncut(each), crop=False)
    for note in [*notes, *([test_note(tests)] if tests else [])]:
        console.print()
        console.print(note, highlight=False, markup=False)


def _content(
    comparison: Comparison,
    results: Results,
    tests: Sequence[PairedTest],
    tuning: Tuning | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    sizes = [*results.capacities, MEAN]
    return {
        "command": command(comparison, tuning),
        "reference": comparison.reference,
        "methods": {
            name: {
                "title": METHODS[name].title,
                "source": METHODS[name].source,
                "ignores_budget": METHODS[name].ignores_budget,
                "settings": dict(METHODS[name].settings),
            }
            for name in results.methods
        },
        "seeds": list(results.seeds),
        "tuning": tuning.to_dict() if tuning else None,
        "notes": list(notes),
        "runs": [
            {
                "method": run.method, "seed": run.seed, "learning_rate": run.learning_rate,
                "partition_digest": run.partition, "fingerprint": run.fingerprint, **run.summary,
            }
            for run in results.runs
        ],
        "results": [_over_seeds(results, name, each) for name in results.methods for each in sizes],
        "tests": [{**asdict(test), "significant": test.significant} for test in tests],
        "tests_corrected_together": sum(test.p is not None for test in tests),
    }  # fmt: skip


def _over_seeds(results: Results, method: str, capacity: str) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds; the latter is None for one seed, both for none."""
    row: dict[str, Any] = {"method": method, "capacity": capacity}
    for key in (*COLUMNS, *(key for key, *_ in tables.COSTS)):
        values = results.over_seeds(method, key, capacity)
        row[key] = fmean(values) if values else None
        row[f"{key}_std"] = stdev(values) if len(values) > 1 else None
        row[f"{key}_seeds"] = len(values)
    return row


def _csv(results: Results) -> str:
    """One line per run and size."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "capacity", *CSV_KEYS])
    for run in results.runs:
        for row in run.summary["rows"]:
            writer.writerow([run.method, run.seed, row["capacity"], *(row[key] for key in CSV_KEYS)])
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
