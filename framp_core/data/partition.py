"""Who holds which images: the partition of a data set over clients, and its manifest (DESIGN section 5)."""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np

from framp_core.config import CapacityConfig, FrampConfig, PartitionConfig
from framp_core.data.cache import content_digest
from framp_core.data.shift import ConceptShift, FeatureShift, concept_shifts, feature_shifts
from framp_core.errors import DataError
from framp_core.randomness import stream
from framp_core.rounding import largest_remainder

MANIFEST_VERSION = 3


@dataclass(frozen=True, eq=False)
class ClientSplit:
    """The examples of one client, as positions in the pools of images, or as nodes of a graph.

    Attributes:
        name: such as ``client-0007``.
        role: ``train``, or ``unseen`` for a client that never trains.
        capacity: gamma in (0, 1].
        train: int64, ascending, positions in the train pool; at least one.
        validation: int64, ascending, positions in the train pool; may be empty.
        test: int64, ascending, positions in the test pool; at least one.
        feature_shift: transform of all its images; None where feature shift is off.
        concept_shift: permutation of its labels; None where concept shift is off.
        context: int64, ascending, further nodes of a graph, which have no label or are in no part of its own split:
            their features pass to their neighbours, and nothing is trained or tested on them.
    """

    name: str
    role: Literal["train", "unseen"]
    capacity: Fraction
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    feature_shift: FeatureShift | None = None
    concept_shift: ConceptShift | None = None
    context: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def held(self) -> np.ndarray:
        """All nodes of a graph that the client holds, int64, ascending."""
        return np.sort(np.concatenate([self.train, self.validation, self.test, self.context]))

    def to_dict(self) -> dict[str, Any]:
        """The split in JSON's types; a shift that is off and a context without nodes are left out."""
        shifts = {"feature_shift": self.feature_shift, "concept_shift": self.concept_shift}
        return {
            "name": self.name,
            "role": self.role,
            "capacity": str(self.capacity),
            "train": self.train.tolist(),
            "validation": self.validation.tolist(),
            "test": self.test.tolist(),
            **({"context": self.context.tolist()} if len(self.context) else {}),
            **{name: shift.to_dict() for name, shift in shifts.items() if shift is not None},
        }


@dataclass(frozen=True, eq=False)
class Partition:
    """A data set divided over clients.

    Attributes:
        clients: in order of their index; those of role ``train`` come first.
        data_digests: SHA-256 of each part of the data: of images ``class names``, ``training data`` and ``test data``,
            of a graph ``class names``, ``edges``, ``features`` and ``labels``.
        seed: root seed that it was made with.
        settings: the configuration sections ``partition`` and ``capacity`` that it was made with.
    """

    clients: tuple[ClientSplit, ...]
    data_digests: Mapping[str, str]
    seed: int
    settings: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of ``{"data_digests", "clients"}`` as in :meth:`manifest`, JSON with sorted keys, no spaces.

        Equal digests mean the same examples, transforms, labels and class names on the same clients, however they were
        arrived at.
        """
        content = {"data_digests": dict(self.data_digests), "clients": [client.to_dict() for client in self.clients]}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def manifest(self) -> dict[str, Any]:
        """All that is needed to rebuild or to check the partition, in JSON's types."""
        return {
            "version": MANIFEST_VERSION,
            "seed": self.seed,
            **self.settings,
            "data_digests": dict(self.data_digests),
            "digest": self.digest,
            "clients": [client.to_dict() for client in self.clients],
        }


