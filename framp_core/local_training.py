"""What a client computes: training of its submodel, clean-pass prototypes, accuracy."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import FrampConfig, LocalConfig
from framp_core.data.examples import ClientData, Examples
from framp_core.errors import ConfigError, ModelError
from framp_core.graph_batch import Inputs
from framp_core.layout import ParameterLayout
from framp_core.local_weights import FollowingWeights, KeptWeights, NestedWeights, ThresholdControlledWeights
from framp_core.masking import extract
from framp_core.models import FlatModel
from framp_core.prototypes import Prototypes, alignment_loss, local_prototypes
from framp_core.spans import span

INFERENCE_BATCH = 64
"""Examples per batch outside training where results depend on it, as under batch statistics."""
DISTILLATION_TEMPERATURE = 3.0


@dataclass(frozen=True)
class LocalResult:
    """Outcome of local training.

    Attributes:
        delta: trained minus received weights, float32 ``(n,)``, exactly zero outside the mask.
        loss: mean over the steps of the training loss, all terms included.
        examples: number of the client's training examples.
        steps: number of steps taken.
        weights: the trained weights, ``(n,)`` on the network's device; may be its own memory, so use them before it
            trains or evaluates something else.
    """

    delta: np.ndarray
    loss: float
    examples: int
    steps: int
    weights: Tensor


@dataclass(frozen=True)
class Accuracy:
    """Counts of one evaluation.

    Attributes:
        correct: examples whose largest (adjusted) logit is that of their class.
        total: examples evaluated; 0 for an empty set.
    """

    correct: int
    total: int


def resolve_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of ``local.device``; ``auto`` is CUDA where there is one, and then cuDNN is made repeatable.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("local.device='cuda', but PyTorch finds no CUDA device here; use 'auto' or 'cpu'")
    if name == "cpu" or not available:
        return torch.device("cpu")
    # cuDNN's fastest convolutions add gradients in no fixed order, and its benchmark picks an algorithm by the clock;
    # either would let two runs of one seed differ.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return torch.device("cuda")


def log_prior(counts: np.ndarray, absent: float) -> Tensor:
    """Log class prior of a client: ``log(n_c / sum_c n_c)`` for classes held, ``log(absent)`` for the others.

    The classes' frequencies are not renormalised for the absent ones: a constant added to all logits changes
    neither the cross-entropy nor the prediction.

    Args:
        counts: int ``(C,)``, training examples per class.
        absent: stand-in frequency of a class without examples, in (0, 1).

    Returns:
        float32 ``(C,)``, finite, on the CPU.
    """
    frequencies = np.where(counts > 0, counts / max(counts.sum(), 1), absent)
    return torch.from_numpy(np.log(frequencies).astype(np.float32))


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, mean over a batch and its classes, with T = 3.

    As in ScaleFL's released code the mean is over examples and classes, and the teacher gets a gradient as well.

    Args:
        student: logits ``(..., batch, C)``.
        teacher: logits ``(..., batch, C)``.

    Returns:
        ``(...,)``, one for each client.
    """
    softened = F.log_softmax(student / DISTILLATION_TEMPERATURE, dim=-1)
    target = F.log_softmax(teacher / DISTILLATION_TEMPERATURE, dim=-1)
    return DISTILLATION_TEMPERATURE**2 * (target.exp() * (target - softened)).mean(dim=(-2, -1))


