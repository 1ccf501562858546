import base64
import io
import json
import re
from collections.abc import Sequence
from fractions import Fraction
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from framp_core.config import FrampConfig
from framp_core.errors import RunFolderError
from framp_core.metrics import ClientAccuracy
from framp_core.report import figures, finish, results_table, summary_of_run, write_report
from framp_core.report.figures import _accuracy_by_size, size_colours
from framp_core.report.summary import Record, summary_of
from framp_core.report.tables import human_bytes, human_seconds, refusals, results
from framp_core.run_folder import RunFolder

SIZES = ("1/64", "1/16", "1/4", "1")
LAYERS = {"stem": 432, "block1": 4608, "block2": 18432, "block3": 36864, "head": 640}
MASKABLE, ALWAYS_KEPT = sum(LAYERS.values()), 234
FIGURES = (
    "accuracy_by_size",
    "bytes",
    "client_accuracy",
    "learning_curves",
    "mask_overlap",
    "mask_selection",
)
HOSTILE = "client-<script>alert(1)</script>"


def held(capacity: str) -> int:
    return int(Fraction(capacity) * MASKABLE) + ALWAYS_KEPT


def clients(train: int, unseen: int) -> list[dict[str, Any]]:
    return [
        {
            "client": HOSTILE if number == 0 else f"client-{number:04d}",
            "role": "train" if number < train else "unseen",
            "capacity": SIZES[(number if number < train else number - train) % len(SIZES)],
            "train_examples": 60 + number,
            "descriptor_bytes": 168,
        }
        for number in range(train + unseen)
    ]


def measurements(rng: np.random.Generator, everyone: list[dict[str, Any]], round: int) -> list[dict[str, Any]]:
    rows = []
    for client in everyone:
        skill = 0.035 * SIZES.index(client["capacity"]) + 0.45 * (1 - np.exp(-round / 18))
        populations = {"local": (0.22, 60)} | ({"union": (0.06, 1200)} if client["role"] == "train" else {})
        for population, (base, total) in populations.items():
            spread = 0.08 if population == "local" else 0.03
            accuracy = np.clip(base + skill + rng.normal(0, spread), 0, 1)
            row = {key: client[key] for key in ("client", "role", "capacity")}
            correct = int(accuracy * total)
            rows.append({**row, "population": population, "moment": "before", "correct": correct, "total": total})
    return rows


def exchange(rng: np.random.Generator, client: dict[str, Any], round: int) -> dict[str, Any]:
    values = 4 * held(client["capacity"])
    mask = {"1/64": 900, "1/16": 2600, "1/4": 6100, "1": 1}[client["capacity"]]
    return {
        "client": client["client"],
        "capacity": client["capacity"],
        "loss": 2.2 * float(np.exp(-round / 25)) + rng.uniform(0, 0.2),
        "examples": client["train_examples"],
        "held": held(client["capacity"]),
        "down": {"values": values, "mask": mask, "prototypes": 2680 if round > 1 else 4, "framing": 32},
        "up": {"values": values, "prototypes": 1876, "framing": 32},
    }


def masks(rng: np.random.Generator, everyone: list[dict[str, Any]]) -> dict[str, Any]:
    ordered = sorted(everyone, key=lambda client: SIZES.index(client["capacity"]))
    scores = rng.random(2000) + np.linspace(0.3, 0, 2000)
    kept = []
    for client in ordered:
        noisy = scores + rng.normal(0, 0.004, 2000)
        count = int(2000 * Fraction(client["capacity"]))
        kept.append(noisy >= np.partition(noisy, 2000 - count)[2000 - count])
    overlap = [[float((a & b).sum() / (a | b).sum()) for b in kept] for a in kept]
    tilt = np.linspace(1.9, 0.75, len(LAYERS))
    return {
        "layers": [{"name": f"{name}.weight", "size": size} for name, size in LAYERS.items()],
        "selection": {
            s: np.minimum(float(Fraction(s)) * tilt ** (-2 * np.log2(float(Fraction(s))) / 6), 1).tolist()
            for s in SIZES
        },
        "clients": [client["client"] for client in ordered],
        "capacities": [client["capacity"] for client in ordered],
        "overlap": overlap,
    }


