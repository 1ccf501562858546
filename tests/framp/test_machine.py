"""The machine as people have it: encodings, closed streams, signals, systems, temporary folders."""

import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from framp import cli, run_local
from framp.engines import flower, processes
from framp.interruption import end_on_signals, saying
from framp.status import RunStatus, resume_command
from framp_core.config import FrampConfig
from framp_core.errors import EngineError
from framp_core.run_folder import ENVIRONMENT, RunFolder
from tests.framp.test_cli import options

Build = Callable[..., FrampConfig]


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: str) -> tuple[object, bytes, bytes]:
    """Exit status, output and errors of the command on streams of this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with monkeypatch.context() as machine:
        machine.setattr(sys, "argv", ["framp", *arguments])
        machine.setattr(sys, "stdout", streams[0])
        machine.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as end:
            cli.main()
    for stream in streams:
        stream.seek(0)
    out, errors = (stream.buffer.read() for stream in streams)
    return end.value.code, out, errors


def shows(title: str, encoding: str) -> list[str]:
    """The command in place of one that looks at data or runs: it prints a table, in no time."""
    code = f"from framp import cli; cli.app = lambda: cli._show_rows({title!r}, {{'±': '猫 …'}}); cli.main()"
    return ["env", f"PYTHONIOENCODING={encoding}", sys.executable, "-c", code]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with a name that few encodings hold and that rich could take for markup."""
    folder = RunFolder.create(tmp_path / "run [b] 猫", FrampConfig.from_flat({"rounds": 3}))
    folder.event("train", 1, seconds=1.0, loss=1.0, clients=[], refused=[])
    return folder.path


def test_a_run_shows_in_ascii(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, errors = printed(monkeypatch, "ascii", "status", str(run_folder))
    assert status == 0, errors
    assert b"run [b] ?" in out
    assert b"| round" in out


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "| ? | ? . |"), ("latin-1", "| \xb1 | ? . |"), ("cp932", "| ± | 猫 … |"), ("utf-8", "│ ± │ 猫 … │")],
)
def test_what_an_encoding_lacks_is_printed_in_its_place(encoding: str, shown: str) -> None:
    done = subprocess.run(shows("x [b]", encoding), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert shown.replace(" ", "") in done.stdout.decode(encoding).replace(" ", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "cp1252"])
def test_a_difference_keeps_its_sign(encoding: str) -> None:
    code = (
        "from framp.terminal import *; from framp.compare.tables import points; prepare_streams()\n"
        "Terminal().say(f'{points(-0.014)} {points(0.014)} 猫')"
    )
    done = subprocess.run(
        ["env", f"PYTHONIOENCODING={encoding}", sys.executable, "-c", code], capture_output=True, check=True
    )
    assert done.stdout.decode(encoding).translate({ord("猫"): "?", ord("－"): "-"}) == "-1.4 +1.4 ?\n"


def test_an_error_names_a_path_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, errors = printed(monkeypatch, "ascii", "status", str(tmp_path / "猫 [b]"))
    assert status == 1
    assert errors.startswith(b"RunFolderError: ")
    assert "猫".encode("ascii", "replace") + b" [b]" in errors


