"""The image folders: what is in them, and everything that is wrong with them.

The layout is kohya's: inside the folder that the settings name, each folder `NN_name` holds
images that are seen NN times in an epoch; `name` is the caption of those without a caption file.
A folder with images directly inside works too; they are seen once. Nothing is ever written here.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.data import images
from trainer.data.batches import balance
from trainer.data.buckets import Size
from trainer.errors import DataError, LorawrightError, Problem
from trainer.paths import absent, resolve, shown
from trainer.schema import problem_with
from trainer.schema.data import Captions
from trainer.schema.model import Folders

CAPTION_SUFFIXES = (".caption", ".txt", ".cap")
DECODING_S = 60.0
"""Seconds that looking for damaged images may take; what is left then is only opened."""

MOST_REPEATS = 10_000
"""Above it the number in a folder's name is surely a date or an index."""

NUMBERED = re.compile(r"(\d{1,9})(?:_(.*))?", re.ASCII)
_IMAGES, _REGULARISATION, _EXTENSION = "train_data_dir", "reg_data_dir", "caption_extension"


@dataclass(frozen=True)
class Picture:
    """One image file. `size` is (width, height) as it is looked at, `folder` its folder's name.

    `caption` is the first line of its `caption_file`, else its folder's `class_tokens`, else None.
    """

    path: Path
    caption: str | None
    repeats: int
    size: Size
    folder: str
    regularisation: bool
    class_tokens: str | None
    caption_file: Path | None = None


@dataclass(frozen=True)
class Subset:
    """One folder, with the repeats that its name says, its images, and how many more cannot be read."""

    path: Path
    repeats: int
    class_tokens: str | None
    regularisation: bool
    images: int
    unreadable: int = 0


@dataclass(frozen=True)
class Dataset:
    """Pictures to train on, then the regularisation pictures, in the order of their names.

    Regularisation pictures have repeats such that as many of them as of the others are seen in
    an epoch; those that are not seen at all are left out.
    """

    pictures: tuple[Picture, ...]
    subsets: tuple[Subset, ...]

    @property
    def repeats(self) -> int:
        """Pictures seen in an epoch."""
        return sum(picture.repeats for picture in self.pictures)


@dataclass(frozen=True)
class Survey:
    """What both folders hold, and what is wrong with them; the data set lacks what is wrong.

    `unreadable` says of each image that it lacks what is wrong with it.
    """

    dataset: Dataset
    problems: tuple[Problem, ...]
    unreadable: tuple[str, ...] = ()


def scan(folders: Folders, captions: Captions) -> Dataset:
    """The data set; image headers are read, no pixels. Raises DataError with all errors at once."""
    found = survey(folders, captions, decode=False)
    errors = [str(problem) for problem in found.problems if problem.severity == "error"]
    if errors:
        raise DataError("\n".join(errors))
    return found.dataset


def problems(folders: Folders, captions: Captions) -> list[Problem]:
    """Everything wrong with both folders, damaged images included."""
    return list(survey(folders, captions, decode=True).problems)


def survey(folders: Folders, captions: Captions, decode: bool) -> Survey:
    """Look through both folders; `decode` reads whole images, so that damaged ones are found."""
    found: list[Problem] = []
    training = _Folder(_IMAGES, folders.images, found)
    regularisation = _Folder(_REGULARISATION, folders.regularisation, found)
    if not folders.images.strip():
        training.problem('is empty. Enter the folder that holds your image folders ("10_cat" and the like).')
    if training.groups and {g.path for g in training.groups} & {g.path for g in regularisation.groups}:
        regularisation.problem("is the same as Image folder (train_data_dir). It is for other images of the same kind.")
    suffix = caption_suffix(captions)
    deadline = time.monotonic() + DECODING_S if decode else 0.0
    parts = [_pictures(f, suffix, deadline) for f in (training, regularisation) if f.text.strip()]
    pictures = [p for part, _ in parts for p in part]
    unreadable = tuple(error.message.rstrip(".") for _, errors in parts for error in errors)
    _check_captions([p for p in pictures if not p.regularisation], training.groups, suffix, found)
    dataset = _dataset(pictures, [*training.groups, *regularisation.groups], found)
    return Survey(dataset, tuple(found), unreadable)


