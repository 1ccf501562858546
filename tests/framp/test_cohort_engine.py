"""The in-process engine with clients as one program: workers change nothing, and what fails fails alone."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client_app.app import app
from client_app.cohort import train_together
from framp.engines import InProcessGrid, run_local
from framp.engines.calibration import settle_engine
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import load_client
from framp_core.methods import METHODS
from server_app.app import serve
from tests.server_app.runs import measured
from tests.small_graph import save_small_graph

Build = Callable[..., FrampConfig]
SEVEN: dict[str, Scalar] = {
    "partition.clients": 7,
    "server.clients-per-round": 7,
    "partition.scheme": "balanced-dirichlet",
    "local.steps": 4,
}


def test_workers_change_no_number_of_a_cohort(tiny: Build, stacked_calls: dict[str, list[int]]) -> None:
    one, several = (
        measured(run_local(tiny({**SEVEN, "engine.cohort": 4, "engine.workers": workers}, str(workers))))
        for workers in (1, 3)
    )
    assert one == several
    assert stacked_calls["train"] == [3, 4, 3, 4]  # Two rounds in this process; 4 at a time.


@pytest.mark.parametrize("cohort", [2, 4, 7])
def test_the_first_round_is_that_of_clients_one_by_one_up_to_rounding(tiny: Build, cohort: int) -> None:
    def trained(cohort: int) -> dict[str, object]:
        run = run_local(tiny({**SEVEN, "rounds": 1, "engine.cohort": cohort}, str(cohort)))
        return next(row for row in run.events() if row["kind"] == "train")

    mine, alone = trained(cohort)["clients"], trained(1)["clients"]
    assert len(mine) == len(alone) == 7  # type: ignore[arg-type]
    for together, single in zip(mine, alone, strict=True):  # type: ignore[call-overload]
        assert together["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert together["loss"] != 0
        assert {key: together[key] for key in together if "bytes" in key} == {
            key: single[key] for key in single if "bytes" in key
        }


def test_a_client_that_cannot_work_fails_alone(tiny: Build, stacked_calls: dict[str, list[int]]) -> None:
    config = tiny({**SEVEN, "rounds": 1})
    nodes = config.partition.nodes
    configs: list[dict[str, Scalar]] = [{"partition-id": index, "num-partitions": nodes} for index in range(nodes)]
    grid = InProcessGrid(app, nodes, config.to_flat(), together=_broken_for_the_third, cohort=7, node_configs=configs)
    with grid:
        run = serve(grid, config)
    trained = next(row for row in run.events() if row["kind"] == "train")
    assert len(trained["clients"]) == 6
    (refused,) = trained["refused"]
    assert "lacks 'fingerprint'" in refused["error"]
    assert stacked_calls["train"] == [6]


def _broken_for_the_third(messages: list[Message], contexts: list[Context]) -> list[Message]:
    messages[2].content["config"] = ConfigRecord({"round": 1})
    return train_together(messages, contexts)


def test_slim_networks_are_stacked_by_their_size(tiny: Build, stacked_calls: dict[str, list[int]]) -> None:
    slim = {**METHODS["heterofl"].settings, **SEVEN, "rounds": 1, "capacity.sizes": "1/16,1", "engine.cohort": 7}
    trained = next(row for row in run_local(tiny(slim)).events() if row["kind"] == "train")
    assert len(trained["clients"]) == 7
    assert sorted(stacked_calls["train"]) == [3, 4]


def test_graphs_are_not_stacked(tiny: Build, tmp_path: Path, stacked_calls: dict[str, list[int]]) -> None:
    graph = save_small_graph(tmp_path / "small.npz")
    alone = measured(run_local(tiny(graph, "alone")))
    assert measured(run_local(tiny({**graph, "engine.cohort": 3}, "together"))) == alone
    assert stacked_calls["train"] == []


def test_zeros_become_numbers_that_the_run_keeps(
    tiny: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framp.engines.calibration._cores", lambda: 3)
    asked = tiny({**SEVEN, "rounds": 1, "engine.cohort": 0, "engine.workers": 0, "local.threads": 2})
    with caplog.at_level(logging.INFO, logger="flwr.framp"):
        run = run_local(asked)
    assert run.config.engine.workers == 1, "three cores have room for one worker of two threads"
    assert run.config.engine.cohort in {1, 4, 7}
    assert f"engine.cohort=0 becomes {run.config.engine.cohort}: per client and step" in caplog.text


def test_clients_with_fewer_images_than_a_batch_are_measured_too(tiny: Build) -> None:
    skew: dict[str, Scalar] = {"partition.scheme": "dirichlet", "partition.alpha": 0.1, "local.batch-size": 64}
    skewed = tiny({**SEVEN, **skew, "engine.cohort": 0})
    sizes = [len(load_client(skewed, number, skewed.partition.nodes).train) for number in range(7)]
    assert min(sizes) < skewed.local.batch_size < max(sizes)
    assert settle_engine(skewed).engine.cohort in {1, 4, 7}


def test_numbers_that_were_given_are_left_alone(tiny: Build, caplog: pytest.LogCaptureFixture) -> None:
    asked = tiny({"engine.cohort": 5, "engine.workers": 3})
    assert settle_engine(asked) == asked
    assert not caplog.text


def test_a_graph_is_not_measured(tiny: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny({**save_small_graph(tmp_path / "small.npz"), "engine.cohort": 0})
    assert settle_engine(config).engine.cohort == 1
    assert "per client and step" not in caplog.text


def test_an_answer_to_nothing(tiny: Build) -> None:
    config = tiny()
    with InProcessGrid(app, 2, config.to_flat(), together=train_together, cohort=5) as grid:
        assert list(grid.send_and_receive([])) == []
        wrong = grid.create_message(RecordDict(), "train", 1000, "1")
        (reply,) = grid.send_and_receive([wrong])
        assert "records config and framp" in str(reply.content["error"]["reason"])  # type: ignore[index]
