"""Statistics and tables of a comparison."""

import itertools
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from framp.compare import statistics, tables
from framp.compare.results import Results, RunResult
from framp_core.metrics import COLUMNS, MEAN, ClientAccuracy, Population, summarise


def test_holm_by_hand() -> None:
    # Ascending 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, and no less than those before.
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    corrected = statistics.holm(p_values)
    for raw, own in zip(p_values, corrected, strict=True):
        assert raw <= own <= min(1.0, len(p_values) * raw)
    assert corrected[int(np.argmin(p_values))] == min(1.0, len(p_values) * min(p_values))


def test_signed_rank_p_against_all_signs_by_hand() -> None:
    differences = np.array([0.01, 0.02, -0.03, 0.04, 0.05, 0.06, 0.07])
    ranks = np.arange(1, 8)
    observed = ranks[differences > 0].sum()
    sums = np.array([ranks[np.array(signs)].sum() for signs in itertools.product([False, True], repeat=7)])
    by_hand = np.mean(np.abs(sums - 14) >= abs(observed - 14))
    assert statistics.signed_rank_p(differences) == pytest.approx(by_hand)
    assert statistics.signed_rank_p(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)


def test_signed_rank_p_does_not_see_rounding() -> None:
    assert statistics.signed_rank_p(np.zeros(9)) == 1.0
    assert statistics.signed_rank_p(np.full(9, 0.1 + 0.2 - 0.3)) == 1.0
    assert statistics.signed_rank_p(np.full(9, 0.01)) < 0.05


def test_bootstrap_interval_degenerates_and_covers() -> None:
    rng = np.random.default_rng(0)
    assert statistics.bootstrap_interval(np.full(5, 0.25), rng) == (0.25, 0.25)
    values = rng.normal(0.1, 0.2, size=200)
    low, high = statistics.bootstrap_interval(values, rng)
    standard_error = values.std() / np.sqrt(200)
    assert low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.1 * standard_error)
    assert high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.1 * standard_error)


def result(method: str, seed: int, correct: dict[str, int], missing: str = "") -> RunResult:
    """A run of eight training clients in two sizes: ``correct`` of 100 images on Local, 50 on Union."""
    populations: tuple[Population, ...] = ("local", "union")
    rows = tuple(
        ClientAccuracy(f"client-{i:04d}", "train", size, 1, population, "before", correct[population] + i, 100)
        for i, size in enumerate(["1/4"] * 4 + ["1"] * 4)
        for population in populations
        if f"client-{i:04d}" != missing
    )
    table = [
        {"capacity": each.capacity, "bytes_down": 10.0, "bytes_up": None, "parameters_held": 7}
        | {column: spread.mean if (spread := each.column(column)) else None for column in COLUMNS}
        for each in summarise(rows)
    ]
    summary = {"rows": table, "evaluated_round": 1, "seconds": 1.0, "refused": 0}
    return RunResult(method, seed, 0.1, summary, rows, None, "digest", "code")


def test_pairs_are_clients_of_a_seed() -> None:
    runs = (
        result("framp", 0, {"local": 60, "union": 50}),
        result("fedavg", 0, {"local": 50, "union": 50}),
        result("framp", 1, {"local": 64, "union": 50}),
        result("fedavg", 1, {"local": 60, "union": 50}, missing="client-0003"),
    )
    results = Results(("framp", "fedavg"), (0, 1), runs)
    tests = {(test.column, test.capacity): test for test in statistics.compare(results, "framp")}
    assert set(tests) == set(itertools.product(("local", "union"), ("1/4", "1", MEAN)))
    overall = tests["local", MEAN]
    # Eight pairs of +10 in seed 0, seven of +4 in seed 1.
    assert overall.pairs == 15
    assert overall.difference == pytest.approx((8 * 0.10 + 7 * 0.04) / 15)
    assert overall.by_seed == pytest.approx((0.10, 0.04))
    assert overall.low < overall.difference < overall.high
    expected = stats.wilcoxon([10] * 8 + [4] * 7).pvalue
    assert overall.p == pytest.approx(expected)
    assert overall.p_holm == pytest.approx(min(1.0, expected * 6))  # the smallest of six p-values
    assert overall.significant
    assert tests["local", "1/4"].pairs == 7
    level = tests["union", MEAN]
    assert (level.difference, level.low, level.high, level.p, level.significant) == (0.0, 0.0, 0.0, 1.0, False)


def test_too_few_pairs_are_not_tested_and_do_not_count() -> None:
    runs = tuple(result(name, 0, {"local": base, "union": base}) for name, base in (("framp", 60), ("fedavg", 50)))
    tests = statistics.compare(Results(("framp", "fedavg"), (0,), runs), "framp")
    assert [test.p for test in tests if test.pairs == 4] == [None] * 4
    local, union = (test for test in tests if test.capacity == MEAN)
    assert local.p == pytest.approx(2 / 2**8)
    assert local.p_holm == pytest.approx(2 * 2 / 2**8)  # two tests, not six
    assert union.p_holm == pytest.approx(2 * 2 / 2**8)


def test_the_order_of_methods_turns_the_sign() -> None:
    runs = tuple(result(name, 0, {"local": base, "union": base}) for name, base in (("framp", 60), ("fedavg", 50)))
    results = Results(("framp", "fedavg"), (0,), runs)
    forth, back = (statistics.compare(results, name)[0] for name in ("framp", "fedavg"))
    assert forth.difference == pytest.approx(-back.difference)
    assert forth.p == back.p


# Tables


def test_tables_show_mean_and_deviation_over_seeds_and_the_best_within_budget() -> None:
    bases = {("framp", 0): 50, ("framp", 1): 54, ("fedavg", 0): 80, ("fedavg", 1): 80}
    bases |= {("local", 0): 40, ("local", 1): 40}
    runs = tuple(result(name, seed, {"local": base, "union": base}) for (name, seed), base in bases.items())
    results = Results(("framp", "fedavg", "local"), (0, 1), runs)
    local, union = tables.accuracy_tables(results, "framp")
    assert local.table.headings == ("Method", "1/4", "1", "Mean")
    # Clients of 1/4 have 0, 1, 2, 3 more than the base, so 51.5 and 55.5 in the two seeds; their deviation is sqrt(8).
    assert local.table.rows[0][1] == tables.Cell("53.5", "±2.8")
    assert local.table.rows[1][0] == tables.Cell("FedAvg (full size) †")
    assert local.best == {(0, 1), (0, 2), (0, 3)}
    assert union.title.startswith("Union")
    text = tables.markdown(local.table, local.best)
    assert "| FRAMP | **53.5 ±2.8** | **57.5 ±2.8** | **55.5 ±2.8** |" in text
    alone = Results(("framp",), (0,), runs[:1])
    assert tables.accuracy_tables(alone, "framp")[0].table.rows[0][1] == tables.Cell("51.5")


def test_a_terminal_table_loses_no_number_where_it_is_too_narrow() -> None:
    row = (tables.Cell("a method with a long name"), tables.Cell("12.3", "±4.5"))
    console = Console(file=StringIO(), width=20)
    console.print(tables.Uncut(tables.Titled("T", tables.Table(("Method", "1/64"), (row,)))), crop=False)
    written = console.file
    assert isinstance(written, StringIO)
    assert "a method with a long name  12.3 ±4.5" in written.getvalue()


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.1234, "+12.3"), (-0.05, "−5.0"), (-0.0001, "0.0"), (0.0, "0.0"), (0.0001, "0.0")]
)
def test_differences_carry_their_sign(fraction: float, text: str) -> None:
    assert tables.points(fraction) == text
