"""Summary of a data set and its partition as plain data, for ``framp data inspect``."""

from collections.abc import Sequence
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
        classes: number of classes with training images.
        most_frequent: up to three classes with the most training images, as name and share in (0, 1], largest first,
            equals in the order of the class names.
    """

    client: str
    role: str
    capacity: str
    train: int
    validation: int
    test: int
    class_counts: tuple[int, ...]
    classes: int
    most_frequent: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class DataSummary:
    """The data set and who holds which part of it.

    Attributes:
        facts: rows ``{"fact": ..., "value": ...}`` on the data set.
        class_names: what the positions of ``ClientRow.class_counts`` stand for.
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
    rows = []
    for split in partition.clients:
        counts = np.bincount(images.train_labels[split.train], minlength=images.classes)
        rows.append(
            ClientRow(
                client=split.name,
                role=split.role,
                capacity=str(split.capacity),
                train=len(split.train),
                validation=len(split.validation),
                test=len(split.test),
                class_counts=tuple(counts.tolist()),
                classes=int(np.count_nonzero(counts)),
                most_frequent=_most_frequent(counts, images.class_names),
            )
        )
    return tuple(rows)


def _most_frequent(counts: np.ndarray, names: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    order = np.argsort(-counts, kind="stable")[:3]
    return tuple((names[index], float(counts[index] / counts.sum())) for index in order if counts[index])


def shares_text(shares: Sequence[tuple[str, float]], width: int) -> str:
    """Names and shares on one line, such as ``"7 45 %, 1 30 %, 3 12 %"``.

    Args:
        shares: names and shares in [0, 1].
        width: longest line in characters. To keep it, the longest names are cut, to no less than four characters;
            if that is not enough, the last entries are left out, but never the first.
    """
    for count in range(len(shares), 0, -1):
        for limit in range(max(4, *(len(name) for name, _ in shares)), 3, -1):
            text = ", ".join(f"{_cut(name, limit)} {_percent(share)}" for name, share in shares[:count])
            if len(text) <= width:
                return text
    return text if shares else ""


def _cut(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _percent(share: float) -> str:
    return "<1 %" if share < 0.005 else f"{100 * share:.0f} %"
