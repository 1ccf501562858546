"""From Flower's reply messages to clients: mapping, errors, missing replies."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST_REASON = 400


@dataclass(frozen=True)
class Reply:
    """A reply that carries content."""

    client: str
    content: RecordDict


@dataclass(frozen=True)
class Refusal:
    """A client whose reply is missing or was refused; ``traceback`` and ``capacity`` where the client sent one."""

    client: str
    error: str
    traceback: str = ""
    missing: bool = False
    capacity: object = None

    @classmethod
    def of(cls, client: str, error: Exception) -> "Refusal":
        """The refusal of a reply in which the server found an error."""
        return cls(client, f"{type(error).__name__}: {error}")


def read_replies(sent: Mapping[str, str], replies: Iterable[Message]) -> tuple[list[Reply], list[Refusal]]:
    """Sort replies into good ones and refusals, both in the order of the clients' names.

    Replies are mapped by ``reply_to_message_id``: errors that the SuperLink makes carry its own node id as source.
    A reply to no message of ours is dropped. A second reply to the same message is refused.

    Args:
        sent: client name by the id of the message it was sent.
        replies: in any order, as they arrived.
    """
    good: dict[str, Reply] = {}
    refused: dict[str, Refusal] = {}
    for message in replies:
        client = sent.get(message.metadata.reply_to_message_id)
        if client is None or client in good:
            continue
        found = problem(client, message)
        if found is None:
            good[client] = Reply(client, message.content)
        else:
            refused[client] = found
    for client in set(sent.values()) - set(good) - set(refused):
        refused[client] = Refusal(client, "no reply before the deadline", missing=True)
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
    return Refusal(client, f"{kind}: {reason}", trace, capacity=told_capacity(message.content))


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given")[-_LONGEST_REASON:]
