"""Checkpoints of a run: one folder each, whole or not there at all.

======================================  ==============================================================
``round-000010/tensors.safetensors``    tensors
``round-000010/state.json``             everything else, and a SHA-256 over both
======================================  ==============================================================

A checkpoint is written below a temporary name, synced and renamed, and goes through a temporary name again when it is
removed, so that a process killed at any moment leaves whole checkpoints and leftovers that are told by their name.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from framp_core import files
from framp_core.errors import RunFolderError, WriteError

logger = logging.getLogger("flwr.framp.resume")

TENSORS = "tensors.safetensors"
STATE = "state.json"
_PREFIX = "round-"
_CHECKSUM = "sha256"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes:
        round: that round.
        tensors: by name.
        state: JSON-able values.
    """

    round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        path: their folder; made with the first of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(
        self, round: int, tensors: Mapping[str, Tensor | np.ndarray], state: Mapping[str, Any], kept: int
    ) -> None:
        """Write a checkpoint, then remove all but the newest ``kept``.

        Args:
            round: the round that has ended.
            tensors: of any device and dtype.
            state: JSON-able.
            kept: >= 1.

        Raises:
            WriteError: it cannot be written; the checkpoints before it stay, and nothing is left of it.
            RunFolderError: the folder of the checkpoints is a link, or no folder.
        """
        target = self._folder(round)
        files.make_folder(self.path)
        try:
            with files.writing(target):
                self._write(target, tensors, state)
        except WriteError:
            shutil.rmtree(_temporary_path(target), ignore_errors=True)
            raise
        for old in self.rounds()[kept:]:
            self._remove(self._folder(old))

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint, whole or damaged, the newest first; a link is none.

        Raises:
            RunFolderError: the folder of the checkpoints is a link, or no folder.
        """
        paths = self.path.glob(f"{_PREFIX}*") if files.has_folder(self.path) else ()
        found = (path.name.removeprefix(_PREFIX) for path in paths if path.is_dir() and not path.is_symlink())
        return sorted((int(name) for name in found if name.isdecimal()), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; each newer one is logged with what is wrong. None if there is none.

        Raises:
            RunFolderError: there are some, and all are damaged.
        """
        damages = []
        for round in self.rounds():
            try:
                return self._read(round)
            except (RunFolderError, OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
                damages.append(f"round {round}: {type(error).__name__}: {error}")
                logger.warning("the checkpoint of %s; trying the one before", damages[-1])
        if damages:
            raise RunFolderError(
                f"every checkpoint in {str(self.path)!r} is damaged ({'; '.join(damages)}); restore one, or start the "
                f"run again in another folder"
            )
        return None

    def state_of(self, round: int) -> Path:
        """Path of the state of a checkpoint."""
        return self._folder(round) / STATE

    def clean(self, round: int) -> None:
        """Remove what an interrupted write left, and the checkpoints after ``round``, which come again.

        Raises:
            WriteError: something cannot be removed.
        """
        for path in list(self._leftovers()):
            with files.writing(path):
                shutil.rmtree(path)
        for late in self.rounds():
            if late > round:
                self._remove(self._folder(late))

    def _folder(self, round: int) -> Path:
        return self.path / f"{_PREFIX}{round:06d}"

    def _leftovers(self) -> Iterator[Path]:
        return self.path.glob(f"{_PREFIX}*{files.LEFTOVER}")

    def _write(self, target: Path, tensors: Mapping[str, Tensor | np.ndarray], state: Mapping[str, Any]) -> None:
        temporary = _temporary_name(target)
        temporary.mkdir()
        # Cloned because safetensors refuses tensors that share memory.
        own = {name: torch.as_tensor(value).detach().cpu().clone() for name, value in tensors.items()}
        save_file(own, temporary / TENSORS)
        checksum = _checksum(temporary / TENSORS, state)
        text = json.dumps({**state, _CHECKSUM: checksum}, indent=1, allow_nan=False)
        (temporary / STATE).write_text(text + "\n", encoding="utf-8")
        for path in (temporary / TENSORS, temporary / STATE, temporary):
            files.sync(path)
        temporary.rename(target)
        files.sync(self.path)

    def _read(self, round: int) -> Checkpoint:
        folder = self._folder(round)
        files.has_folder(folder)
        state = files.read_json(folder / STATE)
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} is no object")
        if state.pop(_CHECKSUM) != _checksum(folder / TENSORS, state):
            raise ValueError(f"{TENSORS} and {STATE} are not what was written")
        return Checkpoint(round, load_file(folder / TENSORS), state)

    def _remove(self, folder: Path) -> None:
        with files.writing(folder):
            temporary = _temporary_name(folder)
            folder.rename(temporary)
            shutil.rmtree(temporary)


def _temporary_name(folder: Path) -> Path:
    """A name that no whole checkpoint has; what an earlier process left there is removed."""
    temporary = _temporary_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _temporary_path(folder: Path) -> Path:
    return folder.with_name(folder.name + files.LEFTOVER)


def _checksum(path: Path, state: Mapping[str, Any]) -> str:
    with files.reading(path) as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()
