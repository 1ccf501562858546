"""What a comparison writes: comparison.md with its figures, comparison.json, comparison.csv."""

import csv
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from framp.compare import tables
from framp.compare.figures import draw_figures
from framp.compare.plan import LEARNING_RATE, PRESETS, Comparison, public_options, public_path
from framp.compare.results import Results
from framp.compare.runner import Failure
from framp.compare.statistics import COLUMNS, LEVEL, MINIMUM_PAIRS, RESAMPLES, PairedTest, compare
from framp.compare.tuning import Tuning
from framp_core import files
from framp_core.config import GRAPH_DATA, FrampConfig
from framp_core.methods import METHODS, is_ablation
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


@dataclass(frozen=True)
class Compared:
    """A comparison as it was written.

    Attributes:
        comparison: what was asked for.
        results: the finished runs.
        tuning: how the learning rates were chosen, or None if they were not.
        tests: see :func:`framp.compare.statistics.compare`.
        notes: what a reader must know besides.
        figures: those that were drawn.
    """

    comparison: Comparison
    results: Results
    tuning: Tuning | None
    tests: tuple[PairedTest, ...]
    notes: tuple[str, ...]
    figures: tuple[Drawn, ...]

    @property
    def path(self) -> Path:
        """Of comparison.md."""
        return self.comparison.out / MARKDOWN

    @property
    def shown(self) -> Results:
        """Without the reference's ablations, which are another question, unless there is nothing else."""
        names = [name for name in self.results.methods if not is_ablation(name, self.comparison.reference)]
        return self.results.only(names) if len(names) > 1 else self.results

    @property
    def against(self) -> list[PairedTest]:
        """Tests against other methods."""
        return [test for test in self.tests if not test.ablation]

    @property
    def ablations(self) -> list[PairedTest]:
        """Tests against ablations."""
        return [test for test in self.tests if test.ablation]


def write_comparison(
    comparison: Comparison, results: Results, tuning: Tuning | None, failures: Sequence[Failure]
) -> Compared:
    """Write everything that is said about a comparison.

    Args:
        comparison: what was asked for.
        results: the finished runs.
        tuning: how the learning rates were chosen, or None if they were not.
        failures: runs that did not finish.
    """
    tests = tuple(compare(results, comparison.reference))
    notes = tuple(_notes(comparison, results, failures))
    compared = Compared(comparison, results, tuning, tests, notes, ())
    compared = replace(compared, figures=tuple(draw_figures(comparison.out, compared.shown, comparison.reference)))
    files.write_text(
        comparison.out / JSON, json.dumps({"command": command(compared), **content(compared)}, indent=2) + "\n"
    )
    files.write_text(comparison.out / CSV, _csv(results))
    files.write_text(compared.path, "\n\n".join(_page(compared)) + "\n")
    return compared


def _page(compared: Compared) -> list[str]:
    comparison, results, tuning, shown = compared.comparison, compared.results, compared.tuning, compared.shown
    return [
        f"# {_subject(comparison)}", sentence(comparison, results), f"```bash\n{command(compared)}\n```",
        *(f"> {note}" for note in compared.notes),
        "## Methods", tables.markdown(tables.method_table(results, tuning)), *_tuning(tuning),
        "## Accuracy", _note_on_accuracy(comparison, results),
        *_titled(tables.accuracy_tables(shown, comparison.reference)), *_priors(shown),
        *_against(compared),
        *ablation_section(compared),
        "## What it costs", _COST_NOTE, *_titled(tables.cost_tables(results)),
        "## Figures", *map(_figure, compared.figures),
    ]  # fmt: skip


def write_tuning(comparison: Comparison, tuning: Tuning) -> None:
    """Write tuning.json: what was tried, on which seed, and what was chosen."""
    files.write_text(comparison.out / TUNING, json.dumps(tuning.to_dict(), indent=2) + "\n")


def command(compared: Compared) -> str:
    """The command that does this comparison again, without its folder and other paths of this machine."""
    comparison, tuning = compared.comparison, compared.tuning
    if comparison.made_by:
        return comparison.made_by
    words = ["framp", "compare"]
    if comparison.preset:
        shipped = comparison.preset.parent == PRESETS
        words += ["--preset", comparison.preset.stem] if shipped else [public_path(comparison.preset)]
    words += ["--methods", ",".join(comparison.methods), "--seeds", ",".join(map(str, comparison.seeds))]
    if comparison.reference != comparison.methods[0]:
        words += ["--reference", comparison.reference]
    if tuning:
        words += ["--tune", "--grid", ",".join(f"{rate:g}" for rate in tuning.plan.grid)]
        words += ["--tuning-seed", str(tuning.plan.seed)]
        words += ["--tuning-rounds", str(tuning.plan.rounds)] if tuning.plan.rounds else []
    return shlex.join([*words, *public_options(comparison.overrides)])


