"""Rounds per second with clients one by one and as one program, on a GPU or, at a tiny size, on the CPU.

    python benchmarks/cohort.py --data DIR     (paper-cifar10, on a GPU; DIR holds train/CLASS/*.png, test/CLASS/*.png)
    python benchmarks/cohort.py --tiny         (digits and a small network, wherever it runs)

Each variant is a run of its own with the strategy whole (masks, codec, alignment, prototypes, server step); a
repetition is a block of ``--block`` training rounds, of which the median counts, after two rounds that load data and
compile (the second is the first that aligns). Ratios are block by block against ``one by one``. 50 rounds and more
let the time of 800 rounds be extrapolated: rounds are alike. Evaluations are not in it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from repeated import Spread, write_result
from rich.console import Console
from rich.table import Table

from framp.engines import run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar

PRESET = Path(__file__).parents[1] / "presets/paper-cifar10.toml"
REFERENCE = "one by one"
TOGETHER: dict[str, Scalar] = {"engine.cohort": 10}
VARIANTS: dict[str, dict[str, Scalar]] = {
    REFERENCE: {"engine.cohort": 1},
    "one by one, bfloat16": {"engine.cohort": 1, "local.precision": "bfloat16"},
    "together": TOGETHER,
    "together, bfloat16": {**TOGETHER, "local.precision": "bfloat16"},
    "together, compiled": {**TOGETHER, "engine.compile": True},
    "together, compiled, bfloat16": {**TOGETHER, "engine.compile": True, "local.precision": "bfloat16"},
}
PUBLISHED_ROUNDS = 800
WARM_UP = 2


def settings(given: argparse.Namespace, folder: Path) -> dict[str, Scalar]:
    """What all variants share, on top of the preset."""
    shared: dict[str, Scalar] = {
        "rounds": given.rounds + WARM_UP,
        "evaluation.every": given.rounds + WARM_UP,
        "evaluation.union-examples": 20,
        "output.checkpoint-every": given.rounds + WARM_UP,
        "output.folder": str(folder),
    }
    if given.tiny:
        tiny: dict[str, Scalar] = {"data.name": "digits", "partition.clients": 10, "partition.test-split": "matched"}
        small: dict[str, Scalar] = {"model.name": "conv", "model.widths": "16,32", "local.steps": 5}
        return shared | tiny | small
    return shared | {"data.name": "image-folder", "data.root": str(given.data.resolve())}


def seconds_of(values: dict[str, Scalar]) -> list[float]:
    """Seconds of each training round but the first ones."""
    run = run_local(FrampConfig.load(PRESET, values))
    return [event["seconds"] for event in run.events() if event["kind"] == "train"][WARM_UP:]


def measure(given: argparse.Namespace) -> dict[str, list[float]]:
    """Every variant that was asked for, the reference first."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(given.variants):
            found[name] = seconds_of(settings(given, Path(folder, str(number))) | VARIANTS[name])
    return found


def row(name: str, seconds: list[float], reference: list[float], block: int) -> dict[str, Any]:
    """Rates and ratios by block, and the time of a published run."""
    blocks = [statistics.median(seconds[first : first + block]) for first in range(0, len(seconds), block)]
    others = [statistics.median(reference[first : first + block]) for first in range(0, len(reference), block)]
    return {
        "variant": name,
        "rounds_per_second": Spread.of(1 / each for each in blocks),
        "times_the_reference": Spread.of(other / each for each, other in zip(blocks, others, strict=True)),
        "hours_of_published_run": PUBLISHED_ROUNDS * statistics.fmean(seconds) / 3600,
        "round_seconds": seconds,
    }


def main() -> None:
    """Print the table and write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="image folder of CIFAR-10")
    parser.add_argument("--tiny", action="store_true", help="a small network on digits instead")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds")
    parser.add_argument("--block", type=int, default=10, help="rounds per repetition")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not given.tiny and given.data is None:
        parser.error("give --data DIR, an image folder of CIFAR-10, or --tiny")
    given.variants = [REFERENCE, *(name for name in given.variants if name != REFERENCE)]
    found = measure(given)
    rows = [row(name, seconds, found[REFERENCE], given.block) for name, seconds in found.items()]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    work = "a small network on digits" if given.tiny else "paper-cifar10"
    table = Table(
        "clients of a round", "rounds per second", f"times {REFERENCE}", f"{PUBLISHED_ROUNDS} rounds, h",
        title=f"{work} on {where}: {given.rounds} rounds in blocks of {given.block}, median (range)",
    )  # fmt: skip
    for each in rows:
        rate, ratio = each["rounds_per_second"].text(3), each["times_the_reference"].text()
        table.add_row(each["variant"], rate, ratio, f"{each['hours_of_published_run']:.2f}")
    Console(width=160).print(table)
    out = given.out or Path(f"runs/cohort-{'tiny' if given.tiny else 'paper-cifar10'}.json")
    write_result(out, given.rounds // given.block, work=work, device=where, variants=rows)


if __name__ == "__main__":
    main()
