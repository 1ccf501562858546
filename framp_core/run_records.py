"""What the files of a run folder must hold to be read: one schema for each, checked where they are read.

A run folder may be damaged, or come from somebody else. Keys that no schema names may be there; nobody reads them.
"""

from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from framp_core.config_values import parse_capacity
from framp_core.errors import ConfigError, RunFolderError
from framp_core.metrics import COLUMNS, MEAN, Moment, Population, Role

Count = Annotated[int, Field(ge=0, le=2**63)]
Round = Annotated[int, Field(ge=0, le=2**31)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Number = Annotated[float, Field(allow_inf_nan=False)]


@lru_cache(maxsize=1024)
def _is_capacity(text: str) -> str:
    try:
        parse_capacity(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


Capacity = Annotated[str, AfterValidator(_is_capacity)]


class _Refusal(TypedDict):
    client: str
    error: str
    traceback: NotRequired[str | None]


class _Client(TypedDict):
    client: str
    role: Role
    capacity: Capacity
    train_examples: NotRequired[Count | None]
    descriptor_bytes: NotRequired[Count | None]


class _Training(TypedDict):
    client: str
    capacity: Capacity
    loss: Number | None
    held: Count
    down: dict[str, Count]
    up: dict[str, Count]
    mask_alone: NotRequired[Count]
    screened: NotRequired[bool]


class _Counts(TypedDict):
    client: str
    role: Role
    capacity: Capacity
    population: Population
    total: Annotated[int, Field(ge=1, le=2**63)]


class _Measurement(_Counts):
    moment: Moment
    correct: Count


class _Row(_Measurement):
    round: Round


class _Curve(_Counts):
    correct: list[Count]


class _Event(TypedDict):
    kind: str
    round: Round


class _Replies(_Event):
    refused: NotRequired[list[_Refusal]]
    seconds: NotRequired[Seconds | None]


class _Join(_Replies):
    clients: NotRequired[list[_Client]]


class _Start(_Join):
    parameters: NotRequired[Count]
    expected_clients: NotRequired[Count | None]


class _Train(_Replies):
    clients: NotRequired[list[_Training]]
    learnt: NotRequired[bool]


class _Evaluate(_Replies):
    accuracies: NotRequired[list[_Measurement]]
    down_bytes: NotRequired[Count | None]


class _Priors(TypedDict):
    round: Round
    strengths: list[Number]
    clients: list[_Curve]


class _Layer(TypedDict):
    name: Annotated[str, Field(max_length=200)]
    size: Count


class _Masks(TypedDict):
    layers: list[_Layer]
    selection: dict[Capacity, list[Number]]
    clients: list[str]
    capacities: list[Capacity]
    overlap: list[list[Number]]


class _Data(TypedDict):
    shape: list[Annotated[int, Field(ge=1, le=2**31)]]
    class_names: list[str]
    mean: NotRequired[list[Number]]
    std: NotRequired[list[Number]]


class _Manifest(TypedDict):
    digest: str
    data: NotRequired[_Data]
    data_digests: NotRequired[dict[str, str]]
    notes: NotRequired[dict[str, str]]


_MEASURED = {
    *(f"{column}{part}" for column in COLUMNS for part in ("", "_std", "_worst_decile", "_clients")),
    *("bytes_down", "bytes_up", "parameters_held"),
}


def _row(content: dict[str, Any]) -> dict[str, Any]:
    if wrong := [key for key in sorted(_MEASURED) if isinstance(content.get(key, ""), str)]:
        raise ValueError(f"expected a number as {wrong[0]}")
    if not isinstance(content.get("capacity"), str):
        raise ValueError("expected a capacity")
    return content


def _rows(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if content[-1]["capacity"] != MEAN:
        raise ValueError("the last row is not the mean")
    return content


_SummaryRow = Annotated[dict[str, str | Number | None], AfterValidator(_row)]


class _Summary(TypedDict):
    rows: Annotated[list[_SummaryRow], Field(min_length=1), AfterValidator(_rows)]
    rows_after_fine_tuning: list[_SummaryRow]
    evaluated_round: Round | None
    rounds: Round
    seconds: Seconds
    parameters: Count | None


_State = TypedDict(
    "_State",
    {
        "round": Round,
        "events-bytes": Count,
        "empty-rounds": Count,
        "agreements": dict[str, Number],
        "prototype-sizes": dict[str, Number],
        "task": str,
        "clients": list[dict[str, Any]],
        "strategy": str,
        "code": dict[str, str],
        "config": dict[str, str | bool | int | float],
    },
)


def _environment(content: dict[str, Any]) -> dict[str, Any]:
    if missing := {"python", "fingerprint", "versions"} - content.keys():
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    if not isinstance(content["versions"], dict):
        raise ValueError("its versions are no object")
    return content


def _masks(content: _Masks) -> _Masks:
    clients = len(content["clients"])
    square = len(content["overlap"]) == clients and all(len(row) == clients for row in content["overlap"])
    layers = all(len(shares) == len(content["layers"]) for shares in content["selection"].values())
    if not (square and layers and len(content["capacities"]) == clients):
        raise ValueError("its tables do not have the sizes of its lists of clients and layers")
    if unknown := set(content["capacities"]) - content["selection"].keys():
        raise ValueError(f"has no selection for {', '.join(sorted(unknown))}")
    return content


def _prior_curve(content: _Priors) -> _Priors:
    if any(len(row["correct"]) != len(content["strengths"]) for row in content["clients"]):
        raise ValueError("expected a count for each strength")
    return content


_EVENTS: Mapping[str, Any] = {
    "start": _Start,
    "join": _Join,
    "train": _Train,
    "evaluate": _Evaluate,
    "priors": Annotated[_Priors, AfterValidator(_prior_curve)],
}
_REPORTED: Mapping[str, tuple[str, ...]] = {
    "start": ("clients", "parameters"),
    "join": ("clients",),
    "train": ("clients",),
    "evaluate": ("accuracies",),
    "priors": ("strengths", "clients"),
}
"""What the report needs of each kind of event."""
_FILES: Mapping[str, Any] = {
    "environment.json": Annotated[
        dict[str, str | int | float | dict[str, str | None] | None], AfterValidator(_environment)
    ],
    "manifest.json": _Manifest,
    "masks.json": Annotated[_Masks, AfterValidator(_masks)],
    "prior_curve.json": Annotated[_Priors, AfterValidator(_prior_curve)],
    "summary.json": _Summary,
    "state.json": _State,
}


def checked_file(path: Path, content: Any) -> Any:
    """The content of a JSON file, if it is what a run writes under that name; what has no schema passes.

    Raises:
        RunFolderError: it is not; the message names the first place.
    """
    schema = _FILES.get(path.name)
    return content if schema is None else _checked(schema, content, repr(str(path)))


def checked_event(event: Any, where: str) -> dict[str, Any]:
    """An event, if it is one; what the report reads of it has the right types, where it is there.

    Args:
        event: any JSON.
        where: it stands, for the message.

    Raises:
        RunFolderError: it is not.
    """
    found: dict[str, Any] = _checked(_Event, event, where)
    schema = _EVENTS.get(found["kind"])
    return found if schema is None else _checked(schema, found, where)


def complete_event(event: dict[str, Any], where: str) -> dict[str, Any]:
    """A checked event, if nothing is missing in it that the report needs.

    Raises:
        RunFolderError: something is.
    """
    if missing := [key for key in _REPORTED.get(event["kind"], ()) if key not in event]:
        raise RunFolderError(
            f"the event {event['kind']!r} of round {event['round']} in {where} lacks {', '.join(missing)}; the file "
            f"was changed after the run; restore it"
        )
    return event


def checked_row(row: Mapping[str, str | None], where: str) -> Mapping[str, Any]:
    """A row of clients.csv, with its numbers still as text.

    Raises:
        RunFolderError: it is not one.
    """
    try:
        _adapter(_Row).validate_strings(dict(row))
    except ValidationError as error:
        raise _other(error, where) from error
    return row


def _checked(schema: Any, content: Any, where: str) -> Any:
    """The content itself: a copy would turn whole numbers into floats."""
    try:
        _adapter(schema).validate_python(content, strict=True)
    except ValidationError as error:
        raise _other(error, where) from error
    return content


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _other(error: ValidationError, where: str) -> RunFolderError:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))[:200]
    return RunFolderError(
        f"{where} is not what a run writes there ({place + ': ' if place else ''}{first['msg'][:200]}); the file was "
        f"changed after the run; restore it"
    )
