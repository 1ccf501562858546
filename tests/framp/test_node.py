"""``framp node``: what it finds on a device, and that the command it prints is the one Flower understands."""

import shlex
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from time import time

import pytest
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from framp import node
from framp.cli import app
from framp.node import Device, DeviceCheck, Finding, compose_variables
from framp_core.config import FrampConfig
from framp_core.errors import ConfigError
from tests import messy_folder
from tests.deployment.federation import DOCKER


class Health(BaseHTTPRequestHandler):
    ahead = 0.0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time() + self.ahead, usegmt=True)

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run([DOCKER / "certificates.sh", folder, "127.0.0.1"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def superlink(secrets: Path) -> Iterator[str]:
    """Host and port of a server that answers the health check, with the certificate of docker/certificates.sh."""
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(secrets / "server.crt", secrets / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def device(superlink: str, secrets: Path, tmp_path: Path) -> Device:
    key = make_key(tmp_path / "node.key")
    data = tmp_path / "data"
    data.mkdir()
    return Device(superlink, secrets / "ca.crt", key, 1, 5, "site b", "1/16", data)


def make_key(path: Path, kind: str = "ecdsa") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "", "-f", path], check=True)
    return path


def failures(config: FrampConfig, device: Device) -> dict[str, str]:
    return {finding.check: finding.said for finding in DeviceCheck(config, device).findings() if not finding.passed}


@pytest.fixture
def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that trains takes seconds, and one test is enough for it."""
    monkeypatch.setattr(DeviceCheck, "memory", lambda self: "not measured")


def test_a_sound_device_passes_and_its_client_trained_in_a_process_of_its_own(
    tiny: Callable[..., FrampConfig], device: Device
) -> None:
    check = DeviceCheck(tiny(), device)
    findings = check.findings()
    assert [finding for finding in findings if not finding.passed] == []
    # More than a Python without PyTorch takes, and said in the finding.
    assert check.peak_bytes > 100e6
    assert f"FRAMP_MEMORY='{2 * check.peak_bytes // 2**20}m'" in compose_variables(device, check.peak_bytes)
    assert "capacity 1/16" in {each.check: each.said for each in findings}["memory"]


def test_too_little_memory_is_said(
    tiny: Callable[..., FrampConfig], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceCheck, "_round", lambda self: None)
    monkeypatch.setattr(node, "available_memory", lambda: 0)
    assert "of 0 B free; free memory" in failures(tiny(), device)["memory"]


@pytest.mark.usefixtures("without_memory")
def test_each_fault_is_found_and_only_that_one(
    tiny: Callable[..., FrampConfig], device: Device, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    subprocess.run([DOCKER / "certificates.sh", other, "127.0.0.1"], check=True, capture_output=True)
    readable = make_key(tmp_path / "readable.key")
    readable.chmod(0o644)
    faults = {
        ("data", "there is no"): replace(device, data=tmp_path / "nowhere"),
        ("data", "partition-id 5 is outside"): replace(device, partition=5),
        ("key", "cannot be read"): replace(device, key=tmp_path / "none.key"),
        ("key", "kind that Flower refuses"): replace(device, key=make_key(tmp_path / "ed.key", "ed25519")),
        ("key", "chmod 600"): replace(device, key=readable),
        ("server", "CERTIFICATE_VERIFY_FAILED"): replace(device, authority=other / "ca.crt"),
        ("server", "refused"): replace(device, superlink="127.0.0.1:1"),
    }
    for (name, reason), faulty in faults.items():
        found = failures(tiny(), faulty)
        assert reason in found.pop(name)
        # Without the server its clock is unknown.
        assert found.keys() == ({"clock"} if name == "server" else set())


def test_what_is_left_out_of_a_devices_folder_is_said(tiny: Callable[..., FrampConfig], device: Device) -> None:
    config = tiny({"data.name": "own-images", "partition.scheme": "balanced-dirichlet"})
    found = DeviceCheck(config, replace(device, data=messy_folder.build(device.data / "D"))).data()
    assert found.startswith("22 training, 2 validation, 8 test examples; 2 of 2 classes")
    assert f"; left out: {messy_folder.LEFT_OUT}; split: 'Validation' is the test data" in found


@pytest.mark.usefixtures("without_memory")
@pytest.mark.parametrize(("ahead", "passes"), [(0.0, True), (-4.0, True), (-8.0, False), (295.0, True), (315.0, False)])
def test_a_clock_passes_as_far_as_flower_accepts_its_signatures(
    tiny: Callable[..., FrampConfig], device: Device, monkeypatch: pytest.MonkeyPatch, ahead: float, passes: bool
) -> None:
    """Flower takes signatures up to 5 s from the future and 305 s from the past; here the server's clock is wrong."""
    monkeypatch.setattr(Health, "ahead", ahead)
    assert ("clock" in failures(tiny(), device)) != passes


def test_flower_reads_the_printed_command_as_it_was_meant(device: Device) -> None:
    words = shlex.split(device.command)
    assert words[0] == "flower-supernode"
    assert parse_config_args([words[words.index("--node-config") + 1]]) == device.node_config


@pytest.mark.parametrize("wrong", [{"name": ""}, {"name": "it's"}, {"capacity": "2"}])
def test_a_device_that_cannot_be_said_is_refused(device: Device, wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        replace(device, **wrong)


@pytest.mark.parametrize("passed", [True, False])
def test_the_command_is_printed_for_a_device_that_passes_alone(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    monkeypatch.setattr(DeviceCheck, "findings", lambda self: [Finding("data", passed, "as it is")])
    options = ["--superlink", device.superlink, "--partition", "1", "--of", "5", "--name", device.name]
    options += ["--capacity", "1/16", "--data-dir", str(device.data), "--key", str(device.key)]
    result = CliRunner().invoke(app, ["node", *options, "--env-file", str(tmp_path / "device.env")])
    assert (result.exit_code == 0) == passed
    assert ("flower-supernode" in result.stdout) == passed
    assert (tmp_path / "device.env").exists() == passed
