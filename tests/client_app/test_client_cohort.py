"""Messages answered together: the replies that each client would have given, prototypes among them."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app
from client_app.cohort import train_together
from framp_core.codec import Update, decode_update, encode_submodel
from framp_core.cohort import StackedNetworks
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import load_client
from framp_core.fingerprint import code_fingerprint
from framp_core.masking import extract
from framp_core.models import FlatModel, build_model, initial_parameters

Build = Callable[..., FrampConfig]
CLIENTS = 4
BASE: dict[str, Scalar] = {"partition.clients": CLIENTS, "partition.unseen-clients": 0, "capacity.sizes": "1/4"}
CASES: dict[str, tuple[dict[str, Scalar], int]] = {
    "even": ({"partition.scheme": "balanced-dirichlet"}, 1),
    "one holds most": ({"partition.scheme": "dirichlet", "partition.alpha": 0.1}, 0),
    "batch statistics": ({"partition.scheme": "balanced-dirichlet", "model.normalisation": "batch-statistics"}, 0),
    "not aligned": ({"partition.scheme": "balanced-dirichlet", "local.alignment-weight": 0.0}, 0),
}


class Trial:
    """A network, a submodel of it, and a message to train it for each client."""

    def __init__(self, config: FrampConfig) -> None:
        self._config = config
        self._network = FlatModel(build_model(config.model, (1, 8, 8), 10))
        theta = initial_parameters(self._network.model, 0).numpy()
        self._mask = extract(theta, self._network.layout, config.extraction, 0.25)
        self._payload = encode_submodel(theta[self._mask], self._mask, None, self._network.layout, "float32").blob

    def exchanges(self) -> tuple[list[Message], list[Context]]:
        """A train message for every client, and the context of its node."""
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        messages, contexts = [], []
        for number in range(CLIENTS):
            instruction = ConfigRecord({"fingerprint": code_fingerprint(), "round": 1})
            content = RecordDict({"config": instruction, "framp": ConfigRecord({"payload": self._payload})})
            messages.append(Message(content, number, "train"))
            messages[-1].metadata.__dict__["_message_id"] = str(number)
            node: dict[str, Scalar] = {"partition-id": number, "num-partitions": CLIENTS}
            contexts.append(Context(1, number, node, RecordDict(), self._config.to_flat()))
        return messages, contexts

    def update(self, reply: Message) -> Update:
        layout, features = self._network.layout, self._network.model.feature_size
        return decode_update(reply.content["framp"]["payload"], layout, self._mask, 10, features)


@pytest.mark.parametrize("name", CASES)
def test_every_client_answers_as_it_would_alone(name: str, tiny: Build, stacked_calls: dict[str, list[int]]) -> None:
    values, joint_passes = CASES[name]
    config = tiny(BASE | values)
    counts = [len(load_client(config, number, CLIENTS).train) for number in range(CLIENTS)]
    assert (CLIENTS * max(counts) > 1.5 * sum(counts)) == (name == "one holds most")
    trial = Trial(config)
    together = train_together(*trial.exchanges())
    assert stacked_calls["prototypes"] == [CLIENTS] * joint_passes
    for mine, message, context in zip(together, *trial.exchanges(), strict=True):
        got, expected = trial.update(mine), trial.update(app(message, context))
        assert mine.metadata.reply_to_message_id == message.metadata.message_id
        np.testing.assert_allclose(got.delta_kept, expected.delta_kept, atol=1e-5)
        assert got.prototypes is not None
        assert expected.prototypes is not None
        np.testing.assert_array_equal(got.prototypes.classes, expected.prototypes.classes)
        np.testing.assert_array_equal(got.prototypes.counts, expected.prototypes.counts)
        np.testing.assert_allclose(got.prototypes.means, expected.prototypes.means, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("broken", ["train", "prototypes"])
def test_a_program_that_fails_leaves_every_client_to_itself(
    broken: str, tiny: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = getattr(StackedNetworks, broken)

    def late_failure(self: StackedNetworks, clients: object) -> None:
        original(self, clients)
        raise RuntimeError("no room")

    monkeypatch.setattr(StackedNetworks, broken, late_failure)
    trial = Trial(tiny(BASE | CASES["even"][0]))
    together = train_together(*trial.exchanges())
    assert "4 clients train one by one, as their program failed: no room" in caplog.text
    for mine, message, context in zip(together, *trial.exchanges(), strict=True):
        alone = app(message, context)
        assert mine.content["framp"]["payload"] == alone.content["framp"]["payload"], "bit for bit"
