"""From the text of files and options to the values of a configuration: field types, keys, and what errors say."""

import difflib
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationError

from framp_core.commands import framp_command
from framp_core.errors import ConfigError

Scalar = str | int | float | bool
LONGEST_NUMBER = 100
_LARGE_EXPONENT = re.compile(r"[eE][-+]?\d{4}")
_LARGEST_FILE = 2**16
"""Bytes of a TOML file, 20 times the largest preset."""
_MOST_DOTS = 1_000
"""In a line of TOML, which reads a key such as a.a.a.a in time that grows with the square of its dots."""
_NAMED = 3
"""Files that the message of a missing one names; it counts the others."""
_DEEPEST = 9
_FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)
_INT64 = 2**63


def _comma_separated(value: object) -> object:
    """The parts of a text, which may have a list's brackets and quotes; a number without quotes is the only part."""
    if isinstance(value, str):
        inner = value.strip()
        inner = inner[1:-1] if inner.startswith("[") and inner.endswith("]") else inner
        return [part.strip().strip("\"'") for part in inner.split(",")]
    values = [value] if isinstance(value, int | float) else value
    if isinstance(values, list) and any(isinstance(each, bool) for each in values):
        raise ValueError('true and false are no numbers; write numbers with commas between, such as "8,16"')
    return values


def _some(values: tuple[object, ...]) -> tuple[object, ...]:
    # Not Field(min_length=1), which also counts the values that were refused.
    if not values:
        raise ValueError("is empty; give one value or more, with commas between")
    return values


def _capacity(value: object) -> Fraction:
    try:
        capacity = _fraction(value)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        text = str(value) if isinstance(value, float) else value
        shown = repr(text[:LONGEST_NUMBER]) if isinstance(text, str) else f"a {type(value).__name__}"
        raise ValueError(f"{shown} is not a capacity; write a fraction such as 1/16 or 0.25") from error
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity {capacity} is outside (0, 1]; it is the fraction of the weights a client holds")
    return capacity


def _fraction(value: object) -> Fraction:
    """A number that takes at most ``LONGEST_NUMBER`` characters, as it is given and as a fraction."""
    if not isinstance(value, str | int | float | Fraction):
        raise TypeError("no text and no number")
    text = value if isinstance(value, str) else str(value)
    # Fraction would take the exponent of 1e-999999999, or of 1e-9_9_9_9_9, at its word, and fill the memory.
    if len(text) > LONGEST_NUMBER or "_" in text or _LARGE_EXPONENT.search(text):
        raise ValueError("too many digits")
    fraction = Fraction(text)
    if len(str(fraction)) > LONGEST_NUMBER:  # It is read again from a checkpoint, and stands in tables.
        raise ValueError("too many digits as a fraction")
    return fraction


Capacity = Annotated[Fraction, BeforeValidator(_capacity), PlainSerializer(str, return_type=str)]
Capacities = Annotated[
    tuple[Capacity, ...],
    BeforeValidator(_comma_separated),
    AfterValidator(_some),
    PlainSerializer(lambda values: ",".join(str(value) for value in values), return_type=str),
]
Counts = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(_comma_separated),
    AfterValidator(_some),
    PlainSerializer(lambda values: ",".join(str(value) for value in values), return_type=str),
]


def _strengths(value: object) -> object:
    parts = _comma_separated(value)
    return [part for part in parts if part != ""] if isinstance(parts, list) else parts


Strengths = Annotated[
    tuple[Annotated[float, Field(ge=0)], ...],
    BeforeValidator(_strengths),
    AfterValidator(lambda values: tuple(sorted(set(values)))),
    PlainSerializer(lambda values: ",".join(str(value).removesuffix(".0") for value in values), return_type=str),
]


