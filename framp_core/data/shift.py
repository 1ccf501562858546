"""Feature and concept shift: what makes the images or the labels of one client differ from another's by more than
class frequencies (DESIGN section 5).

Feature shift is one fixed transform for all images of a client, training, validation and test. Concept shift is one
fixed permutation of its labels. Clients of a cluster share them. Both are drawn from the root seed and the cluster's
index alone, so every process arrives at the same ones.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from framp_core.config import PartitionConfig
from framp_core.errors import DataError
from framp_core.randomness import stream


def _functional() -> Any:
    """torchvision's transforms, imported on use: a device starts a process for every message, and few have a shift."""
    from torchvision.transforms.v2 import functional

    return functional


@dataclass(frozen=True)
class Transform(ABC):
    """A fixed map from images to images of the same shape.

    Subclasses are frozen dataclasses whose fields are all their parameters, strings, numbers and booleans, so that
    ``TRANSFORMS[kind](**parameters)`` rebuilds a transform from a manifest.
    """

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def draw(cls, rng: np.random.Generator, cluster: int, clusters: int) -> Self:
        """Choose the parameters.

        Args:
            rng: stream of the cluster.
            cluster: its index, in [0, clusters).
            clusters: over how many clusters the main parameter is evenly spread; 0: it is drawn at random.
        """

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Transform uint8 ``(b, C, H, W)``, C = 1 or 3, to a tensor of the same kind; the input stays as it is."""

    def to_dict(self) -> dict[str, Any]:
        """The kind and the parameters."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Rotation(Transform):
    """Rotation about the centre, bilinear, corners black.

    Attributes:
        degrees: counter-clockwise. Cluster c of K has 360 c / K, so that four clusters are exact quarter turns;
            otherwise uniform in [-60, 60].
    """

    kind = "rotation"
    degrees: float

    @classmethod
    def draw(cls, rng: np.random.Generator, cluster: int, clusters: int) -> Self:
        """Choose the angle."""
        return cls(_rounded(360 * cluster / clusters if clusters else rng.uniform(-60, 60)))

    def __call__(self, images: Tensor) -> Tensor:
        """Rotate."""
        functional = _functional()
        bilinear = functional.InterpolationMode.BILINEAR
        rotated: Tensor = functional.rotate(images, self.degrees, interpolation=bilinear)
        return rotated


@dataclass(frozen=True)
class Colour(Transform):
    """Channels exchanged, then each multiplied by a gain. A grey image is inverted, or not, and takes the first gain.

    Attributes:
        order: for red, green and blue of the result, which channel of the original it is, such as ``bgr``. Cluster c
            has the c-th of the six orders, cluster 0 the original one; otherwise at random.
        gain_red: uniform in [0.4, 1.2]; above 255 a channel saturates.
        gain_green: likewise.
        gain_blue: likewise.
        negative: whether a grey image is inverted first: in every other cluster, or at random.
    """

    kind = "colour"
    order: str
    gain_red: float
    gain_green: float
    gain_blue: float
    negative: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, cluster: int, clusters: int) -> Self:
        """Choose order, gains and inversion."""
        orders = ["".join(order) for order in permutations("rgb")]
        order = orders[cluster % len(orders) if clusters else rng.integers(len(orders))]
        red, green, blue = (_rounded(gain) for gain in rng.uniform(0.4, 1.2, size=3))
        return cls(order, red, green, blue, bool(cluster % 2 if clusters else rng.integers(2)))

    def __call__(self, images: Tensor) -> Tensor:
        """Exchange and scale the channels."""
        if images.shape[1] == 1:
            images = _functional().invert(images) if self.negative else images
        else:
            images = images[:, ["rgb".index(channel) for channel in self.order]]
        gains = torch.tensor([self.gain_red, self.gain_green, self.gain_blue])[: images.shape[1], None, None]
        return (images * gains).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Contrast(Transform):
    """Brightness multiplied, then the distance from the image's mean grey.

    Attributes:
        contrast: 0.25 to 2.5, evenly over the clusters on a logarithmic scale; otherwise uniform on it.
        brightness: uniform in [0.6, 1.4].
    """

    kind = "contrast"
    contrast: float
    brightness: float

    @classmethod
    def draw(cls, rng: np.random.Generator, cluster: int, clusters: int) -> Self:
        """Choose both factors."""
        contrast = _rounded(0.25 * 10 ** _level(rng, cluster, clusters))
        return cls(contrast, _rounded(rng.uniform(0.6, 1.4)))

    def __call__(self, images: Tensor) -> Tensor:
        """Scale brightness and contrast."""
        functional = _functional()
        brighter = functional.adjust_brightness(images, self.brightness)
        scaled: Tensor = functional.adjust_contrast(brighter, self.contrast)
        return scaled


