"""A training round that ends once enough clients have answered."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from server_app.replies import problem

if TYPE_CHECKING:
    from flwr.supercore.run import Run

POLL_SECONDS = 0.2


class FirstReplies(Grid):
    """Another grid, but for training messages, whose replies are no longer waited for once enough have come.

    Flower's own grids wait for every reply or the deadline, which makes the slowest client the pace of all (Bonawitz et
    al. 2019 ask 130 % of the clients and go on with the first ones). Enough are ``enough`` replies that carry
    something else than an error; whether an update is valid shows only when it is decoded. Replies that come at the
    same time all count. Later ones are dropped, and a client that is late stays busy with its old message.

    Which replies come first depends on the clock, so a run over such a grid is repeatable only where all replies come
    at once, as they do in process.

    Args:
        grid: the grid that sends and receives.
        enough: replies that end a training round.
    """

    def __init__(self, grid: Grid, enough: int) -> None:
        self._grid = grid
        self._enough = enough

    def set_run(self, run: "Run") -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> "Run":
        """Pass on."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Pass on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Pass on."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, and wait for enough replies, for all, or for the deadline, whatever comes first."""
        messages = list(messages)
        if not messages or messages[0].metadata.message_type != MessageType.TRAIN:
            return self._grid.send_and_receive(messages, timeout=timeout)
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        del messages
        while True:
            replies += self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            if not waiting or self._are_enough(replies) or time.monotonic() >= deadline:
                return replies
            time.sleep(POLL_SECONDS)

    def _are_enough(self, replies: Iterable[Message]) -> bool:
        return sum(problem("", reply) is None for reply in replies) >= self._enough
