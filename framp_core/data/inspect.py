"""Summary of a data set and its partition as plain data, for ``framp data inspect``."""

from dataclasses import dataclass

import numpy as np

from framp_core.config import FrampConfig
from framp_core.data.client_data import load_partition
from framp_core.data.partition import Partition
from framp_core.data.sources import ImageData


@dataclass(frozen=True)
class ClientRow:
    """What one client holds.

    Attributes:
        client: its name.
        role: ``train`` or ``unseen``.
        capacity: as a fraction, such as ``1/16``.
        train: number of training images.
        validation: number of validation images.
        test: number of test images.
        class_counts: training images per class, in the order of the class names.
    """

    client: str
    role: str
    capacity: str
    train: int
    validation: int
    test: int
    class_counts: tuple[int, ...]


@dataclass(frozen=True)
class DataSummary:
    """The data set and who holds which part of it.

    Attributes:
        facts: rows ``{"fact": ..., "value": ...}`` on the data set.
        class_names: columns of ``ClientRow.class_counts``.
        clients: one row per client, in order of their index.
        digest: of the partition.
    """

    facts: tuple[dict[str, str], ...]
    class_names: tuple[str, ...]
    clients: tuple[ClientRow, ...]
    digest: str


def summarise_data(config: FrampConfig) -> DataSummary:
    """Load the images and the partition of a configuration and summarise them.

    Raises:
        DataError: the images cannot be read, or the partition leaves a client without images.
    """
    images, partition = load_partition(config, config.partition.nodes)
    return DataSummary(
        facts=_facts(config, images),
        class_names=images.class_names,
        clients=_rows(images, partition),
        digest=partition.digest,
    )


def _facts(config: FrampConfig, images: ImageData) -> tuple[dict[str, str], ...]:
    channels, height, width = images.shape
    facts = {
        "data set": config.data.name,
        "root": config.data.root or "-",
        "image": f"{height}x{width}, {'grey' if channels == 1 else 'RGB'}",
        "classes": str(images.classes),
        "train images": _per_class(images.train_labels, images.classes),
        "test images": _per_class(images.test_labels, images.classes),
        "channel mean": ", ".join(f"{value:.4f}" for value in images.normaliser.mean),
        "channel std": ", ".join(f"{value:.4f}" for value in images.normaliser.std),
    }
    return tuple({"fact": fact, "value": value} for fact, value in facts.items())


def _per_class(labels: np.ndarray, classes: int) -> str:
    counts = np.bincount(labels, minlength=classes)
    return f"{len(labels)} ({counts.min()} to {counts.max()} per class)"


def _rows(images: ImageData, partition: Partition) -> tuple[ClientRow, ...]:
    return tuple(
        ClientRow(
            client=split.name,
            role=split.role,
            capacity=str(split.capacity),
            train=len(split.train),
            validation=len(split.validation),
            test=len(split.test),
            class_counts=tuple(np.bincount(images.train_labels[split.train], minlength=images.classes).tolist()),
        )
        for split in partition.clients
    )