def make_partition(
    config: FrampConfig,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    classes: int,
    digests: Mapping[str, str] | None = None,
) -> Partition:
    """Divide the train and test pools over ``config.partition.nodes`` clients.

    A scheme decides how many images of each class a client gets; which ones is drawn at random.

    - ``balanced-dirichlet`` (FIARSE): each client draws a class prior ~ Dir(alpha) and gets N / n images, classes
      drawn from its prior; a class that is exhausted is drawn no more. Clients draw in a random order, one image at
      a time, so that none is left with the remains. Sizes differ by one image if n does not divide N.
    - ``dirichlet``: for each class, the shares of the clients are drawn ~ Dir(alpha). Sizes vary.
    - ``classes-per-client``: each client holds that many classes, all classes being held equally often (within one);
      the holders of a class share its images equally. A class that nobody holds is left out of both pools.
    - ``iid``: the shuffled pool in equal parts.

    Test data: ``independent`` draws the scheme anew. ``matched`` divides each class's test images among the clients
    in proportion to their training images of that class (validation included), by largest remainder. A client that
    rounding leaves without any is given one: of the classes that it holds, from the client that has most images of
    one and more than that one image.

    Sizes: with ``quantity_skew`` s > 0, ``balanced-dirichlet`` and ``iid`` give each client one image and divide the
    rest in proportion to exp(s z), z ~ N(0, 1), by largest remainder, in place of equal sizes.

    Feature and concept shift (:mod:`framp_core.data.shift`) change what a client sees of its images, not which it
    holds: all of the above goes by the labels of the data set.

    A client may lack classes, but not training or test images. ``validation_fraction`` of its training images,
    rounded down, is drawn at random as validation data.

    Args:
        config: sections ``partition`` and ``capacity`` and the seed are used.
        train_labels: int64 ``(N,)`` in [0, classes).
        test_labels: int64 ``(M,)``.
        classes: C, the number of classes.
        digests: of the data, by part, which become part of the partition's; None where the labels are all there is.

    Raises:
        DataError: a client would end without training or test images, more classes per client than there are,
            quantity skew with a scheme that has sizes of its own, or more clusters than training clients.
    """
    settings, seed = config.partition, config.seed
    _check_quantity_skew(settings)
    available = np.bincount(test_labels, minlength=classes)
    counts = _scheme_counts(np.bincount(train_labels, minlength=classes), settings, seed, "train")
    _require_images(counts, settings, "training")
    if settings.test_split == "matched":
        test_counts = _matched_counts(counts, available)
    else:
        test_counts = _scheme_counts(available, settings, seed, "test")
    _require_images(test_counts, settings, "test")
    train = _deal(train_labels, counts, stream(seed, "partition-deal", "train"))
    test = _deal(test_labels, test_counts, stream(seed, "partition-deal", "test"))
    fractions = capacities(config.capacity, settings, seed)
    features = feature_shifts(settings, seed)
    concepts = concept_shifts(settings, classes, seed)
    clients = []
    for index, (own_train, own_test) in enumerate(zip(train, test, strict=True)):
        kept, validation = split_validation(own_train, settings.validation_fraction, seed, index)
        role: Literal["train", "unseen"] = "train" if index < settings.clients else "unseen"
        held = (kept, validation, own_test)
        clients.append(ClientSplit(client_name(index), role, fractions[index], *held, features[index], concepts[index]))
    nested = config.to_nested()
    return Partition(
        clients=tuple(clients),
        data_digests=digests
        or {"training data": content_digest(train_labels), "test data": content_digest(test_labels)},
        seed=seed,
        settings={"partition": nested["partition"], "capacity": nested["capacity"]},
    )


def client_name(index: int) -> str:
    """Name of a client, such as ``client-0007``."""
    return f"client-{index:04d}"


# --- schemes: (images available per class, settings, stream) -> counts (nodes, C) -------------------------------


def _balanced_dirichlet(available: np.ndarray, settings: PartitionConfig, rng: np.random.Generator) -> np.ndarray:
    nodes, classes, total = settings.nodes, len(available), int(available.sum())
    priors = rng.dirichlet(np.full(classes, settings.alpha), size=nodes)
    owners = rng.permutation(_turns(_sizes(total, settings, rng))).tolist()
    draws = rng.random(total).tolist()
    remaining = available.tolist()
    counts = np.zeros((nodes, classes), dtype=np.int64)
    cumulative = _cumulative(priors, remaining)
    for owner, draw in zip(owners, draws, strict=True):
        label = _drawn_class(cumulative[owner], draw)
        counts[owner, label] += 1
        remaining[label] -= 1
        if not remaining[label]:
            cumulative = _cumulative(priors, remaining)
    return counts


def _sizes(total: int, settings: PartitionConfig, rng: np.random.Generator) -> np.ndarray:
    """Images per client, int64 ``(nodes,)``, sum ``total``: equal within one, or log-normal above one image each."""
    nodes = settings.nodes
    if not settings.quantity_skew or total < nodes:
        return total // nodes + (np.arange(nodes) < total % nodes)
    exponents = settings.quantity_skew * rng.standard_normal(nodes)
    return 1 + largest_remainder(total - nodes, np.exp(exponents - exponents.max()))


