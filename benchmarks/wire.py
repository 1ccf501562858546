"""What masks and values cost on the wire, and how fast they are coded.

    python benchmarks/wire.py [--data CIFAR10_FOLDER] [--out runs/wire.json]

Masks at the sizes 1/64, 1/16 and 1/4, of three kinds: random, and those of an untrained network, which one threshold
clusters by layer, both over ResNet-18; and trained, taken from runs of the in-process engine (the digits preset; a
short run of ResNet-18 on digits; with ``--data`` the preset cifar10-study).

Bounds: ``n * H(gamma)``, one density for all n maskable weights, and the sum of ``n_t * H(p_t)`` over the tensors. A
returning client took part before: its mask travels as flips against the reference that it holds. For trained masks its
share is that of the messages of the run. For the others a second round is made of the first by noise on the scores,
such that masks agree to the Jaccard indices of the feasibility study: 0.97 between clients, 0.93 between rounds.

MB/s are megabytes of the dense float32 model, 4 bytes per parameter, on one core; every time is taken ``REPETITIONS``
times after one to warm up.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine_facts
from rich.console import Console
from rich.table import Table

from client_app.app import app as client_app
from framp.engines import InProcessGrid
from framp_core.codec import Reference, ValueFormat, decode_mask, decode_submodel, encode_mask, encode_submodel
from framp_core.codec.masks import decode_mask_part
from framp_core.config import FrampConfig, ModelConfig
from framp_core.config_values import Scalar
from framp_core.layout import ParameterLayout
from framp_core.mask_references import MaskReferences
from framp_core.mask_statistics import jaccard_matrix
from framp_core.masking import global_top_k
from framp_core.models import build_model, initial_parameters
from framp_core.prototypes import Prototypes
from server_app.app import serve
from server_app.strategies import STRATEGIES

REPETITIONS = 5
DENSITIES = (Fraction(1, 64), Fraction(1, 16), Fraction(1, 4))
FORMATS: tuple[ValueFormat, ...] = ("float32", "bfloat16", "int8")
CLIENTS = 3
AMONG_CLIENTS, AMONG_ROUNDS = 0.97, 0.93
PRESETS = Path(__file__).parents[1] / "presets"
RESNET = ModelConfig(name="resnet18", widths=(64, 128, 256, 512))
RESNET_RUN: dict[str, Scalar] = {
    "rounds": 8,
    "partition.clients": 8,
    "partition.unseen-clients": 0,
    "server.clients-per-round": 6,
    "model.name": "resnet18",
    "model.widths": "64,128,256,512",
    "generator.name": "modulated",
    "local.steps": 2,
    "evaluation.every": 8,
    "evaluation.union-examples": 20,
}
Masks = list[np.ndarray]


@dataclass(frozen=True)
class Timing:
    """MB of dense float32 parameters per second."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, parameters: int, work: Callable[[], object]) -> "Timing":
        """Time ``work`` after one run to warm up."""
        work()
        rates = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            work()
            rates.append(4 * parameters / (time.perf_counter() - start) / 1e6)
        return cls(float(np.median(rates)), min(rates), max(rates))

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({self.low:,.0f}-{self.high:,.0f})"


@dataclass(frozen=True)
class Visits:
    """Masks of one size in two rounds, and what returning clients were sent.

    Attributes:
        kind: masks and network.
        layout: description of the network.
        density: gamma.
        first: masks of the clients in the earlier round, bool ``(m,)``.
        second: those in the later round.
        shares: bytes of each returning client's mask over those of the mask alone.
        total: the same of all training messages of the run together, first visits among them.
    """

    kind: str
    layout: ParameterLayout
    density: Fraction
    first: Masks
    second: Masks
    shares: list[float] = field(default_factory=list)
    total: float | None = None

    def references(self) -> tuple[MaskReferences, Reference]:
        """The server's references in the second round, and what clients "0", "1", ... hold since the first."""
        references = MaskReferences(self.layout.maskable_sizes)
        references.renew(1, ((self.density, mask) for mask in self.first))
        code = references.code("0", self.density, self.first[0]).code
        _, held = decode_mask_part(code, self.layout.maskable_sizes, None)
        assert held is not None
        for client in range(len(self.second)):
            references.confirm(str(client), held.name)
        references.renew(2, ((self.density, mask) for mask in self.second))
        return references, held


