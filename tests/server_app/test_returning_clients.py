"""Masks as flips in whole runs: what they save, that they change no number, and what happens to those who forget."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.app import app as client_app
from client_app.app import train
from framp.engines import InProcessGrid
from framp_core.codec import encode_mask_part
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.mask_references import CodedMask, MaskReferences
from framp_core.run_folder import RunFolder
from server_app.app import serve
from tests.server_app.runs import app_with

Build = Callable[..., FrampConfig]
SETTINGS: dict[str, Scalar] = {
    "rounds": 4,
    "capacity.sizes": "1/16,1/4",
    "model.widths": "16,32",
    "server.clients-per-round": 4,
    "evaluation.every": 2,
}


def run_with(config: FrampConfig, app: ClientApp = client_app) -> RunFolder:
    with InProcessGrid(app, config.partition.nodes, config.to_flat()) as nodes:
        return serve(nodes, config)


def trained(run: RunFolder) -> list[list[dict[str, object]]]:
    """Rows of the clients, round by round."""
    return [event["clients"] for event in run.events() if event["kind"] == "train"]


def test_returning_clients_are_sent_less_and_both_forms_are_reported(tiny: Build) -> None:
    run = run_with(tiny(SETTINGS))
    first, *later = trained(run)
    for row in first:
        assert row["mask_alone"] < row["down"]["mask"] <= 1.3 * row["mask_alone"]  # type: ignore[operator, index]
    for row in (row for rows in later for row in rows):
        assert row["down"]["mask"] < 0.6 * row["mask_alone"]  # type: ignore[operator, index]
    for event in (event for event in run.events() if event["kind"] == "evaluate"):
        assert event["mask_bytes"] < 0.6 * event["mask_alone_bytes"] < event["down_bytes"]


def test_no_number_depends_on_how_masks_travel(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(self: MaskReferences, client: str, size: object, kept: np.ndarray) -> CodedMask:
        code = encode_mask_part(kept, self._sizes)
        return CodedMask(code, len(code))

    flips = run_with(tiny(SETTINGS, "flips"))
    monkeypatch.setattr(MaskReferences, "code", alone)
    full = run_with(tiny(SETTINGS, "alone"))
    for run in (flips, full):
        assert len(trained(run)) == 4
    for one, other in zip(trained(flips), trained(full), strict=True):
        assert [(row["client"], row["loss"]) for row in one] == [(row["client"], row["loss"]) for row in other]
    assert (flips.path / "clients.csv").read_text() == (full.path / "clients.csv").read_text()
    sent = [sum(row["down"]["mask"] for rows in trained(run) for row in rows) for run in (flips, full)]  # type: ignore[index]
    assert sent[0] < sent[1]


def forgetful(lost_round: int) -> ClientApp:
    """A client app whose partition 1 loses its state before it trains in one round."""

    def trains(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1 and message.content["config"]["round"] == lost_round:
            context.state.clear()
        return train(message, context)

    return app_with(trains)


def test_a_client_that_lost_its_reference_is_refused_once_and_then_served_in_full(tiny: Build) -> None:
    run = run_with(tiny({**SETTINGS, "evaluation.every": 10}), forgetful(lost_round=2))
    refused = [event["refused"] for event in run.events() if event["kind"] == "train"]
    assert [len(rows) for rows in refused] == [0, 1, 0, 0]
    assert refused[1][0]["client"] == "client-0001"
    assert refused[1][0]["error"].startswith("UnknownReferenceError")
    shares = [
        row["down"]["mask"] / row["mask_alone"]  # type: ignore[operator, index]
        for rows in trained(run) for row in rows if row["client"] == "client-0001"
    ]  # fmt: skip
    assert [share > 1 for share in shares] == [True, True, False]  # in full in rounds 1 and 3, as flips in round 4


def test_a_client_whose_reply_is_lost_is_served_in_full_without_a_lost_round(tiny: Build) -> None:
    class Lossy(InProcessGrid):
        """Loses the replies of the first node in round 2."""

        def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
            replies = super().send_and_receive(messages, timeout=timeout)
            lost = min(self.get_node_ids())
            if messages and messages[0].content["config"]["round"] == 2:
                return [reply for reply in replies if reply.metadata.src_node_id != lost]
            return replies

    config = tiny({**SETTINGS, "evaluation.every": 10})
    with Lossy(client_app, config.partition.nodes, config.to_flat()) as nodes:
        run = serve(nodes, config)
    refused = [event["refused"] for event in run.events() if event["kind"] == "train"]
    assert [len(rows) for rows in refused] == [0, 1, 0, 0]
    third = {row["client"]: row["down"]["mask"] / row["mask_alone"] for row in trained(run)[2]}  # type: ignore[operator, index]
    name = refused[1][0]["client"]
    assert third.pop(name) > 1 > max(third.values())
