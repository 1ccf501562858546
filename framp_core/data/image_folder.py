"""Folders of image files: which file shows which class, for training or for tests, and what is left out and why."""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from framp_core.data.image_file import image_extensions
from framp_core.errors import DataError
from framp_core.foreign_text import listed

Listing = list[tuple[str, int]]
"""Path and label of each image."""

SPLITS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Names of the folders of a split, in any case, by what is in them."""
LEFT_OUT = "left out"
"""Key of the note on the files of a folder that are not used."""

_OF_SYSTEMS = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found")
"""Names, in small letters, of what systems put into folders without hiding it everywhere."""
_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}

_HIDDEN = "hidden"
_UNREAD = "of formats that are not read"
_NOWHERE = "linking to nothing"
_SPECIAL = "neither file nor folder"
_UPWARDS = "linking to a folder around"
_AGAIN = "there already by another name"
_LOOSE = "outside of the class folders"
_BESIDE = "in folders beside the split"


class ImageFolder(NamedTuple):
    """What was found in a folder.

    Attributes:
        classes: name of each label: that of its folder in Unicode's normal form C, in which Linux, macOS and what
            packs files spell a name alike.
        train: images of the train folder; all images where there is no split.
        test: images of the test folder; None where there is no split.
        notes: what the user should know, such as :data:`LEFT_OUT`, by a word on what it is about.
    """

    classes: list[str]
    train: Listing
    test: Listing | None
    notes: dict[str, str]


class _Entry(NamedTuple):
    name: str
    path: str
    identity: tuple[int, int]


class _Look(NamedTuple):
    """A folder's own entries by name; ``left_out`` counts by reason and what it was."""

    folders: list[_Entry]
    images: list[_Entry]
    left_out: Counter[tuple[str, str]]


class _Place(NamedTuple):
    path: str
    split: str
    label: str

    def said(self) -> str:
        return f"class {self.label!r}{f' of the {self.split} data' if self.split else ''}"


def read_image_folder(root: Path, lacking: bool) -> ImageFolder:
    """List the images of a folder.

    Args:
        root: ``train/<class>/*`` and ``test/<class>/*``, by any of the names in :data:`SPLITS`, or ``<class>/*``. A
            folder that holds no test data may hold validation data in their place.
        lacking: classes may have no image.

    Raises:
        DataError: the folder cannot be read, is laid out otherwise, a class has no image, the splits hold different
            classes, or a link puts one file into two classes or on both sides of the split.
    """
    reader = _Reader(root)
    split = reader.split()
    parts = [reader.classes(entry, role) for role, entry in split.items()] or [reader.classes(reader.root, "")]
    reader.refuse_shared()
    classes = list(parts[0])
    for part, entry in zip(parts, split.values() or [reader.root], strict=True):
        reader.refuse_empty(part, entry, lacking)
    if split:
        _refuse_different(root, {entry.name: set(part) for part, entry in zip(parts, split.values(), strict=True)})
    listings = [[(path, label) for label, name in enumerate(classes) for path in part[name]] for part in parts]
    return ImageFolder(classes, listings[0], listings[1] if split else None, reader.notes())


def read_client_folder(root: Path, class_names: Sequence[str]) -> ImageFolder:
    """List the images of one client for a run whose classes are known.

    Args:
        root: ``train/<class>/*`` and, for test images, ``test/<class>/*``, named as for :func:`read_image_folder`.
        class_names: name of each label; a class may be missing.

    Returns:
        Images class after class, those of a class by their path; no test images where there is no such folder.

    Raises:
        DataError: there is no train folder, a class folder has another name, or as for :func:`read_image_folder`.
    """
    reader = _Reader(root) if root.is_dir() else None
    split = {} if reader is None else reader.split(test=False)
    if reader is None or "train" not in split:
        raise DataError(f"{str(root)!r} has no folder 'train'; put the client's images into train/CLASS/")
    labels = {normalize("NFC", name): label for label, name in enumerate(class_names)}
    listings: dict[str, Listing] = {}
    for role, entry in split.items():
        part = reader.classes(entry, role, least=0)
        _refuse_unknown(entry, part, list(labels))
        found = [(path, labels[name]) for name, paths in part.items() for path in paths]
        listings[role] = sorted(found, key=lambda image: (image[1], image[0]))
    reader.refuse_shared()
    return ImageFolder(list(class_names), listings["train"], listings.get("test", []), reader.notes())


