"""Run folders and model files that others wrote: nothing is followed out of them, waited for, or believed unseen."""

import copy
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from framp import cli
from framp.progress import RunProgress
from framp.status import RunStatus
from framp_core import personal_model
from framp_core.config import FrampConfig
from framp_core.config_values import parse_capacity
from framp_core.data import DataFacts, load_images
from framp_core.errors import ConfigError, DataError, FrampError, ModelError, RunFolderError
from framp_core.metrics import PriorCurve
from framp_core.prototypes import Prototypes
from framp_core.report import finish, write_report
from framp_core.report.html import _environment, _page
from framp_core.report.summary import Record, summary_of
from framp_core.run_folder import RunFolder
from framp_core.run_log import failure, run_log
from framp_core.run_records import checked_row
from tests.framp_core.test_report import synthetic_run

VICTIM = b"what a link must not reach"
PROTOTYPES = Prototypes(np.arange(2), np.ones(2, np.int64), np.ones((2, 3), np.float32))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without its report."""
    run = synthetic_run(tmp_path_factory.mktemp("written") / "run")
    curve = {"client": "a", "role": "train", "capacity": "1", "population": "local", "correct": [1, 2], "total": 3}
    run.event("priors", 6, strengths=[0.0, 1.0], clients=[curve])
    finish(run)
    run.write_prototypes(1, PROTOTYPES, {"a": PROTOTYPES})
    run.write_checkpoint(6, {"theta": torch.ones(2)}, {"note": 1})
    return run.path


@pytest.fixture
def run(written: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(written, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside of the run folder, which no test may change."""
    path = tmp_path / "victim"
    path.write_bytes(VICTIM)
    yield path
    assert path.read_bytes() == VICTIM
    assert not path.is_symlink()


def framp(*arguments: str) -> str:
    """What the command says of a mistake."""
    with pytest.raises(FrampError) as error:
        CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    return str(error.value)


# --- links --------------------------------------------------------------------------------------------------------


