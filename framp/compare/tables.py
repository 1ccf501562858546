"""Tables of a comparison: methods below each other, sizes side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from framp.compare.results import Results
from framp.compare.statistics import COLUMNS, PairedTest
from framp.compare.tuning import Tuning
from framp_core.methods import METHODS, is_ablation
from framp_core.metrics import MEAN, Column
from framp_core.report.figures import POPULATIONS
from framp_core.report.tables import MISSING, Cell, Table, human_bytes, percent

IGNORES_BUDGET = "†"
ALL = "All"
_WIDEST = 500
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("bytes_down", "Down, per client and round", human_bytes),
    ("bytes_up", "Up, per client and round", human_bytes),
    ("parameters_held", "Parameters held", lambda count: f"{count:,.0f}"),
)


@dataclass(frozen=True)
class Titled:
    """A table under a title.

    Attributes:
        title: what it shows.
        table: its cells.
        best: places (row, column) of cells that stand out.
    """

    title: str
    table: Table
    best: frozenset[tuple[int, int]] = field(default=frozenset())


@dataclass(frozen=True)
class Uncut:
    """A table for the terminal, as wide as it is: a narrow terminal wraps its lines and loses no number."""

    titled: Titled

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Aligned plain lines, in colour where the terminal has it."""
        yield from console.render(_rendered(self.titled), options.update(width=_WIDEST))


def title(method: str) -> str:
    """Name of a method in tables and figures, marked if it ignores budgets."""
    known = METHODS[method]
    return f"{known.title} {IGNORES_BUDGET}" if known.ignores_budget else known.title


def size(capacity: str) -> str:
    """Heading of a size; ``"Mean"`` for all clients together."""
    return "Mean" if capacity == MEAN else capacity


def accuracy_tables(results: Results, reference: str) -> list[Titled]:
    """Local, Union and Unseen by method and size: mean over seeds, ± standard deviation over seeds if there are two.

    The best of the methods that keep to the budget and are not ablations stands out in each column.
    """
    return [_accuracy_table(results, reference, column) for column in COLUMNS if _measured(results, column)]


def prior_tables(results: Results) -> list[Titled]:
    """Local by method and size with no class prior at deployment and with the whole of it, where both were measured."""
    strengths = [strength for strength in (0.0, 1.0) if strength in results.strengths]
    sizes = [*results.capacities, MEAN]
    rows = tuple(
        (Cell(title(name)), Cell(f"{strength:g}"),
         *(over_seeds(results.at_strength(name, "local", each, strength)) for each in sizes))
        for name in results.methods for strength in strengths
    )  # fmt: skip
    table = Table(("Method", "Prior", *map(size, sizes)), rows, labels=1)
    return [Titled("Local accuracy without and with the class prior, %", table)] if strengths else []


def cost_tables(results: Results) -> list[Titled]:
    """Bytes down, bytes up and parameters held by method and size, mean over seeds."""
    sizes = [*results.capacities, MEAN]

    def cell(method: str, key: str, capacity: str, shown: Callable[[float], str]) -> Cell:
        values = results.over_seeds(method, key, capacity)
        return Cell(shown(fmean(values)) if values else MISSING)

    return [
        Titled(heading, _by_size(results, sizes, lambda name, each: cell(name, key, each, shown)))  # noqa: B023
        for key, heading, shown in COSTS
    ]


def difference_tables(results: Results, tests: Sequence[PairedTest]) -> list[Titled]:
    """Reference minus each method in points by size, with a star where the corrected test is significant."""
    found = {(test.method, test.column, test.capacity): test for test in tests}
    sizes = [*results.capacities, MEAN]

    def cell(method: str, column: Column, capacity: str) -> Cell:
        test = found.get((method, column, capacity))
        return Cell(MISSING) if test is None else Cell(points(test.difference), "*" if test.significant else "")

    tested = [name for name in results.methods if any(test.method == name for test in tests)]
    return [
        Titled(
            f"{POPULATIONS[column][0]}, difference in points",
            Table(
                ("Against", *results.capacities, ALL),
                tuple((Cell(title(name)), *(cell(name, column, each) for each in sizes)) for name in tested),
            ),
        )
        for column in COLUMNS
        if any(test.column == column for test in tests)
    ]


