"""`python -m trainer draws`: what the steps of a training see, drawn as the training's own loader draws it.

Images as they are cut, mirrored and shifted in hue, captions as they are shuffled and dropped, the tokens that
are read and those that are cut. With the same seed the first draws are those of the first steps.
"""

from __future__ import annotations

import base64
import io
import json
import secrets
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from PIL import Image

from trainer.check import settings
from trainer.data import folders
from trainer.data.buckets import Buckets, Size
from trainer.data.reads import Reads
from trainer.errors import LorawrightError, Problem
from trainer.kohya import Preset
from trainer.length import Length
from trainer.models.clip_tokens import pieces
from trainer.paths import shown
from trainer.run import EXIT_CONFIG, EXIT_DONE
from trainer.schema import Config

ENOUGH = 8
MOST = 12
THUMBNAIL = (240, 240)


@dataclass(frozen=True)
class Draw:
    """One read of one image. `bucket` in pixels; of the `tokens` the first `kept` are read; `weight` is its loss's."""

    step: int
    name: str
    picture: str
    bucket: Size
    flipped: bool
    before: str
    caption: str
    tokens: list[str]
    kept: int
    weight: float


@dataclass(frozen=True)
class Draws:
    """Reads in a training's order; `following`: the batch behind them, 0 where the training ends. `chosen`: by the form."""

    seed: int
    chosen: bool
    first: int
    following: int
    draws: list[Draw]


def draws(config: Config, first: int = 0) -> Draws:
    """The reads of the batches from number `first` on, of a training that begins at step 1.

    Whole batches, until they hold about eight images; of a large batch the first twelve. Raises DataError.
    """
    dataset = folders.scan(config.folders, config.captions)
    buckets = Buckets(config.data)
    seed = config.training.seed
    chosen = seed is not None
    if seed is None:
        seed = secrets.randbelow(2**32)
    every = Reads(dataset.pictures, [buckets.place(picture.size) for picture in dataset.pictures], config, seed)
    length = Length.of(len(every), config.training)
    number = first = min(max(first, 0), length.total_batches - 1)
    found: list[Draw] = []
    while len(found) < ENOUGH and number < length.total_batches:
        found += _batch(every, number, number // length.accumulation + 1)
        number += 1
    return Draws(seed, chosen, first, number % length.total_batches, found[:MOST])


def _batch(every: Reads, number: int, step: int) -> Iterator[Draw]:
    settings, prior = every.config.captions, every.config.training.prior_loss_weight
    for read in every.reads(number)[:MOST]:
        picture = every.pictures[read.item]
        image = Image.fromarray(every.image(read))
        if every.config.objective.masked:
            image.putalpha(Image.fromarray((every.opacity(read) * 255).astype("uint8")).resize(image.size))
        tokens = [piece.text for piece in pieces(read.caption, weighted=settings.weighted)]
        yield Draw(
            step=step,
            name=f"{picture.folder}/{picture.path.name}",
            picture=_thumbnail(image),
            bucket=read.placement.bucket,
            flipped=read.flip,
            before=picture.caption or "",
            caption=read.caption,
            tokens=tokens,
            kept=min(len(tokens), settings.max_tokens),
            weight=prior if picture.regularisation else 1.0,
        )


def _thumbnail(image: Image.Image) -> str:
    """The picture in small, as a data address."""
    image.thumbnail(THUMBNAIL)
    kind, data = ("JPEG" if image.mode == "RGB" else "PNG"), io.BytesIO()
    image.save(data, kind, quality=85)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data.getvalue()).decode()


def report(preset: Preset, batch: int, as_json: bool) -> int:
    """Print the draws. Returns the exit code: 0, or 2 when a setting is not allowed or the images cannot be read."""
    config, told = settings(preset.values)
    if wrong := [problem for problem in told if problem.severity == "error"]:
        return _refuse(wrong, as_json)
    try:
        found = draws(config, batch)
    except LorawrightError as error:
        return _refuse([Problem("", "Images", str(error))], as_json)
    if as_json:
        print(json.dumps({"problems": [], **asdict(found)}))
    else:
        print("\n".join(shown(line) for line in _lines(found)))
    return EXIT_DONE


def _refuse(wrong: list[Problem], as_json: bool) -> int:
    if as_json:
        print(json.dumps({"problems": [asdict(problem) for problem in wrong]}))
    else:
        print("\n".join(map(str, wrong)), file=sys.stderr)
    return EXIT_CONFIG


def _lines(found: Draws) -> Iterator[str]:
    yield f"seed {found.seed}" + ("" if found.chosen else ", since none is set; a training draws another one")
    for draw in found.draws:
        marks = f"{draw.bucket[0]}×{draw.bucket[1]}" + (", mirrored" if draw.flipped else "")
        yield f"step {draw.step}: {draw.name} ({marks}): {draw.caption or 'no caption'}"
        if draw.kept < len(draw.tokens):
            yield f"    {len(draw.tokens)} tokens, cut: {''.join(draw.tokens[draw.kept :]).strip()}"
