"""A real federation on the loopback interface, started with the commands of the compose files.

Docker Compose reads the files and fills in their variables (``docker-compose config``, which needs no daemon); here the
services' commands run as processes, with the places and host names of containers exchanged for those of this machine.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from framp import node
from framp.engines.flower import flower_environment
from framp.engines.processes import free_port, kill, processes_of, start, stop, tail
from framp_core.config import FrampConfig
from framp_core.run_folder import SUMMARY

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
START_SECONDS = 120.0


def composed(file: str, variables: Mapping[str, str], *more: str) -> dict[str, Any]:
    """What Docker Compose makes of the files: every service with its variables filled in."""
    command = ["docker-compose", "--profile", "*"]
    for name in (file, *more):
        command += ["--file", str(DOCKER / name)]
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [*command, "config", "--format", "json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr  # Its wrapper exits with 0 whatever happened.
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def exchanged(words: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """A command with the places of a container exchanged for ours, the longest first."""
    longest_first = sorted(places, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)")
    return [pattern.sub(lambda found: places[found.group()], word) for word in words]


@dataclass
class Role:
    """One service of a compose file as a process."""

    command: list[str]
    healthcheck: list[str]
    home: Path
    environment: dict[str, str]
    process: psutil.Popen | None = None

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.home / f"{self.command[0]}.log"

    def start(self) -> None:
        """Start, or start again."""
        self.process = start(self.command, self.environment, self.home, self.log)

    def stop(self) -> None:
        """End it the way a service is ended."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(START_SECONDS)

    def is_healthy(self) -> bool:
        """Run the health check of the compose file."""
        done = subprocess.run(self.healthcheck, env=self.environment, capture_output=True, check=False)
        return done.returncode == 0


def wait_until(condition: Any, what: str, role: Role | None = None, seconds: float = START_SECONDS) -> None:
    """Wait for a condition; fail with the end of the role's log."""
    deadline = time.monotonic() + seconds
    while not condition():
        log = f"; the end of its log:\n{tail(role.log)}" if role else ""
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s{log}"
        time.sleep(0.1)


@dataclass
class Device:
    """A SuperNode and, where it is not the SuperNode's own child, the process that runs its ClientApp."""

    name: str
    home: Path
    node_config: dict[str, Any]
    roles: list[Role]
    frozen: list[psutil.Process] = field(default_factory=list)

    def start(self) -> None:
        """Start everything that belongs to it."""
        for role in self.roles:
            role.start()

    def restart(self) -> None:
        """What ``restart: unless-stopped`` does: start again what has ended, and whoever depends on it."""
        for role in self.roles:
            if role.process is None or role.process.poll() is not None:
                role.start()

    def kill(self) -> None:
        """Like a power cut: nothing says goodbye."""
        kill(processes_of(self.home))

    def freeze(self) -> None:
        """Like a machine that hangs: everything on it stops, and every connection stays open."""
        self.frozen = processes_of(self.home)
        for process in self.frozen:
            process.suspend()

    def thaw(self) -> None:
        """Let it go on."""
        for process in self.frozen:
            process.resume()

    def trains(self, run_id: int) -> bool:
        """Whether it works on the first round of a run now."""
        return f"RUN {run_id}, ROUND 1]" in self.roles[0].log.read_text() and bool(self.working())

    def working(self) -> list[psutil.Process]:
        """The processes that run a ClientApp now."""
        found = []
        for process in processes_of(self.home):
            try:
                if any(word.endswith("flwr-clientapp") for word in process.cmdline()[:3]):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@dataclass