def overall_table(tests: Sequence[PairedTest], against: str) -> Table:
    """The tests on all clients together: what clients say, then what seeds say.

    Args:
        tests: of any size.
        against: heading of the methods.
    """
    headings = (against, "Accuracy", "Diff.", "Clients: 95 %", "p, Holm", "Each seed", "Seeds: 95 %", "Seeds: p")

    def row(test: PairedTest) -> tuple[Cell, ...]:
        seeds = test.over_seeds
        interval = _interval(seeds.low, seeds.high) if seeds else MISSING
        return (
            Cell(title(test.method)), Cell(POPULATIONS[test.column][0]), Cell(points(test.difference)),
            Cell(_interval(test.low, test.high)), Cell(p_value(test.p_holm), "*" if test.significant else ""),
            Cell(_each_seed(test)), Cell(interval), Cell(p_value(seeds.p if seeds else None)),
        )  # fmt: skip

    return Table(headings, tuple(row(test) for test in tests if test.capacity == MEAN), labels=2)


def test_table(tests: Sequence[PairedTest]) -> Table:
    """Every test in full."""
    headings = (
        "Against",
        "Accuracy",
        "Size",
        "Pairs",
        "Diff.",
        "Clients: 95 %",
        "p",
        "p, Holm",
        "Each seed",
        "Seeds: p",
    )

    def row(test: PairedTest) -> tuple[Cell, ...]:
        seeds = test.over_seeds
        return (
            Cell(title(test.method)), Cell(POPULATIONS[test.column][0]),
            Cell(ALL if test.capacity == MEAN else test.capacity), Cell(str(test.pairs)), Cell(points(test.difference)),
            Cell(_interval(test.low, test.high)), Cell(p_value(test.p)),
            Cell(p_value(test.p_holm), "*" if test.significant else ""), Cell(_each_seed(test)),
            Cell(p_value(seeds.p if seeds else None)),
        )  # fmt: skip

    return Table(headings, tuple(row(test) for test in tests), labels=3)


def brief_tests(tests: Sequence[PairedTest], heading: str) -> list[Titled]:
    """The tests on all clients together, a table for each accuracy, narrow enough for a terminal."""

    def row(test: PairedTest) -> tuple[Cell, ...]:
        seeds = test.over_seeds
        return (
            Cell(title(test.method)), Cell(str(test.pairs)), Cell(points(test.difference)),
            Cell(_interval(test.low, test.high)), Cell(p_value(test.p_holm), "*" if test.significant else ""),
            Cell(_interval(seeds.low, seeds.high) if seeds else MISSING),
        )  # fmt: skip

    found = []
    for column in COLUMNS:
        rows = tuple(row(test) for test in tests if test.column == column and test.capacity == MEAN)
        headings = ("Against", "Pairs", "Diff.", "Clients: 95 %", "p, Holm", "Seeds: 95 %")
        if rows:
            found.append(Titled(f"{POPULATIONS[column][0]}, {heading}", Table(headings, rows)))
    return found


def contribution_table(tests: Sequence[PairedTest]) -> Table:
    """Reference minus each ablation on all clients together, with the interval over clients."""
    found = {(test.method, test.column): test for test in tests if test.capacity == MEAN}
    columns = [column for column in COLUMNS if any(test.column == column for test in tests)]

    def cell(test: PairedTest | None) -> Cell:
        if test is None:
            return Cell(MISSING)
        return Cell(points(test.difference), f"({_interval(test.low, test.high)}){'*' if test.significant else ''}")

    rows = tuple(
        (Cell(title(name)), *(cell(found.get((name, column))) for column in columns))
        for name in dict.fromkeys(test.method for test in tests)
    )
    return Table(("Variant", *(POPULATIONS[column][0] for column in columns)), rows)


def method_table(results: Results, tuning: Tuning | None) -> Table:
    """The methods: their keys, sources, learning rates, and how many seeds finished."""
    edge = tuning.at_edge() if tuning else []
    rows = []
    for name in results.methods:
        runs = results.of(name)
        rates = ", ".join(dict.fromkeys(f"{run.learning_rate:g}" for run in runs))
        seeds = ", ".join(str(run.seed) for run in runs)
        cells = (title(name), name, METHODS[name].source, seeds)
        rows.append((*map(Cell, cells), Cell(rates, "(edge of the grid)" if name in edge else "")))
    return Table(("Method", "Key", "Source", "Seeds", "Learning rate"), tuple(rows), labels=4)


