"""Flower's simulation on a Ray cluster of two nodes: the same numbers, clear refusals, and the cluster lives on."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from framp.engines import flower, ray_cluster, run_flower, run_local
from framp.engines.ray_cluster import RayNode, cluster_nodes
from framp_core.config import FrampConfig
from framp_core.errors import ConfigError, EngineError
from tests.server_app.runs import measured

SECOND_NODE = "127.0.0.2"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster of two nodes on this machine, with a core each and addresses of their own."""
    address = f"127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        client_server = f"--ray-client-server-port={free_port()}"
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}", client_server]
        second = [f"--address={address}", f"--node-ip-address={SECOND_NODE}"]
        with ray_node(head, Path(folder) / "head.log"), ray_node(second, Path(folder) / "second.log"):
            yield address


@contextmanager
def ray_node(options: list[str], log: Path) -> Iterator[None]:
    """``ray start --block``, which stops what it started when it is terminated; it must be alive at the end."""
    command = ["ray", "start", *options, "--block", "--num-cpus=1", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with log.open("w") as output, psutil.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            deadline = time.monotonic() + 90
            while "Ray runtime started" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield
            assert process.poll() is None
        finally:
            started = process.children(recursive=True)
            process.terminate()
            for survivor in psutil.wait_procs([process, *started], timeout=20)[1]:
                survivor.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def joined(address: str) -> Iterator[None]:
    """This process as a driver of the cluster."""
    ray.init(address=address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def messages_by_node(address: str) -> Counter[str]:
    """How many messages were answered on each node, by Ray's own record of its tasks."""
    with joined(address):
        return Counter(task["pid"] for task in ray.timeline() if task["cat"] == "task::ClientAppActor.run")


@pytest.mark.slow
def test_two_nodes_give_the_numbers_of_one_process(tiny: Callable[..., FrampConfig], cluster: str) -> None:
    run = run_flower(tiny({"engine.ray-address": cluster}, "cluster"))
    assert measured(run) == measured(run_local(tiny({}, "local")))
    messages = messages_by_node(cluster)
    assert len(messages) == 2
    assert messages[SECOND_NODE] > 0
    # The cluster lives on, no core of it is in use, and a path that both nodes have is no obstacle.
    assert [node.cpus for node in cluster_nodes(cluster, str(run.path))] == [1, 1]


@pytest.mark.slow
def test_a_run_that_is_terminated_frees_the_cluster(cluster: str, tmp_path: Path) -> None:
    options = ["--engine", "flower", "-o", f"engine.ray-address={cluster}", "--out", str(tmp_path / "run")]
    code = "import sys, tempfile; tempfile.tempdir = sys.argv.pop(1); from framp.cli import main; main()"
    command = [sys.executable, "-c", code, str(tmp_path), "run", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/events.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert list(tmp_path.glob("run/events.jsonl"))
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert [node.cpus for node in cluster_nodes(cluster, "")] == [1, 1]


@pytest.mark.slow
def test_a_cluster_that_other_work_uses_is_refused(cluster: str) -> None:
    with joined(cluster):
        busy = ray.remote(num_cpus=1)(Counter).remote()
        ray.get(busy.total.remote())
        with pytest.raises(EngineError, match="other work uses 1 cores"):
            cluster_nodes(cluster, "")


@pytest.mark.slow
def test_nodes_without_the_data_or_with_other_code_are_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"no data\.root='/nowhere'"):
        cluster_nodes(cluster, "/nowhere")
    monkeypatch.setattr(ray_cluster, "code_fingerprint", lambda: "another")
    with pytest.raises(EngineError, match="other code"):
        cluster_nodes(cluster, "")


@pytest.mark.slow
def test_a_cluster_of_another_version_is_refused_with_both_named(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '1.2.3'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(EngineError, match=rf"(?s)Ray: {ray.__version__}.*Ray: 1\.2\.3"):
        cluster_nodes(cluster, "")


def test_an_address_where_nothing_answers_is_refused() -> None:
    with pytest.raises(EngineError, match="nothing answers"):
        cluster_nodes(f"127.0.0.1:{free_port()}", "")


def test_what_is_no_ray_is_given_up_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "_LOOK_SECONDS", 3.0)
    refused = pytest.raises(EngineError, match="did not answer as a Ray cluster within 3 s")
    with socket.create_server(("127.0.0.1", 0)) as server, refused:
        cluster_nodes(f"127.0.0.1:{server.getsockname()[1]}", "")


def test_a_cluster_without_a_whole_core_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "_check_reachable", lambda address: None)
    monkeypatch.setattr(ray_cluster, "_look", lambda address, data_root: {"nodes": [], "used": 0.0})
    with pytest.raises(EngineError, match="too small for one client"):
        cluster_nodes("head:6379", "")


def test_without_an_address_no_cluster_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``local`` is Ray's word for starting a new one, whatever runs on this machine."""
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert flower.flower_environment(tmp_path)["RAY_ADDRESS"] == "local"


def test_the_in_process_engine_refuses_a_cluster(tiny: Callable[..., FrampConfig]) -> None:
    config = tiny({"engine.ray-address": "head:6379"})
    with pytest.raises(ConfigError, match="--engine flower"):
        run_local(config)
    assert not Path(config.output.folder).exists()


@given(st.lists(st.tuples(st.integers(1, 128), st.integers(0, 8)), min_size=1, max_size=4))
def test_every_core_of_a_node_with_gpus_has_an_actor(resources: list[tuple[int, int]]) -> None:
    """Flower rounds the actors of a node down, from a share of a GPU in single precision; cores bound them, too."""
    nodes = [RayNode("host", cpus, gpus, "", True) for cpus, gpus in resources]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flower, "cluster_nodes", lambda address, data_root: nodes)
        config = FrampConfig.from_flat({"engine.ray-address": "head:6379"})
        options = dict(option.split("=") for option in flower.federation_options(config).split())
        on_cpu = FrampConfig.from_flat({"engine.ray-address": "head:6379", "local.device": "cpu"})
        assert "num-gpus=0.0000" in flower.federation_options(on_cpu)
    share = float(np.float32(options["client-resources-num-gpus"]))
    assert not [option for option in options if option.startswith("init-args")]
    if not any(gpus for _, gpus in resources):
        assert share == 0
    for cpus, gpus in resources:
        assert not gpus or int(gpus / share) >= cpus