def parse_capacity(text: object) -> Fraction:
    """Read a capacity in (0, 1] from a fraction (``"1/16"``) or a number.

    Raises:
        ConfigError: not a number, or outside (0, 1].
    """
    try:
        return _capacity(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def parse_override(text: str) -> tuple[str, str]:
    """Split ``key=value`` of the command line.

    Raises:
        ConfigError: no ``=`` in it.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{text!r} is not key=value, such as server.clients-per-round=5")
    return key.strip(), value.strip()


def hyphenated(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The same values with hyphens in their keys."""
    return {key.replace("_", "-"): value for key, value in values.items()}


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Flat dotted, hyphenated keys of nested tables.

    Raises:
        ConfigError: one key is there twice, with hyphens and with underscores, or tables are nested too deeply.
    """
    flat: dict[str, Scalar] = {}
    for key, value in nested.items():
        full = f"{prefix}{key}"
        if full.count(".") > _DEEPEST:
            raise ConfigError(f"{full} lies in more tables than any key does; keys are like local.learning-rate")
        found = flatten(value, f"{full}.") if isinstance(value, Mapping) else {full.replace("_", "-"): value}
        if twice := sorted(flat.keys() & found.keys()):
            raise ConfigError(f"{twice[0]} is given twice, with hyphens and with underscores; leave one out")
        flat.update(found)
    return flat


def read_toml(path: Path) -> dict[str, Scalar]:
    """Read a TOML file as flat dotted keys.

    Raises:
        ConfigError: it is missing, or is not TOML.
    """
    return flatten(read_tables(path, "configuration file"))


def read_tables(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file that a user names, a byte-order mark before it or not.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        ConfigError: it is missing, no plain file, larger than 64 KiB, not UTF-8, or is not TOML.
    """
    try:
        _check_plain(path, what)
        return tomllib.loads(_text(path.read_bytes()))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {what} {str(path)!r}{_neighbours(path)}") from error
    except RecursionError as error:
        raise ConfigError(f"{str(path)!r} cannot be read as TOML: its brackets are nested too deeply") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as TOML: {error}") from error


def _check_plain(path: Path, what: str) -> None:
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        hint = _inhabitants(path)
        if (path / "config.toml").is_file():
            hint = f"; to go on with the run in it: {framp_command('run', '--resume', path)}"
        raise ConfigError(f"{str(path)!r} is a folder; give a {what}{hint}")
    if not stat.S_ISREG(found.st_mode):
        # It may be read several times, and what comes through a pipe is there once.
        raise ConfigError(f"{str(path)!r} is a pipe or a device; write what it gives into a {what}, and give that")
    if found.st_size > _LARGEST_FILE:
        raise ConfigError(f"{str(path)!r} has {found.st_size:,} bytes; a {what} has {_LARGEST_FILE:,} at most")


def _text(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ValueError("it is UTF-16 text or no text at all; save it as UTF-8")
    if any(line.count(b".") > _MOST_DOTS for line in content.splitlines()):
        raise ValueError(f"a line has more than {_MOST_DOTS:,} dots; keys are like local.learning-rate")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8 (byte {content[error.start]:#x}); save it as UTF-8") from error


def _neighbours(path: Path) -> str:
    """What to say of the TOML files beside one that is missing, the nearest by name first."""
    stems = [file.stem for file in path.parent.glob("*.toml")]
    near = difflib.get_close_matches(path.stem, sorted(stems), n=1, cutoff=0.6)
    return f"; did you mean {str(path.with_name(near[0] + '.toml'))!r}?" if near else _inhabitants(path.parent)


def _inhabitants(folder: Path) -> str:
    """What to say of the TOML files in a folder."""
    files = sorted(folder.glob("*.toml"))
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return f"; in {str(folder)!r} lie {', '.join(file.name for file in files[:_NAMED])}{more}" if files else ""


def check_boolean(key: str, value: Scalar, default: Scalar) -> None:
    """Refuse a value that is not a boolean where one is expected, or is one elsewhere.

    Pydantic reads ``yes`` as true and true as 1; a typing slip should not pass for a value. ``True`` is Python's way to
    write it, and no slip.

    Raises:
        ConfigError: it does.
    """
    if isinstance(default, bool):
        if not isinstance(value, bool) and str(value).lower() not in ("true", "false"):
            raise ConfigError(f"{key}={_shown(value)}: write true or false")
    elif isinstance(value, bool):
        raise ConfigError(f"{key}={value!r}: expected a {type(default).__name__}, not true or false")


def check_value(value: object) -> None:
    """Refuse numbers with which nothing can be computed, and text that no file can hold.

    Args:
        value: of a field.

    Raises:
        ValueError: a float that is not zero and beyond float32, in which networks are trained, or an integer beyond 64
            bits, in which Flower sends it; text that is not UTF-8, as the name of a file may be.
    """
    if isinstance(value, str) and not value.isascii() and value != value.encode("utf-8", "ignore").decode():
        raise ValueError("is not UTF-8, in which the configuration is kept; rename the folder")
    smallest, largest = _FLOAT32
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and number and not smallest <= abs(number) <= largest:
            raise ValueError(
                f"{number:g} is beyond single precision, {smallest:.2g} to {largest:.2g}, in which it is used"
            )
        if isinstance(number, int) and not -_INT64 <= number < _INT64:
            raise ValueError(f"is beyond 64 bits; give a number below {_INT64:,}")


def unknown_key(given: str, known: Iterable[str]) -> str:
    """What to say of a key that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(given.replace("_", "-"), known, n=1, cutoff=0.5)
    same_name = [key for key in known if key.rpartition(".")[2] == given.rpartition(".")[2].replace("_", "-")]
    hints = near or same_name
    return f"unknown configuration key {given!r}" + (f"; did you mean {hints[0]!r}?" if hints else "")


def check_known(name: str, known: Iterable[str], what: str) -> None:
    """Refuse a name that is not known, and say which one is near.

    Raises:
        ConfigError: it is not known.
    """
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"unknown {what} {name!r}{hint} There are: {', '.join(names)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_NUMBER else f"{text[:LONGEST_NUMBER]}..."


def explain(error: ValidationError) -> str:
    """What pydantic found, as ``key=value: why``."""
    lines = []
    for item in error.errors():
        key = ".".join(part for part in item["loc"] if isinstance(part, str))
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{key}={_shown(item['input'])}: {message}" if key else message)
    return "; ".join(lines)
