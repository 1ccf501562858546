"""The extension point: one federated loop over personalised submodels, and the hooks that methods fill in."""

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from framp_core.checkpoints import Checkpoint
from framp_core.codec import decode_update
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.defence import Defence, Verdict, norm
from framp_core.deltas import KeptDeltas, dense
from framp_core.errors import ConfigError, EngineError, FrampError, ProtocolError, ResumeError
from framp_core.fingerprint import code_fingerprint
from framp_core.layout import ParameterLayout
from framp_core.mask_references import MaskReferences
from framp_core.mask_statistics import mask_statistics
from framp_core.masking import extract
from framp_core.metrics import ClientAccuracy, PriorCounts
from framp_core.models import build_model, initial_parameters
from framp_core.packed_mask import Masks, PackedMask
from framp_core.prototypes import Prototypes
from framp_core.randomness import stream
from framp_core.run_folder import MANIFEST, RunFolder
from framp_core.run_log import about
from framp_core.spans import span
from server_app.recording import (
    Known,
    accuracy_record,
    changed_data,
    client_rows,
    known_partition,
    largest_counts,
    manifest,
    mean_record,
    read_accuracies,
    read_prior_counts,
    read_training,
    refusal_rows,
    train_row,
    verdict_row,
)
from server_app.registry import ClientRecord, ClientRegistry
from server_app.replies import Refusal, Reply, held_reference, read_replies, told_capacity
from server_app.resume import origin
from server_app.sending import Cut, Outgoing, SubmodelEncoder, drained

logger = logging.getLogger("flwr.framp")
ALIGNED_ROUND = 2
"""The first round in which clients align: no global prototypes exist before the first one has ended."""

DESCRIPTORS = "registry.descriptors"
"""The tensor of a checkpoint that is the registry's; all others are of :meth:`SubmodelStrategy.state`."""


@dataclass(frozen=True)
class ClientUpdate:
    """A client's accepted reply to a train message.

    Attributes:
        client: who sent it.
        packed_mask: kept positions of all n.
        delta: trained minus received weights on the kept positions, float32 ``(mask.sum(),)``.
        prototypes: local prototypes; without features (f = 0) from a client that trained a slim network.
        loss: mean training loss.
        examples: number of training examples.
    """

    client: ClientRecord
    packed_mask: PackedMask
    delta: np.ndarray
    prototypes: Prototypes
    loss: float
    examples: int

    @property
    def mask(self) -> np.ndarray:
        """Kept positions, bool ``(n,)``, unpacked anew each time."""
        return self.packed_mask.kept()

    @cached_property
    def norm(self) -> float:
        """Length of the delta."""
        return norm(self.delta)

    def dense_delta(self) -> np.ndarray:
        """Delta over all n positions, zero where nothing was kept."""
        return dense(self.delta, self.mask)


Accepted = tuple[ClientUpdate, dict[str, int]]
"""An update and the bytes of its parts."""


