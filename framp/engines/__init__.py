"""Two engines over the same strategy and client code: in process, and Flower's simulation on Ray."""

from framp.engines.flower import run_flower
from framp.engines.in_process import InProcessGrid, run_local

__all__ = ["InProcessGrid", "run_flower", "run_local"]
