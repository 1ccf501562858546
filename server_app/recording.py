"""Rows of the event log, and the metric records that Flower shows."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from framp_core.config import FrampConfig
from framp_core.data import DataFacts, load_partition, warn_of_notes
from framp_core.defence import Verdict
from framp_core.errors import DataError, FrampError, ProtocolError
from framp_core.fields import read_count, read_field
from framp_core.metrics import COLUMNS, ClientAccuracy, Moment, Population, PriorCounts, summarise
from framp_core.run_folder import MANIFEST, RunFolder
from server_app.registry import ClientRecord
from server_app.replies import Refusal

if TYPE_CHECKING:
    from server_app.strategies.base import ClientUpdate

Row = dict[str, Any]
POPULATIONS: tuple[Population, ...] = ("local", "validation", "union")
MAX_EXAMPLES = 2**31
MOMENTS: dict[Moment, str] = {"before": "", "after": "-tuned"}
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
    if not math.isfinite(loss):
        raise ProtocolError(f"the reply reports a loss of {loss}; lower the client's learning rate")
    return blob, loss, read_count(metrics, "examples", 1, MAX_EXAMPLES)


def read_accuracies(client: ClientRecord, server_round: int, content: RecordDict) -> list[ClientAccuracy]:
    """The measurements in a client's reply: one per population and moment.

    Raises:
        ProtocolError: no metrics, or counts that contradict each other.
    """
    metrics = content.metric_records.get("metrics", MetricRecord())
    measured = []
    for moment, suffix in MOMENTS.items():
        for population in POPULATIONS:
            total, correct = metrics.get(f"{population}-total{suffix}"), metrics.get(f"{population}-correct{suffix}")
            if total is None or (total == 0 and isinstance(total, int)):
                continue
            if not isinstance(total, int) or not isinstance(correct, int):
                reported = f"{str(correct)[:80]} correct of {str(total)[:80]}"
                raise ProtocolError(f"{client.name} reports {reported} {population} examples, expected whole numbers")
            measured.append(
                ClientAccuracy(
                    client.name, client.role, str(client.capacity), server_round, population, moment, correct, total
                )
            )
    if not measured:
        raise ProtocolError(f"the reply of {client.name} holds no counts; its records are {sorted(content)}")
    return measured


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
    populations: tuple[Population, ...] = ("local", "union")
    for population in populations if strengths else ():
        total, correct = metrics.get(f"{population}-total"), metrics.get(f"{population}-prior-correct")
        if total is None or (total == 0 and isinstance(total, int)):
            continue
        counts = tuple(count for count in correct if isinstance(count, int)) if isinstance(correct, list) else ()
        if len(counts) != strengths or not isinstance(total, int):
            raise ProtocolError(
                f"{client.name} reports {str(correct)[:80]} correct of {str(total)[:80]} {population} examples; "
                f"expected a count for each of {strengths} strengths of the prior"
            )
        found.append(PriorCounts(client.name, client.role, str(client.capacity), population, counts, total))
    return found


def manifest(config: FrampConfig, nodes: int, digest: str) -> dict[str, Any]:
    """The partition's manifest, made again on the server, and ``data``, what a model must be told of the data.

    ``notes`` say what was left out of the data or read otherwise than may be expected; they are logged, too.

    The digest alone where the server cannot read the data.
    """
    try:
        data, partition = load_partition(config, nodes)
    except DataError as error:
        logger.warning("the server cannot read the data, so manifest.json holds the clients' digest alone: %s", error)
        return {"digest": digest}
    if partition.digest != digest:
        raise DataError(
            f"clients work on partition {digest[:12]}, the server's data give {partition.digest[:12]}; "
            f"data.root must hold the same data everywhere"
        )
    return {**partition.manifest(), "data": DataFacts.of(data).to_dict(), "notes": warn_of_notes(data)}


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
