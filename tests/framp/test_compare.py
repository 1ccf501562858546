import csv
import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from framp import cli
from framp.compare import harness, runner
from framp.compare.plan import Comparison, PlannedRun, find_preset, public_options, public_path
from framp.compare.results import Results, RunResult
from framp.compare.tuning import Tuning, TuningPlan
from framp_core.config_values import Scalar
from framp_core.errors import ConfigError, EngineError, RunFolderError
from framp_core.methods import METHODS
from framp_core.metrics import MEAN
from framp_core.report.summary import Record, summary_of
from framp_core.run_folder import EVENTS, RunFolder
from tests.conftest import TINY
from tests.framp.test_compare_statistics import result

SHORT: dict[str, Scalar] = {
    **TINY,
    "rounds": 1,
    "partition.unseen-clients": 4,
    "capacity.sizes": "1/4,1",
    "generator.max-parameters": 4000,  # enough for the modulated generator, too few for the dense one
}


def comparison(out: Path, *methods: str, seeds: tuple[int, ...] = (0, 1), **more: Any) -> Comparison:
    overrides = {**SHORT, "data.cache": str(out.parent / "cache"), **more.pop("overrides", {})}
    return Comparison(None, overrides, methods or ("framp", "framp-shared"), seeds, out, **more)


def quiet() -> Console:
    return Console(file=StringIO(), width=200)


def arguments(asked: Comparison) -> list[str]:
    options = [
        "--methods",
        ",".join(asked.methods),
        "--seeds",
        ",".join(map(str, asked.seeds)),
        "--out",
        str(asked.out),
    ]
    return ["compare", *options, *(part for key, value in asked.overrides.items() for part in ("-o", f"{key}={value}"))]


def finish_at_once(run: PlannedRun, validation: float = 0.5) -> None:
    """What the process of a run would leave, as far as the runner looks at it."""
    summary = summary_of(Record.of(RunFolder.create(run.folder, run.config)))
    empty = summary["rows"][-1]
    rows = [{**empty, "capacity": "1/4", "validation": 1.0}, {**empty, "capacity": MEAN, "validation": validation}]
    (run.folder / "summary.json").write_text(json.dumps({**summary, "rows": rows}))


def no_process(*_: object, **__: object) -> None:
    raise AssertionError("a run was started")


# Settings


def test_method_settings_lie_over_the_preset_and_under_the_overrides(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text("rounds = 7\n[server]\nweighting = 'uniform'\nshared-momentum = 0.9\n[local]\nsteps = 3\n")
    asked = Comparison(preset, {"server.shared_momentum": 0.25}, ("fedavg",), (4,), tmp_path / "out")
    (run,) = asked.runs()
    fixed = METHODS["fedavg"].settings
    assert fixed["server.weighting"] == "examples"
    assert fixed["server.shared-momentum"] == 0.0
    assert run.config.rounds == 7  # preset
    assert run.config.local.steps == 3
    assert run.config.server.weighting == "examples"  # the method, over the preset
    assert run.config.server.shared_momentum == 0.25  # the override, over both
    assert (run.config.seed, run.config.engine.workers) == (4, 1)
    assert asked.replaced() == {"server.shared-momentum": ["fedavg"]}
    assert asked.config("fedavg", 4, run.folder, learning_rate=0.7).local.learning_rate == 0.7


def test_no_method_fixes_what_must_be_the_same_for_all() -> None:
    common = ("seed", "rounds", "data.", "partition.", "capacity.", "evaluation.", "engine.", "output.")
    common += ("local.steps", "local.batch-size", "local.learning-rate", "server.clients-per-round")
    touched = [(name, key) for name, method in METHODS.items() for key in method.settings if key.startswith(common)]
    assert touched == []


def test_runs_of_a_seed_come_together_with_folders_of_their_own(tmp_path: Path) -> None:
    runs = comparison(tmp_path / "out", seeds=(3, 5)).runs()
    assert [run.name for run in runs] == ["framp-seed3", "framp-shared-seed3", "framp-seed5", "framp-shared-seed5"]
    assert {run.folder.parent for run in runs} == {tmp_path / "out" / "runs"}
    assert len({run.config.digest() for run in runs}) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ("framp", "fedavgg")}, "unknown method 'fedavgg'; did you mean 'fedavg'?"),
        ({"methods": ()}, "--methods"),
        ({"methods": ("framp", "framp")}, "each once"),
        ({"seeds": (0, 0)}, "--seeds"),
        ({"reference": "fedavg"}, "not among --methods"),
        ({"overrides": {"seed": 3}}, "--seeds"),
        ({"overrides": {"engine.workers": 3}}, "--workers"),
        ({"overrides": {"output.folder": "/x"}}, "--out"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        dataclasses.replace(comparison(tmp_path / "out"), **change)


def test_a_preset_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'fiarse-cifar10' has method = 'fiarse-released'"):
        Comparison(find_preset("fiarse-cifar10"), {}, ("framp",), (0,), tmp_path)


def test_two_names_for_the_same_settings_are_refused(tmp_path: Path) -> None:
    asked = comparison(tmp_path / "out", overrides={"generator.name": "modulated"})
    with pytest.raises(ConfigError, match="framp and framp-shared have the same settings"):
        asked.runs()


def test_commands_name_no_place_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        public_path(Path("studies/mine.toml")) == public_path(tmp_path / "studies" / "mine.toml") == "studies/mine.toml"
    )
    assert public_path(tmp_path.parent / "mine.toml") == "mine.toml"
    given: dict[str, Scalar] = {"data.root": "/images", "data.cache": "/cache", "rounds": 3}
    assert public_options(given) == ["-o", "data.root=DIR", "-o", "data.cache=DIR", "-o", "rounds=3"]


