"""Pictures from files: upright, RGB, scaled and cut. Files are only ever opened for reading."""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from trainer.data.buckets import Placement, Size
from trainer.errors import DataError
from trainer.paths import shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp") + ((".avif",) if features.check("avif") else ())

# Panoramas above Pillow's 90 megapixels are fine; from 180 on it refuses, and that is reported.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def pixels(path: Path, placement: Placement, *, matted: bool = True) -> np.ndarray:
    """The image, upright, scaled to `placement.resized` and cut to its bucket.

    Returns uint8 RGB [height, width, 3]. Transparent parts are laid on white (sd-scripts drops
    the alpha channel instead, which brings out whatever colour lies beneath, often black);
    16-bit greys keep their range. Without `matted`, where transparency is a mask, the colours
    beneath it stay. Colour profiles are not applied. Raises DataError.
    """
    width, height = placement.resized
    with _opened(path) as image:
        turn = _orientation(image)
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the time; twice the wanted
        # size remains for the resampling filter.
        image.draft(None, (2 * max(width, height), 2 * max(width, height)) if turn > 4 else (2 * width, 2 * height))
        upright = rgb(image, matted)
    return np.asarray(_placed(upright, turn, placement))


def opacity(path: Path, placement: Placement) -> np.ndarray:
    """How opaque the image is at each latent, placed as its pixels are: float32 [height/8, width/8] in 0…1.

    Raises DataError.
    """
    width, height = placement.bucket
    with _opened(path) as image:
        if not image.has_transparency_data:
            return np.ones((height // 8, width // 8), np.float32)
        alpha = _placed(image.convert("RGBA").getchannel("A"), _orientation(image), placement)
    cells = np.asarray(alpha, np.float32).reshape(height // 8, 8, width // 8, 8)
    return cells.mean((1, 3)) / 255


def has_transparency(path: Path) -> bool:
    """Whether the image's header announces an alpha channel. Raises DataError."""
    with _opened(path) as image:
        return bool(image.has_transparency_data)


def turned(path: Path) -> bool:
    """Whether an EXIF mark says that the image is to be looked at otherwise than it is stored. Raises DataError."""
    with _opened(path) as image:
        return _orientation(image) in _TURNED


def _placed(image: Image.Image, turn: int, placement: Placement) -> Image.Image:
    """A decoded image made upright, scaled and cut to its bucket."""
    left, top = placement.crop
    if turn in _TURNED:
        image = image.transpose(_TURNED[turn])
    if image.size != placement.resized:
        image = image.resize(placement.resized, Image.Resampling.LANCZOS, reducing_gap=3.0)
    right, bottom = left + placement.bucket[0], top + placement.bucket[1]
    return image.crop((left, top, right, bottom))


def with_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """The image with all hues moved on by `turn` of the colour circle, uint8 RGB [height, width, 3].

    Greys stay, as does the brightest channel of each pixel.
    """
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # uint8 wraps around, as the circle does
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def size(path: Path, decode: bool = False) -> Size:
    """(width, height) of the image as it is looked at, from the file's header.

    With `decode` all of it is read, at the lowest resolution the format offers, so that damage
    is found. Raises DataError.
    """
    with _opened(path) as image:
        width, height = image.size
        turn = _orientation(image)
        if decode:
            image.draft(None, (1, 1))
            image.load()
    return (height, width) if turn > 4 else (width, height)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        # Opening a named pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  quicker than pathlib's, for 100,000 files
            raise DataError(f'"{shown(path)}" is not a regular file.', "Remove it.")
        with Image.open(path) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything: struct.error, IndexError, …
        raise DataError(
            f'"{shown(path)}" cannot be read as an image: {_why(error)}.', "Replace or remove it."
        ) from error


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is none, whatever its name says"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError):
        return "it has more than 178 million pixels"
    if "truncated" in str(error).lower():
        return "it is cut off"
    return str(error).rstrip(".") or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation (1–8) that stands before the pixels; 1 where there is none."""
    try:
        # PngImageFile.getexif would decode the whole picture to look for EXIF behind it.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # broken EXIF is common in old photographs, and says nothing about the picture
        return 1


def rgb(image: Image.Image, matted: bool = True) -> Image.Image:
    """Its colours, transparent parts on white, or (not `matted`) as they are below; 16-bit greys keep their range."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not matted:
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
