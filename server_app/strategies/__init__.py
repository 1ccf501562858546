"""Strategies by the name of their method (``method`` in the configuration). A new method is one file here."""

from server_app.strategies.base import ClientUpdate, SubmodelStrategy
from server_app.strategies.fedrolex import FedRolexStrategy
from server_app.strategies.fiarse import FiarseReleasedStrategy, FiarseStrategy
from server_app.strategies.framp import FrampStrategy
from server_app.strategies.heterofl import HeteroFLStrategy
from server_app.strategies.local_only import LocalOnlyStrategy
from server_app.strategies.scalefl import ScaleFLStrategy

STRATEGIES: dict[str, type[SubmodelStrategy]] = {
    "framp": FrampStrategy,
    "fiarse": FiarseStrategy,
    "fiarse-released": FiarseReleasedStrategy,
    "heterofl": HeteroFLStrategy,
    "fedrolex": FedRolexStrategy,
    "scalefl": ScaleFLStrategy,
    "local": LocalOnlyStrategy,
}

__all__ = ["STRATEGIES", "ClientUpdate", "FrampStrategy", "SubmodelStrategy"]