def _turns(sizes: np.ndarray) -> np.ndarray:
    """Clients in turn until each has had as many turns as its size, int64 ``(sum of sizes,)``."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    turns = np.arange(len(owners)) - np.repeat(sizes.cumsum() - sizes, sizes)
    return owners[np.lexsort((owners, turns))]


def _cumulative(priors: np.ndarray, remaining: Sequence[int]) -> list[list[float]]:
    """Cumulative priors over the classes that are left; what is left itself where a prior has no mass there."""
    left = np.array(remaining)
    masked = priors * (left > 0)
    masked[masked.sum(axis=1) == 0] = left
    cumulative: list[list[float]] = masked.cumsum(axis=1).tolist()
    return cumulative


def _drawn_class(cumulative: Sequence[float], draw: float) -> int:
    """The class on which a draw in [0, 1) of the total falls.

    Near the smallest float a part of the total rounds up to all of it; then the last class with a mass is meant.
    """
    total = cumulative[-1]
    return min(bisect_right(cumulative, draw * total), bisect_left(cumulative, total))


def _dirichlet(available: np.ndarray, settings: PartitionConfig, rng: np.random.Generator) -> np.ndarray:
    shares = rng.dirichlet(np.full(settings.nodes, settings.alpha), size=len(available))
    return np.stack([largest_remainder(count, share) for count, share in zip(available, shares, strict=True)], axis=1)


def _classes_per_client(available: np.ndarray, settings: PartitionConfig, rng: np.random.Generator) -> np.ndarray:
    classes, wanted = len(available), settings.classes_per_client
    if wanted > classes:
        raise DataError(
            f"partition.classes-per-client={wanted} and the data set has {classes} classes; choose at most {classes}"
        )
    held = np.zeros((settings.nodes, classes), dtype=np.int64)
    for own in held:
        # The least held classes first, in random order among equals.
        own[np.lexsort((rng.random(classes), held.sum(axis=0)))[:wanted]] = 1
    counts = np.zeros_like(held)
    for label in np.flatnonzero(held.sum(axis=0)):
        counts[:, label] = largest_remainder(int(available[label]), held[:, label])
    return counts


def _iid(available: np.ndarray, settings: PartitionConfig, rng: np.random.Generator) -> np.ndarray:
    labels = rng.permutation(np.repeat(np.arange(len(available)), available))
    parts = np.split(labels, _sizes(len(labels), settings, rng).cumsum()[:-1])
    return np.stack([np.bincount(part, minlength=len(available)) for part in parts])


_SCHEMES: dict[str, Callable[[np.ndarray, PartitionConfig, np.random.Generator], np.ndarray]] = {
    "balanced-dirichlet": _balanced_dirichlet,
    "dirichlet": _dirichlet,
    "classes-per-client": _classes_per_client,
    "iid": _iid,
}


def _scheme_counts(available: np.ndarray, settings: PartitionConfig, seed: int, pool: str) -> np.ndarray:
    return _SCHEMES[settings.scheme](available, settings, stream(seed, "partition-scheme", pool))


def _matched_counts(train_counts: np.ndarray, available: np.ndarray) -> np.ndarray:
    counts = np.zeros_like(train_counts)
    for label in np.flatnonzero(train_counts.sum(axis=0)):
        counts[:, label] = largest_remainder(int(available[label]), train_counts[:, label])
    for client in np.flatnonzero(counts.sum(axis=1) == 0):
        can_give = counts * (counts.sum(axis=1, keepdims=True) > 1) * (train_counts[client] > 0)
        donor, label = np.unravel_index(can_give.argmax(), counts.shape)
        if can_give[donor, label]:
            counts[donor, label] -= 1
            counts[client, label] += 1
    return counts


# --- from counts to images ----------------------------------------------------------------------------------------


def _check_quantity_skew(settings: PartitionConfig) -> None:
    if settings.quantity_skew and settings.scheme not in ("balanced-dirichlet", "iid"):
        raise DataError(
            f"partition.quantity-skew={settings.quantity_skew} with scheme {settings.scheme!r}, whose sizes follow "
            f"from its class counts; use scheme 'balanced-dirichlet' or 'iid', or quantity-skew=0"
        )


def _require_images(counts: np.ndarray, settings: PartitionConfig, kind: str) -> None:
    without = np.flatnonzero(counts.sum(axis=1) == 0)
    if len(without):
        larger_alpha = ", a larger partition.alpha" if settings.scheme.endswith("dirichlet") else ""
        raise DataError(
            f"{client_name(without[0])} and {len(without) - 1} other clients would have no {kind} image of the "
            f"{counts.sum()} divided over {settings.nodes} clients by scheme {settings.scheme!r}; "
            f"choose fewer partition.clients and unseen-clients{larger_alpha}, another seed, or more images"
        )


def _deal(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw ``counts[i, c]`` different images of class c for client i; positions ascending."""
    hands: list[list[np.ndarray]] = [[] for _ in counts]
    for label in range(counts.shape[1]):
        deck = rng.permutation(np.flatnonzero(labels == label))
        for hand, cards in zip(hands, np.split(deck, counts[:, label].cumsum())[:-1], strict=True):
            hand.append(cards)
    return [np.sort(np.concatenate(hand)) for hand in hands]


def split_validation(indices: np.ndarray, fraction: float, seed: int, client: int) -> tuple[np.ndarray, np.ndarray]:
    """A client's images without its validation data, and these, drawn at random; both ascending."""
    shuffled = stream(seed, "validation-split", client).permutation(indices)
    count = int(fraction * len(indices))
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def capacities(config: CapacityConfig, settings: PartitionConfig, seed: int) -> list[Fraction]:
    """Equal shares of the sizes (within one client) in each role."""
    fractions: list[Fraction] = []
    for role, count in (("train", settings.clients), ("unseen", settings.unseen_clients)):
        shares = np.arange(count) * len(config.sizes) // max(count, 1)
        if config.assignment == "shuffled":
            shares = stream(seed, "capacity", role).permutation(shares)
        fractions += [config.sizes[share] for share in shares]
    return fractions
