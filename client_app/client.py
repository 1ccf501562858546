"""What a client does with a message; knows Flower's records and nothing of its transport."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Self

import numpy as np
import torch
from flwr.app import ConfigRecord, ConfigRecordValues, MetricRecordValues, RecordDict

from client_app.held_reference import HeldReference
from framp_core.codec import Submodel, decode_slim, decode_submodel, encode_descriptor, encode_update, is_slim
from framp_core.config import FrampConfig, LocalConfig, ModelConfig
from framp_core.config_values import Scalar, parse_capacity
from framp_core.data import ClientData, Examples, load_client
from framp_core.descriptors import build_descriptor
from framp_core.errors import ConfigError, ProtocolError
from framp_core.fields import read_count, read_field
from framp_core.layout import ParameterLayout
from framp_core.local_training import (
    LocalResult,
    LocalTask,
    client_prototypes,
    evaluate,
    log_prior,
    no_prototypes,
    resolve_device,
    train_locally,
)
from framp_core.metrics import POPULATIONS, Population
from framp_core.models import FlatModel, build_model
from framp_core.prototypes import Prototypes
from framp_core.randomness import stream
from framp_core.spans import span
from framp_core.structured import held_classes, slim_widths

MAX_ROUND = 2**31 - 1


@dataclass(frozen=True)
class Instruction:
    """What the server asks for.

    Attributes:
        fingerprint: the server's code fingerprint.
        server_round: the current round, 0 during discovery.
        final: whether this is the last evaluation of the run.
        payload: the encoded submodel; empty in a query.
        overrides: flat config keys of the section ``local`` for this client and round alone, for example
            ``local.learning-rate``; a server decides how a device trains, not what it reads or where it writes.
    """

    fingerprint: str
    server_round: int
    final: bool
    payload: bytes
    overrides: Mapping[str, Scalar]

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Read the records ``config`` and ``framp`` of a message.

        Raises:
            ProtocolError: a record or a key is missing or of another type, or an override is not of the section
                ``local``.
        """
        config, payload = content.get("config"), content.get("framp", ConfigRecord())
        if not isinstance(config, ConfigRecord) or not isinstance(payload, ConfigRecord):
            raise ProtocolError(f"the message holds {sorted(content)}, expected the records config and framp")
        overrides = {key: value for key, value in config.items() if "." in key}
        foreign = [key for key in overrides if not key.startswith("local.")]
        if foreign:
            raise ProtocolError(f"the server may override keys of the section local, not {', '.join(foreign)}")
        lists = [key for key, value in overrides.items() if not isinstance(value, Scalar)]
        if lists:
            raise ProtocolError(f"overrides are text or numbers, and these are not: {', '.join(lists)}")
        return cls(
            fingerprint=read_field(config, "fingerprint", str),
            server_round=read_count(config, "round", 0, MAX_ROUND),
            final=read_field(config, "final", bool, default=False),
            payload=read_field(payload, "payload", bytes, default=b""),
            overrides=overrides,  # type: ignore[arg-type]
        )


@lru_cache(maxsize=16)
def _config(flat: str) -> FrampConfig:
    """Of flat keys as JSON; messages of a run hold the same ones, but for overrides."""
    return FrampConfig.from_flat(json.loads(flat))


@lru_cache(maxsize=16)
def _flat_model(
    config: ModelConfig, local: LocalConfig, shape: tuple[int, ...], classes: int, kept: tuple[int, ...] | None = None
) -> FlatModel:
    """One network per process and size: every message overwrites all of its parameters."""
    return FlatModel(build_model(config, shape, classes, kept), resolve_device(local.device), local.precision)


@lru_cache(maxsize=2)
def _full_layout(config: ModelConfig, shape: tuple[int, ...], classes: int) -> ParameterLayout:
    """Layout of the full model, of which a client with a slim network allocates nothing."""
    with torch.device("meta"):
        return ParameterLayout.of(build_model(config, shape, classes))


