"""The ``framp`` command."""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.logging import RichHandler
from rich.table import Table

from framp.progress import RunProgress
from framp.terminal import Terminal, prepare_streams
from framp_core import files
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar, check_known, parse_capacity, parse_override
from framp_core.errors import ConfigError, EngineError, FrampError
from framp_core.methods import METHODS, settings_of

if TYPE_CHECKING:
    from framp_core.data import DataSummary

app = typer.Typer(
    help="Personalised submodels for clients that differ in data and in budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at data and partitions.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Terminal()
_SHOWN = ("flwr.framp.resume", "flwr.framp.data")
"""Loggers whose warnings are shown, too."""

ConfigPath = Annotated[Path | None, typer.Argument(help="TOML preset; none: the digits preset.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", metavar="KEY=VALUE", help="Override a key; repeatable."),
]


class Engine(StrEnum):
    """Where clients run."""

    LOCAL = "local"
    FLOWER = "flower"


def read_overrides(overrides: list[str] | None) -> dict[str, Scalar]:
    """Read ``-o`` options; paths given on the command line may be relative to the working directory."""
    values: dict[str, Scalar] = dict(parse_override(text) for text in overrides or [])
    for key in ("data.root", "data.cache", "output.folder", "output.resume"):
        if values.get(key):
            values[key] = str(files.resolved(str(values[key])))
    return values


def load_config(path: Path | None, overrides: list[str] | None, **fixed: Scalar) -> FrampConfig:
    """Read a configuration with the ``-o`` options on it.

    ``-o method=NAME`` takes any method of the comparison and lays its settings under the other options.
    """
    values = {**read_overrides(overrides), **fixed}
    if "method" in values:
        method = str(values["method"])
        check_known(method, METHODS, "method")
        values = settings_of(method, values)
    return FrampConfig.load(path, values)


def resumed_config(
    given: Path | None, folder: Path, overrides: list[str] | None, fixed: Mapping[str, Scalar]
) -> FrampConfig:
    """The configuration of an unfinished run, with options on it that say where and how it works.

    Raises:
        ConfigError: another configuration file is given, too, or the run folder's is not one of this version.
        RunFolderError: the folder is not a run folder.
    """
    from framp_core.run_folder import CONFIG, RunFolder

    if given is not None:
        raise ConfigError(f"--resume {folder} goes on with the configuration in that folder; leave out {given}")
    path = RunFolder.open(files.resolved(folder)).path
    paths = {"output.folder": "", "output.resume": str(path)}
    return load_config(path / CONFIG, overrides, **{**paths, **read_overrides(overrides), **fixed})


def new_run_folder(config_path: Path | None) -> Path:
    """``runs/<preset>-<time>`` in the working directory."""
    name = config_path.stem if config_path else "digits"
    return Path.cwd() / "runs" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


@app.command()
def run(
    config: ConfigPath = None,
    override: Overrides = None,
    engine: Annotated[Engine, typer.Option(help="In this process, or Flower's simulation on Ray.")] = Engine.LOCAL,
    out: Annotated[Path | None, typer.Option(help="Run folder to create.", show_default="runs/PRESET-TIME")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes; 0: one per core.", show_default="the preset's")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the unfinished run in this folder.", show_default=False)
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time went, and peak memory.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="With --profile: trace.json for chrome://tracing.")] = False,
) -> None:
    """Train, evaluate, and write a run folder with its report."""
    from framp.engines import run_flower, run_local
    from framp.interruption import run_words, saying
    from framp.profiling import PROFILE, profile_table, run_profiled
    from framp_core.report import results_table
    from framp_core.run_folder import RunFolder

    _check_profile(profile, trace, engine)
    fixed: dict[str, Scalar] = {} if workers is None else {"engine.workers": workers}
    if out is not None:
        fixed["output.folder"] = str(files.resolved(out))
    loaded = (
        load_config(config, override, **fixed) if resume is None else resumed_config(config, resume, override, fixed)
    )
    folder = Path(loaded.output.resume or loaded.output.folder or new_run_folder(config))
    if not loaded.output.resume:
        RunFolder.refuse_existing(folder)  # Before its events would be shown as this run's.
        loaded = loaded.model_copy(update={"output": loaded.output.model_copy(update={"folder": str(folder)})})
    _log_errors()
    with (
        saying(lambda: run_words(folder)),
        RunProgress(console, folder, loaded.rounds, resumed=bool(loaded.output.resume)),
    ):
        if profile:
            finished = run_profiled(loaded, trace=trace)
        else:
            finished = run_flower(loaded) if engine is Engine.FLOWER else run_local(loaded)
    console.print(results_table(finished.json("summary.json")))
    if profile:
        console.print(profile_table(finished.json(PROFILE)))
    console.say(f"report: {finished.path / 'report.html'}")


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help="Comma-separated; the first is tested against the others.")],
    config: ConfigPath = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated; a seed fixes partition and initial weights.")] = "0,1,2",
    preset: Annotated[str | None, typer.Option(help="A preset that comes with FRAMP, by name.")] = None,
    override: Overrides = None,
    reference: Annotated[str, typer.Option(help="Test this one instead.", show_default="the first method")] = "",
    tune: Annotated[bool, typer.Option("--tune", help="Choose each method's learning rate from --grid.")] = False,
    grid: Annotated[str, typer.Option(help="Learning rates that --tune tries.")] = "0.03,0.1,0.3",
    tuning_seed: Annotated[int | None, typer.Option(min=0, show_default="largest seed + 1000")] = None,
    tuning_rounds: Annotated[int, typer.Option(min=0, show_default="as many as the others")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; resumed if it exists.", show_default="runs/compare")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time.", show_default="one per core")] = None,
) -> None:
    """Run methods side by side, test one against the others, and write tables and figures."""
    from framp.compare import Comparison, TuningPlan, compare_methods, find_preset, parse_list
    from framp.interruption import same_words, saying

    if config is not None and preset is not None:
        raise ConfigError(f"give a configuration file ({config}) or --preset {preset}, not both")
    comparison = Comparison(
        preset=find_preset(preset) if preset is not None else config,
        overrides=read_overrides(override),
        methods=parse_list(methods, "--methods", str),
        seeds=parse_list(seeds, "--seeds", int),
        out=files.resolved(out or Path("runs") / "compare"),
        reference=reference,
    )
    plan = TuningPlan.of(comparison, parse_list(grid, "--grid", float), tuning_seed, tuning_rounds) if tune else None
    with saying(lambda: same_words("finished runs are kept, the others start again")):
        written = compare_methods(comparison, plan, workers, console)
    console.say(f"comparison: {written}")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="TOML file of a study.", show_default=False)],
    override: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder; resumed if it exists.", show_default="runs/FILE")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time.", show_default="one per core")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Copy page, figures and data into this folder.", show_default=False)
    ] = None,
) -> None:
    """Compare methods in several settings, and write one page over all."""
    from framp.interruption import same_words, saying
    from framp.study import read_study, run_study

    target = files.resolved(out or Path("runs") / file.stem)
    asked = read_study(file, read_overrides(override), target)
    with saying(lambda: same_words("finished runs are kept, the others start again")):
        run_study(asked, workers, console, files.resolved(export) if export is not None else None)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]) -> None:
    """Write report.html of a run folder again, and print its table."""
    from framp_core.report import results_table, summary_of_run, write_report
    from framp_core.run_folder import RunFolder

    folder = files.resolved(run_dir)
    path = write_report(folder)
    console.print(results_table(summary_of_run(RunFolder.open(folder))))
    console.say(f"report: {path}")


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show how far a run is, how well it does, and how it goes on; while it works, too."""
    from framp.status import RunStatus

    found = RunStatus.of(files.resolved(run_dir))
    if as_json:
        console.say(json.dumps(found.to_dict(), indent=2))
        return
    _show_rows(found.folder, found.rows())


@app.command()
def personalise(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="The client's images: train/CLASS/*, test/CLASS/*.", show_default=False)
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Instead: a client of the run, by name.", show_default=False)
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(help="Share of the weights it can hold.", show_default="a client of the run: its own")
    ] = None,
    fine_tune: Annotated[int, typer.Option(min=0, metavar="STEPS", help="Local steps on the kept weights.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the model to this file.", show_default=False)] = None,
) -> None:
    """Give an unseen client a model from its descriptor alone, and measure it."""
    from framp.personalise import personalise as give_model

    gamma = parse_capacity(capacity) if capacity is not None else None
    folder, written = files.resolved(run_dir), files.resolved(out) if out is not None else None
    root = files.resolved(data) if data is not None else None
    found = give_model(folder, root, client, gamma, fine_tune, written)
    _show_rows("Personal model", found.rows())
    if written is not None:
        console.say(f"model: {written} ({written.stat().st_size:,} bytes, dense)")


@app.command()
def node(
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the server.", show_default=False)],
    partition: Annotated[int, typer.Option(min=0, help="This client's index, from 0.", show_default=False)],
    of: Annotated[int, typer.Option(min=1, help="Number of clients of the federation.", show_default=False)],
    name: Annotated[str, typer.Option(help="Stable name of this client.", show_default=False)],
    capacity: Annotated[str, typer.Option(help="Fraction of the weights it can hold.", show_default=False)],
    data_dir: Annotated[Path, typer.Option(help="Folder of its data.", show_default=False)],
    key: Annotated[Path, typer.Option(help="Its private key.", show_default=False)],
    config: ConfigPath = None,
    override: Overrides = None,
    root_certificates: Annotated[
        Path | None, typer.Option(help="The server's ca.crt.", show_default="the system's authorities")
    ] = None,
    env_file: Annotated[
        Path | None, typer.Option(help="Also write what docker/client.compose.yml reads.", show_default=False)
    ] = None,
) -> None:
    """Check this device before it joins a federation, and print the command that starts its SuperNode."""
    from framp.node import Device, DeviceCheck, compose_variables

    authority = files.resolved(root_certificates) if root_certificates is not None else None
    paths = [files.resolved(path) for path in (key, data_dir)]
    device = Device(superlink, authority, paths[0], partition, of, name, capacity, paths[1])
    _log_errors()
    check = DeviceCheck(load_config(config, override), device)
    findings = check.findings()
    for finding in findings:
        mark = "[green]ok    [/]" if finding.passed else "[red]failed[/]"
        console.print(f"{mark} {finding.check:8} ", end="")
        console.say(finding.said)
    if not all(finding.passed for finding in findings):
        raise EngineError("this device is not ready to join; see the checks that failed")
    if env_file is not None:
        files.write_text(files.resolved(env_file), compose_variables(device, check.peak_bytes))
    console.say(device.command)


@data_app.command()
def inspect(config: ConfigPath = None, override: Overrides = None) -> None:
    """Show a data set and how it is divided among the clients."""
    from framp_core.data import summarise_data

    summary = summarise_data(load_config(config, override))
    _show_rows("Data", {fact["fact"]: fact["value"] for fact in summary.facts})
    console.print(_clients_table(summary))
    console.print(f"partition digest: {summary.digest}", soft_wrap=True)


def _show_rows(title: str, rows: Mapping[str, str]) -> None:
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    for heading, value in rows.items():
        table.add_row(Text(heading), Text(value, overflow="fold"))
    console.print(table)


def _clients_table(summary: "DataSummary") -> Table:
    from rich.text import Text

    from framp_core.data.inspect import shares_text

    headings = ("client", "role", "size", "train", "val.", "test", "classes")
    rows = [
        tuple(map(str, (row.client, row.role, row.capacity, row.train, row.validation, row.test, row.classes)))
        for row in summary.clients
    ]
    table = Table(
        title="Clients and their training data",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 3 else "right", no_wrap=True)
    table.add_column("most frequent")
    taken = sum(1 + max(map(len, column)) for column in zip(headings, *rows, strict=True))
    for cells, row in zip(rows, summary.clients, strict=True):
        table.add_row(*cells, Text(shares_text(row.most_frequent, console.width - taken)))
    return table


def _check_profile(profile: bool, trace: bool, engine: Engine) -> None:
    if trace and not profile:
        raise ConfigError("--trace writes what --profile records; give both")
    if profile and engine is Engine.FLOWER:
        raise ConfigError(
            "--profile follows the in-process engine alone: Ray starts its clients where no profile can reach; "
            "leave out --engine flower"
        )


def _log_errors() -> None:
    """Flower's log only where something went wrong, how a run goes on, and what of the data is left out.

    The progress display shows the rest.
    """
    handler = RichHandler(console=console, show_path=False, show_time=False)
    # A run turns its own logger up for log.jsonl, so that what the console shows is decided here.
    handler.addFilter(lambda record: record.levelno >= (logging.WARNING if record.name in _SHOWN else logging.ERROR))
    logger = logging.getLogger("flwr")
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR)
    for name in _SHOWN:
        logging.getLogger(name).setLevel(logging.WARNING)


def main() -> None:
    """Entry point: errors that FRAMP names become one message and exit status 1; see also ``framp.interruption``."""
    if sys.platform == "win32":
        sys.exit("framp runs on Linux and macOS. On Windows install it in WSL: https://learn.microsoft.com/windows/wsl")
    from framp.interruption import end_on_signals

    prepare_streams()
    end_on_signals()
    try:
        app()
    except FrampError as error:
        _fail(type(error).__name__, str(error))
    except MemoryError as error:
        _fail("MemoryError", f"{error}; ask for less: fewer clients, narrower layers, smaller batches")


def _fail(kind: str, message: str) -> None:
    errors = Terminal(stderr=True)
    errors.print(f"[bold red]{kind}[/]: ", end="")
    errors.say(message)
    sys.exit(1)
