"""What a run keeps besides its accuracies: the class-prior curve, and the prototypes of two rounds."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict

from client_app.app import evaluate
from framp.engines import InProcessGrid, run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.methods import settings_of
from framp_core.metrics import PriorCurve
from framp_core.run_folder import PRIOR_CURVE, RunFolder
from server_app.app import serve
from tests.server_app.runs import app_with

Build = Callable[..., FrampConfig]
SKEWED: dict[str, Scalar] = {"partition.scheme": "balanced-dirichlet", "partition.alpha": 0.3}


def test_the_prior_curve_holds_the_reported_accuracies_at_their_strengths(tiny: Build) -> None:
    strengths = {"evaluation.local-prior-strength": 0.5, "evaluation.union-prior-strength": 0.0}
    run = run_local(tiny({**SKEWED, **strengths}))
    content = run.json(PRIOR_CURVE)
    assert (content["round"], content["strengths"]) == (2, [0.0, 0.25, 0.5, 1.0])
    curve = PriorCurve.of(content)
    last = {(row.client, row.population): row for row in run.clients() if row.round == 2}
    measured = {key for key, row in last.items() if key[1] == "local" or (key[1], row.role) == ("union", "train")}
    assert {(row.client, row.population) for row in curve.clients} == measured
    assert {row.role for row in curve.clients} == {"train", "unseen"}
    for row in curve.clients:
        place = curve.strengths.index(0.5 if row.population == "local" else 0.0)
        same = last[row.client, row.population]
        assert (row.correct[place], row.total, row.capacity) == (same.correct, same.total, same.capacity)
    assert any(len(set(row.correct)) > 1 for row in curve.clients)


def test_without_strengths_nothing_is_swept_and_no_number_changes(tiny: Build) -> None:
    with_curve, without = (
        run_local(tiny({**SKEWED, "evaluation.prior-strengths": each}, f"run-{len(each)}")) for each in ("0,1", "")
    )
    assert with_curve.has(PRIOR_CURVE)
    assert not without.has(PRIOR_CURVE)
    assert with_curve.clients() == without.clients()


@pytest.mark.parametrize("counts", [[1], [1, 2, 3], [1, 10**6], [0.5, 0.5], None])
def test_prior_counts_that_make_no_sense_are_refused(counts: list[float] | None, tiny: Build) -> None:
    def evaluated(message: Message, context: Context) -> Message:
        reply = evaluate(message, context)
        if context.node_config["partition-id"] != 1 or not message.content["config"]["final"]:
            return reply
        metrics = dict(reply.content["metrics"])
        del metrics["local-prior-correct"]
        changed = metrics if counts is None else {**metrics, "local-prior-correct": counts}
        return Message(RecordDict({"metrics": MetricRecord(changed)}), reply_to=message)

    config = tiny({"evaluation.prior-strengths": "0,1"})
    with InProcessGrid(app_with(evaluates=evaluated), config.partition.nodes, config.to_flat()) as grid:
        run = serve(grid, config)
    last = [event for event in run.events() if event["kind"] == "evaluate"][-1]
    assert [row["client"] for row in last["refused"]] == ["client-0001"]
    assert "client-0001" not in {row["client"] for row in [*last["accuracies"], *run.json(PRIOR_CURVE)["clients"]]}
    assert len({row["client"] for row in last["accuracies"]}) == 4


def test_prototypes_of_the_first_aligned_round_and_of_the_last_are_kept(tiny: Build) -> None:
    one_client = {"server.clients-per-round": 1, "server.prototype-decay": 0.0, "local.alignment-weight": 0.1}
    config = tiny({**SKEWED, **one_client, "rounds": 4})
    run: RunFolder = run_local(config)
    kept = run.prototypes()
    assert list(kept) == [2, 4]
    tensors, _ = run.read_checkpoint()
    last = kept[4]
    seen = tensors["prototypes.counts"].numpy() > 0
    np.testing.assert_array_equal(last["global.classes"], np.flatnonzero(seen))
    np.testing.assert_array_equal(last["global.means"], tensors["prototypes.means"].numpy()[seen])
    # One client and no past: what it sent is the global prototype of the classes that it holds.
    own = np.isin(last["global.classes"], last["local.classes"])
    np.testing.assert_array_equal(last["global.means"][own], last["local.means"])
    assert not np.array_equal(kept[2]["global.means"], last["global.means"])


@pytest.mark.parametrize("settings", [{"local.alignment-weight": 0.0}, settings_of("heterofl", {})])
def test_without_prototypes_there_is_nothing_to_keep(settings: dict[str, Scalar], tiny: Build) -> None:
    run = run_local(tiny(settings))
    assert run.prototypes() == {}
    assert not (run.path / "figures" / "prototypes.png").exists()
