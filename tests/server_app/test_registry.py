from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ConfigRecord

from client_app.app import app as client_app
from framp.engines import InProcessGrid
from framp_core.codec import PROTOCOL_VERSION
from framp_core.config import FrampConfig, Scalar
from framp_core.errors import EngineError
from framp_core.fingerprint import code_fingerprint
from server_app.registry import ClientRegistry

Build = Callable[..., FrampConfig]
INSTRUCTION = ConfigRecord({"fingerprint": code_fingerprint(), "protocol-version": PROTOCOL_VERSION, "round": 0})


class Nodes(InProcessGrid):
    """A grid whose nodes can be switched off and on."""

    def __init__(self, config: FrampConfig, node_configs: list[dict[str, Scalar]] | None = None) -> None:
        super().__init__(client_app, config.partition.nodes, config.to_flat(), node_configs=node_configs)
        self.offline: set[int] = set()

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node not in self.offline]


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
    parts: list[dict[str, Scalar]] = [{"partition-id": index % 5, "num-partitions": 5} for index in range(6)]
    with Nodes(config, parts) as grid:
        grid.offline = {1005}
        registry.wait(grid)
        before = registry.clients["client-0000"]
        grid.offline = {1000}
        registry.refresh(grid, 1.0)
    after = registry.clients["client-0000"]
    assert (before.node_id, after.node_id) == (1000, 1005)
    assert np.array_equal(before.descriptor, after.descriptor)
    assert len(registry.online()) == 5


def test_two_connected_nodes_of_one_name_are_refused(tiny: Build) -> None:
    config = tiny()
    registry = ClientRegistry(config, INSTRUCTION)
    parts: list[dict[str, Scalar]] = [{"partition-id": index % 5, "num-partitions": 5} for index in range(6)]
    with Nodes(config, parts) as grid:
        registry.wait(grid)
        registry.refresh(grid, 1.0)
    assert len(registry.clients) == 5
    assert any("client-name" in refusal.error for refusal in registry.refused)


def test_a_late_client_is_served_once_seen(tiny: Build) -> None:
    config = tiny({"server.discovery-deadline": 0.5})
    registry = ClientRegistry(config, INSTRUCTION)
    with Nodes(config) as grid:
        grid.offline = {1003}
        registry.wait(grid)
        assert len(registry.online()) == 4
        grid.offline = set()
        registry.refresh(grid, 1.0)
        assert len(registry.online()) == 5


def test_node_configuration_may_set_name_and_capacity(tiny: Build) -> None:
    config = tiny({"partition.clients": 1, "partition.unseen-clients": 0})
    registry = ClientRegistry(config, INSTRUCTION)
    own: dict[str, Scalar] = {"partition-id": 0, "num-partitions": 1, "client-name": "site-a", "capacity": 0.125}
    with Nodes(config, [own]) as grid:
        registry.wait(grid)
    assert [(client.name, str(client.capacity)) for client in registry.online()] == [("site-a", "1/8")]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"partition-id": 0, "num-partitions": 1, "capacity": 1.5}, r"outside \(0, 1\]"),
        ({"partition-id": 0, "num-partitions": 1, "data-dir": "relative"}, "absolute"),
        ({}, "partition-id"),
    ],
)
def test_bad_node_configuration_reaches_the_operator(tiny: Build, node: dict[str, Scalar], words: str) -> None:
    config = tiny({"partition.clients": 1, "partition.unseen-clients": 0, "server.discovery-deadline": 0.3})
    with Nodes(config, [node or {"nothing": 0}]) as grid, pytest.raises(EngineError, match=words):
        ClientRegistry(config, INSTRUCTION).wait(grid)
