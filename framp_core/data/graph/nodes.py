"""What one client holds of a graph: its nodes by use, the edges among them, and the pool for Union accuracy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from framp_core.config import DataConfig, FrampConfig, GraphConfig, LocalConfig
from framp_core.data.examples import ClientData, Examples, batch_positions
from framp_core.data.graph.checks import UNLABELLED
from framp_core.data.graph.neighbours import edges_within, sample_around, starts_of
from framp_core.data.graph.partition import make_graph_partition
from framp_core.data.graph.sources import GraphData, load_graph
from framp_core.data.partition import ClientSplit, Partition
from framp_core.errors import DataError
from framp_core.graph_batch import GraphBatch
from framp_core.randomness import stream


@dataclass(frozen=True, eq=False)
class Subgraph:
    """The nodes of a client and the edges among them, in memory.

    Attributes:
        nodes: int64 ``(n,)``, their numbers in the whole graph, ascending; position i here is node ``nodes[i]``.
        features: float32 ``(n, F)``.
        edges: int64 ``(2, e)``, positions of source and target, sorted by (target, source).
        labels: int64 ``(n,)``; under concept shift, what the client calls them. -1 for a node without one.
    """

    nodes: np.ndarray
    features: Tensor
    edges: Tensor
    labels: np.ndarray

    @classmethod
    def induced(cls, graph: GraphData, client: ClientSplit) -> Self:
        """What a client holds of a graph."""
        nodes = client.held
        _, ends = edges_within(graph.starts, graph.edges[0], nodes)
        labels = graph.labels[nodes]
        if client.concept_shift is not None:
            labels = np.where(labels == UNLABELLED, UNLABELLED, np.array(client.concept_shift.labels)[labels])
        return cls(nodes, torch.from_numpy(graph.features[nodes]), torch.from_numpy(ends), labels)

    def __len__(self) -> int:
        """n, the number of nodes."""
        return len(self.nodes)

    @cached_property
    def starts(self) -> np.ndarray:
        """The edges into position i are columns ``starts[i]`` up to ``starts[i + 1]``; int64 ``(n + 1,)``."""
        return starts_of(self.edges[1].numpy(), len(self))

    def positions(self, nodes: np.ndarray) -> np.ndarray:
        """Where given nodes of the whole graph, all of them held, are; int64."""
        return np.searchsorted(self.nodes, nodes)

    def sampled(self, seeds: np.ndarray, fan_outs: Sequence[int], rng: np.random.Generator) -> GraphBatch:
        """Some nodes with a sampled neighbourhood, and the drawn edges alone; see ``neighbours.sample_around``."""
        nodes, edges, positions = sample_around(self.starts, self.edges[0].numpy(), seeds, fan_outs, rng)
        return GraphBatch(self.features[torch.from_numpy(nodes)], torch.from_numpy(edges), torch.from_numpy(positions))


@dataclass(frozen=True, eq=False)
class LabelledNodes(Examples):
    """A selection of the nodes of one or more subgraphs.

    Attributes:
        subgraphs: of one client, or of each client of a union.
        owners: int64 ``(len(self),)``, which subgraph each example is in.
        positions: int64 ``(len(self),)``, its position there.
        batch_nodes: most nodes of a batch of :meth:`ordered_batches` with more than one subgraph
            (``graph.full-batch-nodes``).
    """

    subgraphs: tuple[Subgraph, ...]
    owners: np.ndarray
    positions: np.ndarray
    batch_nodes: int

    def __len__(self) -> int:
        return len(self.owners)

    @cached_property
    def selected_labels(self) -> np.ndarray:
        """Labels of the selection, int64 ``(len(self),)``."""
        offsets = np.cumsum([0, *map(len, self.subgraphs)])
        labels: np.ndarray = np.concatenate([own.labels for own in self.subgraphs])[
            offsets[self.owners] + self.positions
        ]
        return labels

    def first(self, count: int) -> Self:
        """The first ``count`` nodes of the selection; in a union a fair sample of all clients."""
        return replace(self, owners=self.owners[:count], positions=self.positions[:count])

    def training_batches(
        self, config: FrampConfig, steps: int, rng: np.random.Generator, device: torch.device
    ) -> Iterator[tuple[GraphBatch, Tensor]]:
        """One batch per training step, of one client's nodes.

        A subgraph of at most ``graph.full-batch-nodes`` nodes is the batch itself, the same at each step, with the
        whole selection as seeds. Otherwise ``local.batch-size`` nodes of the selection are the seeds, and
        ``graph.neighbours`` are sampled around them: as many hops as the model has layers, the first entry
        at the seeds; entries beyond that are not used. Features are then nodes x F floats per step.

        Raises:
            DataError: the selection spans several clients.
        """
        if len(self.subgraphs) != 1:
            raise DataError(f"training reads the nodes of one client, and these are of {len(self.subgraphs)}")
        (own,), labels = self.subgraphs, torch.from_numpy(self.selected_labels)
        if len(own) <= config.graph.full_batch_nodes:
            batch = GraphBatch(own.features, own.edges, torch.from_numpy(self.positions)).to(device)
            labels = labels.to(device)
            for _ in range(steps):
                yield batch, labels
            return
        fan_outs = config.graph.neighbours[: len(config.model.widths)]
        for chosen in batch_positions(len(self), config.local.batch_size, steps, rng, config.local.reshuffle):
            sampled = own.sampled(self.positions[chosen], fan_outs, rng)
            yield sampled.to(device), labels[torch.from_numpy(chosen)].to(device)

    def ordered_batches(
        self,
        batch_size: int,
        device: torch.device,
        rng: np.random.Generator | None = None,
        *,
        lone_example: bool = True,
    ) -> Iterator[tuple[GraphBatch, Tensor]]:
        """Every example once, subgraph by subgraph, each subgraph whole: nothing is sampled, so results are exact.

        Consecutive subgraphs share a batch, without edges between them, as long as it has at most ``batch_nodes``
        nodes; one that is larger is a batch by itself. A network then needs memory for about nodes x channels floats
        (GraphSAGE), and for attention (GAT) or messages per edge another edges x channels. Subgraphs in which nothing
        is selected are left out.

        Args:
            batch_size: not used; the size of a batch follows from the subgraphs.
            device: where the batches go.
            rng: not used; nodes are not augmented.
            lone_example: not used; networks on graphs have no batch statistics.
        """
        by_owner = np.argsort(self.owners, kind="stable")
        selected = np.split(by_owner, np.bincount(self.owners, minlength=len(self.subgraphs)).cumsum()[:-1])
        sizes = [len(own) if len(held) else 0 for own, held in zip(self.subgraphs, selected, strict=True)]
        for owners in _packed(sizes, self.batch_nodes):
            chosen = np.concatenate([selected[owner] for owner in owners])
            yield self._joined(owners, chosen).to(device), torch.from_numpy(self.selected_labels[chosen]).to(device)

    def _joined(self, owners: Sequence[int], chosen: np.ndarray) -> GraphBatch:
        """Whole subgraphs side by side, and which of their nodes the chosen examples are."""
        subgraphs = [self.subgraphs[owner] for owner in owners]
        offsets = np.cumsum([0, *map(len, subgraphs)])
        seeds = torch.from_numpy(offsets[np.searchsorted(owners, self.owners[chosen])] + self.positions[chosen])
        if len(subgraphs) == 1:
            return GraphBatch(subgraphs[0].features, subgraphs[0].edges, seeds)
        edges = [own.edges + int(offset) for own, offset in zip(subgraphs, offsets, strict=False)]
        return GraphBatch(torch.cat([own.features for own in subgraphs]), torch.cat(edges, dim=1), seeds)


def _packed(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Consecutive positions of ``sizes`` whose sum is at most ``most``, or one that is larger; none of size 0."""
    owners: list[int] = []
    total = 0
    for owner in np.flatnonzero(sizes).tolist():
        if owners and total + sizes[owner] > most:
            yield owners
            owners, total = [], 0
        owners.append(owner)
        total += sizes[owner]
    if owners:
        yield owners


