from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from framp_core.config import FrampConfig
from framp_core.prototypes import Prototypes
from framp_core.report.prototypes import _is_small, draw_prototypes, drawable, spread
from framp_core.run_folder import RunFolder


def of(classes: list[int], means: list[list[float]]) -> Prototypes:
    return Prototypes(np.array(classes), np.ones(len(classes), np.int64), np.array(means, np.float32))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", FrampConfig())
    assert run.prototypes() == {}
    local = {"b": of([1, 3], [[1, 2], [3, 4]]), "a": of([3], [[5, 6]])}
    run.write_prototypes(10, of([1, 3], [[0, 0], [1, 1]]), local)
    run.write_prototypes(2, of([1], [[7, 7]]), {"a": of([1], [[8, 8]])})
    found = run.prototypes()
    assert list(found) == [2, 10]
    assert found[10]["local.classes"].tolist() == [1, 3, 3]
    assert found[10]["local.means"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert found[10]["global.means"].tolist() == [[0, 0], [1, 1]]


def snapshot(classes: list[int], features: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "global.classes": np.array(classes), "global.means": rng.normal(size=(len(classes), features)),
        "local.classes": np.array(classes * 2), "local.means": rng.normal(size=(2 * len(classes), features)),
    }  # fmt: skip


def test_spread_by_hand() -> None:
    means = {
        "global.classes": np.array([2, 5]), "global.means": np.array([[0.0, 0.0], [0.0, 4.0]]),
        "local.classes": np.array([5, 2]), "local.means": np.array([[3.0, 4.0], [1.0, 0.0]]),
    }  # fmt: skip
    assert spread(means) == pytest.approx(((3 + 1) / 2) / 4)


@pytest.mark.parametrize(
    ("snapshots", "expected"),
    [
        ({}, False),
        ({2: snapshot([0, 1])}, False),  # one round
        ({2: snapshot([0]), 9: snapshot([0, 1])}, False),  # one class
        ({2: snapshot([0, 1], 1), 9: snapshot([0, 1], 1)}, False),  # one feature
        ({2: snapshot([0, 1]), 9: snapshot([0, 1])}, True),
    ],
)
def test_too_little_is_not_drawn(snapshots: dict[int, dict[str, np.ndarray]], expected: bool) -> None:
    assert drawable(snapshots) is expected


@pytest.mark.parametrize("classes", [[0, 2, 7], list(range(0, 90, 3))])
def test_a_class_has_one_colour_in_both_panels(classes: list[int]) -> None:
    figure = Figure()
    draw_prototypes(figure, {2: snapshot(classes[:-1]), 5: snapshot(classes), 9: snapshot(classes)})
    early, late = figure.axes[:2]
    assert early.get_title(loc="left" if matplotlib.rcParams["axes.titlelocation"] == "left" else "center") == (
        f"Round 2: spread {spread(snapshot(classes[:-1])):.2f}"
    )
    shared = [axes.collections[1].get_facecolors() for axes in (early, late)]
    np.testing.assert_array_equal(shared[0], shared[1][:-1])
    assert len(np.unique(shared[1], axis=0)) == len(classes)


def spoilt(**changes: object) -> dict[str, np.ndarray]:
    """A snapshot in float32 in which some rows hold other numbers, such as ``local_means=[(0, 3e38)]``."""
    found = {
        name: values.astype(np.float32) if "means" in name else values for name, values in snapshot([0, 1, 2]).items()
    }
    for name, rows in changes.items():
        for row, value in rows:  # type: ignore[attr-defined]
            found[name.replace("_", ".")][row] = value
    return found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "hostile",
    [
        spoilt(local_means=[(0, 3e38), (1, -3e38)]),
        spoilt(global_means=[(0, 3e38)], local_means=[(0, 3e38)]),
        spoilt(local_means=[(2, np.nan), (3, np.inf)]),
        spoilt(global_means=[(1, -np.inf)]),
        spoilt(local_means=[(slice(None), np.nan)]),
        spoilt(global_means=[(slice(None), 1.0)], local_means=[(slice(None), 1.0)]),
        spoilt(global_means=[(slice(None), 0.0)], local_means=[(slice(None), 0.0)]),
        spoilt(local_classes=[(0, 7)]),
        {name: values * 1e300 if "means" in name else values for name, values in snapshot([0, 1, 2]).items()},
    ],
)
def test_whatever_numbers_a_folder_holds_what_there_is_is_drawn(tmp_path: Path, hostile: dict[str, np.ndarray]) -> None:
    snapshots = {2: hostile, 9: snapshot([0, 1, 2])}
    assert drawable(snapshots)
    figure = Figure()
    draw_prototypes(figure, snapshots)
    figure.savefig(tmp_path / "figure.png")
    places = [np.asarray(points.get_offsets()) for points in figure.axes[0].collections]
    assert all(np.isfinite(each).all() for each in places)
    finite = np.isfinite(hostile["global.means"]).all(axis=1)
    assert len(places[1]) == finite.sum() > 1


def test_the_spread_does_not_depend_on_the_scale() -> None:
    plain = snapshot([0, 1, 2])
    large = {name: values * 2.0**100 if "means" in name else values for name, values in plain.items()}
    other = {**plain, "local.means": plain["local.means"] * np.array([1.0, 2.0, 1.0])}
    assert spread(large) == pytest.approx(spread(plain), rel=1e-12)
    assert spread(other) != pytest.approx(spread(plain), rel=1e-3)


def test_nothing_finite_is_not_drawn() -> None:
    assert not drawable({2: spoilt(global_means=[(slice(1, None), np.nan)]), 9: snapshot([0, 1])})


def test_what_would_take_minutes_is_not_drawn() -> None:
    """A folder of 240 MB can ask for any of the first two; the last is what 100 clients of ImageNet's classes have."""

    def of(classes: int, width: int, local: int) -> dict[str, np.ndarray]:
        shapes = {"global.classes": (classes,), "global.means": (classes, width)}
        shapes |= {"local.classes": (local,), "local.means": (local, width)}
        return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}

    for classes, width, local in ((3_000, 10_000, 1), (30_000, 8, 1)):
        assert not drawable({1: of(2, 2, 2), 2: of(classes, width, local)})
    assert _is_small(of(1_000, 512, 100_000))
