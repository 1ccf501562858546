"""Figures of a run as PNG files, drawn from what its folder holds.

Sizes are an ordered sequence, so their colours go from light to dark; populations and message parts are not, and take
colours of the palette of Okabe and Ito, which colour-blind readers can tell apart.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from framp_core import files
from framp_core.errors import FrampError
from framp_core.metrics import MEAN, ClientAccuracy, Column, summarise
from framp_core.report.prototypes import CAPTION, Snapshot, draw_prototypes, drawable
from framp_core.report.summary import PARTS, Record, Traffic
from framp_core.report.tables import human_bytes

logger = logging.getLogger("flwr.framp.report")
FOLDER = "figures"
WIDTH = 5.4
MOST_SIZES = 24
"""That a figure shows: with a curve and a label for each, more leave no room, and some hundreds take minutes."""
_LONGEST_SIZE = 9
INK, MUTED, RULE, REFERENCE = "#1f2933", "#66727f", "#dfe4e9", "#d55e00"
POPULATIONS: dict[Column, tuple[str, str, str]] = {
    "local": ("Local", "#0072b2", "o"),
    "union": ("Union", "#d55e00", "s"),
    "unseen": ("Unseen", "#009e73", "^"),
}
PART_COLOURS = {"values": "#56b4e9", "mask": "#e69f00", "prototypes": "#cc79a7", "framing": "#8a939c"}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class Drawn:
    """One figure file and what is said about it."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class _Plan:
    name: str
    title: str
    caption: str
    height: float
    draw: Callable[[Figure], None]


def draw_figures(
    folder: Path, record: Record, masks: Mapping[str, Any] | None, prototypes: Mapping[int, Snapshot]
) -> list[Drawn]:
    """Draw every figure that the run has data for into ``folder/figures``.

    Args:
        folder: the run folder.
        record: the events of the run.
        masks: content of masks.json, or None if the run wrote none.
        prototypes: those of the rounds that were kept.
    """
    target = files.make_folder(folder / FOLDER)
    drawn = []
    # A local style: a library must not change the plots of the program that imports it.
    with matplotlib.rc_context(STYLE):
        for plan in _plans(record, masks) + _prototype_plans(prototypes):
            figure = Figure(figsize=(WIDTH, plan.height), layout="constrained")
            try:
                plan.draw(figure)
                save_figure(figure, target / f"{plan.name}.png")
            except FrampError:
                raise
            except Exception as error:  # Whatever numbers a folder holds, the rest of the report stands.
                logger.warning("the figure %r cannot be drawn (%s: %s)", plan.title, type(error).__name__, error)
                continue
            drawn.append(Drawn(target / f"{plan.name}.png", plan.title, plan.caption))
    return drawn


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    files.write_bytes(path, drawn.getvalue(), durable=False)


def _plans(record: Record, masks: Mapping[str, Any] | None) -> list[_Plan]:
    plans, last, sizes = [], record.last("before"), _drawn_sizes(record)
    if last:
        at = f"round {last[0].round}"
        plans += [
            _Plan(
                "accuracy_by_size",
                "Accuracy by size",
                f"Mean over clients (large marker), one standard deviation (bar) and every client (dots), at {at}.",
                3.6,
                lambda figure: _accuracy_by_size(figure, last, sizes),
            ),
            _Plan(
                "client_accuracy",
                "How accuracy spreads over clients",
                f"Share of a size's training clients whose Local accuracy is at most the value below, at {at}. "
                "Steeper is fairer; further right is better.",
                3.6,
                lambda figure: _client_accuracy(figure, last, sizes),
            ),
            _Plan(
                "learning_curves",
                "Learning curves",
                "Mean accuracy over the training clients of each size, over rounds." + _union_sample(record),
                5.2,
                lambda figure: _learning_curves(figure, record, sizes),
            ),
        ]
    if masks and masks["clients"]:
        plans += _mask_plans(_of_drawn_sizes(masks))
    if any(event["clients"] for event in record.train):
        plans.append(
            _Plan(
                "bytes",
                "Bytes by size and part",
                "Mean size of one client's messages in one round. Above: bytes, stacked by part. Below: the share of "
                "each part, which shows what the small messages are made of.",
                5.2,
                lambda figure: _bytes(figure, [each for each in record.traffic() if each.capacity in sizes]),
            )
        )
    return plans


