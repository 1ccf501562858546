"""From Flower's reply messages to clients: mapping, errors, missing replies."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ConfigRecord, Message, RecordDict

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST_REASON = 400
_LONGEST_TRACEBACK = 20_000
NO_REPLY = "no reply before the deadline"


@dataclass(frozen=True)
class Reply:
    """A reply that carries content."""

    client: str
    content: RecordDict
    message_id: str = ""


@dataclass(frozen=True)
class Refusal:
    """A client whose reply is missing or was refused; ``traceback`` and ``capacity`` where the client sent one.

    ``message_id`` is Flower's id of the message that was to be answered; two refusals that differ in it alone are
    equal.
    """

    client: str
    error: str
    traceback: str = ""
    missing: bool = False
    capacity: object = None
    message_id: str = field(default="", compare=False)

    @classmethod
    def of(cls, client: str, error: Exception, message_id: str = "") -> "Refusal":
        """The refusal of a reply in which the server found an error."""
        return cls(client, f"{type(error).__name__}: {error}", message_id=message_id)


def read_replies(sent: Mapping[str, str], replies: Iterable[Message]) -> tuple[list[Reply], list[Refusal]]:
    """Sort replies into good ones and refusals, both in the order of the clients' names.

    Replies are mapped by ``reply_to_message_id``: errors that the SuperLink makes carry its own node id as source.
    A reply to no message of ours is dropped, and so is a second reply to the same message.

    Args:
        sent: client name by the id of the message it was sent.
        replies: in any order, as they arrived.
    """
    good: dict[str, Reply] = {}
    refused: dict[str, Refusal] = {}
    for message in replies:
        key = message.metadata.reply_to_message_id
        client = sent.get(key)
        if client is None or client in good or client in refused:
            continue
        found = problem(client, message)
        if found is None:
            good[client] = Reply(client, message.content, key)
        else:
            refused[client] = replace(found, message_id=key)
    for key, client in sent.items():
        if client not in good and client not in refused:
            refused[client] = Refusal(client, NO_REPLY, missing=True, message_id=key)
    return [good[name] for name in sorted(good)], [refused[name] for name in sorted(refused)]


def held_reference(content: RecordDict) -> object:
    """The name of the reference mask that a client says it holds, None if it says nothing."""
    return content.config_records.get("framp", ConfigRecord()).get("reference")


def told_capacity(content: RecordDict) -> object:
    """The capacity that a client says it has now, None if it says nothing."""
    return content.config_records.get("framp", ConfigRecord()).get("capacity")


def without_colours(text: str) -> str:
    """Text of a log without the terminal's colour codes."""
    return _ANSI.sub("", text)


def problem(client: str, message: Message) -> Refusal | None:
    """Why a reply of this client is none, if it is an error of Flower's or of its own; None if it carries content."""
    if message.has_error():
        reason = _last_line(without_colours(message.error.reason or ""))
        return Refusal(client, f"Flower error {message.error.code}: {reason}")
    error = message.content.config_records.get("error")
    if error is None:
        return None
    kind, reason, trace = (str(error.get(key, "")) for key in ("type", "reason", "traceback"))
    said = f"{kind[:_LONGEST_REASON]}: {reason[:_LONGEST_TRACEBACK]}"
    return Refusal(client, said, trace[-_LONGEST_TRACEBACK:], capacity=told_capacity(message.content))


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given")[-_LONGEST_REASON:]
