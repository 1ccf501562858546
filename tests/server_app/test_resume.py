"""A run that was killed and resumed is the run that was not, bit for bit; what does not belong to it is refused."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

import server_app.resume as module
from benchmarks.kill_and_resume import kill_and_resume, lasting
from client_app.app import app as client_app
from framp.engines import InProcessGrid
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.descriptors import ImageEncoder
from framp_core.errors import EngineError, FrampError, ResumeError, RunFolderError
from framp_core.methods import settings_of
from framp_core.report import write_report
from framp_core.run_folder import RunFolder
from server_app.app import serve
from server_app.strategies import FrampStrategy, SubmodelStrategy

Build = Callable[..., FrampConfig]
Whole = Callable[[FrampConfig], RunFolder]
ROUNDS = 4
CLUSTERED: dict[str, Scalar] = {
    "rounds": ROUNDS,
    "partition.clients": 6,
    "partition.concept-shift-clusters": 2,
    "capacity.sizes": "1/4,1",
    "generator.experts": 2,
    "server.clients-per-round": 5,
    "local.steps": 4,
    "evaluation.every": 2,
    "output.checkpoint-every": 1,
}
"""Two clusters of clients, so that experts move and their running sums matter."""
METHODS = (
    *("framp", "framp-modulated", "framp-experts", "framp-low-rank"),
    *("fiarse", "fiarse-released", "fiarse-strong", "heterofl", "fedrolex", "scalefl", "fedavg", "local"),
)


class Killed(BaseException):
    """In place of a signal that nothing can catch."""


class Mortal(InProcessGrid):
    """A grid on which the server dies once its n-th messages were answered; rounds have two, train and evaluate."""

    def __init__(self, config: FrampConfig, dies_after: int, node_configs: list[dict[str, Scalar]] | None) -> None:
        super().__init__(client_app, config.partition.nodes, config.to_flat(), node_configs=node_configs)
        self.calls_left = dies_after

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        self.calls_left -= 1
        if self.calls_left == 0:
            raise Killed
        return replies


def run(
    config: FrampConfig,
    dies_after: int = 0,
    parts: Iterable[int] | None = None,
    of: int | None = None,
    strategy: type[SubmodelStrategy] | None = None,
) -> RunFolder | None:
    """The finished run, or None if it died; ``parts`` are the partitions of the nodes, in the order of their ids."""
    nodes = config.partition.nodes
    configs: list[dict[str, Scalar]] = [
        {"partition-id": part, "num-partitions": of or nodes} for part in (range(nodes) if parts is None else parts)
    ]
    with Mortal(config, dies_after, configs) as grid:
        try:
            return serve(grid, config, strategy)
        except Killed:
            return None


def resumed(config: FrampConfig, **values: Scalar) -> FrampConfig:
    """The configuration that goes on with a run."""
    folder: dict[str, Scalar] = {"output.folder": "", "output.resume": config.output.folder}
    given = {key.replace("__", ".").replace("_", "-"): value for key, value in values.items()}
    return FrampConfig.from_flat({**config.to_flat(), **folder, **given})


def outcome(folder: RunFolder) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict[str, Any]]:
    """Events that last, and the last checkpoint without the events' bytes, which count the times' digits."""
    events = lasting(folder.events())
    tensors, state = folder.read_checkpoint()
    return events, tensors, {key: value for key, value in state.items() if key not in ("events-bytes", "config")}


def assert_equal(one: RunFolder | None, other: RunFolder | None) -> None:
    assert one is not None
    assert other is not None
    events, tensors, state = outcome(one)
    other_events, other_tensors, other_state = outcome(other)
    assert events == other_events
    assert state == other_state
    assert list(tensors) == list(other_tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype == other_tensors[name].dtype
        assert torch.equal(tensor, other_tensors[name]), name


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than these runs; the last test has a report."""
    torch.set_num_threads(1)
    monkeypatch.setattr("server_app.app.write_report", lambda path: None)


