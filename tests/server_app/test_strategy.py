"""Whole runs through Flower's own ``Strategy.start``, on the in-process grid."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client_app.app import app as client_app
from client_app.app import train
from framp.engines import InProcessGrid, run_local
from framp_core.codec import encode_update
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import load_client
from framp_core.errors import EngineError, RunFolderError
from framp_core.layout import ParameterLayout
from framp_core.local_training import train_locally
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.prototypes import Prototypes
from framp_core.randomness import stream
from framp_core.run_folder import RunFolder
from server_app.app import serve
from server_app.strategies import FrampStrategy
from tests.server_app.runs import app_with

Build = Callable[..., FrampConfig]
FEDAVG: dict[str, Scalar] = {
    "generator.name": "shared",
    "extraction.name": "full",
    "server.weighting": "uniform",
    "server.shared-momentum": 0.0,
    "server.averaging-decay": 0.0,
    "local.alignment-weight": 0.0,
}


def events(run: RunFolder, kind: str) -> list[dict[str, object]]:
    """Events of one kind without their times."""
    return [{key: row[key] for key in row if key != "seconds"} for row in run.events() if row["kind"] == kind]


def run_with(config: FrampConfig, app: ClientApp = client_app, **grid: object) -> RunFolder:
    with InProcessGrid(app, config.partition.nodes, config.to_flat(), **grid) as nodes:  # type: ignore[arg-type]
        return serve(nodes, config)


def final_theta(config: FrampConfig) -> np.ndarray:
    """theta_0 after a run."""
    strategies = []

    class Kept(FrampStrategy):
        def summary(self) -> None:
            strategies.append(self)

    with InProcessGrid(client_app, config.partition.nodes, config.to_flat()) as grid:
        serve(grid, config, Kept)
    theta: np.ndarray = strategies[0].generator_update.generator.theta_0.detach().numpy()
    return theta


def trained_by_hand(config: FrampConfig, names: list[int], server_round: int, theta: torch.Tensor) -> list[np.ndarray]:
    """Deltas of the clients with these indices, trained without server, codec or messages."""
    deltas = []
    for index in names:
        data = load_client(config, index, config.partition.nodes)
        model = FlatModel(build_model(config.model, data.shape, data.classes))
        rng = stream(config.seed, "local-training", data.name, server_round)
        mask = np.ones(model.layout.size, bool)
        deltas.append(train_locally(model, theta.numpy(), mask, data, config, rng, None).delta)
    return deltas


def initial(config: FrampConfig) -> torch.Tensor:
    data = load_client(config, 0, config.partition.nodes)
    return initial_parameters(build_model(config.model, data.shape, data.classes), config.seed)


def test_shared_generator_at_full_capacity_is_fedavg_by_hand(tiny: Build) -> None:
    config = tiny({**FEDAVG, "server.clients-per-round": 4})
    torch.set_num_threads(1)
    theta = initial(config)
    for server_round in (1, 2):
        deltas = trained_by_hand(config, [0, 1, 2, 3], server_round, theta)
        theta = theta + torch.from_numpy(np.mean(deltas, axis=0))
    np.testing.assert_allclose(final_theta(config), theta.numpy(), rtol=0, atol=1e-6)
    masked = tiny({**FEDAVG, "server.clients-per-round": 4, "extraction.name": "global-top-k"}, "masked")
    assert not np.allclose(final_theta(masked), theta.numpy(), rtol=0, atol=1e-6)


def test_one_client_is_centralised_training(tiny: Build) -> None:
    config = tiny({**FEDAVG, "partition.clients": 1, "partition.unseen-clients": 0, "server.clients-per-round": 1})
    torch.set_num_threads(1)
    theta = initial(config)
    for server_round in (1, 2):
        theta = theta + torch.from_numpy(trained_by_hand(config, [0], server_round, theta)[0])
    np.testing.assert_allclose(final_theta(config), theta.numpy(), rtol=0, atol=1e-6)


def test_capacity_one_is_no_mask(tiny: Build) -> None:
    cut = final_theta(tiny({"capacity.sizes": "1"}, "cut"))
    full = final_theta(tiny({"capacity.sizes": "1", "extraction.name": "full"}, "full"))
    small = final_theta(tiny({"capacity.sizes": "1/2"}, "small"))
    assert np.array_equal(cut, full)
    assert not np.array_equal(cut, small)


def test_without_alignment_prototypes_change_nothing(tiny: Build) -> None:
    def theta(weight: float, decay: float) -> np.ndarray:
        name = f"run-{weight}-{decay}"
        return final_theta(tiny({"rounds": 3, "local.alignment-weight": weight, "server.prototype-decay": decay}, name))

    off = theta(0.0, 0.0)
    assert np.array_equal(off, theta(0.0, 0.9))
    on = theta(1.0, 0.0)
    assert not np.array_equal(on, theta(1.0, 0.9))
    assert not np.array_equal(on, off)


def test_same_seed_same_numbers_with_one_and_two_workers(tiny: Build) -> None:
    runs = [run_with(tiny(name=f"workers-{workers}"), workers=workers) for workers in (1, 2)]
    for kind in ("start", "train", "evaluate"):
        assert events(runs[0], kind) == events(runs[1], kind)
    other = run_with(tiny({"seed": 1}, "other-seed"))
    assert events(other, "evaluate") != events(runs[0], "evaluate")


def test_a_run_leaves_everything_it_promises(tiny: Build) -> None:
    config = tiny({"evaluation.fine-tune-steps": 2})
    run = run_local(config)
    names = {path.name for path in run.path.iterdir()}
    expected = {"config.toml", "manifest.json", "environment.json", "events.jsonl", "clients.csv", "checkpoints"}
    assert expected | {"report.html", "figures", "masks.json", "summary.json"} <= names
    assert FrampConfig.load(run.path / "config.toml") == config
    start, *_ = events(run, "start")
    assert [client["role"] for client in start["clients"]] == ["train"] * 4 + ["unseen"]  # type: ignore[union-attr, index]
    final = events(run, "evaluate")[-1]["accuracies"]
    measured = {(row["role"], row["population"], row["moment"]) for row in final}  # type: ignore[union-attr, index]
    moments = ("before", "after")
    seen = {("train", population, moment) for population in ("local", "validation", "union") for moment in moments}
    assert measured == seen | {("unseen", name, moment) for name in ("local", "validation") for moment in moments}


def test_unseen_clients_never_train(tiny: Build) -> None:
    run = run_local(tiny({"rounds": 4, "server.clients-per-round": 10}))
    trained = {row["client"] for event in events(run, "train") for row in event["clients"]}  # type: ignore[union-attr, index]
    assert trained == {f"client-{index:04d}" for index in range(4)}


def test_bytes_are_those_of_the_messages(tiny: Build) -> None:
    sizes: dict[str, list[int]] = {"down": [], "up": []}

    def watched(message: Message, context: Context) -> Message:
        sizes["down"].append(len(message.content["framp"]["payload"]))
        reply = train(message, context)
        sizes["up"].append(len(reply.content["framp"]["payload"]))
        return reply

    rows = [row for event in events(run_with(tiny(), app_with(watched)), "train") for row in event["clients"]]  # type: ignore[union-attr]
    for direction in ("down", "up"):
        assert sorted(sum(row[direction].values()) for row in rows) == sorted(sizes[direction])


def spoiling(spoil: Callable[[Message, Message, Mapping[str, Scalar]], Message | None]) -> ClientApp:
    """A client app whose partition 1 spoils its train replies."""

    def spoilt(message: Message, context: Context) -> Message:
        reply = train(message, context)
        if context.node_config["partition-id"] == 1:
            return spoil(message, reply, context.run_config)  # type: ignore[return-value]
        return reply

    return app_with(spoilt)


def _train_or_die(message: Message, context: Context) -> Message:
    if message.content["config"]["round"] == 1 and context.node_config["partition-id"] == 2:
        os._exit(1)
    return train(message, context)


mortal = app_with(_train_or_die)
"""Partition 2's process dies in round 1. At module level, so that worker processes can import it."""


