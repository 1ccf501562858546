"""A disk that fills up, and a folder that goes, while a run works: named, nothing half-written, and the run goes on."""

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from framp.profiling import Profile
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import DataFacts, load_images
from framp_core.data.cache import cached
from framp_core.data.transforms import Normaliser
from framp_core.errors import DataError, WriteError
from framp_core.models import FlatModel, build_model
from framp_core.personal_model import PersonalModel, save
from framp_core.prototypes import Prototypes
from framp_core.report import finish, write_report
from framp_core.run_folder import RunFolder
from framp_core.run_log import run_log
from tests.framp.test_cli import fails
from tests.framp_core.test_files import no_file_beyond
from tests.framp_core.test_report import synthetic_run
from tests.server_app.test_operations import run_with
from tests.server_app.test_resume import assert_equal, resumed

Build = Callable[..., FrampConfig]
PROTOTYPES = Prototypes(np.arange(2), np.ones(2, np.int64), np.ones((2, 3), np.float32))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.app.write_report", lambda path: None)


def a_personal_model(run: RunFolder) -> None:
    config, facts = FrampConfig().model, DataFacts((1, 8, 8), ("a", "b"), Normaliser((0.5,), (0.5,)))
    network = FlatModel(build_model(config, facts.shape, 2))
    mask = np.ones(network.layout.size, dtype=np.bool_)
    save(PersonalModel(network, mask, torch.zeros(2), 1.0, facts, 1, {}, {}), config, run.path / "model")  # type: ignore[arg-type]


def a_trace(run: RunFolder) -> None:
    profile = Profile(start=0, end=1, marks={1: []})
    profile.to_json = lambda: {}  # type: ignore[method-assign]
    run.path.joinpath("profile.json").unlink(missing_ok=True)
    profile.write(run, trace=True)


def a_board(run: RunFolder) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run._board = SimpleNamespace(add_scalar=full, flush=full)
    run._write_scalars([])


WRITES: dict[str, tuple[str, Callable[[RunFolder], object]]] = {
    "events": ("events.jsonl", lambda run: run.event("train", 7, clients=[], note="x" * 99)),
    "metrics": ("metrics.prom", lambda run: run._known_metrics().write(run.path / "metrics.prom")),
    "JSON": ("masks.json", lambda run: run.write_json("masks.json", {"a": "x" * 99})),
    "clients": ("clients.csv", finish),
    "checkpoint": ("round-000007", lambda run: run.write_checkpoint(7, {"theta": torch.ones(99)}, {})),
    "state": ("round-000007", lambda run: run.write_checkpoint(7, {}, {"a": "x" * 99})),
    "prototypes": ("round-000002.safetensors", lambda run: run.write_prototypes(2, PROTOTYPES, {"a": PROTOTYPES})),
    "resume": ("events.jsonl", lambda run: run.rewind(6, (run.path / "events.jsonl").stat().st_size)),
    "report": ("accuracy_by_size.png", lambda run: write_report(run.path)),
    "trace": ("trace.json", a_trace),
    "TensorBoard": ("tensorboard", a_board),
    "personal model": ("model", a_personal_model),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_named_and_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    run = synthetic_run(tmp_path / "run", rounds=6)
    run.write_checkpoint(6, {}, {})
    run = RunFolder.open(run.path)
    file, write = WRITES[name]
    before = contents(run.path)
    limit = {"trace": 25, "state": 60}.get(name, 5)  # Bytes: profile.json holds {}, and no tensors take 16.
    with no_file_beyond(limit), pytest.raises(WriteError, match=rf"{file}' cannot be written") as error, run.going_on():
        write(run)
    assert "the checkpoint of round 6 was saved last; once the folder can be written" in str(error.value)
    assert str(error.value).endswith(f"framp run --resume {run.path}")
    after = contents(run.path)
    after.pop("profile.json", None)
    assert after == before


def test_a_finished_run_says_how_its_report_comes(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "my run")
    finish(run)
    with (
        no_file_beyond(5),
        pytest.raises(WriteError, match=rf"is finished.*framp report '{run.path}'$"),
        run.going_on(),
    ):
        write_report(run.path)
    assert not (run.path / "report.html").exists()
    write_report(run.path)


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    import logging

    path = tmp_path / "log.jsonl"
    with run_log(path):
        length = path.stat().st_size
        with no_file_beyond(length + 20):
            logging.getLogger("flwr.framp").warning("%s", "x" * 99)
        assert path.stat().st_size == length
        logging.getLogger("flwr.framp").warning("room again")
    assert "room again" in path.read_text()


@pytest.mark.parametrize("call", range(1, 7))
def test_a_run_on_a_full_disk_goes_on_with_the_same_numbers(tiny: Build, call: int) -> None:
    """The disk is full from one of the six exchanges of three rounds on, until room is made."""
    config = tiny({"rounds": 3, "output.checkpoint-every": 1})
    folder, hard = Path(config.output.folder), resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fills_up(now: int) -> None:
        if now == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))

    try:
        with pytest.raises(WriteError, match=r"cannot be written \(.*File too large") as error:
            run_with(config, look=fills_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if hard == -1 else hard, hard))
    saved = (call - 1) // 2
    expected = f"the checkpoint of round {saved} was saved last" if saved else "no checkpoint was saved yet"
    assert expected in str(error.value)
    assert not list(folder.rglob("*.tmp"))
    assert (folder / "events.jsonl").read_bytes().endswith(b"\n") if call > 1 else True
    assert_equal(run_with(resumed(config)), run_with(tiny({"rounds": 3, "output.checkpoint-every": 1}, "whole")))


