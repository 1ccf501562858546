"""How many processes, and how many clients as one program: what ``engine.workers`` and ``engine.cohort`` = 0 become."""

import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import numpy as np
import torch

from framp_core.cohort import SMALLEST, StackedNetworks, stackable
from framp_core.config import FrampConfig
from framp_core.data import ClientData, load_client
from framp_core.local_training import LocalTask, resolve_device, train_locally
from framp_core.masking import extract
from framp_core.models import FeaturesAndHead, FlatModel, build_model, initial_parameters
from framp_core.threads import torch_threads

logger = logging.getLogger("flwr.framp")
STEPS = 2
SECONDS = 1.0
"""Repetitions of a measurement go on for so long; there is one at least."""
WORTHWHILE = 0.95
"""A cohort has to take less than this share of the time, so that an even race ends with clients one by one."""


def settle_engine(config: FrampConfig) -> FrampConfig:
    """Put numbers in the place of zeros in the section ``engine``, so that a run can say what it used.

    ``workers``: as many as the cores that this process may use have room for at ``local.threads`` each; one on a GPU.
    ``cohort``: whichever trains fastest per client and step, of clients one by one, those of a round that fall to one
    worker as one program, and half as many; measured on the largest of the first clients, and logged.
    """
    engine = config.engine
    workers = engine.workers or _room_for_workers(config)
    cohort = engine.cohort or _fastest_cohort(config, workers)
    return config.model_copy(update={"engine": engine.model_copy(update={"workers": workers, "cohort": cohort})})


def _room_for_workers(config: FrampConfig) -> int:
    if resolve_device(config.local.device).type == "cuda":
        return 1
    return max(1, _cores() // config.local.threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fastest_cohort(config: FrampConfig, workers: int) -> int:
    start = time.perf_counter()
    share = -(-min(config.server.clients_per_round, config.partition.clients) // workers)
    sizes = sorted({size for size in (share, -(-share // 2)) if size >= SMALLEST})
    if not sizes:
        return 1
    # One client stands for all: those with fewer images than a batch would train in a program of their own.
    first = (load_client(config, index, config.partition.nodes) for index in range(max(sizes)))
    client = max(first, key=lambda each: len(each.train))
    network = build_model(config.model, client.shape, client.classes)
    if not stackable(client.train, network):
        return 1
    with torch_threads(config.local.threads):
        found = _measure(config, network, client, sizes)
    best = min(found, key=lambda size: found[size] * (WORTHWHILE if size == 1 else 1))
    logger.info(
        "engine.cohort=0 becomes %d: per client and step %s (measured in %.1f s, for %d workers)",
        best,
        ", ".join(f"{1e3 * each:.2f} ms {_words(size)}" for size, each in found.items()),
        time.perf_counter() - start,
        workers,
    )
    return best


def _words(size: int) -> str:
    return "one by one" if size == 1 else f"{size} together"


def _measure(
    config: FrampConfig, network: FeaturesAndHead, client: ClientData, sizes: Iterable[int]
) -> dict[int, float]:
    """Seconds per client and step by the number of clients that are trained as one program, as far as memory goes."""
    model = FlatModel(network, resolve_device(config.local.device), config.local.precision)
    theta = initial_parameters(network, config.seed).numpy()
    mask = extract(theta, model.layout, config.extraction, client.capacity)

    def tasks(count: int) -> list[LocalTask]:
        streams = np.random.default_rng(0).spawn(count)
        return [LocalTask(theta, mask, client, config, rng, None, STEPS) for rng in streams]

    def one_by_one() -> None:
        for task in tasks(SMALLEST):
            train_locally(model, *task)

    def together(stack: StackedNetworks, size: int) -> None:
        stack.train(tasks(size))

    found = {1: _seconds(one_by_one, model.flat.device) / (SMALLEST * STEPS)}
    with suppress(torch.OutOfMemoryError):
        for size in sizes:
            stack = StackedNetworks(model, size, compiled=config.engine.compile)
            found[size] = _seconds(partial(together, stack, size), model.flat.device) / (size * STEPS)
    return found


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Shortest of the repetitions, after one to warm up: what disturbs a measurement makes it longer."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < SECONDS:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