@pytest.fixture
def clustered(tiny: Build) -> Build:
    def build(method: str = "framp", name: str = "run", **values: Scalar) -> FrampConfig:
        given = {key.replace("__", ".").replace("_", "-"): value for key, value in values.items()}
        return tiny(settings_of(method, {**CLUSTERED, **given}), name)

    return build


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FrampConfig], RunFolder]:
    """The same run, uninterrupted; done once for all tests."""
    known: dict[str, RunFolder] = {}

    def build(config: FrampConfig) -> RunFolder:
        if config.digest() not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            found = run(FrampConfig.from_flat({**config.to_flat(), "output.folder": str(folder)}))
            assert found is not None
            known[config.digest()] = found
        return known[config.digest()]

    return build


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_bit_for_bit(method: str, clustered: Build, whole: Whole) -> None:
    """Killed within round 3 before the server learns; then within the resumed run's round 4, while it is measured.

    The nodes come back in another order, so that every client has another node id.
    """
    config = clustered(method)
    assert run(config, dies_after=5) is None
    assert RunFolder.open(Path(config.output.folder)).checkpoints.rounds() == [2, 1]
    nodes = range(config.partition.nodes)
    assert run(resumed(config), dies_after=4, parts=reversed(nodes)) is None
    assert_equal(run(resumed(config), parts=[*nodes[3:], *nodes[:3]]), whole(config))


def test_what_the_defences_remember_is_resumed(clustered: Build, whole: Whole) -> None:
    config = clustered(
        defence__screening="cosine", defence__screening_threshold=0.9, defence__norm_bound=1.0, local__steps=8
    )
    assert run(config, dies_after=5) is None
    finished = run(resumed(config))
    assert_equal(finished, whole(config))
    assert finished is not None
    rows = [row for event in finished.events() if event["kind"] == "train" for row in event["clients"]]
    assert any(row["screened"] for row in rows)
    assert finished.read_checkpoint()[1]["agreements"] == {row["client"]: row["agreement"] for row in rows}


@pytest.mark.parametrize("dies_after", range(1, 2 * ROUNDS + 1))
def test_whenever_a_run_dies_it_goes_on(dies_after: int, clustered: Build, whole: Whole) -> None:
    """With a checkpoint every two rounds, two before the first one among them."""
    config = clustered(output__checkpoint_every=2)
    assert run(config, dies_after) is None
    assert_equal(run(resumed(config)), whole(config))


