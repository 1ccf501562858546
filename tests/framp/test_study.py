import csv
import json
import subprocess
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from framp import cli
from framp.compare import runner, tables
from framp.compare.report import Compared
from framp.compare.results import Results
from framp.compare.tuning import Tuning, TuningPlan
from framp.study import harness, report
from framp.study.claims import CellOf, SmallAgainstFull, cells, published, strengthened
from framp.study.plan import read_study
from framp.study.report import Part
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.errors import ConfigError, EngineError, RunFolderError
from tests.framp.test_compare_statistics import result

SMOKE = Path(__file__).parents[2] / "studies" / "smoke.toml"
STUDY = """
title = "T"
[defaults]
preset = "cifar10-small"
methods = ["framp", "fedavg"]
seeds = [3, 4]
grid = [0.1, 0.2]
[defaults.overrides]
rounds = 7
local.steps = 3
[[settings]]
name = "one"
tune = true
tuning-rounds = 2
[[settings]]
name = "two"
title = "Second"
methods = ["fedavg"]
tune = "one"
overrides = { "local.steps" = 5, "partition.alpha" = 0.1 }
[[settings]]
name = "three"
seeds = [9]
reference = "fedavg"
"""


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def test_a_setting_lies_over_the_defaults_and_under_the_command_line(tmp_path: Path) -> None:
    given: dict[str, Scalar] = {"partition.alpha": 0.7, "data.root": "/images"}
    study = read_study(write(tmp_path), given, tmp_path / "out")
    one, two, three = study.settings
    assert one.plan == TuningPlan(1004, (0.1, 0.2), 2)
    assert (one.tuned_in, two.tuned_in, two.plan, three.plan) == ("", "one", None, None)
    assert (one.title, two.title) == ("one", "Second")
    assert two.comparison.methods == ("fedavg",)
    assert (three.comparison.seeds, three.comparison.reference) == ((9,), "fedavg")
    assert {each.comparison.out for each in study.settings} == {
        tmp_path / "out" / name for name in ("one", "two", "three")
    }
    configs = [each.comparison.runs()[0].config for each in study.settings]
    assert [config.local.steps for config in configs] == [3, 5, 3]
    assert {config.rounds for config in configs} == {7}
    assert {config.partition.alpha for config in configs} == {0.7}
    assert {config.model.widths for config in configs} == {(32, 64, 96, 96)}  # the preset
    assert study.command == "framp study study.toml -o partition.alpha=0.7 -o data.root=DIR"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds = [9]", "seed = [9]", "unknown key 'settings.2.seed'; did you mean 'seeds'"),
        ('title = "T"', 'titel = "T"', "unknown key 'titel'; did you mean 'title'"),
        ("grid = [0.1, 0.2]", "gird = [0.1]", "unknown key 'defaults.gird'; did you mean 'grid'"),
        ("rounds = 7", "round = 7", "setting 'one'.*unknown configuration key 'round'; did you mean 'rounds'"),
        ('methods = ["fedavg"]', 'methods = ["fedavgg"]', "setting 'two'.*did you mean 'fedavg'"),
        ('methods = ["fedavg"]', 'methods = ["fiarse"]', "no learning rate is chosen there for fiarse"),
        ('tune = "one"', 'tune = "three"', "'three' is not a setting above it with tune=true; there are: one"),
        ('tune = "one"', 'tune = "nine"', "'nine' is not a setting above it"),
        ('"partition.alpha" = 0.1', '"local.learning-rate" = 0.1', "an override sets it"),
        ('name = "three"', 'name = "one"', "two settings have the same name"),
        ('name = "three"', 'name = "../three"', "name is its folder"),
        ('preset = "cifar10-small"', 'preset = "cifar10-smal"', "did you mean 'cifar10-small'"),
        ("tuning-rounds = 2", "tuning-rounds = -2", "tuning-rounds"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "each once"),
        ('title = "T"', "title = ", "cannot be read as TOML"),
    ],
)
def test_mistakes_are_named_before_anything_starts(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert STUDY.count(old) == 1
    with pytest.raises(ConfigError, match=words):
        read_study(write(tmp_path, STUDY.replace(old, new)), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_study_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no study file .*nowhere\.toml"):
        read_study(tmp_path / "nowhere.toml", {}, tmp_path)


def test_rates_come_from_the_setting_that_chose_them(tmp_path: Path) -> None:
    one, two, three = read_study(write(tmp_path), {}, tmp_path / "out").settings
    assert one.plan is not None
    tuned = {"one": Tuning(one.plan, {"framp": (0.5, 0.4), "fedavg": (0.2, 0.6)}, ())}
    assert harness.rates_of(one, {}) == one.plan
    assert harness.rates_of(three, tuned) is None
    rates = harness.rates_of(two, tuned)
    assert isinstance(rates, Tuning)
    assert (rates.chosen, rates.setting) == ({"fedavg": 0.2}, "one")
    assert [run.config.local.learning_rate for run in two.comparison.runs(rates.chosen)] == [0.2, 0.2]


def test_a_setting_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(write(tmp_path), {}, tmp_path / "out")
    study.out.mkdir()
    done: list[str] = []

    def carry_out(comparison: Any, *_: object) -> tuple[None, list[runner.Failure]]:
        done.append(comparison.out.name)
        return None, [runner.Failure("framp-seed3", 1, Path("log"), "")] if comparison.out.name == "one" else []

    monkeypatch.setattr(harness, "carry_out", carry_out)
    with pytest.raises(EngineError, match="framp-seed3"):
        harness.run_study(study, 1, Console(file=StringIO()))
    assert done == ["one", "three"]  # without the learning rates of the first, the second makes no sense
    page = (study.out / "study.md").read_text()
    assert all(f"Setting {name} is missing" in page for name in ("one", "two", "three"))


def test_an_error_in_a_setting_stops_neither_the_others_nor_page_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(write(tmp_path), {}, tmp_path / "out")
    study.out.mkdir()
    pages: list[str] = []

    def carry_out(comparison: Any, *_: object) -> tuple[Compared, list[runner.Failure]]:
        page = study.out / "study.md"
        pages.append(page.read_text() if page.exists() else "")
        if comparison.out.name == "two":
            raise RunFolderError("another framp compare works there")
        tuning = Tuning(TuningPlan(1004, (0.1,)), {"framp": (0.5,), "fedavg": (0.5,)}, ())
        return Compared(comparison, results_of({"framp": 60, "fedavg": 50}), tuning, (), (), ()), []

    monkeypatch.setattr(harness, "carry_out", carry_out)
    with pytest.raises(EngineError, match="setting 'two': another framp compare works there"):
        harness.run_study(study, 1, Console(file=StringIO()), tmp_path / "docs")
    assert ["## one\n" in page for page in pages] == [False, True, True]
    exported = (tmp_path / "docs" / "study.md").read_text()
    assert all(words in exported for words in ("## one\n", "Setting two is missing", "## three\n"))


# Claims


def results_of(local: dict[str, int]) -> Results:
    runs = tuple(result(name, 0, {"local": base, "union": 50}) for name, base in local.items())
    return Results(tuple(local), (0,), runs)


def test_cells_say_who_is_first_and_by_how_much() -> None:
    results = results_of({"framp": 60, "fiarse": 59, "local": 62, "fedavg": 90, "fiarse-strong": 60, "framp-dense": 92})
    assert published(results, "framp") == ["fiarse", "local"]
    assert strengthened(results, "framp") == ["fiarse-strong"]
    against = cells(results, "framp", published(results, "framp"))
    assert against == [
        CellOf("local", "1/4", "local", 2.0), CellOf("local", "1", "local", 2.0),
        CellOf("union", "1/4", "fiarse", 0.0), CellOf("union", "1", "fiarse", 0.0),
    ]  # fmt: skip
    assert [cell.behind for cell in cells(results, "framp", ["fiarse-strong"])] == [0.0] * 4
    assert cells(results, "framp", []) == []


def test_methods_are_compared_on_the_seeds_that_both_have() -> None:
    bases = {("framp", 0): 60, ("framp", 1): 80, ("fiarse", 0): 62, ("fedavg", 1): 81}
    runs = tuple(result(name, seed, {"local": base, "union": base}) for (name, seed), base in bases.items())
    results = Results(("framp", "fiarse", "fedavg"), (0, 1), runs)
    assert [cell.behind for cell in cells(results, "framp", ["fiarse"])] == [2.0] * 4
    small = SmallAgainstFull.of(results, "framp")
    assert small is not None
    assert (small.reference, small.full) == pytest.approx((0.815, 0.825))
    local, _ = tables.accuracy_tables(results, "framp")
    assert {row for row, _ in local.best} == {1}, "FIARSE is ahead on the one seed that both have"


@pytest.mark.parametrize(("framp", "reached"), [(60, True), (59, False)])
def test_the_smallest_size_against_the_full_model_on_the_same_clients(framp: int, reached: bool) -> None:
    found = SmallAgainstFull.of(results_of({"framp": framp, "fedavg": 60}), "framp")
    assert found is not None
    # Clients 0 to 3 have the smallest size and 0 to 3 of 100 more than the base, all eight 0 to 7.
    assert (found.capacity, found.full, found.full_overall) == ("1/4", pytest.approx(0.615), pytest.approx(0.635))
    assert found.reference == pytest.approx(framp / 100 + 0.015)
    assert found.reached is reached
    assert SmallAgainstFull.of(results_of({"framp": 60}), "framp") is None


def test_the_page_says_once_how_to_read_it(tmp_path: Path) -> None:
    text = STUDY.replace('"local.steps" = 5', '"evaluation.local-prior-strength" = 0')
    settings = read_study(write(tmp_path, text), {}, tmp_path / "out").settings
    results = results_of({"framp": 60, "fedavg": 90, "local": 50})
    parts = [Part(each, Compared(each.comparison, results, None, (), (), ())) for each in settings]
    heading, said = report._reading(parts)
    assert heading == "## Reading this page"
    for words in ("±", "†: ignores budgets", "Bold: ", "Local: ", "Union: ", "Unseen: ", "No Unseen for Local only"):
        assert words in said
    assert "with strength 1; 0 in Second (`evaluation.local-prior-strength`). Union: no prior." in said
    assert report._reading([]) == []


# For real


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """The folder of the finished smoke study, its command, and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    arguments = ["study", str(SMOKE), "--out", str(folder / "out"), "--export", str(folder / "docs")]
    arguments += ["-o", f"data.cache={folder / 'cache'}"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    return folder, arguments, done.output


def test_a_study_writes_a_page_over_its_settings(smoke: tuple[Path, list[str], str]) -> None:
    folder, _, output = smoke
    assert "Where the reference is first" in output
    page = (folder / "out" / "study.md").read_text()
    for words in ("## Label skew\n", "## Label skew and rotated images\n", "Each seed", "full-size FedAvg's Local"):
        assert words in page
    assert "on seed 1001, after 2 rounds" in page
    assert "chosen in the setting label-skew" in page
    content = json.loads((folder / "out" / "study.json").read_text())
    assert set(content["settings"]) == {"label-skew", "rotated"}
    assert content["settings"]["rotated"]["seeds"] == [0]
    rates = {name: setting["learning_rates"] for name, setting in content["settings"].items()}
    assert rates["label-skew"] == rates["rotated"]
    for run in (folder / "out" / "rotated" / "runs").glob("*-seed0/config.toml"):
        config = FrampConfig.load(run)
        assert config.partition.feature_shift == "rotation"
        assert [config.local.learning_rate] in rates["rotated"].values()
    tuned = FrampConfig.load(folder / "out" / "label-skew" / "tuning" / "framp-rate0.1" / "config.toml")
    assert (tuned.rounds, tuned.seed) == (2, 1001)
    with (folder / "out" / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3  # settings, methods, two sizes and their mean
    first = content["settings"]["label-skew"]["results"][0]
    assert float(rows[0]["local"]) == first["local"]


def test_an_export_is_whole_and_names_no_path(smoke: tuple[Path, list[str], str]) -> None:
    folder, *_ = smoke
    for name in ("study.md", "study.json", "study.csv"):
        text = (folder / "docs" / name).read_text()
        assert text == (folder / "out" / name).read_text()
        assert str(folder) not in text
    page = (folder / "docs" / "study.md").read_text()
    linked = [part.split(")")[0] for part in page.split("](")[1:]]
    assert {Path(link).stem for link in linked} == {"accuracy_by_size", "learning_curves", "prior_curve", "prototypes"}
    for link in linked:
        assert (folder / "docs" / link).read_bytes().startswith(b"\x89PNG")


def test_the_same_command_repeats_nothing(smoke: tuple[Path, list[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, arguments, _ = smoke
    before = {name: (folder / "out" / name).read_bytes() for name in ("study.md", "study.json", "study.csv")}

    def no_process(*_: object, **__: object) -> subprocess.Popen[bytes]:
        raise AssertionError("a run was started")

    monkeypatch.setattr(runner.subprocess, "Popen", no_process)
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert {name: (folder / "out" / name).read_bytes() for name in before} == before


def test_an_export_that_cannot_be_written_is_explained(
    smoke: tuple[Path, list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments, _ = smoke
    (folder / "taken").touch()
    done = CliRunner().invoke(cli.app, [*arguments[:5], str(folder / "taken"), *arguments[6:]])
    assert isinstance(done.exception, RunFolderError)
    assert "--export" in str(done.exception)
