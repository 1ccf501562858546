"""From Flower's reply messages to clients: mapping, errors, missing replies."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ConfigRecord, Message, RecordDict

from framp_core.foreign_text import LONGEST_LINE, LONGEST_TRACEBACK, printable, without_colours

_LONGEST_TYPE = 100
_LONGEST_LOG = 10_000
"""Characters at the end of Flower's reason, which may be a whole log, in which its last line is looked for."""
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

    Its texts are short and printable, see :func:`framp_core.foreign_text.printable`.
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
        return cls(client, printable(f"{type(error).__name__}: {error}"), message_id=message_id)


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


def held_reference(content: RecordDict) -> int | None:
    """The name of the reference mask that a client says it holds, None if it says nothing or what can be no name."""
    name = content.config_records.get("framp", ConfigRecord()).get("reference")
    return name if type(name) is int else None


def told_capacity(content: RecordDict) -> object:
    """The capacity that a client says it has now, None if it says nothing."""
    return content.config_records.get("framp", ConfigRecord()).get("capacity")


def problem(client: str, message: Message) -> Refusal | None:
    """Why a reply of this client is none, if it is an error of Flower's or of its own; None if it carries content."""
    if message.has_error():
        reason = _last_line(message.error.reason or "")
        return Refusal(client, f"Flower error {message.error.code}: {reason}")
    error = message.content.config_records.get("error")
    if error is None:
        return None
    kind = printable(error.get("type", ""), _LONGEST_TYPE)
    reason = printable(error.get("reason", ""), LONGEST_LINE - _LONGEST_TYPE - 2)
    trace = printable(error.get("traceback", ""), LONGEST_TRACEBACK, lines=True, tail=True)
    return Refusal(client, f"{kind}: {reason}", trace, capacity=told_capacity(message.content))


def _last_line(text: str) -> str:
    lines = [line for line in without_colours(text[-_LONGEST_LOG:]).splitlines() if line.strip()]
    return printable(lines[-1], LONGEST_LINE // 2, tail=True) if lines else "no reason given"
