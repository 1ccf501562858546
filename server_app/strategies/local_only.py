"""Local only: every client alone, the lower reference of the comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from framp_core.config_values import Scalar
from framp_core.packed_mask import PackedMask
from server_app.registry import ClientRecord
from server_app.strategies.base import ClientUpdate, SubmodelStrategy


@dataclass(frozen=True)
class LocalModel:
    """The submodel of a client that has trained.

    Attributes:
        values: weights at the kept positions, float32 ``(mask.sum(),)``.
        mask: kept positions of all n.
    """

    values: np.ndarray
    mask: PackedMask


class LocalOnlyStrategy(SubmodelStrategy):
    """Each client trains a submodel of its own; nothing is ever mixed.

    All start from the common initialisation, cut once to the client's capacity: ``theta_i = m_i * theta_init`` and
    then ``theta_i += Delta_i`` after each participation. A client that has not trained, an unseen one above all, is
    measured with the initialisation. The server holds what the devices of a real deployment would keep to
    themselves, so the bytes that the run reports are those of this harness, not of the method.
    """

    required: ClassVar[Mapping[str, Scalar]] = {
        "local.alignment-weight": 0.0,
        "local.nested-share": 0.0,
        # Nobody learns from anybody, so nobody needs protection, and deltas of unrelated models cannot be compared.
        "defence.norm-bound": 0.0,
        "defence.screening": "none",
    }

    def build(self, initial: Tensor, feature_size: int, client: ClientRecord) -> dict[str, int]:
        """Keep the common initialisation."""
        self.initial: np.ndarray = initial.numpy()
        self.models: dict[str, LocalModel] = {}
        return {}

    def generate(self, client: ClientRecord, *, evaluation: bool) -> np.ndarray:
        """The client's own model, zero where dropped; the initialisation before it has trained."""
        model = self.models.get(client.name)
        if model is None:
            return self.initial
        theta = np.zeros_like(self.initial)
        theta[model.mask.kept()] = model.values
        return theta

    def extract(self, theta: np.ndarray, client: ClientRecord, server_round: int) -> np.ndarray:
        """The mask of the first cut: ranking trained weights again could pick dropped ones."""
        model = self.models.get(client.name)
        return super().extract(self.initial, client, server_round) if model is None else model.mask.kept()

    def server_update(self, updates: Sequence[ClientUpdate], server_round: int) -> dict[str, float]:
        """Add each delta to its own client's model."""
        for update in updates:
            values = self.generate(update.client, evaluation=False)[update.mask] + update.delta
            self.models[update.client.name] = LocalModel(values, update.packed_mask)
        return {}

    def state(self) -> dict[str, Tensor]:
        """The initialisation, and values and packed mask of every client that has trained."""
        state = {"initial": torch.from_numpy(self.initial)}
        for name, model in sorted(self.models.items()):
            state[f"clients.{name}.values"] = torch.from_numpy(model.values)
            state[f"clients.{name}.mask"] = torch.from_numpy(model.mask.bits)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give every client its own model back."""
        self.initial = state["initial"].numpy()
        names = [key.removeprefix("clients.").removesuffix(".values") for key in state if key.endswith(".values")]
        self.models = {
            name: LocalModel(
                state[f"clients.{name}.values"].numpy(),
                PackedMask(state[f"clients.{name}.mask"].numpy(), self.layout.size),
            )
            for name in names
        }
