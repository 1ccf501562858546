"""What a benchmark ran on, for its JSON."""

import os
import platform
from pathlib import Path

import numpy as np
import torch


def machine_facts() -> dict[str, str | int]:
    """Processor, cores, and versions of what does the work."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name, which ``platform`` does not tell on Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