def synthetic_run(path: Path, rounds: int = 6, every: int = 3, train: int = 8, unseen: int = 4) -> RunFolder:
    """Write what a strategy would write in ``rounds`` of them, up to the last event; nothing is finished."""
    keys = {"rounds": rounds, "partition.clients": train, "partition.unseen-clients": unseen, "evaluation.every": every}
    run = RunFolder.create(path, FrampConfig.from_flat(keys))
    run.write_json("manifest.json", {"digest": "5f2c" * 16, "clients": []})
    rng, everyone = np.random.default_rng(3), clients(train, unseen)
    counts = {"parameters": MASKABLE + ALWAYS_KEPT, "maskable": MASKABLE, "always_kept": ALWAYS_KEPT}
    others = {"generator_parameters": 70_000, "descriptor_floats": 42, "expected_clients": train + unseen + 1}
    run.event("start", 0, clients=everyone, **counts, **others)
    for round in range(1, rounds + 1):
        sampled = rng.choice(train, size=min(train, 10), replace=False)
        replies = [exchange(rng, everyone[index], round) for index in sorted(sampled)]
        refused = [{"client": "client-0002", "error": "delta holds <NaN> at 3 of 1180 positions"}] if round == 2 else []
        run.event("train", round, clients=replies, refused=refused, seconds=1.5, learnt=round != 3)
        if round % every == 0:
            rows = measurements(rng, everyone, round)
            run.event("evaluate", round, accuracies=rows, down_bytes=900_000, refused=[], seconds=0.5)
            run.write_json("masks.json", masks(rng, everyone))
    return run


