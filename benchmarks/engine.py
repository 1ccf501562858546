"""Rounds per second: the in-process engine against Flower's Ray engine and against a plain loop, on the same work.

    python benchmarks/engine.py --preset digits [--repetitions 5] [--out runs/engine-digits.json]
    python benchmarks/engine.py --preset cifar10-small --data DIR     (DIR holds train/CLASS/*.png, test/CLASS/*.png)

Work: the preset's partition, network, clients per round, local steps and batch size. The engines take turns: in each
repetition every one of them does a run of its own, so that a machine whose speed changes is as slow for one as for the
other. Of a run's ``--rounds`` rounds the median counts, after a first round that starts workers and loads data;
ratios are taken within a repetition. A round is one of training, without evaluation. The in-process engine and Ray run
the strategy FRAMP whole (masks, codec, alignment, prototypes, nested sizes). The first trains as many clients as one
program as the preset says (``engine.cohort``), and where these are several, also one by one.

The plain loop is written from the description of the released reference codes of the field, not taken from them: one
process, one client after another; per client a deep copy of the global model, a mask by one threshold over the weights
of the dense model, PyTorch's ``DataLoader`` over a dataset that transforms image by image (torchvision, PIL) in batches
of 20, SGD with the gradients masked at each step; then a mean per coordinate over the clients that hold it. No
message is encoded and no prototype made. It is measured with one torch thread and with one per core.
"""

import argparse
import copy
import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from repeated import Spread, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from framp.engines import run_flower, run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import load_client
from framp_core.data.examples import ClientData
from framp_core.data.images import LabelledImages
from framp_core.models import build_model
from framp_core.run_folder import RunFolder

PRESETS = Path(__file__).parents[1] / "presets"
ROUNDS = {"digits": 10, "cifar10-small": 2}
REFERENCE = "in process, a worker per core"


@dataclass(frozen=True)
class Timed:
    """Seconds of each training round, and of the whole run with start, evaluation and report (0: there are none)."""

    rounds: list[float]
    whole: float = 0.0

    @property
    def rate(self) -> float:
        """Rounds per second after the first round."""
        return 1 / statistics.median(self.rounds[1:])


def of_run(run: Callable[[FrampConfig], RunFolder], config: FrampConfig) -> Timed:
    """A run of one of our engines."""
    start = time.perf_counter()
    events = run(config).events()
    whole = time.perf_counter() - start
    return Timed([event["seconds"] for event in events if event["kind"] == "train"], whole)


# The plain loop -----------------------------------------------------------------------------------------------------


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """A client's images, transformed one at a time."""

    def __init__(self, examples: LabelledImages, augment: bool) -> None:
        self._examples = examples
        size = examples.images.shape[-1]
        drawn = [transforms.RandomCrop(size, 4), transforms.RandomHorizontalFlip()] if augment else []
        normalise = transforms.Normalize(examples.normaliser.mean, examples.normaliser.std)
        self._transform = transforms.Compose([*drawn, transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        position = self._examples.indices[index]
        pixels = np.ascontiguousarray(self._examples.images[position].transpose(1, 2, 0))
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return self._transform(picture), int(self._examples.labels[position])


def magnitude_masks(model: nn.Module, capacity: float) -> dict[str, Tensor]:
    """Ones at the largest weights of convolutions and linear layers, and everywhere in norms and biases."""
    weights = {name: each.detach().abs() for name, each in model.named_parameters() if each.dim() > 1}
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    threshold = torch.topk(flat, max(1, int(capacity * flat.numel()))).values[-1]
    masks = {name: torch.ones_like(each) for name, each in model.named_parameters()}
    return masks | {name: (weight >= threshold).float() for name, weight in weights.items()}


def train_copy(shared: nn.Module, data: ClientData, config: FrampConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A client's turn: the change of the weights, and its mask."""
    model = copy.deepcopy(shared)
    masks = magnitude_masks(model, float(data.capacity))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.mul_(masks[name])
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=config.local.learning_rate)
    model.train()
    for images, labels in batches(data, config):
        optimizer.zero_grad()
        F.cross_entropy(model(images)[0], labels).backward()
        for name, parameter in parameters.items():
            parameter.grad.mul_(masks[name])
        optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in parameters.items()}, masks


def batches(data: ClientData, config: FrampConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """``local.steps`` batches, epoch after epoch."""
    assert isinstance(data.train, LabelledImages)
    images = TransformedImages(data.train, config.data.augment)
    size = min(config.local.batch_size, len(images))
    loader = DataLoader(images, batch_size=size, shuffle=True, drop_last=True)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    return itertools.islice(epochs, config.local.steps)


def plain_round(shared: nn.Module, clients: Sequence[ClientData], config: FrampConfig) -> None:
    """All clients of a round, one after another, and the mean over the holders of each coordinate."""
    trained = [train_copy(shared, client, config) for client in clients]
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            total = sum(delta[name] * masks[name] for delta, masks in trained)
            parameter += total / sum(masks[name] for _, masks in trained).clamp_min(1)


def of_plain_loop(config: FrampConfig, threads: int) -> Timed:
    """The plain loop; its data are loaded before."""
    nodes, rng = config.partition.nodes, np.random.default_rng(config.seed)
    clients = [load_client(config, number, nodes) for number in range(nodes)]
    clients = [client for client in clients if client.role == "train"]
    shared = build_model(config.model, clients[0].shape, clients[0].classes)
    torch.manual_seed(config.seed)
    before, seconds = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    for _ in range(config.rounds):
        chosen = rng.choice(len(clients), config.server.clients_per_round, replace=False)
        start = time.perf_counter()
        plain_round(shared, [clients[index] for index in chosen], config)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return Timed(seconds)


# Comparison ---------------------------------------------------------------------------------------------------------


def _with_engine(config: FrampConfig, **engine: int) -> FrampConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=engine)})


