import json
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from client_app.app import app as client_app
from framp.engines import InProcessGrid
from framp_core.codec import decode_descriptor
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.errors import EngineError, ResumeError
from framp_core.fingerprint import code_fingerprint
from server_app.registry import ClientRegistry

Build = Callable[..., FrampConfig]
Node = dict[str, Scalar]
INSTRUCTION = ConfigRecord({"fingerprint": code_fingerprint(), "round": 0})


class Nodes(InProcessGrid):
    """A grid whose nodes can be switched off, and can hang."""

    def __init__(self, config: FrampConfig, node_configs: list[Node] | None = None) -> None:
        super().__init__(client_app, config.partition.nodes, config.to_flat(), node_configs=node_configs)
        self.offline: set[int] = set()
        self.hanging: set[int] = set()
        self.asked: list[int] = []

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        self.asked += [message.metadata.dst_node_id for message in messages]
        keys = super().push_messages(messages)
        for message in messages:
            if message.metadata.dst_node_id in self.hanging:
                self._replies.pop(message.metadata.message_id)
        return keys

    def configure(self, node: int, **values: Scalar) -> None:
        self._contexts[node].node_config.update(values)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused nodes are asked again at every poll."""
    monkeypatch.setattr("server_app.registry.RETRY_SECONDS", 0.0)


def parts(count: int, of: int = 5) -> list[Node]:
    return [{"partition-id": index % of, "num-partitions": of} for index in range(count)]


def test_clients_are_known_by_name(tiny: Build) -> None:
    config = tiny()
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config) as grid:
        registry.wait(grid)
    assert [client.name for client in registry.online()] == [f"client-{index:04d}" for index in range(5)]
    assert [client.name for client in registry.online("unseen")] == ["client-0004"]
    assert {str(client.capacity) for client in registry.online("train")} == {"1/64", "1/16", "1/4", "1"}


def test_a_client_that_comes_back_with_another_node_id_is_the_same_client(tiny: Build) -> None:
    config = tiny()
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config, parts(6)) as grid:
        grid.offline = {1005}
        registry.wait(grid)
        before = registry.clients["client-0000"]
        grid.offline = {1000}
        registry.poll(grid)
    after = registry.clients["client-0000"]
    assert (before.node_id, after.node_id) == (1000, 1005)
    assert np.array_equal(before.descriptor, after.descriptor)
    assert len(registry.online()) == 5


def test_a_restarted_node_takes_over_once_its_old_id_is_gone(tiny: Build) -> None:
    """Flower shows the old id as connected for about a minute after a restart without authentication."""
    config = tiny()
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config, parts(6)) as grid:
        grid.offline = {1005}
        registry.wait(grid)
        grid.offline = set()
        registry.poll(grid)
        assert registry.clients["client-0000"].node_id == 1000
        assert "client-name" in registry.take_refusals()[0].error
        grid.offline = {1000}
        registry.poll(grid)
    assert registry.clients["client-0000"].node_id == 1005
    assert len(registry.online()) == 5


def test_a_node_that_reconnects_with_its_old_id_is_asked_again(tiny: Build) -> None:
    config = tiny()
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config) as grid:
        registry.wait(grid)
        grid.offline = {1000}
        registry.poll(grid)
        grid.offline = set()
        grid.configure(1000, capacity="1/2")
        registry.poll(grid)
        assert str(registry.clients["client-0000"].capacity) == "1/2"
        registry.poll(grid)
    assert grid.asked == [1000, 1001, 1002, 1003, 1004, 1000]


def test_a_repaired_node_is_admitted(tiny: Build) -> None:
    config = tiny({"server.discovery-deadline": 0.3})
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config) as grid:
        grid.configure(1002, capacity=1.5)
        registry.wait(grid)
        assert "client-0002" not in registry.clients
        grid.configure(1002, capacity=0.5)
        registry.poll(grid)
    assert "client-0002" in registry.clients
    assert [refusal.client for refusal in registry.take_refusals()] == ["node 1002"]


def test_a_hanging_node_holds_nobody_up(tiny: Build) -> None:
    config = tiny({"server.discovery-deadline": 0.5})
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config) as grid:
        grid.hanging = {1001}
        registry.wait(grid)
        for _ in range(10):
            registry.require(grid, 1)
    assert len(registry.online()) == 4
    assert grid.asked.count(1001) <= 2


def test_clients_that_differ_from_the_majority_are_refused(tiny: Build) -> None:
    config = tiny()
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config, [{"partition-id": 0, "num-partitions": 3}, *parts(5)[1:]]) as grid:
        registry.wait(grid)
    assert sorted(registry.clients) == [f"client-000{index}" for index in range(1, 5)]
    (refusal,) = registry.take_refusals()
    assert "over 3 nodes" in refusal.error
    assert "over 5 nodes" in refusal.error


def test_a_late_client_is_served_once_seen(tiny: Build) -> None:
    config = tiny({"server.discovery-deadline": 0.3})
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config) as grid:
        grid.offline = {1003}
        registry.wait(grid)
        assert len(registry.online()) == 4
        grid.offline = set()
        registry.poll(grid)
        assert len(registry.online()) == 5


def test_a_round_waits_for_enough_clients_and_not_for_ever(tiny: Build) -> None:
    config = tiny({"server.discovery-deadline": 0.3})
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config) as grid:
        registry.wait(grid)
        registry.require(grid, 4)
        grid.offline = {1000, 1001}
        with pytest.raises(EngineError, match=r"2 clients that train .* asks for 3"):
            registry.require(grid, 3)


def test_node_configuration_may_set_name_and_capacity(tiny: Build) -> None:
    config = tiny({"partition.clients": 1, "partition.unseen-clients": 0})
    registry = ClientRegistry(config, INSTRUCTION)
    own: Node = {"partition-id": 0, "num-partitions": 1, "client-name": "site-a", "capacity": 0.125}
    with Nodes(config, [own]) as grid:
        registry.wait(grid)
    assert [(client.name, str(client.capacity)) for client in registry.online()] == [("site-a", "1/8")]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"partition-id": 0, "num-partitions": 1, "capacity": 1.5}, r"outside \(0, 1\]"),
        ({"partition-id": 0, "num-partitions": 1, "data-dir": "relative"}, "absolute"),
        ({"nothing": 0}, "partition-id"),
    ],
)
def test_bad_node_configuration_reaches_the_operator(tiny: Build, node: Node, words: str) -> None:
    config = tiny({"partition.clients": 1, "partition.unseen-clients": 0, "server.discovery-deadline": 0.3})
    with Nodes(config, [node]) as grid, pytest.raises(EngineError, match=words):
        ClientRegistry(config, INSTRUCTION).wait(grid)


def test_a_descriptor_of_absurd_size_is_refused(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.registry.decode_descriptor", lambda blob: 1e30 * decode_descriptor(blob))
    config = tiny({"server.discovery-deadline": 0.1})
    with Nodes(config) as grid, pytest.raises(EngineError, match="norm 1e\\+30"):
        ClientRegistry(config, INSTRUCTION).wait(grid)


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": "1e-9_9_9_9_9_9_9"},
        {"name": "=1+1"},
        {"name": "x" * 10**6},
        {"shape": [2**20, 2**20, 2**20]},
        {"unknown": 1},
    ],
)
def test_a_checkpoint_with_clients_of_another_version_is_refused_by_name(
    tiny: Build, change: dict[str, object]
) -> None:
    config = tiny()
    registry, again = ClientRegistry(config, INSTRUCTION), ClientRegistry(config, INSTRUCTION)
    with Nodes(config) as grid:
        registry.wait(grid)
    descriptors, rows = registry.state()
    rows = json.loads(json.dumps(rows))
    again.restore(descriptors, rows)
    assert json.loads(json.dumps(again.state()[1])) == rows
    rows[2] |= change
    with pytest.raises(ResumeError, match="not as this version notes them"):
        ClientRegistry(config, INSTRUCTION).restore(descriptors, rows)
    del rows[2]["role"]
    with pytest.raises(ResumeError, match="not as this version notes them"):
        ClientRegistry(config, INSTRUCTION).restore(descriptors, rows)