class Page(HTMLParser):
    """What a reader and a browser get from the page: its text, its tags, its addresses, and its tables' cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags, self.addresses, self.rows = "", [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.tags[-1] in ("td", "th", "small") and data.strip():
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = synthetic_run(tmp_path_factory.mktemp("runs") / "finished")
    finish(run)
    write_report(run.path)
    return run


def test_summary_agrees_with_sums_over_the_events_by_hand(finished: RunFolder) -> None:
    summary = finished.json("summary.json")
    last = [event for event in finished.events() if event["kind"] == "evaluate"][-1]["accuracies"]
    small = [row for row in last if row["capacity"] == "1/64"]
    union = [row["correct"] / row["total"] for row in small if row["population"] == "union"]
    unseen = [row["correct"] / row["total"] for row in small if row["role"] == "unseen"]
    row = summary["rows"][0]
    assert [entry["capacity"] for entry in summary["rows"]] == [*SIZES, "mean"]
    assert row["union"] == pytest.approx(sum(union) / len(union))
    assert row["union_std"] == pytest.approx(float(np.std(union)))
    assert row["unseen"] == pytest.approx(sum(unseen) / len(unseen))
    assert row["parameters_held"] == MASKABLE // 64 + ALWAYS_KEPT
    # Prototypes take 4 bytes in the first of six rounds, 2680 in the others; all eight clients train in each round.
    assert row["bytes_down"] == pytest.approx(4 * held("1/64") + 900 + (4 + 5 * 2680) / 6 + 32)
    assert row["bytes_up"] == pytest.approx(4 * held("1/64") + 1876 + 32)
    assert summary["rows"][-1]["parameters_held"] == pytest.approx(sum(map(held, SIZES)) / len(SIZES))
    assert summary["seconds"] == pytest.approx(6 * 1.5 + 2 * 0.5)
    assert (summary["rounds"], summary["evaluated_round"], summary["refused"]) == (6, 6, 1)
    assert summary["config_digest"] == finished.config.digest()
    assert summary["rows_after_fine_tuning"] == []


def test_clients_csv_keeps_every_measurement(finished: RunFolder) -> None:
    evaluations = [event for event in finished.events() if event["kind"] == "evaluate"]
    assert len(finished.clients()) == sum(len(event["accuracies"]) for event in evaluations)


def test_parameters_held_are_those_of_the_messages(tmp_path: Path) -> None:
    """A method may cut otherwise than by k weights: the counts come from the masks that were sent."""
    run = RunFolder.create(tmp_path / "run", FrampConfig())
    counts = {"parameters": MASKABLE + ALWAYS_KEPT, "maskable": MASKABLE, "always_kept": ALWAYS_KEPT}
    run.event("start", 0, clients=clients(4, 0), **counts)
    rng = np.random.default_rng(0)
    sent = [{**exchange(rng, client, 1), "held": 515} for client in clients(4, 0) if client["capacity"] != "1"]
    run.event("train", 1, clients=sent, refused=[], seconds=1.0)
    held_by_size = {row["capacity"]: row["parameters_held"] for row in finish(run)["rows"]}
    assert held_by_size == {"1/64": 515, "1/16": 515, "1/4": 515, "1": None, "mean": 515}


def test_mean_parameters_are_those_of_training_clients(tmp_path: Path) -> None:
    summary = summary_of(Record.of(synthetic_run(tmp_path / "run", rounds=1, train=4, unseen=1)))
    assert summary["rows"][-1]["parameters_held"] == pytest.approx(sum(map(held, SIZES)) / 4)
    assert summary["rows"][-1]["parameters_held"] != pytest.approx((sum(map(held, SIZES)) + held("1/64")) / 5)


def test_a_round_done_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", rounds=3)
    before = summary_of(Record.of(run))
    for event in run.events()[1:]:
        run.event(**event)
    after = summary_of(Record.of(run))
    assert after["rows"] == before["rows"]
    run.event("train", 4, clients=[{**exchange(np.random.default_rng(0), clients(1, 0)[0], 4)}], refused=[])
    assert summary_of(Record.of(run))["rows"] != before["rows"]


def test_measurements_after_fine_tuning_have_their_own_rows(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", rounds=3)
    rows = measurements(np.random.default_rng(1), clients(8, 4), 3)
    tuned = [{**row, "moment": "after", "correct": row["total"]} for row in rows]
    before = summary_of(Record.of(run))["rows"]
    run.event("evaluate", 3, accuracies=tuned, down_bytes=0, refused=[], seconds=0.1)
    summary = finish(run)
    assert summary["rows"] == before
    assert {row["local"] for row in summary["rows_after_fine_tuning"]} == {1.0}
    assert "After fine-tuning" in Page(write_report(run.path)).text


def test_terminal_and_page_show_the_same_results(finished: RunFolder) -> None:
    summary = finished.json("summary.json")
    output = io.StringIO()
    Console(file=output, width=80).print(results_table(summary))
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    assert all(len(line) <= 80 and "…" not in line and "\x1b" not in line for line in lines)
    shown = [[f"{cell.text} {cell.detail}".strip() for cell in row] for row in results(summary).rows]
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[1:]] == shown
    assert Page(finished.path / "report.html").rows[1 : len(shown) + 1] == shown
    assert shown[0][1].startswith(f"{100 * summary['rows'][0]['local']:.1f} ±")


def test_the_report_stands_alone_and_escapes_what_others_wrote(finished: RunFolder) -> None:
    page, html = Page(finished.path / "report.html"), (finished.path / "report.html").read_text("utf-8")
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in html
    assert "url(" not in html
    assert escape(HOSTILE) in html
    assert "delta holds &lt;NaN&gt; at 3" in html
    assert 'name="viewport"' in html


def test_the_report_says_what_the_numbers_mean(finished: RunFolder) -> None:
    text = Page(finished.path / "report.html").text
    config = finished.config
    assert f"FRAMP on digits, 6 rounds, seed {config.seed}" in text
    assert f"strength {config.evaluation.local_prior_strength:g}" in text
    assert "No class prior" not in text
    assert "test data; no class prior added; 8 clients covered" in text
    assert f"averaged over rounds (decay {config.server.averaging_decay:g}), round 6" in text
    assert "1 client of 13 never joined and took no part." in text
    assert "Joined in round" not in text
    assert "traceback" not in text.lower()
    assert "1 reply refused from 1 client. The first: client-0002, train, round 2: delta holds <NaN>" in text
    assert "1 round changed nothing, for want of enough valid replies: 3." in text
    assert "5f2c" * 16 in text
    assert "not finished" not in text


def test_every_figure_is_saved_embedded_and_drawn(finished: RunFolder) -> None:
    files = sorted((finished.path / "figures").glob("*.png"))
    assert tuple(file.stem for file in files) == FIGURES
    embedded = {base64.b64decode(a.split(",")[1]) for a in Page(finished.path / "report.html").addresses}
    assert embedded == {file.read_bytes() for file in files}
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert pixels.shape[1] >= 1000
        assert len(np.unique(pixels.reshape(-1, 3)[::7], axis=0)) > 20


def test_the_report_can_be_redone_from_the_folder_alone(finished: RunFolder) -> None:
    first = (finished.path / "report.html").read_bytes()
    (finished.path / "report.html").unlink()
    for file in (finished.path / "figures").iterdir():
        file.unlink()
    assert write_report(finished.path).read_bytes() == first


@pytest.mark.parametrize("events", [0, 1, 2, 4, 5])
def test_a_killed_run_still_gives_a_report_that_says_so(tmp_path: Path, events: int) -> None:
    run = synthetic_run(tmp_path / "run", rounds=4, every=2, train=4, unseen=0)
    lines = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    (run.path / "events.jsonl").write_text("".join(lines[:events]) + lines[events][: len(lines[events]) // 2])
    (run.path / "masks.json").unlink()
    trained = sum(json.loads(line)["kind"] == "train" for line in lines[:events])
    text = Page(write_report(run.path)).text
    assert f"This run is not finished: {trained} of 4 rounds are recorded" in text
    evaluated = any(json.loads(line)["kind"] == "evaluate" for line in lines[:events])
    assert ("Nothing was evaluated yet" in text) is not evaluated
    assert (run.path / "figures/accuracy_by_size.png").exists() is evaluated


def join(run: RunFolder, round: int, joined: list[dict[str, Any]], **fields: Any) -> None:
    run.event("join", round, **{"clients": joined, "refused": [], "seconds": 0.1, **fields})


def test_clients_that_came_later_count_and_are_named(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", rounds=3, train=4, unseen=1)
    late = {**clients(1, 0)[0], "client": "client-0009", "capacity": "1", "descriptor_bytes": 1000}
    join(run, 2, [late])
    text = Page(write_report(run.path)).text
    assert "Joined in round 2, after the start: client-0009." in text
    assert "took no part" not in text
    assert "5 clients of 4 sizes" in text
    assert "1 client missing from the last evaluation: client-0009." in text
    assert f"{(5 * 168 + 1000) / 1000:.1f} kB of descriptors" in text
    # Sizes at the start are 1/64, 1/16, 1/4 and 1; the newcomer is another of size 1.
    assert summary_of_run(run)["rows"][-1]["parameters_held"] == pytest.approx((sum(map(held, SIZES)) + held("1")) / 5)


def test_a_client_that_came_after_the_last_evaluation_is_not_missing_from_it(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", rounds=4, train=4, unseen=1)
    join(run, 4, [{**clients(1, 0)[0], "client": "client-0009"}])
    assert "missing from the last evaluation" not in Page(write_report(run.path)).text


def test_what_was_said_last_about_a_client_holds(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", rounds=1, train=4, unseen=1)
    known = Record.of(run).clients
    changed = {**known[1], "train_examples": 7}
    join(run, 1, [changed])
    record = Record.of(run)
    assert record.clients == [known[0], changed, *known[2:]]
    assert record.joined == {}


def test_the_first_traceback_of_the_run_is_folded_into_the_page(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", rounds=3, train=4, unseen=1)
    first = {"client": "client-0003", "error": "DataError: early", "traceback": "Traceback <first>\nValueError: x"}
    run.event("train", 3, clients=[], refused=[{**first, "traceback": "the second"}], seconds=1.0)
    join(run, 1, [], refused=[{"client": "client-0004", "error": "late reply"}, first])
    html = write_report(run.path).read_text("utf-8")
    assert "First traceback: client-0003, join, round 1</summary><pre>Traceback &lt;first&gt;\nValueError" in html
    assert "the second" not in html
    # One refusal of the synthetic run, in round 2; the first of all is that of the join event.
    assert "4 replies refused from 3 clients. The first: client-0004, join, round 1: late reply" in html


def test_every_refused_client_is_listed_with_its_rounds_and_reasons(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", FrampConfig())
    silent, garbage = ({"client": "a", "error": "no reply"}, {"client": "b", "error": "it is <b>garbage</b>"})
    for round, refused in ((1, [silent, garbage]), (2, [garbage]), (3, []), (4, [garbage])):
        run.event("train", round, clients=[], refused=refused, seconds=1.0)
    run.event("evaluate", 4, accuracies=[], down_bytes=0, refused=[garbage], seconds=0.1)
    rows = [[cell.text for cell in row] for row in refusals(Record.of(run)).rows]
    assert rows == [
        ["a", "train", "1", "no reply"],
        ["b", "train", "1 to 2, 4", "it is <b>garbage</b>"],
        ["b", "evaluate", "4", "it is <b>garbage</b>"],
    ]
    page = write_report(run.path).read_text("utf-8")
    assert "it is &lt;b&gt;garbage&lt;/b&gt;</td>" in page
    assert "<b>garbage" not in page


def test_rounds_that_changed_nothing_are_listed_as_spans(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", rounds=2)
    for round in (3, 5, 6, 7):
        run.event("train", round, clients=[], refused=[], seconds=1.0, learnt=False)
    run.event("train", 4, clients=[], refused=[], seconds=1.0, learnt=True)
    assert "4 rounds changed nothing, for want of enough valid replies: 3, 5 to 7." in Page(write_report(run.path)).text


def test_an_unfinished_run_has_the_results_of_its_events(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run", rounds=6)
    lines = (run.path / "events.jsonl").read_text().splitlines(keepends=True)
    # The start, three rounds, one evaluation, and a fourth round; then the run was killed.
    (run.path / "events.jsonl").write_text("".join(lines[:6]))
    summary = summary_of_run(run)
    assert not run.has("summary.json")
    assert (summary["rounds"], summary["evaluated_round"]) == (4, 3)
    assert finish(run) == summary == summary_of_run(run) == run.json("summary.json")


def test_a_report_needs_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        write_report(tmp_path)


def test_a_size_without_measurements_leaves_its_place_empty() -> None:
    rows = [ClientAccuracy("a", "train", "1", 1, "local", "before", 1, 4)]
    figure = Figure()
    _accuracy_by_size(figure, rows, SIZES)
    (mean,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == list(SIZES)
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([SIZES.index("1")], [25.0])


def test_a_single_evaluation_stands_at_a_whole_round(tmp_path: Path) -> None:
    figure = Figure()
    figures._learning_curves(figure, Record.of(synthetic_run(tmp_path / "run", rounds=4, every=4)), SIZES)
    low, high = figure.axes[-1].get_xlim()
    assert [tick for tick in figure.axes[-1].get_xticks() if low <= tick <= high] == [4.0]


def test_sizes_are_drawn_from_light_to_dark() -> None:
    light = [float(np.dot(colour[:3], (0.2126, 0.7152, 0.0722))) for colour in size_colours(SIZES).values()]
    assert light == sorted(light, reverse=True)
    assert len(set(light)) == len(SIZES)


def test_a_client_of_ever_new_sizes_leaves_the_figures_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes that most clients had are drawn; one of a hundred digits stands there as a short number."""
    run = synthetic_run(tmp_path / "run")
    sizes = [*(f"{number}/1009" for number in range(1, 300)), "1/1" + "0" * 90]
    row = {"client": "hopper", "role": "train", "population": "local", "moment": "before", "correct": 1, "total": 2}
    run.event("evaluate", 6, accuracies=[{**row, "client": size, "capacity": size} for size in sizes])
    selection = {size: [0.5] * len(run.json("masks.json")["layers"]) for size in sizes}
    written = run.json("masks.json")
    run.write_json("masks.json", {**written, "selection": {**selection, **written["selection"]}})
    drawn: list[list[str]] = []
    monkeypatch.setattr(figures, "size_colours", lambda sizes: drawn.append(list(sizes)) or size_colours(sizes))
    write_report(run.path)
    assert len(drawn) == 4  # Learning curves have two panels.
    assert all(len(shown) == figures.MOST_SIZES and {"1/64", "1/16", "1/4", "1"} <= set(shown) for shown in drawn)
    assert [figures._named(size) for size in ("1/64", sizes[0], sizes[-1])] == ["1/64", "1/1009", "1e-90"]
    assert figures.most_frequent(["a", "b", "c"], "bcc") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345, "12.3 kB"), (999_400, "999 kB"),
     (999_600, "1.0 MB"), (44_700_000, "44.7 MB"), (2e9, "2.0 GB"), (3e12, "3.0 TB")],
)  # fmt: skip
def test_bytes_for_people(count: float | None, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.24, "0.2 s"), (59.97, "1 min 0 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def spoil(run: RunFolder, number: str, keys: Sequence[str]) -> None:
    """Add a round in which one client's row holds this number."""
    lines = (run.path / "events.jsonl").read_text().splitlines()
    event = json.loads(next(line for line in lines if '"kind": "train"' in line and '"client-0003"' in line))
    spoilt = next(row for row in event["clients"] if row["client"] == "client-0003")
    spoilt |= {key: dict.fromkeys(spoilt["up"], "NUMBER") if key == "up" else "NUMBER" for key in keys}
    with (run.path / "events.jsonl").open("a") as file:
        file.write(json.dumps(event | {"round": 7}).replace('"NUMBER"', number) + "\n")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1.7e308", "1e999", "1" + "0" * 300, "-1"])
def test_numbers_that_no_run_counts_are_named(tmp_path: Path, number: str) -> None:
    run = synthetic_run(tmp_path / "run")
    spoil(run, number, ["held", "up"])
    with pytest.raises(RunFolderError, match=r"line 10 of .* (is not what a run writes there|is not JSON)"):
        write_report(run.path)


@pytest.mark.parametrize(
    ("number", "keys"),
    [("1.7e308", ["loss"]), ("-1.7e308", ["loss"]), (str(2**63), ["held", "up"]), ("null", ["loss"])],
)
def test_a_report_is_written_whatever_numbers_the_events_hold(tmp_path: Path, number: str, keys: list[str]) -> None:
    """Losses, lengths of messages and counts of one client; the others are still there."""
    run = synthetic_run(tmp_path / "run")
    spoil(run, number, keys)
    page = Page(write_report(run.path))
    assert "client-0003" in page.text
    assert len([address for address in page.addresses if address.startswith("data:image/png")]) >= 4
    assert max(len(cell) for row in page.rows for cell in row) < 100
