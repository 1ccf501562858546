"""Checks a device before it joins a federation, and says how to start its SuperNode."""

import importlib.metadata
import json
import platform
import resource
import shlex
import ssl
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path

import httpx
import psutil
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ArrayRecord
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from packaging.requirements import Requirement

from client_app.app import app as client_app
from client_app.client import Client
from framp.engines.in_process import InProcessGrid
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar, parse_capacity
from framp_core.errors import ConfigError, DataError, EngineError, FrampError
from framp_core.fingerprint import code_fingerprint
from framp_core.report.tables import human_bytes
from framp_core.run_folder import RunFolder
from server_app.strategies import STRATEGIES

_REACH_SECONDS = 10.0
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Device:
    """A device and the federation that it is to join.

    Attributes:
        superlink: ``HOST:PORT`` under which the device reaches the server.
        authority: certificate that vouches for the server's; None trusts those of the system.
        key: the SuperNode's private key; its public half is registered at the SuperLink.
        partition: the client's index, in [0, ``partitions``).
        partitions: number of clients of the federation.
        name: stable name of the client; it stays the same over restarts, new keys and new devices.
        capacity: gamma, such as ``1/16``.
        data: folder of the data on this device (a graph-file: the file).

    Raises:
        ConfigError: the capacity is none, or the name holds a quotation mark or nothing.
    """

    superlink: str
    authority: Path | None
    key: Path
    partition: int
    partitions: int
    name: str
    capacity: str
    data: Path

    def __post_init__(self) -> None:
        parse_capacity(self.capacity)
        if not self.name or set(self.name) & set("'\"\n"):
            raise ConfigError(f"the client's name {self.name!r} must not be empty or hold quotation marks")

    @property
    def node_config(self) -> dict[str, Scalar]:
        """What the ClientApp gets to know as ``Context.node_config``."""
        return {
            "partition-id": self.partition,
            "num-partitions": self.partitions,
            "client-name": self.name,
            "capacity": self.capacity,
            "data-dir": str(self.data),
        }

    @property
    def command(self) -> str:
        """The command, for a shell, that starts the SuperNode with its ClientApp in processes of its own."""
        texts = (f"{key}={json.dumps(value)}" for key, value in self.node_config.items())
        trust = [] if self.authority is None else ["--root-certificates", str(self.authority)]
        words = ["flower-supernode", "--superlink", self.superlink, *trust]
        words += ["--auth-supernode-private-key", str(self.key), "--node-config", " ".join(texts)]
        return shlex.join(words)


@dataclass(frozen=True)
class Finding:
    """Result of one check: what was found, or what is wrong and what to do about it."""

    check: str
    passed: bool
    said: str


