"""Summary of a data set and its partition as plain data, for ``framp data inspect``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from framp_core.config import FrampConfig
from framp_core.data.client_data import load_client, load_partition
from framp_core.data.partition import Partition
from framp_core.data.shift import ConceptShift, FeatureShift
from framp_core.data.sources import ImageData
from framp_core.foreign_text import printable

if TYPE_CHECKING:
    from framp_core.data.graph import GraphData


@dataclass(frozen=True)
class ClientRow:
    """What one client holds.

    Attributes:
        client: its name.
        role: ``train`` or ``unseen``.
        capacity: as a fraction, such as ``1/16``.
        train: number of training examples.
        validation: number of validation examples.
        test: number of test examples.
        class_counts: training examples per class, in the order of the class names; under concept shift, by the
            client's own labels.
        classes: number of classes with training examples.
        most_frequent: up to three classes with the most training examples, as name and share in (0, 1], largest first,
            equals in the order of the class names.
        feature_shift: cluster and transform, such as ``cluster 2: rotation, degrees 180.0``; empty where it is off.
        concept_shift: cluster and extent, such as ``cluster 1: 9 of 10 labels moved``; empty where it is off.
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
    feature_shift: str
    concept_shift: str


@dataclass(frozen=True)
class DataSummary:
    """The data set and who holds which part of it.

    Attributes:
        facts: rows ``{"fact": ..., "value": ...}`` on the data set, and on the shifts and quantity skew that are on,
            one row per cluster.
        class_names: what the positions of ``ClientRow.class_counts`` stand for.
        clients: one row per client, in order of their index.
        digest: of the partition.
    """

    facts: tuple[dict[str, str], ...]
    class_names: tuple[str, ...]
    clients: tuple[ClientRow, ...]
    digest: str


def summarise_data(config: FrampConfig) -> DataSummary:
    """Load the data and the partition of a configuration and summarise them.

    Raises:
        DataError: the data cannot be read, or the partition leaves a client without data.
    """
    data, partition = load_partition(config, config.partition.nodes)
    facts = {"data set": config.data.name, "root": config.data.root or "-", **_facts(data, partition)}
    facts |= _shifts(config, partition)
    return DataSummary(
        facts=tuple({"fact": fact, "value": value} for fact, value in facts.items()),
        class_names=data.class_names,
        clients=_rows(config, data.class_names, partition),
        digest=partition.digest,
    )


def _facts(data: "ImageData | GraphData", partition: Partition) -> dict[str, str]:
    if isinstance(data, ImageData):
        return _image_facts(data)
    from framp_core.data.graph import graph_facts

    return graph_facts(data, partition)


def _image_facts(images: ImageData) -> dict[str, str]:
    channels, height, width = images.shape
    return {
        "image": f"{height}x{width}, {'grey' if channels == 1 else 'RGB'}",
        "classes": str(images.classes),
        "train images": _per_class(images.train_labels, images.classes),
        "test images": _per_class(images.test_labels, images.classes),
        "channel mean": ", ".join(f"{value:.4f}" for value in images.normaliser.mean),
        "channel std": ", ".join(f"{value:.4f}" for value in images.normaliser.std),
        **images.notes,
    }


def _shifts(config: FrampConfig, partition: Partition) -> dict[str, str]:
    settings, clients = config.partition, partition.clients
    facts = {}
    if settings.feature_shift != "none":
        clusters = settings.feature_shift_clusters
        extent = _count(clusters, "cluster") if clusters else "one per client"
        facts["feature shift"] = f"{settings.feature_shift}, {extent}"
        facts |= _clusters("feature", [client.feature_shift for client in clients]) if clusters else {}
    if settings.concept_shift_clusters:
        facts["concept shift"] = _count(settings.concept_shift_clusters, "cluster")
        facts |= _clusters("concept", [client.concept_shift for client in clients])
    if settings.quantity_skew:
        sizes = [len(client.train) + len(client.validation) for client in clients]
        facts["quantity skew"] = f"{settings.quantity_skew:g} ({min(sizes)} to {max(sizes)} images per client)"
    return facts


def _clusters(kind: str, shifts: Sequence[FeatureShift | ConceptShift | None]) -> dict[str, str]:
    """One row per cluster: what it does, and how many clients it has."""
    members = Counter((shift.cluster, _effect(shift)) for shift in shifts if shift is not None)
    return {
        f"{kind} cluster {cluster}": f"{effect}; {_count(count, 'client')}"
        for (cluster, effect), count in sorted(members.items())
    }


def _effect(shift: FeatureShift | ConceptShift) -> str:
    if isinstance(shift, ConceptShift):
        moved = sum(label != index for index, label in enumerate(shift.labels))
        return f"{moved} of {len(shift.labels)} labels moved"
    parameters = shift.transform.to_dict()
    return ", ".join([parameters.pop("kind"), *(f"{name} {value}" for name, value in parameters.items())])


def _shift_text(shift: FeatureShift | ConceptShift | None) -> str:
    return f"cluster {shift.cluster}: {_effect(shift)}" if shift is not None else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _per_class(labels: np.ndarray, classes: int) -> str:
    counts = np.bincount(labels, minlength=classes)
    return f"{len(labels)} ({counts.min()} to {counts.max()} per class)"


def _rows(config: FrampConfig, names: tuple[str, ...], partition: Partition) -> tuple[ClientRow, ...]:
    rows = []
    for index, split in enumerate(partition.clients):
        counts = load_client(config, index, config.partition.nodes).class_counts()
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
                most_frequent=_most_frequent(counts, names),
                feature_shift=_shift_text(split.feature_shift),
                concept_shift=_shift_text(split.concept_shift),
            )
        )
    return tuple(rows)


def _most_frequent(counts: np.ndarray, names: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    order = np.argsort(-counts, kind="stable")[:3]
    return tuple((printable(names[index]), float(counts[index] / counts.sum())) for index in order if counts[index])


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
