"""The log of a run as JSON lines, besides whatever the console shows: ``log.jsonl`` in the run folder.

Each line has ``time`` (UTC), ``level`` and ``text``, and where they apply ``round``, ``client`` and ``message_id``
(Flower's, of the message that went to the client). No payload is ever logged.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from framp_core import files
from framp_core.errors import RunFolderError

NAME = "flwr.framp"
"""The logger of a run; a child of Flower's, whose console shows it too."""
FAILED = "the run failed: "
"""How the last line of a run begins that ended in an error."""
STARTED = "the run starts"
_FIELDS = ("round", "client", "message_id")


class JsonLines(logging.Formatter):
    """A record as one JSON object; fields come from ``extra=``, see :func:`about`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **{name: getattr(record, name) for name in _FIELDS if getattr(record, name, None) is not None},
            "text": record.getMessage(),
        }
        return json.dumps(line)


class LogFile(logging.Handler):
    """Appends to a file. A line that cannot be written is lost: a log must not end the run that it tells of.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            files.append(self._path, self.format(record).encode() + b"\n")
        except RunFolderError:
            pass
        except Exception:
            self.handleError(record)


def about(round: int | None, client: str | None = None, message_id: str | None = None) -> dict[str, int | str | None]:
    """The argument ``extra`` of a log call.

    Args:
        round: training round, 0 before the first; None where clients are met, which is at no round.
        client: name of the client, or its node before the name is known.
        message_id: of the message that went to it.
    """
    return {"round": round, "client": client, "message_id": message_id}


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Append what the run logs to a file, single messages included, which consoles do not show.

    An error that ends the run is the last line, and is raised again.

    Args:
        path: the file; a resumed run goes on in it.

    Raises:
        RunFolderError: it is no plain file, or the first line cannot be written.
    """
    _end_last_line(path)
    handler = LogFile(path)
    logger = logging.getLogger(NAME)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        _write(handler, logging.INFO, STARTED)
        yield
    except BaseException as error:
        _write(handler, logging.ERROR, f"{FAILED}{type(error).__name__}: {error}")
        raise
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
        handler.close()


def _end_last_line(path: Path) -> None:
    """What a killed process left of a line must not spoil the next one."""
    if not files.has_file(path):
        files.append(path, b"")
        return
    with files.reading(path) as file:
        if os.fstat(file.fileno()).st_nlink > 1:
            raise RunFolderError(
                f"{str(path)!r} has a second name elsewhere (a hard link), and both would grow; put a copy in its place"
            )
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        whole = file.read() in (b"", b"\n")
    if not whole:
        files.append(path, b"\n")


def _write(handler: logging.Handler, level: int, text: str) -> None:
    """A line for the file alone."""
    handler.handle(logging.LogRecord(NAME, level, __file__, 0, text, None, None))


def failure(path: Path) -> str | None:
    """Why the run ended, as its log says; None if it did not end in an error, or runs again since."""
    found = None
    for line in files.lines(path) if files.has_file(path) else ():
        if not any(begin.encode() in line for begin in (FAILED, STARTED)):
            continue
        # A process may be killed within a line, and the next one ends it.
        with suppress(RunFolderError, KeyError, TypeError):
            text = str(files.parse_json(line, repr(str(path)))["text"])
            if text.startswith((FAILED, STARTED)):
                found = text.removeprefix(FAILED) if text.startswith(FAILED) else None
    return found
