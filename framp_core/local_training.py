"""What a client computes: training of its submodel, clean-pass prototypes, accuracy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import FrampConfig, LocalConfig
from framp_core.data.examples import ClientData, Examples
from framp_core.errors import ConfigError, ModelError
from framp_core.local_weights import KeptWeights, NestedWeights, ThresholdedWeights
from framp_core.masking import extract
from framp_core.models import FlatModel
from framp_core.prototypes import Prototypes, alignment_loss, local_prototypes
from framp_core.spans import span

INFERENCE_BATCH = 64
"""Examples per batch where features are computed; test batches are those of ``evaluation.batch-size``."""
DISTILLATION_TEMPERATURE = 3.0


@dataclass(frozen=True)
class LocalResult:
    """Outcome of local training.

    Attributes:
        delta: trained minus received weights, float32 ``(n,)``, exactly zero outside the mask.
        loss: mean over the steps of the training loss, all terms included.
        examples: number of the client's training examples.
        steps: number of steps taken.
    """

    delta: np.ndarray
    loss: float
    examples: int
    steps: int


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
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, mean over all elements, with T = 3.

    As in ScaleFL's released code the mean is over examples and classes, and the teacher gets a gradient as well.

    Args:
        student: logits ``(batch, C)``.
        teacher: logits ``(batch, C)``.
    """
    softened = F.log_softmax(student / DISTILLATION_TEMPERATURE, dim=1)
    target = F.log_softmax(teacher / DISTILLATION_TEMPERATURE, dim=1)
    return DISTILLATION_TEMPERATURE**2 * F.kl_div(softened, target, reduction="none", log_target=True).mean()


class _Objective:
    """Local loss ``CE(logits + tau * log_prior, y) + lambda * alignment(features, y)``.

    With ``masked_cross_entropy`` the logits of the classes that the client has no example of are 0 before the rest
    (HeteroFL, Diao et al. 2021): they still count in the softmax, and get no gradient.

    In a network of m exits the cross-entropy is the mean over exits j = 1..m with weights j / (m (m + 1) / 2) of
    ``CE_j + gamma * distillation_loss(z_j, z_m)``, the latter for j < m, where gamma is ``distillation_weight`` and z_j
    are the logits of exit j as they come (ScaleFL, Ilhan et al. 2023).
    """

    def __init__(
        self, config: LocalConfig, data: ClientData, prototypes: Prototypes | None, device: torch.device
    ) -> None:
        self.config = config
        prior = log_prior(data.class_counts(), config.absent_class_prior)
        self.offset = (config.prior_strength * prior).to(device)
        self.absent = torch.from_numpy(data.class_counts() == 0).to(device) if config.masked_cross_entropy else None
        self.targets: tuple[Tensor, Tensor] | None = None
        if prototypes is not None and config.alignment_weight > 0:
            means, present = prototypes.dense(data.classes)
            self.targets = torch.from_numpy(means).to(device), torch.from_numpy(present).to(device)

    def __call__(self, exits: Sequence[Tensor], features: Tensor, labels: Tensor) -> Tensor:
        losses = [self._of_exit(logits, exits[-1], labels) for logits in exits]
        weighted = torch.stack([depth * loss for depth, loss in enumerate(losses, start=1)])
        loss = weighted.sum() / (len(exits) * (len(exits) + 1) / 2)
        if self.targets is not None:
            alignment = alignment_loss(features, labels, *self.targets, self.config.alignment_distance)
            loss = loss + self.config.alignment_weight * alignment
        return loss

    def _of_exit(self, logits: Tensor, deepest: Tensor, labels: Tensor) -> Tensor:
        masked = logits if self.absent is None else logits.masked_fill(self.absent, 0.0)
        loss = F.cross_entropy(masked + self.offset, labels)
        if logits is not deepest and self.config.distillation_weight > 0:
            loss = loss + self.config.distillation_weight * distillation_loss(logits, deepest)
        return loss


