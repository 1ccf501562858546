"""Image data sets as memory-mapped uint8 arrays: digits, CIFAR, or a folder of the user's own images."""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image

from framp_core.config import DataConfig
from framp_core.data.cache import cache_root, cached, content_digest, file_stamps, names_digest
from framp_core.data.image_file import FRAMES, TRANSPARENT, WARNED, Wanted, channels_first, read_image, resized
from framp_core.data.image_folder import Listing, read_client_folder, read_image_folder, require_outside, several
from framp_core.data.transforms import PUBLISHED, Normaliser
from framp_core.errors import DataError, RunFolderError
from framp_core.files import read_json
from framp_core.randomness import stream

TEST_SHARE = 0.2
"""Share of each class that becomes test data where a source has no test split of its own."""

OWN_IMAGES = "own-images"
READER_VERSION = 2
"""Of how a file of a folder becomes pixels; part of what names the cached ones. 2: transparency on white."""
_SPLITS = ("train", "test")
_NOTES = "notes.json"

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
      of each class becomes test data; see :mod:`framp_core.data.image_folder` for what is left out and refused. Images
      are RGB unless every one is grey; transparent parts are laid on white. With ``config.image_size`` an image is
      scaled and cut at the centre to a square of that side, keeping its proportions.

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
    require_outside(root, cache_root(config.cache), "data.cache")
    lacking = config.name == OWN_IMAGES
    identity: dict[str, Any] = {"name": config.name, "root": str(root), "image-size": config.image_size}
    classes, train, test, notes = read_image_folder(root, lacking)
    listings = [train]
    if test is None:
        parts = _stratified(np.array([label for _, label in train]), classes, seed, lacking)
        listings = [[train[index] for index in part] for part in parts]
        identity["seed"] = seed
    else:
        listings.append(test)
    try:
        stamps = [file_stamps(root, (Path(path) for path, _ in listing)) for listing in listings]
    except OSError as error:
        raise DataError(f"{error.filename!r} cannot be read ({error.strerror}); repair or remove it") from error
    build = partial(_decode, listings=listings, classes=classes, image_size=config.image_size)
    folder = cached(config.cache, {**identity, "files": stamps, "reader": READER_VERSION}, build)
    images = _open(folder)
    return replace(images, notes={**notes, **images.notes})


