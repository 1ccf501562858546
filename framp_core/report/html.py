"""The HTML report: one file that needs nothing else, readable on a phone."""

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from framp_core import files
from framp_core.config import FrampConfig
from framp_core.foreign_text import LONGEST_LINE, printable
from framp_core.methods import title_of
from framp_core.report.figures import Drawn, draw_figures
from framp_core.report.style import CSS
from framp_core.report.summary import Record, Refused, summary_of
from framp_core.report.tables import (
    MISSING,
    Cell,
    Table,
    cells,
    communication,
    human_bytes,
    human_seconds,
    per_client,
    refusals,
    results,
    spans,
)
from framp_core.run_folder import CONFIG, ENVIRONMENT, MANIFEST, MASKS, SUMMARY, RunFolder

REPORT = "report.html"
WORDS = {
    "cpu_count": "CPU cores",
    "cuda": "CUDA device",
    "config_digest": "Configuration digest",
    "fingerprint": "Code",
}


def write_report(run_dir: Path) -> Path:
    """Draw the figures and write report.html of a run, finished or not, from the files of its folder alone.

    Args:
        run_dir: the run folder.

    Returns:
        The path of report.html.

    Raises:
        RunFolderError: it is not a run folder, or a file in it is damaged.
        WriteError: a file cannot be written.
    """
    run = RunFolder.open(run_dir)
    record = Record.of(run)
    masks = run.json(MASKS) if run.has(MASKS) else None
    environment = _environment(run)
    figures = draw_figures(run.path, record, masks, run.prototypes())
    files.write_text(run_dir / REPORT, _page(run, record, figures, environment))
    return run_dir / REPORT


def _page(run: RunFolder, record: Record, figures: Sequence[Drawn], environment: str) -> str:
    config = run.config
    finished = run.has(SUMMARY)
    summary = summary_of(record)
    title = f"{title_of(config.to_flat())} on {config.data.title}, {config.rounds} rounds, seed {config.seed}"
    body = [
        f"<h1>{escape(title)}</h1>",
        "" if finished else _unfinished(record),
        f'<p class="lead">{escape(_sentence(record))}</p>',
        _section("Results", _results(record, summary)),
        _section("Figures", _figures(figures)),
        _section("Clients", _folded(f"All {len(per_client(record).rows)} clients", _table(per_client(record)))),
        _section("Communication", _communication(record)),
        _section("Events worth knowing", _notable(record)),
        _section("Configuration", _folded(CONFIG, f"<pre>{escape(files.read_text(run.path / CONFIG))}</pre>")),
        _section("Environment and data", environment),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _unfinished(record: Record) -> str:
    measured = record.evaluated_rounds
    numbers = f"The numbers below are from round {measured[-1]}." if measured else "Nothing was evaluated yet."
    said = f"This run is not finished: {record.rounds} of {record.config.rounds} rounds are recorded. {numbers}"
    return f'<p class="warning" role="alert">{escape(said)}</p>'


def _sentence(record: Record) -> str:
    config = record.config
    roles = [client["role"] for client in record.clients]
    trained = roles.count("train") if roles else config.partition.clients
    unseen = roles.count("unseen") if roles else config.partition.unseen_clients
    kept = "the whole model" if config.extraction.name == "full" else "a submodel"
    generated = f"{_article(config.generator.name)} generator ({config.model.name} network, {config.extraction.name})"
    return (
        f"{_plural(trained, 'client')} of {_plural(len(record.capacities), 'size')} "
        f"({', '.join(record.capacities)}) trained {kept} each, made by {generated}, on {config.data.title}, "
        f"{config.partition.scheme} partition, for {_plural(record.rounds, 'round')} of "
        f"{min(config.server.clients_per_round, trained)} clients and {_plural(config.local.steps, 'local step')}; "
        f"{_plural(unseen, 'further client')} never trained. "
        f"Rounds and evaluations took {human_seconds(record.seconds)}."
    )


def _results(record: Record, summary: dict[str, Any]) -> str:
    parts = [_table(results(summary))]
    if summary["rows_after_fine_tuning"]:
        steps = _plural(record.config.evaluation.fine_tune_steps, "local step")
        parts.append(f"<h3>After fine-tuning for {escape(steps)}</h3>" + _table(results(summary, "after")))
    return "\n".join([*parts, _column_note(record, summary)])


def _column_note(record: Record, summary: dict[str, Any]) -> str:
    config = record.config
    covered = summary["rows"][-1]
    local, union = (_strength(value) for value in _strengths(config))
    decay = config.server.averaging_decay
    model = f"generator averaged over rounds (decay {decay:g})" if decay else "raw generator"
    sample = config.evaluation.union_examples
    covered_data = f"{sample:,} of all clients'" if sample else "all clients'"
    at = f"round {summary['evaluated_round']}" if summary["evaluated_round"] is not None else "no round yet"
    terms = [
        ("Local", f"each training client's own submodel on its own test data; {local}", covered["local_clients"]),
        ("Union", f"the same submodels on {covered_data} test data; {union}", covered["union_clients"]),
        ("Unseen", f"clients that never trained, on their own test data; {local}", covered["unseen_clients"]),
    ]
    items = [(name, f"{text}; {_plural(count, 'client')} covered.") for name, text, count in terms]
    items += [
        ("All three", f"Mean over clients, each weighing the same, ± standard deviation over clients. "
                      f"Model: {model}, {at}, before any local fine-tuning."),
        ("Down, Up", "bytes to and from one client in one round, mean over the clients that took part."),
        ("Parameters held", "kept maskable weights and the always-kept parameters, and their share of the full model; "
                            "in the last row the mean over training clients."),
        ("Mean", "over all clients (bytes: over all exchanges), not over the sizes."),
    ]  # fmt: skip
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(_capital(v))}</dd>" for k, v in items) + "</dl>"


