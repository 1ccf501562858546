"""Rows of the event log, and the metric records that Flower shows."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from framp_core.config import FrampConfig
from framp_core.data import DataFacts, ImageData, Partition, load_partition, warn_of_notes
from framp_core.defence import Verdict
from framp_core.errors import DataError, FrampError, ProtocolError
from framp_core.fields import read_count, read_field, shown
from framp_core.metrics import COLUMNS, POPULATIONS, ClientAccuracy, Moment, Population, PriorCounts, summarise
from framp_core.run_folder import MANIFEST, RunFolder
from server_app.registry import MAX_EXAMPLES, ClientRecord
from server_app.replies import Refusal

if TYPE_CHECKING:
    from framp_core.data.graph import GraphData
    from server_app.strategies.base import ClientUpdate

Row = dict[str, Any]
Known: TypeAlias = "tuple[ImageData | GraphData, Partition] | None"
"""The data of a run and their partition, if they are at hand."""
MOMENTS: dict[Moment, str] = {"before": "", "after": "-tuned"}
LARGEST_LOSS = float(np.finfo(np.float32).max)
"""Of a mean that clients compute in float32."""
SMALLEST_LOSS = -0.01
"""No term of a loss is negative; rounding may make one a little smaller than 0."""
logger = logging.getLogger("flwr.framp")


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


def train_row(update: "ClientUpdate", down: Mapping[str, int], up: Mapping[str, int], mask_alone: int) -> Row:
    """One client's training in one round, with the parameters it held and the bytes of its messages by part.

    ``mask_alone`` is what its mask would have cost without a reference.
    """
    return {
        "client": update.client.name,
        "capacity": str(update.client.capacity),
        "loss": update.loss,
        "examples": update.examples,
        "norm": update.norm,
        "held": update.delta.size,
        "down": dict(down),
        "up": dict(up),
        "mask_alone": mask_alone,
    }


def verdict_row(verdict: Verdict) -> Row:
    """What the defences did with a client's delta; nothing for one that they left alone and did not compare."""
    row: Row = {} if verdict.shortened == 1 else {"shortened": verdict.shortened}
    if verdict.agreement is not None:
        row |= {"agreement": verdict.agreement, "screened": verdict.screened}
    return row


def refusal_rows(refused: Sequence[Refusal]) -> list[Row]:
    """One row per refused or missing reply; the first traceback that a client sent goes along."""
    rows: list[Row] = [{"client": refusal.client, "error": refusal.error} for refusal in refused]
    first = next((index for index, refusal in enumerate(refused) if refusal.traceback), None)
    if first is not None:
        rows[first]["traceback"] = refused[first].traceback
    return rows


def read_training(content: RecordDict) -> tuple[bytes, float, int]:
    """The encoded update, the mean training loss and the number of examples in a client's reply.

    Raises:
        ProtocolError: a field is missing, of another type, or out of range.
    """
    blob = read_field(content.config_records.get("framp", ConfigRecord()), "payload", bytes)
    metrics = content.metric_records.get("metrics", MetricRecord())
    loss = read_field(metrics, "loss", float)
    if not SMALLEST_LOSS <= loss <= LARGEST_LOSS:
        raise ProtocolError(
            f"the reply reports a loss of {loss:g}, expected 0 to {LARGEST_LOSS:.3g}; lower the client's learning rate"
        )
    return blob, loss, read_count(metrics, "examples", 1, MAX_EXAMPLES)


def read_accuracies(
    client: ClientRecord, server_round: int, content: RecordDict, tuned: bool = False
) -> list[ClientAccuracy]:
    """The measurements in a client's reply: one per moment and population that the client has examples of.

    Args:
        client: who replied.
        server_round: the round.
        content: the reply.
        tuned: whether the client was asked to measure after fine-tuning, too; what was not asked for is not read.

    Raises:
        ProtocolError: no counts, counts that contradict each other, or not as many examples as the client registered
            with.
    """
    metrics = content.metric_records.get("metrics", MetricRecord())
    moments: tuple[Moment, ...] = ("before", "after") if tuned else ("before",)
    capacity, measured = str(client.capacity), []
    for moment in moments:
        for population in _tested(client):
            suffix = MOMENTS[moment]
            total = _total(client, population, metrics, suffix)
            correct = read_count(metrics, f"{population}-correct{suffix}", 0, total)
            row = ClientAccuracy(client.name, client.role, capacity, server_round, population, moment, correct, total)
            measured.append(row)
    if not measured:
        raise ProtocolError(f"{client.name} has no examples to measure an accuracy on; give it test data")
    return measured


