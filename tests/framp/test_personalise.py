"""A model for an unseen client from its descriptor alone: the numbers of the run, from the command line."""

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from framp import cli
from framp.engines import run_local
from framp.personalise import personalise
from framp_core import personal_model
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import LabelledImages, load_client
from framp_core.errors import ConfigError, DataError, FrampError, ModelError, RunFolderError
from framp_core.methods import settings_of
from framp_core.run_folder import RunFolder
from tests.conftest import TINY
from tests.small_graph import save_small_graph

RUN: dict[str, Scalar] = {
    **TINY,
    "rounds": 3,
    "partition.scheme": "balanced-dirichlet",
    "partition.unseen-clients": 2,
    "capacity.sizes": "1/4,1",
    "evaluation.fine-tune-steps": 3,
    # In so few rounds a mixture finds no clusters, and would give all clients the same model.
    "generator.name": "modulated",
    "server.personal-learning-rate": 0.03,
}
UNSEEN, STEPS = "client-0005", 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run on digits, without its report."""
    return run_in(tmp_path_factory.mktemp("finished"))


def run_in(folder: Path, **values: Scalar) -> RunFolder:
    given = {key.replace("__", ".").replace("_", "-"): value for key, value in values.items()}
    paths = {"output.folder": str(folder / "run"), "data.cache": str(folder / "cache")}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server_app.app.write_report", lambda path: None)
        return run_local(FrampConfig.from_flat({**RUN, **paths, **given}))


def recorded(run: RunFolder, client: str, moment: str) -> float:
    """A client's accuracy on its own test data in the last round."""
    (row,) = [
        row
        for row in run.clients()
        if (row.client, row.population, row.moment, row.round) == (client, "local", moment, run.config.rounds)
    ]
    return row.accuracy


