"""What a monitor reads while a run works: ``metrics.prom`` in the run folder, in Prometheus' text format.

Point the textfile collector of a node exporter at it, or read it as it is. It is written under another name and
renamed, so that a reader never sees half of it. Counters are those of all events of the run, before and after a resume.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from framp_core import errors, files
from framp_core.metrics import COLUMNS, accuracies, summarise

KINDS = ("start", "join", "train", "evaluate")
"""Events after which the file is written anew."""
OTHER = "other"


class RunMetrics:
    """The state of a run in a few numbers, from its events.

    Args:
        rounds: that the run shall have.
    """

    def __init__(self, rounds: int) -> None:
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._set("rounds", "Rounds that the run shall have", rounds)
        self._set("round", "Last round that was trained", 0)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        for refusal in event.get("refused", []):
            reason = reason_of(refusal["error"])
            self._count("refusals", "Replies refused or missing", 1, request=event["kind"], reason=reason)
        if event["kind"] in ("train", "evaluate") and event.get("seconds") is not None:
            self._set("round_seconds", "Duration of the last one", event["seconds"], part=event["kind"])
        if event["kind"] in ("start", "join"):
            self._count("clients", "Clients that were admitted", len(event.get("clients", [])))
        elif event["kind"] == "train":
            self._train(event)
        elif event["kind"] == "evaluate":
            self._evaluate(event)

    def write(self, path: Path) -> None:
        """Put the numbers into a file, whole or not at all."""
        self._set("updated_timestamp_seconds", "When this file was written, Unix time", time.time())
        files.write_bytes(path, generate_latest(self._registry), durable=False)

    def _train(self, event: Mapping[str, Any]) -> None:
        clients = event.get("clients", [])
        self._set("round", "Last round that was trained", event["round"])
        self._set("valid_replies", "Updates that were accepted in the last round", len(clients))
        losses = [client["loss"] for client in clients if client["loss"] is not None]
        if losses:
            self._set("train_loss", "Mean training loss over the clients of the last round", sum(losses) / len(losses))
        for direction in ("down", "up"):
            sent = sum(sum(client[direction].values()) for client in clients)
            self._count("bytes", "Bytes of training and evaluation messages", sent, direction=direction)

    def _evaluate(self, event: Mapping[str, Any]) -> None:
        self._set("evaluated_round", "Round of the last evaluation", event["round"])
        self._count("bytes", "Bytes of training and evaluation messages", event.get("down_bytes", 0), direction="down")
        overall = summarise(row for row in accuracies(event) if row.moment == "before")[-1]
        for column in COLUMNS:
            spread = overall.column(column)
            if spread is not None:
                self._set("accuracy", "Mean over clients at the last evaluation, 0 to 1", spread.mean, of=column)

    def _set(self, name: str, help_text: str, value: float, **labels: str) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"framp_{name}", help_text, list(labels), registry=self._registry)
        (self._gauges[name].labels(**labels) if labels else self._gauges[name]).set(value)

    def _count(self, name: str, help_text: str, value: float, **labels: str) -> None:
        if name not in self._counters:
            self._counters[name] = Counter(f"framp_{name}", help_text, list(labels), registry=self._registry)
        (self._counters[name].labels(**labels) if labels else self._counters[name]).inc(value)


def reason_of(error: str) -> str:
    """The kind of a refusal: the name of an error of this package, Flower's code, that no reply came, or ``other``.

    A client chooses what its error is called; it must not choose how many time series a monitor keeps.
    """
    kind = error.partition(":")[0]
    known = isinstance(getattr(errors, kind, None), type)
    return kind if known or kind == "no reply before the deadline" or _is_flowers(kind) else OTHER


def _is_flowers(kind: str) -> bool:
    code = kind.removeprefix("Flower error ")
    return kind != code and code.isdecimal() and len(code) <= 3
