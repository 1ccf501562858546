"""A Ray cluster that runs already: whether a run can join it, and what its nodes have for clients.

Ray waits for minutes where nothing answers, Flower for ever where the cores it counted are in use, and a node with
other code refuses its clients round after round. So the look comes before the start, in a process of its own that a
deadline ends. Run as a program, this file is that process.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from framp_core.errors import EngineError
from framp_core.fingerprint import code_fingerprint, code_root

_ANSWER_SECONDS = 5.0
_FREE_SECONDS = 5.0
_LOOK_SECONDS = 90.0


class RayNode(NamedTuple):
    """A node of a cluster that holds at least one client actor.

    Attributes:
        host: its address.
        cpus: cores, as ``ray start --num-cpus`` said.
        gpus: GPUs, as ``ray start --num-gpus`` said.
        code: fingerprint of the code that clients run there, or why they cannot.
        data: whether it has the data's path.
    """

    host: str
    cpus: float
    gpus: float
    code: str
    data: bool


def cluster_nodes(address: str, data_root: str) -> list[RayNode]:
    """The nodes of the cluster at ``HOST:PORT`` that hold at least one client actor, a whole core each.

    Args:
        address: of the cluster's head.
        data_root: path that each node needs; empty: none.

    Raises:
        EngineError: nothing answers there, this process cannot join (another version of Ray or Python, or no node of
            the cluster runs on this machine), other work uses the cluster, no node has a whole core, or a node lacks
            this code or the data.
    """
    _check_reachable(address)
    found = _look(address, data_root)
    if "error" in found:
        raise EngineError(
            f"cannot join the Ray cluster at {address}: {found['error']}\nAll nodes need the versions of Ray and "
            f"Python of this process, and the machine that starts the run has to be one of them"
        )
    if found["used"]:
        raise EngineError(
            f"other work uses {found['used']:g} cores of the Ray cluster at {address}, and Flower, which counts them "
            f"too, would wait for them; try again when they are free, or start a cluster for this run"
        )
    nodes = [RayNode(*node) for node in found["nodes"]]
    if not nodes:
        raise EngineError(
            f"the Ray cluster at {address} is too small for one client, which needs a whole core on one node; "
            f"add one: ray start --address={address} --num-cpus=N"
        )
    _check_code_and_data(nodes, data_root)
    return nodes


def gpus_per_client(nodes: Sequence[RayNode]) -> float:
    """Share of a GPU for each client actor, so that every core of a node with GPUs has one; 0 without any.

    Where some nodes have GPUs and others none, Flower leaves the others idle.
    """
    return min((node.gpus / node.cpus for node in nodes if node.gpus), default=0.0)


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except OSError as error:
        raise EngineError(
            f"nothing answers at engine.ray-address={address!r} ({error}); start a cluster with "
            f"`ray start --head --port={port}`, or leave the address empty for a Ray of the run's own"
        ) from error


def _check_code_and_data(nodes: Sequence[RayNode], data_root: str) -> None:
    for node in nodes:
        if node.code != code_fingerprint():
            raise EngineError(
                f"node {node.host} of the Ray cluster has other code than {code_root()} ({node.code}); "
                f"install this clone there (pip install -e .), with the same changes"
            )
        if data_root and not node.data:
            raise EngineError(
                f"node {node.host} of the Ray cluster has no data.root={data_root!r}; copy the data there"
            )


def _look(address: str, data_root: str) -> dict[str, Any]:
    """What :func:`main` finds, in a process of its own.

    Nodes on this machine see the code in a folder made for the run, as they see Flower's; others have to have it.
    """
    with tempfile.TemporaryDirectory(prefix="framp-ray-") as folder:
        code = Path(folder) / "code"
        code.symlink_to(code_root())
        command = [sys.executable, __file__, address, data_root, str(code)]
        try:
            answer = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONIOENCODING": "utf-8"},
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
                timeout=_LOOK_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"what listens at engine.ray-address={address!r} did not answer as a Ray cluster within "
                f"{_LOOK_SECONDS:g} s; give the address that `ray start --head` printed, and look at `ray status` there"
            ) from error
    try:
        found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    except (json.JSONDecodeError, IndexError) as error:
        raise EngineError(f"the look at the Ray cluster at {address} failed:\n{answer.stderr}") from error
    return found


def main(address: str, data_root: str, code: str) -> dict[str, Any]:
    """Join a cluster and leave it again: its nodes with a whole core and the cores in use, or why it cannot be joined.

    Cores may come free within some seconds after an earlier run.
    """
    import ray

    python_path = os.pathsep.join([code, *sys.path])
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": python_path}},
        )
    except Exception as error:
        return {"error": str(error.__cause__ or error).strip()}
    deadline = time.monotonic() + _FREE_SECONDS
    while (used := _cores_in_use()) and time.monotonic() < deadline:
        time.sleep(0.5)
    fitting = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return {"nodes": [] if used else _facts(fitting, data_root), "used": used}


def _cores_in_use() -> float:
    import ray

    return float(ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0))


def _facts(nodes: Sequence[dict[str, Any]], data_root: str) -> list[tuple[object, ...]]:
    """The fields of :class:`RayNode` for each, asked on the node itself."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(_code_and_data)
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(data_root)
        for node in nodes
    ]
    return [
        (node["NodeManagerAddress"], node["Resources"]["CPU"], node["Resources"].get("GPU", 0), *answer)
        for node, answer in zip(nodes, ray.get(asked), strict=True)
    ]


def _code_and_data(data_root: str) -> tuple[str, bool]:
    try:
        from framp_core.fingerprint import code_fingerprint

        code = code_fingerprint()
    except ImportError as error:
        code = str(error)
    return code, Path(data_root).exists()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
