"""The Ray engine: the same numbers, failures that show, and nothing left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.kill_and_resume import lasting
from framp.engines import run_flower, run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.errors import DataError, EngineError
from framp_core.run_folder import RunFolder
from tests.server_app.runs import measured
from tests.small_graph import save_small_graph

pytestmark = pytest.mark.slow


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder for the homes of runs, short enough for Ray; fails when a process survives that has one below it."""
    assert tmp_path.is_dir()  # Made before pytest would make it below the folder that follows.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="f-") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield folder
        left = [_home_of(process) for process in psutil.process_iter() if process.pid != os.getpid()]
        assert [home for home in left if home.startswith(folder)] == []


def _home_of(process: psutil.Process) -> str:
    """Past psutil, which reads no variables behind the titles of Ray's agents."""
    try:
        variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((os.fsdecode(each[10:]) for each in variables if each.startswith(b"FLWR_HOME=")), "")


@pytest.mark.usefixtures("homes")
@pytest.mark.parametrize("kind", ["images", "graph"])
def test_ray_and_in_process_engines_give_the_same_numbers(
    tiny: Callable[..., FrampConfig], tmp_path: Path, kind: str
) -> None:
    values = save_small_graph(tmp_path / "small.npz") | {"model.dropout": 0.5} if kind == "graph" else {}
    flower = measured(run_flower(tiny({**values, "engine.workers": 2}, "flower")))
    local = measured(run_local(tiny({**values, "engine.workers": 1}, "local")))
    assert flower == local
    assert {row["kind"] for row in local} == {"start", "train", "evaluate", "priors"}


@pytest.mark.usefixtures("homes")
def test_a_run_that_fails_in_flower_raises_and_says_why(tiny: Callable[..., FrampConfig]) -> None:
    config = tiny({"generator.name": "dense", "generator.max-parameters": 10})
    with pytest.raises(EngineError, match="modulated"):
        run_flower(config)


def test_unreadable_data_are_refused_before_the_start(tiny: Callable[..., FrampConfig], tmp_path: Path) -> None:
    config = tiny({"data.name": "image-folder", "data.root": str(tmp_path / "missing")})
    with pytest.raises(DataError, match="missing"):
        run_flower(config)
    assert not Path(config.output.folder).exists()


def test_termination_stops_everything_that_was_started(tmp_path: Path, homes: str) -> None:
    code = "import sys, tempfile; tempfile.tempdir = sys.argv.pop(1); from framp.cli import main; main()"
    command = [sys.executable, "-c", code, homes, "run", "--engine", "flower", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("run/events.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert [home for home in map(_home_of, psutil.process_iter()) if home.startswith(homes)]
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"to go on: framp run --resume {tmp_path / 'run'} --engine flower" in said
    assert not list(Path(homes).iterdir())


@pytest.mark.usefixtures("homes")
def test_a_run_that_was_killed_in_process_goes_on_in_flower(
    tiny: Callable[..., FrampConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nodes have other ids then, and its clients other processes."""

    class Killed(BaseException):
        pass

    def dies(run: RunFolder, round: int, *state: object) -> None:
        original(run, round, *state)
        if round == 2:
            raise Killed

    values: dict[str, Scalar] = {"rounds": 4, "output.checkpoint-every": 1, "server.discovery-deadline": 500}
    original, config = RunFolder.write_checkpoint, tiny(values)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_checkpoint", dies)
        with pytest.raises(Killed):
            run_local(config)
    places: dict[str, Scalar] = {"output.folder": "", "output.resume": config.output.folder, "engine.workers": 2}
    resumed = run_flower(FrampConfig.from_flat({**config.to_flat(), **places}))
    assert lasting(resumed.events()) == lasting(run_local(tiny(values, "whole")).events())
    assert "after round 2" in resumed.json("environment.json")["resumed"]
