"""Train messages of several clients of one process, answered together: the same replies, one program.

Flower hands a ClientApp one message at a time; an engine that has several at hand calls :func:`train_together`.
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache, partial

from flwr.app import Context, Message, RecordDict

from client_app.app import content_or_error, open_message, update_content
from client_app.client import Assignment, Client
from framp_core.cohort import SMALLEST, StackedNetworks, stackable
from framp_core.errors import ModelError
from framp_core.local_training import LocalResult, train_locally
from framp_core.models import FlatModel
from framp_core.prototypes import Prototypes
from framp_core.spans import span
from framp_core.threads import torch_threads

logger = logging.getLogger("flwr.framp")
Work = tuple[Client, Assignment]
Results = tuple[Sequence[LocalResult | ModelError | None], Sequence[Prototypes | None]]
"""Trainings and prototypes; None for clients that train, or make them, by themselves."""
EVEN_ENOUGH = 1.5
"""Images that a joint pass computes, those that fill up included, for each that there is, up to which it pays."""


@span("client.other")
def train_together(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
    """Reply to each train message as :data:`client_app.app.app` would, up to the order of additions in a layer.

    Clients that cannot share a program (:func:`framp_core.cohort.stackable`), of which there are fewer than
    :data:`framp_core.cohort.SMALLEST` alike, or whose program fails, train one by one.
    """
    opened = [content_or_error(partial(_open, *pair)) for pair in zip(messages, contexts, strict=True)]
    groups: dict[object, list[tuple[int, Work]]] = defaultdict(list)
    for place, work in enumerate(opened):
        if not isinstance(work, RecordDict):
            groups[_program_of(work[1], place)].append((place, work))
    contents = {place: work for place, work in enumerate(opened) if isinstance(work, RecordDict)}
    for members in groups.values():
        contents |= zip((place for place, _ in members), _train([work for _, work in members]), strict=True)
    return [Message(contents[place], reply_to=message) for place, message in enumerate(messages)]


def _open(message: Message, context: Context) -> Work | RecordDict:
    instruction, client = open_message(message, context)
    read = partial(client.assignment, instruction.payload, instruction.server_round)
    given = content_or_error(read, client)
    return given if isinstance(given, RecordDict) else (client, given)


def _program_of(given: Assignment, place: int) -> object:
    """Equal for clients that can share a program."""
    task = given.task
    if not stackable(task.data.train, given.model.model):
        return place
    aligned, batch = task.prototypes is not None, min(task.config.local.batch_size, len(task.data.train))
    return id(given.model), task.config.local, batch, aligned


def _train(works: Sequence[Work]) -> list[RecordDict]:
    with torch_threads(works[0][0].config.local.threads):
        found = _results(works)
        return [content_or_error(partial(_content, *each), each[0][0]) for each in zip(works, *found, strict=True)]


def _results(works: Sequence[Work]) -> Results:
    alone = [None] * len(works)
    if len(works) >= SMALLEST:
        try:
            return _results_together(works)
        except Exception as error:  # Room that all lack together one may have; what fails again names its client.
            logger.warning("%d clients train one by one, as their program failed: %s", len(works), error)
    return alone, alone


def _results_together(works: Sequence[Work]) -> Results:
    client, given = works[0]
    stack = _stacked(given.model, len(works), client.config.engine.compile)
    tasks = [assignment.task for _, assignment in works]
    results = stack.train([task._replace(rng=copy.deepcopy(task.rng)) for task in tasks])
    if not given.computes_prototypes or not _can_share_a_pass(given.model, works):
        return results, [None] * len(works)
    with span("client.prototypes"):
        return results, stack.prototypes([client.data for client, _ in works])


def _can_share_a_pass(model: FlatModel, works: Sequence[Work]) -> bool:
    counts = [len(client.data.train) for client, _ in works]
    return not model.model.batch_statistics and len(counts) * max(counts) <= EVEN_ENOUGH * sum(counts)


def _content(work: Work, result: LocalResult | ModelError | None, prototypes: Prototypes | None) -> RecordDict:
    client, given = work
    if isinstance(result, ModelError):
        raise result
    return update_content(client, given, result or train_locally(given.model, *given.task), prototypes)


@lru_cache(maxsize=8)
def _stacked(model: FlatModel, count: int, compiled: bool) -> StackedNetworks:
    """One stack per process, network and number; every training overwrites all of its parameters."""
    return StackedNetworks(model, count, compiled=compiled)