class Federation:
    """SuperLink, ServerApp and devices; build it with :func:`federation`."""

    home: Path
    address: str
    gateway: bool
    environment: dict[str, str]
    devices: list[Device] = field(default_factory=list)

    def flwr(self, *arguments: str) -> str:
        """Run the operator's command."""
        done = subprocess.run(
            ["flwr", *arguments], env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"flwr {arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, config: FrampConfig) -> int:
        """Submit a run; return its id."""
        file = self.home / f"{Path(config.output.folder).name}.toml"
        file.write_text(config.to_toml(), encoding="utf-8")
        answer = self.flwr("run", str(ROOT), "framp", "--run-config", str(file), "--format", "json")
        return int(json.loads(answer)["run-id"])

    def status(self, run_id: int) -> str:
        """How a run stands, such as ``finished:completed``."""
        answer = self.flwr("ls", "framp", "--run-id", str(run_id), "--format", "json")
        return str(json.loads(answer)["runs"][0]["status"])

    def wait(self, run_id: int, config: FrampConfig, seconds: float) -> str:
        """Wait for the end of a run; return how it ended.

        The summary that a run ends with is looked for more often than Flower is asked, whose command takes seconds.
        """
        summary, deadline, ask_at = Path(config.output.folder) / SUMMARY, time.monotonic() + seconds, 0.0
        while True:
            if summary.exists() or time.monotonic() > ask_at:
                ask_at = time.monotonic() + 20.0
                if (status := self.status(run_id)).startswith("finished"):
                    return status
            assert time.monotonic() < deadline, f"run {run_id} goes on after {seconds:g} s"
            time.sleep(0.5)


@contextmanager
def federation(home: Path, capacities: Sequence[str]) -> Iterator[Federation]:
    """Start one, with a device for each capacity; stop everything at the end.

    The first device is started with the command that ``framp node`` prints, the others with their compose file's.
    Devices go through the gateway where nginx is installed, and to the SuperLink where it is not.
    """
    secrets = home / "secrets"
    subprocess.run([DOCKER / "certificates.sh", secrets, "127.0.0.1"], check=True, capture_output=True)
    roles = _server(home, secrets)
    devices: list[Device] = []
    try:
        for name in ("superlink", "serverapp", *(["gateway"] if "gateway" in roles else [])):
            roles[name].start()
            wait_until(roles[name].is_healthy, f"health of {name}", roles[name])
        outside = _address(roles.get("gateway") or roles["superlink"])
        running = Federation(home, outside, "gateway" in roles, roles["operator"].environment)
        for index, capacity in enumerate(capacities):
            devices.append(_device(running, secrets, index, len(capacities), capacity))
            devices[-1].start()
        running.devices = devices
        for device in devices:
            wait_until(device.roles[0].is_healthy, f"health of {device.name}", device.roles[0])
        yield running
    finally:
        for device in devices:
            stop(_started(*device.roles), device.home)
        stop(_started(*roles.values()), home / "server")


def _started(*roles: Role) -> list[psutil.Popen]:
    return [role.process for role in roles if role.process is not None]


def _address(role: Role) -> str:
    """Host and port that a role's health check asks."""
    url = next(word for word in role.healthcheck if "://" in word)
    return url.partition("://")[2].partition("/")[0].replace("localhost", "127.0.0.1")


def _server(home: Path, secrets: Path) -> dict[str, Role]:
    folder = home / "server"
    (folder / "state").mkdir(parents=True)
    composition = composed("server.compose.yml", {"FRAMP_SECRETS": str(secrets)})
    superlink, gateway, superexec = (f"127.0.0.1:{free_port()}" for _ in range(3))
    places = {
        **_secrets(composition),
        "superlink:8000": superlink,
        "localhost:8000": superlink,
        "localhost:8443": gateway,
        "127.0.0.1:9400": superexec,
        "0.0.0.0": "127.0.0.1",
        "8000": superlink.rpartition(":")[2],
        "/state": str(folder / "state"),
        "/opt/framp": str(DOCKER),
        "/etc/nginx/gateway.conf": str(folder / "gateway.conf"),
    }
    inside = {**places, "8443": gateway.rpartition(":")[2], "/tmp": str(folder)}
    (folder / "gateway.conf").write_text("\n".join(exchanged([(DOCKER / "gateway.conf").read_text()], inside)))
    (folder / "config.toml").write_text("\n".join(exchanged([(DOCKER / "flwr.toml").read_text()], places)))
    services = dict(composition["services"])
    if shutil.which("nginx") is None:
        del services["gateway"]
    return {name: _role(service, folder, places) for name, service in services.items()}


def _device(running: Federation, secrets: Path, index: int, devices: int, capacity: str) -> Device:
    name, folder = f"site-{index}", running.home / f"site-{index}"
    (folder / "data").mkdir(parents=True)
    key = folder / "node.key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", key], check=True)
    (folder / "superexec.secret").write_text(f"known to {name} alone, {os.urandom(16).hex()}")
    shutil.copy(secrets / "ca.crt", folder)
    running.flwr("supernode", "register", str(key.with_suffix(".key.pub")), "framp", "--name", name)
    variables = {
        "FRAMP_SECRETS": str(folder),
        "FRAMP_SUPERLINK": running.address,
        "FRAMP_PARTITION": str(index),
        "FRAMP_PARTITIONS": str(devices),
        "FRAMP_CLIENT": name,
        "FRAMP_CAPACITY": capacity,
        "FRAMP_DATA": str(folder / "data"),
    }
    composition = composed("client.compose.yml", variables)
    supernode, superexec = (f"127.0.0.1:{free_port()}" for _ in range(2))
    places = {
        **_secrets(composition),
        "supernode:9094": supernode,
        "localhost:9094": supernode,
        "127.0.0.1:9400": superexec,
        "0.0.0.0": "127.0.0.1",
        "9094": supernode.rpartition(":")[2],
        "/opt/framp": str(DOCKER),
        "'/data'": f"'{folder / 'data'}'",
    }
    roles = [_role(service, folder, places) for _, service in sorted(composition["services"].items(), reverse=True)]
    described = node.Device(running.address, folder / "ca.crt", key, index, devices, name, capacity, folder / "data")
    if index == 0:
        roles[0].command = [*shlex.split(described.command), "--port", supernode.rpartition(":")[2]]
        roles.pop()
    return Device(name, folder, described.node_config, roles)


def _secrets(composition: Mapping[str, Any]) -> dict[str, str]:
    return {f"/run/secrets/{name}": secret["file"] for name, secret in composition["secrets"].items()}


def _role(service: Mapping[str, Any], home: Path, places: Mapping[str, str]) -> Role:
    environment = flower_environment(home)
    environment.pop("PYTHONPATH", None)
    check = service.get("healthcheck", {}).get("test", ["CMD"])
    assert check[0] == "CMD", f"{check}: the form that starts no shell"
    return Role(exchanged(service["command"], places), exchanged(check[1:], places), home, environment)
