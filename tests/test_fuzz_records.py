"""Mutated records through what client and server read of Flower's messages, besides the payload.

Keys are dropped, renamed, or given values of every type that a record can hold. A reader refuses with an error of
:mod:`framp_core.errors`, or what it gives has the types and ranges that the code behind it relies on.
"""

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.client import MAX_ROUND, Instruction
from framp_core.codec import encode_descriptor
from framp_core.config_values import parse_capacity
from framp_core.errors import ConfigError, FrampError
from framp_core.fields import LONGEST_NAME
from framp_core.foreign_text import LONGEST_LINE, LONGEST_TRACEBACK
from framp_core.metrics import POPULATIONS, ClientAccuracy
from server_app.recording import read_accuracies, read_prior_counts, read_training
from server_app.registry import MAX_CLASSES, MAX_EXAMPLE_SIZE, MAX_EXAMPLES, ClientRecord
from server_app.replies import held_reference, read_replies

MUTANTS_PER_READER = 3_000
DESCRIPTOR = encode_descriptor(np.array([0.6, -0.8], np.float32)).blob
INSTRUCTION: dict[str, dict[str, object]] = {
    "config": {"fingerprint": "a" * 64, "round": 3, "final": False, "local.learning-rate": 0.1},
    "framp": {"payload": b"submodel"},
}
CARD: dict[str, dict[str, object]] = {
    "client": {
        **{"name": "client-0001", "role": "train", "capacity": "1/4", "shape": [1, 8, 8], "classes": 10},
        **{"train-examples": 40, "local-examples": 4, "validation-examples": 0, "union-examples": 9},
        **{"partitions": 5, "partition-digest": "b" * 64, "content-digest": "none"},
    },
    "framp": {"payload": DESCRIPTOR, "reference": 7},
}
TRAINED: dict[str, dict[str, object]] = {
    "framp": {"payload": b"update", "reference": 7},
    "metrics": {"loss": 1.5, "examples": 40, "steps": 2},
}
MEASURED: dict[str, dict[str, object]] = {
    "framp": {"reference": 7},
    "metrics": {
        **{"local-correct": 3, "local-total": 4, "union-correct": 5, "union-total": 9},
        **{"local-prior-correct": [1, 2], "union-prior-correct": [3, 4], "local-correct-tuned": 2},
        **{"local-total-tuned": 4, "union-correct-tuned": 9, "union-total-tuned": 9},
    },
}
CLIENT = ClientRecord.read(1, RecordDict({name: ConfigRecord(values) for name, values in CARD.items()}))  # type: ignore[arg-type]
NUMBERS: tuple[object, ...] = (
    *(0, 1, -1, 2**31, 2**53, 2**63 - 1, -(2**63)),
    *(0.0, -0.0, 1.5, 1e308, -1.0, math.nan, math.inf, -math.inf),
    *([], [1], [-1, 2], [2**40] * 3, [0.5, math.nan], [math.inf]),
)
ANYTHING: tuple[object, ...] = (
    *NUMBERS,
    *(True, False, [True], "", "text", "train", "1e-999999999", "1/0", "9" * 5000, "a\nb", "nan", "\ud7ff", "0" * 300),
    *("=1+1", "@SUM(A1)", "\x1b[2J", "a;=1", "x" * 200),
    *(b"", b"FRMP", DESCRIPTOR[:-1], DESCRIPTOR, bytes(300), ["a"], ["1", "8", "8"], [b"1"], [1.0, 8.0, 8.0]),
)


def mutated(records: dict[str, dict[str, object]], rng: np.random.Generator) -> RecordDict:
    """A message whose records differ in one to three places from good ones."""
    changed = {name: dict(values) for name, values in records.items()}
    for _ in range(rng.integers(1, 4)):
        name = list(changed)[rng.integers(len(changed))]
        keys = [*changed[name], "unknown", "local.steps", "data.root"]
        key = keys[rng.integers(len(keys))]
        pool = NUMBERS if name == "metrics" else ANYTHING
        match rng.integers(6):
            case 0:
                changed[name].pop(key, None)
            case 1 if len(changed) > 1:
                changed.pop(name)
            case _:
                changed[name][key] = pool[rng.integers(len(pool))]
    kinds = {name: MetricRecord if name == "metrics" else ConfigRecord for name in changed}
    if rng.random() < 0.03:  # A record of another kind under a known name.
        changed["framp"], kinds["framp"] = {"payload": 3}, MetricRecord
    return RecordDict({name: kinds[name](values) for name, values in changed.items()})  # type: ignore[arg-type]


def check_instruction(content: RecordDict) -> None:
    read = Instruction.read(content)
    assert (type(read.fingerprint), type(read.server_round), type(read.final), type(read.payload)) == (
        *(str, int, bool, bytes),
    )
    assert 0 <= read.server_round <= MAX_ROUND
    assert all(key.startswith("local.") for key in read.overrides)
    assert all(isinstance(value, str | int | float | bool) for value in read.overrides.values())


