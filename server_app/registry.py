"""Who takes part: discovery by query messages, clients keyed by their stable name."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from framp_core.codec import decode_descriptor
from framp_core.config import FrampConfig, parse_capacity
from framp_core.errors import EngineError, FrampError, ProtocolError
from framp_core.metrics import Role
from server_app.replies import Refusal, Reply, read_replies

logger = logging.getLogger("flwr.framp")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class ClientRecord:
    """What the server knows of a client.

    Attributes:
        name: stable name; node ids change with every start of a node.
        node_id: Flower's current address of the client.
        role: ``train``, or ``unseen`` for a client that is evaluated and never trains.
        capacity: gamma.
        shape: channels, height and width of an image.
        classes: number of classes.
        train_examples: number of training images.
        partitions: number of partitions that the client knows of.
        partition_digest: hash of the partition the client works on.
        descriptor: v_i, float32 ``(d,)``.
        class_counts: training images per class, int64 ``(classes,)``.
        descriptor_bytes: size of the encoded descriptor.
    """

    name: str
    node_id: int
    role: Role
    capacity: Fraction
    shape: tuple[int, int, int]
    classes: int
    train_examples: int
    partitions: int
    partition_digest: str
    descriptor: np.ndarray
    class_counts: np.ndarray
    descriptor_bytes: int

    @classmethod
    def read(cls, node_id: int, content: RecordDict) -> "ClientRecord":
        """Read the reply of ``query.describe``.

        Raises:
            ProtocolError: a field is missing or out of range.
        """
        try:
            card, blob = content.config_records["client"], content.config_records["framp"]["payload"]
            channels, height, width = (int(side) for side in card["shape"])  # type: ignore[union-attr, arg-type]
            classes = int(card["classes"])  # type: ignore[arg-type]
            descriptor, counts = decode_descriptor(blob, classes)  # type: ignore[arg-type]
            return cls(
                name=str(card["name"]),
                node_id=node_id,
                role=_role(card["role"]),
                capacity=parse_capacity(card["capacity"]),
                shape=(channels, height, width),
                classes=classes,
                train_examples=int(card["train-examples"]),  # type: ignore[arg-type]
                partitions=int(card["partitions"]),  # type: ignore[arg-type]
                partition_digest=str(card["partition-digest"]),
                descriptor=descriptor,
                class_counts=counts,
                descriptor_bytes=len(blob),  # type: ignore[arg-type]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a description lacks or garbles a field: {type(error).__name__} {error}") from error


class ClientRegistry:
    """Clients by name. Asks every node it has not seen before, at the start and in every round.

    Args:
        config: patience, number of clients to wait for.
        instruction: the record ``config`` of the query messages (fingerprint and round).
    """

    def __init__(self, config: FrampConfig, instruction: ConfigRecord) -> None:
        self._config = config
        self._instruction = instruction
        self._asked: set[int] = set()
        self._online: set[int] = set()
        self.clients: dict[str, ClientRecord] = {}
        self.refused: list[Refusal] = []

    @property
    def expected(self) -> int:
        """How many clients there should be: as many as their partition has parts, if a client told."""
        told = [client.partitions for client in self.clients.values()]
        return max(told, default=self._config.partition.nodes)

    def online(self, role: str | None = None) -> list[ClientRecord]:
        """Clients whose node is connected, sorted by name."""
        return [
            client
            for _, client in sorted(self.clients.items())
            if client.node_id in self._online and role in (None, client.role)
        ]

    def wait(self, grid: Grid) -> None:
        """Ask nodes as they connect, until all expected clients are known or the deadline has passed.

        Raises:
            EngineError: no client answered in time, or the first refusal if all were refused.
        """
        deadline = time.monotonic() + self._config.server.discovery_deadline
        while len(self._asked) < self.expected and time.monotonic() < deadline:
            if not self.refresh(grid, deadline - time.monotonic()):
                time.sleep(POLL_SECONDS)
        if not self.clients:
            reason = self.refused[0].traceback or self.refused[0].error if self.refused else "no node connected"
            raise EngineError(
                f"no client answered within {self._config.server.discovery_deadline:g} s "
                f"(server.discovery-deadline); {len(self._asked)} nodes were asked. First reason: {reason}"
            )
        if len(self.clients) < self.expected:
            logger.warning("%d of %d clients answered; the run goes on", len(self.clients), self.expected)

    def refresh(self, grid: Grid, timeout: float) -> bool:
        """Ask nodes that were not asked before; return whether there were any."""
        self._online = set(grid.get_node_ids())
        new = sorted(self._online - self._asked)
        if not new:
            return False
        messages = [
            Message(RecordDict({"config": self._instruction}), node, "query.describe", group_id="0") for node in new
        ]
        replies = grid.send_and_receive(messages, timeout=timeout)
        labels = {message.metadata.message_id: f"node {message.metadata.dst_node_id}" for message in messages}
        nodes = {f"node {node}": node for node in new}
        good, refused = read_replies(labels, replies)
        silent = {refusal.client for refusal in refused if refusal.missing}
        self._asked |= {node for label, node in nodes.items() if label not in silent}
        self.refused += refused + self._admit((nodes[reply.client], reply) for reply in good)
        return True

    def _admit(self, replies: Iterable[tuple[int, Reply]]) -> list[Refusal]:
        refused = []
        for node, reply in replies:
            try:
                record = ClientRecord.read(node, reply.content)
                self._check(record)
            except FrampError as error:
                refused.append(Refusal(reply.client, f"{type(error).__name__}: {error}"))
                logger.warning("%s refused: %s", reply.client, error)
            else:
                self.clients[record.name] = record
        return refused

    def _check(self, new: ClientRecord) -> None:
        holder = self.clients.get(new.name)
        if holder is not None and holder.node_id in self._online:
            raise ProtocolError(f"two connected nodes call themselves {new.name!r}; give each its own client-name")
        for other in list(self.clients.values())[:1]:
            same = (other.shape, other.classes, len(other.descriptor)) == (new.shape, new.classes, len(new.descriptor))
            if not same:
                raise ProtocolError(
                    f"{new.name} has images {new.shape}, {new.classes} classes and a descriptor of "
                    f"{len(new.descriptor)} floats; {other.name} has {other.shape}, {other.classes} and "
                    f"{len(other.descriptor)}"
                )


def _role(value: object) -> Role:
    if value not in ("train", "unseen"):
        raise ProtocolError(f"the role {value!r} is neither train nor unseen")
    return "train" if value == "train" else "unseen"
