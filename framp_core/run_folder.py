"""The folder of a run: what it was, what happened, and what came out (DESIGN section 9).

======================  =====================================================================
config.toml             effective configuration
environment.json        versions, platform, seed, fingerprint of the code
manifest.json           the partition; its ``"digest"`` is shown in the report
events.jsonl            one JSON object per event, appended and flushed while the run works
log.jsonl               what the run logs, single messages included, see :mod:`framp_core.run_log`
metrics.prom            for monitors, written anew after every round, see :mod:`framp_core.run_metrics`
checkpoints/            the newest checkpoints, see :mod:`framp_core.checkpoints`
masks.json              selection and overlap of the masks at the last evaluation
summary.json            the results table; its presence says that the run finished
clients.csv             every measurement of every client
prior_curve.json        counts of every client at each of ``evaluation.prior-strengths``, at the last evaluation
prototypes/             local and global prototypes of the first round that aligned, and of the last
profile.json            of ``framp run --profile``: where the time went, and peak memory; ``--trace`` adds trace.json
report.html, figures/   written by :mod:`framp_core.report`
======================  =====================================================================
"""

import csv
import fcntl
import io
import json
import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from torch import Tensor

from framp_core import files
from framp_core.checkpoints import Checkpoint, Checkpoints
from framp_core.commands import framp_command
from framp_core.config import FrampConfig
from framp_core.errors import ConfigError, RunFolderError, WriteError
from framp_core.fingerprint import code_fingerprint
from framp_core.metrics import COLUMNS, ClientAccuracy, accuracies, summarise
from framp_core.prototypes import Prototypes
from framp_core.run_metrics import KINDS, RunMetrics
from framp_core.run_records import checked_event, checked_file, checked_row

logger = logging.getLogger("flwr.framp.resume")
PACKAGES = ("framp", "flwr", "torch", "torchvision", "numpy", "scikit-learn", "safetensors")

CONFIG = "config.toml"
ENVIRONMENT = "environment.json"
MANIFEST = "manifest.json"
EVENTS = "events.jsonl"
CLIENTS = "clients.csv"
SUMMARY = "summary.json"
LOG = "log.jsonl"
METRICS = "metrics.prom"
LOCK = ".lock"
MASKS = "masks.json"
PRIOR_CURVE = "prior_curve.json"
CHECKPOINTS = "checkpoints"
PROTOTYPES = "prototypes"
TENSORBOARD = "tensorboard"
_ROUND, _TENSORS = "round-", ".safetensors"
_CHUNK = 2**20
_MISFITS = (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, StopIteration)
"""What is raised by tensors and values that are not what a server wrote."""
_ONCE_WRITABLE = "once the folder can be written (make room if the disk is full)"
_LOOKS_AT_A_LOCK = 0.3
"""Seconds: who looks whether a run is worked on holds its lock for a moment."""


