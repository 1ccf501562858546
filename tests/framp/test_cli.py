import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from framp import cli
from framp_core.run_folder import RunFolder
from tests.conftest import TINY

runner = CliRunner()


def options(tmp_path: Path) -> list[str]:
    values = {**TINY, "data.cache": str(tmp_path / "cache")}
    return [part for key, value in values.items() for part in ("-o", f"{key}={value}")]


def fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the installed command writes to its error stream; asserts a non-zero exit."""
    monkeypatch.setattr("sys.argv", ["framp", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    return " ".join(capfd.readouterr().err.split())


def test_run_prints_table_and_report(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["run", "--out", str(tmp_path / "run"), *options(tmp_path)])
    assert result.exit_code == 0, result.output
    for word in ("Local", "Union", "Unseen", "1/64", "Mean", "report.html", "round 2/2"):
        assert word in result.output
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_profile_is_printed(tmp_path: Path) -> None:
    arguments = ["run", "--profile", "--trace", "--out", str(tmp_path / "run"), *options(tmp_path)]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    for word in ("generate", "transport", "aggregate", "wall-clock", "peak memory"):
        assert word in result.output
    assert (tmp_path / "run" / "trace.json").is_file()


def test_report_can_be_made_again(tmp_path: Path) -> None:
    runner.invoke(cli.app, ["run", "--out", str(tmp_path / "run"), *options(tmp_path)])
    (tmp_path / "run" / "report.html").unlink()
    result = runner.invoke(cli.app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "report.html").is_file()


def test_inspect_shows_who_holds_what(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["data", "inspect", *options(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "client-0004" in result.output
    assert "unseen" in result.output


def test_relative_paths_on_the_command_line_are_taken_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.load_config(None, ["data.root=images"]).data.root == str(tmp_path / "images")


def test_a_method_brings_its_settings_and_options_win_over_them() -> None:
    plain = cli.load_config(None, ["method=heterofl"])
    assert (plain.method, plain.generator.name, plain.local.masked_cross_entropy) == ("heterofl", "shared", True)
    assert plain.server.shared_momentum == 0.0
    assert cli.load_config(None, ["method=heterofl-strong"]).server.shared_momentum == 0.5
    assert cli.load_config(None, ["method=heterofl", "server.shared-momentum=0.9"]).server.shared_momentum == 0.9
    assert cli.load_config(None, ["method=fedavg"]).extraction.name == "full"
    assert cli.load_config(None, []).method == "framp"


def test_the_run_folder_may_come_from_the_configuration(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["run", "-o", f"output.folder={tmp_path / 'mine'}", *options(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "mine" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "no-such-file.toml"], "no configuration file"),
        (["run", "-o", "server.client-per-round=3"], "did you mean 'server.clients-per-round'"),
        (["run", "-o", "method=fedavgg"], "unknown method 'fedavgg'; did you mean 'fedavg'?"),
        (["run", "-o", "capacity.sizes=0"], "outside (0, 1]"),
        (["run", "-o", "capacity.sizes=1.5"], "outside (0, 1]"),
        (["run", "-o", "rounds"], "key=value"),
        (["run", "-o", "data.name=image-folder"], "data.root"),
        (["run", "-o", "data.name=image-folder", "-o", "data.root=missing"], "missing"),
        (["report", "no-such-folder"], "no-such-folder"),
        (["run", "--trace"], "--profile"),
        (["run", "--profile", "--engine", "flower"], "in-process engine"),
    ],
)
def test_mistakes_are_explained_and_the_exit_status_says_so(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in fails(monkeypatch, capfd, *arguments)
    assert not list(tmp_path.rglob("report.html"))


def test_an_existing_run_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--out", str(tmp_path / "run"), *options(tmp_path)]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    summary = (tmp_path / "run" / "summary.json").read_text()
    for engine in ("local", "flower"):
        assert "exists" in fails(monkeypatch, capfd, *arguments, "--engine", engine)
    assert runner.invoke(cli.app, arguments).output == ""  # The old run's rounds are not shown as this one's.
    assert (tmp_path / "run" / "summary.json").read_text() == summary
    assert json.loads(summary)["rounds"] == 2


class Killed(BaseException):
    """In place of a signal that nothing can catch."""


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that died after its first round."""

    def dies(run: RunFolder, round: int, *state: object) -> None:
        original(run, round, *state)
        if round == 1:
            raise Killed

    original = RunFolder.write_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_checkpoint", dies)
        arguments = ["run", "--out", str(tmp_path / "run"), "-o", "output.checkpoint-every=1", *options(tmp_path)]
        with pytest.raises(Killed):
            runner.invoke(cli.app, arguments)
    return tmp_path / "run"


def test_a_run_goes_on_where_it_stopped(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(unfinished.parent)
    result = runner.invoke(cli.app, ["run", "--resume", "run", "--workers", "1"])
    assert result.exit_code == 0, result.output
    for words in ("round 1/2", "round 2/2", "Union"):
        assert result.output.count(words) == 1
    assert (unfinished / "report.html").is_file()
    assert "after round 1" in json.loads((unfinished / "environment.json").read_text())["resumed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "rounds=3"], "rounds is 2 there and 3 here"),
        (["-o", "method=local"], "method is 'framp' there and 'local' here"),
        (["--engine", "flower", "-o", "seed=1"], "ResumeError: the checkpoint"),
        (["other.toml"], "leave out other.toml"),
        (["--out", "other"], "give one of them"),
        (["-o", "output.folder=other"], "give one of them"),
        (["--resume", "."], "is not a run folder"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_alone(
    arguments: list[str],
    words: str,
    unfinished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(unfinished.parent)
    events = (unfinished / "events.jsonl").read_bytes()
    assert words in fails(monkeypatch, capfd, "run", "--resume", str(unfinished), *arguments)
    assert (unfinished / "events.jsonl").read_bytes() == events
    assert sorted(path.name for path in unfinished.parent.iterdir()) == ["cache", "run"]


def test_a_finished_run_has_nothing_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runner.invoke(cli.app, ["run", "--out", str(tmp_path / "run"), *options(tmp_path)])
    for engine in ("local", "flower"):
        message = fails(monkeypatch, capfd, "run", "--resume", str(tmp_path / "run"), "--engine", engine)
        assert "ResumeError" in message
        assert "is finished" in message