def caption_suffix(captions: Captions) -> str:
    """The ending of caption files: a missing dot is added, empty means .caption."""
    text = captions.extension.strip()
    return f".{text.removeprefix('.')}" if text else ".caption"


def _dataset(pictures: list[Picture], groups: Iterable[_Group], found: list[Problem]) -> Dataset:
    read = Counter(p.path.parent for p in pictures)
    training = [p for p in pictures if not p.regularisation]
    others = [p for p in pictures if p.regularisation]
    wanted = sum(p.repeats for p in training)
    if training and others:
        counts = balance([p.repeats for p in others], wanted)
        others = [replace(p, repeats=n) for p, n in zip(others, counts, strict=True)]
        if unused := counts.count(0):
            found.append(
                problem_with(
                    _REGULARISATION,
                    f"{unused} of {len(others)} images are not used: an epoch takes as many as there are training "
                    f"images with their repeats ({wanted}), in the order of their names.",
                    "warning",
                )
            )
    subsets = [
        Subset(g.path, g.repeats, g.class_tokens, g.regularisation, read[g.path], len(g.names) - read[g.path])
        for g in groups
        if g.repeats > 0
    ]
    return Dataset((*training, *(p for p in others if p.repeats)), tuple(subsets))


def natural(name: str) -> tuple[object, ...]:
    """A key by which "img2" comes before "img10". Ties in letter case keep a fixed order."""
    parts = re.split(r"(\d+)", name)
    return ([int(p) if i % 2 else p.lower() for i, p in enumerate(parts)], name)


@dataclass
class _Group:
    """One folder with images directly inside."""

    path: Path
    repeats: int
    class_tokens: str | None
    regularisation: bool
    names: list[str] = field(default_factory=list)
    stems: set[str] = field(default_factory=set)
    """The images' names without their endings."""

    others: dict[str, list[str]] = field(default_factory=dict)
    """Every other file: its name in lower case → the names that are written so, in any case."""


