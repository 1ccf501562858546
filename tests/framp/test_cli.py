import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from framp import cli
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
        (["run", "-o", "capacity.sizes=0"], "outside (0, 1]"),
        (["run", "-o", "capacity.sizes=1.5"], "outside (0, 1]"),
        (["run", "-o", "rounds"], "key=value"),
        (["run", "-o", "data.name=image-folder"], "data.root"),
        (["run", "-o", "data.name=image-folder", "-o", "data.root=missing"], "missing"),
        (["report", "no-such-folder"], "no-such-folder"),
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
    assert (tmp_path / "run" / "summary.json").read_text() == summary
    assert json.loads(summary)["rounds"] == 2