def check_card(content: RecordDict) -> None:
    read = ClientRecord.read(1, content)
    assert read.role in ("train", "unseen")
    assert 1 <= len(read.name) <= LONGEST_NAME
    assert read.name.isprintable()
    assert isinstance(read.capacity, Fraction)
    assert 0 < read.capacity <= 1
    assert all(type(side) is int and side > 0 for side in read.shape)
    assert math.prod(read.shape) <= MAX_EXAMPLE_SIZE
    assert 1 <= read.classes <= MAX_CLASSES
    assert read.train_examples > 0
    assert list(read.tests) == list(POPULATIONS)
    assert all(type(count) is int and 0 <= count <= MAX_EXAMPLES for count in read.tests.values())
    assert read.partitions > 0
    assert read.descriptor.tolist() == CLIENT.descriptor.tolist()


def check_training(content: RecordDict) -> None:
    blob, loss, examples = read_training(content)
    assert type(blob) is bytes
    assert -0.01 <= loss < 3.5e38
    assert 1 <= examples <= MAX_EXAMPLES


def check_measured(content: RecordDict) -> None:
    rows: list[ClientAccuracy] = read_accuracies(CLIENT, 3, content, tuned=True)
    expected = {(population, moment) for population in ("local", "union") for moment in ("before", "after")}
    assert {(row.population, row.moment) for row in rows} == expected
    assert all(0 <= row.correct <= row.total == CLIENT.tests[row.population] for row in rows)
    curves = read_prior_counts(CLIENT, 2, content)
    assert [curve.total for curve in curves] == [4, 9]
    for curve in curves:
        assert len(curve.correct) == 2
        assert all(0 <= count <= curve.total for count in curve.correct)


READERS: dict[str, tuple[Callable[[RecordDict], None], dict[str, dict[str, object]]]] = {
    "instruction": (check_instruction, INSTRUCTION),
    "card": (check_card, CARD),
    "training": (check_training, TRAINED),
    "measured": (check_measured, MEASURED),
}


@pytest.mark.parametrize("name", READERS)
def test_mutated_records_are_refused_by_name_or_are_valid(name: str) -> None:
    check, records = READERS[name]
    kinds = {key: MetricRecord if key == "metrics" else ConfigRecord for key in records}
    check(RecordDict({key: kinds[key](values) for key, values in records.items()}))  # type: ignore[arg-type]
    rng, outcomes = np.random.default_rng(list(READERS).index(name)), Counter[str]()
    longest = 0
    for _ in range(MUTANTS_PER_READER):
        content = mutated(records, rng)
        try:
            check(content)
            outcomes["read"] += 1
        except FrampError as error:
            outcomes[type(error).__name__] += 1
            longest = max(longest, len(str(error)))
    assert outcomes["read"] > MUTANTS_PER_READER // 20
    assert outcomes["ProtocolError"] > MUTANTS_PER_READER // 10
    assert 20 < longest < 1000  # Errors go into logs and reports, and their contents are someone else's choice.