class Objective:
    """Local loss ``CE(logits + tau * log_prior, y) + lambda * alignment(features, y)`` of one client.

    The logit-adjusted cross-entropy (Menon et al. 2021, "Long-tail learning via logit adjustment") has the client's own
    class prior; the second term is :func:`framp_core.prototypes.alignment_loss`.

    With ``masked_cross_entropy`` the logits of the classes that the client has no example of are 0 before the rest
    (HeteroFL, Diao et al. 2021): they still count in the softmax, and get no gradient.

    In a network of m exits the cross-entropy is the mean over exits j = 1..m with weights j / (m (m + 1) / 2) of
    ``CE_j + gamma * distillation_loss(z_j, z_m)``, the latter for j < m, where gamma is ``distillation_weight`` and z_j
    are the logits of exit j as they come (ScaleFL, Ilhan et al. 2023).

    Attributes:
        state: the client's tensors by name: ``offset`` ``(C,)``, ``absent`` ``(C,)`` with a masked cross-entropy, and
            ``means`` ``(C, f)`` and ``present`` ``(C,)`` where features are aligned.
    """

    def __init__(
        self, config: LocalConfig, data: ClientData, prototypes: Prototypes | None, device: torch.device
    ) -> None:
        self.config = config
        prior = log_prior(data.class_counts(), config.absent_class_prior)
        state = {"offset": config.prior_strength * prior}
        if config.masked_cross_entropy:
            state["absent"] = torch.from_numpy(data.class_counts() == 0)
        if prototypes is not None and config.alignment_weight > 0:
            state["means"], state["present"] = map(torch.from_numpy, prototypes.dense(data.classes))
        self.state = {name: tensor.to(device) for name, tensor in state.items()}

    def __call__(
        self, state: Mapping[str, Tensor], exits: Sequence[Tensor], features: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss of a batch, a scalar; or ``(K,)``, the losses of K clients of one configuration, whose states and
        batches are then stacked in all arguments.
        """
        losses = [self._of_exit(state, logits, exits[-1], labels) for logits in exits]
        first, *deeper = (depth * loss for depth, loss in enumerate(losses, start=1))
        loss = sum(deeper, start=first) / (len(exits) * (len(exits) + 1) / 2)
        if "means" in state:
            distance = self.config.alignment_distance
            alignment = alignment_loss(features, labels, state["means"], state["present"], distance)
            loss = loss + self.config.alignment_weight * alignment
        return loss

    def _of_exit(self, state: Mapping[str, Tensor], logits: Tensor, deepest: Tensor, labels: Tensor) -> Tensor:
        masked = logits.masked_fill(state["absent"][..., None, :], 0.0) if "absent" in state else logits
        adjusted = masked + state["offset"][..., None, :]
        loss = F.cross_entropy(adjusted.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels).mean(dim=-1)
        if logits is not deepest and self.config.distillation_weight > 0:
            loss = loss + self.config.distillation_weight * distillation_loss(logits, deepest)
        return loss


class LocalTask(NamedTuple):
    """What one client trains: the arguments of :func:`train_locally` besides the network."""

    values: np.ndarray
    mask: np.ndarray | None
    data: ClientData
    config: FrampConfig
    rng: np.random.Generator
    prototypes: Prototypes | None
    steps: int | None = None

    @property
    def number_of_steps(self) -> int:
        """``steps``, or those of the configuration."""
        return self.steps or self.config.local.steps


def train_locally(
    model: FlatModel,
    values: np.ndarray,
    mask: np.ndarray | None,
    data: ClientData,
    config: FrampConfig,
    rng: np.random.Generator,
    prototypes: Prototypes | None,
    steps: int | None = None,
) -> LocalResult:
    """Train a submodel on the kept weights by the loss of :class:`Objective`; the trained weights stay in ``model``.

    Dropped weights are zero, get no gradient and stay zero, also under momentum and weight decay.
    ``local.masked_cross_entropy`` is HeteroFL's loss, ``local.distillation_weight`` ScaleFL's distillation between the
    exits of a network that has several; ``local.nested_share`` trains nested smaller sizes too
    (:mod:`framp_core.local_weights`). Where ``local.mask`` is not fixed (FIARSE), a kept weight that falls below the
    round's threshold is left out of ``model`` and yet keeps its value in the delta.

    Args:
        model: the network to train; all of its parameters are overwritten.
        values: theta as received, float32 ``(n,)``.
        mask: kept positions, bool ``(n,)``; None trains all.
        data: the client's data.
        config: ``config.local`` and what the kind of data reads of it apply.
        rng: draws batches, augmentation, sampled neighbours and dropout.
        prototypes: global prototypes; None (as in round 1) leaves the alignment out.
        steps: number of steps; None takes ``config.local.steps``.

    Raises:
        ModelError: the loss or a weight became NaN or infinite.
    """
    task = LocalTask(values, mask, data, config, rng, prototypes, steps)
    (result,) = train_side_by_side(_OneNetwork(model), [task])
    if isinstance(result, ModelError):
        raise result
    return result


Batch = tuple[Inputs, Tensor]
"""Network inputs and labels."""
Losses = Callable[[Sequence[Batch]], Tensor]
"""From a batch of each of K clients to their losses ``(K,)``."""


class Networks(ABC):
    """K networks of one architecture that train side by side, a client each.

    Attributes:
        parameters: of all networks.
        layout: of one.
    """

    parameters: FlatModel
    layout: ParameterLayout

    @abstractmethod
    def losses(self, objectives: Sequence[Objective]) -> Losses:
        """Computes the loss of each client's batch under its objective; the gradient of their sum is that of each."""

    @abstractmethod
    def training(self, tasks: Sequence[LocalTask]) -> AbstractContextManager[None]:
        """Around the steps of a training."""


class _OneNetwork(Networks):
    def __init__(self, model: FlatModel) -> None:
        self.model = self.parameters = model
        self.layout = model.layout

    def losses(self, objectives: Sequence[Objective]) -> Losses:
        (objective,) = objectives

        def of(batches: Sequence[Batch]) -> Tensor:
            ((inputs, labels),) = batches
            return objective(objective.state, *self.model.all_exits(inputs), labels)[None]

        return of

    def training(self, tasks: Sequence[LocalTask]) -> AbstractContextManager[None]:
        (task,) = tasks
        return _training_mode(self.model.model, task.config.model.dropout, task.rng, self.model.flat.device)


@span("client.train")
def train_side_by_side(networks: Networks, tasks: Sequence[LocalTask]) -> list[LocalResult | ModelError]:
    """The loop of local training, for clients of one ``config.local`` and one number of steps.

    Returns:
        For each client its result, or the error of a training that diverged, which stops no other client.
    """
    parameters, local, device = networks.parameters, tasks[0].config.local, networks.parameters.flat.device
    start = torch.stack([_start(task) for task in tasks]).to(device)
    weights = _trained_weights(networks, start, tasks)
    losses_of = networks.losses([Objective(local, task.data, task.prototypes, device) for task in tasks])
    optimizer = _optimizer(weights.latent, local)
    history = []
    with networks.training(tasks):
        for batches in zip(*(_batches(task, device) for task in tasks), strict=True):
            weights.show()
            parameters.flat_gradient.zero_()
            losses = losses_of(batches)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            weights.pull_back()
            if local.gradient_clip > 0:
                _clip(parameters, local.gradient_clip)
            optimizer.step()
            history.append(losses.detach())
    weights.finish()
    trained, deltas = map(parameters.rows, (parameters.flat.detach(), weights.latent.detach() - weights.start))
    outcomes = zip(trained, deltas, torch.stack(history, dim=1), tasks, strict=True)
    return [_result(*each) for each in outcomes]


def _clip(parameters: FlatModel, limit: float) -> None:
    """Scale the gradient of each network to an L2 norm of at most ``limit``, as ``torch.nn.utils.clip_grad_norm_``."""
    for own in parameters.places(parameters.flat_gradient):
        factor = (limit / (nn.utils.get_total_norm(own) + 1e-6)).clamp(max=1.0)
        for part in own:
            part.mul_(factor)


def _start(task: LocalTask) -> Tensor:
    return torch.from_numpy(task.values if task.mask is None else task.values * task.mask)


def _kept(task: LocalTask) -> Tensor:
    return torch.from_numpy(np.ones(task.values.shape, dtype=bool) if task.mask is None else task.mask)


def _batches(task: LocalTask, device: torch.device) -> Iterator[Batch]:
    return task.data.train.training_batches(task.config, task.number_of_steps, task.rng, device)


def _trained_weights(networks: Networks, start: Tensor, tasks: Sequence[LocalTask]) -> KeptWeights:
    parameters, local = networks.parameters, tasks[0].config.local
    # In the type of the weights: PyTorch would convert a mask of bool at each product.
    kept = torch.stack([_kept(task) for task in tasks]).to(start)
    if local.mask == "following":
        return FollowingWeights(parameters, start, kept)
    if local.mask == "threshold-controlled":
        return ThresholdControlledWeights(parameters, start, kept)
    if local.nested_share == 0:
        return KeptWeights(parameters, start, kept)
    smaller = [_smaller_masks(task, networks.layout) for task in tasks]
    # Child streams: with or without nested steps, the batches are the same.
    rngs = [task.rng.spawn(1)[0] for task in tasks]
    return NestedWeights(parameters, start, kept, smaller, local.nested_share, rngs)


def _smaller_masks(task: LocalTask, layout: ParameterLayout) -> list[np.ndarray]:
    if task.mask is None:
        return []
    theta, config = task.values * task.mask, task.config
    sizes = [size for size in config.capacity.sizes if size < task.data.capacity]
    # Rounded shares of layers, or weights that int8 made zero, could else put a smaller mask outside the own one.
    return [extract(theta, layout, config.extraction, size) & task.mask for size in sizes]


def _optimizer(latent: nn.Parameter, local: LocalConfig) -> torch.optim.Optimizer:
    if local.optimizer == "adam":
        return torch.optim.Adam([latent], lr=local.learning_rate, weight_decay=local.weight_decay)
    return torch.optim.SGD([latent], lr=local.learning_rate, weight_decay=local.weight_decay, momentum=local.momentum)


@contextmanager
def _training_mode(
    network: nn.Module, dropout: float, rng: np.random.Generator, device: torch.device
) -> Iterator[None]:
    """Turn dropout on for a while; it draws from a child of ``rng``, and torch's own streams are left as they were."""
    network.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=dropout > 0):
            if dropout > 0:
                torch.manual_seed(int(rng.spawn(1)[0].integers(2**63)))
            yield
    finally:
        network.eval()


