"""A zip with images from the visitor's machine: taken in pieces, looked at before anything is unpacked, then a new folder.

Whoever may use the page sends it, and yet what a zip says of itself is not believed: nothing outside the new
folder is written, no link is made, and no more is unpacked than was announced.
"""

from __future__ import annotations

import base64
import io
import os
import re
import secrets
import shutil
import stat
import threading
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gui.files import Roots
from trainer.data.folders import CAPTION_SUFFIXES, NUMBERED
from trainer.data.images import SUFFIXES
from trainer.errors import DataError
from trainer.paths import DEMO, shown
from trainer.run import unfinished

MOST_BYTES = 2 * 1024**3
MOST_ENTRIES = 20_000
MOST_INDEX = 16 * 1024**2
"""Bytes of a zip's list of entries: Python reads all of it before it tells how many there are."""

MOST_UNPACKED = 8 * 1024**3
MOST_FILE = 256 * 1024**2
MOST_RATIO = 200
"""How many times larger a file of more than a megabyte may become; pictures and words stay far below."""

SPARE = 512 * 1024**2
"""Bytes that stay free on the disk."""

PIECE = 1024**2
FORGOTTEN_S = 6 * 3600
MOST_NAMED = 5
ANSWERED_WITHIN_S = 2.0
"""A proxy cuts what takes a minute, so that a large zip is asked after again."""

_ID = re.compile(r"[0-9a-f]{32}")
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError)


