"""Folders as people have them: what is read, what is left out and counted, and what is refused by name."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from typer.testing import CliRunner

from framp import cli
from framp_core.config import DataConfig, FrampConfig
from framp_core.data import image_file, sources, warn_of_notes
from framp_core.data.image_file import read_image
from framp_core.data.image_folder import SPLITS, read_client_folder, read_image_folder, require_outside
from framp_core.data.sources import ImageData, load_images, load_own_images
from framp_core.errors import ConfigError, DataError
from tests import messy_folder
from tests.conftest import TINY
from tests.messy_folder import SIDE, write


def load(root: Path, image_size: int = 0) -> ImageData:
    cache = str(root.parent / "cache")
    return load_images(DataConfig(name="image-folder", root=str(root), cache=cache, image_size=image_size), seed=0)


def values(data: ImageData) -> list[int]:
    """The first pixel of every image, training and test, sorted."""
    return sorted(np.concatenate([data.train_images, data.test_images])[:, 0, 0, 0].tolist())


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Classes ``a`` and ``b`` of 12 images, of which 2 each are test data."""
    for number in range(12):
        write(tmp_path / "D" / "a" / f"{number:02d}.png", number)
        write(tmp_path / "D" / "b" / f"{number:02d}.png", 100 + number)
    return tmp_path / "D"


# --- all at once, as a user sees it -----------------------------------------------------------------------------------


def test_inspect_says_what_of_a_messy_folder_is_read_and_what_is_not(tmp_path: Path) -> None:
    root = messy_folder.build(tmp_path / "D")
    options = ["data.name=image-folder", f"data.root={root}", f"data.cache={tmp_path / 'cache'}"]
    options += ["partition.clients=2", "partition.unseen-clients=0", "partition.scheme=iid"]
    command = ["data", "inspect", *(part for each in options for part in ("-o", each))]
    done = CliRunner().invoke(cli.app, command, env={"COLUMNS": "500"})
    assert done.exit_code == 0, done.output
    rows = dict(line.strip("│ ").split("│", 1) for line in done.output.splitlines() if line.startswith("│"))
    found = {key.strip(): value.strip() for key, value in rows.items()}
    assert found["train images"] == "24 (12 to 12 per class)"
    assert found["test images"] == "8 (4 to 4 per class)"
    assert found["left out"] == messy_folder.LEFT_OUT
    assert found["split"] == "'Validation' is the test data, as there is no test folder"
    assert found["read as"] == "1 with transparent parts, laid on white; 1 with several frames, of which the first"


