"""Labelled examples as local training and evaluation see them, and all that one client holds."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from framp_core.config import FrampConfig
from framp_core.graph_batch import Inputs


class Examples(ABC):
    """A selection of labelled examples, read in batches of network inputs and int64 labels ``(b,)``.

    This class is meant to be subclassed: a new kind of data says here how its batches are made, and nothing else in
    training, evaluation or on the server knows of it.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples; may be 0."""

    @property
    @abstractmethod
    def selected_labels(self) -> np.ndarray:
        """Labels of the selection, int64 ``(len(self),)``."""

    @abstractmethod
    def first(self, count: int) -> Self:
        """The first ``count`` examples of the selection."""

    @abstractmethod
    def training_batches(
        self, config: FrampConfig, steps: int, rng: np.random.Generator, device: torch.device
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """One batch per training step.

        Args:
            config: ``local.batch-size``, ``local.reshuffle`` and what is particular to the kind of data.
            steps: number of batches.
            rng: draws order, augmentation and sampled neighbours.
            device: where the batches go.
        """

    @abstractmethod
    def ordered_batches(
        self,
        batch_size: int,
        device: torch.device,
        rng: np.random.Generator | None = None,
        *,
        lone_example: bool = True,
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """Every example once, in order; nothing for an empty selection.

        Args:
            batch_size: images per batch, 0 for as many as are fast; graphs are read whole, whatever it is.
            device: where the batches go.
            rng: draws augmentation; None leaves the examples clean.
            lone_example: false lets the last example join the batch before it rather than make a batch of its own, for
                networks with batch statistics.
        """


def batch_positions(
    examples: int, batch_size: int, steps: int, rng: np.random.Generator, reshuffle: bool = True
) -> np.ndarray:
    """Which examples each step sees: epochs laid end to end and cut into full batches.

    Args:
        examples: number of examples, at least 1.
        batch_size: examples per step.
        steps: number of steps.
        rng: draws the order of each epoch.
        reshuffle: false goes through every epoch in ascending order.

    Returns:
        int64 ``(steps, min(batch_size, examples))`` in [0, examples). A batch may span two epochs.
    """
    size = min(batch_size, examples)
    epochs = -(-steps * size // examples)
    order = np.concatenate([rng.permutation(examples) if reshuffle else np.arange(examples) for _ in range(epochs)])
    return order[: steps * size].reshape(steps, size)


@dataclass(frozen=True, eq=False)
class ClientData:
    """Everything that client code may see of the data; build it with :func:`framp_core.data.load_client`.

    It refers to pools that the clients of a process share, so let each process load its own rather than send one
    between processes.

    Attributes:
        name: such as ``client-0007``.
        role: ``train``, or ``unseen`` for a client that is evaluated and never trains.
        capacity: gamma, the fraction of the maskable weights that the client can hold.
        classes: C, the number of classes of the data set; a client may lack some of them.
        shape: of an example: (channels, height, width) of an image, (features,) of a node.
        train: local training data, at least one example.
        validation: local data for choices such as hyper-parameters; may be empty.
        test: local test data, at least one example.
        union_test: test data of all clients of role train, in one fixed random order, so that the first ones are a fair
            sample of all (images with ``evaluation.union-by-client`` come client after client). Each example is as its
            owner has it: an image with the owner's feature shift and label, a node in the owner's subgraph.
        known: what the client may look at without labels: its training images, or all nodes of its subgraph.
        partition_digest: identifies the whole partition and the data; equal on all clients and on the server.
        content_digest: identifies data of the client's own, which the partition does not know; else ``none``.
        notes: what was left out of the folder that was read, or read otherwise than may be expected, by what it is
            about.
    """

    name: str
    role: Literal["train", "unseen"]
    capacity: Fraction
    classes: int
    shape: tuple[int, ...]
    train: Examples
    validation: Examples
    test: Examples
    union_test: Examples
    known: Examples
    partition_digest: str
    content_digest: str = "none"
    notes: Mapping[str, str] = field(default_factory=dict)

    def class_counts(self) -> np.ndarray:
        """Number of training examples per class, int64 ``(C,)``; zero for a class that the client lacks.

        Under concept shift the classes are the client's own labels.
        """
        return np.bincount(self.train.selected_labels, minlength=self.classes)
