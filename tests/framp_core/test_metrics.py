import random
import statistics
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framp_core.errors import ProtocolError
from framp_core.metrics import COLUMNS, ClientAccuracy, PriorCounts, PriorCurve, Spread, by_capacity, summarise

SIZES = ("1/64", "1/16", "1/4", "1")


def row(client: str = "a", role: str = "train", capacity: str = "1", population: str = "local", correct: int = 1,
        total: int = 4, round: int = 1, moment: str = "before") -> ClientAccuracy:  # fmt: skip
    return ClientAccuracy(client, role, capacity, round, population, moment, correct, total)  # type: ignore[arg-type]


@st.composite
def evaluations(draw: st.DrawFn) -> list[ClientAccuracy]:
    rows = []
    for number in range(draw(st.integers(0, 25))):
        role, capacity = draw(st.sampled_from(["train", "unseen"])), draw(st.sampled_from(SIZES))
        for population in draw(st.sets(st.sampled_from(["local", "union", "validation"]), min_size=1)):
            total = draw(st.integers(1, 50))
            rows.append(row(f"c{number}", role, capacity, population, draw(st.integers(0, total)), total))
    return rows


def slow_spread(accuracies: list[float]) -> tuple[float, float, float, int] | None:
    if not accuracies:
        return None
    tenth = max(1, -(-len(accuracies) // 10))
    worst = statistics.fmean(sorted(accuracies)[:tenth])
    return statistics.fmean(accuracies), statistics.pstdev(accuracies), worst, len(accuracies)


@given(evaluations())
@settings(derandomize=True, deadline=None)
def test_summary_equals_the_statistics_of_each_cell(rows: list[ClientAccuracy]) -> None:
    summaries = summarise(rows)
    assert [s.capacity for s in summaries] == [*(s for s in SIZES if s in {r.capacity for r in rows}), "mean"]
    for summary in summaries:
        mine = [r for r in rows if summary.capacity in (r.capacity, "mean")]
        cells = {
            "local": [r.accuracy for r in mine if (r.role, r.population) == ("train", "local")],
            "union": [r.accuracy for r in mine if (r.role, r.population) == ("train", "union")],
            "unseen": [r.accuracy for r in mine if (r.role, r.population) == ("unseen", "local")],
            "validation": [r.accuracy for r in mine if (r.role, r.population) == ("train", "validation")],
        }
        assert set(cells) == set(COLUMNS)
        for column in COLUMNS:
            spread, expected = summary.column(column), slow_spread(cells[column])
            got = spread and (spread.mean, spread.std, spread.worst_decile, spread.clients)
            assert got == (expected and pytest.approx(expected, abs=1e-12))


@given(evaluations(), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None)
def test_the_order_of_rows_changes_no_bit(rows: list[ClientAccuracy], order: random.Random) -> None:
    shuffled = list(rows)
    order.shuffle(shuffled)
    assert summarise(shuffled) == summarise(rows)


def test_every_client_weighs_the_same_whatever_its_number_of_images() -> None:
    rows = [row("a", correct=1, total=1), row("b", correct=0, total=99)]
    (_, mean) = summarise(rows)
    assert mean.local is not None
    assert mean.local.mean == 0.5
    assert mean.local.mean != sum(r.correct for r in rows) / sum(r.total for r in rows)


def test_mean_is_over_clients_and_not_over_sizes() -> None:
    rows = [row("a", capacity="1/4", correct=0), row("b", correct=4), row("c", correct=4)]
    assert summarise(rows)[-1].local.mean == pytest.approx(2 / 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_worst_decile_is_the_worst_tenth_rounded_up(clients: int, worst: int) -> None:
    spread = Spread.over([number / 100 for number in reversed(range(clients))])
    assert spread is not None
    assert spread.worst_decile == pytest.approx(statistics.fmean(range(worst)) / 100)


def test_no_rows_give_the_mean_row_alone_and_missing_columns_are_none() -> None:
    (mean,) = summarise([])
    assert [mean.column(column) for column in COLUMNS] == [None] * len(COLUMNS)
    size, _ = summarise([row(role="unseen")])
    assert (size.local, size.union) == (None, None)
    assert size.unseen is not None


def test_an_unseen_client_on_the_union_is_in_no_column() -> None:
    assert row(role="unseen", population="union").column is None
    assert all(summarise([row(role="unseen", population="union")])[0].column(column) is None for column in COLUMNS)


@pytest.mark.parametrize(
    "other", [row("b", round=2), row("b", moment="after"), row("a")], ids=["round", "moment", "client twice"]
)
def test_rows_of_one_evaluation_only(other: ClientAccuracy) -> None:
    with pytest.raises(ValueError, match=r"summarise\(\) was given"):
        summarise([row("a"), other])
    assert summarise([row("a"), row("b")])[-1].local.clients == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(("correct", "total"), [(-1, 4), (5, 4), (0, 0), (0, -1)])
def test_contradictory_counts_are_refused(correct: int, total: int) -> None:
    with pytest.raises(ProtocolError, match=rf"client-7 reports {correct} correct of {total}"):
        row("client-7", correct=correct, total=total)


def test_capacities_are_ordered_by_value_not_by_spelling() -> None:
    ordered = by_capacity(["1", "1/4", "1/16", "3/8", "1/4"])
    assert ordered == sorted({"1", "1/4", "1/16", "3/8"}, key=Fraction)
    assert ordered != sorted(ordered)


def test_a_prior_curve_is_the_mean_over_clients_at_each_strength() -> None:
    rows = [
        {"client": "a", "role": "train", "capacity": "1", "population": "local", "correct": [0, 2], "total": 2},
        {"client": "b", "role": "train", "capacity": "1/4", "population": "local", "correct": [1, 3], "total": 4},
        {"client": "a", "role": "train", "capacity": "1", "population": "union", "correct": [8, 6], "total": 8},
        {"client": "c", "role": "unseen", "capacity": "1", "population": "local", "correct": [5, 0], "total": 5},
    ]
    curve = PriorCurve.of({"strengths": [0.0, 1.0], "clients": rows})
    assert curve.mean("local", "mean") == [(0 / 2 + 1 / 4) / 2, (2 / 2 + 3 / 4) / 2]
    assert curve.mean("local", "1/4") == [0.25, 0.75]
    assert curve.mean("union", "mean") == [1.0, 0.75]
    assert curve.mean("unseen", "mean") == [1.0, 0.0]
    assert curve.mean("union", "1/4") == []


@pytest.mark.parametrize(("correct", "total"), [((1, 5), 4), ((-1, 2), 4), ((0, 0), 0)])
def test_prior_counts_that_contradict_each_other_are_refused(correct: tuple[int, int], total: int) -> None:
    with pytest.raises(ProtocolError, match="0 <= correct <= total"):
        PriorCounts("a", "train", "1", "local", correct, total)
