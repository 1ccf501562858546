"""What the optimizer of local training moves, and what the network runs meanwhile.

What is given for K networks that train side by side is ``(K, n)``; what is kept is in the order in which these lie
(:meth:`framp_core.models.FlatModel.arranged`).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from framp_core.models import FlatModel

BLOCK = 65_536
"""Floats of a part of a vector: with its like of several vectors it fits into the cache of a core."""


class KeptWeights:
    """The kept weights are trained as they are; dropped weights stay zero and get no gradient.

    Attributes:
        start: weights as received, zero where dropped.
        latent: what the optimizer moves; its gradient is the networks' flat gradient.
    """

    def __init__(self, model: FlatModel, start: Tensor, kept: Tensor) -> None:
        self.start, self.kept = model.arranged(start), model.arranged(kept)
        model.load(self.start)
        self.model = model
        self.latent = model.flat

    def show(self) -> None:
        """Bring the network up to date with ``latent`` before a step; here it runs ``latent`` anyway."""

    def pull_back(self) -> None:
        """Turn the gradient with respect to what the network runs into that with respect to ``latent``."""
        self.model.flat_gradient.mul_(self.kept)

    def finish(self) -> None:
        """Leave the trained submodel in the network, after the last step."""
        self.show()


class _LatentWeights(KeptWeights):
    """Base of those whose network runs something else than the optimizer moves."""

    def __init__(self, model: FlatModel, start: Tensor, kept: Tensor) -> None:
        super().__init__(model, start, kept)
        self.latent = nn.Parameter(self.start.clone())
        self.latent.grad = model.flat_gradient


class FollowingWeights(_LatentWeights):
    """The mask follows the weights, as FIARSE's released code trains (Wu et al., NeurIPS 2024, arXiv 2407.19389).

    The network runs ``w = x * M`` with ``M = 1[|x| >= theta]`` on the kept maskable weights and 1 on the
    always-kept ones. theta is the smallest |x| of a kept maskable weight as received and stays for the round; M
    is taken anew at every step, so that a weight which falls below theta drops out. The gradient with respect to x is
    ``dF/dw * M``: the released code defines a derivative of M, too, but its M is a tensor of bool, which autograd does
    not differentiate. Without momentum and weight decay, as published, a weight that dropped out keeps its value.
    """

    def __init__(self, model: FlatModel, start: Tensor, kept: Tensor) -> None:
        super().__init__(model, start, kept)
        held = self.kept.bool()
        ranked = torch.from_numpy(model.layout.maskable).to(start.device) & held
        sizes = model.rows(torch.where(ranked, self.start.abs(), torch.inf))
        theta = model.arranged(sizes.amin(dim=1, keepdim=True).expand_as(sizes))
        # With 0 for what is always kept and infinity for what is dropped, M is |x| >= threshold everywhere.
        self.threshold = torch.where(ranked, theta, torch.where(held, 0.0, torch.inf))

    def show(self) -> None:
        """Run what is above the threshold."""
        for latent, threshold, shown in _in_blocks(self.latent.detach(), self.threshold, self.model.flat.detach()):
            torch.mul(latent, latent.abs() >= threshold, out=shown)

    def pull_back(self) -> None:
        """Multiply by the derivative of w with respect to x."""
        for latent, threshold, gradient in _in_blocks(self.latent.detach(), self.threshold, self.model.flat_gradient):
            gradient.mul_(self._derivative(latent.abs(), threshold))

    def _derivative(self, size: Tensor, threshold: Tensor) -> Tensor:
        """Of w with respect to x, given |x|: M."""
        return size >= threshold


class ThresholdControlledWeights(FollowingWeights):
    """FIARSE's threshold-controlled biased gradient descent, as in its paper.

    As :class:`FollowingWeights`, and M has the derivative ``dM/d|x| = 2 * theta / (|x| + theta)^2`` where it is 1, so
    that the gradient with respect to x is

        ``dF/dw * M * (1 + 2 * |x| * theta / (|x| + theta)^2)``,

    a factor in [1, 1.5]: 1.5 at the threshold, 1 far above it.
    """

    def _derivative(self, size: Tensor, threshold: Tensor) -> Tensor:
        """Of w with respect to x, given |x|: M + |x| * dM/d|x|."""
        # 0 / 0 := 0: a threshold of 0, a kept weight that is 0, leaves plain training.
        share = (size / (size + threshold)).nan_to_num_(0.0)
        return super()._derivative(size, threshold) * (1 + 2 * share * (1 - share))


class NestedWeights(_LatentWeights):
    """Some steps train a smaller submodel inside the client's own, so that small sizes learn from large clients.

    Before each step, with probability ``share``, one of the smaller masks is drawn uniformly; else the client's own.
    The step runs and moves the weights of that mask alone. The masks of smaller sizes are those that the server would
    cut from the same weights: the largest of the received ones, fixed for the round. Slimmable networks (Yu et al.,
    ICLR 2019) share weights between widths in this way; here the shared sets are top-k masks.

    Args:
        model: K networks.
        start: weights as received, zero where dropped, ``(K, n)``.
        kept: each client's own mask, ``(K, n)``.
        smaller: of each client, masks of the smaller sizes, bool ``(n,)`` each; none leaves plain training.
        share: probability of a smaller mask, in [0, 1].
        rngs: of each client, draws its masks.
    """

    def __init__(
        self,
        model: FlatModel,
        start: Tensor,
        kept: Tensor,
        smaller: Sequence[Sequence[np.ndarray]],
        share: float,
        rngs: Sequence[np.random.Generator],
    ) -> None:
        super().__init__(model, start, kept)
        self.share, self.rngs = share, rngs
        self.drawn = [0] * len(rngs)
        self.current = self.kept.clone()
        self.places = model.places(self.current)
        masks = [[own, *_on(start.device, others)] for own, others in zip(kept, smaller, strict=True)]
        self.choices = [_in_parts(own, places) for own, places in zip(masks, self.places, strict=True)]

    def show(self) -> None:
        """Draw each client's mask and run what it keeps."""
        before, self.drawn = self.drawn, [self._draw(*each) for each in zip(self.choices, self.rngs, strict=True)]
        for old, new, choices, places in zip(before, self.drawn, self.choices, self.places, strict=True):
            if new != old:
                for place, part in zip(places, choices[new], strict=True):
                    place.copy_(part)
        self.model.load_product(self.latent, self.current)

    def pull_back(self) -> None:
        """Keep the gradient of the drawn masks."""
        self.model.flat_gradient.mul_(self.current)

    def finish(self) -> None:
        """Leave the clients' whole submodels in the networks."""
        self.model.load(self.latent.detach())

    def _draw(self, choices: Sequence[Sequence[Tensor]], rng: np.random.Generator) -> int:
        """0 is the client's own mask."""
        return 1 + int(rng.integers(len(choices) - 1)) if len(choices) > 1 and rng.random() < self.share else 0


def _in_blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of vectors of one length, part after part: on a CPU parts that stay in its cache over several operations,
    on a GPU, where every operation has to be started, all at once.
    """
    size = BLOCK if vectors[0].device.type == "cpu" else len(vectors[0])
    return zip(*(torch.split(vector, size) for vector in vectors), strict=True)


def _on(device: torch.device, masks: Sequence[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(mask).to(device) for mask in masks]


def _in_parts(masks: Sequence[Tensor], places: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    sizes = [len(place) for place in places]
    return [torch.split(mask, sizes) for mask in masks]
