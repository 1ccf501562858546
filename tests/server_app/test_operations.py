"""What an operator sees of a run: its log, its metrics file, its status."""

import io
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from typer.testing import CliRunner

from client_app.app import app as client_app
from client_app.app import train
from framp import cli
from framp.engines import InProcessGrid
from framp.progress import RunProgress
from framp.status import RunStatus
from framp_core.config import FrampConfig
from framp_core.errors import EngineError, RunFolderError
from framp_core.metrics import accuracies, summarise
from framp_core.report import write_report
from framp_core.run_folder import RunFolder
from framp_core.run_log import about, failure, run_log
from framp_core.run_metrics import RunMetrics, reason_of
from server_app.app import serve
from tests.conftest import TINY
from tests.server_app.runs import app_with

Build = Callable[..., FrampConfig]


class Killed(BaseException):
    """In place of a signal that nothing can catch."""


class Watched(InProcessGrid):
    """A grid that looks at the run between two of its steps, and on which the server may die."""

    def __init__(self, app: ClientApp, config: FrampConfig, look: Callable[[int], None]) -> None:
        super().__init__(app, config.partition.nodes, config.to_flat())
        self._look, self._calls = look, 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        self._calls += 1
        self._look(self._calls)
        return super().send_and_receive(messages, timeout=timeout)


def unreliable() -> ClientApp:
    """client-0001 diverges in training, client-0002 makes the server read nonsense."""

    def train_or_fail(message: Message, context: Context) -> Message:
        part = context.node_config["partition-id"]
        if part == 1:
            error = ConfigRecord({"type": "ModelError", "reason": "diverged", "traceback": "Traceback"})
            return Message(RecordDict({"error": error}), reply_to=message)
        reply = train(message, context)
        if part == 2:
            reply.content["metrics"] = MetricRecord({"loss": 1.0, "examples": float("inf")})
        return reply

    return app_with(train_or_fail)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.app.write_report", lambda path: None)


def run_with(
    config: FrampConfig, app: ClientApp = client_app, look: Callable[[int], None] = lambda call: None
) -> RunFolder:
    with Watched(app, config, look) as grid:
        return serve(grid, config)


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def metrics_of(run: Path) -> dict[tuple[str, ...], float]:
    """Value by name and label values, in the order of the labels' names, as a monitor reads them."""
    families = text_string_to_metric_families((run / "metrics.prom").read_text())
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


# --- log ----------------------------------------------------------------------------------------------------------


def test_every_message_and_every_refusal_is_in_the_log_with_its_id(tiny: Build) -> None:
    run = run_with(tiny({"server.clients-per-round": 4}), unreliable())
    lines = log_of(run.path)
    answered = [line for line in lines if " answered " in line["text"]]
    # Two rounds of training, in which client-0001 answers with an error, and two evaluations of all five.
    assert len(answered) == 2 * 3 + 2 * 5
    refused = [line for line in lines if line["level"] == "warning"]
    assert [(line["round"], line["client"]) for line in refused] == [
        (number, client) for number in (1, 2) for client in ("client-0001", "client-0002")
    ]
    assert "diverged" in refused[0]["text"]
    assert "'examples'" in refused[1]["text"]
    identified = [*answered, *(line for line in lines if " described " in line["text"])]
    identifiers = [line["message_id"] for line in identified]
    assert len(set(identifiers)) == len(identifiers) == 16 + 5
    # A reply that was read and then refused is named twice, under one message.
    assert {line["message_id"] for line in refused if line["client"] == "client-0002"} <= set(identifiers)
    assert all(
        line["time"] == sorted_time for line, sorted_time in zip(lines, sorted(x["time"] for x in lines), strict=True)
    )


def test_no_payload_is_logged(tiny: Build) -> None:
    run = run_with(tiny(), unreliable())
    assert max(len(line) for line in (run.path / "log.jsonl").read_text().splitlines()) < 2000


def test_the_console_is_left_as_it_was(tmp_path: Path) -> None:
    logger = logging.getLogger("flwr.framp")
    before = (logger.level, list(logger.handlers))
    with run_log(tmp_path / "log.jsonl"):
        logger.debug("one message", extra=about(1, "client-0001", "id"))
    logger.debug("after the run")
    assert (logger.level, list(logger.handlers)) == before
    assert [line["text"] for line in log_of(tmp_path)] == ["the run starts", "one message"]