@dataclass(frozen=True)
class Blur(Transform):
    """Gaussian blur.

    Attributes:
        sigma: standard deviation as a share of the image's shorter side, 0.01 to 0.08 (2.6 of 32 pixels), evenly
            over the clusters; otherwise uniform.
    """

    kind = "blur"
    sigma: float

    @classmethod
    def draw(cls, rng: np.random.Generator, cluster: int, clusters: int) -> Self:
        """Choose the width."""
        return cls(_rounded(0.01 + 0.07 * _level(rng, cluster, clusters)))

    def __call__(self, images: Tensor) -> Tensor:
        """Blur; the kernel ends at three standard deviations."""
        side = min(images.shape[-2:])
        sigma = self.sigma * side
        # The mirrored border cannot be wider than the image less one.
        radius = min(math.ceil(3 * sigma), side - 1)
        blurred: Tensor = images.float()
        # One direction after the other: a square kernel costs several times as much.
        for kernel in ([2 * radius + 1, 1], [1, 2 * radius + 1]):
            blurred = _functional().gaussian_blur(blurred, kernel, [sigma] * 2)
        return blurred.round_().to(torch.uint8)


@dataclass(frozen=True)
class Resolution(Transform):
    """Images scaled down and up again, bilinear with antialiasing.

    Attributes:
        scale: share of the pixels kept per side, 1 down to 0.25, evenly over the clusters; otherwise uniform.
    """

    kind = "resolution"
    scale: float

    @classmethod
    def draw(cls, rng: np.random.Generator, cluster: int, clusters: int) -> Self:
        """Choose the scale."""
        return cls(_rounded(1 - 0.75 * _level(rng, cluster, clusters)))

    def __call__(self, images: Tensor) -> Tensor:
        """Scale down and up."""
        size = list(images.shape[-2:])
        functional = _functional()
        small = functional.resize(images, [max(1, round(self.scale * side)) for side in size], antialias=True)
        restored: Tensor = functional.resize(small, size, antialias=True)
        return restored


TRANSFORMS: dict[str, type[Transform]] = {
    transform.kind: transform for transform in (Rotation, Colour, Contrast, Blur, Resolution)
}


@dataclass(frozen=True)
class FeatureShift:
    """What a client's images go through.

    Attributes:
        cluster: the client's cluster; its own index if every client has its own transform.
        transform: of all images of the cluster.
    """

    cluster: int
    transform: Transform

    def to_dict(self) -> dict[str, Any]:
        """The shift in JSON's types."""
        return {"cluster": self.cluster, **self.transform.to_dict()}


@dataclass(frozen=True)
class ConceptShift:
    """What a client calls the classes.

    Attributes:
        cluster: the client's cluster; cluster 0 keeps the labels.
        labels: the client's label of each class of the data set, a permutation of 0 .. C - 1.
    """

    cluster: int
    labels: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The shift in JSON's types."""
        return {"cluster": self.cluster, "labels": list(self.labels)}


