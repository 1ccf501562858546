"""Whole runs with clients that lie, fail, or change their size."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from benchmarks.attackers import ATTACKS, app
from client_app.app import app as client_app
from client_app.app import describe, evaluate, train
from framp.engines import InProcessGrid
from framp_core.codec.frame import UPDATE, pack, unpack
from framp_core.codec.prototypes import decode_prototypes, encode_prototypes
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.errors import EngineError, ModelError
from framp_core.report import write_report
from framp_core.run_folder import RunFolder
from server_app.app import serve
from server_app.strategies import STRATEGIES, SubmodelStrategy
from tests.server_app.runs import Handler, app_with, final_theta

Build = Callable[..., FrampConfig]
DEFENCES: dict[str, Scalar] = {
    "defence.norm-bound": 2.0,
    "defence.screening": "cosine",
    "defence.prototypes": "median",
}
COHORT: dict[str, Scalar] = {
    "rounds": 3,
    "partition.clients": 6,
    "server.clients-per-round": 6,
    "local.steps": 10,
    "capacity.sizes": "1/4,1",
    "evaluation.every": 3,
}


def rows(run: RunFolder, kind: str = "clients") -> list[list[dict[str, Any]]]:
    """Rows of the training events, round by round."""
    return [event[kind] for event in run.events() if event["kind"] == "train"]


def run_with(config: FrampConfig, node: dict[str, Scalar], client: ClientApp = app, workers: int = 1) -> RunFolder:
    """A run in which partition 1 has ``node`` in its configuration."""
    nodes = config.partition.nodes
    configs = [
        {"partition-id": index, "num-partitions": nodes, **(node if index == 1 else {})} for index in range(nodes)
    ]
    with InProcessGrid(client, nodes, config.to_flat(), workers, configs) as grid:
        return serve(grid, config)


def test_defences_that_find_nothing_change_no_number(tiny: Build) -> None:
    plain, run = final_theta(tiny(COHORT, "plain"))
    loose = {"defence.norm-bound": 1e6, "defence.screening": "cosine", "defence.screening-threshold": -1.0}
    assert np.array_equal(plain, final_theta(tiny({**COHORT, **loose}, "loose"))[0])
    assert not np.array_equal(plain, final_theta(tiny({**COHORT, "defence.norm-bound": 0.5}, "tight"))[0])
    assert not any({"shortened", "agreement", "screened"} & set(row) for clients in rows(run) for row in clients)


@pytest.mark.parametrize("attack", ATTACKS)
def test_who_lies_about_a_delta_is_found_and_nobody_else(tiny: Build, attack: str) -> None:
    run = run_with(tiny({**COHORT, **DEFENCES}), {"attack": attack})
    trained = [row for clients in rows(run) for row in clients]
    assert len(trained) == 18
    screened = {row["client"] for row in trained if row["screened"]}
    shortened = {row["client"] for row in trained if "shortened" in row}
    # Label flippers are found over more rounds than three.
    assert screened == ({"client-0001"} if attack in ("sign-flip", "scaled-sign-flip", "random") else set())
    assert shortened == ({"client-0001"} if attack in ("scaled", "scaled-sign-flip", "random") else set())


def test_the_report_names_those_whom_the_defences_touched(tiny: Build) -> None:
    run = run_with(tiny({**COHORT, **DEFENCES}), {"attack": "scaled-sign-flip"})
    page = write_report(run.path).read_text()
    assert "3 of 18 deltas shortened (defence): client-0001 (3)." in page
    assert "3 of 18 deltas left out, against the cohort&#x27;s direction (defence): client-0001 (3)." in page


def test_liars_are_the_same_in_worker_processes(tiny: Build) -> None:
    values = {**COHORT, **DEFENCES, "rounds": 1}
    alone, pooled = (
        run_with(tiny({**values}, f"workers-{workers}"), {"attack": "random", "malformed": 0.5}, workers=workers)
        for workers in (1, 2)
    )
    assert rows(alone) == rows(pooled)


def test_each_kind_of_garbage_is_refused_with_its_reason_and_the_round_goes_on(tiny: Build) -> None:
    """The kinds come in turn: round 1 is the second of them."""
    run = run_with(tiny({**COHORT, "rounds": 4}), {"malformed": 1.0})
    refused = [row for [row] in rows(run, "refused")]
    assert {row["client"] for row in refused} == {"client-0001"}
    reasons = ("MaskMismatchError: got", "NonFiniteError: ", "ProtocolError: the delta has length", "ProtocolError: ")
    for row, reason in zip(refused, reasons, strict=True):
        assert row["error"].startswith(reason)
    assert "starts with b'\\x00\\x01\\x02\\x03'" in refused[3]["error"]
    assert all(event["learnt"] for event in run.events() if event["kind"] == "train")
    unbounded = run_with(tiny({**COHORT, "rounds": 3, "defence.largest-norm": 0.0}, "unbounded"), {"malformed": 1.0})
    assert [len(refused) for refused in rows(unbounded, "refused")] == [1, 1, 0]


def test_a_client_that_vanishes_is_counted_and_missed_by_nobody(tiny: Build) -> None:
    run = run_with(tiny({**COHORT, "rounds": 2}), {"lost": 1.0})
    assert [[row["client"] for row in refused] for refused in rows(run, "refused")] == [["client-0001"]] * 2
    assert [len(clients) for clients in rows(run)] == [5, 5]


def changing(change: Callable[[Message, Context], None]) -> ClientApp:
    """A client app whose partition 1 changes something before it trains."""

    def trains(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            change(message, context)
        return train(message, context)

    return app_with(trains)


def test_a_client_with_stale_code_is_refused(tiny: Build) -> None:
    def grow_stale(message: Message, context: Context) -> None:
        message.content["config"]["fingerprint"] = "0" * 64  # type: ignore[index]

    run = run_with(tiny(COHORT), {}, changing(grow_stale))
    assert all(row["error"].startswith("FingerprintMismatchError") for [row] in rows(run, "refused"))


def test_a_capacity_that_shrinks_costs_a_round_and_holds_from_the_next(tiny: Build) -> None:
    def shrink(message: Message, context: Context) -> None:
        if message.content["config"]["round"] == 2:
            context.node_config["capacity"] = "1/8"

    run = run_with(tiny(COHORT), {}, changing(shrink))
    assert [len(refused) for refused in rows(run, "refused")] == [0, 1, 0]
    assert rows(run, "refused")[1][0]["error"].startswith("MaskMismatchError")
    sizes = [[row["capacity"] for row in clients if row["client"] == "client-0001"] for clients in rows(run)]
    assert sizes == [["1/4"], [], ["1/8"]]
    (joined,) = (event for event in run.events() if event["kind"] == "join")
    assert [(row["client"], row["capacity"]) for row in joined["clients"]] == [("client-0001", "1/8")]


def test_a_reply_that_tells_no_capacity_at_all_is_refused(tiny: Build) -> None:
    def trains(message: Message, context: Context) -> Message:
        reply = train(message, context)
        if context.node_config["partition-id"] == 1:
            reply.content["framp"]["capacity"] = "7"  # type: ignore[index]
        return reply

    run = run_with(tiny(COHORT), {}, app_with(trains))
    assert all("outside (0, 1]" in row["error"] for [row] in rows(run, "refused"))


class Dripping(InProcessGrid):
    """A grid whose training replies come one at a time, in the order of the messages."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        waiting = [key for key in self._replies if key in set(message_ids)]
        training = waiting and self._replies[waiting[0]].metadata.message_type == "train"
        return super().pull_messages(waiting[:1] if training else waiting)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.first_replies.POLL_SECONDS", 0.0)


