"""FIARSE (Wu et al., NeurIPS 2024, arXiv 2407.19389): importance-aware submodels of one global model."""

from framp_core.config import FrampConfig
from framp_core.errors import ConfigError
from framp_core.run_folder import RunFolder
from server_app.strategies.framp import FrampStrategy


class FiarseStrategy(FrampStrategy):
    """FRAMP's round on the generator ``shared``, which gives theta_0 to everyone, is FIARSE's.

    No hook is overridden. Extraction: the k largest |theta_0| of the whole network (``extraction.name``
    global-top-k, ``extraction.fan-in-exponent`` 0). Local training: the threshold-controlled gradient
    (``local.threshold-gradient``). Server: ``theta_0 += sum_i m_i * Delta_i / sum_i m_i`` per coordinate, 0 / 0 := 0
    (``server.weighting`` coverage, plain SGD of rate 1). Nothing is aligned, so no prototypes travel. The settings
    stand in ``framp_core/methods.py``; those without which it would be another method are insisted on here.

    Raises:
        ConfigError: there is a personal generator, or an alignment.
    """

    def __init__(self, config: FrampConfig, run: RunFolder) -> None:
        if config.generator.name != "shared":
            raise ConfigError(
                f"generator.name={config.generator.name!r}, but FIARSE cuts one global model: "
                f"use 'shared', or method='framp'"
            )
        if config.local.alignment_weight:
            raise ConfigError(
                f"local.alignment-weight={config.local.alignment_weight:g}, but FIARSE has no prototypes to align to: "
                f"use 0, or method='framp'"
            )
        super().__init__(config, run)