_COST_NOTE = (
    "Bytes are counted on the messages themselves; their mean is over all exchanges. Parameters held include the "
    "always-kept ones; their mean is over the training clients."
)


def _priors(results: Results) -> list[str]:
    found = tables.prior_tables(results)
    said = (
        "The same models once more, counted in the same pass with the client's class prior added at other strengths: "
        "0 leaves the model's own logits, 1 adds the whole log prior, for every method alike."
    )
    return [said, *_titled(found)] if found else []


def ablation_section(compared: Compared, level: str = "##") -> list[str]:
    """What each part of the reference contributes, as parts of a page; nothing without ablations.

    Args:
        compared: the comparison.
        level: of the heading.
    """
    comparison, results, tests = compared.comparison, compared.results, compared.ablations
    if not tests:
        return []
    counted = sum(test.p is not None for test in tests)
    said = (
        f"{_name(comparison)} minus each of its variants, in points, all sizes together; positive: "
        f"{_name(comparison)} as configured is better than the variant. Holm's correction is over these "
        f"{counted} tests (sizes included) alone, and variants take no part in the ranking above."
    )
    own = results.only([comparison.reference, *(test.method for test in tests)])
    accuracies = "\n\n".join(_titled(tables.accuracy_tables(own, comparison.reference)))
    folded = f"<details><summary>Their accuracy</summary>\n\n{accuracies}\n\n</details>"
    table = tables.markdown(tables.overall_table(tests, "Variant"))
    note = [] if compared.against else [_note(compared)]
    return [f"{level} What each part contributes", said, *note, table, folded]


def _subject(comparison: Comparison) -> str:
    return f"{len(comparison.methods)} methods on {comparison.preset.stem if comparison.preset else 'digits'}"


def _name(comparison: Comparison) -> str:
    return METHODS[comparison.reference].title


def _figure(drawn: Drawn) -> str:
    return f"### {drawn.title}\n\n![{drawn.title}]({FOLDER}/{drawn.path.name})\n\n{drawn.caption}"


def sentence(comparison: Comparison, results: Results) -> str:
    """What was run, in words."""
    config = comparison.config(comparison.reference, comparison.seeds[0], comparison.out)
    seconds = sum(run.summary["seconds"] for run in results.runs)
    part = config.partition
    return (
        f"{part.clients} training and {part.unseen_clients} unseen clients, {part.scheme} partition of "
        f"{config.data.title}, {config.rounds} rounds of {min(config.server.clients_per_round, part.clients)} clients "
        f"and {config.local.steps} local steps {_batches(config)}; seeds "
        f"{', '.join(map(str, results.seeds))}. A seed fixes partition, sizes and initial weights, the same for every "
        f"method (the digests of the partitions were compared). Rounds and evaluations of all {len(results.runs)} "
        f"runs took {human_seconds(seconds)}."
    )


def _batches(config: FrampConfig) -> str:
    if config.data.name in GRAPH_DATA:
        return f"on whole subgraphs (batch {config.local.batch_size} above {config.graph.full_batch_nodes:,} nodes)"
    return f"of batch {config.local.batch_size}"


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
    where = f" in the setting {tuning.setting}" if tuning.setting else ""
    rounds = f", after {tuning.plan.rounds} rounds" if tuning.plan.rounds else ""
    said = (
        f"`{LEARNING_RATE}` was chosen{where} for each method from the grid below, by mean validation accuracy (%) of "
        f"the training clients on seed {tuning.plan.seed}{rounds}, which no result below uses."
    )
    return [said, tables.markdown(tables.tuning_table(tuning))]


def _note_on_accuracy(comparison: Comparison, results: Results) -> str:
    evaluation = comparison.config(comparison.reference, comparison.seeds[0], comparison.out).evaluation
    several = len(results.seeds) > 1
    over = "mean ± standard deviation over seeds" if several else f"seed {results.seeds[0]} alone"
    prior = (
        "Every method's logits get the client's log class prior with strength "
        f"{evaluation.local_prior_strength:g} (Local, Unseen) and {evaluation.union_prior_strength:g} (Union)."
    )
    return accuracy_note(over, prior, results.methods)


def accuracy_note(over: str, prior: str, methods: Iterable[str]) -> str:
    """How to read the accuracy tables.

    Args:
        over: what is shown of the seeds.
        prior: a sentence about the class prior that is added to the logits.
        methods: those in the tables.
    """
    shown = list(methods)
    parts = [
        f"Mean over clients at the last round; {over}. The column Mean is over all clients; columns of different "
        "sizes are different clients. Local: training clients on their own test data. Union: the same on all "
        f"clients' test data. Unseen: clients that never trained, on their own test data. {prior}"
    ]
    if len(shown) > 1:
        parts.append("Bold: the best of the methods that keep to the budget, the reference's variants aside.")
    if any(METHODS[name].ignores_budget for name in shown):
        parts.append(f"{tables.IGNORES_BUDGET}: ignores budgets; every client holds the full model whatever its size.")
    without = list(dict.fromkeys(METHODS[name].title for name in shown if not METHODS[name].serves_unseen))
    if without:
        parts.append(f"No Unseen for {', '.join(without)}: it has no model for a client that never trained.")
    return " ".join(parts)