@pytest.mark.usefixtures("impatient")
def test_an_over_sampled_round_ends_with_enough_replies(tiny: Build) -> None:
    """Five are asked for three; partition 1 fails, so the round goes on to the fourth and leaves the fifth."""
    values: dict[str, Scalar] = {"rounds": 2, "server.clients-per-round": 3, "server.over-sampling": 0.67}
    config = tiny({**COHORT, **values, "partition.clients": 5})
    nodes = [{"partition-id": index, "num-partitions": 6, "lost": float(index == 1)} for index in range(6)]
    with Dripping(app, 6, config.to_flat(), node_configs=nodes) as grid:
        run = serve(grid, config)
    for event in (event for event in run.events() if event["kind"] == "train"):
        assert [row["client"] for row in event["clients"]] == ["client-0000", "client-0002", "client-0003"]
        assert [row["client"] for row in event["refused"]] == ["client-0001"]
        assert event["unused"] == ["client-0004"]


@pytest.mark.usefixtures("impatient")
def test_an_over_sampled_round_ends_at_its_deadline(tiny: Build) -> None:
    values: dict[str, Scalar] = {"server.clients-per-round": 3, "server.over-sampling": 1.0}
    config = tiny({**COHORT, **values, "rounds": 1, "server.round-deadline": 1e-9})
    with Dripping(client_app, config.partition.nodes, config.to_flat()) as grid:
        run = serve(grid, config)
    assert [len(clients) for clients in rows(run)] == [1]
    errors = [row["error"] for row in rows(run, "refused")[0]]
    assert errors == ["no reply before the deadline"] * 5