class RunFolder:
    """Reads and writes the folder of one run; made by :meth:`create` or :meth:`open`.

    Attributes:
        path: the folder.
        config: the effective configuration.
        checkpoints: its checkpoints.
    """

    def __init__(self, path: Path, config: FrampConfig) -> None:
        self.path = path
        self.config = config
        self.checkpoints = Checkpoints(path / CHECKPOINTS)
        self._first_round = 1
        self._board: Any = None
        self._metrics: RunMetrics | None = None
        self._checked_tail = False

    @classmethod
    def create(cls, path: Path, config: FrampConfig) -> "RunFolder":
        """Start a run folder with its configuration and environment; the manifest follows once clients answered.

        Args:
            path: a folder that does not exist or is empty; its parents are made.
            config: effective configuration of the run.

        Raises:
            RunFolderError: the folder holds something already, or cannot be written.
            ConfigError: TensorBoard is asked for and not installed.
        """
        if config.output.tensorboard:
            _summary_writer()
        try:
            cls.refuse_existing(path)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config)
            files.write_text(path / CONFIG, config.to_toml())
            run.write_json(ENVIRONMENT, environment(config))
        except (OSError, WriteError) as error:
            raise RunFolderError(
                f"the run folder {str(path)!r} cannot be written ({error}); give output.folder a path that can"
            ) from error
        return run

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """Check that a run may be written here.

        Raises:
            RunFolderError: the path is a file, or a folder that holds something.
        """
        if path.is_file():
            raise RunFolderError(f"the run folder {str(path)!r} is a file; give output.folder another path")
        taken = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        if taken:
            raise RunFolderError(
                f"the run folder {str(path)!r} exists and holds {', '.join(taken[:3])}; "
                "results are never overwritten: give output.folder another path or remove it"
            )

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open the folder of a run, finished or not.

        Raises:
            RunFolderError: no configuration lies in it, so it is not a run folder, or one that is no plain file.
            ConfigError: its configuration is not one of this version.
        """
        if not files.has_file(path / CONFIG):
            raise RunFolderError(f"{str(path)!r} is not a run folder: it holds no {CONFIG}; give the folder of a run")
        return cls(path, FrampConfig.load(path / CONFIG))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from working on this run; the system lets go of it when a process dies.

        Raises:
            RunFolderError: another process works on it, or its lock is no plain file.
            WriteError: its lock cannot be written.
        """
        files.has_file(self.path / LOCK)
        lock = FileLock(self.path / LOCK)
        with files.writing(self.path / LOCK):
            try:
                lock.acquire(timeout=_LOOKS_AT_A_LOCK)
            except Timeout as error:
                raise RunFolderError(
                    f"another process works on the run in {str(self.path)!r}; wait for it, or end it first"
                ) from error
        try:
            yield
        finally:
            lock.release()

    def in_use(self) -> bool:
        """Whether a process works on this run.

        Nothing is written, so that anybody who may read the folder can ask.

        Raises:
            RunFolderError: this user may not tell.
        """
        if not self.has(LOCK):
            return False
        with files.reading(self.path / LOCK) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Where a file cannot be written, say what was saved before it, and how the run goes on.

        Raises:
            WriteError: the same, with that.
        """
        try:
            yield
        except WriteError as error:
            raise WriteError(f"{error}; {self._saved()}") from error

    def _saved(self) -> str:
        """What a full disk leaves of the run."""
        rounds: list[int] = []
        with suppress(RunFolderError, OSError):
            if self.has(SUMMARY):
                return f"the run is finished, its report is not; {_ONCE_WRITABLE}: {framp_command('report', self.path)}"
            rounds = self.checkpoints.rounds()
        if not self.path.is_dir():
            return "the run folder is gone; start the run again"
        saved = f"the checkpoint of round {rounds[0]} was saved last" if rounds else "no checkpoint was saved yet"
        return f"{saved}; {_ONCE_WRITABLE}: {framp_command('run', '--resume', self.path)}"

    def rewind(self, round: int, length: int) -> None:
        """Go back to the end of a round: what was recorded after it is done again.

        Args:
            round: the round; 0 for a start from nothing.
            length: bytes of the event log at its end.

        Raises:
            RunFolderError: the log does not reach as far; nothing is changed.
        """
        log = self.path / EVENTS
        if self._length() < length or not self._ends_at(length):
            raise RunFolderError(
                f"{str(log)!r} does not hold the {length} bytes that it had after round {round}; the file was changed "
                f"since; restore it, or start the run again in another folder"
            )
        self._keep(length)
        for leftover in files.leftovers(self.path):
            with files.writing(leftover):
                leftover.unlink()
        self._metrics = None
        self.checkpoints.clean(round)
        self._note_resume(round)
        self._first_round = round + 1

    def event(self, kind: str, round: int, **fields: Any) -> None:
        """Append one event as a JSON line and flush it; non-finite numbers are written as null.

        Args:
            kind: what happened, such as ``"train"``.
            round: training round, 0 before the first.
            **fields: JSON-able values; fractions and NumPy scalars are converted.
        """
        line = json.dumps(_plain({"kind": kind, "round": round, **fields}), allow_nan=False)
        self._drop_cut_line()
        metrics = self._known_metrics()
        files.append(self.path / EVENTS, line.encode() + b"\n")
        if kind in KINDS:
            metrics.add(json.loads(line))
            metrics.write(self.path / METRICS)
        if kind == "evaluate" and self.config.output.tensorboard:
            self._write_scalars(accuracies(json.loads(line)))

    def events(self) -> list[dict[str, Any]]:
        """All events in the order they were written; see :meth:`each_event`."""
        return list(self.each_event())

    def each_event(self) -> Iterator[dict[str, Any]]:
        """One event after the other; a last line that was cut by the end of the run is left out.

        Raises:
            RunFolderError: a line other than the last one is damaged, or is no event.
        """
        if not self.has(EVENTS):
            return
        for number, line in enumerate(files.lines(self.path / EVENTS), start=1):
            where = f"line {number} of {str(self.path / EVENTS)!r}"
            yield checked_event(files.parse_json(line, where), where)

    def write_clients_csv(self, rows: Iterable[ClientAccuracy]) -> None:
        """Write every measurement as one line of clients.csv."""
        with (
            files.replacing(self.path / CLIENTS) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow([*(field.name for field in fields(ClientAccuracy)), "accuracy"])
            for row in rows:
                writer.writerow([*asdict(row).values(), f"{row.accuracy:.6f}"])

    def clients(self) -> list[ClientAccuracy]:
        """The measurements of clients.csv.

        Raises:
            RunFolderError: the run wrote none yet, or the file is damaged.
        """
        self._require(CLIENTS)
        where = repr(str(self.path / CLIENTS))
        try:
            with files.reading(self.path / CLIENTS) as binary:
                table = csv.DictReader(io.TextIOWrapper(binary, encoding="utf-8", newline=""))
                rows = [checked_row(row, where) for row in table]
        except (csv.Error, UnicodeDecodeError) as error:
            raise RunFolderError(f"{where} is not what a run writes there ({error}); restore it") from error
        return [ClientAccuracy.read(row, int(row["round"])) for row in rows]

    def has(self, name: str) -> bool:
        """Whether the run wrote this file.

        Raises:
            RunFolderError: something that is no plain file lies there.
        """
        return files.has_file(self.path / name)

    def write_json(self, name: str, data: Any) -> None:
        """Write one JSON file whole or not at all; non-finite numbers are written as null."""
        files.write_text(self.path / name, json.dumps(_plain(data), indent=2, allow_nan=False) + "\n")

    def json(self, name: str) -> Any:
        """Read one JSON file.

        Raises:
            RunFolderError: it is missing, is not JSON, or is not what a run writes under that name.
        """
        self._require(name)
        return checked_file(self.path / name, files.read_json(self.path / name))

    def write_checkpoint(
        self, round: int, tensors: Mapping[str, Tensor | np.ndarray], state: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint after a round, once the events up to here are on the disk; see :class:`Checkpoints`.

        Args:
            round: the round that has ended.
            tensors: of any device and dtype.
            state: JSON-able; ``"round"`` and ``"events-bytes"`` are added.
        """
        if self.has(EVENTS):
            with files.writing(self.path / EVENTS):
                files.sync(self.path / EVENTS)
        added = {"round": round, "events-bytes": self._length()}
        self.checkpoints.write(round, tensors, {**_plain(state), **added}, self.config.output.checkpoints_kept)

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint of a server, see :meth:`Checkpoints.newest`; None if there is none.

        Raises:
            RunFolderError: all are damaged, or this one's state is not what a server writes.
        """
        found = self.checkpoints.newest()
        if found is not None:
            checked_file(self.checkpoints.state_of(found.round), found.state)
        return found

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Around whatever takes a checkpoint's tensors and state back.

        Raises:
            RunFolderError: the checkpoint, though whole, is not one of this configuration.
        """
        try:
            yield
        except _MISFITS as error:
            raise RunFolderError(
                f"the newest checkpoint in {str(self.path)!r} is not one of the run's configuration "
                f"({type(error).__name__}: {error}); restore the folder, or start the run again in another one"
            ) from error

    def read_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the state of the newest whole checkpoint.

        Raises:
            RunFolderError: there is none.
        """
        found = self.checkpoints.newest()
        if found is None:
            raise RunFolderError(f"{str(self.path)!r} holds no checkpoint: the run stopped before its first one")
        return found.tensors, found.state

    def write_prototypes(self, round: int, shared: Prototypes, local: Mapping[str, Prototypes]) -> None:
        """Keep the prototypes of one round.

        Args:
            round: training round.
            shared: global prototypes after it.
            local: prototypes of the round's clients by name, not one of them empty.
        """
        arrays: dict[str, np.ndarray] = {"global.classes": shared.classes, "global.means": shared.means}
        arrays["local.classes"] = np.concatenate([own.classes for own in local.values()])
        arrays["local.means"] = np.concatenate([own.means for own in local.values()])
        folder = files.make_folder(self.path / PROTOTYPES)
        with files.replacing(folder / f"{_ROUND}{round:06d}{_TENSORS}") as temporary:
            save_numpy(arrays, temporary)

    def prototypes(self) -> dict[int, dict[str, np.ndarray]]:
        """What :meth:`write_prototypes` kept, by round: ``global.classes`` ``(p,)``, ``global.means`` ``(p, f)``, and
        the rows of all clients one after the other as ``local.classes`` ``(q,)`` and ``local.means`` ``(q, f)``.

        Raises:
            RunFolderError: a file is damaged.
        """
        folder = self.path / PROTOTYPES
        paths = folder.glob(f"{_ROUND}*{_TENSORS}") if files.has_folder(folder) else ()
        rounds = {path.stem.removeprefix(_ROUND): path for path in sorted(paths)}
        return {int(number): _prototypes(path) for number, path in rounds.items() if number.isdecimal()}

    def _require(self, name: str) -> None:
        if not self.has(name):
            raise RunFolderError(
                f"{str(self.path)!r} holds no {name}: the run stopped before it was written, or never writes it"
            )

    def _length(self) -> int:
        """Bytes of the event log."""
        return (self.path / EVENTS).stat().st_size if self.has(EVENTS) else 0

    def _ends_at(self, length: int) -> bool:
        """Whether a line of the event log ends at its first ``length`` bytes."""
        if not length:
            return True
        with files.reading(self.path / EVENTS) as log:
            log.seek(length - 1)
            return log.read(1) == b"\n"

    def _keep(self, length: int) -> None:
        """Put the first ``length`` bytes of the event log in its place."""
        log = self.path / EVENTS
        if not length:
            files.write_bytes(log, b"")
            return
        with files.reading(log) as whole, files.replacing(log) as temporary, temporary.open("wb") as kept:
            while part := whole.read(min(length - kept.tell(), _CHUNK)):
                kept.write(part)

    def _note_resume(self, round: int) -> None:
        """Say in the environment where the run went on, and with which versions if they are others."""
        now = environment(self.config)
        if round == 0:
            self.write_json(ENVIRONMENT, now)
            return
        before = self.json(ENVIRONMENT)
        here, there = ({**known["versions"], "Python": known["python"]} for known in (now, before))
        others = [f"{name} {version}" for name, version in here.items() if there.get(name) != version]
        if others:
            logger.warning("the run goes on with %s; numbers may differ from those at its start", ", ".join(others))
        notes = [before["resumed"]] if "resumed" in before else []
        notes.append(", ".join([f"after round {round} at {now['started']}", *others]))
        self.write_json(ENVIRONMENT, {**before, "resumed": "; ".join(notes)})

    def _known_metrics(self) -> RunMetrics:
        """Of all events so far, those before a resume among them."""
        if self._metrics is None:
            self._metrics = RunMetrics(self.config.rounds)
            for event in self.each_event():
                self._metrics.add(event)
        return self._metrics

    def _drop_cut_line(self) -> None:
        """A resumed run appends to the events of a killed one, whose last line may lack its end."""
        if not self._checked_tail and self.has(EVENTS):
            files.cut_last_line(self.path / EVENTS)
        self._checked_tail = True

    def _write_scalars(self, rows: list[ClientAccuracy]) -> None:
        with files.writing(files.make_folder(self.path / TENSORBOARD)):
            self._add_scalars(rows)

    def _add_scalars(self, rows: list[ClientAccuracy]) -> None:
        if self._board is None:
            # TensorBoard drops what it holds of the rounds that are done again.
            again = {"purge_step": self._first_round} if self._first_round > 1 else {}
            self._board = _summary_writer()(str(self.path / TENSORBOARD), **again)
        for summary in summarise(row for row in rows if row.moment == "before"):
            for column in COLUMNS:
                spread = summary.column(column)
                if spread is not None:
                    self._board.add_scalar(f"{column}/{summary.capacity}", spread.mean, rows[0].round)
        self._board.flush()


def environment(config: FrampConfig) -> dict[str, Any]:
    """Where the numbers come from: versions, platform, seed and fingerprint of the code."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: _version(name) for name in PACKAGES},
        "seed": config.seed,
        "config_digest": config.digest(),
        "fingerprint": code_fingerprint(),
    }


def _prototypes(path: Path) -> dict[str, np.ndarray]:
    """What one file holds of prototypes; its tensors are no larger than the file, which safetensors sees to."""
    with files.reading(path, files.WHOLE_LIMIT):
        pass
    try:
        found = load_numpy(path)
        shared, local = (found[f"{of}.means"].shape for of in ("global", "local"))
        counts = [found[f"{of}.classes"].shape for of in ("global", "local")]
    except (OSError, SafetensorError, *_MISFITS) as error:
        raise RunFolderError(f"{str(path)!r} holds no prototypes ({error}); restore it, or remove it") from error
    if len(shared) != 2 or counts != [shared[:1], local[:1]] or shared[1:] != local[1:]:
        raise RunFolderError(f"{str(path)!r} holds prototypes of {shared} and {local} for {counts}; restore it")
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """JSON-able copy; JSON has no NaN, and a diverged loss must not stop the run that reports it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Fraction | Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "output.tensorboard=true needs the tensorboard package, which is not installed; "
            "run `pip install tensorboard`, or set output.tensorboard=false"
        ) from error
    return SummaryWriter
