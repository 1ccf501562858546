"""Kill the server with SIGKILL at random moments of a round, resume, and compare with a run that nobody killed.

    python benchmarks/kill_and_resume.py --kills 20

Every process is ``framp run`` on the in-process engine. After each kill, every folder that bears a checkpoint's name is
read and checked; the kill counts if the process died of it. At the end all events but for their times, the last
checkpoint's tensors and the results must be those of the uninterrupted run, bit for bit. Prints a table, writes
benchmarks/kill_and_resume.json, and fails if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from framp_core.run_folder import EVENTS, RunFolder

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "partition.clients": 6,
    "partition.unseen-clients": 1,
    "partition.concept-shift-clusters": 2,
    "model.widths": "8,16",
    "model.groups": 4,
    "generator.experts": 2,
    "capacity.sizes": "1/16,1",
    "local.device": "cpu",
    "server.clients-per-round": 5,
    "evaluation.every": 2,
    "output.checkpoint-every": 1,
}
PASSING = ("seconds", "mask", "mask_alone", "mask_bytes", "mask_alone_bytes", "down_bytes", "bytes_down")
"""Keys of events and summaries that a resumed run need not share."""
_POLL_SECONDS = 0.002
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        after: seconds between the process's first event, or its cut of the event log, and the kill.
        last_event: what was recorded last, such as ``"train 7"``.
        checkpoints: rounds with a checkpoint, all of them whole.
        leftovers: unfinished writes that the kill left.
        torn: whether the last line of the event log was cut.
    """

    after: float
    last_event: str
    checkpoints: list[int]
    leftovers: int
    torn: bool


def start(folder: Path, rounds: int, resume: bool) -> subprocess.Popen[bytes]:
    """``framp run``, or ``framp run --resume``."""
    values = {**SETTINGS, "rounds": rounds, "data.cache": str(folder.parent / "cache")}
    options = [part for key, value in values.items() for part in ("-o", f"{key}={value}")]
    asked = ["--resume", str(folder)] if resume else ["--out", str(folder), *options]
    command = [sys.executable, "-m", "framp", "run", *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that nobody kills."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"framp run ended with {process.returncode}: {errors.decode()}")


def kill_once(folder: Path, rounds: int, delay: float) -> Kill | None:
    """Start or resume, and kill ``delay`` seconds after the run went on; None if it finished before."""
    log = folder / EVENTS
    old = log.stat().st_ino if log.exists() else None
    process = start(folder, rounds, resume=folder.exists())
    deadline = time.monotonic() + _START_SECONDS
    while not log.exists() or log.stat().st_ino == old:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the run did not go on: {process.communicate()[1].decode()}")
        time.sleep(_POLL_SECONDS)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        return None
    return inspect(folder, delay)


def inspect(folder: Path, delay: float) -> Kill:
    """What the kill left; fails if a checkpoint is not whole."""
    run = RunFolder.open(folder)
    rounds = run.checkpoints.rounds()
    for number in rounds:
        run.checkpoints._read(number)
    events, log = run.events(), (folder / EVENTS).read_bytes()
    last = f"{events[-1]['kind']} {events[-1]['round']}" if events else "none"
    leftovers = len(list(run.checkpoints.path.glob("*.tmp")))
    return Kill(round(delay, 3), last, rounds, leftovers, torn=not log.endswith(b"\n") and bool(log))


def lasting(value: Any) -> Any:
    """A part of an event log or a summary without times and the bytes of masks.

    Masks are coded against references that server and clients have to build up anew after a resume.
    """
    if isinstance(value, list):
        return [lasting(item) for item in value]
    if isinstance(value, dict):
        return {key: lasting(item) for key, item in value.items() if key not in PASSING}
    return value


def differences(one: RunFolder, other: RunFolder) -> list[str]:
    """What two finished runs differ in, apart from what :func:`lasting` leaves out."""
    found = []
    events = [lasting(run.events()) for run in (one, other)]
    results = [lasting(run.json("summary.json")) for run in (one, other)]
    tensors, others = (run.read_checkpoint()[0] for run in (one, other))
    found += ["events"] if events[0] != events[1] else []
    found += ["results"] if results[0] != results[1] else []
    found += ["names of tensors"] if list(tensors) != list(others) else []
    return found + [name for name in tensors if name in others and not torch.equal(tensors[name], others[name])]


def kill_and_resume(work: Path, kills: int, rounds: int, seed: int) -> tuple[list[Kill], list[str]]:
    """Kill a run so many times, let it finish, and compare it with an uninterrupted one.

    Args:
        work: an empty folder.
        kills: how often.
        rounds: of the run; a kill that comes after the end does not count.
        seed: of the moments.

    Returns:
        The kills that hit, and what differs in the end.
    """
    finish(start(work / "whole", rounds, resume=False))
    whole = RunFolder.open(work / "whole")
    seconds = [event["seconds"] for event in whole.events() if event["kind"] in ("train", "evaluate")]
    moments, found = random.Random(seed), []
    for _ in range(kills):
        # Up to about two rounds on: long runs of luck aside, each resume gets a round further.
        hit = kill_once(work / "killed", rounds, moments.uniform(0, 2.5 * sum(seconds) / rounds))
        if hit is None:
            break
        found.append(hit)
    if not (work / "killed" / "summary.json").exists():
        finish(start(work / "killed", rounds, resume=True))
    return found, differences(whole, RunFolder.open(work / "killed"))


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=0, help="two and a half per kill if not given")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="framp-kill-") as work:
        rounds = given.rounds or 5 * given.kills // 2 + 2
        kills, differing = kill_and_resume(Path(work), given.kills, rounds, given.seed)
    table = Table("kill", "seconds", "last event", "checkpoints", "leftovers", "torn line", title=f"{rounds} rounds")
    for number, kill in enumerate(kills, start=1):
        cells = (kill.after, kill.last_event, kill.checkpoints, kill.leftovers, kill.torn)
        table.add_row(str(number), *map(str, cells))
    Console().print(table)
    answer = {"kills": [asdict(kill) for kill in kills], "rounds": rounds, "seed": given.seed, "differences": differing}
    (ROOT / "benchmarks" / "kill_and_resume.json").write_text(json.dumps(answer, indent=1) + "\n")
    print(f"{len(kills)} of {given.kills} kills hit; differences from the uninterrupted run: {differing or 'none'}")
    sys.exit(bool(differing) or len(kills) < given.kills)


if __name__ == "__main__":
    main()
