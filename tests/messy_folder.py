"""A folder of images as people have it: everything that must be left out, resolved or converted, in one place."""

import os
import socket
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 8
LEFT_OUT = (
    "35 in all: 20 hidden (.ipynb_checkpoints 8, __MACOSX 3, .DS_Store 2, .thumbnails 2, others 5), "
    "6 of formats that are not read (.heic 3, .md 1, .txt 1, no ending 1), "
    "3 neither file nor folder (device 1, pipe 1, socket 1), "
    "2 linking to a folder around, 2 linking to nothing, 1 outside of the class folders, "
    "1 there already by another name"
)
"""What ``build`` makes that is not data, in the words of ``framp data inspect``."""


def write(path: Path, value: int, form: str | None = None) -> None:
    """An image of one colour; ``form``: Pillow's name of its format, if its ending does not say it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIDE, SIDE, 3), value, dtype=np.uint8)).save(path, form)


def build(root: Path) -> Path:
    """``Train`` and ``Validation`` with classes ``a`` and ``b``: 12 and 12 training images, 4 and 4 test images.

    Of the training images of ``a`` eight are PNG files, one each is GIF with two frames, JFIF, AVIF and a PNG whose
    visible part is grey 10 on transparency over hidden 200; ``b`` lies elsewhere and is linked to.
    """
    train, test = root / "Train", root / "Validation"
    for number in range(8):
        write(train / "a" / f"{number}.{'PNG' if number % 2 else 'png'}", 10 * number)
    write(train / "a" / "photo.JFIF", 90, "JPEG")
    write(train / "a" / "photo.avif", 95)
    frames = [Image.fromarray(np.full((SIDE, SIDE), value, dtype=np.uint8)) for value in (100, 110)]
    frames[0].save(train / "a" / "moving.gif", save_all=True, append_images=frames[1:])
    layered = np.full((SIDE, SIDE, 4), 200, dtype=np.uint8)
    layered[..., 3] = 0
    layered[: SIDE // 2] = (10, 10, 10, 255)
    Image.fromarray(layered).save(train / "a" / "logo.png")
    for number in range(12):
        write(root.parent / "elsewhere" / "b" / f"{number}.webp", 20 * number)
    (train / "b").symlink_to(root.parent / "elsewhere" / "b")
    for label in ("a", "b"):
        for number in range(4):
            write(test / label / f"{number}.bmp", 5 + number)
    _hidden(root, train / "a")
    _links(root, train / "a")
    _special(train / "a")
    write(train / "loose.png", 1)
    for name in ("1.heic", "2.heic", "3.HEIC", "labels.txt", "README"):
        (train / "a" / name).write_bytes(b"not read")
    (root / "README.md").write_text("about")
    return root


def _hidden(root: Path, class_folder: Path) -> None:
    for number in range(8):
        write(class_folder / ".ipynb_checkpoints" / f"{number}-checkpoint.png", 10 * number)
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini"):
        (class_folder / name).write_bytes(b"junk")
    (root / ".DS_Store").write_bytes(b"junk")
    for folder in ("@eaDir", ".thumbnails"):
        for number in range(2):
            write(class_folder / folder / "deeper" / f"{number}.png", number)
    for name in ("x.png", "y.png", "z.png"):
        write(root / "__MACOSX" / "Train" / "a" / f"._{name}", 1)


def _links(root: Path, class_folder: Path) -> None:
    (class_folder / "up").symlink_to("..")
    (class_folder / "top").symlink_to(root.parent)
    (class_folder / "gone.png").symlink_to(root / "gone.png")
    (class_folder / "round.png").symlink_to("round.png")
    (class_folder / "again.png").symlink_to("0.png")


def _special(class_folder: Path) -> None:
    os.mkfifo(class_folder / "pipe.png")
    (class_folder / "null.png").symlink_to("/dev/null")
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(class_folder)  # The path of a socket is short.
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.png")
    finally:
        os.fchdir(here)
        os.close(here)