def with_payload(message: Message, payload: bytes, metrics: dict[str, float | int] | None = None) -> Message:
    content = {
        "framp": ConfigRecord({"payload": payload}),
        "metrics": MetricRecord(metrics or {"loss": 0.0, "examples": 1}),
    }
    return Message(RecordDict(content), reply_to=message)


def poisoned_update(message: Message, reply: Message, run_config: Mapping[str, Scalar]) -> Message:
    """A well-formed update full of NaN."""
    config = FrampConfig.from_flat(run_config)
    layout = ParameterLayout.of(build_model(config.model, (1, 8, 8), 10))
    mask = np.ones(layout.size, bool)
    nothing = Prototypes(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 8), np.float32))
    nan = np.full(layout.size, np.nan, np.float32)
    return with_payload(message, encode_update(nan, nothing, layout, mask, "float32").blob)


def crash(message: Message, reply: Message, run_config: Mapping[str, Scalar]) -> Message:
    raise RuntimeError("client boom")


BAD_REPLIES = {
    "empty payload": lambda message, reply, _: with_payload(message, b""),
    "truncated": lambda message, reply, _: with_payload(message, reply.content["framp"]["payload"][:-1]),
    "flipped byte": lambda message, reply, _: with_payload(message, _flip(reply.content["framp"]["payload"])),
    "another kind": lambda message, reply, _: with_payload(message, message.content["framp"]["payload"]),
    "no records": lambda message, reply, _: Message(RecordDict(), reply_to=message),
    "loss is missing": lambda message, reply, _: with_payload(message, b"", {"examples": 1}),
    "loss is NaN": lambda message, reply, _: with_payload(
        message, reply.content["framp"]["payload"], {"loss": float("nan"), "examples": 1}
    ),
    "no examples": lambda message, reply, _: with_payload(
        message, reply.content["framp"]["payload"], {"loss": 0.0, "examples": 0}
    ),
    "more examples than it registered with": lambda message, reply, _: with_payload(
        message, reply.content["framp"]["payload"], {"loss": 0.0, "examples": 10**6}
    ),
    "another protocol version": lambda message, reply, _: with_payload(
        message, reply.content["framp"]["payload"][:4] + b"\x01" + reply.content["framp"]["payload"][5:]
    ),
    "NaN and another size": poisoned_update,
    "exception": crash,
}