def _tested(client: ClientRecord) -> list[Population]:
    return [population for population in POPULATIONS if client.tests[population]]


def _total(client: ClientRecord, population: Population, metrics: MetricRecord, suffix: str = "") -> int:
    """How many examples of a population a reply speaks of."""
    total, registered = read_field(metrics, f"{population}-total{suffix}", int), client.tests[population]
    if total != registered:
        raise ProtocolError(
            f"the reply speaks of {total} {population} examples; {client.name} registered with {registered}. Start its "
            f"node again if its data have changed"
        )
    return total


def read_prior_counts(client: ClientRecord, strengths: int, content: RecordDict) -> list[PriorCounts]:
    """The counts at each strength of the class prior in a client's reply; none if none were asked for.

    Args:
        client: who replied.
        strengths: how many strengths were asked for.
        content: the reply.

    Raises:
        ProtocolError: not one count per strength, or counts that contradict each other.
    """
    metrics = content.metric_records.get("metrics", MetricRecord())
    found = []
    swept = [population for population in _tested(client) if population != "validation"]
    for population in swept if strengths else ():
        total, correct = _total(client, population, metrics), metrics.get(f"{population}-prior-correct")
        if not isinstance(correct, list) or len(correct) != strengths or not all(type(each) is int for each in correct):
            raise ProtocolError(
                f"{client.name} reports {shown(correct)} correct of {total} {population} examples; "
                f"expected a count for each of {strengths} strengths of the prior"
            )
        counts = tuple(int(count) for count in correct)
        found.append(PriorCounts(client.name, client.role, str(client.capacity), population, counts, total))
    return found


def known_partition(config: FrampConfig, nodes: int, digest: str) -> Known:
    """The data and the partition, made again on the server; None where it cannot read the data.

    Raises:
        DataError: the clients work on another partition.
    """
    try:
        data, partition = load_partition(config, nodes)
    except DataError as error:
        logger.warning("the server cannot read the data, so manifest.json holds the clients' digest alone: %s", error)
        return None
    if partition.digest != digest:
        raise DataError(
            f"clients work on partition {digest[:12]}, the server's data give {partition.digest[:12]}; "
            f"data.root must hold the same data everywhere"
        )
    return data, partition


def manifest(known: Known, digest: str) -> dict[str, Any]:
    """The partition's manifest, and ``data``, what a model must be told of the data; the digest alone if unknown.

    ``notes`` say what was left out of the data or read otherwise than may be expected; they are logged, too.
    """
    if known is None:
        return {"digest": digest}
    data, partition = known
    return {**partition.manifest(), "data": DataFacts.of(data).to_dict(), "notes": warn_of_notes(data)}


def largest_counts(partition: Partition) -> dict[str, int]:
    """The most examples that a client of the partition has, by what it registers."""
    clients = partition.clients
    return {
        "train": max(len(client.train) for client in clients),
        "local": max(len(client.test) for client in clients),
        "validation": max(len(client.validation) for client in clients),
        "union": sum(len(client.test) for client in clients if client.role == "train"),
    }


def changed_data(run: RunFolder, config: FrampConfig, nodes: int) -> str:
    """Which parts of the data are not those of the run's manifest, for a message; empty where that cannot be told."""
    try:
        before, (_, partition) = run.json(MANIFEST)["data_digests"], load_partition(config, nodes)
    except (FrampError, KeyError):
        return ""
    changed = [part for part, digest in partition.data_digests.items() if before.get(part) != digest]
    return f" (changed: {', '.join(changed)})" if changed else ""


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


def accuracy_record(rows: Iterable[ClientAccuracy]) -> MetricRecord | None:
    """Mean accuracy over clients before fine-tuning: ``local``, ``union``, ``unseen``, ``validation``."""
    overall = summarise(row for row in rows if row.moment == "before")[-1]
    spreads = {column: overall.column(column) for column in COLUMNS}
    return MetricRecord({column: spread.mean for column, spread in spreads.items() if spread}) or None
