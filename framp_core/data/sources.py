"""Image data sets as memory-mapped uint8 arrays: digits, CIFAR, or a folder of the user's own images."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image, ImageOps

from framp_core.config import DataConfig
from framp_core.data.cache import cached, content_digest, file_stamps, names_digest
from framp_core.data.transforms import PUBLISHED, Normaliser
from framp_core.errors import DataError
from framp_core.randomness import stream

TEST_SHARE = 0.2
"""Share of each class that becomes test data where a source has no test split of its own."""

OWN_IMAGES = "own-images"
_SPLITS = ("train", "test")

# scikit-learn and torchvision take longer to import than torch, and a device starts a process for every message: they
# are imported where they are used, which is never for digits that are decoded already.


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set with a train and a test pool.

    Attributes:
        train_images: uint8 ``(N, C, H, W)``, a read-only memory map.
        train_labels: int64 ``(N,)`` in [0, number of classes).
        test_images: uint8 ``(M, C, H, W)``, a read-only memory map.
        test_labels: int64 ``(M,)``.
        class_names: name of each label.
        normaliser: measured on the train pool, or the published one.
        digests: SHA-256 of ``class names``, ``training data`` and ``test data``, pixels and labels in the order of
            their pool; made once, with the cache.
        notes: what was left out of a folder of images, or read otherwise than may be expected, by what it is about.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    normaliser: Normaliser
    digests: Mapping[str, str]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load_images(config: DataConfig, seed: int) -> ImageData:
    """Open a data set, decoding it into the cache on first use.

    - ``digits``: the 8x8 grey digits of scikit-learn, 0..16 scaled to 0..255, a fifth of each class as test data.
    - ``cifar10``, ``cifar100``: the python version in ``config.root``, with its own split.
    - ``own-images``: an ``image-folder`` with the images of one client; folders of classes that it lacks are empty.
    - ``image-folder``: ``root/train/<class>/*`` and ``root/test/<class>/*``, or ``root/<class>/*``, of which a fifth
      of each class becomes test data. Images are RGB unless every one is grey. With ``config.image_size`` an image
      is scaled and cut at the centre to a square of that side, keeping its proportions.

    Args:
        config: which images, from where.
        seed: decides the test split where the source has none.

    Raises:
        DataError: files are missing, empty, damaged, of mixed sizes, a class is missing in one split, or
            ``config.normalisation`` wants images of three channels.
    """
    images = _opened(config, seed)
    if config.normalisation == "measured":
        return images
    if images.shape[0] != len(PUBLISHED.mean):
        raise DataError(
            f"data.normalisation='published' has constants for 3 channels and the images of {config.name!r} have "
            f"{images.shape[0]}; use 'measured'"
        )
    return replace(images, normaliser=PUBLISHED)


def _opened(config: DataConfig, seed: int) -> ImageData:
    if config.name == "digits":
        return _digits(config, seed)
    if not config.root:
        raise DataError(f"data.root is empty; data set {config.name!r} needs the absolute folder of its files")
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root={config.root!r} is not a folder; give the absolute folder of {config.name!r}")
    return _image_folder(config, root, seed) if config.name in ("image-folder", OWN_IMAGES) else _cifar(config, root)


# --- arrays in memory: digits and CIFAR -------------------------------------------------------------------------


def _digits(config: DataConfig, seed: int) -> ImageData:
    def build(folder: Path) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        pixels = np.rint(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
        train, test = _stratified(labels, [str(digit) for digit in range(10)], seed)
        for split, chosen in zip(_SPLITS, (train, test), strict=True):
            _save_arrays(folder, split, pixels[chosen], labels[chosen], config.image_size)
        _save_facts(folder, [str(digit) for digit in range(10)])

    return _open(cached(config.cache, {"name": "digits", "seed": seed, "image-size": config.image_size}, build))


def _cifar(config: DataConfig, root: Path) -> ImageData:
    import torchvision

    source: Any = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[config.name]
    names = [name for name, _ in source.train_list + source.test_list] + [source.meta["filename"]]
    help_text = (
        f"the python version of {config.name} must lie in {str(root / source.base_folder)!r}, files "
        f"{', '.join(names)}; data.root is the folder around it. To download it: python -c "
        f'"import torchvision; torchvision.datasets.{source.__name__}({str(root)!r}, download=True)"'
    )

    def build(folder: Path) -> None:
        try:
            parts = [source(root, train=train, download=False) for train in (True, False)]
        except RuntimeError as error:
            raise DataError(f"{config.name} is damaged ({error}): {help_text}") from error
        for split, part in zip(_SPLITS, parts, strict=True):
            _save_arrays(folder, split, part.data.transpose(0, 3, 1, 2), np.array(part.targets), config.image_size)
        _save_facts(folder, parts[0].classes)

    try:
        stamps = file_stamps(root, [root / source.base_folder / name for name in names])
    except FileNotFoundError as error:
        raise DataError(f"{str(error.filename)!r} is missing: {help_text}") from error
    identity = {"name": config.name, "root": str(root), "files": stamps, "image-size": config.image_size}
    return _open(cached(config.cache, identity, build))


# --- folders of image files ---------------------------------------------------------------------------------------


def _image_folder(config: DataConfig, root: Path, seed: int) -> ImageData:
    own_split = [name for name in _SPLITS if (root / name).is_dir()]
    if len(own_split) == 1:
        raise DataError(
            f"{str(root)!r} has a folder {own_split[0]!r} alone; lay out train/<class>/ and test/<class>/, or <class>/"
        )
    identity: dict[str, Any] = {"name": config.name, "root": str(root), "image-size": config.image_size}
    lacking = config.name == OWN_IMAGES
    if own_split:
        classes, *listings = _listed_splits(root, lacking)
    else:
        classes, listing = _listed(root, lacking)
        parts = _stratified(np.array([label for _, label in listing]), classes, seed, lacking)
        listings = [[listing[index] for index in part] for part in parts]
        identity["seed"] = seed
    try:
        stamps = [file_stamps(root, (Path(path) for path, _ in listing)) for listing in listings]
    except OSError as error:
        raise DataError(f"{error.filename!r} cannot be read ({error.strerror}); repair or remove it") from error
    build = partial(_decode, listings=listings, classes=classes, image_size=config.image_size)
    return _open(cached(config.cache, {**identity, "files": stamps}, build))


def _listed(folder: Path, lacking: bool) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names of a folder of class folders, and (path, label) of every image in it; some may be ``lacking``."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise DataError(
            f"{str(folder)!r} has {len(classes)} class folders; expected two or more, each with the images of one class"
        )
    labels = {name: label for label, name in enumerate(classes)}
    files = make_dataset(folder, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    empty = set(labels.values()) - {label for _, label in files}
    if not files or (empty and not lacking):
        raise DataError(
            f"{str(folder)!r} has no image of class {', '.join(repr(classes[label]) for label in sorted(empty))}; "
            f"add images ({', '.join(IMG_EXTENSIONS)}) or remove the folder"
        )
    return classes, files


def load_own_images(
    folder: Path, shape: tuple[int, ...], class_names: Sequence[str], image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read ``folder/<class>/*`` as images of a data set that is known from elsewhere; a class may be missing.

    Args:
        folder: a folder that is missing holds no image.
        shape: (channels, height, width) that the images shall have.
        class_names: name of each label; a folder must have the name of its class.
        image_size: images are scaled and cut at the centre to a square of that side; 0: they must have their size.

    Returns:
        uint8 ``(N, C, H, W)`` and int64 ``(N,)``, class after class, the images of a class by file name.

    Raises:
        DataError: a class folder of another name, or an image that cannot be read or is of another size or colour.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    labels = {name: label for label, name in enumerate(class_names)}
    found = [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."] if folder.is_dir() else []
    unknown = sorted(set(found) - set(labels))
    if unknown:
        raise DataError(
            f"{str(folder)!r} has a folder {unknown[0]!r}, and the run knows no such class; its classes are "
            f"{', '.join(map(repr, class_names[:20]))}{' and so on' if len(class_names) > 20 else ''}"
        )
    held = {name: labels[name] for name in sorted(found, key=lambda name: labels[name])}
    files = make_dataset(folder, held, extensions=IMG_EXTENSIONS, allow_empty=True) if held else []
    files.sort(key=lambda file: (file[1], file[0]))
    pixels = np.zeros((len(files), *shape), dtype=np.uint8)
    for place, (path, _) in enumerate(files):
        pixels[place] = _like(path, shape, image_size)
    return pixels, np.array([label for _, label in files], dtype=np.int64)


def _like(path: str, shape: tuple[int, ...], image_size: int) -> np.ndarray:
    """The pixels ``(C, H, W)`` of an image that must fit a data set of this shape."""
    image = _read(path)
    if shape[0] == 1 and image.mode not in ("L", "1"):
        raise DataError(f"{path!r} is in colour (mode {image.mode}) and the run's images are grey; convert it to grey")
    image = _resized(image.convert("L" if shape[0] == 1 else "RGB"), image_size)
    if (image.height, image.width) != shape[1:]:
        raise DataError(
            f"{path!r} is {image.width}x{image.height} pixels and the run's images are {shape[2]}x{shape[1]}; "
            f"scale it to that"
        )
    return _channels_first(image)


def _listed_splits(root: Path, lacking: bool) -> tuple[list[str], list[tuple[str, int]], list[tuple[str, int]]]:
    (classes, train), (test_classes, test) = _listed(root / "train", lacking), _listed(root / "test", lacking)
    for here, there, only in (
        ("train", "test", set(classes) - set(test_classes)),
        ("test", "train", set(test_classes) - set(classes)),
    ):
        if only:
            raise DataError(
                f"class {', '.join(map(repr, sorted(only)))} is in {here!r} and not in {there!r} of "
                f"{str(root)!r}; both splits must hold every class"
            )
    return classes, train, test


def _decode(
    folder: Path, listings: Sequence[Sequence[tuple[str, int]]], classes: Sequence[str], image_size: int
) -> None:
    first = listings[0][0][0]
    size = _resized(_read(first), image_size).size
    all_grey = True
    for split, listing in zip(_SPLITS, listings, strict=True):
        pixels = open_memmap(
            folder / f"{split}_images.npy", mode="w+", dtype=np.uint8, shape=(len(listing), 3, size[1], size[0])
        )
        for index, (path, _) in enumerate(listing):
            image = _read(path)
            all_grey = all_grey and image.mode in ("L", "1")
            image = _resized(image.convert("RGB"), image_size)
            if image.size != size:
                raise DataError(
                    f"{path!r} is {image.width}x{image.height} and {first!r} is {size[0]}x{size[1]} pixels; "
                    f"set data.image-size to the side that all shall have"
                )
            pixels[index] = _channels_first(image)
        pixels.flush()
        np.save(folder / f"{split}_labels.npy", np.array([label for _, label in listing], dtype=np.int64))
    if all_grey:
        for split in _SPLITS:
            file = folder / f"{split}_images.npy"
            np.save(file, np.ascontiguousarray(np.load(file)[:, :1]))
    _save_facts(folder, classes)


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # A decoder may raise almost anything on damaged bytes.
        raise DataError(f"{path!r} cannot be read as an image ({error}); repair or remove it") from error
    if upright.mode.startswith(("I", "F")):
        raise DataError(f"{path!r} has more than 8 bits per channel (mode {upright.mode}); convert it to 8 bits")
    return upright


# --- shared -------------------------------------------------------------------------------------------------------


def _stratified(
    labels: np.ndarray, names: Sequence[str], seed: int, lacking: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of train and test images, ascending: a fifth of each class, at least one, is test data.

    Where classes may be ``lacking``, one that has a single image trains with it.
    """
    test = []
    for label, name in enumerate(names):
        members = np.flatnonzero(labels == label)
        if len(members) < 2 and lacking:
            continue
        if len(members) < 2:
            raise DataError(f"class {name!r} has {len(members)} image; at least two are needed to split off test data")
        count = max(1, round(TEST_SHARE * len(members)))
        test.append(stream(seed, "test-split", label).permutation(members)[:count])
    if not test:
        raise DataError("no class has two images or more; at least one such class is needed to split off test data")
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _resized(image: Image.Image, image_size: int) -> Image.Image:
    return ImageOps.fit(image, (image_size, image_size)) if image_size else image


def _channels_first(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _save_arrays(folder: Path, split: str, pixels: np.ndarray, labels: np.ndarray, image_size: int) -> None:
    """Save decoded images ``(N, C, H, W)`` and labels, resized where asked."""
    if image_size:
        layouts = (image[0] if len(image) == 1 else image.transpose(1, 2, 0) for image in pixels)
        resized = (_channels_first(_resized(Image.fromarray(layout), image_size)) for layout in layouts)
        pixels = np.stack(list(resized))
    np.save(folder / f"{split}_images.npy", np.ascontiguousarray(pixels))
    np.save(folder / f"{split}_labels.npy", labels.astype(np.int64))


def _save_facts(folder: Path, class_names: Sequence[str]) -> None:
    normaliser = Normaliser.of(np.load(folder / "train_images.npy", mmap_mode="r"))
    digests = {"class names": names_digest(class_names)}
    for split, part in zip(_SPLITS, ("training data", "test data"), strict=True):
        arrays = (np.load(folder / f"{split}_{kind}.npy", mmap_mode="r") for kind in ("images", "labels"))
        digests[part] = content_digest(*arrays)
    facts = {"class_names": list(class_names), "mean": normaliser.mean, "std": normaliser.std, "digests": digests}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _open(folder: Path) -> ImageData:
    try:
        # A plain array over the map: indexing a np.memmap is several times slower.
        train_images, train_labels, test_images, test_labels = (
            np.asarray(np.load(folder / f"{split}_{kind}.npy", mmap_mode="r"))
            for split in _SPLITS
            for kind in ("images", "labels")
        )
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        normaliser = Normaliser(tuple(facts["mean"]), tuple(facts["std"]))
        names, digests = tuple(facts["class_names"]), dict(facts["digests"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the cached images in {str(folder)!r} are damaged ({error}); delete that folder") from error
    return ImageData(train_images, train_labels, test_images, test_labels, names, normaliser, digests)
