"""Class prototypes of an early and of the last round, side by side in two dimensions."""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA

Snapshot = Mapping[str, np.ndarray]
CAPTION = (
    "Class prototypes on their first two principal components, fitted to each panel alone, so that the axes of the two "
    "are not the same. Large: global. Small: local ones of the round's clients. Spread: mean distance of a local "
    "prototype from the global one of its class, as a share of the mean distance between global ones, in all "
    "dimensions; below 1 the classes stand apart."
)
_NAMED_CLASSES = 10
_MOST_CLASSES = 2**12
"""With a global prototype: their distances take 64 MiB."""
_MOST_WORK = 2**36
"""Rows times width times the smaller of the two: 100 clients of 1,000 classes and 512 features take 2**35, 10 s."""


def drawable(snapshots: Mapping[int, Snapshot]) -> bool:
    """Whether there is something to see: two rounds, each with prototypes of two classes in two dimensions, not more
    of them than components are found of in reasonable time.
    """
    return len(snapshots) > 1 and all(
        _is_small(each) and min(_finite(each)["global.means"].shape) > 1 for each in snapshots.values()
    )


def _is_small(snapshot: Snapshot) -> bool:
    classes, rows = len(snapshot["global.means"]), len(snapshot["global.means"]) + len(snapshot["local.means"])
    width: int = snapshot["global.means"].shape[1]
    return classes <= _MOST_CLASSES and rows * width * min(rows, width) <= _MOST_WORK


def _finite(snapshot: Snapshot) -> Snapshot:
    """The prototypes that can be drawn, in double precision and at most 1 large; neither look nor spread depends on it.

    Left out are those that hold NaN or infinity, and local ones of a class without a global one.
    """
    kept = {kind: np.isfinite(snapshot[f"{kind}.means"]).all(axis=1) for kind in ("global", "local")}
    kept["local"] &= np.isin(snapshot["local.classes"], snapshot["global.classes"][kept["global"]])
    found = {name: values[kept[name.partition(".")[0]]] for name, values in snapshot.items()}
    means = {name: values.astype(np.float64) for name, values in found.items() if name.endswith(".means")}
    largest = max((float(np.abs(values).max()) for values in means.values() if values.size), default=0.0) or 1.0
    return {**found, **{name: values / largest for name, values in means.items()}}


def draw_prototypes(figure: Figure, snapshots: Mapping[int, Snapshot]) -> None:
    """Draw the first and the last round.

    Args:
        figure: an empty figure.
        snapshots: what :meth:`framp_core.run_folder.RunFolder.prototypes` returns.
    """
    rounds = (min(snapshots), max(snapshots))
    snapshots = {each: _finite(snapshots[each]) for each in rounds}
    classes = np.unique(np.concatenate([snapshots[each]["global.classes"] for each in rounds]))
    few = classes[-1] < _NAMED_CLASSES
    colours = matplotlib.colormaps["tab10" if few else "turbo"]
    scale = Normalize(0, _NAMED_CLASSES - 1) if few else Normalize(classes[0], classes[-1])
    panels = figure.subplots(1, 2)
    for axes, each in zip(panels, rounds, strict=True):
        _panel(axes, snapshots[each], colours, scale)
        axes.set_title(f"Round {each}: spread {spread(snapshots[each]):.2f}")
    if few:
        handles = [
            Line2D([], [], marker="o", linestyle="", markersize=7, color=colours(scale(number)), label=str(number))
            for number in classes
        ]
        figure.legend(handles=handles, title="Class", loc="outside upper left", ncols=10, handletextpad=0.1,
                      columnspacing=1.0, alignment="left")  # fmt: skip
    else:
        figure.colorbar(ScalarMappable(scale, colours), ax=list(panels), label="Class", shrink=0.8, aspect=28)


def spread(snapshot: Snapshot) -> float:
    """Mean distance of local prototypes from the global one of their class, over that between global ones.

    NaN where there is none, or the global ones are all the same.
    """
    snapshot = _finite(snapshot)
    means, local = snapshot["global.means"], snapshot["local.means"]
    own = np.searchsorted(snapshot["global.classes"], snapshot["local.classes"])
    between = pdist(means).mean()
    if not len(local) or not between:
        return math.nan
    return float(np.linalg.norm(local - means[own], axis=1).mean() / between)


def _panel(axes: Axes, snapshot: Snapshot, colours: Colormap, scale: Normalize) -> None:
    shared, local = snapshot["global.means"], snapshot["local.means"]
    plane: Any = PCA(n_components=2, svd_solver="full")  # type: ignore[no-untyped-call]
    with np.errstate(invalid="ignore"):
        plane.fit(np.concatenate([shared, local]))
    if not plane.explained_variance_.any():  # All are in one place, of whose variance there are no shares.
        plane.explained_variance_ratio_ = plane.explained_variance_
    small = {"s": 14, "alpha": 0.65, "linewidths": 0}
    large = {"s": 110, "edgecolors": "white", "linewidths": 1.2, "zorder": 3}
    for means, kind, look in ((local, "local", small), (shared, "global", large)):
        x, y = plane.transform(means).T if len(means) else np.zeros((2, 0))
        axes.scatter(x, y, c=colours(scale(snapshot[f"{kind}.classes"])), **look)
    first, second = plane.explained_variance_ratio_
    axes.set_xlabel(f"Component 1 ({first:.0%} of the variance)")
    axes.set_ylabel(f"Component 2 ({second:.0%})")
    axes.set_xticks([])
    axes.set_yticks([])