def engines(cores: int) -> dict[str, Callable[[FrampConfig], Timed]]:
    """What is compared, by name; each is given the preset with ``engine.workers`` = cores."""

    def in_process(**engine: int) -> Callable[[FrampConfig], Timed]:
        return lambda config: of_run(run_local, _with_engine(config, **engine))

    return {
        REFERENCE: in_process(),
        "in process, a worker per core, clients one by one": in_process(cohort=1),
        "in process, one worker": in_process(workers=1),
        "in process, one worker, clients one by one": in_process(workers=1, cohort=1),
        "Flower on Ray, an actor per core": lambda config: of_run(run_flower, config),
        "plain loop, a thread per core": lambda config: of_plain_loop(config, cores),
        "plain loop, one thread": lambda config: of_plain_loop(config, 1),
    }


def measure(preset: str, rounds: int, data: Path | None) -> dict[str, Timed]:
    """Every engine over ``rounds`` timed rounds."""
    cores, found = os.cpu_count() or 1, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, engine) in enumerate(engines(cores).items()):
            values: dict[str, Scalar] = {
                "rounds": rounds + 1,
                "evaluation.every": rounds + 1,
                "evaluation.union-examples": 20,
                "output.checkpoint-every": rounds + 1,
                "engine.workers": cores,
                "local.device": "cpu",
                "output.folder": str(Path(folder, str(number))),
                **({"data.root": str(data.resolve())} if data else {}),
            }
            config = FrampConfig.load(PRESETS / f"{preset}.toml", values)
            if config.engine.cohort > 1 or "one by one" not in name:
                found[name] = engine(config)
    return found


def summarise(repetitions: Sequence[dict[str, Timed]]) -> list[dict[str, Any]]:
    """One row per engine: rates, and how many times as fast the reference is in the same repetition."""
    return [
        {
            "engine": name,
            "rounds_per_second": Spread.of(found[name].rate for found in repetitions),
            "reference_is_times_as_fast": Spread.of(found[REFERENCE].rate / found[name].rate for found in repetitions),
            "round_seconds": [found[name].rounds for found in repetitions],
            "whole_run_seconds": statistics.median(found[name].whole for found in repetitions) or None,
        }
        for name in repetitions[0]
    ]


def main() -> None:
    """Print the table and write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(ROUNDS), default="digits")
    parser.add_argument("--data", type=Path, help="image folder of CIFAR-10, for cifar10-small")
    parser.add_argument("--rounds", type=int, help="timed rounds per repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rounds = given.rounds or ROUNDS[given.preset]
    # So that engines stop what they started.
    signal.signal(signal.SIGTERM, lambda received, _: sys.exit(128 + received))
    rows = summarise([measure(given.preset, rounds, given.data) for _ in range(given.repetitions)])
    table = Table(
        "engine", "rounds per second", f"{REFERENCE}: times as fast", "whole run, s",
        title=f"{given.preset}: {given.repetitions} repetitions of {rounds} rounds, median (range)",
    )  # fmt: skip
    for row in rows:
        whole = row["whole_run_seconds"]
        ratio = row["reference_is_times_as_fast"].text()
        table.add_row(row["engine"], row["rounds_per_second"].text(3), ratio, f"{whole:.1f}" if whole else "-")
    Console(width=160).print(table)
    out = given.out or Path(f"runs/engine-{given.preset}.json")
    write_result(out, given.repetitions, preset=given.preset, rounds=rounds, engines=rows)


if __name__ == "__main__":
    main()