@pytest.mark.parametrize(
    ("redirection", "status"),
    [(">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), ("| true; exit ${PIPESTATUS[0]}", 0), (">/dev/full", 1)],
)
def test_who_reads_along_does_not_decide_how_it_ends(redirection: str, status: int) -> None:
    words = shlex.join(shows("x" * 100_000, "utf-8"))
    done = subprocess.run(["bash", "-c", f"{words} {redirection}"], capture_output=True, check=False)
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr
    assert (b"No space left" in done.stderr) == bool(status)


@pytest.mark.parametrize(("prepare", "first"), [("prepare_streams()", 3), ("None", 0)])
def test_a_closed_stream_is_not_the_number_of_a_later_file(prepare: str, first: int) -> None:
    code = f"from framp.terminal import *; {prepare}; sys.exit(os.open(os.devnull, os.O_RDONLY))"
    words = shlex.join([sys.executable, "-c", f"import os, sys; {code}"])
    assert subprocess.run(["bash", "-c", f"{words} <&- >&- 2>&-"], check=False).returncode == first


def test_a_report_names_a_path_with_brackets_whole(run_folder: Path) -> None:
    result = CliRunner().invoke(cli.app, ["report", str(run_folder)])
    assert result.exit_code == 0, result.output
    assert f"report: {run_folder / 'report.html'}" in result.output


# --- signals ----------------------------------------------------------------------------------------------------


@contextmanager
def started(folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A long run in two worker processes, after its first checkpoint; it ends with the test, whatever comes of that."""
    values = ["-o", "rounds=100000", "-o", "output.checkpoint-every=1", "--workers", "2"]
    command = [sys.executable, "-m", "framp", "run", "--out", str(folder), *options(tmp_path), *values]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600  # Three processes start, on a machine that may be busy.
    try:
        while not list(folder.glob("checkpoints/round-*[0-9]")) and process.poll() is None:
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.1)
        yield process
    finally:
        process.kill()  # Its workers end by themselves.
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_signal_stops_the_workers_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "my run"
    with started(folder, tmp_path) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert psutil.wait_procs(children, timeout=30)[1] == []
    status = RunStatus.of(folder)
    assert (str(status.state), status.resume) == ("interrupted", f"framp run --resume '{folder}'")
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert (
            f"round {status.round} of 100000 is done; checkpoints: the newest is of round {status.checkpoint}" in said
        )
        assert f"to go on: {status.resume}" in said
        assert "Traceback" not in said


@pytest.mark.parametrize(("apart", "status"), [(0, 128 + signal.SIGHUP), (3600, 128 + signal.SIGTERM)])
def test_a_second_signal_ends_at_once_and_two_together_are_one(apart: int, status: int) -> None:
    """Signals count as one up to ``apart`` seconds; then the first goes on stopping, which here waits for a line."""
    code = (
        f"from framp import interruption; interruption._SAME_SECONDS = {apart}; interruption.end_on_signals()\n"
        "import sys, time\n"
        "try: print(1, flush=True); time.sleep(600)\n"
        "finally: print(2, flush=True); sys.stdin.readline()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "2\n"
        process.send_signal(signal.SIGHUP)
        if apart:
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.wait(60) == status


def test_nohup_holds() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_on_signals()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143


def test_how_to_go_on_is_said_at_signals_alone(capfd: pytest.CaptureFixture[str]) -> None:
    for error, said in ((SystemExit(143), "go on\n"), (KeyboardInterrupt(), "go on\n"), (ValueError(), "")):
        with pytest.raises(type(error)), saying(lambda: "go on"):
            raise error
        assert capfd.readouterr().err == said


# --- the command that goes on -----------------------------------------------------------------------------------


def test_the_command_that_goes_on_fits_what_carried_the_messages(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.app.write_report", lambda path: None)
    run = run_local(tiny())
    assert run.json(ENVIRONMENT)["grid"] == "InProcessGrid"
    plain = f"framp run --resume {run.path}"
    for grid, nodes, command in (
        ("InProcessGrid", 5, plain),
        ("InProcessGrid", 0, plain),
        ("InMemoryGrid", 5, f"{plain} --engine flower"),
        ("InMemoryGrid", 2, "flwr run . --stream --federation-config 'num-supernodes=2 client-resources-num-cpus=1'"),
        ("HttpGrid", 5, "flwr run . FEDERATION --stream --run-config"),
    ):
        run.write_json(ENVIRONMENT, {**run.json(ENVIRONMENT), "grid": grid})
        found = resume_command(run, nodes)
        assert found == command if command.startswith("framp") else found.startswith(command)
    # Flower's own reader gets the run's settings back, on top of the app's defaults.
    given = parse_config_args([shlex.split(found)[-1]])
    config = FrampConfig.from_flat({**FrampConfig().to_flat(), **given})
    assert config.differences(run.config.to_flat()) == []
    assert (config.output.resume, config.output.folder) == (str(run.path), "")


# --- systems and temporary folders ------------------------------------------------------------------------------


def test_windows_is_told_where_it_works() -> None:
    code = (
        "import signal, sys, framp.cli\n"
        "assert 'torch' not in sys.modules\n"
        "del signal.SIGHUP; sys.platform = 'win32'; framp.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "WSL" in done.stderr


@pytest.mark.parametrize("name", ["x" * 60, "ä", "missing/folder", "."])
def test_rays_sockets_have_a_short_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).mkdir(exist_ok=True) if "missing" not in name else None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    home = flower._home()
    try:
        socket = f"{home}/ray/session_2026-11-30_08-23-19_330895_4194304/sockets/plasma_store"
        assert socket.isascii()
        assert len(socket) <= 103
        assert flower.flower_environment(home)["RAY_TMPDIR"] == str(home)
    finally:
        home.rmdir()


@pytest.mark.skipif(not psutil.LINUX, reason="a gap in /proc/PID/environ")
def test_processes_that_write_over_their_variables_are_found_and_stopped(tmp_path: Path) -> None:
    """As Ray's agents do, for their titles."""
    code = (
        "import ctypes, time\n"
        "ctypes.memset(ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), 'environ')[0], 0, 10)\n"
        "print(1, flush=True); time.sleep(60)"
    )
    variables = {"FIRST": "x" * 20, **os.environ, "FLWR_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        other, found = processes.processes_of(tmp_path / "other"), processes.processes_of(tmp_path)
        processes.kill(found)
        process.kill()
    assert (other, [each.pid for each in found]) == ([], [process.pid])


def test_no_folder_for_rays_sockets_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch, tiny: Build) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    config = tiny()
    with pytest.raises(EngineError, match="Set TMPDIR"):
        flower.run_flower(config)
    assert not Path(config.output.folder).exists()


def test_a_crash_of_the_simulation_names_its_cause(tmp_path: Path) -> None:
    cause = "OSError: validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /t/x"
    log = tmp_path / "flower.log"
    trace = "Traceback (most recent call last):\n  File\n"
    log.write_text(f"{trace}{cause}\n\n{trace}RuntimeError: Simulation crashed.\nERROR: Exit Code: 700\n")
    assert flower._reason(log).splitlines()[1:] == [cause, "RuntimeError: Simulation crashed."]
    log.write_text("nothing\n")
    assert "the end of its log" in flower._reason(log)
