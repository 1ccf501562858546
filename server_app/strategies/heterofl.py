"""HeteroFL (Diao et al., ICLR 2021, arXiv 2010.01264): nested widths of one global model."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from framp_core.config_values import Scalar
from framp_core.deltas import KeptDeltas
from framp_core.packed_mask import Masks, PackedMask
from framp_core.structured import channel_mask, window, without_other_classes
from server_app.registry import ClientRecord
from server_app.strategies.base import ClientUpdate
from server_app.strategies.framp import FrampStrategy


class HeteroFLStrategy(FrampStrategy):
    """A client of capacity gamma trains the first ``ceil(sqrt(gamma) * C)`` channels of every layer of C.

    Extraction: nested slices of the hidden channels, input channels and classes whole; the layers that a shortcut
    ties share one slice. Server: ``theta += sum_i m_i * Delta_i / sum_i m_i`` per element, 0 / 0 := 0, where the
    m_i of a head's row leave out the clients without examples of its class. The masks say what is covered; a Delta of
    zero still counts.

    The masked cross-entropy is ``local.masked-cross-entropy``; with ``method=heterofl`` extraction, loss and average
    come from ``framp_core/methods.py``. :meth:`shift` is the hook for other windows, :meth:`covered` that for other
    averages.

    Where it differs from the released code:

    - The scaler, which divides the activations of a slim network by its width before each normalisation in training, is
      left out: GroupNorm(x / s) equals GroupNorm(x) up to its epsilon, and so do batch statistics. Without
      normalisation (``mlp``, ``model.normalisation`` none) it would rescale: there this is another method.
    - The code clips the gradient to norm 1 at every step: here ``local.gradient-clip``, off by default; the method
      ``heterofl-clipped`` sets it.
    - It tests the full model on every client's data with the logits of absent classes masked as in training, after
      estimating its norms' statistics anew; here a client's own submodel is tested, unmasked, and
      ``evaluation.local-prior-strength`` says how much of the class prior is added.
    - Momentum, weight decay, learning rate and its steps are the configuration's.
    """

    slim: ClassVar[bool] = True

    required: ClassVar[Mapping[str, Scalar]] = {
        "local.nested-share": 0.0,
        "generator.name": "shared",
        "server.weighting": "coverage",
        "local.alignment-weight": 0.0,
        "model.exits": 1,
    }

    def shift(self, server_round: int) -> int:
        """First channel that is kept, modulo the channels of each layer."""
        return 0

    def extract(self, theta: np.ndarray, client: ClientRecord, server_round: int) -> np.ndarray:
        """The mask of a window of whole channels."""
        return channel_mask(self.layout, window(self.layout, client.capacity, self.shift(server_round)))

    def covered(self, update: ClientUpdate) -> np.ndarray:
        """Positions at which an update counts: what the client holds, less the head's rows of classes it lacks."""
        return without_other_classes(self.layout, update.mask, update.prototypes.classes)

    def server_update(self, updates: Sequence[ClientUpdate], server_round: int) -> dict[str, float]:
        """Average every element over the clients that cover it."""
        masks = [PackedMask.of(self.covered(update)) for update in updates]
        deltas = [update.delta[mask.kept()[update.mask]] for update, mask in zip(updates, masks, strict=True)]
        return self.generator_update.step(
            self.inputs([update.client for update in updates]),
            KeptDeltas(deltas, masks),
            Masks(masks),
            [update.examples for update in updates],
        )
