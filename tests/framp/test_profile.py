"""The profile of a run: it adds up, comes home from workers, and changes no number."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from framp.engines import run_local
from framp.profiling import REST, TRANSPORT, Profile, divide, profile_table, run_profiled
from framp_core.config import FrampConfig
from framp_core.spans import Mark, is_recording, recording, span
from tests.server_app.runs import measured

SECOND = 1_000_000_000
SERVER, ONE, TWO = 1, 2, 3
PARTS = {
    *("server.generate", "server.mask", "server.encode", "server.decode", "server.aggregate"),
    *("client.decode", "client.train", "client.prototypes", "client.encode", "client.evaluate", "engine.transport"),
}


def marks(*given: tuple[float, str | None]) -> list[Mark]:
    return [(int(at * SECOND), name) for at, name in given]


def test_inner_spans_are_not_counted_in_outer_ones() -> None:
    parts = divide({SERVER: marks((1, "a"), (2, "b"), (5, None), (6, None))}, 0, 10 * SECOND)
    assert {name: part.wall_seconds for name, part in parts.items()} == {REST: 5.0, "a": 2.0, "b": 3.0}
    assert {name: part.calls for name, part in parts.items()} == {REST: 0, "a": 1, "b": 1}


def test_processes_share_the_instants_at_which_they_work_together() -> None:
    """The server waits from 0 to 10; one client works from 1 to 5, another from 3 to 9."""
    parts = divide(
        {
            SERVER: marks((0, TRANSPORT), (10, None)),
            ONE: marks((1, "train"), (5, None)),
            TWO: marks((3, "evaluate"), (9, None)),
        },
        0,
        10 * SECOND,
    )
    assert parts["train"].seconds == 4.0
    assert parts["train"].wall_seconds == 2 + 2 / 2
    assert parts["evaluate"].seconds == 6.0
    assert parts["evaluate"].wall_seconds == 2 / 2 + 4
    assert parts[TRANSPORT].wall_seconds == 1 + 1
    assert sum(part.wall_seconds for part in parts.values()) == 10.0


def test_spans_end_with_errors_and_are_off_by_default() -> None:
    @span("work")
    def fails() -> None:
        raise ValueError

    with recording() as recorded, pytest.raises(ValueError):
        fails()
    assert [name for _, name in recorded] == ["work", None]
    assert not is_recording()
    with pytest.raises(ValueError):
        fails()
    assert len(recorded) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_profile_adds_up_and_changes_no_number(tiny: Callable[..., FrampConfig], workers: int) -> None:
    plain = run_local(tiny(name="plain"))
    run = run_profiled(tiny({"engine.workers": workers}, "profiled"), trace=True)
    assert measured(run) == measured(plain)
    profile = run.json("profile.json")
    rows = {row["name"]: row for row in profile["parts"]}
    assert set(rows) >= PARTS
    assert sum(row["wall_seconds"] for row in rows.values()) == pytest.approx(profile["wall_seconds"])
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["client.train"]["calls"] == rows["server.decode"]["calls"] == 6
    assert rows["client.decode"]["calls"] == 6 + 10
    assert rows["server.encode"]["calls"] == 2 * (6 + 10), "once for the weights, once for the message with its mask"
    assert rows["server.aggregate"]["calls"] == 2
    assert profile["processes"] <= 1 + (workers if workers > 1 else 0)
    assert profile["memory"]["all_processes_rss"] >= profile["memory"]["server_rss"] > 0
    assert not is_recording()
    table = profile_table(profile)
    assert len(table.rows) == len(rows)


def test_a_trace_holds_a_complete_event_for_each_call(tiny: Callable[..., FrampConfig]) -> None:
    run = run_profiled(tiny(), trace=True)
    events = json.loads((run.path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    calls = {row["name"]: row["calls"] for row in run.json("profile.json")["parts"] if row["calls"]}
    assert sum(calls.values()) == len(complete)
    end = 1e6 * run.json("profile.json")["wall_seconds"]
    assert all(0 <= event["ts"] <= event["ts"] + event["dur"] <= end for event in complete)
    assert [event["name"] for event in complete if event["cat"] == "client"].count("train") == calls["client.train"]


def test_a_trace_nests() -> None:
    profile = Profile(0, 3 * SECOND, {SERVER: marks((0, "server.a"), (1, "server.b"), (2, None), (3, None))})
    inner, outer = (event for event in profile.trace()["traceEvents"] if event["ph"] == "X")
    assert (inner["name"], inner["ts"], inner["dur"]) == ("b", 1e6, 1e6)
    assert (outer["name"], outer["ts"], outer["dur"]) == ("a", 0, 3e6)


def test_without_a_trace_none_is_written(tiny: Callable[..., FrampConfig], tmp_path: Path) -> None:
    run = run_profiled(tiny())
    assert run.has("profile.json")
    assert not run.has("trace.json")
