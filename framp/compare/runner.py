"""Runs as processes of their own, so many at a time; one that fails does not stop the others."""

import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from framp.compare.plan import PlannedRun, usable_workers
from framp_core import files
from framp_core.errors import ConfigError, RunFolderError
from framp_core.report.tables import human_seconds
from framp_core.run_folder import EVENTS

_POLL_SECONDS = 0.2
_STOP_SECONDS = 10.0
_LOG_LINES = 15


@dataclass(frozen=True)
class Failure:
    """A run that did not finish.

    Attributes:
        run: its name.
        status: exit status of its process.
        log: file of all that it printed.
        tail: the end of that, or what is wrong with the run's folder.
    """

    run: str
    status: int
    log: Path
    tail: str


@dataclass
class _Running:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float


def execute(runs: Sequence[PlannedRun], workers: int | None, console: Console, title: str = "runs") -> list[Failure]:
    """Do those of the runs that are not finished yet, and return the ones that failed.

    Every run is a process with the configuration file ``FOLDER.toml`` and the log ``FOLDER.log`` beside its run
    folder. Whatever ends this function early ends the processes too; what they leave behind is done again by the
    next call.

    Args:
        runs: in the order they are started.
        workers: processes at a time; None: one per core.
        console: where progress is shown, a bar on a terminal, and a line per finished run.
        title: what the runs are for.

    Raises:
        RunFolderError: a run's folder holds something else; then none is started.
    """
    waiting = deque(run for run in runs if not run.is_finished())
    progress = _Display(console, title, len(runs), [run.config.rounds for run in waiting])
    failures: list[Failure] = []
    running: list[_Running] = []
    limit = usable_workers(workers, len(waiting))
    threads = max(1, (os.cpu_count() or 1) // limit)
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                running.append(_start(waiting.popleft(), threads))
            time.sleep(_POLL_SECONDS)
            for ended in [each for each in running if each.process.poll() is not None]:
                running.remove(ended)
                failure = _outcome(ended)
                failures += [failure] if failure else []
                progress.ended(ended, failure)
            progress.follow(running)
    finally:
        progress.close()
        _stop(running)
    return failures


def _start(run: PlannedRun, threads: int) -> _Running:
    with files.writing(run.folder):
        if files.has_folder(run.folder):
            # Its digest was compared: this is what an interrupted run of the same settings left.
            shutil.rmtree(run.folder)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
    settings = run.folder.with_name(f"{run.name}.toml")
    files.write_text(settings, run.config.to_toml())
    files.write_bytes(_log_of(run), b"")
    log = _log_of(run).open("ab")
    command = [sys.executable, "-m", "framp", "run", str(settings), "--out", str(run.folder)]
    # Runs side by side would otherwise start a thread per core each, and wait for one another.
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONIOENCODING": "utf-8"}
    # In a session of its own: what Ctrl-C in a terminal ends is this process, which ends its runs.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    return _Running(run, process, log, time.monotonic())


def _outcome(ended: _Running) -> Failure | None:
    """A run has succeeded when its process says so and its folder holds what was asked for."""
    ended.log.close()
    status = ended.process.returncode
    log = _log_of(ended.run)
    try:
        if status == 0 and ended.run.is_finished():
            return None
    except (ConfigError, RunFolderError) as error:
        return Failure(ended.run.name, status, log, str(error))
    lines = files.read_bytes(log).decode(errors="replace").splitlines()
    return Failure(ended.run.name, status, log, "\n".join(lines[-_LOG_LINES:]))


def _log_of(run: PlannedRun) -> Path:
    return run.folder.with_name(f"{run.name}.log")


def _stop(running: Sequence[_Running]) -> None:
    for each in running:
        each.process.terminate()
    deadline = time.monotonic() + _STOP_SECONDS
    for each in running:
        try:
            each.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()
        each.log.close()


class _Display:
    """A bar over the rounds of all runs on a terminal; a line for each run that ended, there and elsewhere."""

    def __init__(self, console: Console, title: str, runs: int, rounds: Sequence[int]) -> None:
        self._console = console
        self._ended = runs - len(rounds)
        self._runs = runs
        self._rounds_ended = 0
        if self._ended:
            self._print(f"{title}: {self._ended} of {runs} finished before")
        self._bar = Progress(
            TextColumn(f"{title} {{task.fields[done]}}/{runs}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=console,
            disable=not (console.is_terminal and rounds),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=sum(rounds), done=self._ended)
        self._bar.start()

    def ended(self, ended: _Running, failure: Failure | None) -> None:
        self._ended += 1
        self._rounds_ended += ended.run.config.rounds
        place = f"[{self._ended}/{self._runs}] {ended.run.name}"
        if failure is None:
            self._print(f"{place}: {human_seconds(time.monotonic() - ended.started)}")
        else:
            self._print(f"{place}: failed with status {failure.status}; the end of {failure.log}:\n{failure.tail}")

    def follow(self, running: Sequence[_Running]) -> None:
        if not self._bar.disable:
            rounds = [_rounds_done(each.run) for each in running]
            shown = "  ".join(f"{each.run.name} {count}" for each, count in zip(running, rounds, strict=True))
            done = self._rounds_ended + sum(rounds)
            self._bar.update(self._task, completed=done, done=self._ended, description=shown)

    def close(self) -> None:
        self._bar.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _rounds_done(run: PlannedRun) -> int:
    events = run.folder / EVENTS
    with suppress(RunFolderError):  # It is shown; what is wrong with the folder is said when its run ends.
        if files.has_file(events):
            return sum(line.startswith(b'{"kind": "train"') for line in files.lines(events))
    return 0
