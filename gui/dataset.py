"""The image folders as the trainer takes them: what is seen how often, in which bucket, cut where."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from gui.captions import tags_of
from gui.files import IMAGE_ENDINGS, inside
from trainer.check import settings
from trainer.data import folders, overflow
from trainer.data.batches import batches_per_epoch
from trainer.data.buckets import Buckets, Size
from trainer.data.folders import Picture
from trainer.data.images import rgb
from trainer.errors import DataError, LorawrightError, Problem
from trainer.length import Length
from trainer.paths import resolve
from trainer.schema import Config, problem_with

MOST_IMAGES = 2000
MOST_TAGS = 300
MOST_THUMBNAILS = 32
THUMBNAIL = (240, 240)
SMALL = 2
"""An image whose sides are more than so many times shorter than the resolution is worth a warning."""


def dataset(values: Mapping[str, Any], find: str = "", tag: str = "") -> dict[str, Any]:
    """Folders, images with their crop as shares of the image, buckets, tags, steps, and what is wrong.

    Images are opened, not decoded. All are counted in `total`, and at most 2,000 listed: where there are more, the
    first with `find` in name or caption and with the `tag`, and `more` says how many of these are not listed.
    """
    config, _ = settings(values)
    survey = folders.survey(config.folders, config.captions, decode=False)
    pictures = survey.dataset.pictures
    problems = list(survey.problems)
    images, places = _placed(config, pictures, problems)
    counted = Counter(places)
    seen: Counter[Size] = Counter()
    seen_of: Counter[Path] = Counter()
    for place, picture in zip(places, pictures, strict=True):
        seen[place] += picture.repeats
        seen_of[picture.path.parent] += picture.repeats
    problems += [*_lonely(config, counted, seen), *overflow.problems(pictures, config.captions)]
    matching = images if len(images) <= MOST_IMAGES else [image for image in images if _matches(image, find, tag)]
    return {
        "folders": [
            {
                "name": subset.path.name,
                "images": subset.images,
                "unreadable": subset.unreadable,
                "repeats": subset.repeats,
                "seen": seen_of[subset.path],
                "regularisation": subset.regularisation,
            }
            for subset in survey.dataset.subsets
        ],
        "images": matching[:MOST_IMAGES],
        "total": len(images),
        "more": max(0, len(matching) - MOST_IMAGES),
        "buckets": [[*place, counted[place], seen[place]] for place in sorted(counted)],
        "tags": _tags(pictures).most_common(MOST_TAGS),
        "steps": _steps(config, places, pictures),
        "problems": [asdict(problem) for problem in problems],
    }


def _matches(image: Mapping[str, Any], find: str, tag: str) -> bool:
    caption = image["caption"] or ""
    found = find.strip().lower() in f"{caption} {image['name']}".lower()
    return found and (not tag or tag in tags_of(caption))


def _placed(
    config: Config, pictures: Sequence[Picture], problems: list[Problem]
) -> tuple[list[dict[str, Any]], list[Size]]:
    """Each image with its bucket and crop; an image that fits none has bucket (0, 0)."""
    try:
        buckets = Buckets(config.data)
    except DataError as error:
        problems.append(problem_with("max_resolution", error))
        buckets = None
    images, places, small = [], [], []
    for picture in pictures:
        place, crop = (0, 0), None
        try:
            if buckets is not None:
                placement = buckets.place(picture.size)
                (wide, high), (left, top) = placement.resized, placement.crop
                place = placement.bucket
                if SMALL**2 * math.prod(picture.size) < math.prod(buckets.resolution):
                    small.append(picture.path.name)
                crop = [left / wide, top / high, place[0] / wide, place[1] / high]
        except DataError as error:
            problems.append(problem_with("train_data_dir", f'"{picture.path.name}": {error}'))
        places.append(place)
        captions = config.captions
        tokens, cut = overflow.measured(picture.caption or "", captions.max_tokens, captions.weighted)
        images.append(
            {
                "path": str(picture.path),
                "name": picture.path.name,
                "folder": picture.folder,
                "size": picture.size,
                "bucket": place,
                "crop": crop,
                "caption": picture.caption,
                "captioned": picture.caption_file is not None,
                "tokens": tokens,
                "cut": cut,
            }
        )
    if small:
        names = ", ".join(small[:5]) + (", …" if len(small) > 5 else "")
        images_are = "1 image is" if len(small) == 1 else f"{len(small)} images are"
        message = f"{images_are} much smaller, which teaches little ({names}). Replace what is so small."
        problems.append(problem_with("max_resolution", message, "warning"))
    return images, places


def _lonely(config: Config, counted: Mapping[Size, int], seen: Mapping[Size, int]) -> Iterator[Problem]:
    """Buckets that never fill a batch, each of which costs a step for less, or fill it with one image alone."""
    batch = config.training.batch_of_all
    found = sorted(place for place in seen if place != (0, 0))
    short = [place for place in found if seen[place] < batch]
    single = [place for place in found if counted[place] == 1 < batch <= seen[place]]
    fewer = "Crop those images to the shape of the others, raise Bucket resolution steps (bucket_reso_steps)"
    if short and len(found) == 1:
        message = f"{batch} is more than all the images that an epoch sees ({seen[short[0]]}). Raise the repeats, or lower it."
        yield problem_with("train_batch_size", message, "warning")
    elif short:
        message = (
            f"{batch} is more than some buckets hold in an epoch ({_sizes(short)}): their batches stay smaller. "
            f"{fewer} so that there are fewer buckets, or lower it."
        )
        yield problem_with("train_batch_size", message, "warning")
    if single and len(found) > 1:
        message = (
            f"{len(single)} bucket(s) of a single image ({_sizes(single)}): a batch of {batch} holds it over "
            f"and over, and nothing else. {fewer}, or add images of that shape."
        )
        yield problem_with("train_data_dir", message, "warning")


def _sizes(places: Sequence[Size]) -> str:
    return ", ".join(f"{wide}×{high}" for wide, high in places[:5]) + (", …" if len(places) > 5 else "")


def _tags(pictures: Sequence[Picture]) -> Counter[str]:
    """How many images have each tag: what stands between commas in a caption."""
    counts: Counter[str] = Counter()
    for picture in pictures:
        counts.update(set(tags_of(picture.caption or "")))
    return counts


def _steps(config: Config, places: Sequence[Size], pictures: Sequence[Picture]) -> dict[str, int] | None:
    repeats = [picture.repeats for picture in pictures]
    if not repeats or (0, 0) in places:
        return None
    length = Length.of(batches_per_epoch(places, repeats, config.training.batch_of_all), config.training)
    return {
        "seen": sum(repeats),
        "batch": config.training.batch_of_all,
        "accumulation": length.accumulation,
        "batches": length.batches_per_epoch,
        "epochs": length.epochs,
        "steps": length.total_steps,
        "limited": bool(config.training.max_steps),
    }


def thumbnails(values: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Small JPEGs of images inside the form's two image folders, as data addresses; None where there is none."""
    config, _ = settings(values)
    roots = []
    for text in (config.folders.images, config.folders.regularisation):
        try:
            if text.strip():
                roots.append(resolve(text))
        except LorawrightError:
            continue  # the survey of the folders tells
    return {"pictures": {path: _thumbnail(Path(path), roots) for path in paths[:MOST_THUMBNAILS]}}


def _thumbnail(path: Path, roots: Sequence[Path]) -> str | None:
    if path.suffix.lower() not in IMAGE_ENDINGS or not inside(path, roots):
        return None
    try:
        with Image.open(path) as image:
            image.draft("RGB", THUMBNAIL)
            small = ImageOps.exif_transpose(image)
            small.thumbnail(THUMBNAIL)
            data = io.BytesIO()
            rgb(small).save(data, "JPEG", quality=82)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # the survey tells which images are damaged
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