@dataclass(frozen=True)
class Assignment:
    """A training that a server asked for.

    Attributes:
        model: the network to train, shared by all clients of the process.
        task: what to train.
        mask: kept positions, bool ``(n,)``.
        slim: whether the network is a physically smaller one.
        server_round: the round.
    """

    model: FlatModel
    task: LocalTask
    mask: np.ndarray
    slim: bool
    server_round: int

    @property
    def computes_prototypes(self) -> bool:
        """Whether the update holds means of classes: for alignment, of features that all clients have."""
        return self.task.config.local.alignment_weight > 0 and not self.slim


@dataclass(frozen=True)
class Client:
    """A client: its configuration, its data and, while it works, its network."""

    config: FrampConfig
    data: ClientData
    partitions: int
    held: HeldReference

    @classmethod
    @span("client.load")
    def of(
        cls,
        run_config: Mapping[str, Scalar],
        node_config: Mapping[str, Scalar],
        overrides: Mapping[str, Scalar],
        held: HeldReference | None = None,
    ) -> Self:
        """Build the client of one Flower node.

        Args:
            run_config: flat keys of the run.
            node_config: ``partition-id`` and ``num-partitions``; optional ``data-dir`` (absolute, wins over
                ``data.root``), ``capacity`` and ``client-name``.
            overrides: flat keys that the server sent for this round.
            held: the reference mask that the node holds.

        Raises:
            ConfigError: the node's configuration lacks its partition.
        """
        local = {"data.root": node_config["data-dir"]} if "data-dir" in node_config else {}
        config = _config(json.dumps({**run_config, **overrides, **local}))
        try:
            partition, partitions = int(node_config["partition-id"]), int(node_config["num-partitions"])
        except KeyError as error:
            raise ConfigError(
                f"this node's configuration lacks {error}; start the SuperNode with "
                f"--node-config 'partition-id=0 num-partitions={config.partition.nodes}'"
            ) from error
        data = load_client(config, partition, partitions)
        data = replace(
            data,
            name=str(node_config.get("client-name", data.name)),
            capacity=parse_capacity(node_config.get("capacity", data.capacity)),
        )
        return cls(config, data, partitions, held or HeldReference(RecordDict()))

    @cached_property
    def model(self) -> FlatModel:
        """The process's network of this architecture."""
        return _flat_model(self.config.model, self.config.local, self.data.shape, self.data.classes)

    def card(self) -> dict[str, ConfigRecordValues]:
        """What the server must know of this client: stable name, role, capacity, data shape, sizes and digests."""
        tested = self._tested()
        return {
            "name": self.data.name,
            "role": self.data.role,
            "capacity": str(self.data.capacity),
            "shape": list(self.data.shape),
            "classes": self.data.classes,
            "train-examples": len(self.data.train),
            **{f"{name}-examples": len(tested.get(name, ())) for name in POPULATIONS},
            "partitions": self.partitions,
            "partition-digest": self.data.partition_digest,
            "content-digest": self.data.content_digest,
        }

    @span("client.describe")
    def describe(self) -> bytes:
        """The encoded descriptor."""
        vector = build_descriptor(self.config, self.data.shape, self.data.classes).describe(self.data)
        return encode_descriptor(vector).blob

    def assignment(self, payload: bytes, server_round: int) -> Assignment:
        """Read the submodel in ``payload`` and what is to be done with it."""
        model, submodel = self._read(payload)
        rng = stream(self.config.seed, "local-training", self.data.name, server_round)
        task = LocalTask(submodel.theta(), submodel.mask, self.data, self.config, rng, submodel.prototypes)
        return Assignment(model, task, submodel.mask, is_slim(payload), server_round)

    def update(
        self, given: Assignment, result: LocalResult, prototypes: Prototypes | None = None
    ) -> tuple[bytes, dict[str, MetricRecordValues]]:
        """The encoded update that a training came to, and the metrics; ``prototypes`` if they are known already."""
        prototypes = prototypes or self._prototypes(given, result)
        with span("client.encode"):
            update = encode_update(
                result.delta[given.mask],
                prototypes,
                given.model.layout,
                given.mask,
                self.config.wire.values,
                stream(self.config.seed, "update-rounding", self.data.name, given.server_round),
            )
        return update.blob, {"loss": result.loss, "examples": result.examples, "steps": result.steps}

    def evaluate(self, payload: bytes, server_round: int, final: bool) -> dict[str, MetricRecordValues]:
        """Correct and total counts of the submodel in ``payload``.

        Populations: ``local`` (own test images, class prior of strength ``evaluation.local-prior-strength``),
        ``validation`` (own validation images, same prior) and, for a client that trains, ``union`` (test images
        of all clients that train, ``evaluation.union-prior-strength``). ``evaluation.augment`` crops and flips the
        images of ``local``, in the same way before and after fine-tuning. The last evaluation also counts ``local`` and
        ``union`` at each of ``evaluation.prior-strengths`` (keys ending in ``-prior-correct``), and with
        ``evaluation.fine-tune-steps`` measures again after that many local steps (keys ending in ``-tuned``).
        """
        model, submodel = self._read(payload)
        model.load(torch.from_numpy(submodel.theta()))
        counts = self._measure(model, server_round, strengths=self.config.evaluation.prior_strengths if final else ())
        steps = self.config.evaluation.fine_tune_steps
        if final and steps:
            rng = stream(self.config.seed, "fine-tuning", self.data.name, server_round)
            own_size = self.config.model_copy(
                update={"local": self.config.local.model_copy(update={"nested_share": 0.0})}
            )
            train_locally(model, submodel.theta(), submodel.mask, self.data, own_size, rng, None, steps)
            counts |= self._measure(model, server_round, suffix="-tuned")
        return counts

    @span("client.prototypes")
    def _prototypes(self, given: Assignment, result: LocalResult) -> Prototypes:
        if given.slim:
            return held_classes(self.data.class_counts())
        if not given.computes_prototypes:
            return no_prototypes(given.model)
        given.model.load(result.weights)
        return client_prototypes(given.model, self.data)

    @span("client.decode")
    def _read(self, payload: bytes) -> tuple[FlatModel, Submodel]:
        """Decode a submodel, and find the network it is for, the full one or a slim one.

        One that is larger or smaller than this client's capacity is refused.
        """
        if is_slim(payload):
            return self._read_slim(payload)
        layout = self.model.layout
        expected = None if self.config.extraction.name == "full" else layout.kept(self.data.capacity)
        feature_size, held = self.model.model.feature_size, self.held.read(layout.maskable_sizes)
        submodel = decode_submodel(payload, layout, self.data.classes, feature_size, expected, held)
        self.held.write(submodel.reference, layout.maskable_sizes)
        return self.model, submodel

    def _read_slim(self, payload: bytes) -> tuple[FlatModel, Submodel]:
        config, shape, classes, capacity = self.config.model, self.data.shape, self.data.classes, self.data.capacity
        layout = _full_layout(config, shape, classes)
        slim = decode_slim(payload, layout, capacity)
        kept = slim_widths(config.widths, layout, capacity)
        model = _flat_model(config, self.config.local, shape, classes, kept)
        return model, Submodel(slim.values, np.ones(slim.values.shape, dtype=bool), None)

    def _tested(self) -> dict[Population, Examples]:
        """What accuracies are measured on; the union for a client that trains alone."""
        tested: dict[Population, Examples] = {"local": self.data.test, "validation": self.data.validation}
        if self.data.role == "train":
            union, limit = self.data.union_test, self.config.evaluation.union_examples
            tested["union"] = union.first(limit) if limit else union
        return tested

    @span("client.evaluate")
    def _measure(
        self, model: FlatModel, server_round: int, suffix: str = "", strengths: Sequence[float] = ()
    ) -> dict[str, MetricRecordValues]:
        settings = self.config.evaluation
        prior = log_prior(self.data.class_counts(), self.config.local.absent_class_prior)
        counts: dict[str, MetricRecordValues] = {}
        for name, examples in self._tested().items():
            strength = settings.union_prior_strength if name == "union" else settings.local_prior_strength
            augmented = settings.augment and name == "local"
            rng = stream(self.config.seed, "test-augmentation", self.data.name, server_round) if augmented else None
            swept = strengths if name != "validation" else ()
            offsets = torch.stack([each * prior for each in (strength, *swept)])
            result, *curve = evaluate(model, examples, offsets, settings.batch_size, rng)
            counts[f"{name}-correct{suffix}"] = result.correct
            counts[f"{name}-total{suffix}"] = result.total
            if curve:
                counts[f"{name}-prior-correct"] = [each.correct for each in curve]
        return counts
