"""Repeated measurements, and the JSON that a benchmark writes."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import machine_facts


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def text(self, digits: int = 2) -> str:
        """Such as ``1.20 (1.10-1.42)``."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


def write_result(path: Path, repetitions: int, **tables: Any) -> None:
    """Write the numbers of a benchmark with what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine_facts(), "repetitions": repetitions, **tables}
    path.write_text(json.dumps(result, indent=1, default=asdict) + "\n", encoding="utf-8")
