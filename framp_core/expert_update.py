"""How experts learn: the difference of a cluster from the rest, as far as it is more than noise."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from framp_core.deltas import columns
from framp_core.errors import ModelError
from framp_core.generators import Mixture

SMOOTHING = 0.95
"""Share of the past in the running sums of squares, over rounds."""
BLOCK = 2**17
"""Coordinates that are compared at once, which bounds the memory whatever the size of a tensor."""


class ExpertUpdate:
    """Gradient of a mixture's experts, shrunk tensor by tensor by an analysis of variance over the clients.

    In a coordinate that cohort members hold, Delta_ki is the delta of client i of cluster k, ``mean_k`` the mean over
    the holders of the cluster and ``mean`` that over all holders, by which theta_0 moves. Expert k moves by

        ``s (mean_k - mean)``,   ``s = 1 - 1 / (1 + memory * max(F - 1, 0))``,

    so that with s = 1 the clients of a cluster follow their own mean and with s = 0 the mean of all; a cluster of which
    nobody holds the coordinate in a round follows the mean of all. s is one number for each tensor, from

        ``F = sum_j B_j / sum_j W_j b_j / w_j``,

    where in coordinate j ``B_j = sum_k n_k (mean_k - mean)^2`` has ``b_j`` degrees of freedom (clusters present less
    one) and ``W_j = sum_ki (Delta_ki - mean_k)^2`` has ``w_j`` (holders less clusters). Both sums are smoothed over
    rounds. Where clusters do not differ, F starts at about 1 and the experts move little; ``1 - 1/F`` is the shrinkage
    that an empirical-Bayes estimate of one round's cluster means would use (Efron and Morris 1973), and ``memory``
    accounts for differences that last: averaged over so many rounds, their noise is that much smaller. It is not a
    test: what noise has put into the experts is a real difference from then on, which clients that train from it
    report as one, so that s climbs in long runs without any cluster effect.

    Args:
        generator: whose experts get their gradient here.
        memory: rounds over which a difference lasts, > 0.
    """

    def __init__(self, generator: Mixture, memory: float) -> None:
        self.generator = generator
        self.memory = memory
        tensors = len(generator.scope)
        self.between = torch.zeros(tensors, dtype=torch.float64)
        self.within = torch.zeros(tensors, dtype=torch.float64)

    def set_gradient(
        self, descriptors: Tensor, deltas: Sequence[np.ndarray], masks: Sequence[np.ndarray]
    ) -> dict[str, float]:
        """Fill the gradient of the experts from one round.

        Args:
            descriptors: the generator's inputs, ``(c, d)``.
            deltas: Delta_i, float32 ``(n,)``, zero outside the mask.
            masks: m_i, bool ``(n,)``.

        Returns:
            s of each tensor, by ``expert_share.`` and its name.
        """
        experts = self.generator.experts
        gradient = torch.zeros_like(experts)
        shares = self.generator.shares(descriptors.to(experts.device)).detach()
        found = {}
        for number, slot in enumerate(self.generator.scope):
            start = slot.offset - self.generator.scope[0].offset
            difference = gradient[:, start : start + slot.size]
            between, within = _compare(shares, deltas, masks, slot.slice, difference)
            self.between[number] = SMOOTHING * self.between[number] + between
            self.within[number] = SMOOTHING * self.within[number] + within
            share = self._share(number)
            difference *= -share
            found[f"expert_share.{slot.name}"] = share
        experts.grad = gradient
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The running sums."""
        return {"between": self.between, "within": self.within}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ModelError: it belongs to another network.
        """
        for name, own in self.state_dict().items():
            if name not in state or state[name].shape != own.shape:
                raise ModelError(f"the saved state of the experts lacks {name!r} or is of another network")
            own.copy_(state[name])

    def _share(self, number: int) -> float:
        if self.within[number] == 0:
            return 0.0
        excess = max(float(self.between[number] / self.within[number]) - 1, 0.0)
        return 1 - 1 / (1 + self.memory * excess)


def _compare(
    shares: Tensor, deltas: Sequence[np.ndarray], masks: Sequence[np.ndarray], where: slice, difference: Tensor
) -> tuple[float, float]:
    """Fill in the differences ``(K, size)`` of one tensor; return its two sums of squares of F."""
    between, within = [], []
    for part, filled in zip(_blocks(where), torch.split(difference, BLOCK, dim=1), strict=True):
        delta, held = (torch.from_numpy(columns(vectors, part)).to(shares) for vectors in (deltas, masks))
        found, *squares = _between_and_within(shares, delta, held)
        filled.copy_(found)
        between.append(squares[0])
        within.append(squares[1])
    return float(torch.cat(between).sum()), float(torch.cat(within).sum())


def _blocks(where: slice) -> Iterator[slice]:
    for start in range(where.start, where.stop, BLOCK):
        yield slice(start, min(start + BLOCK, where.stop))


def _between_and_within(shares: Tensor, delta: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differences of the clusters from the mean of all, and the terms of the two sums of squares of F.

    Args:
        shares: one-hot cluster of each client, ``(c, K)``.
        delta: ``(c, size)``, zero where not held.
        held: 1 where held, ``(c, size)``.

    Returns:
        ``mean_k - mean``, ``(K, size)``, 0 where no client of the cluster holds the coordinate; B_j and W_j b_j / w_j
        of the coordinates where both have degrees of freedom.
    """
    counts = shares.T @ held
    means = shares.T @ delta / counts.clamp_min(1)
    overall = delta.sum(dim=0) / held.sum(dim=0).clamp_min(1)
    difference = torch.where(counts > 0, means - overall, 0.0)
    present = (counts > 0).sum(dim=0)
    between_freedom, within_freedom = present - 1, counts.sum(dim=0) - present
    known = (between_freedom > 0) & (within_freedom > 0)
    # Squares in double: those of large deltas overflow in single.
    between = (counts * difference.double().square()).sum(dim=0)[known]
    within = (held * (delta - shares @ means).double().square()).sum(dim=0)[known]
    expected = within * between_freedom[known] / within_freedom[known]
    return difference, between, expected