def require_outside(root: Path, folder: Path, what: str) -> None:
    """Check that what is written does not become data itself, at the latest for the next one who reads them.

    Args:
        root: of a folder of images; that there is none is for others to say.
        folder: that is written to; it need not exist.
        what: names it in the message.

    Raises:
        DataError: it lies where folders are classes, and files images of them.
    """
    root, folder = root.resolve(), folder.resolve()
    if not root.is_dir() or not folder.is_relative_to(root):
        return
    below = folder.relative_to(root).parts
    used = {entry.name for entry in _Reader(root).split(test=False).values()}
    if any(map(_is_hidden, below)) or (used and below and below[0] not in used):
        return
    raise DataError(
        f"{what} {str(folder)!r} lies in data.root {str(root)!r}, where a folder is a class and what it holds would be "
        f"read as images of it; choose a folder elsewhere"
    )


class _Reader:
    """One pass over a folder, which counts what it leaves out."""

    def __init__(self, root: Path) -> None:
        self.root = _Entry(root.name, str(root), _identity(os.stat(root)))
        self._left_out: Counter[tuple[str, str]] = Counter()
        self._split_note = ""
        self._places: dict[tuple[int, int], _Place] = {}
        self._shared: list[str] = []

    def split(self, test: bool = True) -> dict[str, _Entry]:
        """The folders of the split, ``train`` first, by what they are used for; empty if the folders are classes.

        Args:
            test: whether there must be a folder of test data.
        """
        look = _look(self.root.path)
        named = {
            role: [entry for entry in look.folders if entry.name.lower() in names] for role, names in SPLITS.items()
        }
        found = [entry for entries in named.values() for entry in entries]
        if not found or self._are_classes(look, found):
            return {}
        for role, entries in named.items():
            if len(entries) > 1:
                raise DataError(
                    f"{self.root.path!r} has {_quoted(entries)}, which all mean {role} data; keep one of them"
                )
        used = {role: entries[0] for role, entries in named.items() if entries}
        if test and ("train" not in used or len(used) == 1):
            raise DataError(
                f"{self.root.path!r} has {'a folder' if len(found) == 1 else 'the folders'} {_quoted(found)} alone; "
                f"lay out train/<class>/ and test/<class>/, or <class>/. If it is a class, give it another name"
            )
        self._left_out += look.left_out
        self._left_out[_LOOSE, ""] += len(look.images)
        for entry in look.folders:
            if entry not in found:
                self._left_out[_BESIDE, _shown(entry.name)] += _count_files(entry.path)
        return self._chosen(used)

    def _are_classes(self, look: _Look, found: Sequence[_Entry]) -> bool:
        """A class may be called ``train``: beside others, and with images in it rather than folders."""
        alone = len(found) == 1 and found[0].name.lower() == "train" and len(look.folders) > 1
        return alone and not _look(found[0].path).folders

    def _chosen(self, used: Mapping[str, _Entry]) -> dict[str, _Entry]:
        validation = used.get("validation")
        if validation is not None and "test" in used:
            count = _count_files(validation.path)
            self._left_out[_BESIDE, _shown(validation.name)] += count
            self._split_note = (
                f"{validation.name!r} is not used: validation data are a share of the training data "
                f"(partition.validation-fraction)"
            )
        elif validation is not None:
            self._split_note = f"{validation.name!r} is the test data, as there is no test folder"
        roles = {"train": used.get("train"), "test": used.get("test", validation)}
        return {role: entry for role, entry in roles.items() if entry is not None}

    def classes(self, folder: _Entry, split: str, least: int = 2) -> dict[str, list[str]]:
        """Paths of the images of each class folder, the classes by name, the images by folder and name."""
        look = _look(folder.path)
        self._left_out += look.left_out
        self._left_out[_LOOSE, ""] += len(look.images)
        named = sorted((normalize("NFC", entry.name), entry) for entry in look.folders)
        _refuse_twins(folder, named)
        if len(look.folders) < least:
            raise DataError(
                f"{folder.path!r} has {len(look.folders)} class folders; expected two or more, each with the images "
                f"of one class{_advice(look)}"
            )
        return {
            name: [image.path for image in self._walk(entry) if self._claim(image, split, name)]
            for name, entry in named
        }

    def _walk(self, folder: _Entry) -> list[_Entry]:
        """The images in a class folder at every depth; no folder is entered twice, nor one that lies around it."""
        around = {self.root.identity, *_around(self.root.path), *_around(folder.path)}
        found: list[tuple[str, list[_Entry]]] = []
        seen: set[tuple[int, int]] = set()
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            if here.identity in around or here.identity in seen:
                self._left_out[_UPWARDS if here.identity in around else _AGAIN, ""] += 1
                continue
            seen.add(here.identity)
            look = _look(here.path)
            if here is folder and look.folders and not look.images:
                _refuse_folders_only(here, look)
            self._left_out += look.left_out
            found.append((here.path, look.images))
            waiting += reversed(look.folders)
        return [image for _, images in sorted(found) for image in images]

    def _claim(self, image: _Entry, split: str, label: str) -> bool:
        """Whether a file is met for the first time; one that was met elsewhere counts as shared."""
        here = _Place(image.path, split, label)
        first = self._places.setdefault(image.identity, here)
        if first is here:
            return True
        if first[1:] == here[1:]:
            self._left_out[_AGAIN, ""] += 1
        else:
            self._shared.append(f"{image.path!r} ({here.said()}) is the same file as {first.path!r} ({first.said()})")
        return False

    def refuse_shared(self) -> None:
        """Check that no file is in two classes, or on both sides of the split."""
        if self._shared:
            raise DataError(
                f"{several(self._shared)}; links must not put an image into two classes or into training and test "
                f"data: remove one of the two"
            )

    def refuse_empty(self, part: Mapping[str, list[str]], folder: _Entry, lacking: bool) -> None:
        """Check that each class has images."""
        empty = [name for name, paths in part.items() if not paths]
        if empty and (not lacking or len(empty) == len(part)):
            reasons = f" ({LEFT_OUT}: {note})" if (note := self.notes().get(LEFT_OUT)) else ""
            raise DataError(
                f"{folder.path!r} has no image of class {', '.join(map(repr, empty))}{reasons}; "
                f"add images ({', '.join(sorted(image_extensions()))}) or remove the folder"
            )

    def notes(self) -> dict[str, str]:
        """What was left out, and which folder serves for what if its name does not say."""
        notes = {LEFT_OUT: _counted(self._left_out), "split": self._split_note}
        return {about: said for about, said in notes.items() if said}


