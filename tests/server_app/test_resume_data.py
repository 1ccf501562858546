"""A run goes on with the data that it began with and with no others, whatever of them was changed."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client_app import client as client_module
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import images as image_module
from framp_core.data.graph import nodes as node_module
from framp_core.errors import ResumeError
from framp_core.run_folder import RunFolder
from server_app.app import serve
from tests.server_app.test_resume import Killed, Mortal, contents, resumed

Build = Callable[..., FrampConfig]
SETTINGS: dict[str, Scalar] = {"descriptor.name": "histogram", "output.checkpoint-every": 1}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("server_app.app.write_report", lambda path: None)


def forget_the_process() -> None:
    """What a new process would not know: a process reads its data once."""
    for module in (client_module, image_module, node_module):
        for member in vars(module).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


def run(config: FrampConfig, dies_after: int = 0, sites: list[Path] | None = None) -> RunFolder | None:
    forget_the_process()
    nodes: list[dict[str, Scalar]] = [
        {"partition-id": index, "num-partitions": config.partition.nodes} for index in range(config.partition.nodes)
    ]
    for node, site in zip(nodes, sites or [], strict=False):
        node |= {"data-dir": str(site), "client-name": site.name}
    with Mortal(config, dies_after, nodes) as grid:
        try:
            return serve(grid, config)
        except Killed:
            return None


def write(file: Path, shade: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), shade, dtype=np.uint8)).save(file)


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "cow")) -> Path:
    for label, name in enumerate(classes):
        for number in range(20):
            write(root / "train" / name / f"{number:02}.png", 5 * number + 100 * label)
        for number in range(10):
            write(root / "test" / name / f"{number:02}.png", 5 * number + 100 * label + 2)
    return root


def of_images(root: Path) -> dict[str, Scalar]:
    return {**SETTINGS, "data.name": "image-folder", "data.root": str(root)}


def every_image(root: Path, split: str) -> None:
    for file in (root / split).rglob("*.png"):
        write(file, 255 - int(np.asarray(Image.open(file))[0, 0, 0]))


def renamed(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "cattle")
        (root / split / "cow").rename(root / split / "crow")


def one_pixel(root: Path) -> None:
    file = root / "train" / "cow" / "07.png"
    pixels = np.asarray(Image.open(file)).copy()
    pixels[3, 4, 2] += 1
    Image.fromarray(pixels).save(file)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "all test images": (lambda root: every_image(root, "test"), "test data"),
    "all training images": (lambda root: every_image(root, "train"), "training data"),
    "every pixel": (lambda root: [every_image(root, split) for split in ("train", "test")], "training data, test data"),
    "class folders": (renamed, "class names"),
    "one channel of one pixel": (one_pixel, "training data"),
    "two files' names": (lambda root: (root / "test/cat/00.png").rename(root / "test/cat/99.png"), "test data"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_images_under_the_same_labels_are_refused_and_named(name: str, tiny: Build, tmp_path: Path) -> None:
    change, parts = CHANGES[name]
    root = image_folder(tmp_path / "data")
    config = tiny(of_images(root))
    assert run(config, dies_after=3) is None
    shutil.copytree(root, tmp_path / "kept")
    change(root)
    before = contents(Path(config.output.folder))
    with pytest.raises(ResumeError, match=rf"over 5 nodes \(changed: {parts}\)\. Go on with the data"):
        run(resumed(config))
    assert contents(Path(config.output.folder)) == before
    shutil.rmtree(root)
    shutil.move(tmp_path / "kept", root)
    assert run(resumed(config)) is not None


def test_images_elsewhere_and_a_new_cache_go_on(tiny: Build, tmp_path: Path) -> None:
    config = tiny(of_images(image_folder(tmp_path / "data")))
    assert run(config, dies_after=3) is None
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "cache")
    finished = run(resumed(config, data__root=str(tmp_path / "copy"), data__cache=str(tmp_path / "another")))
    assert finished is not None
    whole = run(tiny(of_images(tmp_path / "copy"), "whole"))
    assert whole is not None
    assert list(finished.clients()) == list(whole.clients())


# --- graphs -------------------------------------------------------------------------------------------------------


def graph() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    nodes = np.arange(60)
    edges = np.concatenate([[nodes, (nodes + step) % 60] for step in (1, 2)], axis=1)
    features = rng.standard_normal((60, 4)).astype(np.float32)
    return {"x": features, "edge_index": edges, "y": nodes % 2, "class_names": np.array(["a", "b"])}


GRAPH: dict[str, Scalar] = {
    **SETTINGS,
    "data.name": "graph-file",
    "model.name": "gcn",
    "partition.scheme": "metis",
}
ONE_EDGE = np.array([[0], [30]])
GRAPH_CHANGES: dict[str, tuple[Mapping[str, np.ndarray], str]] = {
    "a feature": ({"x": graph()["x"] + (np.arange(60) == 7)[:, None].astype(np.float32)}, "features"),
    "an edge": ({"edge_index": np.concatenate([graph()["edge_index"], ONE_EDGE], axis=1)}, "edges"),
    "names": ({"class_names": np.array(["b", "a"])}, "class names"),
}


@pytest.mark.parametrize("name", GRAPH_CHANGES)
def test_another_graph_is_refused_and_named(name: str, tiny: Build, tmp_path: Path) -> None:
    change, part = GRAPH_CHANGES[name]
    np.savez(tmp_path / "g.npz", **graph())
    config = tiny({**GRAPH, "data.root": str(tmp_path / "g.npz")})
    assert run(config, dies_after=3) is None
    np.savez(tmp_path / "other.npz", **{**graph(), **change})
    with pytest.raises(ResumeError, match=rf"\(changed: {part}\)"):
        run(resumed(config, data__root=str(tmp_path / "other.npz")))
    np.savez_compressed(tmp_path / "packed.npz", **graph())
    assert run(resumed(config, data__root=str(tmp_path / "packed.npz"))) is not None


# --- images of the devices' own -----------------------------------------------------------------------------------


@pytest.fixture
def sites(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"site-{index}" for index in range(3)]
    for index, folder in enumerate(folders):
        for name in ("cat", "cow"):
            for number in range(10):
                write(folder / name / f"{number}.png", 10 * number + index + (100 if name == "cow" else 0))
    return folders


OWN: dict[str, Scalar] = {
    **SETTINGS,
    "data.name": "own-images",
    "partition.scheme": "balanced-dirichlet",
    "partition.clients": 3,
    "partition.unseen-clients": 0,
    "server.discovery-deadline": 1,
}


def test_a_device_with_other_images_of_its_own_is_named(tiny: Build, tmp_path: Path, sites: list[Path]) -> None:
    config = tiny(OWN)
    assert run(config, dies_after=3, sites=sites) is None
    kept = (sites[1] / "cow" / "3.png").read_bytes()
    write(sites[1] / "cow" / "3.png", 0)
    with pytest.raises(ResumeError, match="data are not: 1 clients, site-1 among them, have other images"):
        run(resumed(config), sites=sites)
    (sites[1] / "cow" / "3.png").write_bytes(kept)
    shutil.rmtree(tmp_path / "cache")
    assert run(resumed(config), sites=sites) is not None


def test_what_a_device_tells_of_its_images_does_not_link_two_runs(tiny: Build, sites: list[Path]) -> None:
    def told(seed: int, index: int) -> str:
        node: dict[str, Scalar] = {"partition-id": index, "num-partitions": 3, "data-dir": str(sites[0])}
        card = client_module.Client.of(tiny({**OWN, "seed": seed}).to_flat(), node, {}).card()
        return str(card["content-digest"])

    assert len({told(0, 0), told(1, 0), told(0, 1)}) == 3
    assert told(0, 0) == told(0, 0)
    assert len(told(0, 0)) == 8
