"""Flower's grid without Ray: clients run in this process, or in a pool of worker processes."""

import importlib
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import pairwise
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from framp.engines.calibration import settle_engine
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import load_partition
from framp_core.errors import ConfigError
from framp_core.run_folder import RunFolder
from framp_core.spans import Mark, is_recording, recording, span

if TYPE_CHECKING:
    from framp.profiling import Profile

_CLIENT_APP_RAISED = 2
_CLIENT_APP_CRASHED = 8
_FIRST_NODE_ID = 1000
_SERVER_NODE_ID = 1


Exchange = tuple[Message, Context]
"""A message, and the context of the node that it is for."""

Together = Callable[[Sequence[Message], Sequence[Context]], list[Message]]
"""Answers several train messages at once."""


class Answer(NamedTuple):
    """What comes back from the nodes whose messages one process answered at a time.

    Attributes:
        replies: to the messages.
        states: of the nodes after it.
        process: that answered.
        marks: spans of the process meanwhile, if it is a worker's and spans are recorded.
        cuda_bytes: peak that a worker had allocated so far, likewise.
    """

    replies: list[Message]
    states: list[RecordDict]
    process: int
    marks: list[Mark]
    cuda_bytes: int = 0


class InProcessGrid(Grid):
    """A grid whose nodes live here. Starts in no time; use it as a context manager.

    Args:
        client_app: the app that answers; with more than one worker it must be importable by name, which is the
            case for :data:`client_app.app.app`.
        nodes: number of simulated nodes.
        run_config: flat configuration, as Flower's ``Context.run_config``.
        workers: processes that answer messages; 1 means this process.
        node_configs: one per node; by default ``partition-id`` and ``num-partitions``.
        together: answers train messages, ``cohort`` of them at a time; must be importable by name like the app.
        cohort: see ``together``; messages are handed out in their order, so that this number alone, and not that of the
            workers, says who is trained beside whom.

    Attributes:
        worker_marks: spans of the worker processes by process id, while this process records its own.
        worker_cuda_bytes: their peaks of allocated CUDA memory, likewise.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        run_config: Mapping[str, Scalar],
        workers: int = 1,
        node_configs: Sequence[Mapping[str, Scalar]] | None = None,
        together: Together | None = None,
        cohort: int = 1,
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = 1
        TaskIdentity.node_id = _SERVER_NODE_ID
        configs = node_configs or [{"partition-id": index, "num-partitions": nodes} for index in range(nodes)]
        self._client_app = client_app
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node, config in enumerate(configs, _FIRST_NODE_ID)
        }
        self._workers = workers
        self._together, self._cohort = together, cohort
        self._pool: ProcessPoolExecutor | None = None
        self._replies: dict[str, Message] = {}
        self.worker_marks: dict[int, list[Mark]] = {}
        self.worker_cuda_bytes: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception) and self._pool is not None:
            # A signal: whoever sent it does not wait for the training of a client to end.
            for process in list(self._pool._processes.values()):
                process.terminate()
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def set_run(self, run: object) -> None:
        """Nothing to do: there is one run."""

    @property
    def run(self) -> None:  # type: ignore[override]
        """No run record exists outside of Flower's own engines."""
        return None

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Build an instruction message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Ids of all nodes."""
        return list(self._contexts)

    @span("engine.transport")
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Answer the messages at once; their ids are filled in, as Flower does on sending."""
        messages = list(messages)
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        known = [message for message in messages if message.metadata.dst_node_id in self._contexts]
        for message, reply in zip(known, self._answer_all(known), strict=True):
            reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Take the replies to these messages."""
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send and take the replies; nothing here can be late, so ``timeout`` has no effect."""
        return self.pull_messages(self.push_messages(messages))

    def _answer_all(self, messages: Sequence[Message]) -> list[Message]:
        parts = self._parts([(message, self._contexts[message.metadata.dst_node_id]) for message in messages])
        answers = [self._answer(part) for part in parts] if self._workers == 1 else self._answer_in_pool(parts)
        for part, answer in zip(parts, answers, strict=True):
            for (message, _), state in zip(part, answer.states, strict=True):
                self._contexts[message.metadata.dst_node_id].state = state
            if answer.marks:
                self.worker_marks.setdefault(answer.process, []).extend(answer.marks)
                self.worker_cuda_bytes[answer.process] = answer.cuda_bytes
        return [reply for answer in answers for reply in answer.replies]

    def _parts(self, exchanges: Sequence[Exchange]) -> list[Sequence[Exchange]]:
        """What is answered at a time: cohorts of train messages, as equal in size as can be, and others one by one."""
        trains = bool(exchanges) and exchanges[0][0].metadata.message_type == MessageType.TRAIN
        size = self._cohort if trains and self._together is not None else 1
        count = -(-len(exchanges) // size)
        bounds = [len(exchanges) * part // count for part in range(count + 1)] if count else [0]
        return [exchanges[first:last] for first, last in pairwise(bounds)]

    def _answer(self, part: Sequence[Exchange]) -> Answer:
        return _answer(self._client_app, self._together, part)

    def _answer_in_pool(self, parts: Sequence[Sequence[Exchange]]) -> list[Answer]:
        """A worker that dies takes the unfinished messages of its batch with it; the next batch has a new pool."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, spawn, initializer=_live_with_the_parent)
            if is_recording():
                _wait_for_start(self._pool)
        pool, answers = self._pool, []
        futures = [(part, _submit(pool, self._client_app, self._together, part)) for part in parts]
        for part, future in futures:
            try:
                answers.append(future.result())
            except BrokenProcessPool as error:
                self._pool = None
                failures = [Message(Error(_CLIENT_APP_CRASHED, str(error)), reply_to=message) for message, _ in part]
                answers.append(Answer(failures, [context.state for _, context in part], os.getpid(), []))
        return answers


def _live_with_the_parent() -> None:
    """In a worker: leave Ctrl-C, which a terminal sends to all processes, to the parent, and end when that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


@span("engine.start")
def _wait_for_start(pool: ProcessPoolExecutor) -> None:
    """A profile should not show the imports of new processes as transport."""
    with suppress(BrokenProcessPool):
        pool.submit(_import_client).result()


def _import_client() -> None:
    importlib.import_module("client_app.app")


def _submit(pool: ProcessPoolExecutor, *work: Any) -> Future[Answer]:
    """A worker may die while its batch is still being handed out; then the rest fails like what it held."""
    try:
        return pool.submit(_answer_and_record if is_recording() else _answer, *work)
    except BrokenProcessPool as error:
        failed: Future[Answer] = Future()
        failed.set_exception(error)
        return failed


def _answer(client_app: ClientApp, together: Together | None, part: Sequence[Exchange]) -> Answer:
    """Let the nodes answer in this process."""
    messages, contexts = [message for message, _ in part], [context for _, context in part]
    try:
        if len(part) > 1 and together is not None:
            replies = together(messages, contexts)
        else:
            replies = [client_app(message, context) for message, context in part]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        replies = [Message(Error(_CLIENT_APP_RAISED, reason), reply_to=message) for message in messages]
    return Answer(replies, [context.state for context in contexts], os.getpid(), [])


def _answer_and_record(client_app: ClientApp, together: Together | None, part: Sequence[Exchange]) -> Answer:
    """The same in a worker, whose spans come home with the replies."""
    with recording() as marks:
        answer = _answer(client_app, together, part)
    cuda_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return answer._replace(marks=marks, cuda_bytes=cuda_bytes)


def run_local(config: FrampConfig, profile: "Profile | None" = None) -> RunFolder:
    """Run a configuration in the in-process engine and return its run folder.

    With ``engine.workers`` other than 1, call it below ``if __name__ == "__main__":``; the workers are new processes
    that import the calling script.

    Args:
        config: of the run; see :func:`framp.engines.calibration.settle_engine` for zeros in its section ``engine``.
        profile: takes what the worker processes recorded, within :func:`framp.profiling.profiling`.

    Raises:
        ConfigError: ``engine.ray_address`` is set.
        FrampError: see :func:`server_app.app.serve`.
    """
    from client_app.app import app
    from client_app.cohort import train_together
    from server_app.app import serve

    if config.engine.ray_address:
        raise ConfigError(
            f"engine.ray-address={config.engine.ray_address!r} is for Flower's simulation, and this is the in-process "
            f"engine; use framp run --engine flower, or leave it out"
        )
    # What is wrong with the data is said once and here, not by every client.
    load_partition(config, config.partition.nodes)
    config = settle_engine(config)
    workers, cohort = config.engine.workers, config.engine.cohort
    with InProcessGrid(app, config.partition.nodes, config.to_flat(), workers, None, train_together, cohort) as grid:
        run = serve(grid, config)
        if profile is not None:
            profile.add_workers(grid.worker_marks, grid.worker_cuda_bytes)
    return run
