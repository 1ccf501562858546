"""Devices with images of their own: nobody divides them, and what must agree is agreed upon."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client_app.app import app as client_app
from client_app.client import Client
from framp.engines import InProcessGrid, run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.errors import DataError
from framp_core.run_folder import RunFolder
from server_app.app import serve

OWN: dict[str, Scalar] = {
    "data.name": "own-images",
    "partition.scheme": "balanced-dirichlet",
    "partition.clients": 3,
    "partition.unseen-clients": 0,
    "partition.validation-fraction": 0.25,
    "server.discovery-deadline": 1,
}


def write_images(folder: Path, counts: dict[str, int], brightness: int) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((8, 8, 3), brightness + number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def sites(tmp_path: Path) -> list[Path]:
    """Three devices; the second lacks dogs, the third has one cow, which is too few for a test image."""
    counts = ({"cat": 10, "cow": 10, "dog": 10}, {"cat": 20, "cow": 5, "dog": 0}, {"cat": 0, "cow": 1, "dog": 10})
    return [write_images(tmp_path / f"site-{i}", count, 50 * i) for i, count in enumerate(counts)]


def node_configs(sites: list[Path]) -> list[dict[str, Scalar]]:
    return [
        {"partition-id": index, "num-partitions": len(sites), "data-dir": str(site), "client-name": site.name}
        for index, site in enumerate(sites)
    ]


def run(config: FrampConfig, sites: list[Path]) -> RunFolder:
    with InProcessGrid(client_app, len(sites), config.to_flat(), node_configs=node_configs(sites)) as grid:
        return serve(grid, config)


def test_a_client_holds_all_images_of_its_folder_and_no_others(
    tiny: Callable[..., FrampConfig], sites: list[Path]
) -> None:
    for index, (kept, validation, test) in enumerate([(18, 6, [2, 2, 2]), (15, 5, [4, 1, 0])]):
        data = Client.of(tiny(OWN).to_flat(), node_configs(sites)[index], {}).data
        # A fifth of each class is test data, a quarter of the rest, rounded down, validation.
        assert np.bincount(data.test.selected_labels, minlength=3).tolist() == test
        assert (data.class_counts().sum(), len(data.validation)) == (kept, validation)
        assert {int(pixel) // 50 for pixel in np.unique(data.train.images)} == {index}
        assert len(data.union_test) == 0


def test_a_class_with_one_image_trains_with_it(tiny: Callable[..., FrampConfig], sites: list[Path]) -> None:
    data = Client.of(tiny({**OWN, "partition.validation-fraction": 0.0}).to_flat(), node_configs(sites)[2], {}).data
    assert data.class_counts().tolist() == [0, 1, 8]
    assert np.bincount(data.test.selected_labels, minlength=3).tolist() == [0, 0, 2]


def test_a_run_over_devices_with_own_images(tiny: Callable[..., FrampConfig], sites: list[Path]) -> None:
    finished = run(tiny(OWN), sites)
    start = finished.events()[0]
    assert [client["client"] for client in start["clients"]] == ["site-0", "site-1", "site-2"]
    assert start["refused"] == []
    (mean,) = (row for row in finished.json("summary.json")["rows"] if row["capacity"] == "mean")
    assert (mean["local_clients"], mean["union_clients"]) == (3, 0)
    assert finished.json("manifest.json") == {"digest": start["partition_digest"]}


def test_a_device_with_other_classes_is_refused_and_named(tiny: Callable[..., FrampConfig], sites: list[Path]) -> None:
    (sites[1] / "dog").rmdir()
    start = run(tiny(OWN), sites).events()[0]
    assert [client["client"] for client in start["clients"]] == ["site-0", "site-2"]
    (refused,) = start["refused"]
    assert "site-1 has" in refused["error"]
    assert "2 classes" in refused["error"]


def test_a_device_without_any_image_says_so(tiny: Callable[..., FrampConfig], tmp_path: Path) -> None:
    empty = write_images(tmp_path / "empty", {"cat": 0, "dog": 0}, 0)
    with pytest.raises(DataError, match="no image of class 'cat', 'dog'"):
        Client.of(tiny(OWN).to_flat(), node_configs([empty])[0], {})


def test_they_cannot_be_simulated(tiny: Callable[..., FrampConfig]) -> None:
    with pytest.raises(DataError, match="nobody divides them; run it on SuperNodes"):
        run_local(tiny(OWN))
