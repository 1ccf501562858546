"""One image file as pixels: which formats are read, how large an image may be, and what becomes of transparency."""

import os
import warnings
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from framp_core.errors import DataError

FORMATS = (
    *("PNG", "JPEG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM"),
    *("TGA", "QOI", "PCX", "SGI"),
)
"""Pillow's names of the formats of still images; its others run programs, or are documents, films and icons."""
LARGEST_PIXELS = 2**26
"""Pixels of the largest image that is decoded: 268 MB, and three times as much while it is laid on white."""
PAPER = (255, 255, 255, 255)
"""What shows through where an image is transparent: white."""

FRAMES = "with several frames, of which the first"
TRANSPARENT = "with transparent parts, laid on white"
WARNED = "with damaged or unusual metadata"


class Wanted(NamedTuple):
    """The size that an image must have, and the end of the sentence for one that has another."""

    size: tuple[int, int]
    said: str


def image_extensions() -> frozenset[str]:
    """Endings, in small letters and with the dot, of the files that Pillow reads here as still images."""
    readers = ("MPO", *_readers())  # MPO is read by the reader of JPEG.
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in readers)


@lru_cache
def _readers() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_image(
    path: str, image_size: int, wanted: Wanted | None = None, seen: Counter[str] | None = None
) -> Image.Image:
    """Decode an image upright, opaque and with 8 bits per channel.

    Of an animation or a file of many pages, the first is read. Transparent parts are laid on white, :data:`PAPER`.
    Nothing is decoded before the size in the header was looked at. A larger JPEG is decoded at half, a quarter or an
    eighth of its size if ``image_size`` allows that.

    Args:
        path: of the file.
        image_size: side of the square that is cut from its centre after scaling; 0 keeps its own size.
        wanted: the size that it must have, without an ``image_size``.
        seen: counts what was done to the image, :data:`FRAMES` and :data:`TRANSPARENT`, and :data:`WARNED`.

    Returns:
        An image of mode ``L`` if it is grey, ``RGB`` otherwise.

    Raises:
        DataError: the file cannot be read, or the image is too large, of another size, or has more than 8 bits.
    """
    seen = Counter() if seen is None else seen
    wanted = None if image_size else wanted
    try:
        if not os.path.getsize(path):
            raise OSError("it has 0 bytes")
        # A warning is counted, or there would be one on the screen for each image.
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with Image.open(path, formats=_readers()) as image:
                _check_size(image, path, image_size, wanted)
                seen[FRAMES] += bool(getattr(image, "is_animated", False))
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                _check_depth(image, path)
                upright = _plain(image, seen)
        seen[WARNED] += any(issubclass(each.category, UserWarning) for each in warned)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{path!r} is too large ({error}); {_at_most()}; scale it down") from error
    except Exception as error:  # A decoder may raise almost anything on damaged bytes.
        raise DataError(f"{path!r} cannot be read as an image ({error}); repair or remove it") from error
    if wanted is not None and upright.size != wanted.size:
        raise _other_size(path, upright, wanted)
    return resized(upright, image_size)


def resized(image: Image.Image, image_size: int) -> Image.Image:
    """The image scaled and cut at the centre to a square of this side; as it is with 0."""
    return ImageOps.fit(image, (image_size, image_size)) if image_size else image


def channels_first(image: Image.Image) -> np.ndarray:
    """The pixels of an image, uint8 ``(C, H, W)``."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_size(image: Image.Image, path: str, image_size: int, wanted: Wanted | None) -> None:
    """Refuse by the header alone; whether it stands upright is known later."""
    if wanted is not None and sorted(image.size) != sorted(wanted.size):
        raise _other_size(path, image, wanted)
    given = image.size
    # A progressive JPEG keeps all its coefficients in memory, however small it is to be.
    baseline = image.format in ("JPEG", "MPO") and not image.info.get("progressive")
    if _too_large(image) and baseline and image_size:
        image.draft(None, (2 * image_size, 2 * image_size))
    if _too_large(image):
        advice = "set data.image-size, or scale it down" if baseline and not image_size else "scale it down"
        raise DataError(f"{path!r} has {given[0]:,} x {given[1]:,} pixels; {_at_most()}; {advice}")


def _too_large(image: Image.Image) -> bool:
    return image.width * image.height > LARGEST_PIXELS


def _at_most() -> str:
    return f"images of at most {LARGEST_PIXELS:,} pixels are read"


def _other_size(path: str, image: Image.Image, wanted: Wanted) -> DataError:
    return DataError(f"{path!r} is {image.width}x{image.height} {wanted.said}")


def _check_depth(image: Image.Image, path: str) -> None:
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{path!r} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")


def _plain(image: Image.Image, seen: Counter[str]) -> Image.Image:
    """``L`` or ``RGB``, opaque."""
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if not image.has_transparency_data:
        return image.copy() if image.mode == mode else image.convert(mode)
    straight = image.convert("LA") if image.mode == "La" else image
    layered = straight if straight.mode == "RGBA" else straight.convert("RGBA")
    if layered.getchannel("A").getextrema() == (255, 255):
        return layered.convert(mode)
    seen[TRANSPARENT] += 1
    paper = Image.new("RGBA", image.size, PAPER)
    paper.alpha_composite(layered)
    return paper.convert(mode)
