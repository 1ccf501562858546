"""Images of the clients of a run: selections from the pools, as their owners see them."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from framp_core.config import DataConfig, FrampConfig
from framp_core.data.examples import ClientData, Examples, batch_positions
from framp_core.data.facts import DataFacts
from framp_core.data.partition import (
    ClientSplit,
    Partition,
    capacities,
    client_name,
    make_partition,
    split_validation,
)
from framp_core.data.shift import Shift
from framp_core.data.sources import OWN_IMAGES, ImageData, load_images, load_own_images
from framp_core.data.transforms import Augmentation, Normaliser
from framp_core.errors import DataError
from framp_core.randomness import stream

AHEAD_BYTES = 2**24
"""Memory of the network inputs that training prepares ahead."""
IN_CACHE_BYTES = 2**18
"""Memory of the network inputs of a batch whose size is free. What the layers make of it stays in a core's cache, and
goes back to the allocator rather than to the system: 21 images of CIFAR-10, 1.5 times as fast as 64 where a process per
core computes features with the network of ``cifar10-small``."""

OWN_CLIENT = "own-client"
"""Name of a client that is in no partition."""


@dataclass(frozen=True, eq=False)
class LabelledImages(Examples):
    """A selection from a pool of images; no pixel is copied before :meth:`batch`.

    Attributes:
        images: uint8 ``(N, C, H, W)``, the whole pool, as a rule a memory map.
        labels: int64 ``(N,)`` of the whole pool, in [0, C); under concept shift, what the owner calls each image.
        indices: int64 ``(len(self),)``, the positions in the pool that belong to the selection; may be empty.
        normaliser: from uint8 pixels to network inputs; the same for all clients.
        shift: transform of each image of the pool by its owner; None leaves the images as they are.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    normaliser: Normaliser
    shift: Shift | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def selected_labels(self) -> np.ndarray:
        """Labels of the selection, int64 ``(len(self),)``."""
        selected: np.ndarray = self.labels[self.indices]
        return selected

    def first(self, count: int) -> Self:
        """The first ``count`` images of the selection."""
        return replace(self, indices=self.indices[:count])

    def batch(self, positions: np.ndarray, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Read some images, shifted as their owners see them.

        Args:
            positions: int ``(b,)``, positions in the selection, each in [0, len(self)).
            device: where they go; a GPU holds the whole pool from the first time on.

        Returns:
            Images, uint8 ``(b, C, H, W)``, and labels, int64 ``(b,)``.
        """
        chosen, device = self.indices[positions], torch.device(device)
        if device.type == "cpu":
            images = torch.from_numpy(self.images[chosen])
        else:
            images = _resident(_Pool(self.images), device)[torch.from_numpy(chosen).to(device)]
        if self.shift is not None:
            images = self.shift(images, chosen)
        return images, torch.from_numpy(self.labels[chosen]).to(device)

    def training_batches(
        self, config: FrampConfig, steps: int, rng: np.random.Generator, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``local.batch_size`` images per step, augmented if ``data.augment`` says so.

        The images of many steps are read, augmented and normalised at once.
        """
        local = config.local
        order = batch_positions(len(self), local.batch_size, steps, rng, local.reshuffle)
        size, shape = order.shape[1], self.images.shape[1:]
        drawn = [Augmentation.draw((size, *shape), rng) for _ in order] if config.data.augment else []
        at_once = max(1, AHEAD_BYTES // (4 * size * math.prod(shape)))
        for first in range(0, steps, at_once):
            chosen = order[first : first + at_once]
            augmentation = Augmentation.joined(drawn[first : first + at_once]) if drawn else None
            inputs, labels = self._inputs(chosen.reshape(-1), device, augmentation)
            yield from zip(torch.split(inputs, size), torch.split(labels, size), strict=True)

    def ordered_batches(
        self,
        batch_size: int,
        device: torch.device,
        rng: np.random.Generator | None = None,
        *,
        lone_example: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order, ``batch_size`` at a time; the last batch holds what is left.

        Without a ``batch_size`` there are 8 images in a batch or, of small ones, :data:`IN_CACHE_BYTES` of inputs.
        """
        size = batch_size or max(8, IN_CACHE_BYTES // (4 * math.prod(self.images.shape[1:])))
        starts = list(range(0, len(self), size))
        if not lone_example and len(starts) > 1 and len(self) - starts[-1] == 1:
            starts.pop()
        for first, last in pairwise([*starts, len(self)]):
            shape = (last - first, *self.images.shape[1:])
            augmentation = None if rng is None else Augmentation.draw(shape, rng)
            yield self._inputs(np.arange(first, last), device, augmentation)

    def _inputs(
        self, positions: np.ndarray, device: torch.device, augmentation: Augmentation | None
    ) -> tuple[Tensor, Tensor]:
        """Network inputs and labels on the device."""
        images, labels = self.batch(positions, device)
        if augmentation is not None:
            images = augmentation(images)
        return self.normaliser(images), labels


@dataclass(frozen=True, eq=False)
class _Pool:
    images: np.ndarray

    def __hash__(self) -> int:
        return id(self.images)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pool) and self.images is other.images


@lru_cache(maxsize=4)
def _resident(pool: _Pool, device: torch.device) -> Tensor:
    """All pixels of a pool on a device, so that no step waits for a copy."""
    return torch.from_numpy(np.ascontiguousarray(pool.images)).to(device)


@lru_cache(maxsize=4)
def _images(data: DataConfig, seed: int) -> ImageData:
    return load_images(data, seed)


@lru_cache(maxsize=4)
def image_partition(config: FrampConfig, partitions: int) -> tuple[ImageData, Partition]:
    """The images and the partition of a run; kept for the life of the process."""
    if config.data.name == OWN_IMAGES:
        raise DataError(
            f"with data.name={OWN_IMAGES!r} the images lie on the devices and nobody divides them; run it on "
            f"SuperNodes, each with its data-dir"
        )
    images = _images(config.data, config.seed)
    scaled = config.model_copy(update={"partition": config.partition.for_nodes(partitions)})
    return images, make_partition(scaled, images.train_labels, images.test_labels, images.classes, images.digests)


@lru_cache(maxsize=4)
def _pools(config: FrampConfig, partitions: int) -> tuple[LabelledImages, LabelledImages]:
    """The whole train and test pools as the owners of the images see them; shared by all clients of the process."""
    images, partition = image_partition(config, partitions)
    clients = partition.clients
    train = [np.concatenate([client.train, client.validation]) for client in clients]
    test = [client.test for client in clients]
    return (
        _owned(images, images.train_images, images.train_labels, clients, train),
        _owned(images, images.test_images, images.test_labels, clients, test),
    )


def _owned(
    data: ImageData,
    images: np.ndarray,
    labels: np.ndarray,
    clients: Sequence[ClientSplit],
    holdings: Sequence[np.ndarray],
) -> LabelledImages:
    """A pool of ``data`` under the labels and shifts of the clients; each image has at most one owner."""
    owners = np.zeros(len(labels), dtype=np.int64)
    own_labels = labels.copy()
    for index, (client, held) in enumerate(zip(clients, holdings, strict=True)):
        owners[held] = index
        if client.concept_shift is not None:
            own_labels[held] = np.array(client.concept_shift.labels)[labels[held]]
    transforms = [client.feature_shift.transform for client in clients if client.feature_shift is not None]
    shift = Shift(transforms, owners) if transforms else None
    return LabelledImages(images, own_labels, np.arange(len(labels)), data.normaliser, shift)


@lru_cache(maxsize=4)
def _union(config: FrampConfig, partitions: int) -> LabelledImages:
    _, partition = image_partition(config, partitions)
    _, pool = _pools(config, partitions)
    owners = [client for client in partition.clients if client.role == "train"]
    if config.evaluation.union_by_client:
        return replace(
            pool, indices=np.concatenate([_reading_order(config, own.name, "test", own.test) for own in owners])
        )
    indices = np.sort(np.concatenate([client.test for client in owners]))
    return replace(pool, indices=stream(config.seed, "union-order").permutation(indices))


def _reading_order(config: FrampConfig, client: str, use: str, positions: np.ndarray) -> np.ndarray:
    """Positions as they are read; pools may be sorted by class, which batches of neighbours must not be."""
    if not config.model.batch_statistics and config.local.reshuffle:
        return positions
    return stream(config.seed, "reading-order", client, use).permutation(positions)


class _Holding(NamedTuple):
    """Where a client's images are: its split of two pools, the union of all test images, and digests.

    ``digest`` is the partition's, ``content_digest`` that of images which the partition does not know.
    """

    images: ImageData
    split: ClientSplit
    train: LabelledImages
    test: LabelledImages
    union: LabelledImages
    digest: str
    content_digest: str = "none"


def _dealt(config: FrampConfig, partition_id: int, partitions: int) -> _Holding:
    images, partition = image_partition(config, partitions)
    pools, union = _pools(config, partitions), _union(config, partitions)
    return _Holding(images, partition.clients[partition_id], *pools, union, partition.digest)


def _own(config: FrampConfig, partition_id: int, partitions: int) -> _Holding:
    """All images of this device, which sees nobody else's: there is no union.

    What clients must agree on, and the digest says, are the classes, the shape of the images and the number of clients.
    That the images are those with which a run began, the content digest says: 32 bits of a SHA-256 of all pixels and
    labels, with the client's name and the run's seed, so that it does not link the data of runs with different seeds.
    By it the server can confirm a guess of all of a client's images to the last pixel, and nothing about some of them.
    """
    images, settings = _images(config.data, config.seed), config.partition.for_nodes(partitions)
    train, test = (
        LabelledImages(pixels, labels, np.arange(len(labels)), images.normaliser)
        for pixels, labels in ((images.train_images, images.train_labels), (images.test_images, images.test_labels))
    )
    kept, validation = split_validation(train.indices, settings.validation_fraction, config.seed, partition_id)
    role: Literal["train", "unseen"] = "train" if partition_id < settings.clients else "unseen"
    capacity = capacities(config.capacity, settings, config.seed)[partition_id]
    split = ClientSplit(client_name(partition_id), role, capacity, kept, validation, test.indices)
    agreed = json.dumps([images.class_names, images.shape, settings.clients, settings.unseen_clients])
    content = json.dumps([config.seed, split.name, dict(images.digests)], sort_keys=True)
    digest, own = (hashlib.sha256(text.encode()).hexdigest() for text in (agreed, content))
    return _Holding(images, split, train, test, test.first(0), digest, own[:8])


def image_client(config: FrampConfig, partition_id: int, partitions: int) -> ClientData:
    """One client's images."""
    find = _own if config.data.name == OWN_IMAGES else _dealt
    images, split, train, test, union, digest, content_digest = find(config, partition_id, partitions)
    own = replace(train, indices=_reading_order(config, split.name, "train", split.train))
    return ClientData(
        name=split.name,
        role=split.role,
        capacity=split.capacity,
        classes=images.classes,
        shape=images.shape,
        train=own,
        validation=replace(train, indices=_reading_order(config, split.name, "validation", split.validation)),
        test=replace(test, indices=_reading_order(config, split.name, "test", split.test)),
        union_test=union,
        known=own,
        partition_digest=digest,
        content_digest=content_digest,
        notes=images.notes,
    )


def own_client(config: FrampConfig, facts: DataFacts, root: Path, capacity: Fraction, digest: str) -> ClientData:
    """A client whose images lie in a folder of its own, outside of the run's partition; it never trains.

    Args:
        config: of the run.
        facts: what the run's images are like; their normalisation applies, not that of the folder's own images.
        root: ``train/CLASS/*`` and, for test images, ``test/CLASS/*``; see
            :func:`framp_core.data.sources.load_own_images`.
        capacity: gamma.
        digest: of the run's partition.

    Raises:
        DataError: the images cannot be read, or are not like those of the run.
    """
    assert facts.normaliser is not None
    own = load_own_images(root, facts.shape, facts.class_names, config.data.image_size)
    selections = {}
    for split, (images, labels) in (("train", own.train), ("test", own.test)):
        order = _reading_order(config, OWN_CLIENT, split, np.arange(len(labels)))
        selections[split] = LabelledImages(images, labels, order, facts.normaliser)
    train, test = selections["train"], selections["test"]
    if not len(train):
        raise DataError(f"the train folder in {str(root)!r} holds no image; a descriptor needs at least one")
    nothing = replace(train, indices=np.zeros(0, dtype=np.int64))
    return ClientData(
        name=OWN_CLIENT,
        role="unseen",
        capacity=capacity,
        classes=len(facts.class_names),
        shape=facts.shape,
        train=train,
        validation=nothing,
        test=test,
        union_test=nothing,
        known=train,
        partition_digest=digest,
        notes=own.notes,
    )
