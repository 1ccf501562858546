"""Who takes part: discovery by query messages, clients keyed by their stable name."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from framp_core.codec import decode_descriptor
from framp_core.config import FrampConfig
from framp_core.config_values import parse_capacity
from framp_core.errors import EngineError, FrampError, ProtocolError, ResumeError
from framp_core.fields import read_count, read_field, read_name, shown
from framp_core.foreign_text import listed
from framp_core.metrics import POPULATIONS, Population, Role
from framp_core.run_log import about
from server_app.replies import Refusal, Reply, held_reference, read_replies

logger = logging.getLogger("flwr.framp")
POLL_SECONDS = 0.2
ABSENT = -1
"""Node id of a client that is known from a checkpoint and was not met since; Flower's ids are not negative."""
SAME_DESCRIPTOR = 0.02
"""Distance of two descriptors, which have norm 1, up to which rounding on another machine may explain it."""
MAX_CLASSES = 2**16
MAX_CLIENTS = 2**20
"""The server makes a partition over as many as the first of its clients say, before it knows who they are."""
MAX_EXAMPLES = 2**31
MAX_EXAMPLE_SIZE = 2**24
"""Numbers in an example: an image of 2,365 x 2,365 pixels in colour."""
RETRY_SECONDS = 30.0
"""A refused or silent node is asked again after this time: it may have been repaired, or its twin may be gone."""


@dataclass(frozen=True)
class ClientRecord:
    """What the server knows of a client.

    Attributes:
        name: stable name; node ids change with every start of a node.
        node_id: Flower's current address of the client.
        role: ``train``, or ``unseen`` for a client that is evaluated and never trains.
        capacity: gamma.
        shape: of an example, as in :class:`framp_core.data.ClientData`.
        classes: number of classes.
        train_examples: number of training examples.
        tests: number of examples that the client measures an accuracy on, by population; 0 for none. What it reports
            later has to be of as many.
        partitions: number of partitions that the client knows of.
        partition_digest: hash of the partition the client works on.
        descriptor: v_i, float32 ``(d,)``.
        descriptor_bytes: size of the encoded descriptor.
        reference: name of the reference mask that the client holds, None for none.
        content_digest: hash of data that the partition does not know, ``none`` if there are none.
    """

    name: str
    node_id: int
    role: Role
    capacity: Fraction
    shape: tuple[int, ...]
    classes: int
    train_examples: int
    tests: Mapping[Population, int]
    partitions: int
    partition_digest: str
    descriptor: np.ndarray
    descriptor_bytes: int
    reference: object = None
    content_digest: str = "none"

    @classmethod
    def read(cls, node_id: int, content: RecordDict) -> "ClientRecord":
        """Read the reply of ``query.describe``.

        Raises:
            ProtocolError: a field is missing, of another type or out of range.
            ConfigError: the capacity is none.
        """
        try:
            card, payload = content.config_records["client"], content.config_records["framp"]
        except KeyError as error:
            raise ProtocolError(f"a description lacks the record {error}; it holds {listed(content)}") from error
        blob = read_field(payload, "payload", bytes)
        return cls(
            name=read_name(card, "name"),
            node_id=node_id,
            role=_role(card.get("role")),
            capacity=parse_capacity(read_field(card, "capacity", str)),
            shape=_shape(card.get("shape")),
            classes=read_count(card, "classes", 1, MAX_CLASSES),
            train_examples=read_count(card, "train-examples", 1, MAX_EXAMPLES),
            tests={name: read_count(card, f"{name}-examples", 0, MAX_EXAMPLES) for name in POPULATIONS},
            partitions=read_count(card, "partitions", 1, MAX_CLIENTS),
            partition_digest=read_name(card, "partition-digest"),
            descriptor=_descriptor(blob),
            descriptor_bytes=len(blob),
            reference=held_reference(content),
            content_digest=read_name(card, "content-digest"),
        )

    @property
    def task(self) -> str:
        """What all clients of a run must agree on."""
        return (
            f"inputs of shape {self.shape}, {self.classes} classes, descriptors of {len(self.descriptor)} floats, "
            f"partition {self.partition_digest[:12]} over {self.partitions} nodes"
        )


