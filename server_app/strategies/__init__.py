"""Strategies by the name of their method (``method`` in the configuration). A new method is one file here."""

from server_app.strategies.base import ClientUpdate, SubmodelStrategy
from server_app.strategies.framp import FrampStrategy

STRATEGIES: dict[str, type[SubmodelStrategy]] = {"framp": FrampStrategy}

__all__ = ["STRATEGIES", "ClientUpdate", "FrampStrategy", "SubmodelStrategy"]
