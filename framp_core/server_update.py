"""One step of the generator from the clients' deltas."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from framp_core.config import ServerConfig
from framp_core.errors import ModelError, NonFiniteError
from framp_core.expert_update import ExpertUpdate
from framp_core.generators import Generator, Mixture

GROUP_FLOATS = 2**24
"""Generated floats held at once during a step; bounds the memory whatever the number of clients."""


class GeneratorUpdate:
    """Gradient descent of phi on ``sum_i w_i <h(v_i; phi), -Delta_i>`` (DESIGN section 3, step 7).

    The gradient is ``-sum_i w_i J_i^T Delta_i`` with Delta_i zero outside the client's mask m_i. Weights w_i sum to 1:
    equal, or each client's share of the examples. With ``coverage`` (weights equal) the gradient of theta_0 is
    divided per coordinate by ``sum_i w_i m_ij``, that is, averaged over the clients that hold the coordinate, and is
    0 where none does (HeteroFL and FIARSE count so; the masks are carried explicitly, never read off zeros). FIARSE's
    code does read them off zeros, which leaves out the clients that hold a coordinate and did not move it; ``non-zero``
    is the code's form.

    The experts of a mixture then learn by :class:`framp_core.expert_update.ExpertUpdate` instead of the plain product.

    theta_0 (with the experts) has an optimizer of its own, to which ``shared_momentum`` applies if it is SGD. With
    ``averaging_decay`` > 0 an exponential moving average of the generator after each step is kept for evaluation; it
    starts from the generator after the first step.

    Args:
        generator: updated in place.
        config: optimizers, weighting and averaging.
    """

    def __init__(self, generator: Generator, config: ServerConfig) -> None:
        self.generator = generator
        self.config = config
        self._optimizers = _optimizers(generator, config)
        self._experts = ExpertUpdate(generator, config.expert_memory) if isinstance(generator, Mixture) else None
        self._averaged: AveragedModel | None = None
        if config.averaging_decay > 0:
            # torch.optim.swa_utils copies the generator: 4 more bytes per parameter.
            self._averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(config.averaging_decay))  # type: ignore[no-untyped-call]

    @property
    def evaluation_generator(self) -> Generator:
        """The averaged generator, or the generator itself without averaging."""
        if self._averaged is None:
            return self.generator
        averaged = self._averaged.module
        assert isinstance(averaged, Generator)
        return averaged

    def step(
        self,
        descriptors: Tensor,
        deltas: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        examples: Sequence[int],
    ) -> dict[str, float]:
        """Move the generator by one round's deltas, summed in the given order.

        Args:
            descriptors: v_i, ``(c, d)``, one row per client.
            deltas: Delta_i, trained minus received, float32 ``(n,)``, zero outside the mask; with
                :class:`framp_core.deltas.KeptDeltas` only ``GROUP_FLOATS`` of them are dense at a time.
            masks: m_i, bool ``(n,)``, true where the client holds the parameter.
            examples: training examples per client, for the weighting ``examples``.

        Returns:
            ``shared_gradient_norm`` and ``personal_gradient_norm`` (L2; 0 without a personal part), and what the
            experts report.

        Raises:
            ModelError: no client, or arguments of different lengths.
            NonFiniteError: the gradient is not finite; the generator is left as it was.
        """
        if not len(descriptors) == len(deltas) == len(masks) == len(examples) > 0:
            raise ModelError(
                f"a step needs one descriptor, delta, mask and example count per client and at least one client; "
                f"given are {len(descriptors)}, {len(deltas)}, {len(masks)} and {len(examples)}"
            )
        weights = self._weights(examples)
        self._set_gradients(descriptors, deltas, weights)
        if self.config.weighting == "coverage":
            self._average_over_holders(masks, weights)
        elif self.config.weighting == "non-zero":
            self._average_over_holders((delta != 0 for delta in deltas), weights)
        self._require_finite()
        found = {}
        if self._experts is not None and self.config.weighting == "coverage":
            found = self._experts.set_gradient(descriptors, deltas, masks)
        norms = self._norms()
        for optimizer in self._optimizers.values():
            optimizer.step()
        self._clear_gradients()
        if self._averaged is not None:
            self._averaged.update_parameters(self.generator)
        return norms | found

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a later process needs to go on bit for bit, as flat names and tensors.

        The tensors are the live ones: write them or clone them before the next step.
        """
        state = {f"generator.{name}": value for name, value in self.generator.state_dict().items()}
        if self._averaged is not None:
            state |= {f"averaged.{name}": value for name, value in self._averaged.state_dict().items()}
        if self._experts is not None:
            state |= {f"experts.{name}": value for name, value in self._experts.state_dict().items()}
        for optimizer_name, optimizer in self._optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    state[f"{optimizer_name}.{index}.{slot}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave; the tensors are copied.

        Raises:
            ModelError: the state belongs to another generator, optimizer or averaging.
        """
        try:
            self.generator.load_state_dict(_section(state, "generator"))
            averaged = _section(state, "averaged")
            if self._averaged is not None:
                self._averaged.load_state_dict(averaged)
            elif averaged:
                raise ValueError("it holds an averaged generator and server.averaging-decay is 0")
            if self._experts is not None:
                self._experts.load_state_dict(_section(state, "experts"))
            for name, optimizer in self._optimizers.items():
                _load_optimizer(optimizer, _section(state, name))
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"the saved server state does not fit this configuration: {error}; resume with the configuration "
                f"that wrote it"
            ) from error

    def _weights(self, examples: Sequence[int]) -> list[float]:
        if self.config.weighting != "examples":
            return [1 / len(examples)] * len(examples)
        if min(examples) < 1:
            raise ModelError(f"server.weighting='examples' needs at least one example per client; given {examples}")
        return [count / sum(examples) for count in examples]

    def _set_gradients(self, descriptors: Tensor, deltas: Sequence[np.ndarray], weights: Sequence[float]) -> None:
        parameters = self._learning_by_product()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for first, last in _groups(len(deltas), self.generator.theta_0.numel()):
            self._add_product(descriptors[first:last], deltas[first:last], weights[first:last], parameters)

    def _add_product(
        self,
        descriptors: Tensor,
        deltas: Sequence[np.ndarray],
        weights: Sequence[float],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        """Add one group's part of the gradients; what it takes is free again before the next group begins."""
        theta_0 = self.generator.theta_0
        cotangents = torch.empty((len(deltas), theta_0.numel()), device=theta_0.device)
        for index, row in enumerate(cotangents):
            row.copy_(torch.from_numpy(deltas[index]))
        cotangents *= -torch.tensor(weights, device=theta_0.device)[:, None]
        gradients = self.generator.vjp(descriptors.to(theta_0.device), cotangents, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad += gradient

    def _learning_by_product(self) -> list[nn.Parameter]:
        """Parameters whose gradient is the plain product; that of the experts would only be replaced."""
        replaced = self._experts.generator.experts if self._experts is not None else None
        if self.config.weighting != "coverage":
            replaced = None
        return [parameter for parameter in self.generator.parameters() if parameter is not replaced]

    def _average_over_holders(self, masks: Iterable[np.ndarray], weights: Sequence[float]) -> None:
        gradient = self.generator.theta_0.grad
        assert gradient is not None
        coverage = torch.zeros_like(gradient)
        for mask, weight in zip(masks, weights, strict=True):
            coverage.add_(torch.from_numpy(mask).to(coverage.device), alpha=weight)
        gradient.div_(coverage).masked_fill_(coverage == 0, 0.0)

    def _norms(self) -> dict[str, float]:
        return {
            "shared_gradient_norm": _gradient_norm(self.generator.shared_parameters()),
            "personal_gradient_norm": _gradient_norm(self.generator.personal_parameters()),
        }

    def _require_finite(self) -> None:
        norms = self._norms()
        if not np.isfinite(list(norms.values())).all():
            self._clear_gradients()
            raise NonFiniteError(
                f"the generator's gradient is not finite ({norms}); refuse deltas that hold NaN or infinity before "
                f"the step, and lower local.learning-rate if there are none"
            )

    def _clear_gradients(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()


def _optimizers(generator: Generator, config: ServerConfig) -> dict[str, torch.optim.Optimizer]:
    shared, personal = generator.shared_parameters(), generator.personal_parameters()
    optimizers = {
        "shared_optimizer": _optimizer(
            config.shared_optimizer, shared, config.shared_learning_rate, config.shared_momentum
        )
    }
    if personal:
        optimizers["personal_optimizer"] = _optimizer(
            config.personal_optimizer, personal, config.personal_learning_rate, momentum=0.0
        )
    return optimizers


def _optimizer(
    name: str, parameters: list[nn.Parameter], learning_rate: float, momentum: float
) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum)


def _groups(clients: int, size: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive groups of clients whose models fit ``GROUP_FLOATS`` together."""
    length = max(1, GROUP_FLOATS // size)
    return pairwise([*range(0, clients, length), clients])


def _gradient_norm(parameters: list[nn.Parameter]) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def _section(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put flat tensors ``<index>.<slot>`` back; hyper-parameters stay those of ``optimizer``."""
    expected = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else {"momentum_buffer"}
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        index, slot = key.split(".")
        if slot not in expected:
            raise ValueError(f"{type(optimizer).__name__} has no state {slot!r}")
        slots.setdefault(int(index), {})[slot] = value.clone()
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
