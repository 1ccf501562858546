"""What a round costs the server: time, memory, and state per registered client.

    python benchmarks/server.py [--repetitions 5] [--only memory] [--out runs/server.json]

*Time and memory by generator*, at ResNet-18 size with the preset paper-cifar10: the strategy's own code makes the
messages of 10 sampled clients (generate, mask, encode), and takes their replies (decode, aggregate: the vector-Jacobian
product, the optimizers, the average for evaluation). Clients are stood in for by random deltas. Each generator runs in
a process of its own; after one round to warm up, ``--repetitions`` rounds are timed. Memory is resident: ``held``
between rounds (generator, optimizer, average), ``peak`` of the process (``ru_maxrss``), both above what it held before
the generator was built; ``per client`` is (peak - held) / 10 in units of the full model's float32 bytes. It includes
the messages, of which the process holds one direction at a time, as with Flower's grids: a message goes once it is
sent. ``messages`` is the largest round's, one way. The preset's clients are of mixed sizes; in the row ``all at
capacity 1`` every message is a full model, so that the messages alone are 1.00 per client.

``peak`` is what the process had from the system, with glibc's defaults, by which freed memory is kept for later.
``per client, returned`` is the same of another process with the environment variable
``MALLOC_MMAP_THRESHOLD_=65536``, by which glibc gives freed arrays back at once: nearly what was in use.

*Share*: against the clients' time on two cores, 10 clients times 100 local steps of batch 20 over 2. The time of a step
is measured over ``STEPS`` steps on one core and scaled.

*State*: 1,000 and 10,000 registered clients, 100 per round, a small network (state per client does not depend on it).
``tracemalloc`` counts what the registry holds once all clients are described; growth is that of the process's resident
memory over ``--repetitions`` rounds.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
import uuid
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from repeated import Spread, write_result
from rich.console import Console
from rich.table import Table

from framp.profiling import divide
from framp_core.codec import encode_descriptor, encode_update
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data.examples import ClientData
from framp_core.data.images import LabelledImages
from framp_core.data.transforms import Normaliser
from framp_core.generators import GENERATORS
from framp_core.local_training import train_locally
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.packed_mask import PackedMask
from framp_core.prototypes import Prototypes
from framp_core.run_folder import RunFolder
from framp_core.spans import recording
from server_app.strategies.framp import FrampStrategy

PRESET = Path(__file__).parents[1] / "presets" / "paper-cifar10.toml"
CLASSES, SHAPE, DESCRIPTOR = 10, (3, 32, 32), 330
CLIENTS, CORES, STEPS = 10, 2, 5
VARIANTS: dict[str, dict[str, Scalar]] = {
    **{name: {"generator.name": name} for name in GENERATORS if name != "dense"},
    "mixture, all layers": {"generator.name": "mixture", "generator.expert-scope": "all"},
    "mixture, all at capacity 1": {"generator.name": "mixture", "capacity.sizes": "1"},
}
"""``dense`` would have 1.4 billion parameters at ResNet-18 size and is refused."""
RETURNED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
PARTS = ("server.generate", "server.mask", "server.encode", "server.decode", "server.aggregate")
REGISTRY: dict[str, Scalar] = {"model.name": "conv", "model.widths": "32,64", "server.clients-per-round": 100}


class StandIns(Grid):
    """Nodes that describe themselves and train to a random delta.

    They live in the server's process, so they take their masks from the server rather than decode what they are sent:
    what decoding leaves behind would count as the server's.
    """

    def __init__(self, nodes: int, config: FrampConfig) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self._nodes, self._config = nodes, config
        self._asked: dict[str, Message] = {}
        self._masks: dict[int, PackedMask] = {}
        self.message_bytes = 0
        self.strategy: FrampStrategy

    def set_run(self, run: object) -> None:
        """Nothing to do."""

    @property
    def run(self) -> None:  # type: ignore[override]
        """None exists."""
        return None

    def create_message(self, *given: Any, **named: Any) -> Message:
        """Not called by our strategies."""
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        """Numbers from 0."""
        return list(range(self._nodes))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep them until the replies are pulled."""
        messages = list(messages)
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            self._asked[message.metadata.message_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Descriptions."""
        return [self._describe(self._asked.pop(key)) for key in list(message_ids) if key in self._asked]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Updates. A message is let go once it is sent, as Flower's grids do."""
        waiting = list(messages)
        del messages
        for key in self.push_messages(waiting):
            del self._asked[key]
        self.message_bytes = max(self.message_bytes, sum(len(_payload(message)) for message in waiting))
        self._masks = {item.client.node_id: item.mask for item in self.strategy._outbox}
        waiting.reverse()
        return [self._train(waiting.pop()) for _ in range(len(waiting))]

    def _describe(self, message: Message) -> Message:
        node, sizes = message.metadata.dst_node_id, self._config.capacity.sizes
        card: dict[str, Any] = {
            "name": f"client-{node:05d}",
            "role": "train",
            "capacity": str(sizes[node % len(sizes)]),
            "shape": list(SHAPE),
            "classes": CLASSES,
            "train-examples": 500,
            "partitions": self._nodes,
            "partition-digest": "0" * 64,
        }
        descriptor = np.random.default_rng(node).standard_normal(DESCRIPTOR).astype(np.float32)
        blob = encode_descriptor(descriptor / np.linalg.norm(descriptor)).blob
        content = RecordDict({"client": ConfigRecord(card), "framp": ConfigRecord({"payload": blob})})
        return Message(content, reply_to=message)

    def _train(self, message: Message) -> Message:
        layout, rng = self.strategy.layout, np.random.default_rng(message.metadata.dst_node_id)
        features = self._config.model.widths[-1]
        mask = self._masks[message.metadata.dst_node_id].kept()
        delta = rng.standard_normal(int(mask.sum()), dtype=np.float32)
        delta *= np.float32(1e-3)
        means = rng.standard_normal((CLASSES, features), dtype=np.float32)
        prototypes = Prototypes(np.arange(CLASSES), np.full(CLASSES, 50), means)
        update = encode_update(delta, prototypes, layout, mask, "float32", rng).blob
        metrics = MetricRecord({"loss": 1.0, "examples": 500, "steps": 100})
        return Message(RecordDict({"framp": ConfigRecord({"payload": update}), "metrics": metrics}), reply_to=message)


def _payload(message: Message) -> bytes:
    # Not through ``config_records``: that makes a cycle of the content, which would stay until it is collected.
    record = message.content["framp"]
    assert isinstance(record, ConfigRecord)
    blob = record["payload"]
    assert isinstance(blob, bytes)
    return blob


class Rounds:
    """Training rounds of a strategy over stand-ins."""

    def __init__(self, values: dict[str, Scalar], nodes: int, folder: Path) -> None:
        given: dict[str, Scalar] = {"data.root": str(folder / "none"), "partition.clients": nodes, **values}
        config = FrampConfig.load(PRESET, given)
        self.grid = StandIns(nodes, config)
        self.strategy = self.grid.strategy = FrampStrategy(config, RunFolder.create(folder / "run", config))
        self._round = 0

    def step(self) -> dict[str, float]:
        """One round; the server's seconds by part."""
        self._round += 1
        with recording() as marks:
            start = time.perf_counter_ns()
            replies = self.grid.send_and_receive(
                self.strategy.configure_train(self._round, ArrayRecord(), ConfigRecord(), self.grid)
            )
            self.strategy.aggregate_train(self._round, replies)
            end = time.perf_counter_ns()
        parts = divide({0: marks}, start, end)
        return {name: parts[name].wall_seconds for name in PARTS}


def measure_generator(variant: str, repetitions: int) -> dict[str, Any]:
    """Seconds of each repetition by part, and memory in bytes; alone in its process."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(VARIANTS[variant], 100, Path(folder))
        before = _resident()
        rounds.step()
        held = _resident()
        seconds = [rounds.step() for _ in range(repetitions)]
    generator, layout = rounds.strategy.generator_update.generator, rounds.strategy.layout
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = 4 * layout.size
    return {
        "generator": variant,
        "model_parameters": layout.size,
        "generator_parameters": generator.size,
        "seconds": {name: Spread.of(each[name] for each in seconds) for name in PARTS},
        "total": Spread.of(sum(each.values()) for each in seconds),
        "held_bytes": held - before,
        "peak_bytes": peak - before,
        "message_bytes": rounds.grid.message_bytes,
        "step_per_client": (peak - held) / CLIENTS / model,
    }


def _resident() -> int:
    gc.collect()
    if sys.platform == "linux":  # What is free and kept for later is not held.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    size: int = psutil.Process().memory_info().rss
    return size


def measure_registry(nodes: int, repetitions: int) -> dict[str, Any]:
    """Bytes of state per registered client, and seconds of a round of 100; alone in its process."""
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(REGISTRY, nodes, Path(folder))
        registry = rounds.strategy.registry
        tracemalloc.start()
        registry.wait(rounds.grid)
        gc.collect()
        described, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        descriptor = next(iter(registry.clients.values())).descriptor.nbytes
        seconds = []
        rounds.step()
        held = _resident()
        for _ in range(repetitions):
            start = time.perf_counter()
            parts = rounds.step()
            seconds.append((time.perf_counter() - start, sum(parts.values())))
        grown = _resident() - held
    return {
        "clients": nodes,
        "state_bytes_per_client": described / nodes,
        "descriptor_bytes": descriptor,
        "grown_bytes": grown,
        "round_seconds": Spread.of(whole for whole, _ in seconds),
        "server_seconds": Spread.of(server for _, server in seconds),
    }


def measure_client(repetitions: int) -> Spread:
    """Seconds of one local step of ResNet-18 on one core."""
    torch.set_num_threads(1)
    config = FrampConfig.load(PRESET, {"data.root": str(PRESET.parent / "none"), "local.device": "cpu"})
    network = build_model(config.model, SHAPE, CLASSES)
    model, theta = FlatModel(network), initial_parameters(network, 0).numpy()
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(500, *SHAPE), dtype=np.uint8)
    train = LabelledImages(images, rng.integers(CLASSES, size=500), np.arange(500), Normaliser((0.5,) * 3, (0.25,) * 3))
    data = ClientData("client", "train", Fraction(1), CLASSES, SHAPE, train, train, train, train, train, "")

    def train_for(steps: int) -> float:
        start = time.perf_counter()
        train_locally(model, theta, None, data, config, rng, None, steps)
        return time.perf_counter() - start

    train_for(1)
    return Spread.of(train_for(STEPS) / STEPS for _ in range(repetitions))


def in_new_process(what: str, argument: str, repetitions: int, **environment: str) -> dict[str, Any]:
    """Call ``measure_<what>(argument)`` in a process of its own, for its memory."""
    command = [sys.executable, __file__, "--child", what, argument, "--repetitions", str(repetitions)]
    variables = {**os.environ, **environment}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables).stdout
    row: dict[str, Any] = json.loads(output.splitlines()[-1])
    return row


def generator_table(rows: list[dict[str, Any]], step: Spread | None) -> Table:
    """Time, share and memory by generator; without the clients' time no share."""
    table = Table(
        "generator", "parameters", *(name.partition(".")[2] for name in PARTS), "server step, s", "share", "held",
        "peak", "messages", "per client", "per client, returned",
        title=f"A round of {CLIENTS} clients of ResNet-18; memory in models of "
        f"{4 * rows[0]['model_parameters'] / 1e6:.1f} MB",
    )  # fmt: skip
    if step is not None:
        seconds = f"{_client_seconds(step):,.0f} s on {CORES} cores, from {step.text(3)} s per step, scaled"
        table.caption = f"The clients' time is {seconds}"
    for row in rows:
        model, total = 4 * row["model_parameters"], Spread(**row["total"])
        row["share"] = step and total.median / _client_seconds(step)
        table.add_row(
            row["generator"], f"{row['generator_parameters'] / 1e6:.2f} M",
            *(f"{row['seconds'][name]['median']:.2f}" for name in PARTS), total.text(),
            "-" if row["share"] is None else f"{row['share']:.2%}", f"{row['held_bytes'] / model:.2f}",
            f"{row['peak_bytes'] / model:.2f}", f"{row['message_bytes'] / model:.2f}",
            f"{row['step_per_client']:.2f}", f"{row['returned_step_per_client']:.2f}",
        )  # fmt: skip
    return table


def _client_seconds(step: Spread) -> float:
    return CLIENTS * 100 * step.median / CORES


def registry_table(rows: list[dict[str, Any]]) -> Table:
    """State by number of clients."""
    table = Table(
        "registered", "state per client, B", "of it descriptor, B", "growth over rounds, B", "round of 100, s",
        "of it server step, s", title="State of registered clients",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            f"{row['clients']:,}", f"{row['state_bytes_per_client']:,.0f}", f"{row['descriptor_bytes']:,}",
            f"{row['grown_bytes']:,}", Spread(**row["round_seconds"]).text(), Spread(**row["server_seconds"]).text(),
        )  # fmt: skip
    return table


def main() -> None:
    """Print the tables and write their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", choices=["memory"], help="leave out the clients' time and the registry")
    parser.add_argument("--out", type=Path, default=Path("runs/server.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, argument = given.child
        row = (
            measure_registry(int(argument), given.repetitions)
            if what == "registry"
            else measure_generator(argument, given.repetitions)
        )
        print(json.dumps(row, default=vars))
        return
    step = None if given.only else measure_client(given.repetitions)
    generators: list[dict[str, Any]] = []
    registered: list[dict[str, Any]] = []

    def keep() -> None:
        """After every row, so that a late failure loses none."""
        write_result(given.out, given.repetitions, step_seconds=step, generators=generators, registered=registered)

    for nodes in () if given.only else (1_000, 10_000):
        registered.append(in_new_process("registry", str(nodes), given.repetitions))
        keep()
    for variant in VARIANTS:
        row = in_new_process("generator", variant, given.repetitions)
        returned = in_new_process("generator", variant, given.repetitions, **RETURNED_MEMORY)
        generators.append({**row, "returned_step_per_client": returned["step_per_client"]})
        keep()
    console = Console(width=200)
    console.print(generator_table(generators, step))
    if registered:
        console.print(registry_table(registered))
    keep()


if __name__ == "__main__":
    main()