def tuning_table(tuning: Tuning) -> Table:
    """Mean validation accuracy of every method and learning rate."""
    rows = tuple(
        (Cell(title(method)), *(Cell(percent(score)) for score in scores))
        for method, scores in tuning.validation.items()
    )
    return Table(("Method", *(f"{rate:g}" for rate in tuning.plan.grid)), rows)


def points(fraction: float) -> str:
    """A difference of accuracies in points, with its sign."""
    # Plus 0.0 turns -0.0, which rounding makes of small losses, into 0.0.
    rounded = round(100 * fraction, 1) + 0.0
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def p_value(p: float | None) -> str:
    """A p-value with two digits."""
    if p is None:
        return MISSING
    return "<0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def markdown(table: Table, best: frozenset[tuple[int, int]] = frozenset()) -> str:
    """A pipe table."""
    rules = [":--" if number < table.labels else "--:" for number in range(len(table.headings))]
    lines = [list(table.headings), rules]
    for number, row in enumerate(table.rows):
        texts = [f"{cell.text} {cell.detail}".strip().replace("*", r"\*").replace("|", r"\|") for cell in row]
        lines.append([f"**{text}**" if (number, place) in best else text for place, text in enumerate(texts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rendered(titled: Titled) -> RichTable:
    table = titled.table
    shown = RichTable(
        title=titled.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0),
        header_style="dim",
    )  # fmt: skip
    for number, heading in enumerate(table.headings):
        shown.add_column(heading, justify="left" if number < table.labels else "right", no_wrap=True)
    for number, row in enumerate(table.rows):
        shown.add_row(*(_text(cell, (number, place) in titled.best) for place, cell in enumerate(row)))
    return shown


def _accuracy_table(results: Results, reference: str, column: Column) -> Titled:
    sizes = [*results.capacities, MEAN]
    values = {(name, each): results.over_seeds(name, column, each) for name in results.methods for each in sizes}
    own = [name for name in results.methods if not is_ablation(name, reference)]
    within = [name for name in own if not METHODS[name].ignores_budget]
    best = set()
    for place, each in enumerate(sizes, start=1):
        measured = [name for name in within if values[name, each]]
        beaten = {
            name for name in measured for other in measured if (found := shown_pair(results, name, other, column, each))
            and found[0] < found[1]
        }  # fmt: skip
        best |= {(results.methods.index(name), place) for name in measured if name not in beaten}
    table = _by_size(results, sizes, lambda name, each: over_seeds(values[name, each]))
    return Titled(f"{POPULATIONS[column][0]} accuracy, %", table, frozenset(best) if len(within) > 1 else frozenset())


def shown_pair(results: Results, one: str, other: str, column: Column, capacity: str) -> tuple[float, float] | None:
    """The percentages of two methods, as they are shown, over the seeds that both have; None without one."""
    ours, theirs = results.on_common_seeds((one, other), column, capacity)
    return (float(percent(fmean(ours))), float(percent(fmean(theirs)))) if ours else None


def over_seeds(accuracies: Sequence[float]) -> Cell:
    """Mean, and standard deviation over seeds if there are two."""
    mean = fmean(accuracies) if accuracies else None
    return Cell(percent(mean), f"±{100 * stdev(accuracies):.1f}" if len(accuracies) > 1 else "")


def _by_size(results: Results, sizes: Sequence[str], cell: Callable[[str, str], Cell]) -> Table:
    rows = tuple((Cell(title(name)), *(cell(name, each) for each in sizes)) for name in results.methods)
    return Table(("Method", *map(size, sizes)), rows)


def _measured(results: Results, column: Column) -> bool:
    return any(results.over_seeds(name, column, MEAN) for name in results.methods)


def _interval(low: float, high: float) -> str:
    return f"{points(low)} to {points(high)}"


def _each_seed(test: PairedTest) -> str:
    return ", ".join(map(points, test.by_seed))


def _text(cell: Cell, best: bool) -> Text:
    text = Text(cell.text, style="bold" if best else "")
    return text.append(f" {cell.detail}", style="dim") if cell.detail else text