def test_presets_are_found_by_name() -> None:
    assert find_preset("digits") is None
    found = find_preset("cifar10-small")
    assert found is not None
    assert found.is_file()
    with pytest.raises(ConfigError, match="did you mean 'cifar10-small'"):
        find_preset("cifar10-smal")


# Which runs are done


def test_a_finished_run_is_not_done_again_and_an_interrupted_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = comparison(tmp_path / "out").runs()
    for run in runs:
        finish_at_once(run)
    killed_at_birth = runs[0]
    shutil.rmtree(killed_at_birth.folder)
    killed_at_birth.folder.mkdir()
    (killed_at_birth.folder / "config.toml.tmp").write_text("method = ")
    interrupted = runs[2]
    (interrupted.folder / "summary.json").unlink()
    (interrupted.folder / "left-over").touch()
    started = []

    def process(command: list[str], **_: object) -> subprocess.Popen[bytes]:
        folder = Path(command[-1])
        assert not folder.exists()
        started.append(folder.name)
        finish_at_once(next(run for run in runs if run.folder == folder))
        return real([sys.executable, "-c", ""])

    real = subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", process)
    assert runner.execute(runs, 2, quiet()) == []
    assert started == ["framp-seed0", "framp-seed1"]
    assert not (interrupted.folder / "left-over").exists()
    monkeypatch.setattr(runner.subprocess, "Popen", no_process)
    assert runner.execute(runs, 2, quiet()) == []