def _result(weights: Tensor, delta: Tensor, losses: Tensor, task: LocalTask) -> LocalResult | ModelError:
    """Look once, after the last step, for what is not finite: a look at each step would make a GPU wait."""
    local = task.config.local
    if bool(losses.isfinite().all()) and bool(delta.isfinite().all()):
        return LocalResult(delta.cpu().numpy(), float(losses.mean()), len(task.data.train), len(losses), weights)
    bad = (~losses.isfinite()).nonzero()
    step = int(bad[0]) + 1 if len(bad) else len(losses)
    return ModelError(
        f"training of {task.data.name} diverged: NaN or infinity at step {step} of {len(losses)} with "
        f"local.learning-rate={local.learning_rate:g}, local.momentum={local.momentum:g} and "
        f"local.alignment-weight={local.alignment_weight:g}; lower the learning rate first"
    )


def _ordered_batches(
    model: FlatModel, examples: Examples, batch_size: int = 0, rng: np.random.Generator | None = None
) -> Iterator[Batch]:
    """All examples; with batch statistics in equal batches whatever the data, and none of a single example."""
    dependent = model.model.batch_statistics
    size = batch_size or (INFERENCE_BATCH if dependent else 0)
    return examples.ordered_batches(size, model.flat.device, rng, lone_example=not dependent)


