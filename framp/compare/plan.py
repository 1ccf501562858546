"""The runs of a comparison: settings, folders, and which of them are finished."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from framp_core import files
from framp_core.config import PLACES, FrampConfig
from framp_core.config_values import Scalar, check_known, read_toml
from framp_core.errors import ConfigError, RunFolderError
from framp_core.fingerprint import code_root
from framp_core.methods import METHODS, is_ablation, settings_of
from framp_core.run_folder import SUMMARY, RunFolder
from server_app.recording import changed_data

Item = TypeVar("Item")

RUNS = "runs"
PRESETS = code_root() / "presets"
LEARNING_RATE = "local.learning-rate"
OPTIONS = {"seed": "--seeds", "method": "--methods", "output.folder": "--out", "engine.workers": "--workers"}
"""Keys that the comparison sets itself, and the option that says how."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        method: key of :data:`framp_core.methods.METHODS`.
        config: its effective configuration; ``output.folder`` is its run folder.
    """

    method: str
    config: FrampConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.output.folder)

    @property
    def name(self) -> str:
        """Its name in messages, such as ``framp-seed0``."""
        return self.folder.name

    def is_finished(self) -> bool:
        """Whether its folder holds this run with its summary; what an interrupted run left does not count.

        Raises:
            RunFolderError: the folder holds something else, or a run with other settings or on other data, or another
                process works on it.
            ConfigError: the folder's configuration is not one of this version.
        """
        # A run that was killed while it wrote its first file leaves no more than that file's temporary one.
        if not self.folder.is_dir() or all(entry.suffix == files.LEFTOVER for entry in self.folder.iterdir()):
            return False
        found = RunFolder.open(self.folder)
        if found.config.digest() != self.config.digest():
            raise RunFolderError(
                f"the run in {str(self.folder)!r} has other settings: "
                f"{'; '.join(self.config.differences(found.config.to_flat()))}. Results are never overwritten: "
                "ask for the same settings, give --out another folder, or remove this run"
            )
        if not found.has(SUMMARY):
            with found.alone():  # A comparison that was killed leaves its runs at work.
                return False
        if changed := changed_data(found, self.config, self.config.partition.nodes):
            raise RunFolderError(
                f"the run in {str(self.folder)!r} is on other data than those in {self.config.data.root!r}{changed}. "
                "Results are never overwritten: give --out another folder, or remove this run"
            )
        return True


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where it is written.

    Attributes:
        preset: TOML file, or None for the defaults, which are the digits preset.
        overrides: flat keys that hold for every method.
        methods: keys of :data:`framp_core.methods.METHODS`.
        seeds: one run per method and seed; the seed fixes the partition.
        out: absolute folder of the comparison.
        reference: the method that the others are tested against.
        made_by: the command that does it as a part of a study; empty: ``framp compare``.

    Raises:
        ConfigError: an unknown or repeated method or seed, fewer than one of either, a reference that is not among
            the methods, an override of a key that the comparison sets itself, or a preset of another method than
            FRAMP, whose settings would lie under those of every method.
    """

    preset: Path | None
    overrides: Mapping[str, Scalar]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    reference: str = field(default="")
    made_by: str = field(default="")

    def __post_init__(self) -> None:
        for what, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"--{what} {','.join(map(str, values))!r}: give one or more, each once")
        for name in (*self.methods, *([self.reference] if self.reference else [])):
            check_known(name, METHODS, "method")
        if not self.reference:
            object.__setattr__(self, "reference", self.methods[0])
        if self.reference not in self.methods:
            raise ConfigError(f"--reference {self.reference} is not among --methods {','.join(self.methods)}")
        for key in self.overrides:
            if option := OPTIONS.get(key.replace("_", "-")):
                raise ConfigError(f"-o {key}=... does not hold for a comparison; use {option}")

        method = (read_toml(self.preset) if self.preset else {}).get("method", "framp")
        if method != "framp":
            raise ConfigError(
                f"the preset {self.preset.stem if self.preset else ''!r} has method = {method!r}, so its settings "
                "would lie under every method of the comparison; give one without a method"
            )

    def config(self, method: str, seed: int, folder: Path, learning_rate: float | None = None) -> FrampConfig:
        """The configuration of one run: the preset, the method's settings on it, the overrides on both.

        Args:
            method: key of :data:`framp_core.methods.METHODS`.
            seed: root seed.
            folder: run folder.
            learning_rate: of the clients, on top of everything; None leaves it as it is.
        """
        own: dict[str, Scalar] = {"seed": seed, "output.folder": str(folder), "engine.workers": 1}
        tuned: dict[str, Scalar] = {} if learning_rate is None else {LEARNING_RATE: learning_rate}
        return FrampConfig.load(self.preset, settings_of(method, {**self.overrides, **tuned, **own}))

    def learning_rate_of(self, method: str) -> str:
        """The method whose learning rate a method takes when rates are chosen: an ablation takes the reference's."""
        return self.reference if is_ablation(method, self.reference) else method

    @property
    def tuned(self) -> tuple[str, ...]:
        """The methods that choose a learning rate of their own."""
        return tuple(name for name in self.methods if self.learning_rate_of(name) == name)

    def runs(self, learning_rates: Mapping[str, float] | None = None) -> list[PlannedRun]:
        """One run per seed and method, a seed at a time: an early stop leaves whole seeds.

        Args:
            learning_rates: tuned ones by method, whose methods alone are run; None: all methods, as configured.

        Raises:
            ConfigError: the settings of a run are invalid, or two methods have the same ones.
        """
        methods = self.methods if learning_rates is None else [name for name in self.methods if name in learning_rates]
        rates = learning_rates or {}
        runs = [
            PlannedRun(name, self.config(name, seed, self.out / RUNS / f"{name}-seed{seed}", rates.get(name)))
            for seed in self.seeds
            for name in methods
        ]
        first: dict[str, str] = {}
        for run in runs:
            other = first.setdefault(run.config.digest(), run.method)
            if other != run.method:
                raise ConfigError(f"{other} and {run.method} have the same settings here; leave one of them out")
        return runs

    def public_overrides(self) -> dict[str, Scalar]:
        """The overrides without the places of data on this machine."""
        return {key: value for key, value in self.overrides.items() if not _is_place(key)}

    def replaced(self) -> dict[str, list[str]]:
        """Overrides that replace what a method's paper fixes, and the methods that each of them changes."""
        given = {key.replace("_", "-") for key in self.overrides}
        return {
            key: touched
            for key in sorted(given)
            if (touched := [name for name in self.methods if key in METHODS[name].settings])
        }


