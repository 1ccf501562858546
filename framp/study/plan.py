"""A study file: settings that share defaults, each of them a comparison."""

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from framp.compare.plan import LEARNING_RATE, Comparison, find_preset, public_options, public_path
from framp.compare.tuning import TuningPlan
from framp_core.config_values import Scalar, flatten, read_tables
from framp_core.errors import ConfigError

Overrides = Annotated[
    dict[str, Scalar], BeforeValidator(lambda value: flatten(value) if isinstance(value, dict) else value)
]
GRID = (0.03, 0.1, 0.3)


class Choices(BaseModel):
    """What a setting chooses, and what the defaults choose for it; a setting's own choice holds."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, alias_generator=lambda name: name.replace("_", "-")
    )

    preset: str = Field("digits", description="a preset that comes with FRAMP, by name")
    methods: tuple[str, ...] = Field((), description="keys of framp_core/methods.py")
    reference: str = Field("", description="the method that the others are tested against; empty: the first")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="one run per method and seed")
    tune: bool | str = Field(
        False, description="true: choose learning rates here; a setting's name: take those that were chosen there"
    )
    grid: tuple[float, ...] = Field(GRID, description="learning rates that tuning tries")
    tuning_seed: int | None = Field(None, ge=0, description="none: the largest seed plus 1000")
    tuning_rounds: int = Field(0, ge=0, description="rounds of a tuning run; 0: as many as the others")
    overrides: Overrides = Field({}, description="configuration keys, flat or in tables")


class Setting(Choices):
    """One setting."""

    name: str = Field(description="its folder")
    title: str = ""
    text: str = Field("", description="what it is for; a paragraph under its title")

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
            raise ValueError("a setting's name is its folder: small letters, digits, '-', '_' and '.'")
        return name

    def over(self, defaults: Choices) -> Self:
        """This setting with the defaults where it chooses nothing; overrides are merged key by key."""
        chosen = {key: getattr(self, key) for key in self.model_fields_set}
        common = {key: getattr(defaults, key) for key in defaults.model_fields_set}
        overrides = {**defaults.overrides, **self.overrides}
        return type(self).model_validate({**common, **chosen, "overrides": overrides})


class StudyFile(BaseModel):
    """The content of a study file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    text: str = Field("", description="a paragraph under the title")
    defaults: Choices = Choices()
    settings: tuple[Setting, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        names = [setting.name for setting in self.settings]
        if len(set(names)) < len(names):
            raise ValueError(f"two settings have the same name; the names are {', '.join(names)}")
        return self


@dataclass(frozen=True)
class PlannedSetting:
    """One setting as a comparison.

    Attributes:
        name: its folder below that of the study.
        title: heading.
        text: what it is for.
        comparison: its runs.
        plan: how learning rates are chosen here, or None.
        tuned_in: the setting whose learning rates it takes, or empty.
    """

    name: str
    title: str
    text: str
    comparison: Comparison
    plan: TuningPlan | None
    tuned_in: str


@dataclass(frozen=True)
class Study:
    """A study that has been checked.

    Attributes:
        title: heading.
        text: what it is for.
        command: that does it, without paths of this machine.
        out: absolute folder.
        settings: in the order in which they are done.
    """

    title: str
    text: str
    command: str
    out: Path
    settings: tuple[PlannedSetting, ...]


def read_study(path: Path, overrides: Mapping[str, Scalar], out: Path) -> Study:
    """Read a study file and check every run of it, so that no mistake shows up hours later.

    Args:
        path: TOML file.
        overrides: flat keys that hold for every setting, over its own.
        out: absolute folder of the study.

    Raises:
        ConfigError: the file is missing or is not TOML, a key or a value is not valid, or a setting takes its
            learning rates from one that does not have them.
    """
    file = _parse(path)
    command = _command(path, overrides)
    settings: dict[str, PlannedSetting] = {}
    for each in file.settings:
        try:
            settings[each.name] = _plan(each.over(file.defaults), overrides, out, command, settings)
        except ConfigError as error:
            raise ConfigError(f"{path.name}, setting {each.name!r}: {error}") from error
    return Study(file.title, file.text, command, out, tuple(settings.values()))


def _parse(path: Path) -> StudyFile:
    content = read_tables(path, "study file")
    try:
        return StudyFile.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {'; '.join(_explain(item) for item in error.errors())}") from error


def _plan(
    setting: Setting, overrides: Mapping[str, Scalar], out: Path, command: str, before: Mapping[str, PlannedSetting]
) -> PlannedSetting:
    comparison = Comparison(
        preset=find_preset(setting.preset),
        overrides={**setting.overrides, **overrides},
        methods=setting.methods,
        seeds=setting.seeds,
        out=out / setting.name,
        reference=setting.reference,
        made_by=command,
    )
    comparison.runs()
    here = setting.tune is True
    plan = TuningPlan.of(comparison, setting.grid, setting.tuning_seed, setting.tuning_rounds) if here else None
    tuned_in = setting.tune if isinstance(setting.tune, str) else ""
    if tuned_in:
        _check_tuned(comparison, tuned_in, before)
    return PlannedSetting(setting.name, setting.title or setting.name, setting.text, comparison, plan, tuned_in)


def _check_tuned(comparison: Comparison, tuned_in: str, before: Mapping[str, PlannedSetting]) -> None:
    tuned = [name for name, each in before.items() if each.plan]
    if tuned_in not in tuned:
        raise ConfigError(
            f"tune={tuned_in!r} is not a setting above it with tune=true; there are: {', '.join(tuned) or 'none'}"
        )
    missing = [name for name in comparison.tuned if name not in before[tuned_in].comparison.tuned]
    if missing:
        raise ConfigError(f"tune={tuned_in!r}: no learning rate is chosen there for {', '.join(missing)}")
    if LEARNING_RATE in {key.replace("_", "-") for key in comparison.overrides}:
        raise ConfigError(f"tune={tuned_in!r} gives {LEARNING_RATE}, and an override sets it; use one of the two")


def _command(path: Path, overrides: Mapping[str, Scalar]) -> str:
    return shlex.join(["framp", "study", public_path(path), *public_options(overrides)])


def _explain(item: Mapping[str, Any]) -> str:
    *places, last = item["loc"] or ("",)
    where = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else str(message)
    model = StudyFile if not places else Choices if places[0] == "defaults" else Setting
    known = [field.alias or name for name, field in model.model_fields.items()]
    near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"
    return f"unknown key {where!r}{hint}"
