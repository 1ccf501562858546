"""Progress of a run on the terminal, read from its event log."""

import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from framp_core import files
from framp_core.errors import OutputError, RunFolderError
from framp_core.foreign_text import LONGEST_TRACEBACK, printable
from framp_core.metrics import COLUMNS, accuracies, summarise
from framp_core.run_records import checked_event, complete_event

_POLL_SECONDS = 0.2


class RunProgress:
    """Follow ``events.jsonl`` while a run writes it: a bar on a terminal, a line per evaluation elsewhere.

    Refused replies are shown as they happen, the first one of a round with its client's traceback.

    Args:
        console: where to print.
        folder: the run folder; it need not exist yet.
        rounds: total number of rounds.
        resumed: the folder holds the events of a killed run. They are shown once the resumed one has put a cut log in
            their place.
    """

    def __init__(self, console: Console, folder: Path, rounds: int, resumed: bool = False) -> None:
        self._console = console
        self._path = folder / "events.jsonl"
        self._rounds = rounds
        self._position = 0
        self._old_log = self._log_number() if resumed else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._bar = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=rounds)

    def __enter__(self) -> Self:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.stop()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._read()
        self._read()

    def _log_number(self) -> int | None:
        return self._path.lstat().st_ino if os.path.lexists(self._path) else None

    def _read(self) -> None:
        if self._log_number() in (None, self._old_log):
            return
        with suppress(RunFolderError):  # What is wrong with the log, the run itself says.
            for line in files.lines(self._path, self._position):
                self._position += len(line)
                event = checked_event(files.parse_json(line, "an event"), "an event")
                self._show(complete_event(event, "the log"))

    def _show(self, event: dict[str, Any]) -> None:
        if event["kind"] == "train":
            self._bar.update(self._task, completed=event["round"])
        elif event["kind"] == "evaluate":
            text = _accuracies(event)
            self._bar.update(self._task, description=text)
            if not self._console.is_terminal:
                self._print(f"round {event['round']}/{self._rounds}  {text}")
        for refusal in event.get("refused", []):
            self._print(f"round {event['round']}: {refusal['client']} refused: {refusal['error']}")
            if refusal.get("traceback"):
                self._print(refusal["traceback"])

    def _print(self, text: str) -> None:
        shown = printable(text, LONGEST_TRACEBACK, lines=True)
        with suppress(OutputError):  # The end of the run prints, too, and says so.
            self._console.print(shown, highlight=False, markup=False, soft_wrap=True)


def _accuracies(event: dict[str, Any]) -> str:
    """Mean accuracies over clients, such as ``local 91.2 %  union 71.0 %  unseen 89.3 %``."""
    overall = summarise(row for row in accuracies(event) if row.moment == "before")[-1]
    spreads = {column: overall.column(column) for column in COLUMNS}
    return "  ".join(f"{column} {100 * spread.mean:.1f} %" for column, spread in spreads.items() if spread)
