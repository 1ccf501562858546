"""Reading fields that another process wrote, by their exact type: nothing is converted, guessed or allocated."""

from collections.abc import Mapping
from typing import TypeVar

from framp_core.errors import ProtocolError

T = TypeVar("T", int, float, str, bytes, bool)
LONGEST_NAME = 200
"""Characters of a client's name; names go into logs, tables and file names of checkpoints' tensors."""


def read_field(record: Mapping[str, object], key: str, kind: type[T], default: T | None = None) -> T:
    """The value of a key, which must be of this very type: true is no integer, 3 no text, 3 no bytes.

    Args:
        record: a record of a message.
        key: what to read.
        kind: the type it must have.
        default: value if the key is missing; None if it must be there.

    Raises:
        ProtocolError: the key is missing, or its value is of another type.
    """
    if key not in record and default is not None:
        return default
    if key not in record:
        raise ProtocolError(f"the message lacks {key!r}; it holds {', '.join(sorted(record))[:200] or 'nothing'}")
    value = record[key]
    if type(value) is not kind:
        raise ProtocolError(f"{key!r} is {_shown(value)}, expected {kind.__name__}; use one version on both sides")
    return value


def read_count(record: Mapping[str, object], key: str, smallest: int, largest: int) -> int:
    """A whole number in [smallest, largest].

    Raises:
        ProtocolError: it is missing, no whole number, or out of range.
    """
    value = read_field(record, key, int)
    if not smallest <= value <= largest:
        raise ProtocolError(f"{key!r} is {value}, expected {smallest} to {largest}; use one version on both sides")
    return value


def read_name(record: Mapping[str, object], key: str) -> str:
    """A printable name of 1 to ``LONGEST_NAME`` characters, which can stand on a line of a log.

    Raises:
        ProtocolError: it is missing, or no such name.
    """
    value = read_field(record, key, str)
    if not 1 <= len(value) <= LONGEST_NAME or not value.isprintable():
        raise ProtocolError(
            f"{key!r} is {_shown(value)}, expected 1 to {LONGEST_NAME} printable characters; choose another name"
        )
    return value


def _shown(value: object) -> str:
    """Type and beginning of a value whose length someone else chose."""
    text = repr(value[:40] if isinstance(value, str | bytes | list) else value)
    return f"of type {type(value).__name__}, {text[:80]}"