class _Folder:
    """One of the two folders in the settings: its groups of images, and what is wrong with it."""

    def __init__(self, key: str, text: str, found: list[Problem]) -> None:
        self.key, self.text, self.found = key, text, found
        self.groups: list[_Group] = []
        if not text.strip():
            return
        try:
            self.path = resolve(text)
        except LorawrightError as error:
            self.problem(str(error))
            return
        if os.path.isfile(self.path):  # noqa: PTH113  answers False where pathlib raises
            self.problem(f'"{shown(self.path)}" is a file. Enter the folder that holds the image folders.')
        elif not os.path.isdir(self.path):  # noqa: PTH112
            self.problem(absent(text, "folder"))
        else:
            self._look()

    def problem(self, message: str, severity: str = "error") -> None:
        self.found.append(problem_with(self.key, message, severity))

    def _look(self) -> None:
        here, inner = self._read(self.path, 1, None)
        numbered, plain = [], []
        for name in inner:
            match = NUMBERED.fullmatch(name)
            if match:
                numbered.append(self._read(self.path / name, int(match[1]), match[2] or "")[0])
            else:
                plain.append(name)
        if numbered:
            self._numbered(numbered, here)
            self._ignored(plain)
        elif here.names:
            self._flat(here)
            self._ignored(plain)
        else:
            self._nothing(plain)

    def _numbered(self, groups: list[_Group], here: _Group) -> None:
        for group in groups:
            if not group.names:
                self.problem(f'"{shown(group.path.name)}" holds no images ({_kinds()}).', "warning")
            elif group.repeats == 0:
                self.problem(f'"{shown(group.path.name)}" is left out: its name says 0 repeats.', "warning")
            elif group.repeats <= MOST_REPEATS:
                self.groups.append(group)
            if group.names and group.repeats >= 1000:
                self.problem(
                    f'"{shown(group.path.name)}" is read as {group.repeats} repeats. If it is not meant so, rename it '
                    'to NN_name, for instance "1_cat".',
                    "error" if group.repeats > MOST_REPEATS else "warning",
                )
        if here.names:
            lie = "1 image lies" if len(here.names) == 1 else f"{len(here.names)} images lie"
            self.problem(
                f"{lie} directly in the folder, beside inner folders NN_name, which alone are used. "
                'Put what shall be used too into a folder of its own, for instance "1_more".',
                "warning",
            )
        if not self.groups:
            ends = ", ".join(images.SUFFIXES)
            self.problem(
                f'no images are left to use in "{shown(self.path)}". Its inner folders NN_name want some: {ends}.'
            )

    def _flat(self, here: _Group) -> None:
        name = self.path.absolute().name
        match = NUMBERED.fullmatch(name)
        if match and "_" in name:
            self.problem(
                f'"{shown(self.path)}" holds the images themselves; its name says {int(match[1])} repeats, which only '
                f'counts when the folder around it is entered. Enter "{shown(self.path.absolute().parent)}".'
            )
        self.groups.append(here)

    def _ignored(self, plain: list[str]) -> None:
        holding = [name for name in plain if self._read(self.path / name, 1, None)[0].names]
        if holding:
            several = f"{len(holding)} inner folders hold images but are ignored, since their names are"
            one = "1 inner folder holds images but is ignored, since its name is"
            self.problem(
                f"{one if len(holding) == 1 else several} not NN_name: "
                f'{_listed(holding, 3)}. Rename them, for instance to "1_{shown(holding[0])}".',
                "warning",
            )

    def _nothing(self, plain: list[str]) -> None:
        """No images where they belong: say where they are."""
        for name in plain:
            path = self.path / name
            here, inner = self._read(path, 1, None)
            if any(NUMBERED.fullmatch(i) and self._read(path / i, 1, None)[0].names for i in inner):
                self.problem(f'the image folders lie one level deeper. Enter "{shown(path)}".')
                return
            if here.names:
                self.problem(
                    f'its inner folder "{shown(name)}" holds images ({len(here.names)}), but is not called NN_name. '
                    f'Rename it, for instance to "10_{shown(name)}", or enter "{shown(path)}".'
                )
                return
        self.problem(f'there are no images ({_kinds()}) in "{shown(self.path)}" or in folders NN_name inside it.')

    def _read(self, path: Path, repeats: int, class_tokens: str | None) -> tuple[_Group, list[str]]:
        """The images of one folder and the names of the folders in it, in order."""
        group = _Group(path, repeats, class_tokens, self.key == _REGULARISATION)
        inner: list[str] = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        inner.append(entry.name)
                    elif entry.name.lower().endswith(images.SUFFIXES):
                        group.names.append(entry.name)
                        group.stems.add(os.path.splitext(entry.name)[0])  # noqa: PTH122  a Path each would be slow
                    else:
                        group.others.setdefault(entry.name.lower(), []).append(entry.name)
        except OSError as error:
            self.problem(f'"{shown(path)}" cannot be read: {error.strerror}. Change its permissions.')
        group.names.sort(key=natural)
        inner.sort(key=natural)
        return group, inner


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself is no folder; as an image it is reported
        return False