def test_a_run_at_work_is_not_taken_for_an_interrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that is killed by signal 9 leaves its runs at work."""
    runs = comparison(tmp_path / "out", seeds=(0,)).runs()
    working = RunFolder.create(runs[1].folder, runs[1].config)
    working.event("train", 1)
    monkeypatch.setattr(runner.subprocess, "Popen", no_process)
    with working.alone(), pytest.raises(RunFolderError, match=r"another process works on the run in .*framp-shared"):
        runner.execute(runs, 2, quiet())
    assert working.has(EVENTS)
    assert not runs[1].is_finished()


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_other_settings_is_refused_and_left_alone(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old, *_) = comparison(tmp_path / "out", overrides={"local.steps": 9}).runs()
    finish_at_once(old)
    if not finished:
        (old.folder / "summary.json").unlink()
    before = sorted(old.folder.iterdir())
    monkeypatch.setattr(runner.subprocess, "Popen", no_process)
    with pytest.raises(RunFolderError, match=r"local\.steps is 9 there and 2 here\. Results are never"):
        runner.execute(comparison(tmp_path / "out").runs(), 1, quiet())
    assert sorted(old.folder.iterdir()) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run, *_) = comparison(tmp_path / "out").runs()
    run.folder.mkdir(parents=True)
    (run.folder / "thesis.tex").touch()
    monkeypatch.setattr(runner.subprocess, "Popen", no_process)
    with pytest.raises(RunFolderError, match="not a run folder"):
        runner.execute([run], 1, quiet())
    assert (run.folder / "thesis.tex").exists()


def test_a_folder_that_is_not_the_run_in_the_end_fails_that_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = comparison(tmp_path / "out", seeds=(0,)).runs()

    def process(command: list[str], **_: object) -> subprocess.Popen[bytes]:
        if command[-1] == str(bad.folder):
            bad.folder.mkdir()
            (bad.folder / "thesis.tex").touch()
        else:
            finish_at_once(good)
        return real([sys.executable, "-c", ""])

    real = subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", process)
    (failure,) = runner.execute([bad, good], 1, quiet())
    assert (failure.run, failure.status) == (bad.name, 0)
    assert "not a run folder" in failure.tail


def test_differences_leave_out_what_cannot_change_numbers(tmp_path: Path) -> None:
    here, there = comparison(tmp_path / "a").runs()[0].config, comparison(tmp_path / "b").runs()[0].config
    assert here != there
    assert here.digest() == there.digest()
    assert here.differences(there.to_flat()) == []


def test_two_processes_do_not_work_on_one_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = comparison(tmp_path / "out")
    monkeypatch.setattr(runner.subprocess, "Popen", no_process)
    with harness._alone(asked.out), pytest.raises(RunFolderError, match="another framp compare"):
        harness.compare_methods(asked, None, 1, quiet())


# Tuning


def test_the_best_validation_accuracy_chooses_the_smaller_of_equal_rates() -> None:
    plan = TuningPlan(1000, (0.03, 0.1, 0.3))
    scores = {"framp": (0.5, 0.7, 0.7), "fedavg": (None, 0.1, 0.4), "local": (None, None, None)}
    tuning = Tuning(plan, scores, ())
    assert tuning.chosen == {"framp": 0.1, "fedavg": 0.3}
    assert tuning.at_edge() == ["fedavg"]
    failures = [runner.Failure(f"{name}-rate0.03", 1, Path("log"), "") for name in ("fedavg", "local")]
    assert tuning.missed(failures) == failures[1:], "a method with another rate has not failed"


def test_tuning_uses_its_own_seed_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = comparison(tmp_path / "out", "framp", "fedavg", "framp-shared", seeds=(2, 7))
    plan = TuningPlan.of(asked, (0.3, 0.1))
    assert plan == TuningPlan(1007, (0.1, 0.3))
    best = {"framp": 0.1, "fedavg": 0.3}
    for method, rate in itertools.product(best, plan.grid):
        folder = asked.out / "tuning" / f"{method}-rate{rate:g}"
        finish_at_once(PlannedRun(method, asked.config(method, 1007, folder, rate)), 0.9 - abs(rate - best[method]))
    monkeypatch.setattr(runner.subprocess, "Popen", no_process)
    tuning = harness.tune(asked, plan, 1, quiet())
    assert tuning.chosen == best
    rates = {**best, "framp-shared": best["framp"]}
    assert tuning.rates(asked) == rates, "an ablation takes the rate of the reference"
    for run in asked.runs(rates):
        assert run.config.local.learning_rate == rates[run.method]
    assert [run.method for run in asked.runs({"framp": 0.1})] == ["framp", "framp"]
    harness.write_tuning(asked, tuning)
    written = json.loads((asked.out / "tuning.json").read_text())
    assert (written["seed"], written["grid"], written["chosen"]) == (1007, [0.1, 0.3], best)


@pytest.mark.parametrize(
    ("overrides", "grid", "seed", "words"),
    [
        ({}, (0.1,), 1, "also a test seed"),
        ({}, (), None, "--grid"),
        ({}, (0.1, 0.1), None, "each once"),
        ({}, (0.1, 0.0), None, "finite and above 0"),
        ({}, (0.1, float("nan")), None, "finite and above 0"),
        ({"capacity.sizes": "2"}, (0.1,), None, "outside"),
        ({"local.learning_rate": 0.1}, (0.1,), None, "use one of the two"),
        ({"partition.validation-fraction": 0}, (0.1,), None, "validation-fraction is 0"),
    ],
)
def test_tuning_that_makes_no_sense_is_refused(
    overrides: dict[str, Scalar], grid: tuple[float, ...], seed: int | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        TuningPlan.of(comparison(tmp_path / "out", overrides=overrides), grid, seed)


# Results


def test_different_partitions_of_one_seed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = comparison(tmp_path / "out", seeds=(0,)).runs()
    for run in runs:
        finish_at_once(run)
    found = {run.method: result(run.method, 0, {"local": 50, "union": 50}) for run in runs}
    monkeypatch.setattr(RunResult, "read", lambda run: found[run.method])
    assert Results.read(runs).methods == ("framp", "framp-shared")
    found["framp-shared"] = dataclasses.replace(found["framp-shared"], partition="another")
    with pytest.raises(RunFolderError, match="different partitions for seed 0"):
        Results.read(runs)


# For real


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, str]:
    """A finished comparison through the command line, and what it printed."""
    asked = comparison(tmp_path_factory.mktemp("compare") / "out")
    done = CliRunner().invoke(cli.app, [*arguments(asked), "--workers", "2"])
    assert done.exit_code == 0, done.output
    return asked, done.output


def test_a_comparison_prints_tables_and_tests(real: tuple[Comparison, str]) -> None:
    _, output = real
    for words in ("[4/4]", "Local accuracy, %", "Unseen accuracy, %", "FRAMP, shared model alone", "Parameters held"):
        assert words in output
    assert "Clients of one seed share a server" in " ".join(output.split())


def test_a_comparison_writes_what_it_found(real: tuple[Comparison, str]) -> None:
    asked, _ = real
    content = json.loads((asked.out / "comparison.json").read_text())
    assert {(run["method"], run["seed"]) for run in content["runs"]} == set(
        itertools.product(asked.methods, asked.seeds)
    )
    digests = {seed: {run["partition_digest"] for run in content["runs"] if run["seed"] == seed} for seed in (0, 1)}
    assert all(len(found) == 1 for found in digests.values())
    assert digests[0] != digests[1]
    overall = next(test for test in content["tests"] if (test["column"], test["capacity"]) == ("local", "mean"))
    assert overall["pairs"] == 8
    with (asked.out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3
    mean = [float(row["local"]) for row in rows if (row["method"], row["capacity"]) == ("framp", "mean")]
    shown = next(row for row in content["results"] if (row["method"], row["capacity"]) == ("framp", "mean"))
    assert shown["local"] == pytest.approx(sum(mean) / 2)
    assert shown["local_std"] == pytest.approx(np.std(mean, ddof=1))


def test_every_figure_of_the_page_exists(real: tuple[Comparison, str]) -> None:
    asked, _ = real
    page = (asked.out / "comparison.md").read_text()
    assert "## What each part contributes" in page
    assert "against the others" not in page  # the only other method is an ablation
    names = ("accuracy_by_size", "learning_curves", "client_accuracy", "prior_curve", "mask_selection", "mask_overlap")
    for name in names:
        assert f"](figures/{name}.png)" in page
        assert (asked.out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"framp compare --methods framp,framp-shared --seeds 0,1 -o rounds={SHORT['rounds']}" in page


def test_a_finished_comparison_is_only_drawn_again(
    real: tuple[Comparison, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, _ = real
    before = {path.name: path.read_bytes() for path in asked.out.iterdir() if path.suffix in (".json", ".csv", ".md")}
    for path in [*asked.out.glob("comparison.*"), *asked.out.glob("figures/*")]:
        path.unlink()
    monkeypatch.setattr(runner.subprocess, "Popen", no_process)
    done = CliRunner().invoke(cli.app, arguments(asked))
    assert done.exit_code == 0, done.output
    assert "4 of 4 finished before" in done.output
    assert {name: (asked.out / name).read_bytes() for name in before} == before
    assert len(list(asked.out.glob("figures/*.png"))) == 6


def test_a_run_that_fails_is_reported_and_the_others_count(real: tuple[Comparison, str], tmp_path: Path) -> None:
    done_before, _ = real
    asked = dataclasses.replace(done_before, methods=("framp-dense", "framp"), seeds=(0,), out=tmp_path / "out")
    asked = dataclasses.replace(asked, reference="framp")
    shutil.copytree(done_before.out / "runs" / "framp-seed0", asked.out / "runs" / "framp-seed0")
    done = CliRunner().invoke(cli.app, arguments(asked))
    assert isinstance(done.exception, EngineError)
    assert done.exit_code == 1
    assert "framp-dense-seed0: failed with status 1" in done.output
    assert "ModelError" in done.output  # the end of its log
    assert "framp-dense-seed0" in str(done.exception)
    page = (asked.out / "comparison.md").read_text()
    assert "Run framp-dense-seed0 failed" in page
    assert "| FRAMP | framp |" in page


def test_a_signal_stops_the_runs_too(tmp_path: Path) -> None:
    asked = comparison(tmp_path / "out", seeds=(0,), overrides={"rounds": 10_000, "evaluation.every": 10_000})
    command = [sys.executable, "-m", "framp", *arguments(asked), "--workers", "1"]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (asked.out / "runs" / "framp-seed0" / "config.toml").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = process.children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        if process.is_running():
            process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
