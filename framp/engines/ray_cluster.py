"""A Ray cluster that runs already: whether this process can join it, and what its nodes have for clients.

Ray waits for minutes where nothing answers, and Flower for ever where the cores it counted are in use. So the look
happens before the start, in a process of its own that a deadline ends. Run as a program, this file is that process.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from framp_core.errors import EngineError

_ANSWER_SECONDS = 5.0
_FREE_SECONDS = 15.0
_LOOK_SECONDS = 60.0
_OTHER_JOBS = (
    "Flower counts all cores, and would wait for those; try again when they are free, or start a cluster for the run"
)


class RayNode(NamedTuple):
    """What a node of a cluster was started with.

    Attributes:
        cpus: cores, as ``ray start --num-cpus`` said.
        gpus: GPUs, as ``ray start --num-gpus`` said.
    """

    cpus: float
    gpus: float


def cluster_nodes(address: str) -> list[RayNode]:
    """The nodes of the cluster at ``HOST:PORT`` that hold at least one client actor, a whole core each.

    Raises:
        EngineError: nothing answers there, this process cannot join (another version of Ray or Python, or no node of
            the cluster runs on this machine), other work uses the cluster, or no node has a whole core.
    """
    _check_reachable(address)
    found = _look(address)
    if "error" in found:
        raise EngineError(
            f"cannot join the Ray cluster at {address}: {found['error']}\nEvery node, and the machine that starts the "
            f"run, needs the same versions of Ray and Python; start the run on a machine that is a node of the cluster"
        )
    nodes = [RayNode(*node) for node in found["nodes"]]
    fitting = [node for node in nodes if node.cpus >= 1]
    if not fitting:
        cores = ", ".join(f"{node.cpus:g}" for node in nodes)
        raise EngineError(
            f"the Ray cluster at {address} is too small for one client, which needs a whole core; its nodes have "
            f"{cores}. Add one: ray start --address={address} --num-cpus=N"
        )
    if found["used"]:
        raise EngineError(f"other work uses {found['used']:g} cores of the Ray cluster at {address}. {_OTHER_JOBS}")
    return fitting


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


def _look(address: str) -> dict[str, object]:
    """What :func:`main` finds, in a process of its own."""
    try:
        answer = subprocess.run(
            [sys.executable, __file__, address], capture_output=True, text=True, check=False, timeout=_LOOK_SECONDS
        )
        found: dict[str, object] = json.loads(answer.stdout.splitlines()[-1])
        return found
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"what answers at engine.ray-address={address!r} did not act as a Ray cluster within {_LOOK_SECONDS:g} s; "
            f"give the address that `ray start --head` printed, not that of its dashboard or of a Ray Client server"
        ) from error
    except (json.JSONDecodeError, IndexError) as error:
        raise EngineError(f"the look at the Ray cluster at {address} failed:\n{answer.stderr}") from error


def main(address: str) -> dict[str, object]:
    """Join a cluster and leave it again: its living nodes and the cores in use, or why it cannot be joined.

    Cores may come free within some seconds after an earlier run.
    """
    import ray

    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except Exception as error:
        return {"error": str(error.__cause__ or error).strip()}
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = sum(node.get("CPU", 0) for node in resources)
    deadline = time.monotonic() + _FREE_SECONDS
    while (used := cores - ray.available_resources().get("CPU", 0)) > 0 and time.monotonic() < deadline:
        time.sleep(0.5)
    return {"nodes": [(node.get("CPU", 0), node.get("GPU", 0)) for node in resources], "used": used}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])) + "\n")
