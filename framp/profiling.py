"""Profile of a run in the in-process engine: a table of its parts, its peak memory, and a trace for a viewer.

Every instant of the run is given to the innermost span of each process. Where several processes work at once, the
instant's wall-clock time is divided equally among them, so that the parts add up to the run's wall-clock time.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from rich.table import Table

from framp.engines import run_local
from framp_core import files
from framp_core.config import FrampConfig
from framp_core.run_folder import RunFolder
from framp_core.spans import Mark, recording

PROFILE = "profile.json"
TRACE = "trace.json"
TRANSPORT = "engine.transport"
REST = "engine.rest"
"""What no span covers: data and partition on the server, events, Flower's loop."""
_SAMPLE_SECONDS = 0.02
_MEGABYTE = 1e6


@dataclass
class Part:
    """One row of the table.

    Attributes:
        name: of the span, such as ``client.train``.
        calls: how often it began.
        seconds: without inner spans, summed over processes.
        wall_seconds: the same where one process works; an equal share of the instant where several do.
    """

    name: str
    calls: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0


@dataclass
class Profile:
    """What was recorded of a run; filled when :func:`profiling` ends.

    Attributes:
        start, end: in nanoseconds of ``time.perf_counter_ns``.
        marks: spans by process id; those of worker processes are added by the engine.
        memory: peaks, in bytes.
    """

    start: int = 0
    end: int = 0
    marks: dict[int, list[Mark]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall-clock time."""
        return (self.end - self.start) / 1e9

    def add_workers(self, marks: Mapping[int, list[Mark]], cuda_bytes: Mapping[int, int]) -> None:
        """Take what came home from worker processes, by process id."""
        self.marks.update(marks)
        if any(cuda_bytes.values()):
            self.memory["workers_cuda"] = sum(cuda_bytes.values())

    def parts(self) -> list[Part]:
        """All parts, what no span covers among them, the longest first; their wall-clock times add up."""
        found = divide(self.marks, self.start, self.end)
        return sorted(found.values(), key=lambda part: -part.wall_seconds)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        rows = [{**asdict(part), "share": part.wall_seconds / self.seconds} for part in self.parts()]
        return {"wall_seconds": self.seconds, "processes": len(self.marks), "parts": rows, "memory": self.memory}

    def trace(self) -> dict[str, Any]:
        """Chrome's trace event format: complete events, microseconds, a track per process."""
        events: list[dict[str, Any]] = []
        for process, marks in sorted(self.marks.items()):
            name = "server" if process == os.getpid() else "worker"
            events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}})
            events += _complete_events(process, marks, self.start)
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def write(self, run: RunFolder, *, trace: bool) -> None:
        """Write ``profile.json`` and, if asked for, ``trace.json`` into the run folder."""
        run.write_json(PROFILE, self.to_json())
        if trace:
            files.write_text(run.path / TRACE, json.dumps(self.trace()))


@contextmanager
def profiling() -> Iterator[Profile]:
    """Record what this process does meanwhile, and the memory of it and its children."""
    profile, memory = Profile(), MemorySampler()
    with recording() as marks, memory:
        profile.start = time.perf_counter_ns()
        try:
            yield profile
        finally:
            profile.end = time.perf_counter_ns()
            profile.marks[os.getpid()] = marks
    profile.memory |= memory.peaks()


def run_profiled(config: FrampConfig, *, trace: bool = False) -> RunFolder:
    """Run a configuration in the in-process engine, and write its profile into the run folder.

    Args:
        config: of the run; its numbers are those of a run without a profile.
        trace: write ``trace.json``, too.

    Raises:
        FrampError: see :func:`framp.engines.run_local`.
    """
    with profiling() as profile:
        run = run_local(config, profile)
    profile.write(run, trace=trace)
    return run