def _prototype_plans(prototypes: Mapping[int, Snapshot]) -> list[_Plan]:
    if not drawable(prototypes):
        return []
    return [_Plan("prototypes", "Prototypes", CAPTION, 3.4, lambda figure: draw_prototypes(figure, prototypes))]


def _mask_plans(masks: Mapping[str, Any]) -> list[_Plan]:
    return [
        _Plan(
            "mask_overlap",
            "Mask overlap between clients",
            "Jaccard index of the kept maskable weights of each pair of clients, ordered by size; the numbers are "
            "means over the pairs of two sizes.",
            5.2,
            lambda figure: _mask_overlap(figure, masks),
        ),
        _Plan(
            "mask_selection",
            "Where along the layers the masks select",
            "Cumulative share of a submodel's kept weights from the first layer to the last. Above the dashed line a "
            "size has spent more of its budget on the layers so far than the dense model does.",
            3.6,
            lambda figure: _mask_selection(figure, masks),
        ),
    ]


def _union_sample(record: Record) -> str:
    examples = record.config.evaluation.union_examples
    return f" Union is measured on the same {examples:,} examples throughout." if examples else ""


def most_frequent(sizes: Sequence[str], seen: Iterable[str]) -> list[str]:
    """These sizes in their order, at most ``MOST_SIZES``: a client may have had many, and the others few."""
    counts = Counter(seen)
    kept = sorted(sizes, key=lambda size: -counts[size])[:MOST_SIZES]
    return [size for size in sizes if size in kept]


def _drawn_sizes(record: Record) -> list[str]:
    trained = (client["capacity"] for event in record.train for client in event["clients"])
    return most_frequent(record.capacities, [*trained, *(row.capacity for row in record.rows)])


def _of_drawn_sizes(masks: Mapping[str, Any]) -> Mapping[str, Any]:
    sizes = most_frequent(list(masks["selection"]), masks["capacities"])
    kept = [place for place, size in enumerate(masks["capacities"]) if size in sizes]
    return {
        "layers": masks["layers"],
        "selection": {size: masks["selection"][size] for size in sizes},
        "clients": [masks["clients"][place] for place in kept],
        "capacities": [masks["capacities"][place] for place in kept],
        "overlap": [[masks["overlap"][row][column] for column in kept] for row in kept],
    }


def _named(size: str) -> str:
    """A size as it can stand at an axis: a client may tell one of a hundred digits."""
    return size if len(size) <= _LONGEST_SIZE else f"{float(Fraction(size)):.3g}"


def size_colours(capacities: Sequence[str]) -> dict[str, Any]:
    """One colour per size: light for the smallest, dark for the largest."""
    ramp = matplotlib.colormaps["YlGnBu"]
    return dict(zip(capacities, ramp(np.linspace(0.42, 0.98, max(len(capacities), 1))), strict=True))


def _accuracy_by_size(figure: Figure, rows: Sequence[ClientAccuracy], sizes: Sequence[str]) -> None:
    axes = figure.add_subplot()
    found = {summary.capacity: summary for summary in summarise(rows)}
    shown = [column for column in POPULATIONS if found[MEAN].column(column) is not None]
    for number, column in enumerate(shown):
        label, colour, marker = POPULATIONS[column]
        offset = 0.25 * (number - (len(shown) - 1) / 2)
        means = []
        for position, size in enumerate(sizes):
            values = sorted(100 * row.accuracy for row in rows if row.column == column and row.capacity == size)
            # Spread sideways in order of value: the same picture each time the report is redone.
            jitter = 0.045 * (np.arange(len(values)) % 3 - 1)
            axes.plot(position + offset + jitter, values, ".", color=colour, alpha=0.4, markersize=6, mew=0)
            spread = found[size].column(column) if size in found else None
            if spread is not None:
                means.append((position + offset, 100 * spread.mean, 100 * spread.std))
        if not means:  # Its sizes are none of those that are drawn.
            continue
        places, heights, deviations = zip(*means, strict=True)
        axes.errorbar(
            places, heights, deviations,
            fmt=marker, color=colour, markersize=7, markeredgecolor="white", elinewidth=1.4, label=label,
        )  # fmt: skip
    axes.set_xticks(range(len(sizes)), list(map(_named, sizes)))
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("Size (fraction of the maskable weights)")
    _percent_axis(axes)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))  # A deviation reaches above 100 %, an accuracy does not.
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.3, columnspacing=1.2)