def test_mutated_replies_are_sorted_into_good_ones_and_refusals() -> None:
    """Whatever comes back, every client asked is in one of the two lists once, and nobody else is."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    errors: tuple[dict[str, object], ...] = (
        {"type": "DataError", "reason": "no images", "traceback": "Traceback"},
        {"type": "\x1b[2J" * 9_000, "reason": "\x07\u202e\ud7ff" * 20_000, "traceback": "a\n\x1b]0;t\x07" * 9_000},
        {"type": b"bytes" * 9_000, "reason": [1.0] * 9_000, "traceback": 7},
    )
    rng = np.random.default_rng(9)
    for number in range(MUTANTS_PER_READER):
        questions = []
        for index in range(3):
            question = Message(RecordDict(), 10 + index, "train")
            question.metadata.__dict__["_message_id"] = f"id-{index}"
            questions.append(question)
        sent = {f"id-{index}": f"client-{index}" for index in range(int(rng.integers(1, 4)))}
        replies = []
        for _ in range(rng.integers(5)):
            question = questions[rng.integers(3)]
            if rng.random() < 0.2:
                reason = (None, "", "\x1b[31m", "x" * 10_000)[number % 4]
                replies.append(Message(Error(int(rng.integers(10)), reason), reply_to=question))
            else:
                records = {"error": dict(errors[number % 3]), **TRAINED} if rng.random() < 0.5 else TRAINED
                replies.append(Message(mutated(records, rng), reply_to=question))  # type: ignore[arg-type]
        good, refused = read_replies(sent, replies)
        assert sorted(sent.values()) == sorted([each.client for each in (*good, *refused)])
        assert all(sent[each.message_id] == each.client for each in (*good, *refused))
        assert all(len(each.error) < LONGEST_LINE + 200 and each.error.isprintable() for each in refused)
        assert all(len(each.traceback) < LONGEST_TRACEBACK + 100 for each in refused)
        assert all(each.traceback.replace("\n", "").isprintable() for each in refused)


@pytest.mark.parametrize(
    "text",
    [
        *("1e-999999999", "1E999999999", "1/" + "9" * 10**6, "0." + "0" * 10**6 + "1", 10**400),
        *("1e-9_9_9_9_9_9_9_9", "1e-9_9", "1e-999", 5e-324, [0.5] * 10**6, b"1" * 10**6, True, 10**5000),
    ],
    ids=[str(number) for number in range(13)],
)
def test_a_capacity_of_absurd_precision_is_refused_at_once(text: object) -> None:
    with pytest.raises(ConfigError, match="is not a capacity"):
        parse_capacity(text)


def test_a_capacity_that_is_taken_is_read_again_from_what_is_written() -> None:
    for text in ("1e-90", "0." + "0" * 40 + "1", 1e-90, Fraction(1, 3)):
        capacity = parse_capacity(text)
        assert parse_capacity(str(capacity)) == capacity


@pytest.mark.parametrize(("partitions", "taken"), [(2**20, True), (2**20 + 1, False), (2**31, False), (0, False)])
def test_clients_do_not_choose_how_large_a_partition_the_server_makes(partitions: int, taken: bool) -> None:
    """It is made before the clients are known, with memory for each of its parts."""
    card = {**CARD["client"], "partitions": partitions}
    content = RecordDict({"client": ConfigRecord(card), "framp": ConfigRecord(CARD["framp"])})  # type: ignore[arg-type]
    if taken:
        assert ClientRecord.read(1, content).partitions == partitions
    else:
        with pytest.raises(FrampError, match="partitions"):
            ClientRecord.read(1, content)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-a", "@SUM(A1)", " =1", "\uff1d1", "a;=1", "a; -1", "'=1", "a\tb", ""])
def test_a_name_that_a_table_would_compute_is_refused(name: str) -> None:
    card = {**CARD["client"], "name": name}
    with pytest.raises(FrampError, match="choose another name"):
        ClientRecord.read(1, RecordDict({"client": ConfigRecord(card), "framp": ConfigRecord(CARD["framp"])}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["site-0", "a=b", "a-b@c", "Klinik Köln; Haus 2", "1+1", "client-0001"])
def test_other_names_are_taken(name: str) -> None:
    card = {**CARD["client"], "name": name}
    records = {"client": ConfigRecord(card), "framp": ConfigRecord(CARD["framp"])}  # type: ignore[arg-type]
    assert ClientRecord.read(1, RecordDict(records)).name == name  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [1.7e308, -1.0, math.nan, math.inf, -math.inf, 3.5e38])
def test_a_loss_that_no_client_can_compute_is_refused(loss: float) -> None:
    metrics = MetricRecord({"loss": loss, "examples": 40})
    with pytest.raises(FrampError, match="a loss of"):
        read_training(RecordDict({"framp": ConfigRecord({"payload": b"x"}), "metrics": metrics}))


def counted(**changes: object) -> RecordDict:
    metrics = MetricRecord({**MEASURED["metrics"], **changes})  # type: ignore[dict-item]
    return RecordDict({"metrics": metrics})


@pytest.mark.parametrize(
    "changes",
    [
        {"local-correct": 10**15, "local-total": 10**15},
        {"local-total": 5},
        {"local-total": 0, "local-correct": 0},
        {"local-correct": 4.0},
        {"local-correct": 5},
        {"union-total": 3, "union-correct": 3},
        {"local-correct-tuned": 10**15, "local-total-tuned": 10**15},
    ],
)
def test_counts_of_another_number_of_examples_than_were_registered_are_refused(changes: dict[str, object]) -> None:
    assert len(read_accuracies(CLIENT, 3, counted(), tuned=True)) == 4
    with pytest.raises(FrampError):
        read_accuracies(CLIENT, 3, counted(**changes), tuned=True)


def test_what_was_not_asked_for_is_not_read() -> None:
    rows = read_accuracies(CLIENT, 3, counted(**{"validation-total": 10**15, "validation-correct": 10**15}))
    assert [(row.population, row.moment) for row in rows] == [("local", "before"), ("union", "before")]


@pytest.mark.parametrize("name", [b"x" * 10**6, [1] * 10**6, "7", 1.5])
def test_a_reference_is_named_by_a_number(name: object) -> None:
    """It goes into the checkpoint, where bytes would end the run."""
    assert held_reference(RecordDict({"framp": ConfigRecord({"reference": name})})) is None  # type: ignore[dict-item]
    assert held_reference(RecordDict({"framp": ConfigRecord({"reference": 7})})) == 7