def save_images(run: RunFolder, client: str, folder: Path, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """A client's digits as image files, one folder per class."""
    config = run.config
    data = load_client(config, int(client[-4:]), config.partition.nodes)
    for split in splits:
        examples = getattr(data, split)
        assert isinstance(examples, LabelledImages)
        for position in examples.indices:
            target = folder / split / str(examples.labels[position])
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(examples.images[position, 0]).save(target / f"{position:05d}.png")
    return folder


@pytest.mark.parametrize("client", [UNSEEN, "client-0002"])
def test_a_client_of_the_run_gets_the_accuracy_that_the_run_recorded(finished: RunFolder, client: str) -> None:
    found = personalise(finished.path, client=client, steps=STEPS)
    assert found.accuracy == recorded(finished, client, "before")
    assert found.tuned == recorded(finished, client, "after")
    curve = next(each for each in finished.json("prior_curve.json")["clients"] if each["client"] == client)
    assert found.plain == curve["correct"][0] / curve["total"]
    assert found.test_examples == curve["total"]


def test_accuracies_tell_clients_and_strengths_apart(finished: RunFolder) -> None:
    """Negative control of the test above: the numbers that are compared are not all the same one."""
    numbers = [recorded(finished, client, "before") for client in (UNSEEN, "client-0002", "client-0003")]
    found = personalise(finished.path, client=UNSEEN, steps=STEPS)
    assert len({*numbers, found.plain, found.tuned}) >= 3


def test_nothing_is_trained_unless_asked(finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def trains(*arguments: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("client_app.client.train_locally", trains)
    assert personalise(finished.path, client=UNSEEN).tuned is None
    with pytest.raises(AssertionError, match="trained"):
        personalise(finished.path, client=UNSEEN, steps=1)


def test_an_own_folder_of_the_same_images_gives_the_same_model(finished: RunFolder, tmp_path: Path) -> None:
    """Images come in another order, so that the descriptor may differ in its last bits, and weights with it."""
    own = personalise(finished.path, save_images(finished, UNSEEN, tmp_path), capacity=Fraction(1))
    same = personalise(finished.path, client=UNSEEN, capacity=Fraction(1))
    assert (own.accuracy, own.plain, own.test_examples) == (same.accuracy, same.plain, same.test_examples)
    assert own.train_examples == same.train_examples
    weights, others = (each.model.network.flat.detach() for each in (own, same))
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-6)
    other = personalise(finished.path, client="client-0004", capacity=Fraction(1)).model.network.flat.detach()
    assert (weights - other).abs().max() > 1e-3  # Neither is another client's model the same, nor does it replace one.


def test_the_normalisation_is_the_runs(finished: RunFolder, tmp_path: Path) -> None:
    """A device with dark images alone: its own normalisation would make them as bright as the others'."""
    folder = save_images(finished, UNSEEN, tmp_path)
    for file in folder.rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(file)) // 4).astype(np.uint8)).save(file)
    facts = personalise(finished.path, folder, capacity=Fraction(1)).model.facts
    assert facts.to_dict() == finished.json("manifest.json")["data"]


def test_classes_are_matched_by_name(finished: RunFolder, tmp_path: Path) -> None:
    """Missing classes shift no label: the counts are those of the classes that are there."""
    folder = save_images(finished, UNSEEN, tmp_path)
    held = sorted(int(path.name) for path in (folder / "train").iterdir())
    for split in ("train", "test"):
        shutil.rmtree(folder / split / str(held[0]), ignore_errors=True)
    found = personalise(finished.path, folder, capacity=Fraction(1, 4))
    absent = np.log(finished.config.local.absent_class_prior).astype(np.float32)
    assert sorted(np.flatnonzero(found.model.log_prior.numpy() != absent)) == held[1:]


def test_no_test_images_are_no_error(finished: RunFolder, tmp_path: Path) -> None:
    folder = save_images(finished, UNSEEN, tmp_path, ("train",))
    found = personalise(finished.path, folder, capacity=Fraction(1, 4))
    assert (found.test_examples, found.plain, found.accuracy, found.tuned) == (0, None, None, None)
    assert "none" in found.rows()["test examples"]


def test_what_is_left_out_of_the_clients_folder_is_said(finished: RunFolder, tmp_path: Path) -> None:
    folder = save_images(finished, UNSEEN, tmp_path)
    plain = personalise(finished.path, folder, capacity=Fraction(1, 4))
    shutil.copytree(folder / "train", folder / "train" / ".ipynb_checkpoints")
    messy = personalise(finished.path, folder, capacity=Fraction(1, 4))
    count = plain.train_examples
    assert messy.rows() == {
        **plain.rows(),
        "left out": f"{count} in all: {count} hidden (.ipynb_checkpoints {count})",
    }


def test_any_capacity_can_be_asked_for(finished: RunFolder) -> None:
    for text in ("1/64", "1/3"):
        model = personalise(finished.path, client=UNSEEN, capacity=Fraction(text)).model
        layout = model.network.layout
        assert model.mask.sum() == int(Fraction(text) * layout.maskable_size) + layout.always_kept_size
        assert not model.network.flat.detach().numpy()[~model.mask].any()


def test_the_model_file_computes_what_was_measured(finished: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    found = personalise(finished.path, client=UNSEEN, steps=STEPS, out=file)
    model = personal_model.load(file)
    data = load_client(finished.config, 5, finished.config.partition.nodes)
    assert isinstance(data.test, LabelledImages)
    images, labels = data.test.batch(np.arange(len(data.test)))
    names = [model.facts.class_names[label] for label in labels.tolist()]
    correct = sum(one == other for one, other in zip(model.classify(images), names, strict=True))
    assert correct / len(names) == found.tuned
    assert np.array_equal(model.mask, found.model.mask)
    assert torch.equal(model.network.flat, found.model.network.flat)
    assert (model.capacity, model.origin["client"]) == (Fraction(1), UNSEEN)
    assert model.message == found.model.message
    assert not torch.equal(model.logits(images), model.logits(images, prior_strength=0))


def test_the_model_file_needs_no_flower(finished: RunFolder, tmp_path: Path) -> None:
    import subprocess
    import sys

    file = tmp_path / "model.safetensors"
    personalise(finished.path, client=UNSEEN, out=file)
    code = (
        f"import sys; from framp_core.personal_model import load; load({str(file)!r}); assert 'flwr' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_damaged_model_files_are_refused(finished: RunFolder, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    personalise(finished.path, client=UNSEEN, out=file)
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-9], whole.replace(b"version", b"varsion"), b"not a model at all"):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match="not a personal model"):
            personal_model.load(file)
    with pytest.raises(ModelError, match="not a personal model"):
        personal_model.load(tmp_path / "missing")
    file.write_bytes(whole)
    with pytest.raises(ModelError, match=r"expected torch.uint8 of \(batch, 1, 8, 8\)"):
        personal_model.load(file).logits(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_an_unfinished_run_gives_the_model_of_its_newest_checkpoint(finished: RunFolder, tmp_path: Path) -> None:
    """A checkpoint after round 1 is what a run of one round ends with."""
    one = run_in(tmp_path / "one", rounds=1)
    longer = run_in(tmp_path / "longer", rounds=2, output__checkpoint_every=1)
    shutil.rmtree(longer.path / "checkpoints" / "round-000002")
    (longer.path / "summary.json").unlink()
    pair = [personalise(run.path, client=UNSEEN).model for run in (one, longer)]
    assert pair[1].origin["round"] == 1
    weights = [model.message for model in pair]
    assert weights[0] == weights[1]
    assert personalise(one.path, client=UNSEEN).accuracy == personalise(longer.path, client=UNSEEN).accuracy


@pytest.mark.parametrize("method", ["fiarse", "fiarse-released", "fedavg", "framp-low-rank"])
def test_other_methods_with_a_generator_serve_too(method: str, tmp_path: Path) -> None:
    plain = {key: value for key, value in RUN.items() if key != "generator.name"}
    values = settings_of(method, {**plain, "local.nested-share": 0.0, "local.alignment-weight": 0.0, "rounds": 1})
    folder: dict[str, Scalar] = {"output.folder": str(tmp_path / "run"), "data.cache": str(tmp_path / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server_app.app.write_report", lambda path: None)
        run = run_local(FrampConfig.from_flat({**values, **folder}))
    assert personalise(run.path, client=UNSEEN).accuracy == recorded(run, UNSEEN, "before")


def test_a_graphs_client_by_name(tmp_path: Path) -> None:
    graph = save_small_graph(tmp_path / "graph.npz")
    schemes = {key.replace(".", "__").replace("-", "_"): value for key, value in graph.items()}
    run = run_in(tmp_path, **schemes, rounds=2)
    found = personalise(run.path, client=UNSEEN, steps=STEPS, out=tmp_path / "model")
    assert found.accuracy == recorded(run, UNSEEN, "before")
    assert found.tuned == recorded(run, UNSEEN, "after")
    model = personal_model.load(tmp_path / "model")
    data = load_client(run.config, 5, run.config.partition.nodes)
    ((batch, labels),) = data.test.ordered_batches(64, torch.device("cpu"))
    assert (model.logits(batch).argmax(1) == labels).float().mean().item() == pytest.approx(found.tuned)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"--data reads folders of images.*--client"):
        personalise(run.path, data=tmp_path, capacity=Fraction(1))


Change = Callable[[Path], None]


def grow(folder: Path) -> None:
    file = next(folder.rglob("train/*/*.png"))
    Image.open(file).resize((9, 8)).save(file)


def paint(folder: Path) -> None:
    file = next(folder.rglob("train/*/*.png"))
    Image.open(file).convert("RGB").save(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "train" / "cats").mkdir(), r"'cats', and the run knows no such class.*'0', '1'"),
        (lambda folder: shutil.rmtree(folder / "train"), "no folder 'train'"),
        (lambda folder: [file.unlink() for file in folder.rglob("train/*/*")], "holds no image"),
        (lambda folder: next(folder.rglob("train/*/*.png")).write_bytes(b"no"), "cannot be read as an image"),
        (grow, r"is 9x8 pixels and the run's images are 8x8"),
        (paint, r"in colour"),
    ],
)
def test_images_that_do_not_fit_are_named(finished: RunFolder, tmp_path: Path, change: Change, words: str) -> None:
    folder = save_images(finished, UNSEEN, tmp_path / "images")
    change(folder)
    out = tmp_path / "model"
    with pytest.raises(DataError, match=words):
        personalise(finished.path, folder, capacity=Fraction(1), out=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({}, ConfigError, "--data, or with --client"),
        ({"client": UNSEEN, "data": Path("x")}, ConfigError, "--data, or with --client"),
        ({"data": Path("x")}, ConfigError, "--capacity"),
        ({"client": "client-9999"}, DataError, "client-0000 to client-0005"),
        ({"client": UNSEEN, "out": Path("/nowhere/at/all")}, RunFolderError, "make it first"),
        ({"client": UNSEEN, "out": Path(__file__)}, RunFolderError, "never overwritten"),
        ({"client": UNSEEN, "capacity": Fraction(1, 10**6)}, ModelError, "leaves none"),
    ],
)
def test_mistakes_are_explained(
    finished: RunFolder, arguments: dict[str, object], kind: type[FrampError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        personalise(finished.path, **arguments)  # type: ignore[arg-type]


def test_runs_that_cannot_serve_are_named(finished: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(config.replace('method = "framp"', 'method = "local"'))
    with pytest.raises(ConfigError, match="method='local', which has no generator"):
        personalise(copy, client=UNSEEN)
    (copy / "config.toml").write_text(config)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["data"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunFolderError, match="does not name the classes"):
        personalise(copy, client=UNSEEN)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunFolderError, match="no checkpoint"):
        personalise(copy, client=UNSEEN)
    with pytest.raises(RunFolderError, match="not a run folder"):
        personalise(tmp_path, client=UNSEEN)


def test_other_data_than_the_runs_are_noticed(finished: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(config.replace("alpha = 0.3", "alpha = 0.4"))
    with pytest.raises(DataError, match="the run is about"):
        personalise(copy, client=UNSEEN)


def test_the_command(finished: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    arguments = ["personalise", str(finished.path), "--client", UNSEEN, "--fine-tune", str(STEPS), "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    shown = f"{100 * recorded(finished, UNSEEN, 'before'):.1f} %"
    for words in (UNSEEN, shown, "after 3 local steps", f"{out.stat().st_size:,} bytes"):
        assert words in result.output
