"""ServerApp: one run of a strategy, from the configuration to the report."""

import logging
from datetime import datetime
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from framp_core.config import FrampConfig
from framp_core.data import require_output_outside
from framp_core.report import finish, plain_lines, write_report
from framp_core.run_folder import ENVIRONMENT, LOG, RunFolder
from framp_core.run_log import about, run_log
from framp_core.spans import span
from server_app.first_replies import FirstReplies
from server_app.resume import checkpoint_of
from server_app.strategies import STRATEGIES, SubmodelStrategy

logger = logging.getLogger("flwr.framp")

app = ServerApp()


def default_run_folder(config: FrampConfig) -> Path:
    """A new folder below ``~/framp-runs``, named by method, data and time."""
    moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return Path.home() / "framp-runs" / f"{config.method}-{config.data.title}-{moment}"


def open_run(config: FrampConfig) -> RunFolder:
    """A new run folder, or the one that ``output.resume`` names.

    Raises:
        DataError: the new one would lie among the images that are read.
        RunFolderError: the new one exists, or the old one is not a run folder.
    """
    if config.output.resume:
        return RunFolder(RunFolder.open(Path(config.output.resume)).path, config)
    require_output_outside(config)
    folder = Path(config.output.folder) if config.output.folder else default_run_folder(config)
    return RunFolder.create(folder, config)


def serve(grid: Grid, config: FrampConfig, strategy_class: type[SubmodelStrategy] | None = None) -> RunFolder:
    """Run a strategy over ``grid``, or go on with the run that ``output.resume`` names; write its folder and report.

    Args:
        grid: Flower's connection to the clients, or the in-process one.
        config: the run's configuration.
        strategy_class: your own strategy; the one that ``config.method`` names if None.

    Raises:
        FrampError: the configuration does not fit the method, the run folder exists, no client answered, the model
            cannot be built, nothing is learnt, a run cannot go on, or a file cannot be written.
    """
    strategy_class = strategy_class or STRATEGIES[config.method]
    strategy_class.check(config)
    run = open_run(config)
    with run.going_on(), run.alone():
        strategy = strategy_class(config, run)
        if config.output.resume:
            _resume(strategy)
        _note_engine(run, grid)
        if config.server.over_sampling:
            grid = FirstReplies(grid, config.server.clients_per_round)
        with run_log(run.path / LOG):
            rounds_left = config.rounds - strategy.rounds_done
            strategy.start(grid, ArrayRecord(), rounds_left, timeout=config.server.round_deadline)
            with span("server.report"):
                finish(run)
                write_report(run.path)
            logger.debug("the run is finished", extra=about(config.rounds))
    return run


def _note_engine(run: RunFolder, grid: Grid) -> None:
    """What carries the messages, by its class, which decides on how the run can go on; see ``framp.status``."""
    run.write_json(ENVIRONMENT, {**run.json(ENVIRONMENT), "grid": type(grid).__name__})


def _resume(strategy: SubmodelStrategy) -> None:
    checkpoint = checkpoint_of(strategy.run, strategy.config, type(strategy))
    if checkpoint is None:
        strategy.run.rewind(round=0, length=0)
    else:
        strategy.resume(checkpoint)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry point."""
    config = FrampConfig.from_flat(context.run_config)
    run = serve(grid, config)
    for line in plain_lines(run.json("summary.json")):
        logger.info("%s", line)
    logger.info("report: %s", run.path / "report.html")
