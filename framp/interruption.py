"""How the command ends when a signal asks it to: what was started is stopped, and it says how to go on."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from framp.terminal import Terminal
from framp_core.commands import framp_command
from framp_core.errors import FrampError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_SECONDS = 1.0
"""``timeout``, terminals and supervisors may send two signals where they mean one."""


def end_on_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end the program like an error, so that it stops the processes that it started.

    The exit status is 128 and the signal's number. A second signal, a second after the first or later, ends it at once.
    What was ignored at the start stays so, such as SIGHUP under ``nohup``.
    """
    first: list[float] = []

    def end(received: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            _write(f"\n{signal.Signals(received).name}: stopping what was started; a second one ends it at once\n")
            sys.exit(128 + received)
        if time.monotonic() - first[0] >= _SAME_SECONDS:
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
            os._exit(128 + received)

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


@contextmanager
def saying(words: Callable[[], str]) -> Iterator[None]:
    """Print on the error stream, where a signal ends the work within, how far it got and how to go on.

    Args:
        words: is called after that end.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        Terminal(stderr=True).say(words())
        raise


def run_words(folder: Path) -> str:
    """How far the run in a folder is, and the command that goes on with it."""
    from framp.status import RunStatus

    try:
        found = RunStatus.of(folder)
    except FrampError:
        return f"the run had not begun; start it again: {same_command()}"
    newest = "there is no checkpoint yet" if found.checkpoint is None else f"the newest is of round {found.checkpoint}"
    done = f"round {found.round} of {found.rounds} is done" if found.round else "no round is done"
    end = f"to go on: {found.resume}" if found.resume else f"the run is finished: {framp_command('report', folder)}"
    return f"{done}; checkpoints: {newest}\n{end}"


def same_words(what: str) -> str:
    """The command that goes on with what is done by giving the same one again."""
    return f"{what}; to go on: {same_command()}"


def same_command() -> str:
    """The command that this process was started with."""
    return framp_command(*sys.argv[1:])


def _write(text: str) -> None:
    """Past Python's buffers, which a signal may have come into the middle of."""
    with suppress(OSError):
        os.write(2, text.encode())
