"""Runs whose result several test files look into."""

import numpy as np

from client_app.app import app as client_app
from framp.engines import InProcessGrid
from framp_core.config import FrampConfig
from framp_core.run_folder import RunFolder
from server_app.app import serve
from server_app.strategies import STRATEGIES, SubmodelStrategy


def final_theta(config: FrampConfig) -> tuple[np.ndarray, RunFolder]:
    """theta_0 after a run, and the run."""
    strategies: list[SubmodelStrategy] = []

    class Kept(STRATEGIES[config.method]):  # type: ignore[misc, name-defined]
        def summary(self) -> None:
            strategies.append(self)

    with InProcessGrid(client_app, config.partition.nodes, config.to_flat()) as grid:
        run = serve(grid, config, Kept)
    return strategies[0].generator_update.generator.theta_0.detach().numpy().copy(), run  # type: ignore[attr-defined]


def measured(run: RunFolder) -> list[dict[str, object]]:
    """All events without their times."""
    return [{key: row[key] for key in row if key != "seconds"} for row in run.events()]
