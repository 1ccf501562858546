"""Going on with a run: what a checkpoint must have in common with the code and the settings that read it."""

import hashlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framp_core.checkpoints import Checkpoint
from framp_core.commands import framp_command
from framp_core.config import FrampConfig
from framp_core.errors import ResumeError
from framp_core.fingerprint import RUN_PACKAGES, code_files
from framp_core.run_folder import SUMMARY, RunFolder

logger = logging.getLogger("flwr.framp.resume")
_NAMED = 5
"""Changed files that a refusal names; it counts the others."""


def origin(config: FrampConfig, strategy: type) -> dict[str, Any]:
    """What a checkpoint comes from: the strategy, all code that numbers depend on, and the configuration."""
    return {
        "strategy": f"{strategy.__module__}.{strategy.__qualname__}",
        "code": {**code_files(), **_own_files(strategy)},
        "config": config.to_flat(),
    }


def checkpoint_of(run: RunFolder, config: FrampConfig, strategy: type) -> Checkpoint | None:
    """The checkpoint from which a run goes on; None if it stopped before the first one.

    Changes nothing. What the clients work on is compared once they have told, see
    :meth:`server_app.strategies.SubmodelStrategy.resume`.

    Raises:
        ResumeError: the run is finished, or its checkpoint is of other settings or other code.
        RunFolderError: every checkpoint is damaged.
    """
    if run.has(SUMMARY):
        raise ResumeError(
            f"the run in {str(run.path)!r} is finished; {framp_command('report', run.path)} shows its results, and "
            f"more rounds are another run"
        )
    found = run.newest_checkpoint()
    started_with = found.state["config"] if found else RunFolder.open(run.path).config.to_flat()
    _refuse(run, "settings", config.differences(started_with))
    if found is None:
        logger.warning("the run in %s stopped before its first checkpoint; it starts again with round 1", run.path)
        return None
    now = origin(config, strategy)
    names = [found.state["strategy"], now["strategy"]]
    _refuse(run, "code", [f"the strategy is {names[0]} there and {names[1]} here"] if names[0] != names[1] else [])
    _refuse(run, "code", _changed(found.state["code"], now["code"]))
    return found


def _refuse(run: RunFolder, what: str, differences: list[str]) -> None:
    if differences:
        raise ResumeError(
            f"the checkpoint in {str(run.path)!r} is of other {what}: {'; '.join(differences)}. Go on with the {what} "
            f"that wrote it, or start a new run"
        )


def _changed(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    files = [file for file in sorted({**there, **here}) if there.get(file) != here.get(file)]
    more = [f"and {len(files) - _NAMED} more files"] if len(files) > _NAMED else []
    return [f"{file} {_how(file, there, here)}" for file in files[:_NAMED]] + more


def _how(file: str, there: Mapping[str, str], here: Mapping[str, str]) -> str:
    if file not in there:
        return "was added"
    return "has changed" if file in here else "is gone"


def _own_files(strategy: type) -> dict[str, str]:
    """SHA-256 of the files of a strategy, and of those that it extends, which lie outside of this project."""
    modules = {ancestor.__module__ for ancestor in strategy.__mro__}
    foreign = sorted(
        name for name in modules if name.partition(".")[0] not in (*RUN_PACKAGES, "flwr", "abc", "builtins")
    )
    paths = {name: getattr(sys.modules.get(name), "__file__", None) for name in foreign}
    return {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in paths.items() if path}