def _pictures(folder: _Folder, suffix: str, deadline: float) -> tuple[list[Picture], list[DataError]]:
    """The readable images of a folder, and what is wrong with the others; `deadline` (monotonic seconds): decode until then."""
    jobs = [(group, name) for group in folder.groups for name in group.names]
    skipped = 0

    def look(job: tuple[_Group, str]) -> Picture | DataError:
        nonlocal skipped
        group, name = job
        path = group.path / name
        decode = deadline > 0 and time.monotonic() < deadline
        skipped += deadline > 0 and not decode
        try:
            size = images.size(path, decode)
        except DataError as error:
            return error
        beside = _caption_name(group, name, suffix)
        file = None if beside is None else group.path / beside
        caption = group.class_tokens
        try:
            if file is not None:
                caption = _caption(file)
        except DataError as error:
            unreadable.append(error)
        tokens = group.class_tokens
        return Picture(path, caption, group.repeats, size, group.path.name, group.regularisation, tokens, file)

    unreadable: list[DataError] = []
    threads = min(16, (os.cpu_count() or 1) + 4)
    share = min(64, len(jobs) // (8 * threads) + 1)  # one job a task would cost more than reading a header
    shares = [jobs[i : i + share] for i in range(0, len(jobs), share)]
    with ThreadPoolExecutor(threads) as pool:
        results = [result for part in pool.map(lambda part: [look(job) for job in part], shares) for result in part]
    damaged = [r for r in results if isinstance(r, DataError)]
    if damaged:
        folder.problem(
            f"{len(damaged)} of {len(results)} images cannot be used: "
            f"{_listed([e.message.rstrip('.') for e in damaged], 5, '; ')}. Replace or remove them."
        )
    if unreadable:
        messages = sorted(e.message.rstrip(".") for e in unreadable)
        folder.found.append(
            problem_with(_EXTENSION, f"{_listed(messages, 3, '; ')}. Save them as text in UTF-8, or remove them.")
        )
    if skipped:
        folder.problem(
            f"{len(results) - skipped} of {len(results)} images were read in {DECODING_S:g} seconds and are sound; of "
            "the others only the beginning was looked at. Damage in them shows when training prepares them.",
            "warning",
        )
    return [r for r in results if isinstance(r, Picture)], damaged


def _caption_name(group: _Group, name: str, suffix: str) -> str | None:
    """The name of an image's caption file: its own, else one in another case that is no other image's own."""
    stem = os.path.splitext(name)[0]  # noqa: PTH122

    def owner(file: str) -> str:
        return file[: -len(suffix)]

    alike = group.others.get((stem + suffix).lower(), ())
    free = [file for file in alike if owner(file) == stem or owner(file) not in group.stems]
    return min(free, key=lambda file: (file != stem + suffix, owner(file) != stem, file), default=None)


def _caption(path: Path) -> str:
    """The caption in a caption file. Raises DataError."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f'"{shown(path)}" is not UTF-8 text.') from error
    except OSError as error:
        raise DataError(f'"{shown(path)}" cannot be read: {error.strerror}.') from error
    if "\0" in text:
        raise DataError(f'"{shown(path)}" is not UTF-8 text.')
    return first_line(text)


def first_line(text: str) -> str:
    """The caption in a caption file's text: its first line that is not blank; "" without one."""
    lines = text.removeprefix("\ufeff").strip().splitlines()
    return lines[0].strip() if lines else ""


def _check_captions(pictures: list[Picture], groups: Sequence[_Group], suffix: str, found: list[Problem]) -> None:
    """Warn when images have no caption file, and name the ending that would find more of them."""
    have = {other: _with_captions(groups, other) for other in {suffix, *CAPTION_SUFFIXES}}
    total = sum(len(group.names) for group in groups)
    lacking = [group.path / n for group in groups for n in group.names if not _caption_name(group, n, suffix)]
    best = max(CAPTION_SUFFIXES, key=lambda other: have[other])
    if lacking and not have[suffix] and have[best]:
        message = (
            f'no image has a caption file ending in "{suffix}", but {have[best]} of {total} have one ending in '
            f'"{best}". Enter {best} here.'
        )
    elif lacking and not have[suffix]:
        message = f'no image has a caption file ending in "{suffix}". {_instead(groups)}'
    elif lacking:
        message = (
            f'{len(lacking)} of {total} images {"has" if len(lacking) == 1 else "have"} no caption file ending in "{suffix}": '
            f"{_listed([p.name for p in lacking], 3)}. {_instead(groups)}"
        )
    else:
        message = ""
    if message:
        found.append(problem_with(_EXTENSION, message, "warning"))
    blank = [p.path.name for p in pictures if p.caption == "" and p.class_tokens != ""]
    if blank:
        files = f"{len(blank)} caption files are empty, so their images train"
        one = "1 caption file is empty, so its image trains"
        message = f"{one if len(blank) == 1 else files} without a caption: {_listed(blank, 3)}."
        found.append(problem_with(_EXTENSION, message, "warning"))


def _with_captions(groups: Sequence[_Group], suffix: str) -> int:
    return sum(bool(_caption_name(group, name, suffix)) for group in groups for name in group.names)


def _instead(groups: Sequence[_Group]) -> str:
    words = list(dict.fromkeys(group.class_tokens for group in groups if group.class_tokens))
    if words:
        return f"Their folder's name is the caption instead: {_listed(words, 3)}."
    return (
        'They train without a caption. Write some, or name their folder as in "10_cat", whose name is then the caption.'
    )


def _kinds() -> str:
    return ", ".join(suffix.removeprefix(".") for suffix in images.SUFFIXES)


def _listed(names: Sequence[str], most: int, between: str = ", ") -> str:
    """The first names, and how many more there are."""
    text = between.join(shown(name) for name in names[:most])
    return text if len(names) <= most else f"{text}{between}and {len(names) - most} more"
