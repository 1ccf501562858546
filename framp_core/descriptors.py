"""Descriptors: the compact summary v_i of a client's training data that the generator takes as input.

Each is computed on the client and sent once. All clients use the same frozen weights, drawn from the root seed, so
that descriptors of different clients can be compared.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from framp_core.config import FrampConfig
from framp_core.data.client_data import ClientData
from framp_core.local_training import ordered_batches, penultimate_features, resolve_device, train_locally
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.randomness import stream


class Descriptor(ABC):
    """A map from a client's training data to a vector v in R^d of unit Euclidean norm.

    This class is meant to be subclassed; a new descriptor defines :attr:`size` and :meth:`describe`.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """d, the number of floats."""

    @property
    def nbytes(self) -> int:
        """Bytes of the float32 vector, 4 d, without the message around it."""
        return self.size * np.dtype(np.float32).itemsize

    @abstractmethod
    def describe(self, data: ClientData) -> np.ndarray:
        """Summarise ``data.train`` as float32 ``(d,)`` of unit norm."""

    def reference(self, known: np.ndarray) -> np.ndarray:
        """What the descriptors ``(m, d)`` of many clients have in common, ``(d,)``: their mean."""
        mean: np.ndarray = known.mean(axis=0)
        return mean

    def expected(self, descriptors: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """What ``descriptors`` ``(c, d)`` would be if their clients had nothing of their own: the reference."""
        expected: np.ndarray = np.broadcast_to(reference, descriptors.shape)
        return expected


class HistogramDescriptor(Descriptor):
    """Class counts of the training images, in the order of the classes, scaled to unit norm."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    @property
    def size(self) -> int:
        """C."""
        return self.classes

    def describe(self, data: ClientData) -> np.ndarray:
        """Summarise ``data.train`` as float32 ``(C,)`` of unit norm."""
        return _unit(data.class_counts()).astype(np.float32)


class MomentsDescriptor(Descriptor):
    """Class histogram, mean and standard deviation of a frozen random encoder's features.

    ``v = [u(counts); u(mean of e(x)); u(std of e(x))] / sqrt(3)`` with u(.) = scaling to unit norm. e is two random
    3x3 convolutions (stride 2, ReLU) and a global average; it has no normalisation layer, which would hide
    differences of brightness and contrast between clients.

    Args:
        channels: channels of the images.
        classes: C.
        width: w, features of the encoder.
        seed: seed of the encoder's weights, the same for all clients.
    """

    def __init__(self, channels: int, classes: int, width: int, seed: int) -> None:
        self.classes = classes
        self.width = width
        self.encoder = nn.Sequential(
            *(nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        vector_to_parameters(initial_parameters(self.encoder, seed), self.encoder.parameters())

    @property
    def size(self) -> int:
        """C + 2 w."""
        return self.classes + 2 * self.width

    def describe(self, data: ClientData) -> np.ndarray:
        """Summarise ``data.train`` as float32 ``(C + 2 w,)`` of unit norm."""
        features = self._encode(data).double().numpy()
        blocks = (data.class_counts(), features.mean(axis=0), features.std(axis=0))
        return _unit(np.concatenate([_unit(block) for block in blocks])).astype(np.float32)

    @torch.inference_mode()
    def _encode(self, data: ClientData) -> Tensor:
        batches = ordered_batches(data.train, data.normaliser, torch.device("cpu"))
        return torch.cat([self.encoder(inputs) for inputs, _ in batches])


class ClassMomentsDescriptor(MomentsDescriptor):
    """Class shares, and the mean features of each class under a frozen random encoder.

    ``v = [sqrt(p_1) .. sqrt(p_C); sqrt(p_1) mu_1; ..; sqrt(p_C) mu_C]`` scaled to unit norm, where p_c is the share of
    class c among the client's images and mu_c in R^w the mean of e(x) over them, 0 for a class it lacks. The root
    weighs a mean by its standard error. Unlike moments over all images, class means tell clients apart that name the
    classes differently, and a shift of the images from a mere difference of class frequencies.
    """

    @property
    def size(self) -> int:
        """C (1 + w)."""
        return self.classes * (1 + self.width)

    def describe(self, data: ClientData) -> np.ndarray:
        """Summarise ``data.train`` as float32 ``(C (1 + w),)`` of unit norm."""
        features, labels = self._encode(data).double().numpy(), data.train.selected_labels
        roots = np.sqrt(data.class_counts() / len(labels))
        means = np.zeros((self.classes, self.width))
        for held in np.flatnonzero(roots):
            means[held] = features[labels == held].mean(axis=0)
        return _unit(np.concatenate([roots, (roots[:, None] * means).ravel()])).astype(np.float32)

    def reference(self, known: np.ndarray) -> np.ndarray:
        """Mean roots, and the class means over all clients, by least squares on their weighted means, ``(d,)``."""
        roots, weighted = self._blocks(known)
        squares = np.maximum((roots**2).sum(axis=0), np.finfo(np.float64).tiny)
        means = (roots[:, :, None] * weighted).sum(axis=0) / squares[:, None]
        return np.concatenate([roots.mean(axis=0), means.ravel()])

    def expected(self, descriptors: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """The mean roots, and each client's own roots times the class means of all, ``(c, d)``."""
        mean_roots, means = self._blocks(reference[None])
        roots = self._blocks(descriptors)[0]
        weighted = (roots[:, :, None] * means).reshape(len(roots), -1)
        return np.concatenate([np.broadcast_to(mean_roots, roots.shape), weighted], axis=1)

    def _blocks(self, descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Roots ``(c, C)`` and weighted class means ``(c, C, w)``."""
        roots, means = np.split(descriptors.astype(np.float64), [self.classes], axis=1)
        return roots, means.reshape(-1, self.classes, self.width)


class Standardiser:
    """From descriptors to the generator's inputs: what sets a client apart from the known ones, in units of spread.

    ``z = (v - e(v)) / (s sqrt(d))`` with e(v) of :meth:`Descriptor.expected` and s the root mean square of
    ``v - e(v)`` over the known clients, per float. A descriptor is mostly what all clients share, and a generator that
    takes it as it is can hardly tell two clients apart. Inputs of known clients have a root mean square norm of 1.

    Args:
        descriptor: whose vectors are standardised.
        known: descriptors of the clients that train, as known before the first round, ``(m, d)``.
    """

    def __init__(self, descriptor: Descriptor, known: np.ndarray) -> None:
        self.descriptor = descriptor
        self.reference = descriptor.reference(known)
        spread = np.sqrt(((known - descriptor.expected(known, self.reference)) ** 2).mean(axis=0))
        # A float that is equal in all clients tells nothing.
        self.scale = np.divide(known.shape[1] ** -0.5, spread, out=np.zeros_like(spread), where=spread > 1e-6)

    def __call__(self, descriptors: np.ndarray) -> np.ndarray:
        """Map ``(c, d)`` to float32 ``(c, d)``."""
        deviations = descriptors - self.descriptor.expected(descriptors, self.reference)
        inputs: np.ndarray = (deviations * self.scale).astype(np.float32)
        return inputs


class WarmupDescriptor(Descriptor):
    """Mean penultimate feature over the training images after a short local training, scaled to unit norm.

    All clients start from the same weights and draw batches from equal streams, so that equal data give equal
    descriptors. The full model is trained, whatever the client's capacity.

    Args:
        config: the model, ``descriptor.warmup_steps``, ``local`` and the root seed.
        input_shape: channels, height and width of an image.
        classes: C.
        seed: seed of the common initial weights.
    """

    def __init__(self, config: FrampConfig, input_shape: tuple[int, int, int], classes: int, seed: int) -> None:
        self.config = config
        network = build_model(config.model, input_shape, classes)
        self.model = FlatModel(network, resolve_device(config.local.device))
        self.initial = initial_parameters(network, seed, config.model.initialisation).numpy()

    @property
    def size(self) -> int:
        """f, the width of the penultimate features."""
        return self.model.model.feature_size

    def describe(self, data: ClientData) -> np.ndarray:
        """Summarise ``data.train`` as float32 ``(f,)`` of unit norm."""
        rng = stream(self.config.seed, "descriptor-warmup")
        steps = self.config.descriptor.warmup_steps
        train_locally(self.model, self.initial, None, data, self.config, rng, None, steps)
        features, _ = penultimate_features(self.model, data.train, data.normaliser)
        return _unit(features.double().mean(dim=0).cpu().numpy()).astype(np.float32)


def build_descriptor(config: FrampConfig, input_shape: tuple[int, int, int], classes: int) -> Descriptor:
    """Build the descriptor of ``config.descriptor``; its frozen weights depend on ``config.seed`` alone.

    Args:
        config: the run's configuration.
        input_shape: channels, height and width of an image.
        classes: C.

    Raises:
        ConfigError: warm-up asks for a device that is absent.
        ModelError: warm-up asks for a model that cannot be built.
    """
    seed = int(stream(config.seed, "descriptor-encoder").integers(2**63))
    if config.descriptor.name == "moments":
        return MomentsDescriptor(input_shape[0], classes, config.descriptor.encoder_width, seed)
    if config.descriptor.name == "class-moments":
        return ClassMomentsDescriptor(input_shape[0], classes, config.descriptor.encoder_width, seed)
    if config.descriptor.name == "histogram":
        return HistogramDescriptor(classes)
    return WarmupDescriptor(config, input_shape, classes, seed)


def _unit(vector: np.ndarray) -> np.ndarray:
    """Scale to unit Euclidean norm; a zero vector (the spread of a single image) stays zero."""
    norm = np.linalg.norm(vector)
    return vector / norm if norm > 0 else vector