@span("client.train")
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
    """Train a submodel on the kept weights; the trained weights stay in ``model``.

    The loss is ``CE(f(x) + tau * log_prior, y) + lambda * mean d(features(x), p_y)``: the
    logit-adjusted cross-entropy (Menon et al. 2021, "Long-tail learning via logit adjustment") with the client's own
    class prior, and :func:`framp_core.prototypes.alignment_loss`. Dropped weights are zero, get no gradient and stay
    zero, also under momentum and weight decay. ``local.masked_cross_entropy`` is HeteroFL's loss,
    ``local.distillation_weight`` ScaleFL's distillation between the exits of a network that has several;
    ``local.nested_share`` trains nested smaller sizes too (:mod:`framp_core.local_weights`), and
    ``local.threshold_gradient`` is FIARSE's gradient, under which a kept weight that falls below the round's
    threshold is left out of ``model`` and yet keeps its value in the delta.

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
    local, device = config.local, model.flat.device
    start = torch.tensor(values if mask is None else values * mask, device=device)
    weights = _trained_weights(model, start, mask, data, config, rng)
    objective = _Objective(local, data, prototypes, device)
    optimizer = _optimizer(weights.latent, local)
    losses = []
    with _training_mode(model.model, config.model.dropout, rng, device):
        for inputs, labels in data.train.training_batches(config, steps or local.steps, rng, device):
            weights.show()
            model.flat_gradient.zero_()
            loss = objective(*model.all_exits(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            weights.pull_back()
            optimizer.step()
            losses.append(loss.detach())
    weights.finish()
    delta, history = weights.latent.detach() - start, torch.stack(losses)
    _require_finite(delta, history, data.name, local)
    return LocalResult(delta.cpu().numpy(), float(history.mean()), len(data.train), len(losses))


def _trained_weights(
    model: FlatModel,
    start: Tensor,
    mask: np.ndarray | None,
    data: ClientData,
    config: FrampConfig,
    rng: np.random.Generator,
) -> KeptWeights:
    local = config.local
    kept = torch.ones_like(start) if mask is None else torch.tensor(mask, device=start.device)
    if local.threshold_gradient:
        return ThresholdedWeights(model, start, kept)
    if mask is None or local.nested_share == 0:
        return KeptWeights(model, start, kept)
    theta, sizes = start.cpu().numpy(), [size for size in config.capacity.sizes if size < data.capacity]
    # Rounded shares of layers, or weights that int8 made zero, could else put a smaller mask outside the own one.
    smaller = [extract(theta, model.layout, config.extraction, size) & mask for size in sizes]
    # A child stream: with or without nested steps, the batches are the same.
    return NestedWeights(model, start, kept, smaller, local.nested_share, rng.spawn(1)[0])


def _optimizer(latent: nn.Parameter, local: LocalConfig) -> torch.optim.Optimizer:
    if local.optimizer == "adam":
        return torch.optim.Adam([latent], lr=local.learning_rate, weight_decay=local.weight_decay)
    return torch.optim.SGD([latent], lr=local.learning_rate, momentum=local.momentum, weight_decay=local.weight_decay)


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


def _require_finite(delta: Tensor, losses: Tensor, client: str, config: LocalConfig) -> None:
    """Look once, after the last step: a look at each step would make a GPU wait."""
    if bool(losses.isfinite().all()) and bool(delta.isfinite().all()):
        return
    bad = (~losses.isfinite()).nonzero()
    step = int(bad[0]) + 1 if len(bad) else len(losses)
    raise ModelError(
        f"training of {client} diverged: NaN or infinity at step {step} of {len(losses)} with "
        f"local.learning-rate={config.learning_rate:g}, local.momentum={config.momentum:g} and "
        f"local.alignment-weight={config.alignment_weight:g}; lower the learning rate first"
    )


@torch.inference_mode()
def penultimate_features(model: FlatModel, examples: Examples) -> tuple[Tensor, Tensor]:
    """Clean pass over a non-empty set of examples.

    Returns:
        Features ``(len(examples), f)`` and labels ``(len(examples),)``, in the order of the batches, on the model's
        device.
    """
    lone_example = not model.model.batch_statistics
    batches = examples.ordered_batches(INFERENCE_BATCH, model.flat.device, lone_example=lone_example)
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
    batch_size: int = INFERENCE_BATCH,
    rng: np.random.Generator | None = None,
) -> tuple[Accuracy, ...]:
    """Accuracy of the network as it stands, under several adjustments of its logits at the cost of one pass.

    Args:
        model: the network, its parameters loaded.
        examples: what to classify; may be empty.
        offsets: added to the logits, one row for each adjustment ``(s, C)``, such as strengths times
            :func:`log_prior`.
        batch_size: examples per batch; with batch statistics the accuracy depends on it.
        rng: draws augmentation; None leaves the examples clean.

    Returns:
        One entry per row of ``offsets``.
    """
    offsets = offsets.to(model.flat.device)
    correct = torch.zeros(len(offsets), dtype=torch.int64, device=offsets.device)
    lone_example = not model.model.batch_statistics
    for inputs, labels in examples.ordered_batches(batch_size, offsets.device, rng, lone_example=lone_example):
        predicted = (model(inputs)[0] + offsets[:, None]).argmax(dim=2)
        correct += (predicted == labels).sum(dim=1)
    return tuple(Accuracy(count, len(examples)) for count in correct.tolist())
