"""Generators h(v; phi): from a client's descriptor to its own full model (DESIGN section 3)."""

import torch
from torch import Tensor

from framp_core.config import GeneratorConfig
from framp_core.errors import ModelError
from framp_core.generators.base import Generator
from framp_core.generators.chunked import Chunked
from framp_core.generators.dense import Dense
from framp_core.generators.low_rank import LowRank
from framp_core.generators.mixture import Mixture
from framp_core.generators.modulated import Modulated
from framp_core.generators.shared import Shared
from framp_core.layout import ParameterLayout
from framp_core.randomness import torch_stream

__all__ = ["GENERATORS", "Generator", "Mixture", "build_generator"]

GENERATORS: dict[str, type[Generator]] = {
    "mixture": Mixture,
    "modulated": Modulated,
    "low-rank": LowRank,
    "chunked": Chunked,
    "dense": Dense,
    "shared": Shared,
}


def build_generator(
    config: GeneratorConfig, layout: ParameterLayout, descriptor_size: int, initial: Tensor, seed: int
) -> Generator:
    """Build the generator that gives every client ``initial`` at the start.

    Args:
        config: which generator, its hyper-parameters, and the largest size allowed.
        layout: description of the generated model.
        descriptor_size: d, floats per descriptor.
        initial: freshly initialised model ``(n,)``, the start of ``theta_0``; its device is the generator's.
        seed: root seed; the global random state is left alone.

    Raises:
        ModelError: the generator would exceed ``config.max_parameters`` (nothing is allocated then), or ``initial``
            does not fit the layout.
    """
    if tuple(initial.shape) != (layout.size,):
        raise ModelError(
            f"the initial vector has shape {tuple(initial.shape)} and the layout {layout.size} parameters; "
            f"build both from the same model"
        )
    generator = _outline(config.name, config, layout, descriptor_size)
    if generator.size > config.max_parameters:
        raise ModelError(_too_large(generator.size, config, layout, descriptor_size))
    generator.to_empty(device="cpu")
    with torch.no_grad():
        generator.theta_0.copy_(initial)
        generator.initialise_personal(torch_stream(seed, "generator"))
    return generator.to(initial.device)


def _outline(name: str, config: GeneratorConfig, layout: ParameterLayout, descriptor_size: int) -> Generator:
    """The generator without memory behind its parameters."""
    with torch.device("meta"):
        return GENERATORS[name](layout, descriptor_size, config)


def _too_large(size: int, config: GeneratorConfig, layout: ParameterLayout, descriptor_size: int) -> str:
    message = (
        f"generator {config.name!r} would have {size:,} parameters ({4 * size / 2**30:.1f} GiB, and more with its "
        f"optimizer) for a model of {layout.size:,}; generator.max-parameters allows {config.max_parameters:,}. "
    )
    if config.name == "modulated":
        return message + "Lower generator.hidden or raise generator.max-parameters"
    modulated = _outline("modulated", config, layout, descriptor_size).size
    return message + f"Use generator.name='modulated' ({modulated:,} parameters)"
