"""Runs whose result several test files look into."""

from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.app import app as client_app
from client_app.app import describe, evaluate, train
from framp.engines import InProcessGrid
from framp_core.config import FrampConfig
from framp_core.run_folder import RunFolder
from server_app.app import serve
from server_app.strategies import STRATEGIES, SubmodelStrategy

Handler = Callable[[Message, Context], Message]


def app_with(trains: Handler = train, evaluates: Handler = evaluate, describes: Handler = describe) -> ClientApp:
    """The client app with other handlers of messages."""
    app = ClientApp()
    app.query("describe")(describes)
    app.train()(trains)
    app.evaluate()(evaluates)
    return app


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