# --- clients ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _graph(data: DataConfig, graph: GraphConfig) -> GraphData:
    return load_graph(data, graph)


def load_graph_partition(config: FrampConfig, partitions: int) -> tuple[GraphData, Partition]:
    """Load the graph and the partition of a run; kept for the life of the process.

    Args:
        config: of the run; ``partition`` is scaled to ``partitions`` nodes by ``PartitionConfig.for_nodes``.
        partitions: number of clients, >= 1.

    Raises:
        DataError: the graph cannot be read, or :func:`make_graph_partition` fails.
        ConfigError: a package of the extra ``graph`` is not installed.
    """
    return _partitioned(_held(config), partitions)


def _held(config: FrampConfig) -> FrampConfig:
    """How a client trains may change by the round; what it holds does not, and is kept once."""
    return config.model_copy(update={"local": LocalConfig()})


@lru_cache(maxsize=4)
def _partitioned(config: FrampConfig, partitions: int) -> tuple[GraphData, Partition]:
    graph = _graph(config.data, config.graph)
    scaled = config.model_copy(update={"partition": config.partition.for_nodes(partitions)})
    return graph, make_graph_partition(scaled, graph)


@lru_cache(maxsize=4)
def _subgraphs(config: FrampConfig, partitions: int) -> tuple[Subgraph, ...]:
    """Of every client; shared by all clients of the process."""
    graph, partition = load_graph_partition(config, partitions)
    return tuple(Subgraph.induced(graph, client) for client in partition.clients)


@lru_cache(maxsize=4)
def _union(config: FrampConfig, partitions: int) -> LabelledNodes:
    """Test nodes of the training clients, each in its owner's subgraph, in one random order."""
    _, partition = load_graph_partition(config, partitions)
    seen = [index for index, client in enumerate(partition.clients) if client.role == "train"]
    subgraphs = tuple(_subgraphs(config, partitions)[index] for index in seen)
    tests = [own.positions(partition.clients[index].test) for own, index in zip(subgraphs, seen, strict=True)]
    owners = np.repeat(np.arange(len(seen)), [len(test) for test in tests])
    order = stream(config.seed, "union-order").permutation(len(owners))
    return LabelledNodes(subgraphs, owners[order], np.concatenate(tests)[order], config.graph.full_batch_nodes)


def client_data(config: FrampConfig, partition_id: int, partitions: int) -> ClientData:
    """Load one client of a graph's partition.

    Args:
        config: of the run.
        partition_id: index of the client, in [0, partitions).
        partitions: number of clients of the federation, training and unseen ones together.

    Raises:
        DataError: :func:`load_graph_partition` fails.
        ConfigError: a package of the extra ``graph`` is not installed.
    """
    config = _held(config)
    graph, partition = load_graph_partition(config, partitions)
    split, own = partition.clients[partition_id], _subgraphs(config, partitions)[partition_id]

    def selection(nodes: np.ndarray) -> LabelledNodes:
        owners = np.zeros(len(nodes), dtype=np.int64)
        return LabelledNodes((own,), owners, own.positions(nodes), config.graph.full_batch_nodes)

    return ClientData(
        name=split.name,
        role=split.role,
        capacity=split.capacity,
        classes=graph.classes,
        shape=graph.shape,
        train=selection(split.train),
        validation=selection(split.validation),
        test=selection(split.test),
        union_test=_union(config, partitions),
        known=selection(own.nodes),
        partition_digest=partition.digest,
    )