def several(messages: Sequence[str]) -> str:
    """The first three of some messages, and how many more there are."""
    more = f"; and {len(messages) - 3} more like these" if len(messages) > 3 else ""
    return "; ".join(messages[:3]) + more


# --- one folder -----------------------------------------------------------------------------------------------------


def _look(folder: str) -> _Look:
    """Sort the entries of a folder; nothing is opened, so that a pipe cannot hold anybody up."""
    look = _Look([], [], Counter())
    extensions = image_extensions()
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                _sort(entry, look, extensions)
    except OSError as error:
        raise DataError(f"{error.filename!r} cannot be read ({error.strerror}); repair or remove it") from error
    return look


def _sort(entry: os.DirEntry[str], look: _Look, extensions: frozenset[str]) -> None:
    if _is_hidden(entry.name):
        is_folder = entry.is_dir(follow_symlinks=False)
        name = "._*" if entry.name.startswith("._") else _shown(entry.name)
        look.left_out[_HIDDEN, name] += _count_files(entry.path) if is_folder else 1
        return
    try:
        status = entry.stat()
    except OSError:
        if not entry.is_symlink():
            raise
        look.left_out[_NOWHERE, ""] += 1
        return
    found = _Entry(entry.name, entry.path, _identity(status))
    ending = os.path.splitext(entry.name)[1].lower()
    if stat.S_ISDIR(status.st_mode):
        look.folders.append(found)
    elif not stat.S_ISREG(status.st_mode):
        look.left_out[_SPECIAL, _KINDS.get(stat.S_IFMT(status.st_mode), "other")] += 1
    elif ending not in extensions:
        look.left_out[_UNREAD, _shown(ending) or "no ending"] += 1
    else:
        look.images.append(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _around(path: str) -> set[tuple[int, int]]:
    """Identities of the folders that hold this one where it really lies."""
    return {_identity(os.stat(parent)) for parent in Path(path).resolve().parents}


def _count_files(folder: str) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


# --- what is said ---------------------------------------------------------------------------------------------------


def _counted(left_out: Counter[tuple[str, str]]) -> str:
    """Such as ``9 in all: 6 hidden (.ipynb_checkpoints 6), 3 of formats that are not read (.heic 2, .svg 1)``."""
    reasons: dict[str, Counter[str]] = {}
    for (reason, detail), count in left_out.items():
        reasons.setdefault(reason, Counter())[detail] += count
    totals = Counter({reason: details.total() for reason, details in reasons.items() if details.total()})
    parts = [f"{count:,} {reason}{_details(reasons[reason])}" for reason, count in _by_count(totals)]
    return f"{totals.total():,} in all: {', '.join(parts)}" if parts else ""


def _details(counts: Counter[str]) -> str:
    named = [(name, count) for name, count in _by_count(counts) if name]
    said = [f"{name} {count:,}" for name, count in named[:4]]
    said += [f"others {sum(count for _, count in named[4:]):,}"] if named[4:] else []
    return f" ({', '.join(said)})" if said else ""


def _by_count(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(((name, count) for name, count in counts.items() if count), key=lambda each: (-each[1], each[0]))


def _shown(name: str) -> str:
    """A name from the disk, short and without what a terminal would obey."""
    short = name if len(name) <= 40 else f"{name[:39]}…"
    return short if short.isprintable() else repr(short)


def _quoted(entries: Iterable[_Entry]) -> str:
    return listed([entry.name for entry in entries])


def _advice(look: _Look) -> str:
    """What is to be given instead of a folder with too few class folders, if that can be told."""
    if not look.folders:
        return f"; it holds {len(look.images)} images itself: give the folder around it" if look.images else ""
    entry = look.folders[0]
    for _ in range(5):
        inner = _look(entry.path)
        if len(inner.folders) > 1 and not inner.images:
            return f"; they seem to lie deeper: give {entry.path!r}"
        if len(inner.folders) != 1 or inner.images:
            break
        entry = inner.folders[0]
    return ""


def _refuse_folders_only(folder: _Entry, look: _Look) -> None:
    splits = {name for names in SPLITS.values() for name in names}
    is_split = any(entry.name.lower() in splits for entry in look.folders)
    advice = f"give {folder.path!r}, if that is the data set" if is_split else "give the folder that holds those"
    raise DataError(
        f"{folder.path!r} would be a class, but has only folders in it ({_quoted(look.folders)}) and no image. The "
        f"folder to give is the one that holds the class folders, or train and test folders around them: {advice}. "
        f"If it is a class, move its images up into it"
    )


def _refuse_twins(folder: _Entry, named: Sequence[tuple[str, _Entry]]) -> None:
    for (name, entry), (other, twin) in pairwise(named):
        if name == other:
            raise DataError(
                f"{folder.path!r} has two folders {name!r}, in two spellings of Unicode ({entry.name!a} and "
                f"{twin.name!a}); put the images of that class into one of them"
            )


def _refuse_different(root: Path, classes: Mapping[str, set[str]]) -> None:
    train, test = classes
    for here, there in ((train, test), (test, train)):
        if only := classes[here] - classes[there]:
            raise DataError(
                f"class {', '.join(map(repr, sorted(only)))} is in {here!r} and not in {there!r} of "
                f"{str(root)!r}; both splits must hold every class"
            )


def _refuse_unknown(folder: _Entry, names: Iterable[str], known: Sequence[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise DataError(
            f"{folder.path!r} has a folder {unknown[0]!r}, and the run knows no such class; its classes are "
            f"{', '.join(map(repr, known[:20]))}{' and so on' if len(known) > 20 else ''}"
        )
