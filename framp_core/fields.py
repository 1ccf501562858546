"""Reading fields that another process wrote, by their exact type: nothing is converted, guessed or allocated."""

import re
from collections.abc import Mapping
from typing import TypeVar

from framp_core.errors import ProtocolError
from framp_core.foreign_text import listed

T = TypeVar("T", int, float, str, bytes, bool)
LONGEST_NAME = 200
"""Characters of a client's name; names go into logs, tables and file names of checkpoints' tensors."""
_FORMULA = re.compile("(^|;)[ '\"]*[=+@\uff1d\uff0b\uff0d\uff20-]")
"""How a cell begins that a spreadsheet computes; a semicolon starts one where commas are decimal."""


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
        raise ProtocolError(f"the message lacks {key!r}; it holds {listed(record)}")
    value = record[key]
    if type(value) is not kind:
        raise ProtocolError(f"{key!r} is {shown(value)}, expected {kind.__name__}; use one version on both sides")
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
    """A printable name of 1 to ``LONGEST_NAME`` characters, which can stand on a line of a log and in a table.

    Raises:
        ProtocolError: it is missing, or no such name, see :func:`is_name`.
    """
    value = read_field(record, key, str)
    if not is_name(value):
        raise ProtocolError(f"{key!r} is {shown(value)}, expected {NAMES}; choose another name")
    return value


NAMES = f"1 to {LONGEST_NAME} printable characters that no spreadsheet takes for a formula, as it does =1+1 or -a"


def is_name(text: str) -> bool:
    """Whether a text can name a client: :data:`NAMES`.

    clients.csv is opened in spreadsheets, and names are what joins its rows with others, so that they are refused
    rather than written in another way.
    """
    return 1 <= len(text) <= LONGEST_NAME and text.isprintable() and not _FORMULA.search(text)


def shown(value: object) -> str:
    """Type and beginning of a value whose length someone else chose."""
    text = repr(value[:40] if isinstance(value, str | bytes | list) else value)
    return f"of type {type(value).__name__}, {text[:80]}"
