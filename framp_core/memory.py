"""How much memory there is, asked before something is read whose size others chose."""

from pathlib import Path

import psutil

from framp_core.errors import DataError

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that a process can still take: what the machine has free, within what the container may use.

    Files that were read stay in memory until it is needed, and a container counts them as used.
    """
    free: int = psutil.virtual_memory().available
    try:
        limit, used, stat = (
            (_CGROUP / name).read_text("utf-8").strip() for name in ("memory.max", "memory.current", "memory.stat")
        )
        kept = int(dict(line.split() for line in stat.splitlines()).get("inactive_file", 0))
        return free if limit == "max" else min(free, int(limit) - int(used) + kept)
    except OSError:
        return free


def require_memory(needed: int, what: str) -> None:
    """Refuse what does not fit.

    Args:
        needed: bytes, from a header rather than from what it promises.
        what: names the thing, where it is and how large it says it is.

    Raises:
        DataError: fewer bytes are free.
    """
    free = available_memory()
    if needed > free:
        raise DataError(
            f"{what}; reading it takes {_gigabytes(needed)} of memory and {_gigabytes(free)} are free. Use smaller "
            f"data, or a machine with more memory"
        )


def _gigabytes(count: int) -> str:
    return f"{max(count, 0) / 1e9:.3g} GB"
