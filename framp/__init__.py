"""The front of FRAMP for people: the ``framp`` command, and engines to run a configuration from Python."""

from framp.engines import InProcessGrid, run_flower, run_local

__all__ = ["InProcessGrid", "run_flower", "run_local"]