@torch.inference_mode()
def penultimate_features(model: FlatModel, examples: Examples) -> tuple[Tensor, Tensor]:
    """Clean pass over a non-empty set of examples.

    Returns:
        Features ``(len(examples), f)`` and labels ``(len(examples),)``, in the order of the batches, on the model's
        device.
    """
    batches = _ordered_batches(model, examples)
    features, labels = zip(*((model(inputs)[1], labels) for inputs, labels in batches), strict=True)
    return torch.cat(features), torch.cat(labels)


def client_prototypes(model: FlatModel, data: ClientData) -> Prototypes:
    """Local prototypes: class means of the features over the training examples, without augmentation.

    Call it after :func:`train_locally`, whose trained weights are in ``model``.
    """
    features, labels = penultimate_features(model, data.train)
    return local_prototypes(features, labels, data.classes)


def no_prototypes(model: FlatModel) -> Prototypes:
    """What a client sends in their place when nothing is aligned: p = 0, a few bytes."""
    nothing = np.zeros(0, dtype=np.int64)
    return Prototypes(nothing, nothing, np.zeros((0, model.model.feature_size), dtype=np.float32))


@torch.inference_mode()
def evaluate(
    model: FlatModel,
    examples: Examples,
    offsets: Tensor,
    batch_size: int = 0,
    rng: np.random.Generator | None = None,
) -> tuple[Accuracy, ...]:
    """Accuracy of the network as it stands, under several adjustments of its logits at the cost of one pass.

    Args:
        model: the network, its parameters loaded.
        examples: what to classify; may be empty.
        offsets: added to the logits, one row for each adjustment ``(s, C)``, such as strengths times
            :func:`log_prior`.
        batch_size: examples per batch, on which the accuracy depends with batch statistics; 0 leaves it open.
        rng: draws augmentation; None leaves the examples clean.

    Returns:
        One entry per row of ``offsets``.
    """
    offsets = offsets.to(model.flat.device)
    correct = torch.zeros(len(offsets), dtype=torch.int64, device=offsets.device)
    for inputs, labels in _ordered_batches(model, examples, batch_size, rng):
        predicted = (model(inputs)[0] + offsets[:, None]).argmax(dim=2)
        correct += (predicted == labels).sum(dim=1)
    return tuple(Accuracy(count, len(examples)) for count in correct.tolist())
