"""Small configurations that several test files share."""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

from framp_core.cohort import StackedNetworks
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

TINY: dict[str, Scalar] = {
    "rounds": 2,
    "partition.clients": 4,
    "partition.unseen-clients": 1,
    "partition.scheme": "iid",
    "model.widths": "8,8",
    "model.groups": 4,
    "generator.hidden": 8,
    "local.steps": 2,
    "local.device": "cpu",
    "server.clients-per-round": 3,
    "evaluation.every": 1,
}


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def pytest_configure() -> None:
    """Take the signals that a shell ignores for what it starts in the background, or ``nohup`` does.

    What the tests start would ignore them as well, as the command does on purpose.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., FrampConfig]:
    """Build a configuration that runs in well under a second; keyword ``name`` names its run folder."""

    def build(values: dict[str, Scalar] | None = None, name: str = "run") -> FrampConfig:
        paths: dict[str, Scalar] = {"output.folder": str(tmp_path / name), "data.cache": str(tmp_path / "cache")}
        return FrampConfig.from_flat({**TINY, **paths, **(values or {})})

    return build


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """Put back the signal handlers and Flower's log as they were: the command sets its own."""
    log = logging.getLogger("flwr")
    level, handlers = log.level, list(log.handlers)
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    log.setLevel(level)
    log.handlers = handlers
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def stacked_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Of each method of ``StackedNetworks``, the numbers of clients that this process called it with."""
    calls: dict[str, list[int]] = {"train": [], "prototypes": []}

    def counted(name: str) -> Callable[..., object]:
        original = getattr(StackedNetworks, name)

        def method(self: StackedNetworks, clients: Sequence[object]) -> object:
            calls[name].append(len(clients))
            return original(self, clients)

        return method

    for name in calls:
        monkeypatch.setattr(StackedNetworks, name, counted(name))
    return calls