class DeviceCheck:
    """The checks of one device.

    Args:
        config: what the federation is to run.
        device: this device.
    """

    def __init__(self, config: FrampConfig, device: Device) -> None:
        self._config = config
        self._device = device
        self._peak = 0
        self._answered_at = 0.0

    @property
    def peak_bytes(self) -> int:
        """Resident memory that the client's process took in its round; 0 before it was measured."""
        return self._peak

    def findings(self) -> list[Finding]:
        """Run all checks, those after a failed one too."""
        checks: dict[str, Callable[[], str]] = {
            "versions": versions,
            "data": self.data,
            "memory": self.memory,
            "key": self.key,
            "server": self.server,
            "clock": self.clock,
        }
        found = []
        for name, check in checks.items():
            try:
                found.append(Finding(name, True, check()))
            except FrampError as error:
                found.append(Finding(name, False, str(error)))
        return found

    def data(self) -> str:
        """Read the client's data as its ClientApp will.

        Raises:
            DataError, ConfigError: they cannot be read, or are not what the configuration says.
        """
        data = self._client.data
        classes = int((data.class_counts() > 0).sum())
        sizes = f"{len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test examples"
        return f"{sizes}; {classes} of {data.classes} classes; partition {data.partition_digest[:12]}"

    def memory(self) -> str:
        """Let the client describe its data, train and evaluate once in a process of its own, and look at its peak.

        The server of that round works in this process and does not count. GPU memory is not looked at.

        Raises:
            EngineError: the process took more than there is, or there are no data to train on.
        """
        if self._role() == "unseen":
            return "not measured: this client is evaluated and never trains"
        free = available_memory()
        self._round()
        unit = 1 if sys.platform == "darwin" else 1024
        self._peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
        said = f"a round at capacity {self._device.capacity} took {human_bytes(self._peak)} of {human_bytes(free)} free"
        if self._peak > free:
            raise EngineError(
                f"{said}; free memory, or choose a smaller model. A smaller capacity sends less, and needs less memory "
                f"only with a method of thinner networks (heterofl, fedrolex)"
            )
        return said

    def key(self) -> str:
        """Read the SuperNode's private key.

        Raises:
            ConfigError: it is missing, readable by others, or of a kind that Flower refuses.
        """
        path = self._device.key
        advice = f"make one with: ssh-keygen -t ecdsa -b 384 -N '' -C '' -f {path}"
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            key = load_ssh_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise ConfigError(f"the private key {str(path)!r} cannot be read: {error.strerror}; {advice}") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{str(path)!r} is no private key without a password: {error}; {advice}") from error
        if not isinstance(key, EllipticCurvePrivateKey):
            raise ConfigError(f"{str(path)!r} is of a kind that Flower refuses; {advice}")
        if mode & 0o077:
            raise ConfigError(f"others can read {str(path)!r} (mode {mode:o}); chmod 600 {path}")
        return f"{key.curve.name}; the operator registers {path}.pub"

    def server(self) -> str:
        """Reach the server and check its certificate.

        Raises:
            EngineError: no connection, another certificate, or no healthy SuperLink behind it.
        """
        return f"{self._answer.url} answers in {1e3 * self._answer.elapsed.total_seconds():.0f} ms"

    def clock(self) -> str:
        """Compare the clocks; Flower refuses a signature from too far ahead or behind.

        Raises:
            EngineError: the server did not answer, or the clocks differ by too much.
        """
        try:
            sent = self._answer.headers["date"]
        except (EngineError, KeyError) as error:
            raise EngineError("not compared: the server did not say its time") from error
        ahead = self._answered_at - parsedate_to_datetime(sent).timestamp()
        behind_limit = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
        # The server's time is in whole seconds.
        way = "ahead of" if ahead > 0 else "behind"
        said = "within a second of the server" if abs(ahead) <= 1 else f"{abs(ahead):.0f} s {way} the server"
        if not -behind_limit < ahead < SYSTEM_TIME_TOLERANCE + 1:
            limits = f"{SYSTEM_TIME_TOLERANCE} s ahead or {behind_limit} s behind"
            raise EngineError(f"{said}; Flower refuses a device more than {limits}. Set the clock, best by NTP")
        return said

    def _role(self) -> str:
        try:
            return self._client.data.role
        except FrampError as error:
            raise EngineError("not measured: the data cannot be read") from error

    @cached_property
    def _client(self) -> Client:
        if not self._device.data.exists():
            raise DataError(f"there is no {str(self._device.data)!r}; --data-dir is where the data lie on this device")
        return Client.of(self._config.to_flat(), self._device.node_config, {})

    @cached_property
    def _answer(self) -> httpx.Response:
        url = f"https://{self._device.superlink}/health"
        try:
            trust = ssl.create_default_context(cafile=self._device.authority)
            answer = httpx.get(url, verify=trust, timeout=_REACH_SECONDS)
            self._answered_at = time.time()
            return answer.raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise EngineError(
                f"{url} cannot be reached: {error}. --superlink is HOST:PORT of the server's gateway, by a name that "
                f"its certificate holds; --root-certificates is the ca.crt of the server's operator"
            ) from error

    def _round(self) -> None:
        with tempfile.TemporaryDirectory(prefix="framp-node-") as folder:
            values: dict[str, Scalar] = {
                "rounds": 1,
                "data.root": str(self._device.data),
                "server.clients-per-round": 1,
                "server.minimum-replies": 1,
                "server.discovery-deadline": 1.0,
                "output.folder": str(Path(folder) / "run"),
                "output.resume": "",
            }
            config = FrampConfig.from_flat({**self._config.to_flat(), **values})
            strategy = STRATEGIES[config.method](config, RunFolder.create(Path(config.output.folder), config))
            nodes = [self._device.node_config]
            # With more than one worker clients do not share the process of the server.
            with InProcessGrid(client_app, 1, config.to_flat(), workers=2, node_configs=nodes) as grid:
                strategy.start(grid, ArrayRecord(), 1, timeout=config.server.round_deadline)


def versions() -> str:
    """Versions of what is installed.

    Raises:
        EngineError: a package is missing, or of a version that FRAMP does not work with.
    """
    try:
        texts = importlib.metadata.requires("framp") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise EngineError("framp is not installed here; pip install it from the folder of the project") from error
    needed = [each for each in map(Requirement, texts) if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = [f"{each} ({found})" for each in needed if not each.specifier.contains(found := installed(each.name))]
    if wrong:
        raise EngineError(f"not as needed: {', '.join(wrong)}; install the project anew")
    named = ", ".join(f"{name} {installed(name)}" for name in ("framp", "flwr", "torch"))
    return f"Python {platform.python_version()}, {named}; code {code_fingerprint()[:12]}"


def installed(package: str) -> str:
    """The installed version of a package.

    Raises:
        EngineError: it is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise EngineError(f"{package} is not installed here; install the project anew") from error


def available_memory() -> int:
    """Bytes that a new process can take: what the machine has free, within what the container may use."""
    free: int = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text("utf-8").strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except OSError:
        return free


def compose_variables(device: Device, peak_bytes: int) -> str:
    """The file that ``docker/client.compose.yml`` reads; twice the measured memory, at least 512 MB, is the limit.

    Args:
        device: this device; the folder of its key is the folder of its secrets.
        peak_bytes: measured by :meth:`DeviceCheck.memory`; 0 leaves the compose file's limit.
    """
    variables = {
        "FRAMP_SUPERLINK": device.superlink,
        "FRAMP_SECRETS": str(device.key.parent),
        "FRAMP_PARTITION": str(device.partition),
        "FRAMP_PARTITIONS": str(device.partitions),
        "FRAMP_CLIENT": device.name,
        "FRAMP_CAPACITY": device.capacity,
        "FRAMP_DATA": str(device.data),
    }
    if peak_bytes:
        variables["FRAMP_MEMORY"] = f"{max(512, 2 * peak_bytes // 2**20)}m"
    return "".join(f"{name}={value!r}\n" for name, value in variables.items())
