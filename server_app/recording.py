"""Rows of the event log, and the metric records that Flower shows."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import MetricRecord, RecordDict

from framp_core.errors import ProtocolError
from server_app.registry import ClientRecord
from server_app.replies import Refusal

if TYPE_CHECKING:
    from server_app.strategies.base import ClientUpdate

Row = dict[str, Any]
POPULATIONS = ("local", "validation", "union")
MOMENTS = {"before": "", "after": "-tuned"}


def client_rows(clients: Iterable[ClientRecord]) -> list[Row]:
    """One row per known client."""
    return [
        {
            "client": client.name,
            "role": client.role,
            "capacity": str(client.capacity),
            "train_examples": client.train_examples,
            "descriptor_bytes": client.descriptor_bytes,
        }
        for client in sorted(clients, key=lambda client: client.name)
    ]


def train_row(update: "ClientUpdate", down: Mapping[str, int], up: Mapping[str, int]) -> Row:
    """One client's training in one round, with the bytes of its messages by part."""
    return {
        "client": update.client.name,
        "capacity": str(update.client.capacity),
        "loss": update.loss,
        "examples": update.examples,
        "down": dict(down),
        "up": dict(up),
    }


def refusal_rows(refused: Iterable[Refusal]) -> list[Row]:
    """One row per refused or missing reply."""
    return [{"client": refusal.client, "error": refusal.error} for refusal in refused]


def accuracy_rows(client: ClientRecord, content: RecordDict) -> list[Row]:
    """One row per population and moment that the client measured.

    Raises:
        ProtocolError: no metrics, or more correct than total.
    """
    metrics = content.metric_records.get("metrics", MetricRecord())
    rows = []
    for moment, suffix in MOMENTS.items():
        for population in POPULATIONS:
            total = metrics.get(f"{population}-total{suffix}")
            if not total:
                continue
            correct = metrics.get(f"{population}-correct{suffix}", -1)
            if not (isinstance(correct, int) and isinstance(total, int) and 0 <= correct <= total):
                raise ProtocolError(f"{population} reports {correct!r} correct of {total!r}")
            rows.append(
                {
                    "client": client.name,
                    "role": client.role,
                    "capacity": str(client.capacity),
                    "population": population,
                    "moment": moment,
                    "correct": correct,
                    "total": total,
                }
            )
    if not rows:
        raise ProtocolError(f"the reply to an evaluation holds no counts; its records are {sorted(content)}")
    return rows


def mean_record(rows: Sequence[Row]) -> MetricRecord | None:
    """Mean loss and bytes per client of a training round."""
    if not rows:
        return None
    count = len(rows)
    return MetricRecord(
        {
            "loss": sum(row["loss"] for row in rows) / count,
            "bytes-down": sum(sum(row["down"].values()) for row in rows) / count,
            "bytes-up": sum(sum(row["up"].values()) for row in rows) / count,
        }
    )


def accuracy_record(rows: Iterable[Row]) -> MetricRecord | None:
    """Mean accuracy over clients, by population: ``local``, ``validation``, ``union``, ``unseen``."""
    accuracies: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["moment"] == "before":
            unseen = row["role"] == "unseen"
            name = {"local": "unseen"}.get(row["population"]) if unseen else row["population"]
            if name:
                accuracies[name].append(row["correct"] / row["total"])
    return MetricRecord({name: sum(values) / len(values) for name, values in accuracies.items()}) or None
