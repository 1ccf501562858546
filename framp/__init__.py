"""The front of FRAMP for people: the ``framp`` command, and engines to run a configuration from Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framp.engines import InProcessGrid, run_flower, run_local

__all__ = ["InProcessGrid", "run_flower", "run_local"]


def __getattr__(name: str) -> Any:
    """Import the engines, with PyTorch and Flower, where they are used: the command answers before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from framp import engines

    return getattr(engines, name)
