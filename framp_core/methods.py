"""The methods of the comparison: which strategy, and which settings their papers fix.

A method is a strategy and flat configuration keys that lie over a preset and under the user's own overrides. What a
setting means stands in ``framp_core/config.py``; where it comes from, in each method's ``source``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from framp_core.config_values import Scalar

Settings = Mapping[str, Scalar]

GLOBAL_MODEL: Settings = {
    "generator.name": "shared",
    "server.shared-optimizer": "sgd",
    "server.shared-learning-rate": 1.0,
    "server.shared-momentum": 0.0,
    "server.averaging-decay": 0.0,
    "server.weighting": "coverage",
    "local.prior-strength": 0.0,
    "local.alignment-weight": 0.0,
    "local.nested-share": 0.0,
    "local.mask": "fixed",
    "local.masked-cross-entropy": False,
    "local.distillation-weight": 0.0,
    "model.exits": 1,
    "model.slim-width": "root",
}
"""One global model, averaged per coordinate over the clients that hold it: what the baselines have in common."""

STRENGTHENED: Settings = {"server.shared-momentum": 0.5, "server.averaging-decay": 0.8, "local.prior-strength": 1.0}
"""FRAMP's tricks that are not its ideas: server momentum, averaged weights, logit adjustment."""


STRONG = "-strong"
"""End of the key of a method with these."""


@dataclass(frozen=True)
class Method:
    """An entry of the comparison.

    Attributes:
        title: name in tables.
        settings: flat configuration keys, ``method`` (the strategy) among them.
        source: paper and section, or what is ablated.
        ignores_budget: whether every client holds the full model whatever its capacity.
        serves_unseen: whether it has a trained model for a client that never trained.
    """

    title: str
    settings: Settings
    source: str
    ignores_budget: bool = False
    serves_unseen: bool = True

    def strengthened(self) -> "Method":
        """The same method with the tricks of :data:`STRENGTHENED`."""
        return replace(self, title=f"{self.title} +", settings={**self.settings, **STRENGTHENED})


_HETEROFL: Settings = {**GLOBAL_MODEL, "local.masked-cross-entropy": True}

_FIARSE: Settings = {**GLOBAL_MODEL, "extraction.name": "global-top-k", "extraction.fan-in-exponent": 0.0}

_DIAO, _ALAM = "Diao et al., ICLR 2021, arXiv 2010.01264", "Alam et al., NeurIPS 2022"
_BY_BUDGET = "widths by the weights held: with wide inputs the published widths hold several times the budget"
_BY_CODE = "the gradient of a step clipped to norm 1, as in the released code"

_PUBLISHED = {
    "fiarse": Method(
        "FIARSE",
        {**_FIARSE, "method": "fiarse", "local.mask": "threshold-controlled"},
        "Wu et al., NeurIPS 2024, arXiv 2407.19389, as in the paper: the gradient includes the mask's derivative",
    ),
    "fiarse-released": Method(
        "FIARSE, released code",
        {**_FIARSE, "method": "fiarse-released", "local.mask": "following", "server.weighting": "non-zero"},
        "Wu et al., NeurIPS 2024, arXiv 2407.19389, as their code runs: a bool mask, which autograd does not "
        "differentiate, and the mean over the clients that moved a coordinate",
    ),
    "heterofl": Method("HeteroFL", {**_HETEROFL, "method": "heterofl"}, _DIAO),
    "fedrolex": Method("FedRolex", {**_HETEROFL, "method": "fedrolex"}, _ALAM),
    "heterofl-budget": Method(
        "HeteroFL, nearest the budget",
        {**_HETEROFL, "method": "heterofl", "model.slim-width": "budget"},
        f"{_DIAO}; {_BY_BUDGET}",
    ),
    "fedrolex-budget": Method(
        "FedRolex, nearest the budget",
        {**_HETEROFL, "method": "fedrolex", "model.slim-width": "budget"},
        f"{_ALAM}; {_BY_BUDGET}",
    ),
    "heterofl-clipped": Method(
        "HeteroFL, clipped",
        {**_HETEROFL, "method": "heterofl", "local.gradient-clip": 1.0},
        f"{_DIAO}; {_BY_CODE}",
    ),
    "fedrolex-clipped": Method(
        "FedRolex, clipped",
        {**_HETEROFL, "method": "fedrolex", "local.gradient-clip": 1.0},
        f"{_ALAM}; {_BY_CODE}",
    ),
    "scalefl": Method(
        "ScaleFL",
        {**GLOBAL_MODEL, "method": "scalefl", "model.exits": 0, "local.distillation-weight": 0.05},
        "Ilhan et al., CVPR 2023; distillation as in the released command for AG News, the code's default is 0",
    ),
    "fedavg": Method(
        "FedAvg (full size)",
        {**GLOBAL_MODEL, "extraction.name": "full", "server.weighting": "examples"},
        "McMahan et al., AISTATS 2017; ignores budgets",
        ignores_budget=True,
    ),
}