def _client_accuracy(figure: Figure, rows: Sequence[ClientAccuracy], sizes: Sequence[str]) -> None:
    axes = figure.add_subplot()
    for size, colour in size_colours(sizes).items():
        values = sorted(100 * row.accuracy for row in rows if row.column == "local" and row.capacity == size)
        if values:
            axes.ecdf(values, color=colour, linewidth=2, label=_named(size))
    axes.set_xlabel("Local accuracy (%)")
    axes.set_ylabel("Share of clients")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, 1.02)
    _legend_above(figure)


def _learning_curves(figure: Figure, record: Record, sizes: Sequence[str]) -> None:
    columns: tuple[Column, Column] = ("local", "union")
    panels = figure.subplots(2, 1, sharex=True)
    history = [(number, record.at(number, "before")) for number in record.evaluated_rounds]
    for axes, column in zip(panels, columns, strict=True):
        ends = []
        for size, colour in size_colours(sizes).items():
            curve = [
                (number, 100 * spread.mean)
                for number, rows in history
                for summary in summarise(rows)
                if summary.capacity == size and (spread := summary.column(column)) is not None
            ]
            if curve:
                axes.plot(*zip(*curve, strict=True), color=colour, linewidth=2, marker="o", markersize=3)
                ends.append((size, *curve[-1]))
        axes.set_title(POPULATIONS[column][0])
        _percent_axis(axes)
        _label_ends(axes, ends)
    panels[-1].set_xlabel("Round")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Write each curve's size after its last point, moved apart where labels would touch."""
    low, high = axes.get_ylim()
    gap, place = 0.085 * (high - low), -np.inf
    ordered = sorted(ends, key=lambda end: end[2])
    heights = []
    for _, _, value in ordered:
        place = max(value, place + gap)
        heights.append(place)
    shift = np.mean([end[2] for end in ordered]) - np.mean(heights) if heights else 0.0
    for (size, last, value), height in zip(ordered, heights, strict=True):
        axes.annotate(
            _named(size), (last, value), (1.035, height + shift), textcoords=axes.get_yaxis_transform(), va="center",
            arrowprops={"arrowstyle": "-", "color": RULE, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def _mask_selection(figure: Figure, masks: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    layers = masks["layers"]
    weights = np.array([layer["size"] for layer in layers], dtype=float)
    position = np.arange(len(layers) + 1)
    for size, colour in size_colours(list(masks["selection"])).items():
        axes.plot(
            position, _cumulative(weights * masks["selection"][size]), color=colour, linewidth=2, label=_named(size)
        )
    axes.plot(
        position, _cumulative(weights), color=REFERENCE, linewidth=1.3, linestyle=(0, (4, 3)), label="dense model"
    )
    names = [layer["name"].removesuffix(".weight") for layer in layers]
    if len(names) <= 12:
        axes.set_xticks(position[1:], names, rotation=35, ha="right", rotation_mode="anchor")
    else:
        axes.set_xlabel(f"Layer, from {names[0]} (1) to {names[-1]} ({len(names)})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlim(0, len(layers))
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("Cumulative share of kept weights")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend_above(figure)


def _cumulative(kept: np.ndarray) -> np.ndarray:
    """(layers,) kept weights to their (layers + 1,) cumulative share, which starts at 0."""
    total = kept.sum()
    return np.concatenate([[0.0], np.cumsum(kept) / total if total else np.zeros(len(kept))])


def _mask_overlap(figure: Figure, masks: Mapping[str, Any]) -> None:
    axes = figure.add_subplot()
    sizes = list(masks["selection"])
    order = sorted(range(len(masks["clients"])), key=lambda i: (sizes.index(masks["capacities"][i]), i))
    overlap = np.array(masks["overlap"], dtype=float)[np.ix_(order, order)]
    image = axes.imshow(overlap, vmin=0, vmax=1, cmap="YlGnBu", interpolation="nearest")
    counts = [masks["capacities"].count(size) for size in sizes]
    edges = np.concatenate([[0], np.cumsum(counts)]) - 0.5
    for edge in edges[1:-1]:
        axes.axhline(edge, color="white", linewidth=1.5)
        axes.axvline(edge, color="white", linewidth=1.5)
    centres = (edges[:-1] + edges[1:]) / 2
    if len(sizes) <= 6:
        _block_means(axes, overlap, counts, centres)
    axes.set_xticks(centres, list(map(_named, sizes)))
    axes.set_yticks(centres, list(map(_named, sizes)))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"Clients ({len(order)}), by size")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=28, label="Jaccard index")
    bar.outline.set_visible(False)  # type: ignore[operator]


def _block_means(axes: Axes, overlap: np.ndarray, counts: Sequence[int], centres: np.ndarray) -> None:
    groups = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    for row, rows in enumerate(groups):
        for column, columns in enumerate(groups):
            pairs = overlap[np.ix_(rows, columns)][np.not_equal.outer(rows, columns)]
            if pairs.size:
                value = float(pairs.mean())
                axes.text(
                    centres[column], centres[row], f"{value:.2f}", ha="center", va="center",
                    color="white" if value > 0.55 else INK, fontsize=9.5, fontweight="bold",
                )  # fmt: skip


def _bytes(figure: Figure, traffic: Sequence[Traffic]) -> None:
    sizes = [entry for entry in traffic if entry.exchanges]
    bars = [(f"{_named(entry.capacity)}  {name}", parts) for entry in sizes
            for name, parts in (("down", entry.down), ("up", entry.up))]  # fmt: skip
    places = [number + 0.35 * (number // 2) for number in range(len(bars))]
    above, below = figure.subplots(2, 1, sharey=True)
    totals = [sum(parts.values()) for _, parts in bars]
    _stack(above, places, [parts for _, parts in bars])
    for place, total in zip(places, totals, strict=True):
        axes_offset = {"xytext": (4, 0), "textcoords": "offset points"}
        above.annotate(human_bytes(total), (total, place), va="center", fontsize=8.5, **axes_offset)
    shares = [{part: size / total for part, size in parts.items()}
              for (_, parts), total in zip(bars, totals, strict=True) if total]  # fmt: skip
    _stack(below, places, shares)
    above.set_xlim(0, 1.16 * max(totals))
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value).replace(".0 ", " ")))
    above.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    below.set_xlim(0, 1)
    below.xaxis.set_major_formatter(PercentFormatter(1))
    above.set_yticks(places, [label for label, _ in bars])
    above.invert_yaxis()
    above.set_title("Bytes per client and round")
    below.set_title("Share of each part")
    handles, labels = above.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, handlelength=1, columnspacing=1.2)


def _stack(axes: Axes, places: Sequence[float], bars: Sequence[Mapping[str, float]]) -> None:
    left = np.zeros(len(bars))
    for part in PARTS:
        lengths = np.array([bar.get(part, 0.0) for bar in bars])
        axes.barh(places, lengths, 0.82, left, color=PART_COLOURS[part], label=part)
        left += lengths
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _legend_above(figure: Figure) -> None:
    """One line of sizes above the plot, where it can cover no curve."""
    figure.legend(loc="outside upper left", ncols=5, handlelength=1.5, columnspacing=1.3)


def _percent_axis(axes: Axes) -> None:
    axes.set_ylabel("Accuracy (%)")
    axes.yaxis.set_major_locator(MaxNLocator(6))
