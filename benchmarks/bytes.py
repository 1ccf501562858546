"""What a client is sent and sends back in a round: bytes by method, size, format and part.

    python benchmarks/bytes.py [--networks digits ResNet-18] [--out runs/bytes.json]

Every method trains ``ROUNDS`` rounds of the in-process engine on scikit-learn's digits with all of its ``CLIENTS``
clients in every round, two of each size: the network of the preset ``digits``, with the preset's local steps, and
ResNet-18 with ``RESNET``'s two. The messages of the last round are counted, whose receivers hold a reference mask; the
means over the clients of a size are shown. Runs travel as float32, and each message is encoded once more in the other
formats, by the same code. In such short runs masks have hardly moved, so that the column ``mask`` flatters a returning
client; ``benchmarks/wire.py`` has it for longer runs. ``alone`` is the same mask without a reference, and ``n H`` its
bound: n maskable weights at the entropy of the size. Methods that slice channels name those in place of a mask.
``of dense`` is the whole message over the float32 bytes of all parameters. ``local`` needs no messages; what it shows
is the harness's exchange of a client's own model with the server that stands in for the client's disk.

Everything here is deterministic: repetitions would show the same numbers.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine_facts
from rich.console import Console
from rich.table import Table
from wire import bound

from client_app.app import app as client_app
from framp.engines import InProcessGrid
from framp_core.codec import ValueFormat, encode_kept, encode_update
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.layout import ParameterLayout
from framp_core.methods import settings_of
from server_app.app import serve
from server_app.sending import Cut, SubmodelEncoder
from server_app.strategies import STRATEGIES, ClientUpdate

PRESET = Path(__file__).parents[1] / "presets" / "digits.toml"
METHODS = ("framp", "fiarse", "heterofl", "fedrolex", "scalefl", "fedavg", "local")
FORMATS: tuple[ValueFormat, ...] = ("float32", "bfloat16", "int8")
ROUNDS, CLIENTS = 3, 8
COMMON: dict[str, Scalar] = {
    "rounds": ROUNDS,
    "partition.clients": CLIENTS,
    "partition.unseen-clients": 0,
    "server.clients-per-round": CLIENTS,
    "evaluation.every": ROUNDS,
    "evaluation.union-examples": 20,
    "local.device": "cpu",
}
RESNET: dict[str, Scalar] = {"model.name": "resnet18", "model.widths": "64,128,256,512", "local.steps": 2}
NETWORKS: dict[str, dict[str, Scalar]] = {"digits": {}, "ResNet-18": RESNET}
DOWN, UP = ("values", "mask", "prototypes", "framing"), ("values", "prototypes", "framing")
Row = dict[str, Any]


def messages_of(config: FrampConfig) -> tuple[ParameterLayout, list[Row]]:
    """The layout, and a row per client, direction and format of the last round's training messages."""
    rows: list[Row] = []
    layouts: list[ParameterLayout] = []

    class Watched(STRATEGIES[config.method]):  # type: ignore[misc, name-defined]
        def _messages(self, kind: str, cuts: Iterable[Cut], server_round: int, *given: Any, **named: Any) -> list[Any]:
            waiting = list(cuts)
            if kind == "train" and server_round == ROUNDS:
                layouts.append(self.layout)
                rows.extend(self._row(cut, each, given[0]) for cut in waiting for each in FORMATS)
            messages: list[Any] = super()._messages(kind, waiting, server_round, *given, **named)
            return messages

        def _row(self, cut: Cut, value_format: ValueFormat, prototypes: Any) -> Row:
            kept, mask = np.frombuffer(cut.values, "<f4"), cut.mask.kept()
            again = Cut(cut.client, encode_kept(kept, mask, self.layout, value_format), cut.mask)
            references = None if self.slim else self.references
            encoded, alone = SubmodelEncoder(self.layout, value_format, references).encode(again, prototypes)
            size = {"size": cut.client.capacity, "values": value_format, "held": kept.size}
            return {**size, "down": encoded.parts, "mask_alone": alone}

        def server_update(self, updates: Sequence[ClientUpdate], server_round: int) -> dict[str, float]:
            if server_round == ROUNDS:
                rows.extend(self._reply(update, each) for update in updates for each in FORMATS)
            found: dict[str, float] = super().server_update(updates, server_round)
            return found

        def _reply(self, update: ClientUpdate, value_format: ValueFormat) -> Row:
            encoded = encode_update(update.delta, update.prototypes, self.layout, update.mask, value_format)
            return {"size": update.client.capacity, "values": value_format, "up": encoded.parts}

    with InProcessGrid(client_app, config.partition.nodes, config.to_flat()) as grid:
        serve(grid, config, Watched)
    return layouts[0], rows


def measure(network: str, method: str) -> list[Row]:
    """One row per size and format."""
    with tempfile.TemporaryDirectory() as folder:
        own = settings_of(method, {})
        paths: dict[str, Scalar] = {"output.folder": str(Path(folder, "run"))}
        layout, rows = messages_of(FrampConfig.load(PRESET, {**COMMON, **NETWORKS[network], **own, **paths}))
    groups: dict[tuple[Fraction, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["size"], row["values"]].append(row)
    return [
        {"network": network, "method": method, "size": str(size), "values": value_format, **_means(group, layout, size)}
        for (size, value_format), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _means(group: list[Row], layout: ParameterLayout, size: Fraction) -> Row:
    """Means over the clients of a size and format."""
    sent, received = ([row for row in group if direction in row] for direction in ("down", "up"))
    down = {part: float(np.mean([row["down"].get(part, 0) for row in sent])) for part in DOWN}
    up = {part: float(np.mean([row["up"][part] for row in received])) for part in UP}
    dense = 4 * layout.size
    return {
        "held": float(np.mean([row["held"] for row in sent])),
        "down": down,
        "up": up,
        "mask_alone": float(np.mean([row["mask_alone"] for row in sent])),
        "bound": bound(layout.maskable_size, layout.kept(size)),
        "dense": dense,
        "down_of_dense": sum(down.values()) / dense,
        "up_of_dense": sum(up.values()) / dense,
        "framing": max(parts["framing"] / sum(parts.values()) for parts in (down, up)),
    }


def table(network: str, rows: Sequence[Row]) -> Table:
    """The rows of one network."""
    result = Table(
        "method", "size", "format", "held", "values", "mask", "alone", "n H", "prototypes", "framing", "down",
        "of dense", "values up", "prototypes up", "up", "of dense", "framing, share",
        title=f"{network}, dense model {rows[0]['dense']:,} B; bytes per client and round, mean over a size's clients",
    )  # fmt: skip
    for row in rows:
        down, up = row["down"], row["up"]
        result.add_row(
            row["method"], row["size"], row["values"], *(f"{number:,.0f}" for number in (
                row["held"], down["values"], down["mask"], row["mask_alone"], row["bound"], down["prototypes"],
                down["framing"], sum(down.values()))),
            f"{row['down_of_dense']:.2%}",
            *(f"{number:,.0f}" for number in (up["values"], up["prototypes"], sum(up.values()))),
            f"{row['up_of_dense']:.2%}", f"{row['framing']:.3%}",
        )  # fmt: skip
    return result


def main() -> None:
    """Print the tables and write their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("runs/bytes.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    console, rows = Console(width=220), []
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for network in given.networks:
        found = [row for method in METHODS for row in measure(network, method)]
        rows += found
        console.print(table(network, found))
        result = {"machine": machine_facts(), "rounds": ROUNDS, "clients": CLIENTS, "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