def test_a_report_is_not_written_through_links(run: RunFolder, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.path / "figures").mkdir()
    links = ("report.html", "report.html.tmp", "figures/accuracy_by_size.png", "figures/bytes.png")
    for name in links:
        (run.path / name).symlink_to(victim)
    assert CliRunner().invoke(cli.app, ["report", str(run.path)]).exit_code == 0
    assert (run.path / "report.html").read_text().startswith("<!doctype html>")
    assert not any((run.path / name).is_symlink() for name in links if name != "report.html.tmp")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("figures", lambda run: write_report(run.path)),
        ("checkpoints", lambda run: run.write_checkpoint(7, {}, {})),
        ("prototypes", lambda run: run.write_prototypes(2, PROTOTYPES, {"a": PROTOTYPES})),
        ("tensorboard", lambda run: run._write_scalars([])),
    ],
)
def test_a_linked_folder_is_not_filled(
    run: RunFolder, tmp_path: Path, name: str, write: Callable[[RunFolder], object]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.rmtree(run.path / name, ignore_errors=True)
    (run.path / name).symlink_to(foreign)
    with pytest.raises(RunFolderError, match=rf"{name}' is a link, expected a folder"):
        write(run)
    assert not list(foreign.iterdir())


@pytest.mark.parametrize("name", ["events.jsonl", "log.jsonl", ".lock"])
def test_what_is_appended_to_is_no_link(run: RunFolder, victim: Path, name: str) -> None:
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(victim)
    with pytest.raises(RunFolderError, match=rf"{name}' is a link"), run.alone(), run_log(run.path / "log.jsonl"):
        run.event("train", 7)


def test_the_log_has_no_second_name(run: RunFolder, victim: Path) -> None:
    (run.path / "log.jsonl").hardlink_to(victim)
    with pytest.raises(RunFolderError, match=r"second name elsewhere"), run_log(run.path / "log.jsonl"):
        pass


def test_files_that_are_replaced_give_links_way(run: RunFolder, victim: Path) -> None:
    for name in ("clients.csv", "metrics.prom", "summary.json", "environment.json"):
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(victim)
    run.event("train", 7, clients=[])
    run.write_json("environment.json", {})
    finish(run)
    assert not any(path.is_symlink() for path in run.path.iterdir())


def test_the_run_folder_itself_may_be_a_link(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(run.path)
    assert CliRunner().invoke(cli.app, ["status", str(tmp_path / "latest")]).exit_code == 0
    RunFolder.open(tmp_path / "latest").event("train", 7)
    assert (run.path / "metrics.prom").is_file()


# --- what is no plain file, or holds what no run writes -----------------------------------------------------------


@pytest.mark.parametrize("name", ["config.toml", "events.jsonl", "summary.json", "log.jsonl", ".lock"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link"])
def test_status_names_what_is_no_plain_file(run: RunFolder, name: str, kind: str) -> None:
    path = run.path / name
    path.unlink(missing_ok=True)
    if name == "log.jsonl":
        (run.path / "summary.json").unlink()
    {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a link": lambda at: at.symlink_to("/dev/zero")}[kind](path)
    assert f"{name}' is {kind}, expected a plain file" in framp("status", str(run.path))


def test_progress_does_not_wait_for_a_pipe(run: RunFolder) -> None:
    (run.path / "events.jsonl").unlink()
    os.mkfifo(run.path / "events.jsonl")
    with RunProgress(cli.console, run.path, 6):
        pass


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 5000, "[3]", '"a"'])
@pytest.mark.parametrize("name", ["events.jsonl", "masks.json", "manifest.json", "environment.json"])
def test_json_that_no_run_writes_is_named(run: RunFolder, name: str, text: str) -> None:
    (run.path / name).write_text(text + "\n")
    assert name in framp("report", str(run.path))


def test_a_nested_checkpoint_and_configuration_are_named(run: RunFolder) -> None:
    (run.path / "checkpoints/round-000006/state.json").write_text('{"a":' * 200_000)
    with pytest.raises(RunFolderError, match=r"every checkpoint .* is damaged .*nested too deeply"):
        run.read_checkpoint()
    (run.path / "checkpoints/round-000006/state.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"every checkpoint .* is damaged .*no object"):
        run.newest_checkpoint()
    for text in ("a = " + "[" * 60_000, "rounds = " + "9" * 5000, "a." * 30_000 + "a = 1", "a" * 70_000):
        (run.path / "config.toml").write_text(text)
        with pytest.raises(ConfigError, match=r"cannot be read as TOML|65,536 at most"):
            RunFolder.open(run.path)


def test_a_whole_checkpoint_of_something_else_is_named(run: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=r"state.json' is not what a run writes there"):
        run.newest_checkpoint()
    with (
        pytest.raises(RunFolderError, match=r"not one of the run's configuration \(KeyError: 'theta'\)"),
        run.restoring(),
    ):
        {}["theta"]


def test_links_among_checkpoints_are_none(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path / "checkpoints/round-000006", tmp_path / "foreign")
    (run.path / "checkpoints/round-000009").symlink_to(tmp_path / "foreign")
    (run.path / "checkpoints/round-²").mkdir()
    assert run.checkpoints.rounds() == [6]


@pytest.mark.parametrize("damage", ["correct,total", "9" * 5000, "\xff", "\0", "1/0"])
def test_a_damaged_clients_csv_is_named(run: RunFolder, damage: str) -> None:
    path = run.path / "clients.csv"
    head, first = path.read_text().splitlines()[:2]
    cells = dict(zip(head.split(","), first.split(","), strict=True))
    key = "capacity" if damage == "1/0" else "total"
    path.write_bytes(f"{head}\n{','.join({**cells, key: damage}.values())}\n".encode("latin-1"))
    with pytest.raises(RunFolderError, match=r"clients.csv"):
        run.clients()


def test_damaged_prototypes_are_named(run: RunFolder) -> None:
    (run.path / "prototypes/round-000002.safetensors").write_bytes(b"\x10" * 200)
    with pytest.raises(RunFolderError, match=r"round-000002.* holds no prototypes"):
        run.prototypes()
    save_file({name: torch.ones(3) for name in ("global.means", "global.classes", "local.means", "local.classes")},
              run.path / "prototypes/round-000002.safetensors")  # fmt: skip
    with pytest.raises(RunFolderError, match=r"holds prototypes of \(3,\)"):
        run.prototypes()


@given(st.fractions(0, 1).filter(bool), st.integers(0, 60))
@example(Fraction(1), 45)
@settings(max_examples=30)
def test_every_capacity_of_a_configuration_can_stand_in_a_table(fraction: Fraction, digits: int) -> None:
    row = {"client": "a", "role": "train", "round": "1", "population": "local", "moment": "before"}
    for text in (str(fraction), "0." + "7" * digits + "1"):
        with suppress(ConfigError):
            capacity = str(parse_capacity(text))
            assert checked_row({**row, "capacity": capacity, "correct": "1", "total": "2"}, "a row")


@pytest.mark.parametrize(
    "arguments", [("status",), ("report",), ("run", "--resume"), ("personalise",), ("run", "--out")]
)
@pytest.mark.parametrize("given", ["loop", "~nobody-of-this-name/run"])
def test_a_path_that_leads_nowhere_is_named(tmp_path: Path, arguments: tuple[str, ...], given: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = given if given.startswith("~") else str(tmp_path / given)
    assert f"the path {path!r} leads nowhere" in framp(*arguments, path)
    with pytest.raises(ModelError, match="leads nowhere"):
        personal_model.load(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_prototypes_of_a_type_that_numpy_lacks_are_named(run: RunFolder, dtype: torch.dtype) -> None:
    path = run.path / "prototypes/round-000001.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    assert "round-000001.safetensors' holds no prototypes" in framp("report", str(run.path))


@pytest.mark.parametrize("name", ["round-abc", "round-", "round-\u00b2", "round-1_0"])
def test_a_file_beside_the_prototypes_is_none_of_them(run: RunFolder, name: str) -> None:
    shutil.copy(run.path / "prototypes/round-000001.safetensors", run.path / f"prototypes/{name}.safetensors")
    assert CliRunner().invoke(cli.app, ["report", str(run.path)]).exit_code == 0
    assert list(run.prototypes()) == [1]


ANY: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 3, 10**400, 1.5, 1e308, "", "1/0", "1e999999999", "x", [], [0], {}, {"a": []}, [[]]]
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    value = copy.copy(value)
    value[at[0]] = changed(value[at[0]], at[1:], new)
    return value


@given(st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_anywhere_is_shown_or_named(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """No other error than FRAMP's comes of any one wrong value in any file that status, report and comparison read."""
    folder = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(written, folder)
    path = folder / data.draw(st.sampled_from(
        ["events.jsonl", "masks.json", "manifest.json", "environment.json", "prior_curve.json", "summary.json"]
    ))  # fmt: skip
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = data.draw(st.integers(0, len(lines) - 1))
    content = json.loads(lines[number])
    at = data.draw(st.sampled_from(list(places(content))))
    lines[number] = json.dumps(changed(content, at, data.draw(ANY)))
    path.write_text("\n".join(lines) + "\n")
    run = RunFolder.open(folder)

    def page() -> None:
        record = Record.of(run)
        summary_of(record)
        _page(run, record, [], _environment(run))

    def rest() -> None:
        if masks := run.json("masks.json"):
            assert np.array(masks["overlap"], dtype=float).shape == (len(masks["clients"]),) * 2
        PriorCurve.of(run.json("prior_curve.json")).mean("local", "mean")
        assert run.json("summary.json")["rows"][-1]["local"] is not ...
        DataFacts.from_dict(run.json("manifest.json").get("data", {"shape": [1], "class_names": []}))

    for work in (page, rest, lambda: RunStatus.of(folder).rows()):
        with suppress(FrampError):
            work()


@pytest.mark.parametrize("line", ["[]", "3", '{"a": 1}', '{"text": {}}', "[" * 200_000, "{cut"])
def test_a_log_of_anything_gives_no_reason(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    last = json.dumps({"text": "the run failed: KeyError: 3"})
    path.write_text(f"{line} the run failed: \n{last}\n{line} the run starts\n")
    assert failure(path) == "KeyError: 3"


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 5000, "{"])
def test_damaged_facts_of_a_cache_are_named(tmp_path: Path, text: str) -> None:
    config = FrampConfig.from_flat({"data.cache": str(tmp_path)}).data
    load_images(config, 0)
    next(tmp_path.glob("*/facts.json")).write_text(text)
    with pytest.raises(DataError, match=r"cached images .* are damaged .*delete that folder"):
        load_images(config, 0)


# --- reading alone ------------------------------------------------------------------------------------------------


def test_status_writes_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that this user may read alone, such as on a mount: whatever opens a file to write it fails."""
    with run.alone():
        pass
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    assert str(RunStatus.of(run.path).state) == "finished"
    monkeypatch.undo()
    with run.alone():
        monkeypatch.setattr(os, "open", read_only)
        assert str(RunStatus.of(run.path).state) == "running"
        monkeypatch.undo()


def test_a_glance_sees_what_status_shows_of_the_whole_record(run: RunFolder) -> None:
    run.event("evaluate", 7, accuracies=[], refused=[{"client": "a", "error": "no"}], seconds=0.25)
    whole, glance = Record.of(run), Record.glance(run)
    for name in ("rounds", "seconds", "refused", "clients", "joined", "evaluated_rounds"):
        seen, full = getattr(glance, name), getattr(whole, name)
        assert (seen, name) == (full[-1:] if name == "evaluated_rounds" else full, name)
    assert glance.last("before") == whole.last("before") != []
    assert sum(len(event["clients"]) for event in glance.train) == 0 < sum(len(each["clients"]) for each in whole.train)


# --- personal models ----------------------------------------------------------------------------------------------


def a_model(path: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    model = FrampConfig().model.model_dump(mode="json", by_alias=True)
    content = {
        "version": 1, "capacity": "1", "prior_strength": 1.0, "message": {}, "origin": {},
        "model": {**model, **fields.pop("model", {})},
        "data": {"shape": [1, 8, 8], "class_names": ["a", "b"], "mean": [0.5], "std": [0.5]}, **fields,
    }  # fmt: skip
    save_file(tensors, path, {"framp": json.dumps(content)})
    return path


@pytest.mark.parametrize(
    "claim",
    [
        {"model": {"name": "mlp", "widths": "16384,16384"}},
        {"model": {"widths": "4096,4096"}},
        {"data": {"shape": [1, 20_000, 20_000], "class_names": ["a"]}, "model": {"name": "mlp", "widths": "4"}},
        {"model": {"name": "mlp", "widths": ",".join(["1"] * 20_000)}},
        {"data": {"shape": [10**30, 8, 8], "class_names": ["a", "b"]}},
        {"data": {"shape": "x", "class_names": 3}},
        {"data": []},
        {"model": []},
        {"capacity": "1e999999999"},
        {"prior_strength": 10**400},
    ],
)
def test_a_small_file_that_claims_a_huge_network_is_refused_from_its_header(
    tmp_path: Path, claim: dict[str, Any]
) -> None:
    if claim == {"model": []}:
        path = tmp_path / "model"
        save_file({"mask": torch.zeros(1)}, path, {"framp": json.dumps({"version": 1, "model": [], "data": {}})})
    else:
        path = a_model(tmp_path / "model", {"head.weight": torch.zeros(2, 64), "log_prior": torch.zeros(2)}, **claim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"is not a personal model of this version"):
        personal_model.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB: the first claim is 1.07 GB.


def test_a_nested_entry_and_a_pipe_are_no_personal_models(tmp_path: Path) -> None:
    save_file({"mask": torch.zeros(1)}, tmp_path / "model", {"framp": "[" * 200_000})
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("model", "nested too deeply"), ("pipe", "is a pipe")):
        with pytest.raises(ModelError, match=rf"not a personal model .*{words}"):
            personal_model.load(tmp_path / name)
