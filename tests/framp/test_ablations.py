"""Ablations apart from other methods, and tests over seeds beside those over clients."""

import math
import re
from dataclasses import replace

import pytest
from scipy import stats

from framp.compare import statistics, tables
from framp.compare.results import Results, RunResult
from framp.compare.statistics import SeedTest
from framp_core.config import FrampConfig
from framp_core.methods import METHODS, is_ablation, settings_of, title_of
from framp_core.metrics import MEAN, ClientAccuracy, PriorCounts, PriorCurve
from tests.framp.test_compare_statistics import result

BASES = {("framp", 0): 60, ("framp", 1): 64, ("fedavg", 0): 50, ("fedavg", 1): 60, ("fiarse", 0): 40, ("fiarse", 1): 42}
ABLATED = {("framp-shared", 0): 70, ("framp-shared", 1): 71, ("framp-dense", 0): 59, ("framp-dense", 1): 61}


def results_of(bases: dict[tuple[str, int], int]) -> Results:
    runs = tuple(result(name, seed, {"local": base, "union": base}) for (name, seed), base in bases.items())
    return Results(tuple(dict.fromkeys(name for name, _ in bases)), (0, 1), runs)


def test_ablations_are_told_by_their_key() -> None:
    assert [name for name in METHODS if is_ablation(name, "framp")] == [n for n in METHODS if n.startswith("framp-")]
    others = [(name, reference) for reference in METHODS if reference != "framp" for name in METHODS]
    assert [pair for pair in others if is_ablation(*pair)] == []  # fiarse-released is no part of fiarse.
    assert not is_ablation("framp", "framp")


def test_a_method_lies_under_the_overrides_and_names_its_strategy() -> None:
    assert settings_of("framp-shared", {"method": "other"}) == {"method": "framp", "generator.name": "shared"}
    laid = settings_of("heterofl", {"server.weighting": "uniform", "rounds": 3})
    expected = {**METHODS["heterofl"].settings, "server.weighting": "uniform", "rounds": 3}
    assert laid == expected


def test_a_run_is_called_by_its_method() -> None:
    for name, method in METHODS.items():
        values = FrampConfig.from_flat(settings_of(name, {})).to_flat()
        assert title_of(values) == ("FRAMP" if name.startswith("framp-") else method.title)
        assert title_of({**values, "server.weighting": "uniform"}) == METHODS[str(values["method"])].title


def test_every_source_stands_alone() -> None:
    sources = [method.source for name, method in METHODS.items() if name != "local"]
    assert [source for source in sources if not re.search("ablation: |variant: |et al., |and Tay, ", source)] == []


def test_local_only_has_no_unseen() -> None:
    def run(method: str) -> RunResult:
        made = result(method, 0, {"local": 50, "union": 40})
        seen = ClientAccuracy("client-0009", "unseen", "1", 1, "local", "before", 10, 100)
        table = [{**row, "unseen": 0.1, "unseen_clients": 1} for row in made.summary["rows"]]
        priors = PriorCurve((0.0,), (PriorCounts("client-0009", "unseen", "1", "local", (1,), 10),))
        return replace(
            made, summary={**made.summary, "rows": table}, rows=(*made.rows, seen), priors=priors
        ).as_served()

    names = ("framp", "fedavg", "local")
    results = Results(names, (0,), tuple(map(run, names)))
    *_, unseen = tables.accuracy_tables(results, "framp")
    assert {row[0].text: row[-1].text for row in unseen.table.rows}["Local only"] == tables.MISSING
    assert results.over_seeds("local", "local", MEAN) == results.over_seeds("framp", "local", MEAN)
    assert results.at_strength("framp", "unseen", MEAN, 0.0) == [0.1]
    assert results.at_strength("local", "unseen", MEAN, 0.0) == []
    tested = {(test.method, test.column) for test in statistics.compare(results, "framp")}
    assert ("fedavg", "unseen") in tested
    assert ("local", "unseen") not in tested


def test_ablations_and_methods_are_corrected_apart() -> None:
    together = statistics.compare(results_of({**BASES, **ABLATED}), "framp")
    apart = statistics.compare(results_of(BASES), "framp")
    own = statistics.compare(results_of({key: BASES[key] for key in list(BASES)[:2]} | ABLATED), "framp")
    assert [test.ablation for test in together] == [False] * len(apart) + [True] * len(own)
    assert together == apart + own
    p_values = [test.p for test in together if test.p is not None]
    mixed = statistics.holm(p_values)
    assert mixed != [test.p_holm for test in together if test.p is not None]


def test_the_interval_over_seeds_by_hand() -> None:
    found = SeedTest.of((0.10, 0.04, 0.07))
    assert found is not None
    # Standard deviation 0.03, so the mean's error is 0.03 / sqrt(3); t(0.975, 2) is 4.303.
    half = 4.302653 * 0.03 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.07 - half, 0.07 + half), abs=1e-6)
    assert found.p == pytest.approx(stats.ttest_rel([0.6, 0.5, 0.4], [0.5, 0.46, 0.33]).pvalue)


@pytest.mark.parametrize("level", [0.0, 0.1])
def test_seeds_without_variation_have_no_interval_and_no_p(level: float) -> None:
    assert SeedTest.of((level,)) is None
    assert SeedTest.of((level, level)) is None


def test_ablations_never_stand_out_and_have_a_table_of_their_own() -> None:
    results = results_of({**BASES, **ABLATED})
    local, _ = tables.accuracy_tables(results, "framp")
    assert {row for row, _ in local.best} == {0}  # framp-shared is higher, and full-size FedAvg does not count
    ablations = [test for test in statistics.compare(results, "framp") if test.ablation]
    table = tables.contribution_table(ablations)
    assert table.headings == ("Variant", "Local", "Union")
    # 60 - 70 and 64 - 71 in the two seeds.
    assert [row[1].text for row in table.rows] == ["−8.5", "+2.0"]
    first = tables.overall_table(ablations, "Variant").rows[0]
    assert [cell.text for cell in first[:3]] == [METHODS["framp-shared"].title, "Local", "−8.5"]
    assert first[5].text == "−10.0, −7.0"


def test_the_prior_table_has_no_prior_and_the_whole_of_it() -> None:
    def with_curve(correct: tuple[int, ...]) -> PriorCurve:
        rows = tuple(
            PriorCounts(name, "train", size, "local", correct, 10) for name, size in (("a", "1/4"), ("b", "1"))
        )
        return PriorCurve((0.0, 0.5, 1.0), rows)

    base = {"local": 50, "union": 50}
    runs = tuple(
        type(run)(**{**run.__dict__, "priors": curve})
        for run, curve in (
            (result("framp", 0, base), with_curve((2, 9, 6))),
            (result("framp", 1, base), with_curve((4, 9, 6))),
            (result("fedavg", 0, base), None),
        )
    )
    results = Results(("framp", "fedavg"), (0, 1), runs)
    (titled,) = tables.prior_tables(results)
    shown = {(row[0].text, row[1].text): row[-1] for row in titled.table.rows}
    assert shown["FRAMP", "0"] == tables.Cell("30.0", f"±{100 * math.sqrt(0.02):.1f}")
    assert shown["FRAMP", "1"].text == "60.0"
    assert shown["FedAvg (full size) †", "0"].text == tables.MISSING
    assert results.at_strength("framp", "local", MEAN, 0.5) == [0.9, 0.9]
    assert tables.prior_tables(results.only(["fedavg"])) == []