def test_a_log_goes_on_after_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"time": "now", "text": "cut of')
    with pytest.raises(EngineError), run_log(path):
        raise EngineError("no client")
    texts = path.read_text().splitlines()
    assert texts[0] == '{"time": "now", "text": "cut of'
    assert json.loads(texts[-1])["text"] == "the run failed: EngineError: no client"
    assert failure(path) == "EngineError: no client"
    with path.open("a") as file:
        file.write('{"text": "the run fai')
    assert failure(path) == "EngineError: no client"
    with run_log(path):
        assert failure(path) is None


def test_the_command_shows_no_more_than_before(tmp_path: Path) -> None:
    """Single messages are for the file."""
    values = {**TINY, "data.cache": str(tmp_path / "cache")}
    options = [part for key, value in values.items() for part in ("-o", f"{key}={value}")]
    command = [sys.executable, "-m", "framp", "run", "--out", str(tmp_path / "run"), *options]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "answered" not in shown.stdout + shown.stderr
    assert any("answered" in line["text"] for line in log_of(tmp_path / "run"))


# --- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_events(tiny: Build) -> None:
    run = run_with(tiny({"server.clients-per-round": 4}), unreliable())
    metrics, events = metrics_of(run.path), run.events()
    trained = [event for event in events if event["kind"] == "train"]
    evaluated = [event for event in events if event["kind"] == "evaluate"]
    assert metrics["framp_round",] == metrics["framp_rounds",] == metrics["framp_evaluated_round",] == 2
    assert metrics["framp_clients_total",] == 5
    assert metrics["framp_valid_replies",] == len(trained[-1]["clients"]) == 2
    down = sum(sum(client["down"].values()) for event in trained for client in event["clients"])
    up = sum(sum(client["up"].values()) for event in trained for client in event["clients"])
    assert metrics["framp_bytes_total", "down"] == down + sum(event["down_bytes"] for event in evaluated)
    assert metrics["framp_bytes_total", "up"] == up
    assert metrics["framp_refusals_total", "ModelError", "train"] == 2
    assert metrics["framp_refusals_total", "ProtocolError", "train"] == 2
    losses = [client["loss"] for client in trained[-1]["clients"]]
    assert metrics["framp_train_loss",] == pytest.approx(sum(losses) / len(losses))
    overall = summarise(row for row in accuracies(evaluated[-1]) if row.moment == "before")[-1]
    for column in ("local", "union", "unseen", "validation"):
        assert metrics["framp_accuracy", column] == pytest.approx(overall.column(column).mean)  # type: ignore[arg-type, union-attr]
    assert metrics["framp_round_seconds", "train"] == trained[-1]["seconds"]
    assert 0 <= time.time() - metrics["framp_updated_timestamp_seconds",] < 600


def test_metrics_grow_while_the_run_works_and_go_on_after_a_resume(tiny: Build) -> None:
    config = tiny({"rounds": 3, "output.checkpoint-every": 1})
    folder, seen = Path(config.output.folder), []

    def look(call: int) -> None:
        seen.append(metrics_of(folder))
        if call == 5:  # Round 3 trains: two rounds have two calls each.
            raise Killed

    with pytest.raises(Killed):
        run_with(config, look=look)
    assert [metrics["framp_round",] for metrics in seen] == [0, 1, 1, 2, 2]
    assert seen[1]["framp_bytes_total", "down"] < seen[-1]["framp_bytes_total", "down"]
    given = {**config.to_flat(), "output.folder": "", "output.resume": str(folder)}
    run_with(FrampConfig.from_flat(given))
    whole = run_with(tiny({"rounds": 3, "output.checkpoint-every": 1}, "whole"))
    # A resumed run knows of no reference masks, which costs bytes; all else is as if it had not been killed.
    one, other = (
        {
            key: value
            for key, value in metrics_of(path).items()
            if not {"seconds", "created", "bytes"} & {*key[0].split("_")}
        }
        for path in (folder, whole.path)
    )
    assert one == other
    assert len(one) > 8
    trained = [event for event in RunFolder.open(folder).events() if event["kind"] == "train"]
    up = sum(sum(client["up"].values()) for event in trained for client in event["clients"])
    assert metrics_of(folder)["framp_bytes_total", "up"] == up
    texts = [line["text"] for line in log_of(folder)]
    assert texts.count("the run starts") == 2
    assert "the run is finished" in texts


