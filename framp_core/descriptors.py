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
    if config.descriptor.name == "histogram":
        return HistogramDescriptor(classes)
    return WarmupDescriptor(config, input_shape, classes, seed)


def _unit(vector: np.ndarray) -> np.ndarray:
    """Scale to unit Euclidean norm; a zero vector (the spread of a single image) stays zero."""
    norm = np.linalg.norm(vector)
    return vector / norm if norm > 0 else vector
