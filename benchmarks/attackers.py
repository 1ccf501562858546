"""Clients that fail and clients that lie, for benchmarks/faults.py and the tests.

:data:`app` answers like the product's ClientApp, unless the configuration of its node says otherwise:

- ``attack``: one of :data:`ATTACKS`; what the client lies about, in every round;
- ``lost``: share of the rounds in which it vanishes before it trains;
- ``malformed``: share of the rounds in which its reply is garbage, of :data:`GARBAGE` in turn.

Who fails when is drawn from ``failures``, the client's name and the round, so that it is the same with any number of
workers.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client_app.app import answer, describe_client, evaluate_client, train_client
from client_app.client import Client, Instruction
from framp_core.codec import decode_descriptor, encode_descriptor
from framp_core.codec.frame import UPDATE, pack, unpack
from framp_core.codec.prototypes import decode_prototypes, encode_prototypes
from framp_core.data.images import LabelledImages
from framp_core.prototypes import Prototypes
from framp_core.randomness import stream

STRENGTH = 10.0
"""How much larger than its honest delta an attacker makes the one it sends, where its attack is one of size."""

Delta = Callable[[np.ndarray, np.random.Generator], np.ndarray]

DELTAS: dict[str, Delta] = {
    "sign-flip": lambda delta, rng: -delta,
    "scaled": lambda delta, rng: STRENGTH * delta,
    "scaled-sign-flip": lambda delta, rng: -STRENGTH * delta,
    "random": lambda delta, rng: STRENGTH * np.linalg.norm(delta) * _direction(delta.size, rng),
}
"""Attacks on the delta alone: from the honest one, float32 ``(k,)``, to the one that is sent."""
ATTACKS = (*DELTAS, "label-flip", "prototype-poisoning", "descriptor-spoofing")

GARBAGE: dict[str, Callable[[np.ndarray, bytes], bytes]] = {
    "noise": lambda delta, prototypes: bytes(range(256)),
    "wrong k": lambda delta, prototypes: _update(delta[:-1], prototypes),
    "NaN": lambda delta, prototypes: _update(np.full_like(delta, np.nan), prototypes),
    "absurd norm": lambda delta, prototypes: _update(np.full_like(delta, 1e30), prototypes),
}
"""Replies that the server has to refuse, by what is wrong with them."""

app = ClientApp()


class VanishedError(RuntimeError):
    """The client is lost for this round; its reply is Flower's own error."""


def _direction(size: int, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(size)
    return noise / np.linalg.norm(noise)


def _update(delta: np.ndarray, prototypes: bytes) -> bytes:
    return pack(UPDATE, "float32", delta.astype("<f4").tobytes(), prototypes).blob


def _read_update(blob: bytes) -> tuple[np.ndarray, bytes]:
    """The delta of an honest update in float32, and the code of its prototypes."""
    contents = unpack(blob, UPDATE).contents
    return np.frombuffer(contents["values"], "<f4"), bytes(contents["prototypes"])


def _with_flipped_labels(client: Client) -> Client:
    """The client with class ``C - 1 - y`` in place of y in its training images."""
    data = client.data
    assert isinstance(data.train, LabelledImages)
    flipped = replace(data.train, labels=data.classes - 1 - data.train.labels)
    return replace(client, data=replace(data, train=flipped))


def _poisoned(own: Prototypes) -> Prototypes:
    """Each class's prototype is the one of the class before it among the client's own, and ``STRENGTH`` as long."""
    return replace(own, means=STRENGTH * np.roll(own.means, 1, axis=0))


def _lying_update(attack: str, blob: bytes, client: Client, rng: np.random.Generator) -> bytes:
    delta, prototypes = _read_update(blob)
    if attack in DELTAS:
        return _update(DELTAS[attack](delta, rng), prototypes)
    own = decode_prototypes(memoryview(prototypes), client.data.classes, client.model.model.feature_size)
    assert own is not None
    return _update(delta, encode_prototypes(_poisoned(own)))


def _train(instruction: Instruction, client: Client, attack: str, malformed: bool) -> RecordDict:
    if attack == "label-flip":
        client = _with_flipped_labels(client)
    content = train_client(instruction, client)
    record, rng = content.config_records["framp"], stream(client.config.seed, "attack", client.data.name)
    blob = record["payload"]
    assert isinstance(blob, bytes)
    if malformed:
        kinds = list(GARBAGE.values())
        record["payload"] = kinds[instruction.server_round % len(kinds)](*_read_update(blob))
    elif attack in (*DELTAS, "prototype-poisoning"):
        record["payload"] = _lying_update(attack, blob, client, rng)
    return content


def _describe(instruction: Instruction, client: Client, attack: str) -> RecordDict:
    if attack == "label-flip":
        client = _with_flipped_labels(client)
    content = describe_client(instruction, client)
    if attack == "descriptor-spoofing":
        record, rng = content.config_records["framp"], stream(client.config.seed, "attack", client.data.name)
        spoofed = _direction(decode_descriptor(record["payload"]).size, rng)  # type: ignore[arg-type]
        record["payload"] = encode_descriptor(spoofed.astype(np.float32)).blob
    return content


def _fails(message: Message, context: Context, kind: str) -> bool:
    share, node = float(context.node_config.get(kind, 0.0)), str(context.node_config["partition-id"])
    round = int(message.content["config"]["round"])  # type: ignore[arg-type, call-overload, index]
    return bool(stream(int(context.run_config["seed"]), "failures", kind, node, round).random() < share)


def _attack(context: Context) -> str:
    return str(context.node_config.get("attack", ""))


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Flower handler of ``query.describe``."""
    attack = _attack(context)
    return answer(lambda instruction, client: _describe(instruction, client, attack), message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Flower handler of ``train``."""
    if _fails(message, context, "lost"):
        raise VanishedError("the client vanished in this round")
    attack, malformed = _attack(context), _fails(message, context, "malformed")
    return answer(lambda instruction, client: _train(instruction, client, attack, malformed), message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Flower handler of ``evaluate``; liars measure honestly, and what they measure is left out of the results."""
    return answer(evaluate_client, message, context)