class _Bounded(io.FileIO):
    """A file that is never read in pieces larger than a list of entries may be."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = MOST_INDEX
        if size > MOST_INDEX:
            raise DataError("The zip's list of entries is too long.", f"{MOST_ENTRIES:,} files are the most.")
        return super().read(size) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as error:  # to before the beginning
            if whence == os.SEEK_END:  # zipfile looks for what only large zips have, and waits for this answer
                raise
            raise zipfile.BadZipFile("It is cut off") from error


@dataclass(frozen=True)
class Entry:
    """A file of a zip that will be unpacked, and where."""

    info: zipfile.ZipInfo
    path: PurePosixPath


class Unpacking(threading.Thread):
    """A zip on its way into a folder: how many of its files are there, and in the end what has come of it."""

    def __init__(self, work: Callable[[Callable[[int, int], None]], dict[str, Any]]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.done = self.total = 0
        self.given_up = False
        self.answer: dict[str, Any] = {}
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.answer = self.work(self.tell)
        except Exception as error:  # told to whoever asks
            self.error = error

    def tell(self, done: int, total: int) -> None:
        if self.given_up:
            raise DataError("This upload was given up.", "Send the zip again.")
        self.done, self.total = done, total


class Uploads:
    """Zips on their way to a folder inside the roots; what has come of them lies in `folder`."""

    def __init__(self, roots: Roots, folder: Path) -> None:
        self.roots = roots
        self.folder = folder
        self._unpacking: dict[str, Unpacking] = {}
        self._lock = threading.Lock()

    def place(self, name: str) -> dict[str, Any]:
        """Where a zip of that name would be unpacked: a folder that is not there yet."""
        words = re.sub(r"[^\w .-]+", "-", Path(name).stem, flags=re.UNICODE).strip(" .-") or "images"
        parent = (self.roots.folders[0] if self.roots.folders else Path.home()) / "datasets"
        for number in range(1, 1000):
            found = parent / (words if number == 1 else f"{words}-{number}")
            if not os.path.lexists(found):
                break
        return {"folder": str(found), "most": MOST_BYTES}

    def begin(self, size: int, target: str) -> dict[str, Any]:
        """Begin to take a zip of `size` bytes. Raises DataError where it could not be unpacked to `target`."""
        self._target(target)
        if size > MOST_BYTES:
            raise DataError(
                f"The zip has {_megabytes(size)} MB; {_megabytes(MOST_BYTES)} MB are the most.",
                "Send the folders one by one.",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for ended in [key for key, job in self._unpacking.items() if not job.is_alive()]:
            del self._unpacking[ended]
        for old in self.folder.glob("*.part"):
            if time.time() - old.stat().st_mtime > FORGOTTEN_S:
                old.unlink(missing_ok=True)
        _spare(self.folder, size)
        name = secrets.token_hex(16)
        self._part(name).touch()
        return {"id": name, "offset": 0}

    def add(self, name: str, offset: int, data: str) -> dict[str, Any]:
        """Take a piece (base64) that begins at `offset`; tells where the next begins. A piece may come twice."""
        part = self._part(name)
        try:
            piece = base64.b64decode(data, validate=True)
        except ValueError as error:  # binascii's own is one
            raise DataError("A piece of the zip did not come through.", "Try again.") from error
        with self._opened(part, "r+b") as file:
            have = file.seek(0, os.SEEK_END)
            if offset == have:
                if have + len(piece) > MOST_BYTES:
                    raise DataError(f"The zip has more than {_megabytes(MOST_BYTES)} MB, which are the most.")
                have += file.write(piece)
        return {"offset": have}

    def drop(self, name: str) -> dict[str, Any]:
        """Forget what has come, and give up unpacking it."""
        if name in self._unpacking:
            self._unpacking[name].given_up = True
        self._part(name).unlink(missing_ok=True)
        return {"dropped": True}

    def unpack(self, name: str, target: str) -> dict[str, Any]:
        """Unpack the zip to the folder `target`, which must not exist; what came is then forgotten.

        Returns the `folder` to train on, how many `images` and `captions` it has, and what was `left_out`; or, while
        it goes on, how many of its files are `done`, and `total`: then ask again.
        Raises DataError, and leaves nothing behind, when anything about the zip is not as it should be.
        """
        with self._lock:
            job = self._unpacking.get(name)
            if job is None:
                part, folder = self._part(name), self._target(target)
                job = self._unpacking[name] = Unpacking(lambda tell: self._unpack(part, folder, tell))
                job.start()
        job.join(ANSWERED_WITHIN_S)
        if job.is_alive():
            return {"done": job.done, "total": job.total}
        if job.error is not None:
            raise job.error
        return job.answer

    def _unpack(self, part: Path, folder: Path, tell: Callable[[int, int], None]) -> dict[str, Any]:
        try:
            with self._opened(part, "rb"):
                kept, left_out = unpack(part, folder, tell)
        except OSError as error:
            raise DataError(f'"{shown(folder)}" cannot be written: {error.strerror or error}.') from error
        finally:
            part.unlink(missing_ok=True)
        images = sum(path.suffix.lower() in SUFFIXES for path in kept)
        return {
            "folder": str(_to_train_on(folder)),
            "images": images,
            "captions": len(kept) - images,
            "left_out": len(left_out),
            "examples": [shown(found) for found in left_out[:MOST_NAMED]],
        }

    def _part(self, name: str) -> Path:
        if not _ID.fullmatch(name):
            raise DataError("There is no such upload.", "Send the zip again.")
        return self.folder / f"{name}.part"

    def _opened(self, part: Path, mode: str) -> Any:
        try:
            return part.open(mode)
        except FileNotFoundError as error:
            raise DataError("This upload was given up.", "Send the zip again.") from error

    def _target(self, text: str) -> Path:
        folder = Path(os.path.abspath(os.path.expanduser(text.strip())))  # noqa: PTH100, PTH111  links stay links
        if not text.strip() or not folder.name:
            raise DataError("Enter the folder that the images shall come to.")
        if not self.roots.holds(folder) or DEMO.resolve() in folder.resolve().parents:
            raise DataError(
                f'"{shown(folder)}" is outside the folders that this page may write to.',
                f"Those are {', '.join(map(str, self.roots.folders))}.",
            )
        if os.path.lexists(folder):
            raise DataError(f'"{shown(folder)}" exists already and is left as it is.', "Enter another name.")
        return folder


def unpack(
    source: Path, target: Path, tell: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[PurePosixPath], list[str]]:
    """Unpack images and captions of a zip to the new folder `target`: their names, and those left out.

    `tell` hears before each file how many are there, and of how many; what it raises ends it.
    Raises DataError when anything about the zip is not as it should be; then there is no folder.
    """
    try:
        with _Bounded(source) as file, zipfile.ZipFile(file) as archive:
            entries, left_out = chosen(archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            _spare(target.parent, sum(entry.info.file_size for entry in entries))
            with unfinished(target) as folder:
                folder.mkdir()
                for done, entry in enumerate(entries):
                    tell(done, len(entries))
                    path = folder / entry.path
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _write(archive, entry.info, path)
    except _DAMAGED as error:
        raise DataError(f"The zip cannot be read: {_why(error)}.", "Make it anew and send it again.") from error
    return [entry.path for entry in entries], left_out


def chosen(archive: zipfile.ZipFile) -> tuple[list[Entry], list[str]]:
    """The entries to unpack, and the names of the files left out. Raises DataError for a zip not to be trusted."""
    infos = archive.infolist()
    if not infos:
        raise DataError("The zip holds nothing.", "Put the image folders into it and send it again.")
    if len(infos) > MOST_ENTRIES:
        raise DataError(f"The zip holds {len(infos):,} entries.", f"{MOST_ENTRIES:,} are the most.")
    kept: list[Entry] = []
    left_out: list[str] = []
    for info in infos:
        path = _path(info)
        if info.is_dir() or any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            continue
        if path.suffix.lower() in (*SUFFIXES, *CAPTION_SUFFIXES):
            _measured(info, path)
            kept.append(Entry(info, path))
        else:
            left_out.append(str(path))
    if not any(entry.path.suffix.lower() in SUFFIXES for entry in kept):
        raise DataError("There are no images in the zip.", f"Those end in {', '.join(SUFFIXES)}.")
    total = sum(entry.info.file_size for entry in kept)
    if total > MOST_UNPACKED:
        raise DataError(
            f"Unpacked, the zip has {_megabytes(total)} MB.", f"{_megabytes(MOST_UNPACKED)} MB are the most."
        )
    names: dict[str, str] = {}
    for entry in kept:
        name = unicodedata.normalize("NFC", str(entry.path))
        other = names.get(name.casefold())
        if other == name:
            raise DataError(f'The zip holds "{shown(name)}" twice.', "Give the files different names.")
        if other:
            raise DataError(
                f'The zip holds "{shown(other)}" and "{shown(name)}", which differ in nothing but capital letters.',
                "Give the files different names: on some systems the two are one.",
            )
        names[name.casefold()] = name
    return kept, left_out


def _path(info: zipfile.ZipInfo) -> PurePosixPath:
    """Where an entry goes inside the folder. Raises DataError for a name that leads out of it, and for what is no file."""
    name = _decoded(info).replace("\\", "/")
    path = PurePosixPath(name)
    kind = stat.S_IFMT(info.external_attr >> 16)
    told = f'"{shown(name)}"'
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{told} in the zip is a link or no regular file.", "Pack the files themselves.")
    if path.is_absolute() or re.match(r"[A-Za-z]:", name) or ".." in path.parts or not path.parts:
        raise DataError(f"{told} in the zip leads out of its folder.", "Nothing was unpacked. Make the zip anew.")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise DataError(f"{name!a} in the zip is no name for a file.", "Rename it and make the zip anew.")
    if info.flag_bits & 1:
        raise DataError(f"{told} in the zip is encrypted.", "Make the zip without a password.")
    return path


def _decoded(info: zipfile.ZipInfo) -> str:
    """The entry's name. Many programs write UTF-8 without saying so, which zipfile takes for the old DOS letters."""
    name = info.orig_filename
    if not info.flag_bits & 0x800:
        try:
            return name.encode("cp437").decode("utf-8")
        except UnicodeError:
            return name
    return name