class ClientImages(NamedTuple):
    """Images of one client: uint8 ``(N, C, H, W)`` and int64 ``(N,)`` of each split, and what to know of the folder."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    notes: Mapping[str, str]


def load_own_images(root: Path, shape: tuple[int, ...], class_names: Sequence[str], image_size: int) -> ClientImages:
    """Read a folder of images that belong to a data set which is known from elsewhere; a class may be missing.

    Args:
        root: as for :func:`framp_core.data.image_folder.read_client_folder`; it is held to the same rules as the folder
            of a run.
        shape: (channels, height, width) that the images shall have.
        class_names: name of each label; a folder must have the name of its class.
        image_size: images are scaled and cut at the centre to a square of that side; 0: they must have their size.

    Returns:
        Images class after class, those of a class by file name.

    Raises:
        DataError: no train folder, a class folder of another name, a file in two places, or an image that cannot be
            read or is of another size or colour.
    """
    folder = read_client_folder(root, class_names)
    seen: Counter[str] = Counter()
    pools = [_client_pool(listing, shape, image_size, seen) for listing in (folder.train, folder.test or [])]
    notes = {**folder.notes, **_decoding_notes(seen), **_copies(pools[0][0], pools[1][0])}
    return ClientImages(pools[0], pools[1], notes)


def _client_pool(
    listing: Listing, shape: tuple[int, ...], image_size: int, seen: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    wanted = Wanted((shape[2], shape[1]), f"pixels and the run's images are {shape[2]}x{shape[1]}; scale it to that")

    def read(path: str) -> Image.Image:
        image = read_image(path, image_size, wanted, seen)
        if shape[0] == 1 and image.mode != "L":
            raise DataError(f"{path!r} is in colour and the run's images are grey; convert it to grey")
        return image

    pixels = np.zeros((len(listing), *shape), dtype=np.uint8)
    for index, image in _readable(listing, read):
        pixels[index] = channels_first(image)
    return pixels, np.array([label for _, label in listing], dtype=np.int64)


def _readable(listing: Listing, read: Callable[[str], Image.Image]) -> Iterator[tuple[int, Image.Image]]:
    """Position and content of each image; those that cannot be used are named together, after the last one."""
    refused = []
    for index, (path, _) in enumerate(listing):
        try:
            image = read(path)
        except DataError as error:
            refused.append(str(error))
            continue
        yield index, image
    if refused:
        count = f"{len(refused):,} of {len(listing):,} images cannot be used: " if len(refused) > 1 else ""
        raise DataError(f"{count}{several(refused)}")


def _decode(folder: Path, listings: Sequence[Listing], classes: Sequence[str], image_size: int) -> None:
    position, first = next(_readable(listings[0], partial(read_image, image_size=image_size)))
    said = (
        f"and {listings[0][position][0]!r} is {first.width}x{first.height} pixels; set data.image-size to the side "
        f"that all shall have"
    )
    seen: Counter[str] = Counter()
    read = partial(read_image, image_size=image_size, wanted=Wanted(first.size, said), seen=seen)
    _require_room(folder, (sum(map(len, listings)), 3, first.height, first.width))
    all_grey = True
    for split, listing in zip(_SPLITS, listings, strict=True):
        shape = (len(listing), 3, first.height, first.width)
        pixels = open_memmap(folder / f"{split}_images.npy", mode="w+", dtype=np.uint8, shape=shape)
        for index, image in _readable(listing, read):
            all_grey = all_grey and image.mode == "L"
            pixels[index] = channels_first(image)
        pixels.flush()
        np.save(folder / f"{split}_labels.npy", np.array([label for _, label in listing], dtype=np.int64))
    if all_grey:
        for split in _SPLITS:
            file = folder / f"{split}_images.npy"
            np.save(file, np.ascontiguousarray(np.load(file, mmap_mode="r")[:, :1]))
    _save_facts(folder, classes)
    notes = {**_decoding_notes(seen), **_copies(*(np.load(folder / f"{split}_images.npy", "r") for split in _SPLITS))}
    (folder / _NOTES).write_text(json.dumps(notes), encoding="utf-8")


def _require_room(folder: Path, shape: tuple[int, ...]) -> None:
    """A full disk would end the process by a signal in the middle of a write to the memory map."""
    needed, free = math.prod(shape), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{shape[0]:,} images of {shape[3]}x{shape[2]} pixels take {needed:,} bytes decoded, and {free:,} are free "
            f"in the cache {str(folder.parent)!r}; set a smaller data.image-size, or data.cache to a folder with room"
        )


def _decoding_notes(seen: Counter[str]) -> dict[str, str]:
    done = [f"{seen[what]:,} {what}" for what in (TRANSPARENT, FRAMES, WARNED) if seen[what]]
    return {"read as": "; ".join(done)} if done else {}


def _copies(train: np.ndarray, test: np.ndarray) -> dict[str, str]:
    """A note on test images that are training images, too, under whatever name."""
    known = {hashlib.sha256(image.tobytes()).digest() for image in train}
    count = sum(hashlib.sha256(image.tobytes()).digest() in known for image in test)
    return {"copies": f"{count:,} of {len(test):,} test images are training images, too, to the pixel"} if count else {}


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


def _save_arrays(folder: Path, split: str, pixels: np.ndarray, labels: np.ndarray, image_size: int) -> None:
    """Save decoded images ``(N, C, H, W)`` and labels, resized where asked."""
    shape = (*pixels.shape[:2], image_size, image_size) if image_size else pixels.shape
    _require_room(folder, shape)
    saved = open_memmap(folder / f"{split}_images.npy", mode="w+", dtype=np.uint8, shape=shape)
    if image_size:
        for index, image in enumerate(pixels):
            layout = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            saved[index] = channels_first(resized(Image.fromarray(layout), image_size))
    else:
        saved[:] = pixels
    saved.flush()
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
        facts = read_json(folder / "facts.json")
        notes = dict(read_json(folder / _NOTES)) if (folder / _NOTES).is_file() else {}
        normaliser = Normaliser(tuple(facts["mean"]), tuple(facts["std"]))
        names, digests = tuple(facts["class_names"]), dict(facts["digests"])
    except (OSError, ValueError, KeyError, TypeError, RunFolderError) as error:
        raise DataError(f"the cached images in {str(folder)!r} are damaged ({error}); delete that folder") from error
    return ImageData(train_images, train_labels, test_images, test_labels, names, normaliser, digests, notes)