class SubmodelStrategy(Strategy):
    """Federated learning in which every client trains a submodel of its own capacity.

    **This class is meant to be subclassed.** One round is: discover new nodes, sample clients, :meth:`generate` a
    full model for each, :meth:`extract` the mask that its capacity allows, send values, mask and
    :meth:`prototypes` with :meth:`train_instructions`; collect the replies, refuse the bad ones, and hand the rest,
    in the order of the clients' names, to :meth:`server_update`. A method overrides the hooks it needs:

    ========================  ===================================================  ===========================
    hook                      decides                                              default
    ========================  ===================================================  ===========================
    ``build``                 server state, once the first clients are known       (required)
    ``generate``              theta_i, the client's full model                     (required)
    ``extract``               m_i, the mask                                        ``config.extraction``
    ``sample``                who trains in a round                                uniform, no replacement
    ``prototypes``            class prototypes that travel down                    none
    ``train_instructions``    flat config keys for one client and round            none
    ``server_update``         new server state from the accepted updates           (required)
    ``state``, ``restore``    tensors of the checkpoint, and back from them        (required)
    ========================  ===================================================  ===========================

    Everything else (bytes, events, refusals, evaluation, checkpoints, fingerprints) is shared. What lasts for more than
    a round has to be in ``state``; random numbers do not, since every stream is made anew from its purpose and round.

    A method whose masks keep whole channels (:mod:`framp_core.structured`) sets the class attribute ``slim``: the
    selected channels then travel in place of a mask and the client trains a physically smaller network, whose
    features have another width, so that prototypes go neither down nor up. A method that makes no sense with other
    settings names them in ``required``.

    Args:
        config: the run's configuration.
        run: where events and results are written.

    Attributes:
        rounds_done: rounds that a resumed run did before; Flower counts only those that are left.
    """

    slim: ClassVar[bool] = False
    required: ClassVar[Mapping[str, Scalar]] = {}

    @classmethod
    def check(cls, config: FrampConfig) -> None:
        """Look at the configuration before anything is written.

        Raises:
            ConfigError: a setting in ``required`` has another value.
        """
        given = config.to_flat()
        wrong = {key: value for key, value in cls.required.items() if given[key] != value}
        if wrong:
            needs = ", ".join(f"{key}={value!r}, not {given[key]!r}" for key, value in wrong.items())
            raise ConfigError(
                f"method={config.method!r} would be another method with this configuration; it needs {needs}"
            )

    def __init__(self, config: FrampConfig, run: RunFolder) -> None:
        self.config = config
        self.run = run
        self.registry = ClientRegistry(config, self._instruction(0))
        self.layout: ParameterLayout
        self.references: MaskReferences
        self.defence = Defence(config.defence)
        self.rounds_done = 0
        self._origin = origin(config, type(self))
        self._checkpoint: Checkpoint | None = None
        self._begun = False
        self._outbox: list[Outgoing] = []
        self._empty_rounds = 0
        self._started = time.monotonic()

    # Hooks ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, initial: Tensor, feature_size: int, client: ClientRecord) -> dict[str, int]:
        """Create the server's state; called once, before the first round. ``self.layout`` is set.

        Args:
            initial: a freshly initialised model, ``(n,)``.
            feature_size: width of the penultimate features.
            client: any client; all agree on shape, classes and size of the descriptor.

        Returns:
            Facts for the event log, such as the number of the generator's parameters.
        """

    @abstractmethod
    def generate(self, client: ClientRecord, *, evaluation: bool) -> np.ndarray:
        """Return theta_i, the client's full model, float32 ``(n,)``.

        ``evaluation`` is true when the model is measured rather than trained (averaged weights, for example).
        """

    def extract(self, theta: np.ndarray, client: ClientRecord, server_round: int) -> np.ndarray:
        """Return m_i, bool ``(n,)``: which weights the client holds."""
        return extract(theta, self.layout, self.config.extraction, client.capacity)

    def sample(self, clients: Sequence[ClientRecord], server_round: int) -> list[ClientRecord]:
        """Choose who trains: ``server.clients-per-round`` of ``clients`` and what over-sampling adds, uniformly."""
        count = min(self.config.server.clients_asked, len(clients))
        chosen = stream(self.config.seed, "client-sampling", server_round).choice(len(clients), count, replace=False)
        return [clients[index] for index in sorted(chosen)]

    def prototypes(self) -> Prototypes | None:
        """Global prototypes to send along."""
        return None

    def train_instructions(self, client: ClientRecord, server_round: int) -> dict[str, Scalar]:
        """Flat config keys that hold for this client in this round, such as ``local.learning-rate``."""
        return {}

    @abstractmethod
    def server_update(self, updates: Sequence[ClientUpdate], server_round: int) -> dict[str, float]:
        """Learn from the accepted updates, sorted by client name; return metrics for the event log."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Tensors of the checkpoint."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave, after :meth:`build`; later rounds must not tell the difference."""

    # Flower's strategy interface --------------------------------------------------------------------------------

    def summary(self) -> None:
        """Log what is about to run."""
        logger.info(
            "%s: %d rounds, %d clients per round, sizes %s, run folder %s",
            self.config.method,
            self.config.rounds,
            self.config.server.clients_per_round,
            ", ".join(str(size) for size in sorted(self.config.capacity.sizes)),
            self.run.path,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages for the sampled clients. A list: Flower's deployment grid walks over it twice."""
        server_round += self.rounds_done
        self._started = time.monotonic()
        self._discover(server_round, grid)
        clients = self.sample(self.registry.online("train"), server_round)
        prototypes = self.prototypes()
        cuts = [self._cut(client, server_round, evaluation=False) for client in clients]
        self._encoder.renew_references(server_round, cuts)
        return self._messages(MessageType.TRAIN, drained(cuts), server_round, prototypes, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Update the server's state from the valid replies; the rest is refused and recorded."""
        server_round += self.rounds_done
        sent, good, refused = self._collect(server_round, replies)
        refused, unused = self._without_unused(refused, len(good))
        accepted, absurd = self._without_absurd_prototypes(sent, self._read_updates(sent, good, refused))
        refused += absurd
        updates = [update for update, _ in accepted]
        items = [(update, parts, sent[update.client.name]) for update, parts in accepted]
        rows = [train_row(update, item.parts, parts, item.mask_alone) for update, parts, item in items]
        verdicts = self._judge(updates)
        rows = [{**row, **verdict_row(verdict)} for row, verdict in zip(rows, verdicts, strict=True)]
        updates = [_defended(*pair) for pair in zip(updates, verdicts, strict=True) if not pair[1].screened]
        learnt, metrics = self._learn(updates, server_round)
        if learnt and server_round in (ALIGNED_ROUND, self.config.rounds):
            self._keep_prototypes(updates, server_round)
        self._record("train", server_round, refused, clients=rows, unused=unused, learnt=learnt, server=metrics)
        self._outbox = []
        self._stop_if_hopeless(server_round, learnt, refused)
        final = server_round == self.config.rounds
        return ArrayRecord(self.state()) if final else None, mean_record(rows)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages for all connected clients, every ``evaluation.every`` rounds and in the last one."""
        server_round += self.rounds_done
        self._started = time.monotonic()
        final = server_round == self.config.rounds
        self._outbox = []
        if not final and server_round % self.config.evaluation.every:
            return []
        cuts = (self._cut(client, server_round, evaluation=True) for client in self.registry.online())
        messages = self._messages(MessageType.EVALUATE, cuts, server_round, None, config, final=final)
        if final:
            masks = ((item.client.name, item.client.capacity, item.mask.kept()) for item in self._outbox)
            self.run.write_json("masks.json", mask_statistics(self.layout, masks))
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Record every client's counts, and write the checkpoint that the round ends with."""
        server_round += self.rounds_done
        if not self._outbox:
            self._write_checkpoint(server_round)
            return None
        bytes_down = {
            "down_bytes": sum(sum(item.parts.values()) for item in self._outbox),
            "mask_bytes": sum(item.parts["mask"] for item in self._outbox),
            "mask_alone_bytes": sum(item.mask_alone for item in self._outbox),
        }
        sent, good, refused = self._collect(server_round, replies)
        final = server_round == self.config.rounds
        strengths = self.config.evaluation.prior_strengths if final else ()
        tuned = final and self.config.evaluation.fine_tune_steps > 0
        rows: list[ClientAccuracy] = []
        curves: list[PriorCounts] = []
        for reply in good:
            client = sent[reply.client].client
            try:
                measured = read_accuracies(client, server_round, reply.content, tuned)
                curves += read_prior_counts(client, len(strengths), reply.content)
            except FrampError as error:
                refused.append(Refusal.of(reply.client, error, reply.message_id))
            else:
                rows += measured
        self._record("evaluate", server_round, refused, accuracies=[asdict(row) for row in rows], **bytes_down)
        if curves:
            self.run.event("priors", server_round, strengths=strengths, clients=[asdict(curve) for curve in curves])
        self._outbox = []
        if not rows:
            raise EngineError(f"no client could be evaluated in round {server_round}; {_first_reason(refused)}")
        self._write_checkpoint(server_round)
        return accuracy_record(rows)

    # Resuming ---------------------------------------------------------------------------------------------------

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on after a checkpoint of the same code and settings, once the clients are found to have the same data."""
        self._checkpoint, self.rounds_done = checkpoint, checkpoint.round
        with self.run.restoring():
            self.registry.restore(checkpoint.tensors[DESCRIPTORS].numpy(), checkpoint.state["clients"])
        if checkpoint.round == self.config.rounds:  # It lacks its report alone, and meets no client.
            self.run.rewind(checkpoint.round, checkpoint.state["events-bytes"])

    def reload(self, checkpoint: Checkpoint) -> None:
        """Be the server that wrote a checkpoint, to generate and extract; no client is connected."""
        self.registry.restore(checkpoint.tensors[DESCRIPTORS].numpy(), checkpoint.state["clients"])
        self._rebuild(checkpoint, next(iter(self.registry.clients.values())))

    def _rebuild(self, checkpoint: Checkpoint, client: ClientRecord) -> None:
        self._build(client)
        self.restore({name: tensor for name, tensor in checkpoint.tensors.items() if name != DESCRIPTORS})

    def _go_on(self, checkpoint: Checkpoint, client: ClientRecord) -> None:
        saved = checkpoint.state
        if self.registry.task != saved["task"]:
            changed = changed_data(self.run, self.config, self.registry.expected)
            raise ResumeError(
                f"the clients have {self.registry.task}; the checkpoint in {str(self.run.path)!r} is about "
                f"{saved['task']}{changed}. Go on with the data that it was trained on, or start a new run"
            )
        moved = self.registry.moved(checkpoint.tensors[DESCRIPTORS].numpy(), saved["clients"])
        if moved:
            raise ResumeError(
                f"the partition is that of the checkpoint in {str(self.run.path)!r}, the data are not: {len(moved)} "
                f"clients, {moved[0]} among them, have other images or another descriptor. Go on with the data that it "
                f"was trained on"
            )
        self._know_partition()
        with self.run.restoring():
            self._rebuild(checkpoint, client)
        self._limit_capacity()
        self._empty_rounds, self.defence.agreements = saved["empty-rounds"], dict(saved["agreements"])
        self.defence.sizes = dict(saved["prototype-sizes"])
        self.run.rewind(checkpoint.round, saved["events-bytes"])
        text = "resumed after round %d; Flower counts the rounds that are left"
        logger.info(text, checkpoint.round, extra=about(checkpoint.round))

    def _write_checkpoint(self, server_round: int) -> None:
        if server_round != self.config.rounds and server_round % self.config.output.checkpoint_every:
            return
        descriptors, clients = self.registry.state()
        state = {
            "task": self.registry.task,
            "clients": clients,
            "empty-rounds": self._empty_rounds,
            "agreements": self.defence.agreements,
            "prototype-sizes": self.defence.sizes,
            **self._origin,
        }
        with span("server.checkpoint"):
            self.run.write_checkpoint(server_round, {**self.state(), DESCRIPTORS: descriptors}, state)
        logger.debug("round %d: checkpoint written", server_round, extra=about(server_round))

    # Shared steps -----------------------------------------------------------------------------------------------

    def _discover(self, server_round: int, grid: Grid) -> None:
        """Meet the clients before the first round; later, meet those that came since."""
        known = dict(self.registry.clients)  # In a resumed run, those of the checkpoint.
        if not self._begun:
            self._begin(grid)
            known = known or dict(self.registry.clients)
        self.registry.require(grid, self.config.server.minimum_replies)
        if resized := self.registry.take_resized():
            now = {client.capacity for client in self.registry.clients.values()}
            self.references.keep_sizes({*self.config.capacity.sizes, *now})
        joined = [each for name, each in self.registry.clients.items() if name not in known or name in resized]
        for name, client in self.registry.clients.items():
            if client is not known.get(name):
                self.references.confirm(name, client.reference)
        refused = self.registry.take_refusals()
        if joined or refused:
            self._record("join", server_round, refused, clients=client_rows(joined))

    def _begin(self, grid: Grid) -> None:
        self.registry.wait(grid)
        if self._checkpoint is None:
            self._start()
        else:
            self._go_on(self._checkpoint, next(iter(self.registry.clients.values())))
        self._begun, self._checkpoint = True, None

    def _build(self, client: ClientRecord) -> dict[str, int]:
        model = build_model(self.config.model, client.shape, client.classes)
        self.layout = ParameterLayout.of(model)
        visits = self.registry.expected / self.config.server.clients_per_round
        # None are kept over a resume, as clients may have lost theirs too; that costs bytes and changes nothing else.
        self.references = MaskReferences(self.layout.maskable_sizes, visits)
        references = None if self.slim else self.references
        self._encoder = SubmodelEncoder(self.layout, self.config.wire.values, references)
        self._classes, self._feature_size = client.classes, model.feature_size
        initial = initial_parameters(model, self.config.seed, self.config.model.initialisation)
        self._largest_norm = self.config.defence.largest_norm * norm(initial.numpy()) or math.inf
        return self.build(initial, model.feature_size, client)

    def _know_partition(self) -> Known:
        """Make the partition again, if the data are at hand, so that no client can have more examples than it gives."""
        digest = next(iter(self.registry.clients.values())).partition_digest
        known = known_partition(self.config, self.registry.expected, digest)
        if known is not None:
            self.registry.limit(largest_counts(known[1]))
        return known

    def _limit_capacity(self) -> None:
        """A client must not end the run with a capacity that leaves nothing; that of a configured size is said then."""
        if not self.slim and self.config.extraction.name != "full":
            self.registry.limit_capacity(min(Fraction(1, self.layout.maskable_size), *self.config.capacity.sizes))

    def _start(self) -> None:
        nodes, wanted, known = self.registry.expected, self.config.partition.nodes, self._know_partition()
        first = self.registry.clients[min(self.registry.clients)]
        facts = self._build(first)
        self._limit_capacity()
        if nodes != wanted:
            logger.warning(
                "the data are partitioned over %d nodes, the configuration asks for %d; to get them: "
                "flwr run . --stream --federation-config 'num-supernodes=%d'",
                nodes,
                wanted,
                wanted,
            )
        self.run.write_json(MANIFEST, manifest(known, first.partition_digest))
        self._record(
            "start",
            0,
            self.registry.take_refusals(),
            clients=client_rows(self.registry.clients.values()),
            expected_clients=nodes,
            parameters=self.layout.size,
            maskable=self.layout.maskable_size,
            always_kept=self.layout.always_kept_size,
            descriptor_floats=len(first.descriptor),
            partition_digest=first.partition_digest,
            **facts,
        )

    def _instruction(self, server_round: int, **values: ConfigRecordValues) -> ConfigRecord:
        return ConfigRecord({"fingerprint": code_fingerprint(), "round": server_round, **values})

    def _cut(self, client: ClientRecord, server_round: int, *, evaluation: bool) -> Cut:
        with span("server.generate"):
            theta = self.generate(client, evaluation=evaluation)
        with span("server.mask"):
            mask = self.extract(theta, client, server_round)
        return self._encoder.cut(client, theta, mask)

    def _messages(
        self,
        message_type: str,
        cuts: Iterable[Cut],
        server_round: int,
        prototypes: Prototypes | None,
        config: ConfigRecord,
        final: bool = False,
    ) -> list[Message]:
        """The messages that carry these submodels; the outbox remembers who was sent what."""
        self._outbox, messages = [], []
        for cut in cuts:
            client = cut.client
            encoded, mask_alone = self._encoder.encode(cut, prototypes)
            extra = {} if message_type == MessageType.EVALUATE else self.train_instructions(client, server_round)
            instruction = self._instruction(server_round, **{**config, "final": final, **extra})
            content = RecordDict({"config": instruction, "framp": ConfigRecord({"payload": encoded.blob})})
            messages.append(Message(content, client.node_id, message_type, group_id=str(server_round)))
            self._outbox.append(Outgoing(messages[-1].metadata, client, cut.mask, encoded.parts, mask_alone))
        return messages

    def _collect(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[dict[str, Outgoing], list[Reply], list[Refusal]]:
        names = {item.metadata.message_id: item.client.name for item in self._outbox}
        answered, refused = read_replies(names, replies)
        sent, good = {item.client.name: item for item in self._outbox}, []
        for reply in answered:
            try:
                self.registry.hear(reply.client, told_capacity(reply.content))
            except FrampError as error:
                refused.append(Refusal.of(reply.client, error, reply.message_id))
                continue
            self.references.confirm(reply.client, held_reference(reply.content))
            where = about(server_round, reply.client, reply.message_id)
            kind = sent[reply.client].metadata.message_type
            logger.debug("round %d: %s answered %s", server_round, reply.client, kind, extra=where)
            good.append(reply)
        for refusal in refused:
            self.references.forget(refusal.client)
            with suppress(FrampError):  # Its reply is refused already, and its capacity stays what it was.
                self.registry.hear(refusal.client, refusal.capacity)
        return sent, good, refused

    def _without_unused(self, refused: Sequence[Refusal], good: int) -> tuple[list[Refusal], list[str]]:
        """Set the clients apart whose replies an over-sampled round did not wait for; that is no fault of theirs."""
        server = self.config.server
        if not server.over_sampling or good < server.clients_per_round:
            return list(refused), []
        return [each for each in refused if not each.missing], [each.client for each in refused if each.missing]

    def _read_updates(
        self, sent: Mapping[str, Outgoing], good: Sequence[Reply], refused: list[Refusal]
    ) -> list[Accepted]:
        """The updates in these replies and the bytes of their parts; those that are none are added to the refused."""
        accepted = []
        for reply in good:
            try:
                accepted.append(self._read_update(sent[reply.client], reply))
            except FrampError as error:
                refused.append(Refusal.of(reply.client, error, reply.message_id))
            else:
                reply.content.config_records["framp"].clear()  # Flower keeps the replies until the round has ended.
        return accepted

    def _without_absurd_prototypes(
        self, sent: Mapping[str, Outgoing], read: Sequence[Accepted]
    ) -> tuple[list[Accepted], list[Refusal]]:
        """Set the clients apart whose prototypes no network of the run can have: all others would align to them."""
        absurd = self.defence.absurd_prototypes({update.client.name: update.prototypes for update, _ in read})
        refused = [Refusal.of(name, error, sent[name].metadata.message_id) for name, error in absurd.items()]
        return [each for each in read if each[0].client.name not in absurd], refused

    @span("server.decode")
    def _read_update(self, sent: Outgoing, reply: Reply) -> tuple[ClientUpdate, dict[str, int]]:
        blob, loss, examples = read_training(reply.content)
        registered = sent.client.train_examples
        if examples > registered:
            raise ProtocolError(
                f"the reply reports {examples} examples; expected are 1 to {registered}, as many as the client "
                f"registered with"
            )
        feature_size = 0 if self.slim else self._feature_size
        update = decode_update(blob, self.layout, sent.mask.kept(), self._classes, feature_size)
        if update.prototypes is None:
            raise ProtocolError("the reply carries no prototypes; every update holds those of its client's classes")
        accepted = ClientUpdate(sent.client, sent.mask, update.delta_kept, update.prototypes, loss, examples)
        if accepted.norm > self._largest_norm:
            raise ProtocolError(
                f"the delta has length {accepted.norm:.3g}, and {self._largest_norm:.3g} is the largest that is taken "
                f"(defence.largest-norm={self.config.defence.largest_norm:g} times the initial network); lower "
                f"local.learning-rate if honest clients send such"
            )
        claimed = int(update.prototypes.counts.sum())
        if claimed > registered:
            raise ProtocolError(f"the prototypes claim {claimed} examples; the client registered with {registered}")
        return accepted, update.parts

    def _judge(self, updates: Sequence[ClientUpdate]) -> list[Verdict]:
        packed = [update.packed_mask for update in updates]
        deltas, masks = KeptDeltas([update.delta for update in updates], packed), Masks(packed)
        names, norms = [update.client.name for update in updates], [update.norm for update in updates]
        return self.defence.judge(names, deltas, masks, norms)

    @span("server.aggregate")
    def _learn(self, updates: Sequence[ClientUpdate], server_round: int) -> tuple[bool, dict[str, float]]:
        """Update the server's state; a round without enough valid replies, or with absurd ones, changes nothing."""
        try:
            needed = self.config.server.minimum_replies
            if len(updates) < needed:
                raise ProtocolError(f"{len(updates)} valid replies, fewer than server.minimum-replies={needed}")
            return True, self.server_update(updates, server_round)
        except FrampError as error:
            logger.warning("round %d: nothing is learnt: %s", server_round, error, extra=about(server_round))
            return False, {}

    def _keep_prototypes(self, updates: Sequence[ClientUpdate], server_round: int) -> None:
        """For the report; a method without global prototypes, or whose clients send none, has nothing to keep."""
        shared, local = self.prototypes(), {each.client.name: each.prototypes for each in updates}
        local = {name: own for name, own in local.items() if own.means.size}
        if shared is not None and local:
            self.run.write_prototypes(server_round, shared, local)

    def _stop_if_hopeless(self, server_round: int, learnt: bool, refused: Sequence[Refusal]) -> None:
        self._empty_rounds = 0 if learnt else self._empty_rounds + 1
        if self._empty_rounds >= min(self.config.server.empty_rounds, self.config.rounds):
            raise EngineError(
                f"nothing was learnt in the last {self._empty_rounds} rounds, up to round {server_round} "
                f"(server.empty-rounds={self.config.server.empty_rounds}); {_first_reason(refused)}"
            )

    def _record(self, kind: str, server_round: int, refused: Sequence[Refusal], **fields: object) -> None:
        rows = refusal_rows(refused)
        for row, refusal in zip(rows, refused, strict=True):
            trace = f"\n{row['traceback']}" if "traceback" in row else ""
            where = about(server_round, refusal.client, refusal.message_id or None)
            logger.warning("round %d: %s refused: %s%s", server_round, row["client"], row["error"], trace, extra=where)
        seconds = time.monotonic() - self._started
        self.run.event(kind, server_round, refused=rows, seconds=seconds, **fields)
        text = "round %d: %s recorded after %.2f s, %d refused"
        logger.debug(text, server_round, kind, seconds, len(rows), extra=about(server_round))


def _defended(update: ClientUpdate, verdict: Verdict) -> ClientUpdate:
    """The update as the server learns from it."""
    if verdict.shortened == 1:
        return update
    return replace(update, delta=update.delta * np.float32(verdict.shortened))


def _first_reason(refused: Sequence[Refusal]) -> str:
    if not refused:
        return "no message was sent"
    return f"the first reason: {refused[0].client}: {refused[0].error}"
