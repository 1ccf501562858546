"""ServerApp: one run of a strategy, from the configuration to the report."""

import logging
from datetime import datetime
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from framp_core.config import FrampConfig
from framp_core.report import finish, plain_lines, write_report
from framp_core.run_folder import RunFolder
from server_app.strategies import STRATEGIES, SubmodelStrategy

logger = logging.getLogger("flwr.framp")

app = ServerApp()


def default_run_folder(config: FrampConfig) -> Path:
    """A new folder below ``~/framp-runs``, named by method, data and time."""
    moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return Path.home() / "framp-runs" / f"{config.method}-{config.data.title}-{moment}"


def serve(grid: Grid, config: FrampConfig, strategy_class: type[SubmodelStrategy] | None = None) -> RunFolder:
    """Run a strategy over ``grid``; write run folder, checkpoints and report.

    Args:
        grid: Flower's connection to the clients, or the in-process one.
        config: the run's configuration.
        strategy_class: your own strategy; the one that ``config.method`` names if None.

    Raises:
        FrampError: the configuration does not fit the method, the run folder exists, no client answered, the model
            cannot be built, or nothing is learnt.
    """
    strategy_class = strategy_class or STRATEGIES[config.method]
    strategy_class.check(config)
    folder = Path(config.output.folder) if config.output.folder else default_run_folder(config)
    run = RunFolder.create(folder, config)
    strategy = strategy_class(config, run)
    strategy.start(grid, ArrayRecord(), config.rounds, timeout=config.server.round_deadline)
    finish(run)
    write_report(run.path)
    return run


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry point."""
    config = FrampConfig.from_flat(context.run_config)
    run = serve(grid, config)
    for line in plain_lines(run.json("summary.json")):
        logger.info("%s", line)
    logger.info("report: %s", run.path / "report.html")
