"""Where the time goes: named spans of the work of a process, recorded only when a profile is asked for."""

import time
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager
from types import TracebackType

Mark = tuple[int, str | None]
"""Nanoseconds of ``time.perf_counter_ns``, and the name of the span that begins; None where the innermost one ends.

The clock is one for all processes of a machine on Linux, macOS and Windows, so marks of several can be laid together.
"""

_marks: list[Mark] | None = None


class span(ContextDecorator):  # noqa: N801
    """A piece of work that a profile shows, as a context manager or a decorator; off, it costs under a microsecond.

    Spans nest, and the time of an inner one is not that of the outer one.

    Args:
        name: where and what, such as ``client.train``.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        if _marks is not None:
            _marks.append((time.perf_counter_ns(), self._name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _marks is not None:
            _marks.append((time.perf_counter_ns(), None))


@contextmanager
def recording() -> Iterator[list[Mark]]:
    """Record the spans of this process; the list that it yields grows.

    A recording inside another one takes its place for a while.
    """
    global _marks
    before, _marks = _marks, []
    try:
        yield _marks
    finally:
        _marks = before


def is_recording() -> bool:
    """Whether spans of this process are recorded."""
    return _marks is not None
