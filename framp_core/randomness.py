"""Random streams: one root seed, one independent stream per purpose.

Every random decision names its purpose (and, where it applies, client and round). Streams never depend on
construction order or on the number of workers, so the same seed gives the same run everywhere.
"""

import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """Return the NumPy stream of one purpose.

    Args:
        seed: root seed of the run, >= 0.
        purpose: what the numbers are for, for example ``"batches"``.
        *keys: further coordinates of the stream, such as the client's name and the round.
    """
    spawn_key = tuple(zlib.crc32(key.encode()) if isinstance(key, str) else key for key in (purpose, *keys))
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=spawn_key))


def torch_stream(seed: int, purpose: str, *keys: int | str) -> torch.Generator:
    """Return the same kind of stream as a CPU ``torch.Generator``."""
    generator = torch.Generator()
    generator.manual_seed(int(stream(seed, purpose, *keys).integers(2**63)))
    return generator