def divide(marks: Mapping[int, Sequence[Mark]], start: int, end: int) -> dict[str, Part]:
    """Give every instant between ``start`` and ``end`` to parts.

    Args:
        marks: by process, each in the order of time, spans properly nested.
        start: nanoseconds.
        end: nanoseconds.
    """
    parts = {REST: Part(REST)}
    stacks: dict[int, list[str]] = {process: [] for process in marks}
    merged = sorted(
        ((at, process, name) for process, own in marks.items() for at, name in own), key=lambda mark: mark[0]
    )
    before = start
    for at, process, name in merged:
        _share_out(parts, stacks, (at - before) / 1e9)
        before = at
        if name is None:
            stacks[process].pop()
        else:
            stacks[process].append(name)
            parts.setdefault(name, Part(name)).calls += 1
    _share_out(parts, stacks, (end - before) / 1e9)
    return parts


def _share_out(parts: Mapping[str, Part], stacks: Mapping[int, Sequence[str]], seconds: float) -> None:
    """The server waits in the transport while clients work, so that this time is theirs."""
    innermost = [stack[-1] for stack in stacks.values() if stack] or [REST]
    working = [name for name in innermost if name != TRANSPORT] or innermost
    for name in working:
        parts[name].seconds += seconds
        parts[name].wall_seconds += seconds / len(working)


def _complete_events(process: int, marks: Sequence[Mark], start: int) -> Iterator[dict[str, Any]]:
    opened: list[tuple[int, str]] = []
    for at, name in marks:
        if name is not None:
            opened.append((at, name))
            continue
        began, ended = opened.pop()
        place, _, what = ended.partition(".")
        times = {"ts": (began - start) / 1e3, "dur": (at - began) / 1e3}
        yield {"ph": "X", "name": what, "cat": place, "pid": process, "tid": 0, **times}


class MemorySampler:
    """Peak resident memory of this process and of all its children together, looked at every 20 ms.

    Pages that processes share are counted in each of them.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._own = self._all = 0

    def __enter__(self) -> Self:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def peaks(self) -> dict[str, int]:
        """Bytes, by name."""
        peaks = {"server_rss": self._own, "all_processes_rss": self._all}
        cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return {**peaks, "server_cuda": cuda} if cuda else peaks

    def _follow(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        own = self._process.memory_info().rss
        self._own = max(self._own, own)
        self._all = max(self._all, own + sum(map(_resident, self._process.children(recursive=True))))


def _resident(process: psutil.Process) -> int:
    try:
        size: int = process.memory_info().rss
    except psutil.Error:
        return 0
    return size


def profile_table(profile: Mapping[str, Any]) -> Table:
    """The table of ``profile.json``."""
    total = profile["wall_seconds"]
    table = Table(
        title=f"Where {total:.2f} s of wall-clock time went, start and report among them",
        title_justify="left",
        caption=_memory_line(profile["memory"]),
        caption_justify="left",
        show_footer=True,
    )
    footers = ("all", "", "", "", f"{sum(row['wall_seconds'] for row in profile['parts']):.2f}", "100.0 %", "")
    headings = ("where", "part", "calls", "seconds", "wall-clock", "share", "ms per call")
    for number, (heading, footer) in enumerate(zip(headings, footers, strict=True)):
        table.add_column(heading, footer, justify="left" if number < 2 else "right", no_wrap=True)
    for row in profile["parts"]:
        where, _, part = row["name"].partition(".")
        per_call = f"{1e3 * row['seconds'] / row['calls']:.2f}" if row["calls"] else ""
        cells = (f"{row['seconds']:.2f}", f"{row['wall_seconds']:.2f}", f"{100 * row['share']:.1f} %", per_call)
        table.add_row(where, part, str(row["calls"] or ""), *cells)
    return table


def _memory_line(memory: Mapping[str, int]) -> str:
    """Such as ``peak memory: server process 310 MB, with all workers 905 MB``."""
    names = {
        "server_rss": "server process",
        "all_processes_rss": "with all workers",
        "server_cuda": "CUDA of the server process",
        "workers_cuda": "CUDA of the workers",
    }
    found = (f"{name} {memory[key] / _MEGABYTE:,.0f} MB" for key, name in names.items() if key in memory)
    return "peak memory: " + ", ".join(found)