class Shift:
    """The transforms of a pool of images that several clients share out: each image goes through its owner's.

    Args:
        transforms: of the owners.
        owners: int64 ``(N,)``, for each image of the pool the position of its owner in ``transforms``.
    """

    def __init__(self, transforms: Sequence[Transform], owners: np.ndarray) -> None:
        self.transforms = list(dict.fromkeys(transforms))
        position = {transform: index for index, transform in enumerate(self.transforms)}
        self.groups = np.array([position[transform] for transform in transforms])[owners]

    def __call__(self, images: Tensor, indices: np.ndarray) -> Tensor:
        """Transform some images of the pool; owners with equal transforms go together.

        Args:
            images: uint8 ``(b, C, H, W)``.
            indices: int64 ``(b,)``, their positions in the pool.
        """
        groups = self.groups[indices]
        present = np.unique(groups)
        if len(present) == 1:
            only: Tensor = self.transforms[present[0]](images)
            return only
        shifted = torch.empty_like(images)
        for group in present:
            chosen = torch.from_numpy(np.flatnonzero(groups == group))
            shifted[chosen] = self.transforms[group](images[chosen])
        return shifted


def feature_shifts(settings: PartitionConfig, seed: int) -> list[FeatureShift] | list[None]:
    """Feature shift of every client; None for all where it is off.

    ``mixed`` gives the clusters (or the clients) the five kinds in turn, in a random order, with random parameters.

    Raises:
        DataError: more clusters than training clients.
    """
    if settings.feature_shift == "none":
        return [None] * settings.nodes
    clusters = settings.feature_shift_clusters
    assigned = _assigned(settings, clusters, "feature-shift", seed) if clusters else list(range(settings.nodes))
    transforms = {cluster: _transform(settings, cluster, seed) for cluster in set(assigned)}
    return [FeatureShift(cluster, transforms[cluster]) for cluster in assigned]


def concept_shifts(settings: PartitionConfig, classes: int, seed: int) -> list[ConceptShift] | list[None]:
    """Concept shift of every client; None for all where it is off.

    Cluster 0 keeps the labels, every other cluster has a random permutation that no cluster before it has.

    Raises:
        DataError: more clusters than training clients, or than permutations of the classes.
    """
    clusters = settings.concept_shift_clusters
    if not clusters:
        return [None] * settings.nodes
    if clusters > math.factorial(classes):
        raise DataError(
            f"partition.concept-shift-clusters={clusters} and the labels of {classes} classes have only "
            f"{math.factorial(classes)} permutations; choose fewer clusters"
        )
    rng = stream(seed, "concept-shift")
    labels = [tuple(range(classes))]
    while len(labels) < clusters:
        drawn = tuple(rng.permutation(classes).tolist())
        if drawn not in labels:
            labels.append(drawn)
    assigned = _assigned(settings, clusters, "concept-shift", seed)
    return [ConceptShift(cluster, labels[cluster]) for cluster in assigned]


def _assigned(settings: PartitionConfig, clusters: int, kind: str, seed: int) -> list[int]:
    """A cluster for every client: equal shares (within one client) in each role, at random."""
    if clusters > settings.clients:
        raise DataError(
            f"partition.{kind}-clusters={clusters} and there are {settings.clients} training clients; "
            f"choose at most as many clusters as training clients"
        )
    assigned: list[int] = []
    for role, count in (("train", settings.clients), ("unseen", settings.unseen_clients)):
        rng = stream(seed, f"{kind}-clusters", role)
        shares = rng.permutation(clusters)[np.arange(count) % clusters]
        assigned += rng.permutation(shares).tolist()
    return assigned


def _transform(settings: PartitionConfig, cluster: int, seed: int) -> Transform:
    rng = stream(seed, "feature-shift", cluster)
    if settings.feature_shift == "mixed":
        kinds = stream(seed, "feature-shift-kinds").permutation(list(TRANSFORMS))
        return TRANSFORMS[kinds[cluster % len(kinds)]].draw(rng, cluster, 0)
    return TRANSFORMS[settings.feature_shift].draw(rng, cluster, settings.feature_shift_clusters)


def _level(rng: np.random.Generator, cluster: int, clusters: int) -> float:
    """A place in [0, 1]: the clusters evenly from end to end, or a random one."""
    return cluster / max(clusters - 1, 1) if clusters else float(rng.random())


def _rounded(value: float) -> float:
    """Four decimals: legible in a manifest, and the same digest on every machine's mathematics library."""
    return round(float(value), 4)
