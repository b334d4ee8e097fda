"""Captions for a folder of images, written by a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from trainer.data import edits, folders, images
from trainer.data.buckets import Placement
from trainer.data.edits import Edit
from trainer.data.folders import Picture
from trainer.errors import DataError
from trainer.paths import DEMO, resolve, shown
from trainer.schema import parse
from trainer.tools import Report, Tell, captioning
from trainer.tools.commands import Caption

AT_ONCE_S = 5.0
"""Captions are written this often: before each time the list of what they were is written anew."""

LARGEST = 1024
MOST_SHOWN = 20


def run(options: Caption, tell: Tell) -> Report:
    """Caption. Raises ModelError and DataError; what was written until then stays, and can be taken back."""
    tell("looking through the folder", 0, 0)
    todo, warnings = _todo(options)
    if not todo:
        return Report(["Every image has a caption file already; nothing was written."], warnings=warnings)
    tell("loading the model", 0, 0)
    describe = captioning.load(options)
    record, since = edits.new_record(resolve(options.backups)), time.monotonic()
    made: list[Edit] = []
    waiting: list[Edit] = []

    def write() -> None:
        edits.write_down(record, "captions by a model", [*made, *waiting])
        for edit in waiting:
            edit.write()
        made.extend(waiting)
        waiting.clear()

    try:
        for start in range(0, len(todo), options.batch_size):
            tell("captioning", start, len(todo))
            batch = todo[start : start + options.batch_size]
            waiting += _edits(batch, describe([_image(picture) for picture, _ in batch]), options)
            if time.monotonic() - since > AT_ONCE_S:
                write()
                since = time.monotonic()
    finally:
        if waiting:
            write()
    rows = [(edit.file.name, folders.first_line(edit.after)) for edit in made[:MOST_SHOWN]]
    lines = [f"{len(made)} caption files were written. The Dataset tab can take that back."]
    if empty := len(todo) - len(made):
        warnings.append(f"For {empty} images the model had no words; they are left as they were.")
    return Report(lines, str(resolve(options.folder)), ("File", "Caption"), rows, warnings)


def _todo(options: Caption) -> tuple[list[tuple[Picture, Path]], list[str]]:
    """The images to caption with their caption files, and what is to be known of the others."""
    folder = resolve(options.folder)
    if not folder.is_dir():
        raise DataError(f'"{shown(folder)}" is not a folder.', "Enter the folder that holds the images.")
    if DEMO.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise DataError("The images that come along are part of this program.", "Copy them to another folder first.")
    config = parse({"train_data_dir": str(folder), "caption_extension": options.extension})
    survey = folders.survey(config.folders, config.captions, decode=False)
    pictures = survey.dataset.pictures
    warnings = [str(p) for p in survey.problems if p.key == "train_data_dir"]
    if not pictures:
        raise DataError(warnings[0] if warnings else f'There are no images in "{shown(folder)}".')
    chosen: dict[Path, Picture] = {}  # two images whose names differ in their ending share a file
    for picture in pictures:
        file = picture.caption_file or picture.path.with_suffix(options.extension)
        if picture.caption_file is not None and options.existing == "skip":
            continue
        if file.is_symlink() or not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(f'"{shown(file)}" is a link, or in a folder that is one.', "Links are not written through.")
        chosen.setdefault(file, picture)
    return [(picture, file) for file, picture in chosen.items()], warnings


def _image(picture: Picture) -> Image.Image:
    """The whole image, upright, RGB, at most 1,024 pixels long."""
    scale = min(1.0, LARGEST / max(picture.size))
    size = (max(1, round(picture.size[0] * scale)), max(1, round(picture.size[1] * scale)))
    return Image.fromarray(images.pixels(picture.path, Placement(size, size, (0, 0))))


def _edits(batch: Sequence[tuple[Picture, Path]], texts: Sequence[str], options: Caption) -> Iterator[Edit]:
    for (_, file), text in zip(batch, texts, strict=True):
        caption = " ".join(text.split())
        if not caption:
            continue
        caption = f"{options.prefix.strip()} {caption}".strip()
        before = edits.text_of(file)
        old = folders.first_line(before or "")
        if options.existing == "append" and old:
            caption = f"{old.rstrip(', ')}, {caption}"
        yield Edit(file, before, edits.with_first(before or "", caption))