def public_options(overrides: Mapping[str, Scalar]) -> list[str]:
    """Overrides as ``-o`` options, with DIR for the places of data on this machine."""
    return [word for key, value in overrides.items() for word in ("-o", f"{key}={'DIR' if _is_place(key) else value}")]


def public_path(path: Path) -> str:
    """A file as given on the command line: from the working directory if it lies there, else its name alone."""
    resolved, here = path.expanduser().resolve(), Path.cwd()
    return resolved.relative_to(here).as_posix() if resolved.is_relative_to(here) else path.name


def _is_place(key: str) -> bool:
    return key.replace("_", "-") in PLACES


def find_preset(name: str) -> Path | None:
    """The file of a preset that comes with FRAMP; None for ``digits``, which is the defaults.

    Raises:
        ConfigError: there is no such preset.
    """
    found = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    if name == "digits":
        return None
    check_known(name, {"digits": None, **found}, "preset")
    return found[name]


def usable_workers(workers: int | None, runs: int) -> int:
    """Processes for so many runs: as asked, or one per core."""
    return max(1, min(workers or os.cpu_count() or 1, runs))


def parse_list(text: str, option: str, kind: Callable[[str], Item]) -> tuple[Item, ...]:
    """Read a comma-separated option.

    Raises:
        ConfigError: an item is not of the kind.
    """
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is not a comma-separated list: {error}") from error
