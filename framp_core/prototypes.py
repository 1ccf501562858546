"""Class prototypes (FedProto, Tan et al. 2022): mean penultimate features per class, local and global.

A local prototype is the mean feature of one class over one client's training examples; a global one is the
count-weighted mean over the clients of a round, smoothed over rounds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Prototypes:
    """Prototypes of p classes.

    Attributes:
        classes: int64 ``(p,)``, ascending, each in [0, C).
        counts: int64 ``(p,)``, the number of examples behind each mean, >= 1.
        means: float32 ``(p, f)``, mean penultimate feature of each class.
    """

    classes: np.ndarray
    counts: np.ndarray
    means: np.ndarray

    @property
    def size(self) -> float:
        """Root mean square of the entries of the longest mean; 0 if there is none. It cannot overflow."""
        if not self.means.size:
            return 0.0
        squares = np.einsum("pf,pf->p", self.means, self.means, dtype=np.float64)
        return float(np.sqrt(squares.max() / self.means.shape[1]))

    def dense(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Spread over all classes, for :func:`alignment_loss`.

        Args:
            classes: C, the number of classes.

        Returns:
            Means, float32 ``(C, f)``, zero for a class without a prototype; whether it has one, bool ``(C,)``.
        """
        means = np.zeros((classes, self.means.shape[1]), dtype=np.float32)
        present = np.zeros(classes, dtype=np.bool_)
        means[self.classes], present[self.classes] = self.means, True
        return means, present


def local_prototypes(features: Tensor, labels: Tensor, classes: int) -> Prototypes:
    """Mean feature per class, for the classes that ``labels`` holds.

    Sums run in double precision: a mean over many examples then rounds only once.

    Args:
        features: penultimate features ``(b, f)``.
        labels: int64 ``(b,)`` in [0, C).
        classes: C, the number of classes.
    """
    counts = torch.bincount(labels, minlength=classes)
    sums = F.one_hot(labels, classes).double().T @ features.double()
    held = counts.nonzero().flatten()
    means = sums[held] / counts[held, None]
    return Prototypes(held.cpu().numpy(), counts[held].cpu().numpy(), means.float().cpu().numpy())


class PrototypeBank:
    """The server's global prototypes.

    Within a round the mean of class c is ``sum_i n_ic p_ic / sum_i n_ic`` over the clients that sent it; over rounds
    ``global_c = decay * global_c + (1 - decay) * round_c``. A class seen for the first time takes the round's mean,
    and a class that no client of the round holds keeps its own.

    Args:
        classes: C, the number of classes.
        feature_size: f, the width of the penultimate features.
        decay: share of the past in [0, 1); 0 keeps the last round alone.

    Attributes:
        means: global means, float32 ``(C, f)``, zero where unseen.
        counts: int64 ``(C,)``, examples behind the last round's mean of each class; 0 for a class never seen.
    """

    def __init__(self, classes: int, feature_size: int, decay: float) -> None:
        self.decay = decay
        self.means = np.zeros((classes, feature_size), dtype=np.float32)
        self.counts = np.zeros(classes, dtype=np.int64)

    @property
    def seen(self) -> np.ndarray:
        """Bool ``(C,)``: the classes that have a global prototype."""
        return self.counts > 0

    def update(self, local: Iterable[Prototypes]) -> None:
        """Take in the local prototypes of one round's clients."""
        sums = np.zeros(self.means.shape, dtype=np.float64)
        counts = np.zeros_like(self.counts)
        for prototypes in local:
            sums[prototypes.classes] += prototypes.counts[:, None] * prototypes.means.astype(np.float64)
            counts[prototypes.classes] += prototypes.counts
        present = counts > 0
        past_share = np.where(self.seen, self.decay, 0.0)[present, None]
        round_means = sums[present] / counts[present, None]
        self.means[present] = past_share * self.means[present] + (1 - past_share) * round_means
        self.counts[present] = counts[present]

    def export(self) -> Prototypes:
        """The global prototypes of the classes seen so far; p = 0 before the first round."""
        classes = np.flatnonzero(self.seen).astype(np.int64)
        return Prototypes(classes, self.counts[classes], self.means[classes])


def alignment_loss(
    features: Tensor, labels: Tensor, prototypes: Tensor, present: Tensor, distance: Literal["squared-l2", "cosine"]
) -> Tensor:
    """Prototype alignment: ``(1 / b) sum_x d(f(x), p_y)``, one for each client.

    ``squared-l2``: ``d(f, p) = (1 / f) |f - p|^2`` (FedProto's published code, which averages over feature
    dimensions). ``cosine``: ``d(f, p) = 1 - cos(f, p)``. A sample whose class has no prototype contributes 0 and
    still counts in b.

    Args:
        features: penultimate features ``(..., b, f)``; what comes before the batch, as ``(K,)`` for K clients or
            nothing, is the same in all arguments and in the result.
        labels: int64 ``(..., b)`` in [0, C).
        prototypes: global means ``(..., C, f)``.
        present: bool ``(..., C)``, the classes that have a prototype.
        distance: d.
    """
    targets = torch.take_along_dim(prototypes, labels[..., None], dim=-2)
    if distance == "cosine":
        distances = 1 - F.cosine_similarity(features, targets, dim=-1)
    else:
        distances = (features - targets).square().mean(dim=-1)
    return (distances * torch.take_along_dim(present, labels, dim=-1)).mean(dim=-1)
