import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app
from client_app.client import Client
from framp_core.codec import Reference, decode_update, encode_mask_part, encode_submodel
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.fingerprint import code_fingerprint
from framp_core.layout import ParameterLayout
from framp_core.masking import extract
from framp_core.models import build_model, initial_parameters

Build = Callable[..., FrampConfig]


def ask(
    config: FrampConfig,
    kind: str,
    payload: bytes = b"",
    node: dict[str, Scalar] | None = None,
    state: RecordDict | None = None,
    **instruction: Scalar,
) -> RecordDict:
    """The content of the ClientApp's reply."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    settings = {"fingerprint": code_fingerprint(), "round": 1, **instruction}
    content = RecordDict({"config": ConfigRecord(settings), "framp": ConfigRecord({"payload": payload})})
    message = Message(content, 5, kind)
    message.metadata.__dict__["_message_id"] = "id"
    node = {"partition-id": 0, "num-partitions": config.partition.nodes} if node is None else node
    state = RecordDict() if state is None else state
    context = Context(run_id=1, node_id=5, node_config=node, state=state, run_config=config.to_flat())
    return app(message, context).content


def submodel(config: FrampConfig, capacity: float = 0.25) -> tuple[bytes, np.ndarray, ParameterLayout]:
    model = build_model(config.model, (1, 8, 8), 10)
    layout = ParameterLayout.of(model)
    theta = initial_parameters(model, 0).numpy()
    mask = extract(theta, layout, config.extraction, capacity)
    return encode_submodel(theta[mask], mask, None, layout, "float32").blob, mask, layout


def test_train_answers_with_a_delta_on_the_kept_positions(tiny: Build) -> None:
    config = tiny({"capacity.sizes": "1/4"})
    blob, mask, layout = submodel(config)
    content = ask(config, "train", blob)
    update = decode_update(content["framp"]["payload"], layout, mask, 10, 8)
    assert update.delta_kept.shape == (mask.sum(),)
    assert np.abs(update.delta_kept).max() > 0
    assert content["metrics"]["steps"] == config.local.steps


def test_instructions_override_the_configuration_for_one_message(tiny: Build) -> None:
    config = tiny({"capacity.sizes": "1/4"})
    blob, *_ = submodel(config)
    assert ask(config, "train", blob, **{"local.steps": 3})["metrics"]["steps"] == 3
    assert ask(config, "train", blob)["metrics"]["steps"] == config.local.steps


def test_evaluate_counts_are_those_of_a_plain_loop(tiny: Build) -> None:
    config = tiny({"evaluation.local-prior-strength": 0.0, "capacity.sizes": "1/4"})
    blob, mask, _ = submodel(config)
    metrics = ask(config, "evaluate", blob)["metrics"]
    client = Client.of(config.to_flat(), {"partition-id": 0, "num-partitions": 5}, {})
    model = build_model(config.model, (1, 8, 8), 10)
    theta = torch.from_numpy(initial_parameters(model, 0).numpy() * mask)
    parameters = ParameterLayout.of(model).split(theta)
    for name, images in (("local", client.data.test), ("union", client.data.union_test)):
        correct = 0
        for position in range(len(images)):
            image, label = images.batch(np.array([position]))
            names = [name for name, _ in model.named_parameters()]
            state = dict(zip(names, parameters, strict=True))
            logits, _ = torch.func.functional_call(model, state, (client.data.train.normaliser(image),))
            correct += int(logits.argmax() == label)
        assert metrics[f"{name}-total"] == len(images)
        assert abs(metrics[f"{name}-correct"] - correct) <= 1  # a tie within rounding may fall either way


def test_the_last_evaluation_also_counts_at_each_strength_of_the_prior(tiny: Build) -> None:
    def metrics(final: bool, **evaluation: Scalar) -> dict[str, object]:
        keys = {f"evaluation.{key}": value for key, value in evaluation.items()}
        config = tiny({"partition.scheme": "balanced-dirichlet", "capacity.sizes": "1/4", **keys})
        return dict(ask(config, "evaluate", submodel(config)[0], final=final)["metrics"])

    swept = metrics(True, **{"prior-strengths": "0,0.3,2"})
    by_hand = [
        metrics(False, **{"local-prior-strength": each, "union-prior-strength": each}) for each in (0.0, 0.3, 2.0)
    ]
    for population in ("local", "union"):
        assert swept[f"{population}-prior-correct"] == [each[f"{population}-correct"] for each in by_hand]
    assert len(set(swept["union-prior-correct"])) > 1
    assert {key for key in swept if "prior" in key} == {"local-prior-correct", "union-prior-correct"}
    for other in (metrics(False), metrics(True, **{"prior-strengths": ""})):
        assert other == {key: value for key, value in swept.items() if "prior" not in key}


def test_union_can_be_a_sample(tiny: Build) -> None:
    blob, *_ = submodel(tiny())
    for limit, total in ((50, 50), (0, None)):
        config = tiny({"evaluation.union-examples": limit, "capacity.sizes": "1/4"})
        union = Client.of(config.to_flat(), {"partition-id": 0, "num-partitions": 5}, {}).data.union_test
        assert ask(config, "evaluate", blob)["metrics"]["union-total"] == (total or len(union))
        assert len(union) > 50


def test_torch_threads_are_fixed_during_work_and_restored(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Client, "describe", lambda self: seen.append(torch.get_num_threads()) or b"")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ask(tiny({"local.threads": 1}), "query.describe")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


@pytest.mark.parametrize("kind", ["query.describe", "train", "evaluate"])
def test_every_failure_is_a_message_with_a_traceback(tiny: Build, kind: str) -> None:
    content = ask(tiny(), kind, node={"partition-id": 99, "num-partitions": 5})
    error = content["error"]
    assert "99" in error["reason"]
    assert "Traceback" in error["traceback"]


def test_garbled_payload_is_a_protocol_error(tiny: Build) -> None:
    blob, *_ = submodel(tiny())
    assert ask(tiny(), "train", blob[:-3])["error"]["type"] == "TruncatedMessageError"


def test_other_code_is_refused_by_name_of_its_folder(tiny: Build) -> None:
    error = ask(tiny(), "train", b"", fingerprint="f" * 64)["error"]
    assert error["type"] == "FingerprintMismatchError"
    assert "framp_core" not in error["reason"]
    assert code_fingerprint()[:12] in error["reason"]


def test_unknown_override_is_refused(tiny: Build) -> None:
    blob, *_ = submodel(tiny())
    assert "did you mean" in ask(tiny(), "train", blob, **{"local.step": 3})["error"]["reason"]


def test_a_server_may_not_redirect_a_client(tiny: Build) -> None:
    blob, *_ = submodel(tiny())
    error = ask(tiny(), "train", blob, **{"data.root": "/etc"})["error"]
    assert error["type"] == "ProtocolError"
    assert "data.root" in error["reason"]


def test_the_nodes_own_data_folder_wins(tiny: Build, tmp_path: Path) -> None:
    node: dict[str, Scalar] = {"partition-id": 0, "num-partitions": 5, "data-dir": str(tmp_path / "own")}
    config = tiny({"data.name": "image-folder", "data.root": str(tmp_path / "shared")})
    reason = ask(config, "query.describe", node=node)["error"]["reason"]
    assert "own" in reason
    assert "shared" not in reason


def test_state_of_the_node_is_untouched_without_a_reference(tiny: Build) -> None:
    """A handler that changed ``Context.state`` and then failed would behave differently on each engine."""
    config = tiny({"capacity.sizes": "1/4"})
    blob, *_ = submodel(config)
    for kind, payload in (("query.describe", b""), ("train", blob), ("evaluate", blob), ("train", b"garbage")):
        state = RecordDict()
        ask(config, kind, payload, state=state)
        assert list(state) == []


def test_a_reference_is_held_from_one_message_to_the_next(tiny: Build) -> None:
    config = tiny({"capacity.sizes": "1/4"})
    _, mask, layout = submodel(config)
    kept, sizes = mask[layout.maskable], layout.maskable_sizes
    other = kept.copy()
    other[[np.flatnonzero(kept)[0], np.flatnonzero(~kept)[0]]] ^= True
    first, second = Reference.of(other), Reference.of(kept)
    values = initial_parameters(build_model(config.model, (1, 8, 8), 10), 0).numpy()[mask]

    def message(held: Reference | None, new: Reference | None) -> bytes:
        code = encode_mask_part(kept, sizes, held, new)
        return encode_submodel(values, mask, None, layout, "float32", code).blob

    state = RecordDict()
    plain = ask(config, "train", message(None, None))["framp"]["payload"]
    for kind, held, new, after in (
        ("train", None, first, first),
        ("evaluate", first, None, first),
        ("train", first, second, second),
        ("train", None, None, second),
    ):
        content = ask(config, kind, message(held, new), state=state)
        assert content["framp"]["reference"] == after.name
        assert content["framp"].get("payload", plain) == plain
        assert ask(config, "query.describe", state=state)["framp"]["reference"] == after.name
        assert list(state) == ["framp-reference"]
    for held, elsewhere in ((first, state), (second, RecordDict())):
        error = ask(config, "train", message(held, None), state=elsewhere)["error"]
        assert error["type"] == "UnknownReferenceError"
        assert f"{held.name:08x}" in error["reason"]
    assert ask(config, "train", message(second, None), state=state)["framp"]["payload"] == plain


@pytest.mark.parametrize("record", [{}, {"name": 5, "mask": b"\x30\x01"}, {"name": "text", "mask": 5}])
def test_a_damaged_state_counts_as_no_reference(tiny: Build, record: dict[str, int | str | bytes]) -> None:
    config = tiny({"capacity.sizes": "1/4"})
    blob, mask, layout = submodel(config)
    state = RecordDict({"framp-reference": ConfigRecord(record)})
    assert "payload" in ask(config, "train", blob, state=state)["framp"]
    code = encode_mask_part(mask[layout.maskable], layout.maskable_sizes, Reference.of(mask[layout.maskable]))
    values = np.zeros(mask.sum(), np.float32)
    flips = encode_submodel(values, mask, None, layout, "float32", code).blob
    assert ask(config, "train", flips, state=state)["error"]["type"] == "UnknownReferenceError"


def test_a_submodel_of_another_size_is_refused(tiny: Build) -> None:
    config = tiny({"capacity.sizes": "1/4"})
    blob, *_ = submodel(config, capacity=0.5)
    assert ask(config, "train", blob)["error"]["type"] == "MaskMismatchError"


def test_augmentation_at_test_touches_the_clients_own_test_images_alone(tiny: Build) -> None:
    blob, *_ = submodel(tiny(), capacity=1.0)

    def counts(server_round: int = 1, **values: Scalar) -> dict[str, int]:
        flat: dict[str, Scalar] = {"capacity.sizes": "1", "partition.clients": 1, "partition.unseen-clients": 4}
        config = tiny({**flat, **values})
        return dict(ask(config, "evaluate", blob, round=server_round)["metrics"])

    augmented: dict[str, Scalar] = {"evaluation.augment": True}
    clean, first = counts(), counts(**augmented)
    assert counts(**augmented) == first
    assert {key for key in clean if clean[key] != first[key]} <= {"local-correct"}
    locals_of_rounds = {counts(number, **augmented)["local-correct"] for number in range(1, 6)}
    assert len(locals_of_rounds | {clean["local-correct"]}) > 1
    fine_tuned = tiny({**augmented, "capacity.sizes": "1", "evaluation.fine-tune-steps": 1})
    assert "local-correct-tuned" in ask(fine_tuned, "evaluate", blob, final=True)["metrics"]


def test_a_client_starts_without_the_libraries_that_it_seldom_needs() -> None:
    """On a device a process starts for every message, and these take longer to import than PyTorch."""
    code = "import sys, client_app.app; print(*{'sklearn', 'torchvision', 'scipy', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
