"""What one client holds: its images by use, its capacity, and the pool for Union accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from framp_core.config import DataConfig, FrampConfig
from framp_core.data.partition import ClientSplit, Partition, make_partition
from framp_core.data.shift import Shift
from framp_core.data.sources import ImageData, load_images
from framp_core.data.transforms import Normaliser
from framp_core.errors import DataError
from framp_core.randomness import stream


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A selection from a pool of images; no pixel is copied before :meth:`batch`.

    Attributes:
        images: uint8 ``(N, C, H, W)``, the whole pool, as a rule a memory map.
        labels: int64 ``(N,)`` of the whole pool, in [0, C); under concept shift, what the owner calls each image.
        indices: int64 ``(len(self),)``, the positions in the pool that belong to the selection; may be empty.
        shift: transform of each image of the pool by its owner; None leaves the images as they are.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    shift: Shift | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def selected_labels(self) -> np.ndarray:
        """Labels of the selection, int64 ``(len(self),)``."""
        selected: np.ndarray = self.labels[self.indices]
        return selected

    def batch(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read some images into memory, shifted as their owners see them.

        Args:
            positions: int ``(b,)``, positions in the selection, each in [0, len(self)).

        Returns:
            Images, uint8 ``(b, C, H, W)``, and labels, int64 ``(b,)``.
        """
        chosen = self.indices[positions]
        images = torch.from_numpy(self.images[chosen])
        if self.shift is not None:
            images = self.shift(images, chosen)
        return images, torch.from_numpy(self.labels[chosen])


@dataclass(frozen=True, eq=False)
class ClientData:
    """Everything that client code may see of the data; build it with :func:`load_client`.

    It refers to the pools, so let each process load its own rather than send one between processes.

    Attributes:
        name: such as ``client-0007``.
        role: ``train``, or ``unseen`` for a client that is evaluated and never trains.
        capacity: gamma, the fraction of the maskable weights that the client can hold.
        classes: C, the number of classes of the data set; a client may lack some of them.
        shape: (channels, height, width) of an image.
        normaliser: from uint8 pixels to network inputs; the same for all clients.
        train: local training images, at least one.
        validation: local images for choices such as hyper-parameters; empty if ``partition.validation-fraction``
            of the client's images is less than one.
        test: local test images, at least one. These three are in ascending order of their positions, or, where what
            lies side by side in a batch changes the numbers, in one fixed random order.
        union_test: test images of all clients of role train, in one fixed random order, so that the first ones
            are a fair sample of all, or with ``evaluation.union-by-client`` client after client. Each image comes
            with the feature shift and under the labels of the client that owns it: it asks how the client's model
            serves the other clients as they are. Under concept shift no single model can be right on all of it, for
            clients name the same class differently.
        partition_digest: identifies the whole partition; equal on all clients and on the server.
    """

    name: str
    role: Literal["train", "unseen"]
    capacity: Fraction
    classes: int
    shape: tuple[int, int, int]
    normaliser: Normaliser
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    union_test: LabelledImages
    partition_digest: str

    def class_counts(self) -> np.ndarray:
        """Number of training images per class, int64 ``(C,)``; zero for a class that the client lacks.

        Under concept shift the classes are the client's own labels.
        """
        return np.bincount(self.train.selected_labels, minlength=self.classes)


@lru_cache(maxsize=4)
def _images(data: DataConfig, seed: int) -> ImageData:
    return load_images(data, seed)


@lru_cache(maxsize=4)
def load_partition(config: FrampConfig, partitions: int) -> tuple[ImageData, Partition]:
    """Load the images and the partition of a run; kept for the life of the process.

    Args:
        config: of the run; ``partition`` is scaled to ``partitions`` nodes by ``PartitionConfig.for_nodes``.
        partitions: number of nodes, >= 1.

    Raises:
        DataError: the images cannot be read, or the partition leaves a client without images.
    """
    images = _images(config.data, config.seed)
    scaled = config.model_copy(update={"partition": config.partition.for_nodes(partitions)})
    return images, make_partition(scaled, images.train_labels, images.test_labels, images.classes)


@lru_cache(maxsize=4)
def _pools(config: FrampConfig, partitions: int) -> tuple[LabelledImages, LabelledImages]:
    """The whole train and test pools as the owners of the images see them; shared by all clients of the process."""
    images, partition = load_partition(config, partitions)
    clients = partition.clients
    train = [np.concatenate([client.train, client.validation]) for client in clients]
    test = [client.test for client in clients]
    return (
        _owned(images.train_images, images.train_labels, clients, train),
        _owned(images.test_images, images.test_labels, clients, test),
    )


def _owned(
    images: np.ndarray, labels: np.ndarray, clients: Sequence[ClientSplit], holdings: Sequence[np.ndarray]
) -> LabelledImages:
    """A pool under the labels and shifts of the clients; each image has at most one owner."""
    owners = np.zeros(len(labels), dtype=np.int64)
    own_labels = labels.copy()
    for index, (client, held) in enumerate(zip(clients, holdings, strict=True)):
        owners[held] = index
        if client.concept_shift is not None:
            own_labels[held] = np.array(client.concept_shift.labels)[labels[held]]
    transforms = [client.feature_shift.transform for client in clients if client.feature_shift is not None]
    shift = Shift(transforms, owners) if transforms else None
    return LabelledImages(images, own_labels, np.arange(len(labels)), shift)


@lru_cache(maxsize=4)
def _union(config: FrampConfig, partitions: int) -> LabelledImages:
    _, partition = load_partition(config, partitions)
    _, pool = _pools(config, partitions)
    owners = [client for client in partition.clients if client.role == "train"]
    if config.evaluation.union_by_client:
        return replace(pool, indices=np.concatenate([_reading_order(config, own, "test", own.test) for own in owners]))
    indices = np.sort(np.concatenate([client.test for client in owners]))
    return replace(pool, indices=stream(config.seed, "union-order").permutation(indices))


def _reading_order(config: FrampConfig, client: ClientSplit, use: str, positions: np.ndarray) -> np.ndarray:
    """Positions as they are read; pools may be sorted by class, which batches of neighbours must not be."""
    if not config.model.batch_statistics and config.local.reshuffle:
        return positions
    return stream(config.seed, "reading-order", client.name, use).permutation(positions)


def load_client(config: FrampConfig, partition_id: int, partitions: int) -> ClientData:
    """Load one client of the run's partition.

    Args:
        config: of the run.
        partition_id: index of the client, in [0, partitions).
        partitions: number of nodes of the federation, training and unseen clients together.

    Raises:
        DataError: ``partition_id`` is out of range, or :func:`load_partition` fails.
    """
    if not 0 <= partition_id < partitions:
        raise DataError(
            f"partition-id {partition_id} is outside [0, {partitions}); give every node its own partition-id "
            f"and all the same num-partitions"
        )
    images, partition = load_partition(config, partitions)
    train, test = _pools(config, partitions)
    split = partition.clients[partition_id]
    return ClientData(
        name=split.name,
        role=split.role,
        capacity=split.capacity,
        classes=images.classes,
        shape=images.shape,
        normaliser=images.normaliser,
        train=replace(train, indices=_reading_order(config, split, "train", split.train)),
        validation=replace(train, indices=_reading_order(config, split, "validation", split.validation)),
        test=replace(test, indices=_reading_order(config, split, "test", split.test)),
        union_test=_union(config, partitions),
        partition_digest=partition.digest,
    )