def lying_about_prototypes(value: float, liars: tuple[int, ...] = (1,), classes: slice = slice(None)) -> ClientApp:
    """A client app whose ``liars`` send prototypes with every entry of ``value``, for these of their classes alone."""

    def trains(message: Message, context: Context) -> Message:
        reply = train(message, context)
        if context.node_config["partition-id"] in liars:
            record = reply.content.config_records["framp"]
            contents = unpack(record["payload"], UPDATE).contents  # type: ignore[arg-type]
            own = decode_prototypes(memoryview(contents["prototypes"]), 10, 8)
            assert own is not None
            own.means[classes] = value
            record["payload"] = pack(UPDATE, "float32", contents["values"], encode_prototypes(own)).blob  # type: ignore[arg-type]
        return reply

    return app_with(trains)


@pytest.mark.parametrize(
    ("rule", "value"), [("mean", 3e38), ("mean", 25.0), ("median", -3e38), ("median", 3e38), ("median", 1e6)]
)
def test_absurd_prototypes_are_refused_and_harm_nobody(tiny: Build, rule: str, value: float) -> None:
    config = tiny({**COHORT, "defence.prototypes": rule, "local.alignment-weight": 1.0})
    run = run_with(config, {}, lying_about_prototypes(value))
    assert [[row["client"] for row in refused] for refused in rows(run, "refused")] == [["client-0001"]] * 3
    assert all(
        row["error"].startswith("ProtocolError: the features in the prototypes") for [row] in rows(run, "refused")
    )
    assert [len(clients) for clients in rows(run)] == [5, 5, 5]
    assert all(np.abs(kept["global.means"]).max() < 10 for kept in run.prototypes().values())
    page = (run.path / "report.html").read_text()
    assert "defence.largest-prototype=20" in page
    assert 'alt="Prototypes.' in page


def test_without_the_bound_the_same_prototypes_end_the_run(tiny: Build) -> None:
    """The negative control: the honest clients diverge from round 2 on."""
    values: dict[str, Scalar] = {"defence.largest-prototype": 0.0, "local.alignment-weight": 1.0}
    run_with(tiny({**COHORT, **values, "rounds": 1}, "one"), {}, lying_about_prototypes(3e38))
    with pytest.raises(EngineError, match="diverged"):
        run_with(tiny({**COHORT, **values, "rounds": 4, "server.empty-rounds": 2}), {}, lying_about_prototypes(3e38))


def test_one_class_suffices_and_so_does_a_client_alone_in_the_first_round(tiny: Build) -> None:
    """There is nobody to compare with but the typical size."""
    values: dict[str, Scalar] = {"local.alignment-weight": 1.0, "server.clients-per-round": 1, "partition.clients": 1}
    lying = lying_about_prototypes(1e6, (0,), slice(0, 1))
    with pytest.raises(EngineError, match=r"client-0000: ProtocolError: .* and 20 is the largest that is taken"):
        run_with(tiny({**COHORT, **values, "rounds": 1}), {}, lying)


def test_a_minority_that_agrees_gets_through_no_more_than_one(tiny: Build) -> None:
    """Two of six, each round a little larger than what was taken before."""
    config = tiny({**COHORT, "local.alignment-weight": 1.0})
    run = run_with(config, {}, lying_about_prototypes(21.0, (1, 3)))
    assert [[row["client"] for row in refused] for refused in rows(run, "refused")] == [
        ["client-0001", "client-0003"]
    ] * 3


def test_a_resumed_run_remembers_the_sizes(tiny: Build) -> None:
    run = run_with(tiny({**COHORT, "local.alignment-weight": 1.0}), {}, lying_about_prototypes(1e6))
    sizes = run.read_checkpoint()[1]["prototype-sizes"]
    assert sorted(sizes) == ["client-0000", "client-0002", "client-0003", "client-0004", "client-0005"]
    assert all(0 < size < 10 for size in sizes.values())


@pytest.mark.parametrize(
    ("key", "value"),
    [("local-total", 10**15), ("union-total", 3), ("validation-total", 10**9), ("local-correct", 10**9)],
)
def test_a_client_that_counts_images_that_it_has_not_is_left_out_of_an_evaluation(
    tiny: Build, key: str, value: int
) -> None:
    def evaluates(message: Message, context: Context) -> Message:
        reply = evaluate(message, context)
        if context.node_config["partition-id"] == 1:
            metrics = reply.content.metric_records["metrics"]
            metrics[key], metrics["local-correct"] = value, min(value, metrics["local-correct"])  # type: ignore[type-var]
            metrics[key] = value
        return reply

    run = run_with(tiny({**COHORT, "rounds": 1, "evaluation.every": 1}), {}, app_with(evaluates=evaluates))
    (event,) = (event for event in run.events() if event["kind"] == "evaluate")
    assert [row["client"] for row in event["refused"]] == ["client-0001"]
    assert {row["client"] for row in event["accuracies"]} == {f"client-{number:04d}" for number in (0, 2, 3, 4, 5, 6)}


