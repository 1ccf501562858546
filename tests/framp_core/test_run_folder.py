import json
import math
import sys
import tomllib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import framp_core.run_folder as module
from framp_core import files
from framp_core.config import FrampConfig
from framp_core.errors import ConfigError, RunFolderError
from framp_core.fingerprint import code_fingerprint
from framp_core.metrics import ClientAccuracy
from framp_core.run_folder import RunFolder

CONFIG = FrampConfig.from_flat({"rounds": 3, "seed": 5})
JSON: SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def evaluated(round: int, correct: int) -> dict[str, object]:
    rows = [
        {"client": "a", "role": "train", "capacity": "1/4", "population": "local", "moment": moment}
        | {"correct": correct if moment == "before" else 4, "total": 4}
        for moment in ("before", "after")
    ]
    return {"kind": "evaluate", "round": round, "accuracies": rows}


def test_a_new_folder_describes_its_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "deep" / "run", CONFIG)
    assert tomllib.loads((run.path / "config.toml").read_text()) == CONFIG.to_nested()
    assert RunFolder.open(run.path).config == CONFIG
    environment = run.json("environment.json")
    assert (environment["seed"], environment["config_digest"]) == (5, CONFIG.digest())
    assert environment["fingerprint"] == code_fingerprint()
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run.events() == []


def test_a_package_that_is_not_installed_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package-anywhere", "torch"))
    versions = RunFolder.create(tmp_path / "run", CONFIG).json("environment.json")["versions"]
    assert versions["no-such-package-anywhere"] is None
    assert versions["torch"] is not None


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", CONFIG)
    with pytest.raises(RunFolderError, match=r"holds config.toml, environment.json.*another path"):
        RunFolder.create(tmp_path / "empty", CONFIG)


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"file/run.*cannot be written"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG)


def test_only_a_run_folder_can_be_opened(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"not a run folder: it holds no config.toml"):
        RunFolder.open(tmp_path)


@given(st.lists(st.tuples(st.text(), st.integers(0, 99), JSON), max_size=5))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_events_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int, object]]
) -> None:
    run = RunFolder.create(tmp_path_factory.mktemp("events") / "run", CONFIG)
    for kind, round, value in events:
        run.event(f"k{kind}", round, value=value)
    expected = [{"kind": f"k{kind}", "round": round, "value": value} for kind, round, value in events]
    assert RunFolder.open(run.path).events() == expected


def test_an_event_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.event("start", 0, clients=[])
    assert (run.path / "events.jsonl").read_text() == '{"kind": "start", "round": 0, "clients": []}\n'


