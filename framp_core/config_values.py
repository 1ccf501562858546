"""From the text of files and options to the values of a configuration: field types, keys, and what errors say."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationError

from framp_core.errors import ConfigError

Scalar = str | int | float | bool
LONGEST_NUMBER = 100
_LARGE_EXPONENT = re.compile(r"[eE][-+]?\d{4}")


def _comma_separated(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


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
    PlainSerializer(lambda values: ",".join(str(value) for value in values), return_type=str),
]
Counts = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(_comma_separated),
    PlainSerializer(lambda values: ",".join(str(value) for value in values), return_type=str),
    Field(min_length=1),
]


def _strengths(value: object) -> object:
    return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


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
    """Flat dotted, hyphenated keys of nested tables."""
    flat: dict[str, Scalar] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}".replace("_", "-")] = value
    return flat


def read_toml(path: Path) -> dict[str, Scalar]:
    """Read a TOML file as flat dotted keys.

    Raises:
        ConfigError: it is missing, or is not TOML.
    """
    try:
        return flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        near = sorted(str(file) for file in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        hint = f"; beside it lie {', '.join(near)}" if near else ""
        raise ConfigError(f"there is no configuration file {str(path)!r}{hint}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as TOML: {error}") from error


def check_boolean(key: str, value: Scalar, default: Scalar) -> None:
    """Refuse a value that is not a boolean where one is expected, or is one elsewhere.

    Pydantic reads ``yes`` as true and true as 1; a typing slip should not pass for a value.

    Raises:
        ConfigError: it does.
    """
    if isinstance(default, bool):
        if not isinstance(value, bool) and value not in ("true", "false"):
            raise ConfigError(f"{key}={value!r}: write true or false")
    elif isinstance(value, bool):
        raise ConfigError(f"{key}={value!r}: expected a {type(default).__name__}, not true or false")


def unknown_key(given: str, known: Iterable[str]) -> str:
    """What to say of a key that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(given.replace("_", "-"), known, n=1, cutoff=0.5)
    same_name = [key for key in known if key.rpartition(".")[2] == given.rpartition(".")[2].replace("_", "-")]
    hints = near or same_name
    return f"unknown configuration key {given!r}" + (f"; did you mean {hints[0]!r}?" if hints else "")


def explain(error: ValidationError) -> str:
    """What pydantic found, as ``key=value: why``."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{key}={item['input']!r}: {message}" if key else message)
    return "; ".join(lines)