def test_a_reference_in_bytes_is_none_and_ends_no_run(tiny: Build) -> None:
    def trains(message: Message, context: Context) -> Message:
        reply = train(message, context)
        reply.content["framp"]["reference"] = b"x" * 1000  # type: ignore[index]
        return reply

    def describes(message: Message, context: Context) -> Message:
        reply = describe(message, context)
        reply.content["framp"]["reference"] = b"x" * 1000  # type: ignore[index]
        return reply

    lying = app_with(trains, describes=describes)
    run = run_with(tiny({**COHORT, "rounds": 1}), {}, lying)
    assert run.read_checkpoint()[1]["clients"][0]["reference"] is None


def test_who_registers_with_more_examples_than_the_partition_has_is_refused(tiny: Build) -> None:
    """The number of examples is the weight of an update: one client must not outweigh all others."""

    def describes(message: Message, context: Context) -> Message:
        reply = describe(message, context)
        index = context.node_config["partition-id"]
        keys = ("train-examples", "local-examples", "validation-examples", "union-examples")
        if index in (1, 2):
            reply.content["client"][keys[int(index)]] = 2**31  # type: ignore[index, arg-type]
        return reply

    run = run_with(tiny({**COHORT, "rounds": 1}), {}, app_with(describes=describes))
    (start,) = (event for event in run.events() if event["kind"] == "start")
    errors = [row["error"] for row in start["refused"]]
    assert [row["client"] for row in start["refused"]] == ["node 1001", "node 1002"]
    assert "client-0001 registers with 2147483648 local examples" in errors[0]
    assert "client-0002 registers with 2147483648 validation examples" in errors[1]
    assert [len(clients) for clients in rows(run)] == [4]


@pytest.mark.parametrize("capacity", ["1/" + "9" * 60, "1e-90", "1/1000001"])
@pytest.mark.parametrize("first_in", ["describe", "train", "evaluate"])
def test_a_capacity_that_leaves_nothing_ends_no_run(tiny: Build, capacity: str, first_in: str) -> None:
    """No submodel of it can be cut: the client is refused, by name and with what it needs, and the others go on."""

    def telling(kind: str, handler: Handler) -> Handler:
        def handle(message: Message, context: Context) -> Message:
            reply = handler(message, context)
            if context.node_config["partition-id"] == 1 and kind == first_in:
                reply.content["client" if kind == "describe" else "framp"]["capacity"] = capacity  # type: ignore[index]
            return reply

        return handle

    handlers = [
        telling(kind, each) for kind, each in (("train", train), ("evaluate", evaluate), ("describe", describe))
    ]
    run = run_with(tiny({**COHORT, "rounds": 2, "evaluation.every": 1}), {}, app_with(*handlers))
    refused = [row for event in run.events() for row in event.get("refused", [])]
    assert {row["client"] for row in refused} == {"node 1001" if first_in == "describe" else "client-0001"}
    assert all(f"capacity {Fraction(capacity)} of client-0001 leaves nothing" in row["error"] for row in refused)
    assert len(refused) == (1 if first_in == "describe" else 2)
    assert {row["capacity"] for row in run.json("summary.json")["rows"]} == {"1/4", "1", "mean"}
    assert [len(clients) for clients in rows(run)] == [6 if first_in == "evaluate" else 5] * 2


def test_a_configured_size_that_leaves_nothing_is_said_at_the_start(tiny: Build) -> None:
    with pytest.raises(ModelError, match=r"capacity 1/9999 of \d+ maskable weights leaves none"):
        run_with(tiny({**COHORT, "capacity.sizes": "1/9999,1"}), {}, client_app)


def test_a_capacity_of_many_digits_is_written_and_read_again(tiny: Build) -> None:
    """The longest that is taken: the run's own record of it is no damaged file."""
    capacity = "0." + "1" * 48

    def describes(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            context.node_config["capacity"] = capacity
        return describe(message, context)

    run = run_with(tiny({**COHORT, "rounds": 1}), {}, app_with(describes=describes))
    assert str(Fraction(capacity)) in {row["capacity"] for row in run.json("summary.json")["rows"]}


def test_sizes_that_a_client_had_once_are_forgotten(tiny: Build) -> None:
    """One that tells a new capacity each time would else have the server keep a mask for each of them."""
    strategies: list[SubmodelStrategy] = []

    class Watched(STRATEGIES["framp"]):  # type: ignore[misc]
        def summary(self) -> None:
            strategies.append(self)

    def hop(message: Message, context: Context) -> None:
        context.node_config["capacity"] = f"1/{2 + int(message.content['config']['round'])}"  # type: ignore[arg-type, index]

    config = tiny({**COHORT, "rounds": 6})
    with InProcessGrid(changing(hop), config.partition.nodes, config.to_flat()) as grid:
        serve(grid, config, Watched)
    assert set(strategies[0].references._newest) <= {Fraction(1, 4), Fraction(1, 7), Fraction(1, 8)}
