"""FIARSE (Wu et al., NeurIPS 2024, arXiv 2407.19389): importance-aware submodels of one global model."""

from collections.abc import Mapping
from typing import ClassVar

from framp_core.config_values import Scalar
from server_app.strategies.framp import FrampStrategy


class FiarseStrategy(FrampStrategy):
    """FRAMP's round on the generator ``shared``, which gives theta_0 to everyone, is FIARSE's: as in its paper.

    No hook is overridden. Extraction: the k largest |theta_0| of the whole network (``extraction.name``
    global-top-k, ``extraction.fan-in-exponent`` 0). Local training: the threshold-controlled gradient
    (``local.mask``). Server: ``theta_0 += sum_i m_i * Delta_i / sum_i m_i`` per coordinate, 0 / 0 := 0
    (``server.weighting`` coverage; plain SGD of rate 1). Nothing is aligned, so no prototypes travel. The settings
    stand in ``framp_core/methods.py``; those without which it would be another method are required here.
    """

    required: ClassVar[Mapping[str, Scalar]] = {
        "generator.name": "shared",
        "local.alignment-weight": 0.0,
        "local.nested-share": 0.0,
        "local.mask": "threshold-controlled",
    }


class FiarseReleasedStrategy(FiarseStrategy):
    """FIARSE as its authors' released code runs it, which is not what the paper describes.

    Their mask is a tensor of bool, which autograd does not differentiate, so that the derivative which they define for
    it never acts: the mask follows the weights, and the gradient is ``dF/dw * M``
    (:class:`framp_core.local_weights.FollowingWeights`). Their server averages a coordinate over the clients whose
    Delta is not zero there (``server.weighting`` non-zero). ``presets/fiarse-cifar10.toml`` is their experiment.
    """

    required: ClassVar[Mapping[str, Scalar]] = {**FiarseStrategy.required, "local.mask": "following"}
