"""Descriptors: the compact summary v_i of a client's data that the generator takes as input.

Each is computed on the client and sent once. All clients use the same frozen weights, drawn from the root seed, so
that descriptors of different clients can be compared.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from framp_core.config import FrampConfig
from framp_core.data.examples import ClientData, Examples
from framp_core.graph_batch import GraphBatch, propagate
from framp_core.local_training import INFERENCE_BATCH, penultimate_features, resolve_device, train_locally
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.randomness import stream

_CPU = torch.device("cpu")


class Descriptor(ABC):
    """A map from a client's data to a vector v in R^d of unit Euclidean norm.

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
        """Summarise what the client may look at as float32 ``(d,)`` of unit norm."""

    def reference(self, known: np.ndarray) -> np.ndarray:
        """What the descriptors ``(m, d)`` of many clients have in common, ``(d,)``: their mean."""
        mean: np.ndarray = known.mean(axis=0)
        return mean

    def expected(self, descriptors: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """What ``descriptors`` ``(c, d)`` would be if their clients had nothing of their own: the reference."""
        expected: np.ndarray = np.broadcast_to(reference, descriptors.shape)
        return expected


class HistogramDescriptor(Descriptor):
    """Class counts of the training data, in the order of the classes, scaled to unit norm."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    @property
    def size(self) -> int:
        """C."""
        return self.classes

    def describe(self, data: ClientData) -> np.ndarray:
        """Summarise ``data.train`` as float32 ``(C,)`` of unit norm."""
        return _unit(data.class_counts()).astype(np.float32)


class ImageEncoder(nn.Sequential):
    """e(x) of an image: two random 3x3 convolutions (stride 2, ReLU) and a global average, ``(b, C, H, W) -> (b, w)``.

    It has no normalisation layer, which would hide differences of brightness and contrast between clients.

    Args:
        channels: C.
        width: w.
        seed: of the weights, the same for all clients.
    """

    def __init__(self, channels: int, width: int, seed: int) -> None:
        super().__init__(
            *(nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        vector_to_parameters(initial_parameters(self, seed), self.parameters())


class NodeEncoder(nn.Module):
    """e(x) of a node: ``relu(W p)``, W random and p its features after parameter-free propagation, ``(b, w)``.

    Args:
        features: of a node.
        width: w.
        hops: steps of :func:`framp_core.graph_batch.propagate`.
        seed: of W, the same for all clients.
    """

    def __init__(self, features: int, width: int, hops: int, seed: int) -> None:
        super().__init__()
        self.hops = hops
        self.projection = nn.Linear(features, width, bias=False)
        vector_to_parameters(initial_parameters(self, seed), self.parameters())

    def forward(self, batch: GraphBatch) -> Tensor:
        """Encode the nodes that are asked about."""
        encoded: Tensor = self.projection(propagate(batch, self.hops)[batch.seeds]).relu()
        return encoded


class MomentsDescriptor(Descriptor):
    """Class histogram, mean and standard deviation of a frozen random encoder's features.

    ``v = [u(counts); u(mean of e(x)); u(std of e(x))] / sqrt(3)`` with u(.) = scaling to unit norm, over all that the
    client may look at without labels (:attr:`framp_core.data.ClientData.known`).

    Args:
        encoder: e, frozen.
        classes: C.
        width: w, features of the encoder.
    """

    def __init__(self, encoder: nn.Module, classes: int, width: int) -> None:
        self.encoder = encoder
        self.classes = classes
        self.width = width

    @property
    def size(self) -> int:
        """C + 2 w."""
        return self.classes + 2 * self.width

    def describe(self, data: ClientData) -> np.ndarray:
        """Summarise the data as float32 ``(d,)`` of unit norm."""
        return _unit(np.concatenate([_unit(block) for block in self._blocks_of(data)])).astype(np.float32)

    def _blocks_of(self, data: ClientData) -> tuple[np.ndarray, ...]:
        features = self._encode(data.known)
        return data.class_counts(), features.mean(axis=0), features.std(axis=0)

    @torch.inference_mode()
    def _encode(self, examples: Examples) -> np.ndarray:
        """Features of all examples, float64 ``(m, w)``."""
        encoded = [self.encoder(inputs) for inputs, _ in examples.ordered_batches(INFERENCE_BATCH, _CPU)]
        features: np.ndarray = torch.cat(encoded).double().numpy()
        return features


class GraphMomentsDescriptor(MomentsDescriptor):
    """Moments of a client's subgraph: those of its nodes' propagated features, and its degrees.

    ``v = [u(counts); u(mean of e(x)); u(std of e(x)); u(degrees)] / 2``, where the in-degrees d are summed up by the
    mean and the standard deviation of ``log(1 + d)``, the largest of them, and the share of nodes that no edge ends at.
    """

    @property
    def size(self) -> int:
        """C + 2 w + 4."""
        return super().size + 4

    def _blocks_of(self, data: ClientData) -> tuple[np.ndarray, ...]:
        batches = data.known.ordered_batches(INFERENCE_BATCH, _CPU)
        degrees = np.concatenate([batch.in_degrees()[batch.seeds].numpy() for batch, _ in batches])  # type: ignore[union-attr]
        logs = np.log1p(degrees.astype(np.float64))
        return *super()._blocks_of(data), np.array([logs.mean(), logs.std(), logs.max(), (degrees == 0).mean()])


class ClassMomentsDescriptor(MomentsDescriptor):
    """Class shares, and the mean features of each class under a frozen random encoder.

    ``v = [sqrt(p_1) .. sqrt(p_C); sqrt(p_1) mu_1; ..; sqrt(p_C) mu_C]`` scaled to unit norm, where p_c is the share of
    class c among the client's training data and mu_c in R^w the mean of e(x) over them, 0 for a class it lacks. The
    root weighs a mean by its standard error. Unlike moments over all classes, class means tell clients apart that name
    the classes differently, and a shift of the images from a mere difference of class frequencies.
    """

    @property
    def size(self) -> int:
        """C (1 + w)."""
        return self.classes * (1 + self.width)

    def describe(self, data: ClientData) -> np.ndarray:
        """Summarise ``data.train`` as float32 ``(C (1 + w),)`` of unit norm."""
        features, labels = self._encode(data.train), data.train.selected_labels
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
    """Mean penultimate feature after a short local training, scaled to unit norm.

    The mean is over the training images, or over all nodes of a client's subgraph (FedSheafHN's descriptor, which takes
    the layer before its ReLU).

    All clients start from the same weights and draw batches from equal streams, so that equal data give equal
    descriptors. The full model is trained, whatever the client's capacity.

    Args:
        config: the model, ``descriptor.warmup_steps``, ``local`` and the root seed.
        input_shape: of an example.
        classes: C.
        seed: seed of the common initial weights.
    """

    def __init__(self, config: FrampConfig, input_shape: tuple[int, ...], classes: int, seed: int) -> None:
        self.config = config
        network = build_model(config.model, input_shape, classes)
        self.model = FlatModel(network, resolve_device(config.local.device))
        self.initial = initial_parameters(network, seed, config.model.initialisation).numpy()

    @property
    def size(self) -> int:
        """f, the width of the penultimate features."""
        return self.model.model.feature_size

    def describe(self, data: ClientData) -> np.ndarray:
        """Summarise ``data.known``, after training on ``data.train``, as float32 ``(f,)`` of unit norm."""
        rng = stream(self.config.seed, "descriptor-warmup")
        steps = self.config.descriptor.warmup_steps
        train_locally(self.model, self.initial, None, data, self.config, rng, None, steps)
        features, _ = penultimate_features(self.model, data.known)
        return _unit(features.double().mean(dim=0).cpu().numpy()).astype(np.float32)


def build_descriptor(config: FrampConfig, shape: tuple[int, ...], classes: int) -> Descriptor:
    """Build the descriptor of ``config.descriptor``; its frozen weights depend on ``config.seed`` alone.

    Args:
        config: the run's configuration.
        shape: of an example, as in :class:`framp_core.data.ClientData`.
        classes: C.

    Raises:
        ConfigError: warm-up asks for a device that is absent.
        ModelError: warm-up asks for a model that cannot be built.
    """
    seed = int(stream(config.seed, "descriptor-encoder").integers(2**63))
    name, width = config.descriptor.name, config.descriptor.encoder_width
    if name == "histogram":
        return HistogramDescriptor(classes)
    if name == "warmup":
        return WarmupDescriptor(config, shape, classes, seed)
    graph = len(shape) == 1
    encoder = NodeEncoder(shape[0], width, config.graph.hops, seed) if graph else ImageEncoder(shape[0], width, seed)
    moments = GraphMomentsDescriptor if graph else MomentsDescriptor
    return (ClassMomentsDescriptor if name == "class-moments" else moments)(encoder, classes, width)


def _unit(vector: np.ndarray) -> np.ndarray:
    """Scale to unit Euclidean norm; a zero vector (the spread of a single image) stays zero."""
    norm = np.linalg.norm(vector)
    return vector / norm if norm > 0 else vector