@pytest.mark.parametrize("call", [2, 5])
def test_a_folder_that_goes_in_the_middle_is_named(tiny: Build, call: int) -> None:
    config = tiny({"rounds": 3, "output.checkpoint-every": 1})
    folder = Path(config.output.folder)
    with pytest.raises(WriteError, match=r"cannot be written .*the run folder is gone; start the run again"):
        run_with(config, look=lambda now: shutil.rmtree(folder) if now == call else None)
    assert not folder.exists()


def test_a_folder_that_becomes_read_only_in_the_middle_is_named(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny({"rounds": 3, "output.checkpoint-every": 1})
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if str(path).startswith(config.output.folder) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *rest, **named)

    def turns(now: int) -> None:
        if now == 4:
            monkeypatch.setattr(os, "open", read_only)

    with pytest.raises(WriteError, match=r"Read-only file system\); the checkpoint of round 1 was saved last"):
        run_with(config, look=turns)
    monkeypatch.undo()


def test_the_command_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As under ``ulimit -f 64``: the first checkpoint, of some 100 kB, does not fit."""
    options: dict[str, Scalar] = {"rounds": 1, "partition.clients": 3, "partition.unseen-clients": 0, "local.steps": 1}
    options["data.cache"] = str(tmp_path / "cache")
    given = [text for key, value in options.items() for text in ("-o", f"{key}={value}")]
    load_images(FrampConfig.from_flat(options).data, 0)  # Decoded before the disk is full.
    with no_file_beyond(2**16):
        said = fails(monkeypatch, capfd, "run", *given, "--out", str(tmp_path / "run"))
    assert said.startswith("WriteError: ")
    assert said.endswith(f"framp run --resume {tmp_path / 'run'}")


def test_a_cache_on_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        np.save(folder / "images.npy", np.zeros(1000))

    with no_file_beyond(100), pytest.raises(DataError, match=r"cache folder .* cannot be written"):
        cached(str(tmp_path), {"a": 1}, build)
    assert [path.suffix for path in tmp_path.iterdir()] in ([".lock"], [])
    assert np.load(cached(str(tmp_path), {"a": 1}, build) / "images.npy").shape == (1000,)
