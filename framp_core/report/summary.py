"""The events of a run, read once, and the numbers that summary.json keeps of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from framp_core.config import FrampConfig
from framp_core.foreign_text import LONGEST_TRACEBACK, printable
from framp_core.metrics import COLUMNS, MEAN, ClientAccuracy, Moment, SizeSummary, accuracies, by_capacity, summarise
from framp_core.run_folder import PRIOR_CURVE, SUMMARY, RunFolder
from framp_core.run_records import complete_event

Event = dict[str, Any]
PARTS = ("values", "mask", "prototypes", "framing")
UP_PARTS = ("values", "prototypes", "framing")


@dataclass(frozen=True)
class Traffic:
    """Mean bytes of one client in one round, of the clients that took part.

    Attributes:
        capacity: gamma as a fraction, or ``"mean"``.
        exchanges: pairs of messages that were averaged.
        down: bytes from server to client by part.
        up: bytes from client to server by part.
        mask_alone: bytes of the mask without a reference; None for a run that did not note them.
    """

    capacity: str
    exchanges: int
    down: dict[str, float]
    up: dict[str, float]
    mask_alone: float | None


@dataclass(frozen=True)
class Refused:
    """A reply that was refused or never came.

    Attributes:
        kind: what was asked for: ``start`` or ``join`` (a description), ``train``, ``evaluate``.
        round: when.
        client: of whom.
        error: why.
        traceback: where the client failed, if it said so and was the first of its round to.
    """

    kind: str
    round: int
    client: str
    error: str
    traceback: str | None


@dataclass(frozen=True)
class Record:
    """What the events of a run say; of a killed run, as far as it came.

    A round that was done again after a resume counts once, with its last result.

    Attributes:
        config: effective configuration.
        start: the event that lists the clients of the first round, or None.
        joins: the events that list clients which came later, in the order they were written.
        train: one event per training round, ascending.
        evaluations: the evaluation events in the order they were written.
    """

    config: FrampConfig
    start: Event | None
    joins: tuple[Event, ...]
    train: tuple[Event, ...]
    evaluations: tuple[Event, ...]
    priors: Event | None

    @classmethod
    def of(cls, run: RunFolder) -> "Record":
        """Read the events of a run.

        Raises:
            RunFolderError: they are damaged.
        """
        return cls._of(run.config, list(_complete(run)))

    @classmethod
    def glance(cls, run: RunFolder) -> "Record":
        """The same without most of what is said of single clients: their training, and all but the last evaluation.

        Raises:
            RunFolderError: the events are damaged.
        """
        return cls._of(run.config, list(_without_clients(_complete(run))))

    @classmethod
    def _of(cls, config: FrampConfig, events: Sequence[Event]) -> "Record":
        train = {event["round"]: event for event in events if event["kind"] == "train"}
        starts = [event for event in events if event["kind"] == "start"]
        return cls(
            config=config,
            start=starts[-1] if starts else None,
            joins=tuple(event for event in events if event["kind"] == "join"),
            train=tuple(train[number] for number in sorted(train)),
            evaluations=tuple(event for event in events if event["kind"] == "evaluate"),
            priors=next((event for event in reversed(events) if event["kind"] == "priors"), None),
        )

    @cached_property
    def rows(self) -> list[ClientAccuracy]:
        """Every measurement, by round."""
        latest = {
            (row.round, row.moment, row.population, row.client): row
            for event in self.evaluations
            for row in accuracies(event)
        }
        return [latest[key] for key in sorted(latest)]

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The clients that were ever admitted, by name; what was said last about a client holds."""
        admissions = (*([self.start] if self.start else []), *self.joins)
        known = {client["client"]: client for event in admissions for client in event["clients"]}
        return [known[name] for name in sorted(known)]

    @property
    def joined(self) -> dict[str, int]:
        """The clients that were not there at the start, in the order they came, and the round they came in."""
        rounds: dict[str, int] = {}
        for event in self.joins:
            for client in event["clients"]:
                rounds.setdefault(client["client"], event["round"])
        at_start = {client["client"] for client in self.start["clients"]} if self.start else set()
        return {name: number for name, number in rounds.items() if name not in at_start}

    @property
    def capacities(self) -> list[str]:
        """Sizes of the run, ascending."""
        seen = [client["capacity"] for client in self.clients] + [row.capacity for row in self.rows]
        return by_capacity(seen or [str(size) for size in self.config.capacity.sizes])

    @property
    def rounds(self) -> int:
        """Last round that trained."""
        return int(self.train[-1]["round"]) if self.train else 0

    @property
    def evaluated_rounds(self) -> list[int]:
        """Rounds with measurements before fine-tuning, ascending."""
        return sorted({row.round for row in self.rows if row.moment == "before"})

    @property
    def seconds(self) -> float:
        """Time spent in rounds and evaluations."""
        return sum(event.get("seconds") or 0.0 for event in (*self.train, *self.evaluations))

    @property
    def refused(self) -> list[Refused]:
        """Refused replies, by round."""
        events = (*([self.start] if self.start else []), *self.joins, *self.train, *self.evaluations)
        return [
            _refused(event, reply)
            for event in sorted(events, key=lambda event: int(event["round"]))
            for reply in event.get("refused", [])
        ]

    def at(self, round: int, moment: Moment) -> list[ClientAccuracy]:
        """The measurements of one round and moment."""
        return [row for row in self.rows if row.round == round and row.moment == moment]

    def last(self, moment: Moment) -> list[ClientAccuracy]:
        """The measurements of the last evaluated round."""
        return self.at(self.evaluated_rounds[-1], moment) if self.evaluated_rounds else []

    def held(self, capacity: str) -> float | None:
        """Parameters that a client of this size held, mean over its messages; None if none of this size trained."""
        counts = [
            client["held"] for event in self.train for client in event["clients"] if client["capacity"] == capacity
        ]
        return _mean(counts) if counts else None

    def traffic(self) -> list[Traffic]:
        """Mean bytes per client and round: one entry per size, then the mean over all exchanges."""
        exchanges = [client for event in self.train for client in event["clients"]]
        return [
            _traffic(size, [exchange for exchange in exchanges if exchange["capacity"] == size])
            for size in self.capacities
        ] + [_traffic(MEAN, exchanges)]