def test_a_reader_of_the_metrics_never_sees_half_of_them(tmp_path: Path) -> None:
    metrics = RunMetrics(3)
    metrics.write(tmp_path / "metrics.prom")
    with (tmp_path / "metrics.prom").open() as opened:
        metrics.add({"kind": "train", "round": 2, "clients": []})
        metrics.write(tmp_path / "metrics.prom")
        assert "framp_round 0.0" in opened.read()
    assert "framp_round 2.0" in (tmp_path / "metrics.prom").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.prom"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("NonFiniteError: 3 of 4 numbers", "NonFiniteError"),
        ("Flower error 5: no heartbeat", "Flower error 5"),
        ("no reply before the deadline", "no reply before the deadline"),
        ("MyOwnSeries12345: gotcha", "other"),
        ("annotations: not an error", "other"),
        ("Flower error 5000000000: x", "other"),
        ("", "other"),
    ],
)
def test_a_client_cannot_make_up_reasons(error: str, reason: str) -> None:
    assert reason_of(error) == reason


# --- status -------------------------------------------------------------------------------------------------------


def test_status_while_a_run_works_and_after_it(tiny: Build) -> None:
    config = tiny({"rounds": 3, "output.checkpoint-every": 1, "server.clients-per-round": 4})
    folder, seen = Path(config.output.folder), []
    run_with(config, unreliable(), lambda call: seen.append(RunStatus.of(folder)))
    assert [str(status.state) for status in seen] == ["running"] * 6
    assert [status.round for status in seen] == [0, 1, 1, 2, 2, 3]
    assert [status.checkpoint for status in seen] == [None, None, 1, 1, 2, 2]
    assert seen[0].end is None
    assert seen[2].end is not None
    assert seen[2].end > seen[2].updated  # type: ignore[operator]
    assert all(status.resume is None for status in seen)
    after = RunStatus.of(folder)
    assert (str(after.state), after.round, after.rounds, after.error, after.resume) == ("finished", 3, 3, None, None)
    assert after.clients == {"train": 4, "unseen": 1}
    assert after.refusals == {"ModelError": 3, "ProtocolError": 3}
    assert "client-0002" in str(after.last_refusal)
    assert after.accuracy.keys() == {"local", "union", "unseen", "validation"}
    assert after.seconds_per_round == pytest.approx(RunFolder.open(folder).json("summary.json")["seconds"] / 3)


def test_a_killed_run_and_a_failed_one_say_how_to_go_on(tiny: Build) -> None:
    config = tiny({"rounds": 3, "output.checkpoint-every": 1})

    def dies(call: int) -> None:
        if call == 3:
            raise Killed

    with pytest.raises(Killed):
        run_with(config, look=dies)
    folder = Path(config.output.folder)
    # A process that is killed writes nothing; the one of this test did, as it is alive.
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:-1]))
    killed = RunStatus.of(folder)
    assert (str(killed.state), killed.checkpoint, killed.resume) == ("interrupted", 1, f"framp run --resume {folder}")
    assert "to go on" in killed.rows()

    def every_train_fails(message: Message, context: Context) -> Message:
        error = ConfigRecord({"type": "DataError", "reason": "disk gone", "traceback": ""})
        return Message(RecordDict({"error": error}), reply_to=message)

    app = app_with(every_train_fails)
    failing = tiny({"server.empty-rounds": 1}, "failing")
    with pytest.raises(EngineError):
        run_with(failing, app)
    failed = RunStatus.of(Path(failing.output.folder))
    assert str(failed.state) == "failed"
    assert "disk gone" in str(failed.error)
    assert "disk gone" in failed.rows()["state"]


def test_looking_does_not_keep_a_run_from_starting(tiny: Build, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny())
    assert not run.in_use()
    assert not (run.path / ".lock").exists()
    with run.alone():
        assert run.in_use()
    assert not run.in_use()
    with run.alone():
        pass


def test_a_new_folder_and_a_strange_one(tiny: Build, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny())
    status = RunStatus.of(run.path)
    assert (status.round, status.clients, status.accuracy, status.checkpoint) == (0, {}, {}, None)
    assert json.loads(json.dumps(status.to_dict()))["state"] == "interrupted"
    with pytest.raises(RunFolderError, match="is not a run folder"):
        RunStatus.of(tmp_path)


