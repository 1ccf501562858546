"""FRAMP (arXiv 2604.11278): hypernetwork, global top-k masks, prototype alignment."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from framp_core.deltas import KeptDeltas
from framp_core.descriptors import Standardiser, build_descriptor
from framp_core.generators import Generator, build_generator
from framp_core.packed_mask import Masks
from framp_core.prototypes import PrototypeBank, Prototypes
from framp_core.randomness import stream
from framp_core.server_update import GeneratorUpdate
from server_app.registry import ClientRecord
from server_app.strategies.base import ClientUpdate, SubmodelStrategy


class FrampStrategy(SubmodelStrategy):
    """Full models come from a generator h(v_i; phi), which learns from the clients' deltas.

    The server descends on g = - sum_i w_i J_i^T (m_i * Delta_i), J_i the Jacobian of h at v_i, and keeps a moving
    average of class prototypes (DESIGN section 3).
    """

    def build(self, initial: Tensor, feature_size: int, client: ClientRecord) -> dict[str, int]:
        """Create generator, its optimizers, and an empty prototype bank."""
        generator = build_generator(
            self.config.generator, self.layout, len(client.descriptor), initial, self.config.seed
        )
        self._fit(generator, client)
        self.generator_update = GeneratorUpdate(generator, self.config.server)
        self.bank = PrototypeBank(client.classes, feature_size, self.config.server.prototype_decay)
        return {"generator_parameters": sum(parameter.numel() for parameter in generator.parameters())}

    def _fit(self, generator: Generator, client: ClientRecord) -> None:
        """Let the generator see the descriptors of the clients that train, as far as they are known by now."""
        trained = [known for _, known in sorted(self.registry.clients.items()) if known.role == "train"] or [client]
        descriptors = np.stack([known.descriptor for known in trained])
        # The server only takes descriptors apart, for which it needs no GPU, whatever the clients have.
        on_cpu = self.config.model_copy(update={"local": self.config.local.model_copy(update={"device": "cpu"})})
        self.standardiser = Standardiser(build_descriptor(on_cpu, client.shape, client.classes), descriptors)
        generator.fit(torch.from_numpy(self.standardiser(descriptors)), stream(self.config.seed, "generator-fit"))

    def generate(self, client: ClientRecord, *, evaluation: bool) -> np.ndarray:
        """h(v_i; phi), from the averaged generator for evaluation."""
        update = self.generator_update
        generator = update.evaluation_generator if evaluation else update.generator
        theta: np.ndarray = generator.generate(self.inputs([client]))[0].numpy()
        return theta

    def inputs(self, clients: Sequence[ClientRecord]) -> Tensor:
        """The generator's inputs: standardised descriptors, ``(c, d)``."""
        return torch.from_numpy(self.standardiser(np.stack([client.descriptor for client in clients])))

    def prototypes(self) -> Prototypes | None:
        """Global prototypes; none before the first round has ended."""
        known = self.bank.export()
        return known if len(known.classes) else None

    def server_update(self, updates: Sequence[ClientUpdate], server_round: int) -> dict[str, float]:
        """One step along the vector-Jacobian product, then the prototypes' moving average."""
        masks = [update.packed_mask for update in updates]
        metrics = self.generator_update.step(
            self.inputs([update.client for update in updates]),
            KeptDeltas([update.delta for update in updates], masks),
            Masks(masks),
            [update.examples for update in updates],
        )
        self.bank.update(self.defence.prototypes(update.prototypes for update in updates))
        return metrics

    def state(self) -> dict[str, Tensor]:
        """Generator, averaged generator, optimizers, standardiser, prototypes."""
        return {
            **self.generator_update.state_dict(),
            "standardiser.reference": torch.from_numpy(self.standardiser.reference),
            "standardiser.scale": torch.from_numpy(self.standardiser.scale),
            "prototypes.means": torch.from_numpy(self.bank.means),
            "prototypes.counts": torch.from_numpy(self.bank.counts),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put all of it back, the mixture's centres among the generator's tensors."""
        self.generator_update.load_state_dict(state)
        self.standardiser.reference = state["standardiser.reference"].numpy()
        self.standardiser.scale = state["standardiser.scale"].numpy()
        self.bank.means = state["prototypes.means"].numpy()
        self.bank.counts = state["prototypes.counts"].numpy()
