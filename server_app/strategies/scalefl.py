"""ScaleFL (Ilhan et al., CVPR 2023): submodels that are both thinner and shallower, with early exits."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from framp_core.config_values import Scalar
from server_app.registry import ClientRecord
from server_app.strategies.base import ClientUpdate
from server_app.strategies.heterofl import HeteroFLStrategy


class ScaleFLStrategy(HeteroFLStrategy):
    """A client of capacity gamma trains the leading channels of the first stages, and ends at an early exit.

    Extraction: of every layer up to exit e the first ``ceil(r * C)`` of C channels; e and r follow from gamma in
    :func:`framp_core.structured.slim_size`, where the paper has a table per network. Local loss: cross-entropy over all
    exits that the client holds, deeper ones weighing more, and once a quarter of the rounds are over distillation from
    its deepest exit, by which it also predicts (``local.distillation-weight``). Server: every element is the plain mean
    over the clients that hold it. All tensors that a client holds take part in its loss, so that those are also the
    clients whose tensor received a gradient, which is how the released code puts it.

    Its network has the early exits of ``model.exits``, smaller than the published ones
    (:class:`framp_core.models.FeaturesAndHead`). With one exit it is HeteroFL with a plain mean. The scaler is left out
    as described there: a norm after it cancels it, and on a network without norms this is another method. Momentum,
    weight decay and the steps of the learning rate (a tenth at rounds 100 and 200) are the configuration's, not
    theirs.
    """

    required: ClassVar[Mapping[str, Scalar]] = {
        key: value for key, value in HeteroFLStrategy.required.items() if key != "model.exits"
    }

    def covered(self, update: ClientUpdate) -> np.ndarray:
        """All that the client holds."""
        return update.mask

    def train_instructions(self, client: ClientRecord, server_round: int) -> dict[str, Scalar]:
        """No distillation until more than a quarter of the rounds are over: the deepest exit has little to teach yet.

        The released code counts rounds r from 0 and distils where ``r > rounds / 4``.
        """
        return {"local.distillation-weight": 0.0} if 4 * (server_round - 1) <= self.config.rounds else {}