METHODS: dict[str, Method] = {
    "framp": Method("FRAMP", {"method": "framp"}, "Liang and Tay, arXiv 2604.11278"),
    **_PUBLISHED,
    **{f"{name}{STRONG}": method.strengthened() for name, method in _PUBLISHED.items()},
    "local": Method(
        "Local only",
        {**GLOBAL_MODEL, "method": "local"},
        "each client alone, submodel of its capacity",
        serves_unseen=False,
    ),
    "framp-shared": Method("FRAMP, shared model alone", {"generator.name": "shared"}, "ablation: theta_0 alone"),
    "framp-unaligned": Method("FRAMP, no alignment", {"local.alignment-weight": 0.0}, "ablation: lambda = 0"),
    "framp-layerwise": Method("FRAMP, layer-wise mask", {"extraction.name": "layer-top-k"}, "ablation: mask"),
    "framp-unnested": Method("FRAMP, no nested steps", {"local.nested-share": 0.0}, "ablation: own size alone"),
    "framp-nested": Method("FRAMP, nested steps", {"local.nested-share": 0.2}, "variant: a fifth of the steps nested"),
    "framp-modulated": Method("FRAMP, modulated", {"generator.name": "modulated"}, "ablation: generator"),
    "framp-experts": Method("FRAMP, experts of all layers", {"generator.expert-scope": "all"}, "variant: generator"),
    "framp-two-experts": Method("FRAMP, two experts", {"generator.experts": 2}, "variant: generator"),
    "framp-eight-experts": Method("FRAMP, eight experts", {"generator.experts": 8}, "variant: generator"),
    "framp-low-rank": Method("FRAMP, low-rank", {"generator.name": "low-rank"}, "ablation: generator"),
    "framp-chunked": Method("FRAMP, chunked", {"generator.name": "chunked"}, "ablation: generator"),
    "framp-dense": Method("FRAMP, dense", {"generator.name": "dense"}, "ablation: generator"),
    "framp-moments": Method("FRAMP, moments", {"descriptor.name": "moments"}, "ablation: descriptor"),
    "framp-histogram": Method("FRAMP, histogram", {"descriptor.name": "histogram"}, "ablation: descriptor"),
    "framp-warmup": Method("FRAMP, warm-up features", {"descriptor.name": "warmup"}, "ablation: descriptor"),
    "framp-unadjusted": Method("FRAMP, no logit adjustment", {"local.prior-strength": 0.0}, "ablation: tau = 0"),
}
"""Methods by the name that ``framp compare --methods`` takes."""


def is_ablation(method: str, reference: str) -> bool:
    """Whether a method is the reference with a part taken out or replaced, by its key: ``<reference>-...``.

    ``fiarse-released`` is no part of ``fiarse``, but the other reading of one publication, and so are ``-clipped`` and
    ``-budget``: such methods are ranked, tested and tuned beside each other.
    """
    return method.startswith(f"{reference}-") and method.removesuffix(STRONG) not in _PUBLISHED


def title_of(values: Settings) -> str:
    """The name of the method that a run's settings make: several share a strategy, as FRAMP and FedAvg do.

    Args:
        values: all flat keys of the run. What is no method of its own is called by its strategy, ablations too.
    """
    own = {name: settings_of(name, {}) for name in METHODS if not is_ablation(name, "framp")}
    made = [name for name, settings in own.items() if settings.items() <= values.items()]
    return METHODS[max(made, key=lambda name: len(own[name]), default=str(values["method"]))].title


def settings_of(method: str, overrides: Settings) -> dict[str, Scalar]:
    """The flat keys of a method to lay over a preset: its own, and the overrides on them.

    Args:
        method: key of :data:`METHODS`.
        overrides: flat keys that hold for every method; ``method`` among them is left aside.
    """
    own = {key: value for key, value in overrides.items() if key != "method"}
    return {"method": "framp", **METHODS[method].settings, **own}
