"""ClientApp: answers the descriptor query, trains a submodel, evaluates a submodel.

Every handler returns a message whatever happens: a handler that returns nothing would hang its node for good,
and an exception would lose its traceback on the way. Errors travel as content, under the key ``error``.
"""

import traceback
from collections.abc import Callable
from typing import TypeVar

from flwr.app import ConfigRecord, ConfigRecordValues, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client_app.client import Assignment, Client, Instruction
from client_app.held_reference import HeldReference
from framp_core.errors import FingerprintMismatchError
from framp_core.fingerprint import code_fingerprint, code_root
from framp_core.local_training import LocalResult, train_locally
from framp_core.prototypes import Prototypes
from framp_core.spans import span
from framp_core.threads import torch_threads

app = ClientApp()

Handler = Callable[[Instruction, Client], RecordDict]
T = TypeVar("T")


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

    def content() -> RecordDict:
        instruction, client = open_message(message, context)
        with torch_threads(client.config.local.threads):
            return content_or_error(lambda: handler(instruction, client), client)

    return Message(content_or_error(content), reply_to=message)


def open_message(message: Message, context: Context) -> tuple[Instruction, Client]:
    """What the server asks for, and the client that is asked.

    Raises:
        FrampError: the message, the code or the client's data are not as they should be.
    """
    instruction = Instruction.read(message.content)
    check_fingerprint(instruction.fingerprint)
    held = HeldReference(context.state)
    return instruction, Client.of(context.run_config, context.node_config, instruction.overrides, held)


def content_or_error(content: Callable[[], T], client: Client | None = None) -> T | RecordDict:
    """What ``content`` returns; or, as a reply's content, the error it raised, and what the client tells besides."""
    try:
        return content()
    except Exception as error:
        content_of_error = RecordDict({"error": _describe_error(error)})
        if client is not None:  # A client that refuses a submodel of the wrong size says which one is right.
            content_of_error["framp"] = _framp(client)
        return content_of_error


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
    given = client.assignment(instruction.payload, instruction.server_round)
    return update_content(client, given, train_locally(given.model, *given.task))


def update_content(
    client: Client, given: Assignment, result: LocalResult, prototypes: Prototypes | None = None
) -> RecordDict:
    """Content of the reply to a train message; ``prototypes`` if they are known already."""
    blob, metrics = client.update(given, result, prototypes)
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