def test_the_pixels_of_a_messy_folder_are_the_right_ones(tmp_path: Path) -> None:
    data = load(messy_folder.build(tmp_path / "D"))
    a = data.train_images[data.train_labels == 0]
    # Eight PNG files, the logo's visible grey 10, the first of the frames; JFIF and AVIF lose a little.
    expected = sorted([*range(0, 80, 10), 10, 90, 95, 100])
    np.testing.assert_allclose(sorted(a[:, 0, 0, 0].tolist()), expected, atol=2)
    (logo,) = [image for image in a if image[0, 0, 0] == 10 and image[0, -1, 0] != 10]
    assert (logo[:, : SIDE // 2] == 10).all()
    assert (logo[:, SIDE // 2 :] == 255).all()


def test_a_run_says_it_once_at_the_start_and_its_report_again(tmp_path: Path) -> None:
    root, folder = messy_folder.build(tmp_path / "D"), tmp_path / "run"
    own = {"data.name": "image-folder", "data.root": str(root), "data.cache": str(tmp_path / "cache"), "rounds": 1}
    flat = {**TINY, **own, "partition.clients": 2, "partition.unseen-clients": 0, "server.clients-per-round": 2}
    options = [part for key, value in flat.items() for part in ("-o", f"{key}={value}")]
    done = CliRunner().invoke(cli.app, ["run", "--out", str(folder), *options], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert said.count(f"left out: {messy_folder.LEFT_OUT}; split: 'Validation' is the test data") == 1
    assert said.index("left out") < said.index("round 1/1")
    assert json.loads((folder / "manifest.json").read_text())["notes"]["left out"] == messy_folder.LEFT_OUT
    assert f'Data, left out</td><td class="label">{messy_folder.LEFT_OUT}</td>' in (folder / "report.html").read_text()


def test_nothing_is_said_of_a_folder_without_a_fault(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warn_of_notes(load(plain)) == {}
    assert caplog.records == []


# --- hidden -----------------------------------------------------------------------------------------------------------


def test_hidden_folders_and_files_are_left_out_at_every_depth(plain: Path) -> None:
    before = load(plain)
    assert dict(before.notes) == {}
    for place in (plain, plain / "a", plain / "a" / "inner"):
        for number in range(2):
            write(place / ".ipynb_checkpoints" / "deep" / f"{number}.png", 200 + number)
        write(place / "._copy.png", 210)
        write(place / "@EADIR" / "small.png", 211)
    after = load(plain)
    for kind in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(after, kind), getattr(before, kind))
    assert after.notes["left out"] == "12 in all: 12 hidden (.ipynb_checkpoints 6, ._* 3, @EADIR 3)"


def test_names_that_a_terminal_would_obey_are_escaped(plain: Path) -> None:
    (plain / "a" / ".\x1b[31m").write_bytes(b"")
    (plain / "a" / "x.\x1b[2J").write_bytes(b"")
    note = load(plain).notes["left out"]
    assert "\x1b" not in note
    assert r"'.\x1b[31m' 1" in note


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["..", "../..", ".", "../../../.."])
def test_a_loop_of_folders_ends(plain: Path, target: str) -> None:
    (plain / "a" / "up").symlink_to(target)
    data = load(plain)
    assert values(data) == [*range(12), *range(100, 112)]
    assert data.notes["left out"].startswith("1 in all: 1 ")


def test_links_between_the_folders_of_a_class_double_nothing(plain: Path) -> None:
    """With 12 folders that each link to the next one twice there would be 2^12 paths to the last."""
    for number in range(12):
        folder = plain / "a" / f"level-{number}"
        folder.mkdir()
        for name in ("x", "y"):
            (folder / name).symlink_to(plain / "a" / f"level-{number + 1}")
    write(plain / "a" / "level-12" / "last.png", 50)
    assert values(load(plain)) == [*range(12), 50, *range(100, 112)]


def test_a_file_of_several_names_is_read_once(plain: Path) -> None:
    (plain / "a" / "again.png").symlink_to("00.png")
    (plain / "a" / "hard.png").hardlink_to(plain / "a" / "01.png")
    data = load(plain)
    assert values(data) == [*range(12), *range(100, 112)]
    assert data.notes["left out"] == "2 in all: 2 there already by another name"


@pytest.mark.parametrize("kind", ["folder", "file", "hard", "class"])
def test_a_link_that_puts_an_image_into_two_classes_is_refused(plain: Path, kind: str) -> None:
    if kind == "folder":
        (plain / "b" / "more").symlink_to("../a")
    elif kind == "class":
        (plain / "c").symlink_to("a")
    elif kind == "file":
        (plain / "b" / "more.png").symlink_to("../a/03.png")
    else:
        (plain / "b" / "more.png").hardlink_to(plain / "a" / "03.png")
    with pytest.raises(DataError, match=r"class '[bc]'\) is the same file as .*a/0\d.png' \(class 'a'\)") as error:
        load(plain)
    assert ("; and 9 more like these" in str(error.value)) == (kind in ("folder", "class"))


@pytest.mark.parametrize("kind", ["file", "hard", "folder", "split"])
def test_an_image_that_trains_and_tests_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "D"
    for number, folder in enumerate(("train/a", "train/b", "test/a", "test/b")):
        write(root / folder / "x.png", number)
    if kind == "file":
        (root / "test" / "a" / "y.png").symlink_to(root / "train" / "a" / "x.png")
    elif kind == "hard":
        (root / "test" / "a" / "y.png").hardlink_to(root / "train" / "a" / "x.png")
    elif kind == "folder":
        (root / "test" / "a" / "y").symlink_to(root / "train" / "a")
    else:
        shutil.rmtree(root / "test")
        (root / "test").symlink_to("train")
    with pytest.raises(DataError, match=r"'a' of the test data\) is the same file as .* of the train data\); links"):
        load(root)


def test_class_folders_and_splits_may_lie_elsewhere(plain: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("a", "b"):
        (linked / name).symlink_to(plain / name)
    data = load(linked)
    assert values(data) == values(load(plain))
    assert dict(data.notes) == {}


def test_links_to_nothing_are_counted(plain: Path) -> None:
    (plain / "a" / "gone.png").symlink_to("nowhere.png")
    (plain / "a" / "round.png").symlink_to("round.png")
    data = load(plain)
    assert (len(values(data)), data.notes["left out"]) == (24, "2 in all: 2 linking to nothing")


# --- what is no plain file --------------------------------------------------------------------------------------------


def test_pipes_and_devices_are_never_opened(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(plain / "a" / "pipe.png")
    os.mkfifo(plain / "b" / "deep.jpg")
    (plain / "b" / "zero.png").symlink_to("/dev/zero")
    (plain / "b" / "folder.png").mkdir()  # A folder with the name of an image is a folder.
    write(plain / "b" / "folder.png" / "inner.png", 70)
    opened: list[str] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **rest: opened.append(str(path)) or original(path, **rest))
    data = load(plain)
    assert values(data) == [*range(12), 70, *range(100, 112)]
    assert data.notes["left out"] == "3 in all: 3 neither file nor folder (pipe 2, device 1)"
    assert all(Path(path).is_file() for path in opened)


# --- layouts ----------------------------------------------------------------------------------------------------------


@given(draw=st.data())
def test_the_usual_names_of_splits_are_known_in_any_case(
    draw: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def cased(names: tuple[str, ...]) -> str:
        name = draw.draw(st.sampled_from(names))
        upper = draw.draw(st.lists(st.booleans(), min_size=len(name), max_size=len(name)))
        return "".join(letter.upper() if up else letter for letter, up in zip(name, upper, strict=True))

    root = tmp_path_factory.mktemp("D")
    train, test = cased(SPLITS["train"]), cased(SPLITS["test"] + SPLITS["validation"])
    for split in (train, test):
        for label in ("x", "y"):
            (root / split / label).mkdir(parents=True)
            (root / split / label / "1.png").write_bytes(b"")
    found = read_image_folder(root, lacking=False)
    assert found.classes == ["x", "y"]
    assert {Path(path).parts[-3] for path, _ in found.train} == {train}
    assert {Path(path).parts[-3] for path, _ in found.test or []} == {test}
    assert ("split" in found.notes) == (test.lower() in SPLITS["validation"])


def test_beside_train_and_test_a_validation_folder_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    root = tmp_path / "D"
    for number, (split, count) in enumerate((("train", 3), ("val", 2), ("test", 1), ("extra", 4))):
        for label in ("a", "b"):
            for index in range(count):
                write(root / split / label / f"{index}.png", 10 * number + index)
    data = load(root)
    assert (len(data.train_images), len(data.test_images)) == (6, 2)
    assert values(data) == sorted([0, 1, 2, 20] * 2)
    assert data.notes["left out"] == "12 in all: 12 in folders beside the split (extra 8, val 4)"
    assert data.notes["split"].startswith("'val' is not used: validation data are a share of the training data")


def test_a_class_may_be_called_train(plain: Path) -> None:
    (plain / "a").rename(plain / "train")
    assert load(plain).class_names == ("b", "train")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["images/train/a", "images/train/b", "images/test/a", "images/test/b"], r"deeper: give '.*D/images'"),
        (["data/images/a", "data/images/b"], r"deeper: give '.*D/data/images'"),
        (["images/train/a", "images/test/a", "labels/train/a"], r"'.*D/images' would be a class, .*'test', 'train'"),
        (["images/train/a", "images/test/a", "labels/train/a"], r"give '.*D/images', if that is the data set"),
        (["a/x", "a/y", "b/x", "b/y"], r"'.*D/a' would be a class, but has only folders in it \('x', 'y'\)"),
        (["Train/a", "training/b", "test/a"], r"'Train', 'training', which all mean train data; keep one"),
        (["val/a", "test/b"], r"has the folders 'val', 'test' alone; lay out train/<class>/"),
        (["Validation/a", "Validation/b"], r"has a folder 'Validation' alone"),
        (["a", "b", "test"], r"has a folder 'test' alone"),
        (["valid", "invalid"], r"has a folder 'valid' alone; .* If it is a class, give it another name"),
        (["TRAIN", "TEST"], r"D/TRAIN' has 0 class folders; .* it holds 1 images itself"),
        (["train/a", "train/b", "VAL/a"], r"class 'b' is in 'train' and not in 'VAL'"),
    ],
)
def test_layouts_that_are_not_class_folders_are_refused_with_what_to_do(
    tmp_path: Path, folders: list[str], message: str
) -> None:
    for number, folder in enumerate(folders):
        write(tmp_path / "D" / folder / "1.png", number)
    if "VAL/a" in folders:
        write(tmp_path / "D" / "VAL" / "c.png", 1)
        write(tmp_path / "D" / "VAL" / "d" / "c.png", 1)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "D")


def test_the_folder_of_one_class_is_not_a_data_set(plain: Path) -> None:
    with pytest.raises(DataError, match=r"D/a' has 0 class folders; .* holds 12 images itself: give the folder around"):
        load(plain / "a")


# --- formats ----------------------------------------------------------------------------------------------------------

STILL = [
    "gif",
    "jfif",
    "jpe",
    "JPG",
    "avif",
    "webp",
    "tif",
    "PPM",
    "pnm",
    "jp2",
    "tga",
    "qoi",
    "dib",
    "apng",
    "pcx",
    "sgi",
]


@pytest.mark.parametrize("ending", STILL)
def test_what_pillow_reads_is_read(plain: Path, ending: str) -> None:
    kind = {"jfif": "JPEG", "apng": "PNG"}.get(ending)
    Image.fromarray(np.full((SIDE, SIDE, 3), 50, dtype=np.uint8)).save(plain / "a" / f"x.{ending}", kind)
    found = [value for value in values(load(plain)) if 40 < value < 60]
    assert found == [pytest.approx(50, abs=2)]


def test_formats_that_are_not_read_are_counted_by_ending_and_named_where_a_class_has_no_others(plain: Path) -> None:
    for number in range(8):
        (plain / "a" / f"{number}.{'HEIC' if number % 2 else 'heic'}").write_bytes(b"")
    (plain / "b" / "page.pdf").write_bytes(b"")
    expected = "9 in all: 9 of formats that are not read (.heic 8, .pdf 1)"
    assert load(plain).notes["left out"] == expected
    for file in (plain / "a").glob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"no image of class 'a' \(left out: 9 in all: .*\.heic 8.*; add images"):
        load(plain)


def test_a_program_in_an_image_file_is_not_run(plain: Path) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    (plain / "a" / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(DataError, match=r"a/x.png' cannot be read as an image \(cannot identify"):
        load(plain)


def test_a_jpeg_under_the_name_of_a_png_is_read(plain: Path) -> None:
    write(plain / "a" / "x.png", 50, "JPEG")
    assert 50 in values(load(plain))


def test_of_an_animation_the_first_frame_is_read(plain: Path) -> None:
    frames = [Image.fromarray(np.full((SIDE, SIDE), value, dtype=np.uint8)) for value in (50, 60, 70)]
    for ending in ("gif", "tif", "webp", "png"):
        options = {"lossless": True} if ending == "webp" else {}
        frames[0].save(plain / "a" / f"moving.{ending}", save_all=True, append_images=frames[1:], **options)
    data = load(plain)
    assert values(data) == [*range(12), *[50] * 4, *range(100, 112)]
    assert data.notes["read as"] == "4 with several frames, of which the first"


# --- transparency -----------------------------------------------------------------------------------------------------


def composite(value: int, alpha: int) -> int:
    return round((value * alpha + 255 * (255 - alpha)) / 255)


@pytest.mark.parametrize("ending", ["png", "webp", "tif", "tga", "qoi", "sgi"])
def test_colours_are_laid_on_white_by_their_alpha(tmp_path: Path, ending: str) -> None:
    layered = np.array([[[200, 0, 90, alpha] for alpha in (0, 1, 100, 254, 255)]] * 5, dtype=np.uint8)
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    Image.fromarray(layered).save(tmp_path / f"x.{ending}", **options)
    seen: Counter[str] = Counter()
    pixels = np.asarray(read_image(str(tmp_path / f"x.{ending}"), 0, seen=seen))
    expected = [[composite(value, alpha) for value in (200, 0, 90)] for alpha in (0, 1, 100, 254, 255)]
    np.testing.assert_allclose(pixels[0], expected, atol=1)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 4].tolist() == [200, 0, 90]
    assert seen[image_file.TRANSPARENT] == 1


GREY = np.array([[40, 80], [120, 160]], dtype=np.uint8)


@pytest.mark.parametrize(
    ("mode", "transparency", "expected"),
    [
        ("P", 40, [255, 80, 120, 160]),
        ("P", bytes([255] * 40 + [0] * 41), [255, 255, 120, 160]),
        ("L", 120, [40, 80, 255, 160]),
        ("RGB", (80, 80, 80), [40, 255, 120, 160]),
        ("1", 0, [255, 255, 255, 255]),
    ],
)
def test_transparent_colours_become_white(tmp_path: Path, mode: str, transparency: object, expected: list[int]) -> None:
    image = Image.fromarray(GREY).point([255 * (v > 100) for v in range(256)]) if mode == "1" else Image.fromarray(GREY)
    image.convert(mode).save(tmp_path / "x.png", transparency=transparency)
    pixels = np.asarray(read_image(str(tmp_path / "x.png"), 0)).reshape(4, -1)
    assert pixels[:, 0].tolist() == expected
    assert pixels.shape[1] == (1 if mode in ("L", "1") else 3)


def test_a_gifs_transparent_colour_becomes_white(tmp_path: Path) -> None:
    Image.fromarray(GREY).convert("P").save(tmp_path / "x.gif", transparency=160)
    assert np.asarray(read_image(str(tmp_path / "x.gif"), 0)).reshape(4, -1)[:, 0].tolist() == [40, 80, 120, 255]


def test_grey_with_alpha_stays_grey(tmp_path: Path) -> None:
    for number in range(6):
        layered = np.stack([np.full((4, 4), 10 * number), np.full((4, 4), 255 if number % 2 else 0)], axis=2)
        path = tmp_path / "D" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(layered.astype(np.uint8), "LA").save(path)
    data = load(tmp_path / "D")
    assert data.shape == (1, 4, 4)
    assert values(data) == [10, 30, 50, 255, 255, 255]


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image of more than a million pixels may be decoded."""
    original = ImageFile.ImageFile.load

    def load(self: ImageFile.ImageFile) -> object:
        assert self.width * self.height < 10**6, f"decodes {self.size}"
        return original(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (2, 2**26), (13000, 13000), (20000, 20000)])
def test_images_of_too_many_pixels_are_refused_by_their_header(tmp_path: Path, width: int, height: int) -> None:
    """The file has the header of a large image and no pixels, so that only its size can be what is wrong."""
    whole = tmp_path / "small.png"
    Image.new("L", (1, 1)).save(whole)
    path = tmp_path / "x.png"
    path.write_bytes(with_size(whole.read_bytes(), width, height))
    given = f"{width:,} x {height:,} pixels" if width < 13379 else "is too large .400000000 pixels|exceeds limit"
    with pytest.raises(DataError, match=given) as error:
        read_image(str(path), 32)
    assert "x.png" in str(error.value)
    assert "images of at most 67,108,864 pixels are read; scale it down" in str(error.value)


def with_size(png: bytes, width: int, height: int) -> bytes:
    import zlib

    header = png[12:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def test_the_largest_size_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_file, "LARGEST_PIXELS", 64)
    write(tmp_path / "x.png", 1)
    assert read_image(str(tmp_path / "x.png"), 0).size == (8, 8)
    Image.new("L", (13, 5)).save(tmp_path / "y.png")
    with pytest.raises(DataError, match=r"y.png' has 13 x 5 pixels; images of at most 64 pixels"):
        read_image(str(tmp_path / "y.png"), 0)


@pytest.mark.parametrize(("progressive", "size", "reads"), [(False, 8, True), (False, 0, False), (True, 8, False)])
def test_a_larger_jpeg_is_decoded_at_a_part_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progressive: bool, size: int, reads: bool
) -> None:
    monkeypatch.setattr(image_file, "LARGEST_PIXELS", 64 * 64)
    halves = np.zeros((256, 256), dtype=np.uint8)
    halves[:128] = 200
    Image.fromarray(halves).save(tmp_path / "x.jpg", progressive=progressive, quality=95)
    if not reads:
        advice = "scale it down" if progressive else "set data.image-size, or scale it down"
        with pytest.raises(DataError, match=rf"has 256 x 256 pixels; .* pixels are read; {advice}$"):
            read_image(str(tmp_path / "x.jpg"), size)
        return
    pixels = np.asarray(read_image(str(tmp_path / "x.jpg"), size))
    assert pixels.shape == (8, 8)
    np.testing.assert_allclose(pixels[:3], 200, atol=3)
    np.testing.assert_allclose(pixels[-3:], 0, atol=3)


@pytest.mark.usefixtures("undecoded")
def test_an_image_of_another_size_than_the_others_is_not_decoded(plain: Path) -> None:
    for number in range(5):
        Image.new("1", (1200, 1000 + number)).save(plain / "b" / f"z{number}.png")
    with pytest.raises(DataError, match=r"b/z\d.png' is 1200x\d+ and .*/a/\d+.png' is 8x8 pixels; set data.image-size"):
        load(plain)


@pytest.mark.usefixtures("undecoded")
def test_a_clients_own_folder_is_held_to_the_same_rules(plain: Path, tmp_path: Path) -> None:
    root = tmp_path / "own"
    (root / "Training").mkdir(parents=True)
    plain.joinpath("a").rename(root / "Training" / "a")
    write(root / "Training" / "a" / ".ipynb_checkpoints" / "00.png", 0)
    (root / "Training" / "a" / "up").symlink_to("..")
    os.mkfifo(root / "Training" / "a" / "pipe.png")
    (root / "Training" / "a" / "x.heic").write_bytes(b"")
    own = load_own_images(root, (3, SIDE, SIDE), ["c", "a"], 0)
    assert own.train[0][:, 0, 0, 0].tolist() == list(range(12))
    assert own.train[1].tolist() == [1] * 12
    assert len(own.test[0]) == 0
    assert own.notes["left out"].startswith("4 in all: ")
    Image.new("1", (1200, 1000)).save(root / "Training" / "a" / "big.png")
    with pytest.raises(DataError, match=r"big.png' is 1200x1000 pixels and the run's images are 8x8; scale it"):
        load_own_images(root, (3, SIDE, SIDE), ["c", "a"], 0)
    (root / "test" / "a").mkdir(parents=True)
    (root / "test" / "a" / "leak.png").symlink_to(root / "Training" / "a" / "00.png")
    with pytest.raises(DataError, match=r"leak.png' \(class 'a' of the test data\) is the same file as"):
        read_client_folder(root, ["a", "c"])


@pytest.mark.parametrize("name", ["nowhere", "empty", "test"])
def test_a_clients_folder_needs_training_images(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "test" / "test" / "a" / "x.png", 1)
    with pytest.raises(DataError, match=f"{name}' has no folder 'train'; put the client's images into train/CLASS/"):
        read_client_folder(tmp_path / name, ["a", "b"])


def test_decoded_images_that_fit_nowhere_are_refused_before_they_are_decoded(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 24 * 3 * SIDE * SIDE
    for free in (needed, needed - 1):
        monkeypatch.setattr(sources.shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        shutil.rmtree(plain.parent / "cache", ignore_errors=True)
        if free == needed:
            assert len(values(load(plain))) == 24
            continue
        with pytest.raises(DataError, match=r"24 images of 8x8 pixels take 4,608 bytes decoded, and 4,607 are free"):
            load(plain)


def test_no_image_is_asked_to_be_larger_than_what_is_read() -> None:
    assert FrampConfig.from_flat({"data.image-size": 8192}).data.image_size ** 2 == image_file.LARGEST_PIXELS
    with pytest.raises(ConfigError, match=r"data\.image-size.*8192"):
        FrampConfig.from_flat({"data.image-size": 8193})


def test_digits_that_would_fill_the_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**6))
    with pytest.raises(DataError, match=r"images of 8192x8192 pixels take 96,\d{3},\d{3},\d{3} bytes decoded"):
        load_images(DataConfig(cache=str(tmp_path), image_size=8192), seed=0)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


# --- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_images_are_named_together(plain: Path) -> None:
    for number in range(5):
        (plain / "a" / f"0{number}.png").write_bytes(b"" if number else b"no image")
    with pytest.raises(DataError) as error:
        load(plain)
    said = str(error.value)
    assert said.count("cannot be read as an image") == 3
    trains = len(load_listing(plain)[0])
    damaged = sum(Path(path).stat().st_size < 10 for path, _ in load_listing(plain)[0])
    assert said.startswith(f"{damaged} of {trains} images cannot be used: ")
    assert said.endswith(f"; and {damaged - 3} more like these")


def load_listing(root: Path) -> list[list[tuple[str, int]]]:
    """Train and test files as the loader divides them."""
    found = read_image_folder(root, lacking=False)
    labels = np.array([label for _, label in found.train])
    return [[found.train[place] for place in part] for part in sources._stratified(labels, found.classes, 0)]


def test_an_empty_file_is_said_to_be_empty(plain: Path) -> None:
    (plain / "a" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a/x.png' cannot be read as an image \(it has 0 bytes\); repair or remove it"):
        load(plain)


def test_a_folder_that_cannot_be_listed_is_named(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    (plain / "a" / "inner").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"a/inner' cannot be read \(Permission denied\)"):
        load(plain)


# --- names as other systems write them --------------------------------------------------------------------------------

NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_a_class_is_one_class_in_both_spellings_of_unicode(tmp_path: Path) -> None:
    """What a Mac has packed holds names in normal form D."""
    for number in range(4):
        for split, name, value in (("train", NFC, 0), ("train", "cafz", 50), ("test", NFD, 100), ("test", "cafz", 150)):
            write(tmp_path / "D" / split / name / f"{number}.png", value + number)
    data = load(tmp_path / "D")
    # An e and an accent come before z, é comes after it, as it always did.
    assert data.class_names == ("cafz", NFC)
    assert sorted(data.test_images[data.test_labels == 1][:, 0, 0, 0]) == [100, 101, 102, 103]


def test_a_device_may_spell_the_runs_classes_in_either_form(tmp_path: Path) -> None:
    for name in (NFD, "cafz"):
        write(tmp_path / "D" / "train" / name / "0.png", 1)
    for classes in ((NFC, "cafz"), (NFD, "cafz")):
        assert [label for _, label in read_client_folder(tmp_path / "D", classes).train] == [0, 1]
    own = [read_image_folder(_folders(tmp_path / form, form), lacking=True).classes for form in (NFC, NFD)]
    assert own == [["cafz", NFC]] * 2


def _folders(root: Path, form: str) -> Path:
    write(root / form / "0.png", 1)
    write(root / "cafz" / "0.png", 2)
    return root


def test_two_folders_of_one_name_in_two_spellings_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "D" / NFC / "0.png", 1)
    write(tmp_path / "D" / NFD / "0.png", 2)
    with pytest.raises(DataError, match=r"two folders 'café', in two spellings .*'cafe\\u0301' and 'caf\\xe9'"):
        load(tmp_path / "D")


def test_names_that_differ_in_case_are_different_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("CAT", "Cat", "cat", "2", "10", " a ")):
        for image in range(2):
            write(tmp_path / "D" / name / f"{image}.png", 10 * number + image)
    data = load(tmp_path / "D")
    assert data.class_names == (" a ", "10", "2", "CAT", "Cat", "cat")
    assert sorted(data.train_images[:, 0, 0, 0] // 10) == sorted(data.test_images[:, 0, 0, 0] // 10) == list(range(6))


def test_the_table_of_clients_steers_no_terminal(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / "D" / "a\x1b[31m" / f"{number}.png", number)
        write(tmp_path / "D" / "[bold]" / f"{number}.png", number + 10)
    result = CliRunner().invoke(cli.app, ["data", "inspect", *_options(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert r"a\x1b[31m" in result.output
    assert "[bold]" in result.output


def _options(tmp_path: Path) -> list[str]:
    own = {"data.name": "image-folder", "data.root": str(tmp_path / "D"), "data.cache": str(tmp_path / "cache")}
    flat = {**TINY, **own, "partition.clients": 2, "partition.unseen-clients": 0, "server.clients-per-round": 2}
    return [part for key, value in flat.items() for part in ("-o", f"{key}={value}")]


# --- copies and damaged metadata --------------------------------------------------------------------------------------


def test_test_images_that_are_copies_of_training_images_are_said(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "D" / "train" / "a" / f"{number}.png", number)
        write(tmp_path / "D" / "train" / "b" / f"{number}.png", 10 + number)
        write(tmp_path / "D" / "test" / "a" / f"{number}.bmp", number + 20 * (number > 1))
        write(tmp_path / "D" / "test" / "b" / f"{number}.png", 50 + number)
    said = {"copies": "2 of 10 test images are training images, too, to the pixel"}
    assert load(tmp_path / "D").notes == said
    assert load_own_images(tmp_path / "D", (3, SIDE, SIDE), ("a", "b"), 0).notes == said


def test_damaged_metadata_are_counted_and_not_shown_image_by_image(
    plain: Path, recwarn: pytest.WarningsRecorder
) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(40)
    for number in range(6):
        Image.new("RGB", (SIDE, SIDE), (number,) * 3).save(plain / "a" / f"{number}.jpg", exif=exif)
    Image.new("RGB", (SIDE, SIDE)).save(plain / "a" / "sound.jpg", exif=Image.Exif())
    assert load(plain).notes["read as"] == "6 with damaged or unusual metadata"
    assert [each for each in recwarn if "EXIF" in str(each.message)] == []


# --- what is written among the images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "out", "a", "a/deep/out"])
def test_neither_a_run_nor_a_cache_is_put_among_the_images(plain: Path, tmp_path: Path, inside: str) -> None:
    before = sorted(plain.rglob("*"))
    (tmp_path / "link").symlink_to(plain)
    for root in (plain, tmp_path / "link"):
        for options in (["--out", str(root / inside / "run")], ["-o", f"data.cache={root / inside}"]):
            command = ["run", "--out", str(tmp_path / "run"), *_options(tmp_path), *options]
            with pytest.raises(DataError, match=r"lies in data\.root .*/D', where a folder is a class"):
                CliRunner().invoke(cli.app, command, catch_exceptions=False)
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert sorted(plain.rglob("*")) == before


def test_a_comparison_is_not_put_among_the_images(plain: Path, tmp_path: Path) -> None:
    before = sorted(plain.rglob("*"))
    command = ["compare", "--methods", "framp,fedavg", "--out", str(plain / "compare"), *_options(tmp_path)]
    with pytest.raises(DataError, match=r"the run folder .*/D/compare/runs/framp-seed0' lies in data\.root"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert sorted(plain.rglob("*")) == before


@pytest.mark.parametrize(("folder", "fits"), [("runs/1", True), ("train/runs", False), ("Test/a/runs", False)])
def test_beside_train_and_test_there_is_room(tmp_path: Path, folder: str, fits: bool) -> None:
    for split in ("train", "Test"):
        write(tmp_path / "D" / split / "a" / "0.png", 1)
    if fits:
        require_outside(tmp_path / "D", tmp_path / "D" / folder, "it")
        return
    with pytest.raises(DataError, match=r"it '.*runs' lies in data\.root"):
        require_outside(tmp_path / "D", tmp_path / "D" / folder, "it")


def test_a_hidden_folder_is_no_data(plain: Path) -> None:
    require_outside(plain, plain / ".cache" / "framp", "it")
    require_outside(plain, plain.parent / "Das" / "run", "it")
    assert load(plain).notes == {}


@pytest.mark.parametrize("content", ["[1, 2]", '"text"', "3", "null", "{"])
def test_damaged_notes_of_the_cache_are_named(plain: Path, content: str) -> None:
    load(plain)
    (notes,) = (plain.parent / "cache").glob("*/notes.json")
    notes.write_text(content)
    with pytest.raises(DataError, match=r"the cached images in .* are damaged .*; delete that folder"):
        load(plain)