def test_note(corrected: str) -> str:
    """What the tests test, and what they do not.

    Args:
        corrected: which tests Holm's correction is over.
    """
    return (
        f"Positive: better than the method of that line. A pair is one client of one seed under both methods. p: "
        f"two-sided Wilcoxon signed-rank test over the pairs, Holm's correction over {corrected}, sizes and all "
        f"clients together; * p < {LEVEL:g} after correction. Fewer than {MINIMUM_PAIRS} pairs are not tested. "
        f"Clients, 95 %: bootstrap over clients, {RESAMPLES:,} resamples. "
        "Clients of one seed share a server and its model, so they are not independent: these tests and intervals "
        "speak of clients under these trained models, not of another training. This weighs most on Union, where all "
        "clients have the same test data: clients with the same submodel repeat one number there. Seeds: paired t "
        "interval and t-test over the seeds' differences, each training counting once; p without correction. With few "
        "seeds it is wide, and what it leaves open is open."
    )


def _note(compared: Compared) -> str:
    """How to read the tests, those against other methods if there are any."""
    tests, others = (compared.against, "other methods") if compared.against else (compared.ablations, "ablations")
    return test_note(f"all {sum(test.p is not None for test in tests)} tests against {others}")


def _against(compared: Compared) -> list[str]:
    tests, heading = compared.against, f"## {_name(compared.comparison)} against the others"
    if not compared.tests:
        return [heading, "There is nothing to test: fewer than two methods have finished runs of one seed."]
    if not tests:
        return []
    folded = f"<details><summary>Every test</summary>\n\n{tables.markdown(tables.test_table(tests))}\n\n</details>"
    return [heading, _note(compared), tables.markdown(tables.overall_table(tests, "Against")),
            *_titled(tables.difference_tables(compared.results, tests)), folded]  # fmt: skip


def _titled(found: Sequence[tables.Titled]) -> list[str]:
    return [f"**{each.title}**\n\n{tables.markdown(each.table, each.best)}" for each in found]


def print_comparison(console: Console, compared: Compared) -> None:
    """Print the tables of a comparison, and what a reader must know."""
    comparison, results, shown = compared.comparison, compared.results, compared.shown
    name, against, ablations = _name(comparison), compared.against, compared.ablations
    parts = [*tables.cost_tables(results), *tables.accuracy_tables(shown, comparison.reference)]
    parts += [*tables.prior_tables(shown), *tables.difference_tables(results, against)]
    parts += tables.brief_tests(against, f"{name} against the others")
    if ablations:
        parts.append(tables.Titled(f"{name} minus its ablations, points", tables.contribution_table(ablations)))
    for each in parts:
        console.print()
        console.print(tables.Uncut(each), crop=False)
    for note in [*compared.notes, *([_note(compared)] if compared.tests else [])]:
        console.print()
        console.print(note, highlight=False, markup=False)


def content(compared: Compared) -> dict[str, Any]:
    """The comparison as data, without a path of this machine."""
    comparison, results, tests, tuning = compared.comparison, compared.results, compared.tests, compared.tuning
    sizes = [*results.capacities, MEAN]
    return {
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
        "notes": list(compared.notes),
        "runs": [
            {
                "method": run.method, "seed": run.seed, "learning_rate": run.learning_rate,
                "partition_digest": run.partition, "fingerprint": run.fingerprint, **run.summary,
            }
            for run in results.runs
        ],
        "results": [mean_over_seeds(results, name, each) for name in results.methods for each in sizes],
        "prior_curves": [_prior_curve(results, name, each) for name in results.methods for each in sizes],
        "tests": [_test(test) for test in tests],
        "tests_corrected_together": {
            "methods": sum(test.p is not None for test in tests if not test.ablation),
            "ablations": sum(test.p is not None for test in tests if test.ablation),
        },
    }  # fmt: skip


def _test(test: PairedTest) -> dict[str, Any]:
    seeds = test.over_seeds
    return {**asdict(test), "significant": test.significant, "over_seeds": asdict(seeds) if seeds else None}


def _prior_curve(results: Results, method: str, capacity: str) -> dict[str, Any]:
    """Mean over seeds at each strength of the class prior; None where a method was not measured."""
    row: dict[str, Any] = {"method": method, "capacity": capacity, "strengths": results.strengths}
    for column in COLUMNS:
        values = [results.at_strength(method, column, capacity, strength) for strength in results.strengths]
        row[column] = [fmean(over) if over else None for over in values]
    return row


def mean_over_seeds(results: Results, method: str, capacity: str) -> dict[str, Any]:
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