def bound(size: int, kept: int) -> float:
    """Bytes: ``size * H(kept / size) / 8``."""
    p = kept / size
    return -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8 if 0 < p < 1 else 0.0


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Weights in both masks over weights in either."""
    return float(jaccard_matrix(np.stack([np.packbits(one), np.packbits(other)]))[0, 1])


def measure(visits: Visits) -> dict[str, Any]:
    """One row of the table of masks."""
    layout, mask, sizes = visits.layout, visits.second[0], visits.layout.maskable_sizes
    references, held = visits.references()
    coded = [references.code(str(client), visits.density, each) for client, each in enumerate(visits.second)]
    code, flips = encode_mask(mask, sizes), coded[0].code
    assert np.array_equal(decode_mask(code, sizes), mask)
    assert np.array_equal(decode_mask_part(flips, sizes, held)[0], mask)
    parts = np.split(mask, np.cumsum(sizes)[:-1])
    shares = visits.shares or [len(each.code) / each.alone for each in coded]
    return {
        "masks": visits.kind,
        "density": str(visits.density),
        "maskable": mask.size,
        "bytes": len(code),
        "of_bound": len(code) / bound(mask.size, int(mask.sum())),
        "of_tensor_bounds": len(code) / sum(bound(part.size, int(part.sum())) for part in parts),
        "encode": Timing.of(layout.size, lambda: encode_mask(mask, sizes)),
        "decode": Timing.of(layout.size, lambda: decode_mask(code, sizes)),
        "choose_flips": Timing.of(layout.size, lambda: references.code("0", visits.density, mask)),
        "decode_flips": Timing.of(layout.size, lambda: decode_mask_part(flips, sizes, held)),
        "returning": float(np.median(shares)),
        "returning_range": (min(shares), max(shares)),
        "run_total": visits.total,
    }


# Masks that come from no run ----------------------------------------------------------------------------------------


class Drift:
    """Masks that agree with one another to a given Jaccard index."""

    def __init__(self, layout: ParameterLayout, scores: np.ndarray, density: Fraction) -> None:
        self._layout, self._scores, self._k = layout, scores, layout.kept(density)
        self._rng = np.random.default_rng(1)

    def rounds(self) -> tuple[Masks, Masks]:
        """Masks of ``CLIENTS`` clients in two rounds."""
        among_clients, among_rounds = self._noise(AMONG_CLIENTS), self._noise(AMONG_ROUNDS)
        first, second = (
            [self._mask(self._shaken(scores, among_clients)) for _ in range(CLIENTS)]
            for scores in [self._shaken(self._scores, among_rounds) for _ in range(2)]
        )
        return first, second

    def _mask(self, scores: np.ndarray) -> np.ndarray:
        return global_top_k(scores, self._layout, self._k)[self._layout.maskable]

    def _shaken(self, scores: np.ndarray, noise: float) -> np.ndarray:
        """Scores with relative normal noise."""
        factors = 1 + np.float32(noise) * self._rng.standard_normal(scores.size, dtype=np.float32)
        result: np.ndarray = scores * np.abs(factors)
        return result

    def _noise(self, agreement: float) -> float:
        """Relative noise at which the masks of two draws agree to ``agreement``."""
        low, high = 0.0, 0.2
        for _ in range(8):
            middle = (low + high) / 2
            one, other = (self._mask(self._shaken(self._scores, middle)) for _ in range(2))
            low, high = (middle, high) if jaccard(one, other) > agreement else (low, middle)
        return (low + high) / 2


def synthetic() -> Iterator[Visits]:
    """Random masks, and those of an untrained network."""
    model = build_model(RESNET, (3, 32, 32), 10)
    layout = ParameterLayout.of(model)
    for kind, scores in (
        ("random", np.abs(np.random.default_rng(0).standard_normal(layout.size, dtype=np.float32))),
        ("clustered", initial_parameters(model, 0).abs().numpy()),
    ):
        for density in DENSITIES:
            yield Visits(f"{kind}, ResNet-18", layout, density, *Drift(layout, scores, density).rounds())


# Masks of runs ------------------------------------------------------------------------------------------------------


def trained(kind: str, config: FrampConfig) -> Iterator[Visits]:
    """The last two rounds of a run, and what its returning clients were sent."""
    layouts: list[ParameterLayout] = []
    sent: list[list[tuple[Fraction, np.ndarray]]] = []

    class Watched(STRATEGIES[config.method]):  # type: ignore[misc, name-defined]
        def configure_train(self, *given: Any) -> list[Any]:
            messages: list[Any] = super().configure_train(*given)
            layouts.append(self.layout)
            masks = [(item.client.capacity, item.mask.bits) for item in self._outbox]
            sent[:] = [*sent[-3:], masks]  # a size may be absent from the last rounds
            return messages

    with InProcessGrid(client_app, config.partition.nodes, config.to_flat()) as grid:
        events = serve(grid, config, Watched).events()
    layout = layouts[0]
    rows = [client for event in events if event["kind"] == "train" for client in event["clients"]]
    for density in DENSITIES:
        rounds = [[_maskable(bits, layout) for size, bits in masks if size == density] for masks in sent]
        first, second = [masks for masks in rounds if masks][-2:]
        own = [row for row in rows if row["capacity"] == str(density)]
        yield Visits(kind, layout, density, first, second, *_shares(own))


def _maskable(bits: np.ndarray, layout: ParameterLayout) -> np.ndarray:
    mask: np.ndarray = np.unpackbits(bits, count=layout.size).view(bool)[layout.maskable]
    return mask


def _shares(rows: Sequence[dict[str, Any]]) -> tuple[list[float], float]:
    """Share of each message to a returning client, and of all messages together."""
    seen: set[str] = set()
    shares = []
    for row in rows:
        if row["client"] in seen:
            shares.append(row["down"]["mask"] / row["mask_alone"])
        seen.add(row["client"])
    return shares, sum(row["down"]["mask"] for row in rows) / sum(row["mask_alone"] for row in rows)


def runs(data: Path | None) -> Iterator[Visits]:
    """Trained masks."""
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Scalar] = {"rounds": 60, "local.device": "cpu"}
        plans: list[tuple[str, str, dict[str, Scalar]]] = [
            ("trained, digits", "digits", {}),
            ("trained, ResNet-18 on digits", "digits", RESNET_RUN),
        ]
        if data is not None:
            plans.append(("trained, CIFAR-10", "cifar10-study", {"data.root": str(data.resolve())}))
        for number, (kind, preset, values) in enumerate(plans):
            out: dict[str, Scalar] = {"output.folder": str(Path(folder, str(number)))}
            yield from trained(kind, FrampConfig.load(PRESETS / f"{preset}.toml", {**common, **values, **out}))


# Whole messages -----------------------------------------------------------------------------------------------------


def messages() -> Iterator[dict[str, Any]]:
    """Bytes, framing and throughput of submodels in every value format, their masks coded alone."""
    for network, config, shape in (("digits", ModelConfig(), (1, 8, 8)), ("ResNet-18", RESNET, (3, 32, 32))):
        with torch.device("meta"):
            model = build_model(config, shape, 10)
        layout, features = ParameterLayout.of(model), model.feature_size
        for density in DENSITIES:
            for value_format in FORMATS:
                yield {"network": network, "density": str(density), **_message(layout, features, density, value_format)}


def _message(layout: ParameterLayout, features: int, density: Fraction, value_format: ValueFormat) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    scores = rng.random(layout.size, dtype=np.float32)
    mask = global_top_k(scores, layout, layout.kept(density))
    values = rng.standard_normal(int(mask.sum()), dtype=np.float32)
    prototypes = Prototypes(np.arange(10), np.ones(10, np.int64), np.ones((10, features), np.float32))
    bare, full = (encode_submodel(values, mask, each, layout, value_format) for each in (None, prototypes))
    return {
        "values": value_format,
        "bytes": len(bare.blob),
        "framing": bare.parts["framing"] / len(bare.blob),
        "framing_with_prototypes": full.parts["framing"] / len(full.blob),
        "encode": Timing.of(layout.size, lambda: encode_submodel(values, mask, None, layout, value_format)),
        "decode": Timing.of(layout.size, lambda: decode_submodel(bare.blob, layout, 10, features)),
    }


# Output -------------------------------------------------------------------------------------------------------------


def mask_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of :func:`measure`."""
    table = Table(
        "masks", "size", "bytes", "/ n H(gamma)", "/ tensors' H", "encode MB/s", "decode MB/s", "returning client, of "
        "alone", "whole run", "flips: choose MB/s", "flips: decode MB/s",
        title=f"Masks; throughput: median and range of {REPETITIONS}; returning: median and range over messages",
    )  # fmt: skip
    for row in rows:
        low, high = row["returning_range"]
        table.add_row(
            row["masks"], row["density"], f"{row['bytes']:,}", f"{row['of_bound']:.3f}",
            f"{row['of_tensor_bounds']:.3f}", str(row["encode"]), str(row["decode"]),
            f"{row['returning']:.3f} ({low:.3f}-{high:.3f})",
            "-" if row["run_total"] is None else f"{row['run_total']:.3f}",
            str(row["choose_flips"]), str(row["decode_flips"]),
        )  # fmt: skip
    return table


def message_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of :func:`messages`."""
    table = Table("network", "size", "values", "bytes", "framing", "with prototypes", "encode MB/s", "decode MB/s",
                  title="Submodels, random masks coded alone")  # fmt: skip
    for row in rows:
        table.add_row(
            row["network"], row["density"], row["values"], f"{row['bytes']:,}", f"{row['framing']:.3%}",
            f"{row['framing_with_prototypes']:.3%}", str(row["encode"]), str(row["decode"]),
        )  # fmt: skip
    return table


def main() -> None:
    """Print the tables and write their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="image folder of CIFAR-10, for the preset cifar10-study")
    parser.add_argument("--out", type=Path, default=Path("runs/wire.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    masks = [measure(visits) for source in (synthetic(), runs(given.data)) for visits in source]
    submodels = list(messages())
    console = Console(width=220)
    for table in (mask_table(masks), message_table(submodels)):
        console.print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine_facts(), "repetitions": REPETITIONS, "masks": masks, "messages": submodels}
    given.out.write_text(json.dumps(result, indent=1, default=asdict) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