def test_a_run_that_died_before_its_report_only_lacks_that(
    clustered: Build, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(folder: RunFolder) -> None:
        raise Killed

    config = clustered()
    with monkeypatch.context() as patch:
        patch.setattr("server_app.app.finish", dies)
        assert run(config) is None
    leftover = Path(config.output.folder) / "checkpoints" / "round-000001.tmp"
    leftover.mkdir()
    assert_equal(run(resumed(config), parts=[]), whole(config))
    assert not leftover.exists()


FORGOTTEN: dict[str, tuple[str, str]] = {
    "optimizers": ("framp", "framp_core.server_update._load_optimizer"),
    "personal optimizer": ("framp-modulated", "framp_core.server_update._load_optimizer"),
    "experts' running sums": ("framp", "framp_core.expert_update.ExpertUpdate.load_state_dict"),
    "averaged generator": ("fiarse-strong", "torch.optim.swa_utils.AveragedModel.load_state_dict"),
    "everything": ("framp", "server_app.strategies.framp.FrampStrategy.restore"),
    "clients' own models": ("local", "server_app.strategies.local_only.LocalOnlyStrategy.restore"),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_is_not_restored_changes_the_numbers(
    what: str, clustered: Build, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, forgotten = FORGOTTEN[what]
    config = clustered(method)
    expected = whole(config)
    assert run(config, dies_after=5) is None
    monkeypatch.setattr(forgotten, lambda *_: None)
    changed = run(resumed(config))
    with pytest.raises(AssertionError):
        assert_equal(changed, expected)


def test_who_is_absent_is_still_known_and_is_served_when_it_comes_back(clustered: Build) -> None:
    config = clustered(server__discovery_deadline=0.3)
    nodes = range(config.partition.nodes)
    assert run(config, dies_after=3) is None
    without_two = [part for part in nodes if part != 2]
    assert run(resumed(config), dies_after=3, parts=without_two) is None
    folder = RunFolder.open(Path(config.output.folder))
    _, state = folder.read_checkpoint()
    assert state["round"] == 2
    assert [client["name"] for client in state["clients"]] == [f"client-{part:04d}" for part in nodes]
    finished = run(resumed(config))
    assert finished is not None
    rows = [row["client"] for event in finished.events() if event["kind"] == "evaluate" for row in event["accuracies"]]
    assert "client-0002" in rows
    assert {event["kind"] for event in finished.events()} == {"start", "train", "evaluate", "priors"}


def test_who_comes_first_after_a_resume_is_a_newcomer(clustered: Build) -> None:
    config = clustered(server__discovery_deadline=0.3)
    nodes = range(config.partition.nodes)
    assert run(config, dies_after=3, parts=nodes[1:]) is None
    finished = run(resumed(config))
    assert finished is not None
    (joined,) = [event for event in finished.events() if event["kind"] == "join"]
    assert (joined["round"], [client["client"] for client in joined["clients"]]) == (2, ["client-0000"])


def test_rounds_in_which_nothing_was_learnt_are_counted_over_a_resume(tiny: Build) -> None:
    config = tiny(
        {"rounds": 9, "server.empty-rounds": 3, "local.learning-rate": 1e38, "local.steps": 5}
        | {"output.checkpoint-every": 1}
    )
    assert run(config, dies_after=5) is None
    with pytest.raises(EngineError, match="in the last 3 rounds, up to round 3"):
        run(resumed(config))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    clustered: Build, whole: Whole, caplog: pytest.LogCaptureFixture
) -> None:
    config = clustered()
    assert run(config, dies_after=7) is None
    (Path(config.output.folder) / "checkpoints" / "round-000003" / "tensors.safetensors").write_bytes(b"half")
    with caplog.at_level("WARNING", logger="flwr"):
        finished = run(resumed(config))
    assert "checkpoint of round 3" in caplog.text
    assert_equal(finished, whole(config))


def test_places_may_change_and_checkpoints_too(clustered: Build, whole: Whole, tmp_path: Path) -> None:
    config = clustered()
    assert run(config, dies_after=5) is None
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(config.output.folder, tmp_path / "elsewhere" / "moved")
    asked = resumed(
        config,
        output__resume=str(moved),
        data__cache=str(tmp_path / "other-cache"),
        engine__workers=3,
        output__checkpoints_kept=1,
    )
    finished = run(asked)
    assert_equal(finished, whole(config))
    assert finished is not None
    assert finished.path == moved
    assert finished.checkpoints.rounds() == [ROUNDS]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock, and the log, where a refused attempt is noted."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "log.jsonl"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class OtherStrategy(FrampStrategy):
    """FRAMP under another name."""


Change = Callable[[Path, pytest.MonkeyPatch], Mapping[str, Any]]


def with_code(change: Callable[[dict[str, str]], Mapping[str, str]]) -> Change:
    def apply(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
        files = module.code_files()
        monkeypatch.setattr(module, "code_files", lambda: change(files))
        return {}

    return apply


def finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    (folder / "summary.json").write_text("{}")
    return {}


def every_checkpoint_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    for file in folder.rglob("state.json"):
        file.write_text("{")
    return {}


def events_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    (folder / "events.jsonl").write_text("")
    return {}


def upside_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """Every image, as far as descriptors see it."""
    real = ImageEncoder.forward
    monkeypatch.setattr(ImageEncoder, "forward", lambda self, images: real(self, images.flip(2)))
    return {}


def settings(**values: Scalar) -> Change:
    return lambda folder, monkeypatch: {"values": values}


REFUSALS: dict[str, tuple[Change, type[FrampError], str]] = {
    "more rounds": (settings(rounds=9), ResumeError, r"other settings: rounds is 4 there and 9 here"),
    "two settings": (
        settings(local__steps=5, seed=1),
        ResumeError,
        r"seed is 0 there and 1 here; local.steps is 4 there and 5 here",
    ),
    "server code": (
        with_code(lambda files: {**files, "server_app/strategies/framp.py": "0"}),
        ResumeError,
        r"other code: server_app/strategies/framp.py has changed\. ",
    ),
    "files that came and went": (
        with_code(lambda files: {key: files[key] for key in files if key != "server_app/app.py"} | {"a.py": "1"}),
        ResumeError,
        r"other code: a.py was added; server_app/app.py is gone\. ",
    ),
    "much code": (
        with_code(lambda files: dict.fromkeys(files, "0")),
        ResumeError,
        r"client_app/app.py has changed; .*; and \d+ more files",
    ),
    "another strategy": (
        lambda folder, monkeypatch: {"strategy": OtherStrategy},
        ResumeError,
        r"server_app.strategies.framp.FrampStrategy there and \S*test_resume.OtherStrategy here",
    ),
    "other data": (
        lambda folder, monkeypatch: {"parts": range(5), "of": 5},
        ResumeError,
        r"the clients have .* over 5 nodes; the checkpoint .* is about .* over 7 nodes",
    ),
    "other images with the same labels": (
        upside_down,
        ResumeError,
        r"partition is that .* data are not: 7 clients, client-0000 among them",
    ),
    "a finished run": (finished, ResumeError, r"is finished; framp report "),
    "damaged checkpoints": (every_checkpoint_damaged, RunFolderError, r"every checkpoint in .* is damaged"),
    "a cut log": (events_cut, RunFolderError, r"events.jsonl.* does not hold the \d+ bytes"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_belong_together_is_refused_by_name(
    name: str, clustered: Build, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, error, words = REFUSALS[name]
    config = clustered()
    assert run(config, dies_after=5) is None
    folder = Path(config.output.folder)
    with monkeypatch.context() as patch:
        asked = dict(change(folder, patch))
        before = contents(folder)
        with pytest.raises(error, match=words):
            run(resumed(config, **asked.pop("values", {})), **asked)
        assert contents(folder) == before
    if name not in ("a finished run", "damaged checkpoints", "a cut log"):
        assert_equal(run(resumed(config)), whole(config))


def test_other_settings_are_refused_before_the_first_checkpoint_too(clustered: Build) -> None:
    config = clustered()
    assert run(config, dies_after=1) is None
    before = contents(Path(config.output.folder))
    with pytest.raises(ResumeError, match="seed is 0 there and 2 here"):
        run(resumed(config, seed=2))
    assert contents(Path(config.output.folder)) == before


def test_a_run_at_work_is_left_alone(clustered: Build) -> None:
    config = clustered()
    assert run(config, dies_after=5) is None
    with (
        RunFolder.open(Path(config.output.folder)).alone(),
        pytest.raises(RunFolderError, match="another process works on the run"),
    ):
        run(resumed(config))


def test_what_is_no_run_cannot_go_on(clustered: Build, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        run(resumed(clustered(), output__resume=str(tmp_path)))


def test_the_code_of_a_foreign_strategy_counts() -> None:
    found = module.origin(FrampConfig(), OtherStrategy)["code"]
    assert __name__ in found
    own = module.origin(FrampConfig(), FrampStrategy)["code"]
    assert {key: found[key] for key in own} == own
    assert {name.partition("/")[0] for name in own} == {"client_app", "framp_core", "server_app"}


def test_a_server_killed_at_random_moments_goes_on_every_time(tmp_path: Path) -> None:
    """Three kills of the twenty of ``benchmarks/kill_and_resume.py``, by signal 9."""
    kills, differing = kill_and_resume(tmp_path, kills=3, rounds=12, seed=1)
    assert len(kills) == 3
    assert differing == []


def test_the_report_shows_every_round_once(clustered: Build) -> None:
    config = clustered()
    assert run(config, dies_after=6) is None
    events = Path(config.output.folder) / "events.jsonl"
    events.write_bytes(events.read_bytes()[:-7])
    finished = run(resumed(config))
    assert finished is not None
    rounds = [event["round"] for event in finished.events() if event["kind"] == "train"]
    assert rounds == [1, 2, 3, 4]
    assert json.loads((finished.path / "summary.json").read_text())["rounds"] == ROUNDS
    write_report(finished.path)
    assert re.search(r"after round 2 at ", (finished.path / "report.html").read_text())