def _strengths(config: FrampConfig) -> tuple[float, float]:
    return config.evaluation.local_prior_strength, config.evaluation.union_prior_strength


def _strength(value: float) -> str:
    return f"the client's class prior added to the logits with strength {value:g}" if value else "no class prior added"


def _figures(figures: Sequence[Drawn]) -> str:
    if not figures:
        return "<p>There is nothing to draw yet.</p>"
    blocks = []
    for figure in figures:
        data = base64.b64encode(files.read_bytes(figure.path)).decode()
        blocks.append(
            f'<figure><h3>{escape(figure.title)}</h3><img alt="{escape(figure.title)}. {escape(figure.caption)}" '
            f'src="data:image/png;base64,{data}"><figcaption>{escape(figure.caption)}</figcaption></figure>'
        )
    return f'<div class="figures">{"".join(blocks)}</div>'


def _communication(record: Record) -> str:
    exchanges = [client for event in record.train for client in event["clients"]]
    trained = sum(sum(client["down"].values()) + sum(client["up"].values()) for client in exchanges)
    evaluated = sum(event.get("down_bytes") or 0 for event in record.evaluations)
    descriptors = sum(client.get("descriptor_bytes") or 0 for client in record.clients)
    said = (
        f"In all: {human_bytes(trained)} for training in {_plural(len(exchanges), 'exchange')}, "
        f"{human_bytes(evaluated)} sent for evaluations, {human_bytes(descriptors)} of descriptors, sent once."
    )
    caption = (
        "<p>Mean bytes of one client in one round, counted on the messages themselves. Mask alone: what the mask would "
        "have cost without the reference that returning clients hold.</p>"
    )
    return caption + _table(communication(record)) + f"<p>{escape(said)}</p>"


def _notable(record: Record) -> str:
    notes = [*_arrivals(record), *_absences(record), *_silent_rounds(record), *_defences(record)]
    refused = record.refused
    if refused:
        notes.append(
            f"{_plural(len(refused), 'reply', 'replies')} refused from "
            f"{_plural(len({entry.client for entry in refused}), 'client')}. The first: {_place(refused[0])}: "
            f"{refused[0].error}"
        )
    if not notes:
        return "<p>None: every client answered, and no reply was refused.</p>"
    listed = "<ul>" + "".join(f"<li>{escape(printable(note, 2 * LONGEST_LINE))}</li>" for note in notes) + "</ul>"
    if refused:
        listed += _folded("Every client that was refused or silent, and why", _table(refusals(record)))
    traced = next((entry for entry in refused if entry.traceback), None)
    if traced is None:
        return listed
    return listed + _folded(f"First traceback: {_place(traced)}", f"<pre>{escape(traced.traceback or '')}</pre>")


