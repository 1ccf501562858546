"""One glance at a run: how far it is, how well it does, and how it goes on. Reads the run folder alone."""

import shlex
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import tomli_w

from framp_core.commands import framp_command
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.foreign_text import LONGEST_TRACEBACK, printable
from framp_core.metrics import COLUMNS, summarise
from framp_core.report.summary import Record
from framp_core.run_folder import ENVIRONMENT, EVENTS, LOG, SUMMARY, RunFolder
from framp_core.run_log import failure
from framp_core.run_metrics import reason_of

_DEPLOYMENT, _SIMULATION = "HttpGrid", "InMemoryGrid"
"""The classes of Flower's grids, in a federation of devices and on Ray."""


class State(StrEnum):
    """What a run is doing."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class RunStatus:
    """What a run folder says at this moment.

    Attributes:
        folder: the run folder.
        state: whether it runs, is finished, ended in an error, or was killed.
        error: that ended it, None unless it failed.
        method: of the comparison.
        round: last round that was trained.
        rounds: that it shall have.
        seconds_per_round: mean over its rounds, evaluations included; None before the first one.
        end: Unix time at which it is expected to end; None unless it runs and has trained a round.
        updated: Unix time of its last event, None before the first one.
        evaluated_round: of the accuracies, None before the first evaluation.
        accuracy: mean over clients by column, 0 to 1.
        clients: that were ever admitted, by role.
        joined_later: those of them that were not there at the start.
        refusals: replies refused or missing so far, by reason.
        last_refusal: the newest of them in words, None if there is none.
        checkpoint: round of the newest checkpoint, None if there is none.
        resume: command that goes on with the run, None if it runs or is finished; of a federation's run,
            ``FEDERATION`` is to be replaced.
    """

    folder: str
    state: State
    error: str | None
    method: str
    round: int
    rounds: int
    seconds_per_round: float | None
    end: float | None
    updated: float | None
    evaluated_round: int | None
    accuracy: dict[str, float]
    clients: dict[str, int]
    joined_later: int
    refusals: dict[str, int]
    last_refusal: str | None
    checkpoint: int | None
    resume: str | None

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Look at a run, which may be going on meanwhile.

        Raises:
            RunFolderError: no run folder, or its events are damaged.
            ConfigError: its configuration is not one of this version.
        """
        run = RunFolder.open(folder)
        # Whether it runs is asked first: a run that ends in between is then shown as running rather than as killed.
        in_use = run.in_use()
        state, error = _state(run, in_use)
        record = Record.glance(run)
        mean = record.seconds / record.rounds if record.rounds else None
        left = run.config.rounds - record.rounds
        overall = summarise(record.last("before"))[-1]
        spreads = {column: overall.column(column) for column in COLUMNS}
        refused, checkpoints = record.refused, run.checkpoints.rounds()
        updated = (folder / EVENTS).stat().st_mtime if run.has(EVENTS) else None
        return cls(
            folder=str(folder),
            state=state,
            error=error and printable(error, LONGEST_TRACEBACK, lines=True),
            method=run.config.method,
            round=record.rounds,
            rounds=run.config.rounds,
            seconds_per_round=mean,
            end=updated + left * mean if state is State.RUNNING and mean is not None and updated is not None else None,
            updated=updated,
            evaluated_round=record.evaluated_rounds[-1] if record.evaluated_rounds else None,
            accuracy={column: spread.mean for column, spread in spreads.items() if spread},
            clients=dict(Counter(client["role"] for client in record.clients)),
            joined_later=len(record.joined),
            refusals=dict(Counter(reason_of(each.error) for each in refused).most_common()),
            last_refusal=f"round {refused[-1].round}, {refused[-1].client}: {refused[-1].error}" if refused else None,
            checkpoint=checkpoints[0] if checkpoints else None,
            resume=resume_command(run, len(record.clients)) if state in (State.FAILED, State.INTERRUPTED) else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {**asdict(self), "state": str(self.state)}

    def rows(self) -> dict[str, str]:
        """What to show, by heading; what is not known yet is left out."""
        mean, left = self.seconds_per_round, max((self.end or 0) - time.time(), 0)
        end = f", about {_duration(left)} left, until {_clock(self.end)}" if self.end is not None else ""
        accuracy = "  ".join(f"{column} {100 * share:.1f} %" for column, share in self.accuracy.items())
        clients = ", ".join(f"{count} {role}" for role, count in self.clients.items())
        later = f"; {self.joined_later} came after the start" if self.joined_later else ""
        shown = {
            "state": str(self.state) + (f": {self.error}" if self.error else ""),
            "round": f"{self.round} of {self.rounds}" + (f", {mean:.2f} s each{end}" if mean is not None else ""),
            "last event": _clock(self.updated) if self.updated is not None else "",
            f"accuracy, round {self.evaluated_round}": accuracy,
            "clients": clients + later if clients else "",
            "refused": ", ".join(f"{count} {reason}" for reason, count in self.refusals.items()) or "none",
            "last refusal": self.last_refusal or "",
            "checkpoint": f"round {self.checkpoint}" if self.checkpoint is not None else "none",
            "to go on": self.resume or "",
        }
        return {heading: printable(text, LONGEST_TRACEBACK, lines=True) for heading, text in shown.items() if text}


def resume_command(run: RunFolder, nodes: int) -> str:
    """The command that goes on with a run where it works: here, or on the federation that has its data.

    Flower's own command takes no options from the folder, so it gets all that differ from the app's defaults.

    Args:
        run: its folder.
        nodes: that it has, 0 before it knows them; ``flwr run`` may simulate another number than is configured.
    """
    grid = run.json(ENVIRONMENT).get("grid") if run.has(ENVIRONMENT) else None
    if grid != _DEPLOYMENT and nodes in (0, run.config.partition.nodes):
        engine = ("--engine", "flower") if grid == _SIMULATION or run.config.engine.ray_address else ()
        return framp_command("run", "--resume", run.path, *engine)
    output = run.config.output.model_copy(update={"folder": "", "resume": str(run.path)})
    values, defaults = run.config.model_copy(update={"output": output}).to_flat(), FrampConfig().to_flat()
    options = " ".join(f"{key}={_in_toml(value)}" for key, value in values.items() if value != defaults[key])
    simulated = f"--federation-config 'num-supernodes={nodes} client-resources-num-cpus=1'"
    where = "FEDERATION --stream" if grid == _DEPLOYMENT else f"--stream {simulated}"
    return f"flwr run . {where} --run-config {shlex.quote(options)}"


def _in_toml(value: Scalar) -> str:
    return tomli_w.dumps({"_": value}).removeprefix("_ = ").strip()


def _state(run: RunFolder, in_use: bool) -> tuple[State, str | None]:
    if in_use:
        return State.RUNNING, None
    if run.has(SUMMARY):
        return State.FINISHED, None
    error = failure(run.path / LOG)
    if error is None or error.startswith(("KeyboardInterrupt", "SystemExit")):
        return State.INTERRUPTED, None
    return State.FAILED, error


def _clock(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
