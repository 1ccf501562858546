"""What a client computes: training of its submodel, clean-pass prototypes, accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framp_core.config import FrampConfig, LocalConfig
from framp_core.data.client_data import ClientData, LabelledImages
from framp_core.data.transforms import Normaliser, augment
from framp_core.errors import ConfigError, ModelError
from framp_core.models import FlatModel
from framp_core.prototypes import Prototypes, alignment_loss, local_prototypes

INFERENCE_BATCH = 256


@dataclass(frozen=True)
class LocalResult:
    """Outcome of local training.

    Attributes:
        delta: trained minus received weights, float32 ``(n,)``, exactly zero outside the mask.
        loss: mean over the steps of the training loss, all terms included.
        examples: number of the client's training images.
        steps: number of SGD steps taken.
    """

    delta: np.ndarray
    loss: float
    examples: int
    steps: int


@dataclass(frozen=True)
class Accuracy:
    """Counts of one evaluation.

    Attributes:
        correct: images whose largest (adjusted) logit is that of their class.
        total: images evaluated; 0 for an empty set.
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
        counts: int ``(C,)``, training images per class.
        absent: stand-in frequency of a class without images, in (0, 1).

    Returns:
        float32 ``(C,)``, finite, on the CPU.
    """
    frequencies = np.where(counts > 0, counts / max(counts.sum(), 1), absent)
    return torch.from_numpy(np.log(frequencies).astype(np.float32))


def batch_positions(examples: int, batch_size: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Which images each step sees: reshuffled epochs laid end to end and cut into full batches.

    Returns:
        int64 ``(steps, min(batch_size, examples))`` in [0, examples). A batch may span two epochs.
    """
    size = min(batch_size, examples)
    epochs = -(-steps * size // examples)
    order = np.concatenate([rng.permutation(examples) for _ in range(epochs)])
    return order[: steps * size].reshape(steps, size)


class _Objective:
    """Local loss ``CE(logits + tau * log_prior, y) + lambda * alignment(features, y)``.

    With ``masked_cross_entropy`` the logits of the classes that the client has no image of are 0 before the rest
    (HeteroFL, Diao et al. 2021): they still count in the softmax, and get no gradient.
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

    def __call__(self, logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        if self.absent is not None:
            logits = logits.masked_fill(self.absent, 0.0)
        loss = F.cross_entropy(logits + self.offset, labels)
        if self.targets is not None:
            alignment = alignment_loss(features, labels, *self.targets, self.config.alignment_distance)
            loss = loss + self.config.alignment_weight * alignment
        return loss


class _KeptWeights:
    """The weights in training: the network runs what the optimizer moves, and dropped weights get no gradient.

    Attributes:
        latent: what the optimizer moves, ``(n,)``; its gradient is the network's flat gradient.
    """

    def __init__(self, model: FlatModel, start: Tensor, kept: Tensor) -> None:
        model.load(start)
        self.model, self.kept = model, kept
        self.latent = model.flat

    def pull_back(self) -> None:
        """Turn the gradient with respect to what the network runs into that with respect to ``latent``."""
        self.model.flat_gradient.mul_(self.kept)

    def show(self) -> None:
        """Bring the network up to date with ``latent``, which here it runs anyway."""


class _ThresholdedWeights(_KeptWeights):
    """FIARSE's threshold-controlled biased gradient descent (Wu et al., NeurIPS 2024, arXiv 2407.19389).

    The network runs ``w = x * M`` with ``M = 1[|x| >= theta]`` on the kept maskable weights and 1 on the
    always-kept ones. theta is the smallest |x| of a kept maskable weight as received and stays for the round; M
    follows x, so that a weight which falls below theta drops out. With the mask's derivative taken as
    ``dM/d|x| = 2 * theta / (|x| + theta)^2`` where M is 1, the gradient with respect to x is

        ``dF/dw * M * (1 + 2 * |x| * theta / (|x| + theta)^2)``,

    a factor in [1, 1.5]: 1.5 at the threshold, 1 far above it. Without momentum and weight decay, as published, a
    weight that dropped out keeps its value.
    """

    def __init__(self, model: FlatModel, start: Tensor, kept: Tensor) -> None:
        super().__init__(model, start, kept)
        self.ranked = torch.from_numpy(model.layout.maskable).to(start.device) & kept.bool()
        self.threshold = torch.where(self.ranked, start.abs(), torch.inf).min()
        self.latent = nn.Parameter(start.clone())
        self.latent.grad = model.flat_gradient

    def pull_back(self) -> None:
        super().pull_back()
        size = self.latent.detach().abs()
        # 0 / 0 := 0: a threshold of 0, a kept weight that is 0, leaves plain training.
        share = size / (size + self.threshold).clamp_min(torch.finfo(size.dtype).tiny)
        self.model.flat_gradient.mul_(torch.where(self.ranked, self._mask() * (1 + 2 * share * (1 - share)), 1.0))

    def show(self) -> None:
        self.model.load(self.latent.detach() * self._mask())

    def _mask(self) -> Tensor:
        """M, bool ``(n,)``; true where the weight is not ranked."""
        return ~self.ranked | (self.latent.detach().abs() >= self.threshold)


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
    """Train a submodel with SGD on the kept weights; the trained weights stay in ``model``.

    The loss is ``CE(f(x) + tau * log_prior, y) + lambda * mean d(features(x), p_y)``: the
    logit-adjusted cross-entropy (Menon et al. 2021, "Long-tail learning via logit adjustment") with the client's own
    class prior, and :func:`framp_core.prototypes.alignment_loss`. Dropped weights are zero, get no gradient and stay
    zero, also under momentum and weight decay. ``local.masked_cross_entropy`` is HeteroFL's loss,
    ``local.threshold_gradient`` FIARSE's gradient, under which a kept weight that falls below the round's threshold is
    left out of ``model`` and yet keeps its value in the delta.

    Args:
        model: the network to train; all of its parameters are overwritten.
        values: theta as received, float32 ``(n,)``.
        mask: kept positions, bool ``(n,)``; None trains all.
        data: the client's data.
        config: ``config.local`` and ``config.data.augment`` apply.
        rng: draws batches and augmentation.
        prototypes: global prototypes; None (as in round 1) leaves the alignment out.
        steps: number of SGD steps; None takes ``config.local.steps``.

    Raises:
        ModelError: the loss or a weight became NaN or infinite.
    """
    local, device = config.local, model.flat.device
    kept = torch.ones_like(model.flat) if mask is None else torch.tensor(mask, device=device)
    start = torch.tensor(values, device=device) * kept
    weights = (_ThresholdedWeights if local.threshold_gradient else _KeptWeights)(model, start, kept)
    objective = _Objective(local, data, prototypes, device)
    optimizer = torch.optim.SGD(
        [weights.latent], lr=local.learning_rate, momentum=local.momentum, weight_decay=local.weight_decay
    )
    losses = []
    for inputs, labels in _training_batches(data, config, rng, steps or local.steps, device):
        model.flat_gradient.zero_()
        loss = objective(*model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        weights.pull_back()
        optimizer.step()
        weights.show()
        losses.append(loss.detach())
    delta, history = weights.latent.detach() - start, torch.stack(losses)
    _require_finite(delta, history, data.name, local)
    return LocalResult(delta.cpu().numpy(), float(history.mean()), len(data.train), len(losses))


def _training_batches(
    data: ClientData, config: FrampConfig, rng: np.random.Generator, steps: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for positions in batch_positions(len(data.train), config.local.batch_size, steps, rng):
        images, labels = data.train.batch(positions)
        if config.data.augment:
            images = augment(images, rng)
        yield data.normaliser(images.to(device)), labels.to(device)


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


def clean_batches(
    images: LabelledImages, normaliser: Normaliser, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Network inputs and labels in order, without augmentation; nothing for an empty set."""
    for first in range(0, len(images), INFERENCE_BATCH):
        batch, labels = images.batch(np.arange(first, min(first + INFERENCE_BATCH, len(images))))
        yield normaliser(batch.to(device)), labels.to(device)


@torch.inference_mode()
def penultimate_features(model: FlatModel, images: LabelledImages, normaliser: Normaliser) -> tuple[Tensor, Tensor]:
    """Clean pass over a non-empty set of images.

    Returns:
        Features ``(len(images), f)`` and labels ``(len(images),)``, in the order of ``images``, on the model's device.
    """
    batches = clean_batches(images, normaliser, model.flat.device)
    features, labels = zip(*((model(inputs)[1], labels) for inputs, labels in batches), strict=True)
    return torch.cat(features), torch.cat(labels)


def client_prototypes(model: FlatModel, data: ClientData) -> Prototypes:
    """Local prototypes: class means of the features over the training images, without augmentation.

    Call it after :func:`train_locally`, whose trained weights are in ``model``.
    """
    features, labels = penultimate_features(model, data.train, data.normaliser)
    return local_prototypes(features, labels, data.classes)


def no_prototypes(model: FlatModel) -> Prototypes:
    """What a client sends in their place when nothing is aligned: p = 0, a few bytes."""
    nothing = np.zeros(0, dtype=np.int64)
    return Prototypes(nothing, nothing, np.zeros((0, model.model.feature_size), dtype=np.float32))


@torch.inference_mode()
def evaluate(model: FlatModel, images: LabelledImages, normaliser: Normaliser, offsets: Tensor) -> tuple[Accuracy, ...]:
    """Accuracy of the network as it stands, under several adjustments of its logits at the cost of one pass.

    Args:
        model: the network, its parameters loaded.
        images: what to classify; may be empty.
        normaliser: turns uint8 images into the network's input.
        offsets: added to the logits, one row for each adjustment ``(s, C)``, such as strengths times
            :func:`log_prior`.

    Returns:
        One entry per row of ``offsets``.
    """
    offsets = offsets.to(model.flat.device)
    correct = torch.zeros(len(offsets), dtype=torch.int64, device=offsets.device)
    for inputs, labels in clean_batches(images, normaliser, offsets.device):
        predicted = (model(inputs)[0] + offsets[:, None]).argmax(dim=2)
        correct += (predicted == labels).sum(dim=1)
    return tuple(Accuracy(count, len(images)) for count in correct.tolist())
