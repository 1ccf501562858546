"""Tables as plain cells, for the terminal and for the HTML report alike."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from framp_core.foreign_text import printable
from framp_core.metrics import MEAN, Moment
from framp_core.report.summary import PARTS, UP_PARTS, Record

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """A value as it is shown, and a smaller detail after it."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """Headings and rows of cells; the first ``labels`` columns hold words, the others numbers.

    Attributes:
        emphasised: whether the last row sums up the others.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    labels: int = 1
    emphasised: bool = False


def results(summary: Mapping[str, Any], moment: Moment = "before") -> Table:
    """The results of a run by size, from the content of summary.json.

    Args:
        summary: what :func:`framp_core.report.finish` returned.
        moment: before or after local fine-tuning.
    """
    rows = summary["rows"] if moment == "before" else summary["rows_after_fine_tuning"]
    headings = ("Size", "Local %", "Union %", "Unseen %", "Down", "Up", "Parameters held")
    return Table(headings, tuple(_result(row, summary["parameters"]) for row in rows), emphasised=True)


def results_table(summary: Mapping[str, Any]) -> RichTable:
    """The results table for the terminal: aligned plain lines, in colour where the terminal has it."""
    table = results(summary)
    rendered = RichTable(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(table.headings):
        rendered.add_column(heading, justify="left" if number < table.labels else "right", no_wrap=True)
    for number, row in enumerate(table.rows):
        last = table.emphasised and number == len(table.rows) - 1
        rendered.add_row(*map(_rendered, row), style="bold" if last else None)
    return rendered


def per_client(record: Record) -> Table:
    """Each client's size, data, accuracy at the last evaluation and part in training."""
    last = {(row.client, row.moment, row.population): row for row in record.last("before") + record.last("after")}
    exchanges = [client for event in record.train for client in event["clients"]]
    known = {client["client"]: client for client in record.clients}
    unlisted = {
        row.client: {"client": row.client, "role": row.role, "capacity": row.capacity}
        for row in last.values()
        if row.client not in known
    }
    tuned = bool(record.last("after"))
    rows = []
    for name, client in sorted({**known, **unlisted}.items()):
        own = [exchange for exchange in exchanges if exchange["client"] == name]
        measured = [last.get((name, "before", population)) for population in ("local", "union")]
        measured += [last.get((name, "after", "local"))] if tuned else []
        rows.append(
            (
                Cell(name),
                Cell({"train": "trains", "unseen": "unseen"}.get(client["role"], client["role"])),
                Cell(client["capacity"]),
                Cell(_count(client.get("train_examples"))),
                *(
                    Cell(percent(row.accuracy), f"of {row.total:,}") if row is not None else Cell(MISSING)
                    for row in measured
                ),
                Cell(str(len(own))),
                Cell(_loss(own[-1]["loss"] if own else None)),
            )
        )
    after = ("Local % after fine-tuning",) if tuned else ()
    headings = ("Client", "Role", "Size", "Examples", "Local %", "Union %", *after, "Rounds trained", "Last loss")
    return Table(headings, tuple(rows), labels=3)


def communication(record: Record) -> Table:
    """Mean bytes of a client in a round, by size, direction and part."""
    rows = []
    for traffic in record.traffic():
        sizes = [size for parts in (traffic.down, traffic.up) for size in (*parts.values(), sum(parts.values()))]
        cells = (Cell(human_bytes(size) if traffic.exchanges else MISSING) for size in sizes)
        alone = Cell(MISSING if traffic.mask_alone is None else human_bytes(traffic.mask_alone))
        rows.append((Cell(_size(traffic.capacity)), *cells, alone, Cell(f"{traffic.exchanges:,}")))
    down, up = (f"Down: {part}" for part in (*PARTS, "total")), (f"Up: {part}" for part in (*UP_PARTS, "total"))
    return Table(("Size", *down, *up, "Mask alone", "Exchanges"), tuple(rows), emphasised=True)


def refusals(record: Record) -> Table:
    """Refused and missing replies: one row for each client, kind of message and reason, by the first round."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for refused in record.refused:
        found.setdefault((refused.client, refused.kind, refused.error), []).append(refused.round)
    rows = [(client, kind, spans(rounds), error) for (client, kind, error), rounds in found.items()]
    return Table(("Client", "Asked for", "Rounds", "Reason"), cells(rows), labels=4)


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, such as ``"3, 5 to 9"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in runs)


def percent(fraction: float | None) -> str:
    """A fraction in percent with one decimal, without the sign."""
    return MISSING if fraction is None else f"{100 * fraction:.1f}"


def human_bytes(count: float | None) -> str:
    """Bytes in decimal units with three digits or so, such as ``"12.3 kB"``."""
    if count is None:
        return MISSING
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.1f} {unit}" if count < 99.95 else f"{count:.0f} {unit}"
    return f"{count / 1000:.1f} TB" if count < 1e9 else f"{count / 1000:.3g} TB"


def human_seconds(seconds: float) -> str:
    """A duration, such as ``"3 min 20 s"``."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _result(row: Mapping[str, Any], parameters: int | None) -> tuple[Cell, ...]:
    held = row["parameters_held"]
    share = f"({100 * held / parameters:.3g} %)" if held is not None and parameters else ""
    return (
        Cell(_size(row["capacity"])),
        *(_accuracy(row[column], row[f"{column}_std"]) for column in ("local", "union", "unseen")),
        Cell(human_bytes(row["bytes_down"])),
        Cell(human_bytes(row["bytes_up"])),
        Cell(_count(held), share),
    )


def _accuracy(mean: float | None, std: float | None) -> Cell:
    return Cell(percent(mean), f"±{percent(std)}" if std is not None else "")


def _size(capacity: str) -> str:
    return "Mean" if capacity == MEAN else capacity


def _count(count: float | None) -> str:
    if count is None:
        return MISSING
    return f"{count:,.0f}" if abs(count) < 1e15 else f"{count:.3g}"


def _loss(loss: float | None) -> str:
    if loss is None:
        return MISSING
    return f"{loss:.3f}" if abs(loss) < 1e6 else f"{loss:.3g}"


def _rendered(cell: Cell) -> Text:
    text = Text(printable(cell.text))
    return text.append(f" {cell.detail}", style="dim") if cell.detail else text


def cells(rows: Sequence[Sequence[str]]) -> tuple[tuple[Cell, ...], ...]:
    """Rows of plain strings as cells."""
    return tuple(tuple(Cell(text) for text in row) for row in rows)


def plain_lines(summary: Mapping[str, Any]) -> list[str]:
    """The results table as lines of plain text, for logs."""
    console = Console(width=160, no_color=True, highlight=False, file=StringIO())
    with console.capture() as capture:
        console.print(results_table(summary))
    return capture.get().rstrip().splitlines()