def _flip(blob: bytes) -> bytes:
    middle = len(blob) // 2
    return blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1 :]


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_bad_replies_are_refused_and_the_round_goes_on(tiny: Build, name: str) -> None:
    config = tiny({"server.clients-per-round": 4})
    run = run_with(config, spoiling(BAD_REPLIES[name]))
    for event in events(run, "train"):
        assert [row["client"] for row in event["refused"]] == ["client-0001"]  # type: ignore[union-attr, index]
        assert [row["client"] for row in event["clients"]] == [f"client-000{index}" for index in (0, 2, 3)]  # type: ignore[union-attr, index]
        assert event["learnt"]
    assert len(events(run, "evaluate")) == config.rounds


def test_too_few_valid_replies_change_nothing(tiny: Build) -> None:
    """Client 1 always fails, so rounds that sample it have two valid replies of the three that are needed."""
    config = tiny({"rounds": 6, "server.minimum-replies": 3})
    run = run_with(config, spoiling(crash))
    for event in events(run, "train"):
        assert event["learnt"] == (not event["refused"])
    assert {event["learnt"] for event in events(run, "train")} == {True, False}


def test_a_run_that_learns_nothing_fails_with_the_reason(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny({"rounds": 9, "server.empty-rounds": 3, "local.learning-rate": 1e38, "local.steps": 5})
    with caplog.at_level("WARNING", logger="flwr"), pytest.raises(EngineError, match="learning-rate"):
        run_local(config)
    assert "train_locally" in caplog.text
    trained = events(RunFolder.open(Path(config.output.folder)), "train")
    assert [event["learnt"] for event in trained] == [False] * 3
    errors = [row["error"] for event in trained for row in event["refused"]]  # type: ignore[attr-defined]
    assert len(errors) == 9
    assert all("learning" in error for error in errors)


def test_a_worker_that_dies_costs_its_batch_and_no_more(tiny: Build) -> None:
    config = tiny({"rounds": 3, "server.clients-per-round": 4})
    run = run_with(config, mortal, workers=2)
    first, *others = events(run, "train")
    assert any("error 8" in row["error"] for row in first["refused"])  # type: ignore[attr-defined]
    assert [event["refused"] for event in others] == [[], []]


def test_clients_that_leave_for_good_end_the_run(tiny: Build) -> None:
    config = tiny({"rounds": 5, "server.discovery-deadline": 0.3})

    class Deserted(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            rounds = events(RunFolder.open(Path(config.output.folder)), "train")
            return [] if len(rounds) == 2 else super().get_node_ids()

    grid = Deserted(client_app, config.partition.nodes, config.to_flat())
    with grid, pytest.raises(EngineError, match="0 clients that train are connected"):
        serve(grid, config)


def test_checkpoints_come_at_their_interval_and_at_the_end(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = RunFolder.write_checkpoint
    monkeypatch.setattr(
        RunFolder,
        "write_checkpoint",
        lambda self, round, *state: (written.append(round), original(self, round, *state)),
    )
    run = run_local(tiny({"rounds": 5, "output.checkpoint-every": 2}))
    assert written == [2, 4, 5]
    assert run.checkpoints.rounds() == [5, 4]
    tensors, meta = run.read_checkpoint()
    assert meta["round"] == 5
    assert {"generator.theta_0", "prototypes.means"} <= set(tensors)


def test_other_code_is_refused(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.strategies.base.code_fingerprint", lambda: "0" * 64)
    with pytest.raises(EngineError, match="other code than the server"):
        run_with(tiny({"server.discovery-deadline": 0.5}))


def test_no_client_at_all(tiny: Build) -> None:
    config = tiny({"server.discovery-deadline": 0.3})
    with InProcessGrid(client_app, 0, config.to_flat()) as grid, pytest.raises(EngineError, match="no node connected"):
        serve(grid, config)


def test_flowers_default_of_two_nodes_divides_the_data_in_two(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny()
    with InProcessGrid(client_app, 2, config.to_flat()) as grid, caplog.at_level("WARNING", logger="flwr"):
        run = serve(grid, config)
    start, *_ = events(run, "start")
    assert [client["role"] for client in start["clients"]] == ["train", "train"]  # type: ignore[union-attr, index]
    assert "num-supernodes=5" in caplog.text
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["digest"] == start["partition_digest"]


def test_configure_returns_lists_with_one_message_per_client(tiny: Build, tmp_path: Path) -> None:
    config = tiny()
    run = RunFolder.create(tmp_path / "lists", config)
    strategy = FrampStrategy(config, run)
    with InProcessGrid(client_app, config.partition.nodes, config.to_flat()) as grid:
        for configure in (strategy.configure_train, strategy.configure_evaluate):
            messages = configure(1, None, ConfigRecord(), grid)  # type: ignore[arg-type]
            targets = [message.metadata.dst_node_id for message in messages]
            assert isinstance(messages, list)
            assert len(targets) == len(set(targets)) > 0


def test_an_existing_run_folder_is_left_alone(tiny: Build) -> None:
    config = tiny()
    run = run_local(config)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    with pytest.raises(RunFolderError, match="exists"):
        run_local(config)
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}


def test_every_generator_and_descriptor_runs(tiny: Build) -> None:
    for generator in ("mixture", "modulated", "low-rank", "chunked", "dense", "shared"):
        run_local(tiny({"rounds": 1, "generator.name": generator}, generator))
    sizes = {"class-moments": 10 * (1 + 32), "moments": 10 + 2 * 32, "histogram": 10, "warmup": 8}
    for descriptor, size in sizes.items():
        run = run_local(tiny({"rounds": 1, "descriptor.name": descriptor}, descriptor))
        assert events(run, "start")[0]["descriptor_floats"] == size


def test_a_server_step_lowers_the_loss_of_the_client_that_sent_the_delta(tiny: Build) -> None:
    """One client, one small step along the VJP: training from the new model starts at a lower loss."""
    config = tiny(
        {
            "rounds": 2,
            "partition.clients": 1,
            "partition.unseen-clients": 0,
            "local.steps": 40,
            "local.alignment-weight": 0.0,
            "capacity.sizes": "1/4",
        }
    )
    first, second = (event["clients"][0]["loss"] for event in events(run_local(config), "train"))  # type: ignore[index]
    assert second < first