def test_numbers_of_other_types_become_json(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    values = {
        "capacity": Fraction(1, 64),
        "count": np.int64(3),
        "means": np.array([0.5, math.nan]),
        "where": Path("/a"),
    }
    run.event("train", 1, loss=math.inf, nested=[values])
    (event,) = run.events()
    assert event["loss"] is None
    assert event["nested"] == [{"capacity": "1/64", "count": 3, "means": [0.5, None], "where": "/a"}]


@given(st.integers(1, 10_000))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_a_cut_last_line_is_left_out_and_a_resumed_run_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    run = RunFolder.create(tmp_path_factory.mktemp("cut") / "run", CONFIG)
    for round in range(3):
        run.event("train", round, note="é" * 5)
    whole, file = run.events(), run.path / "events.jsonl"
    data = file.read_bytes()
    last = len(data) - data[:-1].rfind(b"\n") - 1
    file.write_bytes(data[: len(data) - 1 - (cut - 1) % last])
    resumed = RunFolder.open(run.path)
    assert resumed.events() == whole[:2]
    resumed.event("train", 2, note="again")
    resumed.event("train", 3, note="more")
    assert [event["round"] for event in RunFolder.open(run.path).events()] == [0, 1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.event("start", 0)
    run.event("train", 1)
    file = run.path / "events.jsonl"
    file.write_text(file.read_text().replace('{"kind": "start"', '{"kind" "start"'))
    with pytest.raises(RunFolderError, match=r"line 1 of .*events.jsonl.* is not JSON"):
        run.events()


def test_clients_csv_comes_back(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    rows = [
        ClientAccuracy('odd, "name"', "train", "1/64", 3, "union", "before", 1, 3),
        ClientAccuracy("b", "unseen", "1", 3, "local", "after", 0, 7),
    ]
    with pytest.raises(RunFolderError, match=r"holds no clients.csv"):
        run.clients()
    run.write_clients_csv(rows)
    assert run.clients() == rows
    assert (run.path / "clients.csv").read_text().splitlines()[1].endswith("1,3,0.333333")


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.write_json("other.json", {"rows": [1]})
    with pytest.raises(TypeError):
        run.write_json("other.json", {"rows": object()})
    assert run.json("other.json") == {"rows": [1]}
    assert not list(run.path.glob("*.tmp"))
    (run.path / "summary.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"summary.json.* is not JSON"):
        run.json("summary.json")


def test_missing_json_is_named(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    assert not run.has("summary.json")
    with pytest.raises(RunFolderError, match=r"holds no summary.json: the run stopped before"):
        run.json("summary.json")


def test_a_checkpoint_holds_how_far_the_events_went(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        run.read_checkpoint()
    for round in (1, 2, 3):
        run.event("train", round, note="é")
        run.write_checkpoint(round, {"theta": torch.full((2,), round)}, {"share": Fraction(1, 4)})
    tensors, state = RunFolder.open(run.path).read_checkpoint()
    assert torch.equal(tensors["theta"], torch.full((2,), 3))
    assert state == {"share": "1/4", "round": 3, "events-bytes": (run.path / "events.jsonl").stat().st_size}
    assert run.checkpoints.rounds() == [3, 2]


def test_rewinding_cuts_what_comes_again_and_says_so(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.event("train", 1, note="é")
    run.write_checkpoint(1, {}, {})
    run.event("train", 2)
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    for number in (1, 2):
        resumed = RunFolder.open(run.path)
        resumed.rewind(1, resumed.read_checkpoint()[1]["events-bytes"])
        assert [event["round"] for event in resumed.events()] == [1]
        assert resumed.json("environment.json")["resumed"].count("after round 1") == number
        resumed.event("train", 2)
    before = (run.path / "events.jsonl").read_bytes()
    for length in (len(before) + 1, len(before) - 3):
        with pytest.raises(RunFolderError, match=r"does not hold the \d+ bytes"):
            run.rewind(1, length)
    assert (run.path / "events.jsonl").read_bytes() == before


def test_rewinding_removes_what_a_killed_process_left_of_a_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    kept = {entry.name for entry in run.path.iterdir()}
    for name in ("notes.tmp", "0123456789abcdef.tmp", "x.0123456789ABCDEF.tmp", "x.0123456789abcdef.tmp.txt"):
        (run.path / name).touch()
        kept.add(name)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda path: None)
        with pytest.raises(KeyboardInterrupt), files.replacing(run.path / "report.html"):
            raise KeyboardInterrupt
    assert len(list(run.path.iterdir())) == len(kept) + 1
    run.rewind(0, 0)
    assert {entry.name for entry in run.path.iterdir()} - {"events.jsonl"} == kept


def test_going_on_with_other_versions_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    monkeypatch.setattr(module, "_version", lambda package: "9.9" if package == "torch" else "1")
    monkeypatch.setattr(module, "PACKAGES", ("torch",))
    with caplog.at_level("WARNING", logger="flwr"):
        run.rewind(4, 0)
    assert "torch 9.9" in caplog.text
    environment = run.json("environment.json")
    assert environment["resumed"].endswith("torch 9.9")
    assert environment["versions"]["torch"] != "9.9"


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    with run.alone(), pytest.raises(RunFolderError, match="another process"), RunFolder.open(run.path).alone():
        pass
    with RunFolder.open(run.path).alone():
        pass


def test_tensorboard_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = FrampConfig.from_flat({"output.tensorboard": True})
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        RunFolder.create(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    RunFolder.create(tmp_path / "run", CONFIG).event(**evaluated(1, 3))  # type: ignore[arg-type]


def test_tensorboard_gets_the_accuracy_of_each_size_before_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []
    asked: list[dict[str, int]] = []

    class Board:
        def __init__(self, folder: str, **again: int) -> None:
            assert folder == str(tmp_path / "run" / "tensorboard")
            asked.append(again)

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

        def flush(self) -> None:
            pass

    monkeypatch.setattr(module, "_summary_writer", lambda: Board)
    run = RunFolder.create(tmp_path / "run", FrampConfig.from_flat({"output.tensorboard": True}))
    run.event("train", 1, clients=[])
    assert written == []
    run.event(**evaluated(1, 1))  # type: ignore[arg-type]
    run.event(**evaluated(2, 3))  # type: ignore[arg-type]
    sizes = ("local/1/4", "local/mean")
    assert written == [(tag, value, step) for value, step in ((0.25, 1), (0.75, 2)) for tag in sizes]
    assert [json.loads(line)["round"] for line in (run.path / "events.jsonl").read_text().splitlines()] == [1, 1, 2]
    resumed = RunFolder.open(run.path)
    resumed.rewind(1, 0)
    resumed.event(**evaluated(2, 3))  # type: ignore[arg-type]
    assert asked == [{}, {"purge_step": 2}]