def _place(refused: Refused) -> str:
    return f"{refused.client}, {refused.kind}, round {refused.round}"


def _arrivals(record: Record) -> list[str]:
    by_round: dict[int, list[str]] = {}
    for name, number in record.joined.items():
        by_round.setdefault(number, []).append(name)
    return [f"Joined in round {number}, after the start: {_some(names)}." for number, names in by_round.items()]


def _absences(record: Record) -> list[str]:
    notes, names = [], {client["client"] for client in record.clients}
    expected = record.start.get("expected_clients") if record.start else None
    if record.start is None:
        notes.append("No start of training was recorded: the clients were never all registered.")
    elif expected and expected > len(names):
        missing = _plural(expected - len(names), "client")
        notes.append(f"{missing} of {expected} never joined and took no part.")
    if record.evaluated_rounds:
        later = {name for name, number in record.joined.items() if number > record.evaluated_rounds[-1]}
        absent = sorted(names - later - {row.client for row in record.last("before")})
        if absent:
            notes.append(f"{_plural(len(absent), 'client')} missing from the last evaluation: {_some(absent)}.")
    return notes


def _silent_rounds(record: Record) -> list[str]:
    idle = [event["round"] for event in record.train if not event.get("learnt", True)]
    if not idle:
        return []
    return [f"{_plural(len(idle), 'round')} changed nothing, for want of enough valid replies: {spans(idle)}."]


def _defences(record: Record) -> list[str]:
    rows = [row for event in record.train for row in event["clients"]]
    shortened = [row["client"] for row in rows if "shortened" in row]
    screened = [row["client"] for row in rows if row.get("screened")]
    done = ((shortened, "shortened"), (screened, "left out, against the cohort's direction"))
    return [
        f"{len(names)} of {_plural(len(rows), 'delta')} {what} (defence): {_some(_by_frequency(names))}."
        for names, what in done
        if names
    ]


def _by_frequency(names: Sequence[str]) -> list[str]:
    """Each name once with how often it occurs, the most frequent first."""
    return [f"{name} ({count})" for name, count in Counter(names).most_common()]


def _environment(run: RunFolder) -> str:
    known = run.json(ENVIRONMENT) if run.has(ENVIRONMENT) else {}
    versions = known.pop("versions", {})
    manifest = run.json(MANIFEST) if run.has(MANIFEST) else {}
    lines = [(WORDS.get(key, key.capitalize()), value) for key, value in known.items()]
    lines += [*versions.items(), ("Partition digest", manifest.get("digest"))]
    lines += [(f"Data, {about}", said) for about, said in (manifest.get("notes") or {}).items()]
    rows = [[str(key), MISSING if value is None else str(value)] for key, value in lines]
    return _table(Table(("What", "Value"), cells(rows), labels=2), kind="facts")


def _table(table: Table, kind: str = "numbers") -> str:
    def row(cells: Sequence[Cell], number: int) -> str:
        last = table.emphasised and number == len(table.rows) - 1
        inner = "".join(_cell(cell, label=place < table.labels) for place, cell in enumerate(cells))
        return f"<tr{_class('sum' if last else '')}>{inner}</tr>"

    head = "".join(
        f'<th scope="col"{_class("label" if place < table.labels else "")}>{escape(text)}</th>'
        for place, text in enumerate(table.headings)
    )
    rows = "".join(row(cells, number) for number, cells in enumerate(table.rows))
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _cell(cell: Cell, label: bool) -> str:
    detail = f" <small>{escape(cell.detail)}</small>" if cell.detail else ""
    return f"<td{_class('label' if label else '')}>{escape(printable(cell.text))}{detail}</td>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _plural(count: int, noun: str, many: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