def _refused(event: Event, reply: dict[str, Any]) -> Refused:
    """Its texts are made printable once more: the folder may be older, or another's."""
    client, error, trace = printable(reply["client"]), printable(reply["error"]), reply.get("traceback")
    shown = trace and printable(trace, LONGEST_TRACEBACK, lines=True, tail=True)
    return Refused(event["kind"], event["round"], client, error, shown)


def _complete(run: RunFolder) -> Iterator[Event]:
    return (complete_event(event, repr(str(run.path))) for event in run.each_event())


def _without_clients(events: Iterable[Event]) -> Iterator[Event]:
    """Most of a long log is about single clients; it is dropped while the log is read."""
    last: list[Event] = []
    for event in events:
        if event["kind"] == "train":
            event["clients"] = []
        elif event["kind"] == "evaluate" and any(row["moment"] == "before" for row in event["accuracies"]):
            if last and event["round"] > last[-1]["round"]:
                for earlier in last:
                    earlier["accuracies"] = []
                last = []
            last.append(event)
        yield event


def finish(run: RunFolder) -> dict[str, Any]:
    """Write clients.csv, prior_curve.json and then summary.json, whose presence says that the run finished.

    Args:
        run: a run that has written its last event.

    Returns:
        The content of summary.json, see :func:`summary_of`.
    """
    record = Record.of(run)
    run.write_clients_csv(record.rows)
    if record.priors is not None:
        run.write_json(PRIOR_CURVE, {key: record.priors[key] for key in ("round", "strengths", "clients")})
    summary = summary_of(record)
    run.write_json(SUMMARY, summary)
    return summary


def summary_of_run(run: RunFolder) -> dict[str, Any]:
    """The results of a run, finished or not, from its events; see :func:`summary_of`.

    Raises:
        RunFolderError: the events are damaged.
    """
    return summary_of(Record.of(run))


def summary_of(record: Record) -> dict[str, Any]:
    """The results of a run, or of as much of it as there is.

    Returns:
        ``rows``: one per size, ascending, and ``"mean"``; accuracies are fractions, bytes are means per participating
        client and round, what is unknown is None. ``rows_after_fine_tuning``: the same, empty if that was off.
        ``evaluated_round``, ``rounds``, ``seconds``, ``refused``, ``parameters``, ``config_digest``.
    """
    after = record.last("after")
    return {
        "rows": _rows(record, summarise(record.last("before"))),
        "rows_after_fine_tuning": _rows(record, summarise(after)) if after else [],
        "evaluated_round": record.evaluated_rounds[-1] if record.evaluated_rounds else None,
        "rounds": record.rounds,
        "seconds": record.seconds,
        "refused": len(record.refused),
        "parameters": record.start["parameters"] if record.start else None,
        "config_digest": record.config.digest(),
    }


def _rows(record: Record, summaries: Sequence[SizeSummary]) -> list[dict[str, Any]]:
    measured = {summary.capacity: summary for summary in summaries}
    rows = []
    for traffic in record.traffic():
        summary = measured.get(traffic.capacity)
        row: dict[str, Any] = {"capacity": traffic.capacity}
        for column in COLUMNS:
            spread = summary.column(column) if summary else None
            row[column] = spread.mean if spread else None
            row[f"{column}_std"] = spread.std if spread else None
            row[f"{column}_worst_decile"] = spread.worst_decile if spread else None
            row[f"{column}_clients"] = spread.clients if spread else 0
        row["bytes_down"] = sum(traffic.down.values()) if traffic.exchanges else None
        row["bytes_up"] = sum(traffic.up.values()) if traffic.exchanges else None
        row["parameters_held"] = _held(record, traffic.capacity)
        rows.append(row)
    return rows


def _held(record: Record, capacity: str) -> float | None:
    if capacity != MEAN:
        return record.held(capacity)
    sizes = [client["capacity"] for client in record.clients if client["role"] == "train"]
    held = [count for count in map(record.held, sizes) if count is not None]
    return _mean(held) if held else None


def _traffic(capacity: str, exchanges: Sequence[dict[str, Any]]) -> Traffic:
    down = {part: _mean(exchange["down"].get(part, 0) for exchange in exchanges) for part in PARTS}
    up = {part: _mean(exchange["up"].get(part, 0) for exchange in exchanges) for part in UP_PARTS}
    alone = [exchange["mask_alone"] for exchange in exchanges if "mask_alone" in exchange]
    return Traffic(capacity, len(exchanges), down, up, _mean(alone) if alone else None)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
