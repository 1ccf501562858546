"""A personal model as a file: what ``framp personalise`` writes, and how a device reads it; no Flower is needed.

One safetensors file holds the dense weights, zero where the mask drops them, each tensor under its name in the network;
``mask``, the code of :func:`framp_core.codec.encode_mask` over the maskable weights; and ``log_prior``, the log class
prior of the client's training data. Its metadata hold one entry ``framp``, JSON: architecture, classes, shape of an
example, normalisation, capacity, bytes of the message that would carry the submodel, and where it comes from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from framp_core import files
from framp_core.codec import decode_mask, encode_mask
from framp_core.config import ModelConfig
from framp_core.config_values import parse_capacity
from framp_core.data.facts import DataFacts
from framp_core.errors import FrampError, ModelError, RunFolderError, WriteError
from framp_core.graph_batch import GraphBatch
from framp_core.models import FlatModel, build_model

VERSION = 1
_ENTRY, _MASK, _PRIOR = "framp", "mask", "log_prior"


@dataclass(frozen=True)
class PersonalModel:
    """A client's own model.

    Attributes:
        network: with the submodel's weights loaded.
        mask: kept positions, bool ``(n,)``.
        log_prior: of the client's training data, float32 ``(C,)``.
        prior_strength: that it was evaluated with.
        facts: shape, class names and normalisation.
        capacity: gamma.
        message: bytes of the submodel on the wire, by part.
        origin: where it comes from, such as method, round and client.
    """

    network: FlatModel
    mask: np.ndarray
    log_prior: Tensor
    prior_strength: float
    facts: DataFacts
    capacity: Fraction
    message: Mapping[str, int]
    origin: Mapping[str, Any]

    @torch.inference_mode()
    def logits(self, inputs: Tensor | GraphBatch, prior_strength: float | None = None) -> Tensor:
        """Logits ``(b, C)``, the class prior added.

        Args:
            inputs: uint8 images ``(b, channels, height, width)``, or a graph whose seeds are asked about.
            prior_strength: of the class prior; None takes the one of the run, 0 leaves it out.

        Raises:
            ModelError: images of another shape or type.
        """
        device = self.network.flat.device
        if isinstance(inputs, Tensor):
            if tuple(inputs.shape[1:]) != self.facts.shape or inputs.dtype != torch.uint8:
                raise ModelError(
                    f"got images of type {inputs.dtype} and shape {tuple(inputs.shape)}, expected torch.uint8 of "
                    f"(batch, {', '.join(map(str, self.facts.shape))})"
                )
            if self.facts.normaliser is None:
                raise ModelError("this model reads graphs; pass a framp_core.graph_batch.GraphBatch")
            inputs = self.facts.normaliser(inputs.to(device))
        strength = self.prior_strength if prior_strength is None else prior_strength
        logits, _ = self.network(inputs.to(device))
        return logits + strength * self.log_prior.to(device)

    def classify(self, inputs: Tensor | GraphBatch, prior_strength: float | None = None) -> list[str]:
        """Name of the most likely class of each example; see :meth:`logits`."""
        best = self.logits(inputs, prior_strength).argmax(dim=1)
        return [self.facts.class_names[index] for index in best.tolist()]


def save(model: PersonalModel, config: ModelConfig, path: Path) -> None:
    """Write a personal model, whole or not at all.

    Args:
        model: what to write.
        config: the architecture of its network.
        path: a file that does not exist; its folder does.

    Raises:
        RunFolderError: the file exists, or its folder does not.
        WriteError: it cannot be written.
    """
    require_new(path)
    layout = model.network.layout
    flat = torch.where(torch.from_numpy(model.mask), model.network.flat.detach().cpu(), 0.0)
    mask = encode_mask(model.mask[layout.maskable], layout.maskable_sizes)
    shapes = {name: parameter.shape for name, parameter in model.network.model.named_parameters()}
    parts = zip(layout.slots, layout.split(flat), strict=True)
    tensors = {slot.name: part.reshape(shapes[slot.name]).clone() for slot, part in parts}
    tensors |= {_MASK: torch.frombuffer(bytearray(mask), dtype=torch.uint8), _PRIOR: model.log_prior}
    content = {
        "version": VERSION,
        "model": config.model_dump(mode="json", by_alias=True),
        "data": model.facts.to_dict(),
        "capacity": str(model.capacity),
        "prior_strength": model.prior_strength,
        "message": dict(model.message),
        "origin": dict(model.origin),
    }
    try:
        with files.replacing(path) as temporary:
            save_file(tensors, temporary, {_ENTRY: json.dumps(content)})
    except WriteError as error:
        raise WriteError(f"the model is not saved: {error}; make room, or give another path") from error


def require_new(path: Path) -> None:
    """Check that a model may be written here.

    Raises:
        RunFolderError: the file exists, or its folder does not.
    """
    if path.exists():
        raise RunFolderError(f"{str(path)!r} exists; models are never overwritten: give another path or remove it")
    if not path.parent.is_dir():
        raise RunFolderError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}; make it first")


def load(path: Path | str, device: torch.device | str = "cpu") -> PersonalModel:
    """Read a personal model.

    Args:
        path: a file that ``framp personalise --out`` wrote.
        device: where it shall run.

    Raises:
        ModelError: the file is missing, damaged or not a personal model of this version. Memory is asked for only for
            what the file is long enough to hold.
    """
    try:
        path = files.resolved(path)
        with files.reading(path):
            pass
        with safe_open(path, framework="pt") as file:
            content = files.parse_json((file.metadata() or {})[_ENTRY], f"its entry {_ENTRY!r}")
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, this code reads {VERSION}")
            config, facts = ModelConfig.model_validate(content["model"]), DataFacts.from_dict(content["data"])
            names = list(file.keys())
            _require_shapes(config, facts, {name: tuple(file.get_slice(name).get_shape()) for name in names})
            tensors = {name: file.get_tensor(name) for name in names}
        return _model(content, config, facts, tensors, device)
    except (
        *(FrampError, OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, OverflowError),
        *(RuntimeError, RecursionError),
    ) as error:
        raise ModelError(
            f"{str(path)!r} is not a personal model of this version ({type(error).__name__}: {error}); write it with "
            f"framp personalise --out"
        ) from error


def _require_shapes(config: ModelConfig, facts: DataFacts, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the header of a file against the network that it describes, which is built without memory for it.

    Raises:
        ValueError: they differ.
        FrampError: there is no such network.
    """
    if len(config.widths) > len(shapes):
        raise ValueError(f"a network of {len(config.widths)} layers, in a file of {len(shapes)} tensors")
    with torch.device("meta"):
        model = build_model(config, facts.shape, len(facts.class_names))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected |= {_MASK: shapes.get(_MASK, ()), _PRIOR: (len(facts.class_names),)}
    if wrong := sorted(name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)):
        name = wrong[0]
        raise ValueError(f"its tensor {name!r} has the shape {shapes.get(name)}, expected {expected.get(name)}")


def _model(
    content: Mapping[str, Any],
    config: ModelConfig,
    facts: DataFacts,
    tensors: Mapping[str, Tensor],
    device: torch.device | str,
) -> PersonalModel:
    network = FlatModel(build_model(config, facts.shape, len(facts.class_names)), device)
    layout = network.layout
    network.load(torch.cat([tensors[slot.name].reshape(slot.size) for slot in layout.slots]))
    mask = ~layout.maskable
    try:
        mask[layout.maskable] = decode_mask(tensors[_MASK].numpy().tobytes(), layout.maskable_sizes)
    except FrampError as error:
        raise ValueError(f"its mask is damaged: {error}") from error
    return PersonalModel(
        network=network,
        mask=mask,
        log_prior=tensors[_PRIOR],
        prior_strength=float(content["prior_strength"]),
        facts=facts,
        capacity=parse_capacity(content["capacity"]),
        message=content["message"],
        origin=content["origin"],
    )