def test_the_command(tiny: Build, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run = run_with(tiny())
    result = CliRunner().invoke(cli.app, ["status", str(run.path)])
    assert result.exit_code == 0, result.output
    for words in ("finished", "2 of 2", "4 train, 1 unseen", "local"):
        assert words in result.output
    as_json = CliRunner().invoke(cli.app, ["status", "--json", str(run.path)])
    assert json.loads(as_json.output) == RunStatus.of(run.path).to_dict()
    shutil.rmtree(run.path)
    monkeypatch.setattr("sys.argv", ["framp", "status", str(run.path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "is not a run folder" in capfd.readouterr().err


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b2J\u202e\r"


@pytest.mark.parametrize("size", [1, 30_000])
def test_an_error_record_neither_steers_the_terminal_nor_fills_the_folder(
    tiny: Build, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_app.app.write_report", write_report)

    def fails(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] != 1:
            return train(message, context)
        texts = dict.fromkeys(("type", "reason", "traceback"), ESCAPES * size)
        return Message(RecordDict({"error": ConfigRecord(texts)}), reply_to=message)  # type: ignore[arg-type]

    config = tiny({"server.clients-per-round": 4})
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    with RunProgress(console, Path(config.output.folder), config.rounds):
        run = run_with(config, app_with(fails))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    status = CliRunner().invoke(cli.app, ["status", str(run.path)]).output
    page = (run.path / "report.html").read_text()
    texts = [shown, status, page, RunStatus.of(run.path).last_refusal or ""]
    texts += [line["text"] for line in log_of(run.path)]
    texts += [json.dumps(event, ensure_ascii=False) for event in run.events()]
    assert all(r"\x1b]0;owned\x07" in text.replace("\\\\", "\\") for text in (shown, page, texts[3]))
    assert "owned" in status
    for text in texts:
        assert not set("\x1b\x07\x9b\u202e\r") & set(text)
    refused = [row for event in run.events() for row in event.get("refused", [])]
    assert [row["client"] for row in refused] == ["client-0001"] * 2
    assert all(len(row["error"]) <= 1000 and len(row["traceback"]) <= 4000 for row in refused)


def test_an_older_folder_is_shown_in_the_same_way(tmp_path: Path) -> None:
    """Its events hold what a client wrote, as it was."""
    run = RunFolder.create(tmp_path / "run", FrampConfig())
    row = {"client": f"a{ESCAPES}", "error": ESCAPES * 9_000, "traceback": f"Traceback\n{ESCAPES}" * 9_000}
    run.event("join", 1, clients=[{"client": ESCAPES, "role": "train", "capacity": "1"}], refused=[row], seconds=1.0)
    (run.path / "log.jsonl").write_text(json.dumps({"text": f"the run failed: EngineError: {ESCAPES}"}) + "\n")
    status, page = CliRunner().invoke(cli.app, ["status", str(run.path)]).output, write_report(run.path).read_text()
    for text in (status, page):
        assert "owned" in text
        assert not set("\x1b\x07\x9b\u202e\r") & set(text)
        assert len(text) < 60_000


# --- new clients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [1003, 1004])
def test_a_new_client_is_asked_when_first_seen_and_served_at_once(tiny: Build, late: int) -> None:
    """It connects between the first two rounds; 1004 is a client that never trains."""
    config = tiny({"rounds": 3, "server.clients-per-round": 4, "server.discovery-deadline": 0.3})
    asked: list[int] = []

    class Joining(InProcessGrid):
        evaluations = 0

        def get_node_ids(self) -> list[int]:
            return [node for node in super().get_node_ids() if node != late or self.evaluations]

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            messages = list(messages)
            asked.extend(each.metadata.dst_node_id for each in messages if "query" in each.metadata.message_type)
            self.evaluations += messages[0].metadata.message_type == "evaluate"
            return super().push_messages(messages)

    with Joining(client_app, config.partition.nodes, config.to_flat()) as grid:
        run = serve(grid, config)
    name, role = f"client-{late - 1000:04d}", "train" if late == 1003 else "unseen"
    (joined,) = [event for event in run.events() if event["kind"] == "join"]
    assert [(client["client"], client["role"]) for client in joined["clients"]] == [(name, role)]
    assert joined["round"] == 2
    assert asked.count(late) == 1
    evaluated = {row.round for row in run.clients() if row.client == name}
    assert evaluated == {2, 3}
    trained = {
        event["round"]
        for event in run.events()
        if event["kind"] == "train" and name in [client["client"] for client in event["clients"]]
    }
    assert trained == ({2, 3} if role == "train" else set())
    assert RunStatus.of(run.path).joined_later == 1
