"""ClientApp: answers the descriptor query, trains a submodel, evaluates a submodel.

Every handler returns a message whatever happens: a handler that returns nothing would hang its node for good,
and an exception would lose its traceback on the way. Errors travel as content, under the key ``error``.
"""

import traceback
from collections.abc import Callable

from flwr.app import ConfigRecord, ConfigRecordValues, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client_app.client import Client, Instruction
from client_app.held_reference import HeldReference
from framp_core.errors import FingerprintMismatchError
from framp_core.fingerprint import code_fingerprint, code_root
from framp_core.spans import span
from framp_core.threads import torch_threads

app = ClientApp()

Handler = Callable[[Instruction, Client], RecordDict]


def check_fingerprint(expected: str) -> None:
    """Refuse to work with a server of other code.

    Raises:
        FingerprintMismatchError: names the folder this client's code came from.
    """
    if expected != code_fingerprint():
        raise FingerprintMismatchError(
            f"this client runs other code than the server: {code_root()} has fingerprint "
            f"{code_fingerprint()[:12]}, the server {expected[:12]}. Stop the running SuperLink or SuperNode, "
            f"update the code, and start again"
        )


@span("client.other")
def answer(handler: Handler, message: Message, context: Context) -> Message:
    """Run ``handler`` and wrap its result, or the error it raised, in a reply."""
    client = None
    try:
        instruction = Instruction.read(message.content)
        check_fingerprint(instruction.fingerprint)
        held = HeldReference(context.state)
        client = Client.of(context.run_config, context.node_config, instruction.overrides, held)
        with torch_threads(client.config.local.threads):
            content = handler(instruction, client)
    except Exception as error:
        content = RecordDict({"error": _describe_error(error)})
        if client is not None:  # A client that refuses a submodel of the wrong size says which one is right.
            content["framp"] = _framp(client)
    return Message(content, reply_to=message)


def _describe_error(error: Exception) -> ConfigRecord:
    return ConfigRecord(
        {"type": type(error).__name__, "reason": str(error), "traceback": traceback.format_exc(limit=-8)}
    )


def _framp(client: Client, **values: ConfigRecordValues) -> ConfigRecord:
    """The record ``framp`` of a reply; it tells the client's capacity and names the reference mask that it holds."""
    values, name = {**values, "capacity": str(client.data.capacity)}, client.held.name
    return ConfigRecord(values if name is None else {**values, "reference": name})


def describe_client(instruction: Instruction, client: Client) -> RecordDict:
    """Name, role, capacity and the descriptor of the client's data."""
    return RecordDict({"client": ConfigRecord(client.card()), "framp": _framp(client, payload=client.describe())})


def train_client(instruction: Instruction, client: Client) -> RecordDict:
    """Local training of the submodel in the message."""
    blob, metrics = client.train(instruction.payload, instruction.server_round)
    return RecordDict({"framp": _framp(client, payload=blob), "metrics": MetricRecord(metrics)})


def evaluate_client(instruction: Instruction, client: Client) -> RecordDict:
    """Accuracy counts of the submodel in the message."""
    metrics = client.evaluate(instruction.payload, instruction.server_round, instruction.final)
    return RecordDict({"framp": _framp(client), "metrics": MetricRecord(metrics)})


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Flower handler of ``query.describe``."""
    return answer(describe_client, message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Flower handler of ``train``."""
    return answer(train_client, message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Flower handler of ``evaluate``."""
    return answer(evaluate_client, message, context)
