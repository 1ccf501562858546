"""Flower's own simulation engine on Ray, in a home of its own, cleaned up afterwards.

``flwr run`` exits with 0 even when the app failed, its local SuperLink outlives it, and a SuperLink that some
other project started would run that project's code. So this engine starts a SuperLink for one run on a free port,
in a ``FLWR_HOME`` of its own, asks it how the run ended, and stops every process it started.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from framp.engines.processes import free_port, start, stop, tail, wait_until_healthy
from framp.engines.ray_cluster import cluster_nodes, gpus_per_client
from framp_core.config import FrampConfig
from framp_core.data import load_partition, warn_of_notes
from framp_core.errors import EngineError
from framp_core.fingerprint import code_root
from framp_core.foreign_text import without_colours
from framp_core.run_folder import RunFolder
from server_app.resume import checkpoint_of
from server_app.strategies import STRATEGIES

logger = logging.getLogger("flwr.framp")
_CONNECTION = "framp"
_RUN_ID = re.compile(r"started run (\d+)")
_NAMED_ERROR = re.compile(r"^framp_core\.errors\.(\w+: .*)$", re.MULTILINE)
_ANY_ERROR = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit)\b.*$", re.MULTILINE)
_SHOWN_ERRORS = 5
_LONGEST_ROOT = 22
"""Bytes. Below it come ``/framp-XXXXXXXX`` and Ray's sockets, 70 bytes more, and a socket's path has 107 at most, on
macOS 103."""


def run_flower(config: FrampConfig) -> RunFolder:
    """Run a configuration in Flower's simulation engine and return its run folder.

    ``engine.workers`` is the number of Ray's client actors (0: one per core). With ``engine.ray_address`` the run
    joins that cluster instead, with an actor on each core of its nodes, and leaves it running. ``output.folder`` must
    be set. What Flower prints is kept in the run folder as ``flower.log``.

    Raises:
        RunFolderError: the run folder exists.
        ResumeError: the run that ``output.resume`` names cannot go on.
        DataError: the data on this machine cannot be read or divided.
        EngineError: no app folder, no folder short enough for Ray's sockets, no SuperLink, no cluster to join at
            ``engine.ray_address``, or the run did not complete; carries Flower's own words.
    """
    folder = Path(config.output.resume or config.output.folder)
    if config.output.resume:
        checkpoint_of(RunFolder.open(folder), config, STRATEGIES[config.method])
    elif config.output.folder:
        RunFolder.refuse_existing(folder)
    else:
        raise EngineError("output.folder is empty; the Flower engine needs to know where the run folder will be")
    if not config.engine.ray_address:
        # As in process: what is wrong with the data is said here, and not by every client after the start.
        data, _ = load_partition(config, config.partition.nodes)
        warn_of_notes(data)
    app = code_root()
    if not (app / "pyproject.toml").is_file():
        raise EngineError(f"{app} holds no pyproject.toml; run the Flower engine from a clone (pip install -e .)")
    federation = federation_options(config)
    home = _home()
    log = home / "flower.log"
    try:
        with _superlink(home, config.engine.ray_address) as environment:
            run_id = _submit(app, config, federation, environment, log)
            _check_status(run_id, environment, log)
    except Exception:
        logger.error("Flower's files of this run, its logs among them, stay in %s", home)
        raise
    except BaseException:  # A signal.
        shutil.rmtree(home, ignore_errors=True)
        raise
    run = RunFolder.open(folder)
    shutil.move(log, run.path / log.name)
    shutil.rmtree(home, ignore_errors=True)
    return run


def flower_environment(home: Path, ray_address: str = "") -> dict[str, str]:
    """Environment of Flower's processes: own home, no telemetry, no dependency installation.

    Flower's federation has no key for the address of a cluster, which Ray therefore reads here; ``local`` keeps it
    from joining one that happens to run on this machine.
    """
    binaries = Path(sys.executable).parent
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),
        "PYTHONUTF8": "1",
        "PYTHONIOENCODING": "utf-8",
        "RAY_ADDRESS": ray_address or "local",
        "PATH": os.pathsep.join([str(binaries), os.environ.get("PATH", "")]),
    }


def _home() -> Path:
    """A new folder for Flower's and Ray's files: below the temporary folder, or where that is no place for sockets,
    below ``/tmp`` or the like.
    """
    roots = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    for root in roots:
        if root.isascii() and len(root) <= _LONGEST_ROOT and os.access(root, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="framp-", dir=root))
    raise EngineError(
        f"Ray needs a folder for its sockets that can be written and has {_LONGEST_ROOT} ASCII letters at most; looked "
        f"at were {', '.join(roots)}. Set TMPDIR to one, or leave out --engine flower"
    )


def federation_options(config: FrampConfig) -> str:
    """Value of ``--federation-config``: one node per client, one core and an equal share of the GPUs per actor.

    Raises:
        EngineError: the cluster at ``engine.ray_address`` is none that the run can join.
    """
    if config.engine.ray_address:
        nodes, own_ray = cluster_nodes(config.engine.ray_address, config.data.root), ""
        share = 0 if config.local.device == "cpu" else gpus_per_client(nodes)
    else:
        workers = config.engine.workers or os.cpu_count() or 1
        gpus = 0 if config.local.device == "cpu" else torch.cuda.device_count()
        share, own_ray = gpus / workers, f" init-args-num-cpus={workers} init-args-num-gpus={gpus}"
    # Flower takes single precision and rounds the number of actors down, so an exact tenth of a GPU would give nine.
    return (
        f"num-supernodes={config.partition.nodes} client-resources-num-cpus=1 "
        f"client-resources-num-gpus={0.99 * share:.4f}{own_ray}"
    )


@contextmanager
def _superlink(home: Path, ray_address: str) -> Iterator[dict[str, str]]:
    """Start a SuperLink; yield the environment for ``flwr``; stop it and all its children."""
    port, environment = free_port(), flower_environment(home, ray_address)
    work = home / "work"
    work.mkdir()
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
        f'[superlink.{_CONNECTION}]\naddress = "{address}"\ninsecure = true\n',
        encoding="utf-8",
    )
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-file", str(home / "superlink.log")]
    process = start(command, environment, work)
    try:
        wait_until_healthy(process, f"http://{address}/health", home / "superlink.log")
        yield environment
    finally:
        stop([process], home)


def _submit(app: Path, config: FrampConfig, federation: str, environment: dict[str, str], log: Path) -> int:
    """``flwr run --stream``: wait for the end of the run, keep what is printed in ``log``, return the run's id."""
    run_config = log.with_name("run-config.toml")
    run_config.write_text(config.to_toml(), encoding="utf-8")
    command = ["flwr", "run", str(app), _CONNECTION, "--stream"]
    command += ["--run-config", str(run_config), "--federation-config", federation]
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.run(
            command, env=environment, cwd=app, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    match = _RUN_ID.search(log.read_text(encoding="utf-8", errors="replace"))
    if status or match is None:
        raise EngineError(f"flwr run did not start the app:\n{tail(log)}")
    return int(match.group(1))


def _check_status(run_id: int, environment: dict[str, str], log: Path) -> None:
    """``flwr run`` exits with 0 whatever happened, so ask how the run ended."""
    command = ["flwr", "ls", _CONNECTION, "--run-id", str(run_id), "--format", "json"]
    answer = subprocess.run(
        command,
        env=environment,
        cwd=log.parent,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    try:
        run = json.loads(answer.stdout)["runs"][0]
    except (json.JSONDecodeError, KeyError, IndexError) as error:
        raise EngineError(f"flwr ls did not tell how run {run_id} ended: {answer.stdout}{answer.stderr}") from error
    if run["status"] != "finished:completed":
        raise EngineError(f"Flower's run {run_id} ended as {run['status']}: {_reason(log)}")


def _reason(log: Path) -> str:
    """The error that ended the app, else those in its log, causes before what they caused, else the log's end."""
    text = without_colours(log.read_text(encoding="utf-8", errors="replace"))
    if named := _NAMED_ERROR.findall(text):
        return str(named[-1])
    errors = list(dict.fromkeys(_ANY_ERROR.findall(text)))[:_SHOWN_ERRORS]
    return (
        "\n".join(["the errors in its log, the first one first:", *errors])
        if errors
        else ("the end of its log:\n" + tail(log))
    )