def _shape(sides: object) -> tuple[int, ...]:
    """Of an example. Models are built for it, so that a client must not choose how much memory that takes."""
    if not isinstance(sides, list) or len(sides) not in (1, 3) or not all(type(side) is int for side in sides):
        raise ProtocolError(f"the shape of an example is {shown(sides)}, expected one or three whole numbers")
    if min(sides) < 1 or math.prod(sides) > MAX_EXAMPLE_SIZE:
        raise ProtocolError(f"an example of shape {sides} has not 1 to {MAX_EXAMPLE_SIZE} numbers; use smaller ones")
    return tuple(sides)


def _descriptor(blob: bytes) -> np.ndarray:
    """The descriptor in a reply, whose norm is at most 1: one client must not move what all are measured by."""
    vector = decode_descriptor(blob)
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if norm > 1.01:
        raise ProtocolError(f"the descriptor has norm {norm:g}; every descriptor is scaled to unit norm")
    return vector


def _role(value: object) -> Role:
    if value not in ("train", "unseen"):
        raise ProtocolError(f"the role is {shown(value)}, expected train or unseen")
    return "train" if value == "train" else "unseen"


class ClientRegistry:
    """Clients by name.

    Every node that connects, or connects again, is asked for its description, and asked once more every
    ``RETRY_SECONDS`` while it is refused. Nothing here waits for a single node, so one that hangs holds nobody up.

    Args:
        config: patience, number of clients to wait for.
        instruction: the record ``config`` of the query messages (fingerprint and round).

    Attributes:
        clients: every client that was ever admitted, by name.
    """

    def __init__(self, config: FrampConfig, instruction: ConfigRecord) -> None:
        self._config = config
        self._instruction = instruction
        self._online: set[int] = set()
        self._pending: dict[str, int] = {}
        self._retry_at: dict[int, float] = {}
        self._described: set[int] = set()
        self._task = ""
        self._refused: dict[int, Refusal] = {}
        self._news: list[Refusal] = []
        self._resized: set[str] = set()
        self._largest: dict[str, int] = {}
        self._smallest = Fraction(0)
        self.clients: dict[str, ClientRecord] = {}

    @property
    def task(self) -> str:
        """What the clients agreed on; empty before :meth:`wait`."""
        return self._task

    def state(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """All clients, by name: their descriptors, float32 ``(m, d)``, and the rest as JSON-able values."""
        clients = [client for _, client in sorted(self.clients.items())]
        rows = [{**asdict(client), "capacity": str(client.capacity)} for client in clients]
        for row in rows:
            del row["descriptor"], row["node_id"]
        return np.stack([client.descriptor for client in clients]), rows

    def restore(self, descriptors: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> None:
        """Know the clients of :meth:`state` again; each counts as absent until its node is met.

        Raises:
            ResumeError: the rows are not those that this version writes.
        """
        try:
            for descriptor, row in zip(descriptors, rows, strict=True):
                capacity, shape = parse_capacity(row["capacity"]), _shape(row["shape"])
                fields = {**row, "capacity": capacity, "shape": shape}
                self.clients[read_name(row, "name")] = ClientRecord(node_id=ABSENT, descriptor=descriptor, **fields)
        except (FrampError, KeyError, TypeError, ValueError) as error:
            raise ResumeError(
                f"the checkpoint's clients are not as this version notes them ({type(error).__name__}: {error}); use "
                f"the version of FRAMP that wrote it, or start a new run"
            ) from error

    def moved(self, descriptors: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Connected clients of :meth:`state` whose data, by content digest or descriptor, are others now."""
        before = {row["name"]: (row, descriptor) for row, descriptor in zip(rows, descriptors, strict=True)}
        known = [(client, *before[client.name]) for client in self.online() if client.name in before]
        return [
            client.name
            for client, row, descriptor in known
            if client.content_digest != row["content_digest"]
            or np.linalg.norm(client.descriptor - descriptor) > SAME_DESCRIPTOR
        ]

    @property
    def expected(self) -> int:
        """How many clients there should be: as many as their partition has parts, if a client told."""
        told = Counter(client.partitions for client in self.clients.values())
        return told.most_common(1)[0][0] if told else self._config.partition.nodes

    def online(self, role: Role | None = None) -> list[ClientRecord]:
        """Clients whose node is connected, sorted by name."""
        return [
            client
            for _, client in sorted(self.clients.items())
            if client.node_id in self._online and role in (None, client.role)
        ]

    def take_refusals(self) -> list[Refusal]:
        """Refused descriptions since the last call."""
        news, self._news = self._news, []
        return news

    def hear(self, name: str, capacity: object) -> None:
        """Take over the capacity that a client tells with a reply; it holds from the next message to it on.

        Args:
            name: of a known client.
            capacity: as in :func:`framp_core.config_values.parse_capacity`; None, from a client that told nothing,
                leaves the old one.

        Raises:
            ConfigError: it is no capacity.
            ProtocolError: it is too small for the network.
        """
        known = self.clients[name]
        if capacity is not None and parse_capacity(capacity) != known.capacity:
            resized = replace(known, capacity=parse_capacity(capacity))
            self._check_capacity(resized)
            self._know(resized)

    def take_resized(self) -> set[str]:
        """Names of the clients whose capacity has changed since the last call."""
        resized, self._resized = self._resized, set()
        return resized

    def wait(self, grid: Grid) -> None:
        """Ask nodes as they connect, until every expected node has answered or the deadline has passed.

        Then the clients must agree on their task; those that differ from the majority are refused.

        Raises:
            EngineError: no client answered in time, or all were refused; the first reason is given.
        """
        deadline = time.monotonic() + self._config.server.discovery_deadline
        self.poll(grid)
        while len(self.online()) + len(self._refused) < self.expected and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self.poll(grid)
        self._agree()
        self._require_one()
        if len(self.online()) < self.expected:
            logger.warning("%d of %d clients answered; the run goes on", len(self.online()), self.expected)

    def limit(self, largest: Mapping[str, int]) -> None:
        """Refuse clients, known ones and those to come, that have more examples than any client of the partition.

        How many a client has is its own claim, and the weight of what it sends.

        Args:
            largest: number of examples for ``train`` and for each population.

        Raises:
            EngineError: all known clients are refused.
        """
        self._largest = dict(largest)
        self._drop_where(self._check_counts)

    def limit_capacity(self, smallest: Fraction) -> None:
        """Refuse clients, known ones and those to come, of whose submodel nothing would be left.

        Args:
            smallest: capacity that is taken.

        Raises:
            EngineError: all known clients are refused.
        """
        self._smallest = smallest
        self._drop_where(self._check_capacity)

    def require(self, grid: Grid, count: int) -> None:
        """Look for new nodes, then wait until at least ``count`` clients that train are connected.

        Raises:
            EngineError: they are not within ``server.discovery-deadline``.
        """
        deadline = time.monotonic() + self._config.server.discovery_deadline
        self.poll(grid)
        while len(self.online("train")) < count:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{len(self.online('train'))} clients that train are connected, server.minimum-replies asks for "
                    f"{count}; waited {self._config.server.discovery_deadline:g} s (server.discovery-deadline)"
                )
            time.sleep(POLL_SECONDS)
            self.poll(grid)

    def poll(self, grid: Grid) -> None:
        """Ask nodes that are due, and take in the answers that have come."""
        before, self._online = self._online, set(grid.get_node_ids())
        self._described -= before - self._online
        for node in set(self._retry_at) - self._online:
            self._retry_at.pop(node)
            self._refused.pop(node, None)
        self._ask(grid)
        if self._pending:
            labels = {key: str(node) for key, node in self._pending.items()}
            good, bad = read_replies(labels, grid.pull_messages(list(self._pending)))
            silent = {int(refusal.client) for refusal in bad if refusal.missing}
            self._pending = {key: node for key, node in self._pending.items() if node in silent}
            self._admit(good)
            for refusal in bad:
                if not refusal.missing:
                    self._refuse(refusal)

    def _ask(self, grid: Grid) -> None:
        now = time.monotonic()
        due = [node for node in sorted(self._online - self._described) if self._retry_at.get(node, -math.inf) <= now]
        if not due:
            return
        # An older question to the same node is given up: whichever answer comes, only the newest is waited for.
        self._pending = {key: node for key, node in self._pending.items() if node not in due}
        messages = [
            Message(RecordDict({"config": self._instruction}), node, "query.describe", group_id="0") for node in due
        ]
        grid.push_messages(messages)
        for message in messages:
            node = message.metadata.dst_node_id
            self._pending[message.metadata.message_id] = node
            self._retry_at[node] = now + max(RETRY_SECONDS, self._config.server.discovery_deadline)

    def _admit(self, replies: Sequence[Reply]) -> None:
        for reply in sorted(replies, key=lambda reply: int(reply.client)):
            node = int(reply.client)
            try:
                record = ClientRecord.read(node, reply.content)
                self._check(record)
            except FrampError as error:
                self._refuse(Refusal.of(str(node), error, reply.message_id))
            else:
                self._refused.pop(node, None)
                self._described.add(node)
                self._know(record)
                where = about(None, record.name, reply.message_id)
                logger.debug("%s described itself from node %d", record.name, node, extra=where)

    def _know(self, record: ClientRecord) -> None:
        before = self.clients.get(record.name, record)
        if record.capacity != before.capacity:
            logger.info("%s has capacity %s now, %s before", record.name, record.capacity, before.capacity)
            self._resized.add(record.name)
        self.clients[record.name] = record

    def _refuse(self, refusal: Refusal) -> None:
        """Note a refused node; ``refusal.client`` is its id."""
        node = int(refusal.client)
        refusal = replace(refusal, client=f"node {node}")
        self._retry_at[node] = time.monotonic() + RETRY_SECONDS
        if self._refused.get(node) != refusal:
            self._news.append(refusal)
        self._refused[node] = refusal

    def _require_one(self) -> None:
        if self.online():
            return
        first = next(iter(self._refused.values()), None)
        reason = (first.traceback or first.error) if first else "no node connected"
        raise EngineError(
            f"no client took part within {self._config.server.discovery_deadline:g} s "
            f"(server.discovery-deadline). First reason: {reason}"
        )

    @contextmanager
    def _dropping(self, client: ClientRecord) -> Iterator[None]:
        """Forget a known client in which an error is found."""
        try:
            yield
        except ProtocolError as error:
            del self.clients[client.name]
            self._described.discard(client.node_id)
            self._refuse(Refusal.of(str(client.node_id), error))

    def _drop_where(self, check: Callable[[ClientRecord], None]) -> None:
        for _, client in sorted(self.clients.items()):
            with self._dropping(client):
                check(client)
        self._require_one()

    def _check_capacity(self, client: ClientRecord) -> None:
        if client.capacity < self._smallest:
            raise ProtocolError(
                f"capacity {client.capacity} of {client.name} leaves nothing of the network; give it {self._smallest} "
                f"or more"
            )

    def _check_counts(self, client: ClientRecord) -> None:
        for name, count in (("train", client.train_examples), *client.tests.items()):
            if count > self._largest.get(name, MAX_EXAMPLES):
                raise ProtocolError(
                    f"{client.name} registers with {count} {name} examples; no client of the partition has more than "
                    f"{self._largest[name]}"
                )

    def _check(self, new: ClientRecord) -> None:
        self._check_counts(new)
        self._check_capacity(new)
        holder = self.clients.get(new.name)
        if holder is not None and holder.node_id != new.node_id and holder.node_id in self._online:
            raise ProtocolError(f"two connected nodes call themselves {new.name!r}; give each its own client-name")
        if self._task and new.task != self._task:
            raise ProtocolError(f"{new.name} has {new.task}; this run is about {self._task}")

    def _agree(self) -> None:
        tasks = Counter(client.task for client in self.online())
        if not tasks:
            return
        self._task = tasks.most_common(1)[0][0]
        for name, client in sorted(self.clients.items()):
            with self._dropping(client):
                if client.task != self._task:
                    raise ProtocolError(f"{name} has {client.task}; most have {self._task}")
