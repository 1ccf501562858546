"""What the presets promise, run for real."""

from pathlib import Path

import pytest

from framp.engines import run_local
from framp_core.config import FrampConfig
from framp_core.errors import ModelError
from framp_core.generators import build_generator
from framp_core.layout import ParameterLayout
from framp_core.models import build_model, initial_parameters

PRESETS = Path(__file__).parents[1] / "presets"


@pytest.mark.slow
def test_digits_personalises_every_size(tmp_path: Path) -> None:
    overrides = {"output.folder": str(tmp_path / "run"), "data.cache": str(tmp_path / "cache"), "local.device": "cpu"}
    run = run_local(FrampConfig.load(PRESETS / "digits.toml", overrides))
    local = {row["capacity"]: row["local"] for row in run.json("summary.json")["rows"]}
    assert local["mean"] >= 0.9
    assert local["1/64"] >= 0.8


def test_the_dense_generator_is_refused_at_the_size_of_resnet18() -> None:
    config = FrampConfig.load(PRESETS / "paper-cifar10.toml", {"generator.name": "dense"})
    model = build_model(config.model, (3, 32, 32), 10)
    layout = ParameterLayout.of(model)
    with pytest.raises(ModelError, match="modulated"):
        build_generator(config.generator, layout, 42, initial_parameters(model, 0), 0)
