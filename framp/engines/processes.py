"""Flower's processes: started, waited for, and none left behind."""

import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from framp_core.errors import EngineError
from framp_core.foreign_text import without_colours

START_SECONDS = 60.0
STOP_SECONDS = 10.0


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(command: Sequence[str], environment: Mapping[str, str], work: Path, log: Path | None = None) -> psutil.Popen:
    """Start a process in a session of its own; what it prints goes to ``log``, or nowhere.

    Raises:
        EngineError: the program is not installed.
    """
    executable = shutil.which(command[0], path=environment["PATH"])
    if executable is None:
        raise EngineError(f"{command[0]} is not installed here; pip install 'flwr[simulation]'")
    with (log or Path(os.devnull)).open("ab") as output:
        return psutil.Popen(
            [executable, *command[1:]],
            env=dict(environment),
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def wait_until_healthy(process: psutil.Popen, url: str, log: Path, authority: Path | None = None) -> None:
    """Wait until ``GET url`` succeeds.

    Args:
        process: that serves it.
        url: of Flower's health route.
        log: of the process; its end is shown if the process does not start.
        authority: certificate that vouches for an ``https`` server.

    Raises:
        EngineError: the process ended, or did not answer within ``START_SECONDS``.
    """
    trust = ssl.create_default_context(cafile=authority) if authority else True
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=1.0, verify=trust).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise EngineError(f"Flower's {process.args[0]} did not start on {url}; its log:\n{tail(log)}")


def stop(processes: Iterable[psutil.Process], home: Path) -> None:
    """End processes and whatever was started below them, Ray's detached processes included."""
    asked, marked = list(processes), processes_of(home)
    for process in asked:
        if process.is_running():
            process.terminate()
    _, alive = psutil.wait_procs([*asked, *marked], timeout=STOP_SECONDS)
    kill([*alive, *processes_of(home)])


def kill(processes: Iterable[psutil.Process]) -> None:
    """End processes at once, without giving them a chance to say goodbye."""
    killed = list(processes)
    for process in killed:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(killed, timeout=STOP_SECONDS)


def processes_of(home: Path) -> list[psutil.Process]:
    """Processes whose environment names this home: children stay findable after their parents died."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and _lives_in(process, home):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _lives_in(process: psutil.Process, home: Path) -> bool:
    """Ray's agents write their titles over the first variables, and psutil reads none behind such a gap."""
    if psutil.LINUX:
        variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        return os.fsencode(f"FLWR_HOME={home}") in variables
    return bool(process.environ().get("FLWR_HOME") == str(home))


def tail(path: Path, lines: int = 20) -> str:
    """The end of a log, without colours."""
    try:
        return without_colours("\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]))
    except OSError:
        return "(no log was written)"
