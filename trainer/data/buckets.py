"""Which size an image is brought to, and what is cut off.

The rules are those of sd-scripts (BucketManager in library/train_util.py), so that a preset
gives the same batches in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.errors import DataError
from trainer.schema.data import Data

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Placement:
    """Scale the image to `resized`, then cut out `bucket` with its corner at `crop`.

    All are (width, height) or (left, top) in pixels, for the image as it is looked at, that is
    with its EXIF orientation applied.
    """

    bucket: Size
    resized: Size
    crop: tuple[int, int]

    def told_crop(self, size: Size, *, flipped: bool) -> tuple[int, int]:
        """(left, top) in pixels that SDXL is told of for an image of `size`.

        Not the place of `crop`: as sd-scripts and Stability's own preparation of the images have
        it, the empty margin that the whole image would leave inside the bucket. A mirrored image
        has its right margin on the left.
        """
        aspect = size[0] / size[1]
        width, height = self.bucket
        inside = (height * aspect, height) if width / height > aspect else (width, width / aspect)
        left, top = (width - inside[0]) // 2, (height - inside[1]) // 2
        return int(width - (left + inside[0]) if flipped else left), int(top)


class Buckets:
    """Places images of any size. Raises DataError when the bucket range excludes the resolution."""

    def __init__(self, data: Data) -> None:
        self.resolution = data.resolution
        self.step = data.bucket_step
        self.follows_images = data.buckets and data.no_upscale
        self.choices: list[Size] = [] if self.follows_images else [data.resolution]
        if data.buckets and not data.no_upscale:
            assert data.max_bucket_side
            self.choices = ranged(data.resolution, data.min_bucket_side, data.max_bucket_side, data.bucket_step)

    def place(self, size: Size) -> Placement:
        """Where an image of `size` goes. Raises DataError when no bucket is small enough for it."""
        bucket, resized = self._own(size) if self.follows_images else self._chosen(size)
        if 0 in bucket:
            raise DataError(
                f"{size[0]}×{size[1]} leaves a side shorter than one bucket step ({self.step} pixels).",
                "Remove the image, lower Bucket resolution steps (bucket_reso_steps), or switch off "
                "Don't upscale bucket resolution (bucket_no_upscale).",
            )
        return Placement(bucket, resized, ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2))

    def _chosen(self, size: Size) -> tuple[Size, Size]:
        """The bucket of the nearest shape; the image is scaled up or down to just cover it."""
        width, height = size
        aspect = width / height
        bucket = size if size in self.choices else min(self.choices, key=lambda b: abs(b[0] / b[1] - aspect))
        scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width
        return bucket, (int(width * scale + 0.5), int(height * scale + 0.5))

    def _own(self, size: Size) -> tuple[Size, Size]:
        """The image's own size, made smaller if its area is too large, and cut to whole steps."""
        width, height = size
        area = self.resolution[0] * self.resolution[1]
        resized = size if width * height <= area else self._shrunk(width / height, area)
        return (self._floor(resized[0]), self._floor(resized[1])), resized

    def _shrunk(self, aspect: float, area: int) -> Size:
        """Width or height becomes a whole number of steps, whichever keeps the shape better."""
        width = math.sqrt(area * aspect)
        whole_width = self._floor(int(width + 0.5))
        whole_height = self._floor(int(area / width + 0.5))
        its_height = self._floor(int(whole_width / aspect + 0.5))
        its_width = self._floor(int(whole_height * aspect + 0.5))
        if not (whole_width and whole_height and its_height and its_width):
            return whole_width, whole_height
        if abs(whole_width / its_height - aspect) < abs(its_width / whole_height - aspect):
            return whole_width, int(whole_width / aspect + 0.5)
        return int(whole_height * aspect + 0.5), whole_height

    def _floor(self, side: int) -> int:
        return side - side % self.step


def ranged(resolution: Size, smallest: int, largest: int, step: int) -> list[Size]:
    """All buckets within the area of `resolution` and the bounds of a side, in order.

    The bounds widen to multiples of `step`. Raises DataError when they exclude `resolution`.
    """
    smallest -= smallest % step
    largest += -largest % step
    smallest = max(smallest, step)
    if not smallest <= min(resolution) <= max(resolution) <= largest:
        raise DataError(
            f"The bucket range {smallest}–{largest} does not hold Max resolution {resolution[0]},{resolution[1]}.",
            "Change Minimum or Maximum bucket resolution (min_bucket_reso, max_bucket_reso), Max resolution "
            "(max_resolution), or switch on Don't upscale bucket resolution (bucket_no_upscale), "
            "which needs no range.",
        )
    area = resolution[0] * resolution[1]
    square = math.isqrt(area) // step * step
    found = {(square, square)} if square else set()
    for width in range(smallest, min(largest, area // smallest) + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            found |= {(width, height), (height, width)}
    if not found:
        raise DataError(
            f"No bucket of {step}-pixel steps fits into Max resolution {resolution[0]},{resolution[1]}.",
            "Lower Bucket resolution steps (bucket_reso_steps).",
        )
    return sorted(found)
