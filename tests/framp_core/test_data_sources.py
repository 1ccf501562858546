import os
import pickle

import numpy as np
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from framp_core.config import DataConfig
from framp_core.data.sources import load_images
from framp_core.data.transforms import Normaliser
from framp_core.errors import DataError


def config(tmp_path, **values):
    return DataConfig(cache=str(tmp_path / "cache"), **values)


def folder_config(tmp_path, **values):
    return config(tmp_path, name="image-folder", root=str(tmp_path / "images"), **values)


def write_image(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def write_folder(root, counts, shape=(6, 4, 3), seed=0):
    """``counts``: {"train/cat": 3, ...}; returns the pixels by path below root."""
    rng = np.random.default_rng(seed)
    written = {}
    for folder, count in counts.items():
        for number in range(count):
            name = f"{folder}/{number:03d}.png"
            written[name] = rng.integers(0, 256, shape, dtype=np.uint8)
            write_image(root / name, written[name])
    return written


# --- digits ---------------------------------------------------------------------------------------------------------


def test_digits_hold_every_digit_image_once(tmp_path):
    data = load_images(config(tmp_path), seed=0)
    assert (data.shape, data.classes) == ((1, 8, 8), 10)
    assert data.train_images.dtype == data.test_images.dtype == np.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    original, labels = load_digits(return_X_y=True)
    expected = np.rint(original * 255 / 16).astype(np.uint8)
    assert (expected.min(), expected.max()) == (0, 255)
    ours = np.concatenate([data.train_images, data.test_images]).reshape(len(original), 64)
    our_labels = np.concatenate([data.train_labels, data.test_labels])
    found = sorted((pixels.tobytes(), label) for pixels, label in zip(ours, our_labels, strict=True))
    assert found == sorted((pixels.tobytes(), label) for pixels, label in zip(expected, labels, strict=True))


def test_digits_split_a_fifth_of_each_class_by_the_seed(tmp_path):
    data = load_images(config(tmp_path), seed=0)
    totals = np.bincount(load_digits(return_X_y=True)[1])
    np.testing.assert_array_equal(np.bincount(data.test_labels), np.rint(totals * 0.2))
    np.testing.assert_array_equal(load_images(config(tmp_path), seed=0).test_images, data.test_images)
    assert not np.array_equal(load_images(config(tmp_path), seed=1).test_images, data.test_images)


def test_images_are_memory_maps_that_cannot_be_written(tmp_path):
    data = load_images(config(tmp_path), seed=0)
    assert isinstance(data.train_images.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        data.train_images[0] = 0


def test_image_size_resizes_arrays(tmp_path):
    small = load_images(config(tmp_path), seed=0)
    large = load_images(config(tmp_path, image_size=16), seed=0)
    assert large.shape == (1, 16, 16)
    np.testing.assert_array_equal(large.train_labels, small.train_labels)
    halved = large.train_images.reshape(-1, 1, 8, 2, 8, 2).mean(axis=(3, 5))
    assert np.corrcoef(halved.ravel(), small.train_images.ravel())[0, 1] > 0.98


def test_a_damaged_cache_is_named(tmp_path):
    load_images(config(tmp_path), seed=0)
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    (folder / "train_images.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match=f"{folder.name}.* are damaged .* delete that folder"):
        load_images(config(tmp_path), seed=0)


# --- CIFAR ----------------------------------------------------------------------------------------------------------


def write_cifar(folder, files, label_key, meta, classes, seed=0):
    """Small files in the format of the python version: a dictionary with ``data`` (N, 3072) and the labels."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    content = {}
    for name in files:
        entry = {"data": rng.integers(0, 256, (8, 3072), dtype=np.uint8), label_key: rng.integers(0, classes, 8)}
        content[name] = entry
        (folder / name).write_bytes(pickle.dumps({**entry, label_key: entry[label_key].tolist()}, protocol=2))
    names = [f"class {label}" for label in range(classes)]
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: names}, protocol=2))
    return content


def without_checksums(monkeypatch, source):
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(source, attribute, [[name, None] for name, _ in getattr(source, attribute)])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": None})


@pytest.mark.parametrize(
    ("name", "label_key", "classes"), [("cifar10", "labels", 10), ("cifar100", "fine_labels", 100)]
)
def test_cifar_files_are_read_as_they_are(tmp_path, monkeypatch, name, label_key, classes):
    source = getattr(torchvision.datasets, name.upper())
    without_checksums(monkeypatch, source)
    train_files, test_files = ([file for file, _ in files] for files in (source.train_list, source.test_list))
    folder = tmp_path / "data" / source.base_folder
    content = write_cifar(folder, train_files + test_files, label_key, source.meta, classes)
    data = load_images(config(tmp_path, name=name, root=str(tmp_path / "data")), seed=0)
    for files, images, labels in (
        (train_files, data.train_images, data.train_labels),
        (test_files, data.test_images, data.test_labels),
    ):
        expected = np.concatenate([content[file]["data"] for file in files]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, np.concatenate([content[file][label_key] for file in files]))
    assert data.class_names == tuple(f"class {label}" for label in range(classes))


def test_missing_cifar_says_where_it_must_lie(tmp_path):
    asked = config(tmp_path, name="cifar10", root=str(tmp_path))
    with pytest.raises(DataError, match=r"data_batch_1' is missing.*cifar-10-batches-py.*data\.root.*download=True"):
        load_images(asked, seed=0)


def test_damaged_cifar_is_refused(tmp_path):
    source = torchvision.datasets.CIFAR10
    files = [file for file, _ in source.train_list + source.test_list]
    write_cifar(tmp_path / source.base_folder, files, "labels", source.meta, 10)  # not the official checksums
    with pytest.raises(DataError, match="cifar10 is damaged"):
        load_images(config(tmp_path, name="cifar10", root=str(tmp_path)), seed=0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("part", ["first", "meta"])
def test_a_hostile_cifar_file_is_known_by_its_checksum_before_it_is_opened(tmp_path, name, part):
    """CIFAR's files are pickles; torchvision compares each with its published MD5 first, which this holds it to."""
    source = getattr(torchvision.datasets, name.upper())
    files = [file for file, _ in source.train_list + source.test_list]
    write_cifar(tmp_path / source.base_folder, files, "labels", source.meta, 10)
    hostile = f"cos\nsystem\n(Vtouch {tmp_path / 'mark'}\ntR."
    (tmp_path / source.base_folder / (files[0] if part == "first" else source.meta["filename"])).write_text(hostile)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        load_images(config(tmp_path, name=name, root=str(tmp_path)), seed=0)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "image-folder"])
def test_a_root_is_asked_for(tmp_path, name):
    with pytest.raises(DataError, match=r"data\.root is empty"):
        load_images(config(tmp_path, name=name), seed=0)
    with pytest.raises(DataError, match=r"data\.root=.*nowhere' is not a folder"):
        load_images(config(tmp_path, name=name, root=str(tmp_path / "nowhere")), seed=0)


# --- image folders --------------------------------------------------------------------------------------------------


def test_an_image_folder_with_its_own_split_is_read_bit_for_bit(tmp_path):
    counts = {"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 2}
    written = write_folder(tmp_path / "images", counts)
    (tmp_path / "images" / "train" / ".hidden").mkdir()
    data = load_images(folder_config(tmp_path), seed=0)
    assert data.class_names == ("cat", "dog")
    assert data.shape == (3, 6, 4)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test_labels.tolist() == [0, 1, 1]
    for split, images in (("train", data.train_images), ("test", data.test_images)):
        expected = [written[name].transpose(2, 0, 1) for name in sorted(written) if name.startswith(split)]
        np.testing.assert_array_equal(images, np.stack(expected))
    pixels = data.train_images / 255
    np.testing.assert_allclose(data.normaliser.mean, pixels.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(data.normaliser.std, pixels.std(axis=(0, 2, 3)))


def test_a_folder_of_classes_is_split_by_the_seed(tmp_path):
    written = write_folder(tmp_path / "images", {"cat": 10, "dog": 15, "eel": 2})
    data = load_images(folder_config(tmp_path), seed=0)
    assert np.bincount(data.test_labels).tolist() == [2, 3, 1]
    assert np.bincount(data.train_labels).tolist() == [8, 12, 1]
    everything = np.concatenate([data.train_images, data.test_images])
    original = [pixels.transpose(2, 0, 1).tobytes() for pixels in written.values()]
    assert sorted(image.tobytes() for image in everything) == sorted(original)
    other = load_images(folder_config(tmp_path), seed=1)
    assert not np.array_equal(other.test_images, data.test_images)


def test_images_have_one_channel_only_if_all_are_grey(tmp_path):
    root = tmp_path / "images"
    grey = write_folder(root, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1}, shape=(5, 5))
    data = load_images(folder_config(tmp_path), seed=0)
    assert data.shape == (1, 5, 5)
    np.testing.assert_array_equal(data.test_images[0, 0], grey["test/a/000.png"])
    write_image(root / "train" / "a" / "colour.png", np.zeros((5, 5, 3), dtype=np.uint8))
    mixed = load_images(folder_config(tmp_path), seed=0)
    assert mixed.shape == (3, 5, 5)
    np.testing.assert_array_equal(mixed.test_images[0], np.stack([grey["test/a/000.png"]] * 3))


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    root = tmp_path / "images"
    write_folder(root, {"a": 2, "b": 2}, shape=(4, 4, 3))
    flat = np.full((4, 4, 3), 204, dtype=np.uint8)
    write_image(root / "a" / f"other.{'tif' if mode == 'CMYK' else 'png'}", flat, mode)
    data = load_images(folder_config(tmp_path), seed=0)
    everything = np.concatenate([data.train_images, data.test_images])
    assert any(np.array_equal(image, flat.transpose(2, 0, 1)) for image in everything)


def test_photographs_are_turned_upright(tmp_path):
    root = tmp_path / "images"
    for name in ("a/0", "a/1", "b/0", "b/1"):
        write_image(root / f"{name}.png", np.zeros((8, 8), dtype=np.uint8))
    turned = Image.fromarray(np.repeat([[255], [0]], 4, axis=0).astype(np.uint8).repeat(8, axis=1))  # bright top
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    turned.save(root / "a" / "0.png", exif=exif)
    data = load_images(folder_config(tmp_path), seed=0)
    (image,) = [image[0] for image in np.concatenate([data.train_images, data.test_images]) if image.any()]
    assert (image[:4].max(), image[4:].min()) == (0, 255)


def test_mixed_sizes_need_an_image_size(tmp_path):
    root = tmp_path / "images"
    write_folder(root, {"a": 2, "b": 2}, shape=(4, 4, 3))
    wide = np.zeros((6, 12, 3), dtype=np.uint8)
    wide[:, 3:9] = 255
    write_image(root / "b" / "wide.png", wide)
    with pytest.raises(DataError, match=r"wide.png' is 12x6 and .*a/\d+.png' is 4x4 pixels; set data.image-size"):
        load_images(folder_config(tmp_path), seed=0)
    data = load_images(folder_config(tmp_path, image_size=6), seed=0)
    assert data.shape == (3, 6, 6)
    everything = np.concatenate([data.train_images, data.test_images])
    assert any(image.min() == 255 for image in everything)  # the centre of the wide one, in its proportions


def test_a_changed_folder_is_decoded_anew(tmp_path):
    root = tmp_path / "images"
    write_folder(root, {"a": 3, "b": 3})
    before = load_images(folder_config(tmp_path), seed=0)
    changed = root / "a" / "000.png"
    write_image(changed, np.zeros((6, 4, 3), dtype=np.uint8))
    os.utime(changed, ns=(1, 1))
    after = load_images(folder_config(tmp_path), seed=0)
    zeros = [
        sum(not image.any() for image in np.concatenate([data.train_images, data.test_images]))
        for data in (before, after)
    ]
    assert zeros == [0, 1]


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "flipped"])
def test_a_corrupt_image_is_named_and_leaves_no_cache(tmp_path, damage):
    root = tmp_path / "images"
    write_folder(root, {"a": 3, "b": 3}, shape=(32, 32, 3))
    victim = root / "b" / "001.png"
    whole = victim.read_bytes()
    flipped = whole[:200] + bytes(255 - byte for byte in whole[200:260]) + whole[260:]
    victim.write_bytes({"truncated": whole[:400], "text": b"not an image", "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(DataError, match=r"b/001.png' cannot be read as an image .* repair or remove it"):
        load_images(folder_config(tmp_path), seed=0)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    victim.unlink()
    assert len(load_images(folder_config(tmp_path), seed=0).train_images) == 3


def test_deep_images_are_refused(tmp_path):
    root = tmp_path / "images"
    write_folder(root, {"a": 2, "b": 2}, shape=(4, 4))
    write_image(root / "a" / "deep.png", np.full((4, 4), 40000, dtype=np.uint16))
    with pytest.raises(DataError, match=r"deep.png' has more than 8 bits per channel"):
        load_images(folder_config(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "has 0 class folders; expected two or more"),
        ({"a": 3}, "has 1 class folders; expected two or more"),
        ({"a": 3, "b": 1}, "class 'b' has 1 image; at least two"),
        ({"train/a": 2, "train/b": 2}, "has a folder 'train' alone"),
        ({"train/a": 2, "train/b": 2, "test/a": 2, "test/c": 2}, "class 'b' is in 'train' and not in 'test'"),
        ({"train/a": 2, "train/b": 2, "test/a": 2, "test/b": 2, "test/c": 2}, "class 'c' is in 'test' and not in"),
    ],
)
def test_layouts_that_cannot_be_used_are_explained(tmp_path, counts, message):
    (tmp_path / "images").mkdir()
    write_folder(tmp_path / "images", counts)
    with pytest.raises(DataError, match=message):
        load_images(folder_config(tmp_path), seed=0)


def test_an_empty_class_folder_is_named(tmp_path):
    root = tmp_path / "images"
    write_folder(root, {"a": 2, "b": 2})
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="has no image of class 'empty'; add images"):
        load_images(folder_config(tmp_path), seed=0)


def test_published_normalisation_leaves_the_pixels_alone(tmp_path):
    root = tmp_path / "images"
    write_folder(root, {"train/a": 3, "train/b": 3, "test/a": 2, "test/b": 2})
    measured, published = (
        load_images(folder_config(tmp_path, normalisation=name), 0) for name in ("measured", "published")
    )
    assert published.normaliser == Normaliser((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert measured.normaliser == Normaliser.of(measured.train_images) != published.normaliser
    np.testing.assert_array_equal(measured.train_images, published.train_images)


def test_published_normalisation_is_for_three_channels(tmp_path):
    with pytest.raises(DataError, match=r"3 channels and the images of 'digits' have 1"):
        load_images(config(tmp_path, normalisation="published"), 0)