def _measured(info: zipfile.ZipInfo, path: PurePosixPath) -> None:
    told = f'"{shown(str(path))}"'
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{told} is packed in a way that is not read here.", "Make the zip with the usual one, Deflate."
        )
    if info.file_size > MOST_FILE:
        raise DataError(
            f"{told} has {_megabytes(info.file_size)} MB unpacked.", f"{_megabytes(MOST_FILE)} are the most."
        )
    if info.file_size > PIECE and info.file_size > MOST_RATIO * info.compress_size:
        raise DataError(
            f"{told} would become more than {MOST_RATIO} times larger.", "That is no picture. Leave it out."
        )


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    """Unpack one file to a new name, and not a byte more than was announced."""
    with archive.open(info) as source, path.open("xb") as file:
        for piece in _pieces(source, info.file_size):
            file.write(piece)
    if path.stat().st_size != info.file_size:
        raise zipfile.BadZipFile(f'"{path.name}" is cut off')


def _pieces(source: Any, size: int) -> Iterator[bytes]:
    left = size + 1
    while left > 0 and (piece := source.read(min(PIECE, left))):
        left -= len(piece)
        yield piece


def _spare(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise DataError(
            f"The disk has {_megabytes(free)} MB left, too few for {_megabytes(size)} MB.",
            f"{_megabytes(SPARE)} MB are always left free. Delete old runs, or choose a folder on another disk.",
        )


def _to_train_on(folder: Path) -> Path:
    """The folder that holds the image folders: zips often hold one folder around everything."""
    inner = list(folder.iterdir())
    if len(inner) == 1 and inner[0].is_dir() and not NUMBERED.fullmatch(inner[0].name):
        return _to_train_on(inner[0])
    return folder


def _why(error: Exception) -> str:
    text = str(error).rstrip(".")
    return "it is cut off" if isinstance(error, EOFError) else text[:1].lower() + text[1:] or type(error).__name__


def _megabytes(size: int) -> str:
    return f"{size / 1024**2:,.0f}"
