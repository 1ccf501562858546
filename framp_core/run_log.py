"""The log of a run as JSON lines, besides whatever the console shows: ``log.jsonl`` in the run folder.

Each line has ``time`` (UTC), ``level`` and ``text``, and where they apply ``round``, ``client`` and ``message_id``
(Flower's, of the message that went to the client). No payload is ever logged.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

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
    """
    _end_last_line(path)
    handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    handler.setFormatter(JsonLines())
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
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def _write(handler: logging.Handler, level: int, text: str) -> None:
    """A line for the file alone."""
    handler.handle(logging.LogRecord(NAME, level, __file__, 0, text, None, None))


def failure(path: Path) -> str | None:
    """Why the run ended, as its log says; None if it did not end in an error, or runs again since."""
    if not path.is_file():
        return None
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        with suppress(ValueError):  # A process may be killed within a line.
            text = str(json.loads(line)["text"])
            if text.startswith((FAILED, STARTED)):
                return text.removeprefix(FAILED) if text.startswith(FAILED) else None
    return None
