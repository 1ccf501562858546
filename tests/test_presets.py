"""What the presets promise, run for real."""

from pathlib import Path

import numpy as np
import pytest

from framp.engines import run_local
from framp_core.config import FrampConfig
from framp_core.data.partition import make_partition
from framp_core.errors import ModelError
from framp_core.generators import build_generator
from framp_core.layout import ParameterLayout
from framp_core.methods import METHODS
from framp_core.models import build_model, initial_parameters
from server_app.strategies import STRATEGIES

PRESETS = Path(__file__).parents[1] / "presets"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["digits", "graph-digits"])
def test_embedded_presets_personalise_every_size(tmp_path: Path, preset: str) -> None:
    overrides = {"output.folder": str(tmp_path / "run"), "data.cache": str(tmp_path / "cache"), "local.device": "cpu"}
    run = run_local(FrampConfig.load(PRESETS / f"{preset}.toml", overrides))
    local = {row["capacity"]: row["local"] for row in run.json("summary.json")["rows"]}
    assert local["mean"] >= 0.9
    assert local["1/64"] >= 0.8


def test_every_preset_is_a_configuration_that_its_strategy_takes() -> None:
    for path in sorted(PRESETS.glob("*.toml")):
        config = FrampConfig.load(path)
        STRATEGIES[config.method].check(config)


def test_the_dense_generator_is_refused_at_the_size_of_resnet18() -> None:
    config = FrampConfig.load(PRESETS / "paper-cifar10.toml", {"generator.name": "dense"})
    model = build_model(config.model, (3, 32, 32), 10)
    layout = ParameterLayout.of(model)
    with pytest.raises(ModelError, match="modulated"):
        build_generator(config.generator, layout, 42, initial_parameters(model, 0), 0)


def resnet18_sizes(classes: int) -> tuple[int, int]:
    """Weights of convolutions and of the head with its bias, and norm parameters, stage by stage."""
    ranked, norms = 9 * 3 * 64 + 512 * classes + classes, 2 * 64
    for narrow, wide in ((64, 64), (64, 128), (128, 256), (256, 512)):
        ranked += 9 * (narrow * wide + 3 * wide * wide)
        norms += 4 * 2 * wide
        if narrow != wide:
            ranked += narrow * wide
            norms += 2 * wide
    return ranked, norms


def test_the_published_preset_ranks_what_fiarse_ranks() -> None:
    config = FrampConfig.load(PRESETS / "fiarse-cifar10.toml")
    layout = ParameterLayout.of(build_model(config.model, (3, 32, 32), 10))
    ranked, norms = resnet18_sizes(10)
    assert (layout.maskable_size, layout.size) == (ranked, ranked + norms) == (11_164_362, 11_173_962)
    kept = [layout.kept(size) for size in config.capacity.sizes]
    assert kept == [ranked, ranked // 4, ranked // 16, ranked // 64] == [11_164_362, 2_791_090, 697_772, 174_443]
    unranked = ParameterLayout.of(build_model(FrampConfig.load(PRESETS / "paper-cifar10.toml").model, (3, 32, 32), 10))
    assert unranked.maskable_size == ranked - 10


PUBLISHED_FIARSE = {
    "method": "fiarse-released",
    "seed": 0,
    "rounds": 800,
    "data.normalisation": "published",
    "data.augment": True,
    "partition.clients": 100,
    "partition.unseen-clients": 0,
    "partition.scheme": "balanced-dirichlet",
    "partition.alpha": 0.3,
    "partition.test-split": "independent",
    "partition.validation-fraction": 0.0,
    "capacity.sizes": "1,1/4,1/16,1/64",
    "capacity.assignment": "blocks",
    "model.name": "resnet18",
    "model.widths": "64,128,256,512",
    "model.normalisation": "batch-statistics",
    "local.steps": 100,
    "local.batch-size": 20,
    "local.learning-rate": 0.1,
    "local.momentum": 0.0,
    "local.weight-decay": 0.0,
    "local.reshuffle": False,
    "local.mask": "following",
    "server.clients-per-round": 10,
    "server.shared-learning-rate": 1.0,
    "evaluation.every": 20,
    "evaluation.batch-size": 20,
    "evaluation.augment": True,
    "evaluation.union-examples": 0,
    "evaluation.union-by-client": True,
    "evaluation.local-prior-strength": 0.0,
    "evaluation.union-prior-strength": 0.0,
}
"""What FIARSE's code does and its command line says."""


def test_the_published_preset_is_fiarses_command_line() -> None:
    config = FrampConfig.load(PRESETS / "fiarse-cifar10.toml", {"data.root": "/data"})
    flat = config.to_flat()
    assert {key: flat[key] for key in PUBLISHED_FIARSE} == PUBLISHED_FIARSE
    differing = {
        name: {key: flat[key] for key, value in METHODS[name].settings.items() if flat[key] != value}
        for name in ("fiarse-released", "fiarse")
    }
    code = {"method": "fiarse-released", "local.mask": "following", "server.weighting": "non-zero"}
    assert differing == {"fiarse-released": {}, "fiarse": code}

    train, test = (np.repeat(np.arange(10), images // 10) for images in (50_000, 10_000))
    clients = make_partition(config, train, test, 10).clients
    assert {(len(own.train), len(own.validation), len(own.test)) for own in clients} == {(500, 0, 100)}
    assert [str(own.capacity) for own in clients] == ["1"] * 25 + ["1/4"] * 25 + ["1/16"] * 25 + ["1/64"] * 25
    batches = len(clients[0].train) / config.local.batch_size
    assert config.local.steps % batches == 0, (
        "each participation goes through whole epochs, so it may start at the first"
    )
