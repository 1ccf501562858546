"""Figures over methods as PNG files, drawn from what the run folders hold.

A method keeps its colour in every figure. The reference is dark and thick, a strengthened method has the colour of the
plain one and broken lines, a method that ignores budgets is grey and dotted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from framp.compare.results import Results
from framp.compare.statistics import COLUMNS
from framp.compare.tables import title
from framp_core import files
from framp_core.methods import METHODS, STRONG
from framp_core.metrics import MEAN, Column
from framp_core.report.figures import (
    FOLDER,
    INK,
    MUTED,
    POPULATIONS,
    REFERENCE,
    STYLE,
    Drawn,
    save_figure,
    size_colours,
)
from framp_core.report.prototypes import CAPTION, draw_prototypes, drawable

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7a68a6")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
WIDTH, PANEL = 9.6, 2.6
_LEGEND_COLUMNS = 4
SOLID: tuple[int, tuple[float, ...]] = (0, ())


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str
    dashes: tuple[int, tuple[float, ...]]
    width: float
    order: float

    def line(self) -> dict[str, Any]:
        """Arguments of a line without markers."""
        return {"color": self.colour, "linestyle": self.dashes, "linewidth": self.width, "zorder": self.order}

    def points(self) -> dict[str, Any]:
        """Arguments of a line with markers."""
        return {**self.line(), "marker": self.marker, "markersize": 6, "markeredgecolor": "white"}


@dataclass(frozen=True)
class _Plan:
    name: str
    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Figure], None]


def looks(methods: Sequence[str], reference: str) -> dict[str, Look]:
    """The look of each method; it depends on nothing but the methods compared."""
    bases = [name.removesuffix(STRONG) for name in methods]
    coloured = list(dict.fromkeys(base for base in bases if base != reference and not METHODS[base].ignores_budget))
    found = {}
    for name, base in zip(methods, bases, strict=True):
        dashes = (0, (4.0, 1.6)) if name.endswith(STRONG) else SOLID
        if name == reference:
            # Below the others: where curves meet, thin ones stay visible on the thick one.
            found[name] = Look(INK, "o", SOLID, 3.4, 2.1)
        elif METHODS[name].ignores_budget:
            found[name] = Look(MUTED, "p", (0, (1.0, 1.2)), 1.8, 2.0)
        else:
            place = coloured.index(base) if base in coloured else 0
            colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
            round_again = (0, (6.0, 1.5, 1.0, 1.5)) if place >= len(PALETTE) and dashes == SOLID else dashes
            found[name] = Look(colour, marker, round_again, 1.7, 2.2)
    return found


def draw_figures(folder: Path, results: Results, reference: str) -> list[Drawn]:
    """Draw every figure that the runs have data for into ``folder/figures``.

    Args:
        folder: folder of the comparison.
        results: the finished runs.
        reference: the method that stands out.
    """
    target = files.make_folder(folder / FOLDER)
    drawn = []
    with matplotlib.rc_context(STYLE):
        for plan in _plans(results, looks(results.methods, reference), reference):
            figure = Figure(figsize=plan.size, layout="constrained")
            plan.draw(figure)
            save_figure(figure, target / f"{plan.name}.png")
            drawn.append(Drawn(target / f"{plan.name}.png", plan.title, plan.caption))
    return drawn


def _plans(results: Results, styles: Mapping[str, Look], reference: str) -> list[_Plan]:
    legend = 0.28 * _legend_rows(results.methods)
    over = "mean over seeds; bars: standard deviation over seeds" if len(results.seeds) > 1 else "one seed"
    band = " Bands: smallest to largest of the seeds." if len(results.seeds) > 1 else ""
    plans = [
        _Plan("accuracy_by_size", "Accuracy by size", f"Mean over clients at the last round ({over}).",
              (WIDTH, 3.2 + legend), lambda figure: _accuracy_by_size(figure, results, styles)),
        _Plan("learning_curves", "Learning curves", f"Mean over the training clients of all sizes, over rounds.{band}",
              (WIDTH, 3.4 + legend), lambda figure: _learning_curves(figure, results, styles)),
        _Plan("client_accuracy", "How accuracy spreads over clients",
              "Share of the training clients, of all sizes and seeds, whose accuracy is at most the value below. "
              "Further right is better, steeper is fairer.",
              (WIDTH, 3.4 + legend), lambda figure: _client_accuracy(figure, results, styles)),
    ]  # fmt: skip
    if len(results.strengths) > 1:
        plans.append(
            _Plan("prior_curve", "Local against Union",
                  "The strength of the class prior added at deployment moves every method along a curve: numbers are "
                  "strengths, on the reference; every curve has the same, the smallest at its lower right end. Mean "
                  "over clients of all sizes and over seeds. Further up and further right is better.",
                  (0.75 * WIDTH, 4.6 + legend), lambda figure: _prior_curve(figure, results, styles, reference))
        )  # fmt: skip
    aligned = next((run for run in results.of(reference) if drawable(run.prototypes)), None)
    if aligned is not None:
        plans.append(
            _Plan("prototypes", f"Prototypes of {METHODS[reference].title}", f"{CAPTION} Seed {aligned.seed}.",
                  (WIDTH, 4.4), lambda figure: draw_prototypes(figure, aligned.prototypes))
        )  # fmt: skip
    masked = [name for name in results.methods if _masks_of(results, name)]
    if masked:
        rows = math.ceil(len(masked) / 3)
        plans += [
            _Plan("mask_selection", "Where along the layers the masks select",
                  "Cumulative share of a submodel's kept weights from the first layer to the last, by size (mean over "
                  "clients and seeds). Above the dashed line a size has spent more of its budget on the layers so far "
                  "than the dense model does.",
                  (WIDTH, PANEL * rows + 1.0), lambda figure: _mask_selection(figure, results, masked)),
            _Plan("mask_overlap", "Mask overlap between clients",
                  "Jaccard index of the kept maskable weights, mean over pairs of clients of the same size and over "
                  "seeds. 1: all clients of a size hold the same weights.",
                  (0.65 * WIDTH, 0.9 + 0.36 * len(masked)), lambda figure: _mask_overlap(figure, results, masked)),
        ]  # fmt: skip
    return plans


def _accuracy_by_size(figure: Figure, results: Results, styles: Mapping[str, Look]) -> None:
    shown = [column for column in COLUMNS if any(results.over_seeds(name, column, MEAN) for name in results.methods)]
    offsets = min(0.06, 0.64 / len(results.methods)) * (
        np.arange(len(results.methods)) - (len(results.methods) - 1) / 2
    )
    for axes, column in zip(_panels(figure, len(shown)), shown, strict=True):
        for name, offset in zip(results.methods, offsets, strict=True):
            points = []
            for place, size in enumerate(results.capacities):
                values = [100 * value for value in results.over_seeds(name, column, size)]
                if values:
                    points.append((place + offset, fmean(values), stdev(values) if len(values) > 1 else 0.0))
            if points:
                places, means, deviations = zip(*points, strict=True)
                faint = to_rgba(styles[name].colour, 0.45)
                axes.errorbar(places, means, deviations, elinewidth=1.3, ecolor=faint, **styles[name].points())
        axes.set_title(POPULATIONS[column][0])
        axes.set_xticks(range(len(results.capacities)), results.capacities)
        axes.set_xlim(-0.4, len(results.capacities) - 0.6)
        axes.set_ylim(max(axes.get_ylim()[0], -1), min(axes.get_ylim()[1], 101))
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(_percents())
    figure.axes[0].set_ylabel("Accuracy (%)")
    figure.supxlabel("Size (fraction of the maskable weights)", fontsize=9.5)
    _legend(figure, styles)


def _learning_curves(figure: Figure, results: Results, styles: Mapping[str, Look]) -> None:
    columns: tuple[Column, Column] = ("local", "union")
    for axes, column in zip(_panels(figure, 2), columns, strict=True):
        for name in results.methods:
            curves = [dict(run.curve(column)) for run in results.of(name)]
            rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
            heights = 100 * np.array([[curve[each] for each in rounds] for curve in curves])
            axes.plot(rounds, heights.mean(axis=0), marker="o", markersize=3, **styles[name].line())
            if len(curves) > 1:
                look = styles[name]
                axes.fill_between(
                    rounds, heights.min(axis=0), heights.max(axis=0), color=look.colour, alpha=0.13, linewidth=0,
                    zorder=look.order - 1,
                )  # fmt: skip
        axes.set_title(POPULATIONS[column][0])
        axes.set_xlabel("Round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(_percents())
    figure.axes[0].set_ylabel("Accuracy (%)")
    _legend(figure, styles)


def _client_accuracy(figure: Figure, results: Results, styles: Mapping[str, Look]) -> None:
    columns: tuple[Column, Column] = ("local", "union")
    for axes, column in zip(_panels(figure, 2), columns, strict=True):
        for name in results.methods:
            values = [
                100 * value for seed in results.seeds for value in results.accuracies(name, seed, column, MEAN).values()
            ]
            if values:
                axes.ecdf(values, **styles[name].line())
        axes.set_title(POPULATIONS[column][0])
        axes.set_xlabel(f"{POPULATIONS[column][0]} accuracy (%)")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(0, 1.02)
    figure.axes[0].set_ylabel("Share of clients")
    _legend(figure, styles)


def _prior_curve(figure: Figure, results: Results, styles: Mapping[str, Look], reference: str) -> None:
    axes = figure.add_subplot()
    for name in results.methods:
        points = []
        for strength in results.strengths:
            union, local = (results.at_strength(name, column, MEAN, strength) for column in ("union", "local"))
            if union and local:
                points.append((100 * fmean(union), 100 * fmean(local), strength))
        if points:
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], **styles[name].points())
        for x, y, strength in points if name == reference else ():
            axes.annotate(f"{strength:g}", (x, y), (7, 5), textcoords="offset points", fontsize=9, color=INK)
    axes.set_xlabel("Union accuracy (%)")
    axes.set_ylabel("Local accuracy (%)")
    axes.xaxis.set_major_locator(_percents())
    axes.yaxis.set_major_locator(_percents())
    axes.margins(0.08)
    _legend(figure, styles, columns=3)


def _mask_selection(figure: Figure, results: Results, methods: Sequence[str]) -> None:
    columns = min(3, len(methods))
    panels = figure.subplots(math.ceil(len(methods) / columns), columns, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, methods, strict=False):
        masks = _masks_of(results, name)
        weights = np.array([layer["size"] for layer in masks[0]["layers"]], dtype=float)
        position = np.arange(len(weights) + 1)
        for size, colour in size_colours(results.capacities).items():
            kept = [each["selection"][size] for each in masks if size in each["selection"]]
            if kept:
                axes.plot(position, _cumulative(weights * np.mean(kept, axis=0)), color=colour, linewidth=2, label=size)
        dense = {"color": REFERENCE, "linewidth": 1.3, "linestyle": (0, (4, 3))}
        axes.plot(position, _cumulative(weights), label="dense model", **dense)
        axes.set_title(title(name))
        _layer_axis(axes, [layer["name"].removesuffix(".weight") for layer in masks[0]["layers"]])
        axes.set_xlim(0, len(weights))
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in list(panels.flat)[len(methods) :]:
        axes.set_visible(False)
    figure.supylabel("Cumulative share of kept weights", fontsize=9.5)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=6, handlelength=1.5, columnspacing=1.3)


def _layer_axis(axes: Axes, names: Sequence[str]) -> None:
    if len(names) <= 8:
        axes.set_xticks(range(1, len(names) + 1), names, rotation=35, ha="right", rotation_mode="anchor")
    else:
        axes.set_xlabel(f"Layer, from {names[0]} to {names[-1]}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))


def _mask_overlap(figure: Figure, results: Results, methods: Sequence[str]) -> None:
    axes = figure.add_subplot()
    sizes = results.capacities
    means = np.full((len(methods), len(sizes)), np.nan)
    for row, name in enumerate(methods):
        for column, size in enumerate(sizes):
            values = [value for masks in _masks_of(results, name) for value in _overlaps(masks, size)]
            if values:
                means[row, column] = fmean(values)
                axes.text(column, row, f"{means[row, column]:.3f}", ha="center", va="center",
                          color="white" if means[row, column] > 0.55 else INK)  # fmt: skip
    axes.imshow(means, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_yticks(range(len(methods)), [title(name) for name in methods])
    axes.set_xticks(np.arange(1, len(sizes)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(methods)) - 0.5, minor=True)
    axes.grid(visible=False)
    axes.grid(visible=True, which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Size (fraction of the maskable weights)")


def _overlaps(masks: Mapping[str, Any], size: str) -> list[float]:
    """Mean overlap over the pairs of clients of a size in one run; none with fewer than two clients."""
    own = [number for number, capacity in enumerate(masks["capacities"]) if capacity == size]
    pairs = np.array(masks["overlap"], dtype=float)[np.ix_(own, own)][np.triu_indices(len(own), 1)]
    return [float(pairs.mean())] if pairs.size else []


def _masks_of(results: Results, method: str) -> list[dict[str, Any]]:
    """Mask tables of a method's runs; a method that ignores budgets has no mask to speak of."""
    if METHODS[method].ignores_budget:
        return []
    return [run.masks for run in results.of(method) if run.masks and run.masks["clients"]]


def _cumulative(kept: np.ndarray) -> np.ndarray:
    """(layers,) kept weights to their (layers + 1,) cumulative share, which starts at 0."""
    total = kept.sum()
    return np.concatenate([[0.0], np.cumsum(kept) / total if total else np.zeros(len(kept))])


def _panels(figure: Figure, count: int) -> list[Axes]:
    return list(np.atleast_1d(figure.subplots(1, count)))


def _percents() -> MaxNLocator:
    return MaxNLocator(7, steps=[1, 2, 5, 10])


def _legend_rows(methods: Sequence[str]) -> int:
    return math.ceil(len(methods) / _LEGEND_COLUMNS)


def _legend(figure: Figure, styles: Mapping[str, Look], columns: int = _LEGEND_COLUMNS) -> None:
    """The methods above the panels, where they can cover no curve."""
    handles = [Line2D([], [], label=title(name), **look.points()) for name, look in styles.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.6, columnspacing=1.6)
