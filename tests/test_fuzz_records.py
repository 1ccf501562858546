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
from framp_core.metrics import ClientAccuracy
from server_app.recording import MAX_EXAMPLES, read_accuracies, read_prior_counts, read_training
from server_app.registry import MAX_CLASSES, MAX_EXAMPLE_SIZE, ClientRecord
from server_app.replies import read_replies

MUTANTS_PER_READER = 3_000
DESCRIPTOR = encode_descriptor(np.array([0.6, -0.8], np.float32)).blob
INSTRUCTION: dict[str, dict[str, object]] = {
    "config": {"fingerprint": "a" * 64, "round": 3, "final": False, "local.learning-rate": 0.1},
    "framp": {"payload": b"submodel"},
}
CARD: dict[str, dict[str, object]] = {
    "client": {
        **{"name": "client-0001", "role": "train", "capacity": "1/4", "shape": [1, 8, 8], "classes": 10},
        **{"train-examples": 40, "partitions": 5, "partition-digest": "b" * 64, "content-digest": "-"},
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
        **{"local-total-tuned": 4},
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
    assert read.partitions > 0
    assert read.descriptor.tolist() == CLIENT.descriptor.tolist()


def check_training(content: RecordDict) -> None:
    blob, loss, examples = read_training(content)
    assert type(blob) is bytes
    assert math.isfinite(loss)
    assert 1 <= examples <= MAX_EXAMPLES


def check_measured(content: RecordDict) -> None:
    rows: list[ClientAccuracy] = read_accuracies(CLIENT, 3, content)
    assert all(0 <= row.correct <= row.total and type(row.total) is int for row in rows)
    for curve in read_prior_counts(CLIENT, 2, content):
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
    error = {"type": "DataError", "reason": "no images", "traceback": "Traceback"}
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
                records = {"error": dict(error), **TRAINED} if rng.random() < 0.5 else TRAINED
                replies.append(Message(mutated(records, rng), reply_to=question))  # type: ignore[arg-type]
        good, refused = read_replies(sent, replies)
        assert sorted(sent.values()) == sorted([each.client for each in (*good, *refused)])
        assert all(sent[each.message_id] == each.client for each in (*good, *refused))
        assert all(len(each.error) < 25_000 and len(each.traceback) < 25_000 for each in refused)


@pytest.mark.parametrize("text", ["1e-999999999", "1E999999999", "1/" + "9" * 10**6, "0." + "0" * 10**6 + "1", 10**400])
def test_a_capacity_of_absurd_precision_is_refused_at_once(text: object) -> None:
    with pytest.raises(ConfigError, match="is not a capacity"):
        parse_capacity(text)
