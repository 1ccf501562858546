"""The shared vector plus experts, of which each client gets the one that its descriptor is nearest to."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import k_means
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import GeneratorConfig
from framp_core.errors import ModelError
from framp_core.generators.base import Generator
from framp_core.layout import ParameterLayout

HEAD = "head."


class Mixture(Generator):
    """h(v) = theta_0 + sum_k a_k(v) B_k, with a(v) one-hot at the cluster centre c_k nearest to v.

    The experts B_k cover the head alone, or the whole network (``generator.expert_scope``).

    The centres are found once, by k-means on the descriptors of the first clients (:meth:`fit`), and the experts B_k
    start at zero. The generator is linear in its parameters, so its server step is averaged per coordinate like that
    of theta_0: an expert learns by how much its clusters' deltas differ from those of all, as far as that is more than
    noise (:class:`framp_core.expert_update.ExpertUpdate`). Clients that differ in kind (their labels mean other things,
    their images are turned) get models that differ as much as it takes, while all of them train theta_0. Clustered
    federated learning (IFCA, Ghosh et al., NeurIPS 2020) keeps a whole model per cluster instead, and lets every
    client try all of them.

    Attributes:
        scope: slots that the experts cover, the last ones of the layout.
        experts: B, ``(K, size of the scope)``.
        centres: c, ``(K, d)``; infinite where no cluster is.
    """

    def __init__(self, layout: ParameterLayout, descriptor_size: int, config: GeneratorConfig) -> None:
        super().__init__(layout, descriptor_size, config)
        scope = [slot for slot in layout.slots if config.expert_scope == "all" or slot.name.startswith(HEAD)]
        if not scope or sum(slot.size for slot in scope) != layout.size - scope[0].offset:
            raise ModelError(
                "generator.expert-scope='head' needs a network that ends with a layer called head; "
                "use generator.expert-scope='all'"
            )
        self.scope = tuple(scope)
        self.experts = nn.Parameter(torch.empty(config.experts, layout.size - scope[0].offset))
        self.register_buffer("centres", torch.empty(config.experts, descriptor_size))
        self.centres: Tensor

    def initialise_personal(self, rng: torch.Generator) -> None:
        """Experts zero; the first centre at the origin and the others nowhere, until :meth:`fit`."""
        self.experts.zero_()
        self.centres.fill_(torch.inf)
        self.centres[0].zero_()

    def fit(self, descriptors: Tensor, rng: np.random.Generator) -> None:
        """Place the centres by k-means; with fewer different descriptors than experts, some experts stay unused."""
        found = min(len(self.centres), len(torch.unique(descriptors, dim=0)))
        points: np.ndarray = descriptors.double().numpy()
        centres, *_ = k_means(points, found, n_init=20, random_state=int(rng.integers(2**31)))
        self.centres.fill_(torch.inf)
        self.centres[:found] = torch.from_numpy(centres)

    def shares(self, descriptors: Tensor) -> Tensor:
        """a(v), one-hot ``(c, K)``."""
        squares = (descriptors[:, None] - self.centres).square().sum(dim=2)
        return F.one_hot(squares.argmin(dim=1), len(self.centres)).to(self.experts.dtype)

    def forward(self, descriptors: Tensor) -> Tensor:
        """Map ``(c, d)`` to ``(c, n)``."""
        personal = self.shares(descriptors) @ self.experts
        return self.theta_0 + F.pad(personal, (self.scope[0].offset, 0))

    def vjp(
        self, descriptors: Tensor, cotangents: Tensor, parameters: Sequence[nn.Parameter] | None = None
    ) -> list[Tensor]:
        """The generator is linear in its parameters, so that its product needs no forward pass."""
        with torch.no_grad():
            asked = self.parameters() if parameters is None else parameters
            return [self._product(descriptors, cotangents, parameter) for parameter in asked]

    def _product(self, descriptors: Tensor, cotangents: Tensor, parameter: nn.Parameter) -> Tensor:
        if parameter is self.theta_0:
            return cotangents.sum(dim=0)
        return self.shares(descriptors).T @ cotangents[:, self.scope[0].offset :]

    def shared_parameters(self) -> list[nn.Parameter]:
        """The shared vector and the experts: both move like weights, by averaged deltas."""
        return [self.theta_0, self.experts]
