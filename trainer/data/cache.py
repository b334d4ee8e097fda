"""Latents of all pictures, encoded once: in memory, and on disk for the next run.

On disk each picture has one file for each size it was encoded at, in a folder `.latents` beside
it. The file's header says what it was made from: the picture's bytes, the VAE, the crop. An entry
that does not match is made anew; one that is damaged or foreign too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trainer.data.buckets import Placement
from trainer.data.folders import Picture
from trainer.data.images import opacity, pixels
from trainer.errors import TrainingError
from trainer.paths import shown
from trainer.run import write_whole

log = logging.getLogger(__name__)
FOLDER = ".latents"


@dataclass(frozen=True)
class Latents:
    """One picture's latents [C,h,w], and those of its mirror image where flipping is on.

    `mask` [h,w] in 0…1 says how much each place counts, where transparency is a mask.
    """

    plain: torch.Tensor
    flipped: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def to_tensor(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 pictures [H,W,3] of one size → float32 [B,3,H,W] in −1…1."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.float().div_(127.5).sub_(1)


def encode_all(
    pictures: Sequence[Picture],
    placements: Sequence[Placement],
    model: Any,
    *,
    flip: bool,
    batch_size: int,
    dtype: torch.dtype,
    to_disk: bool,
    masked: bool = False,
    progress: Callable[[int, int], None],
) -> list[Latents]:
    """The latents of every picture, in order; encoded in batches of one size, decoded in parallel.

    `progress(done, total)` is called as they come. Pictures whose disk entry is valid are not
    decoded at all.
    """
    found: list[Latents | None] = [None] * len(pictures)
    store = DiskCache(model, dtype, flip, masked) if to_disk else None
    if store:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(store.read, pictures, placements))
    done = sum(latents is not None for latents in found)
    if done:
        log.info("%d of %d latents were read from the disk cache", done, len(pictures))
    progress(done, len(pictures))
    todo = defaultdict(list)
    for i, latents in enumerate(found):
        if latents is None:
            todo[placements[i].bucket].append(i)
    batches = [group[k : k + batch_size] for group in todo.values() for k in range(0, len(group), batch_size)]
    for batch, images in _decoded_ahead(batches, pictures, placements, matted=not masked):
        names = [str(pictures[i].path) for i in batch]
        plain = encode(model, to_tensor(images), names, [_draw(pictures[i], "plain") for i in batch])
        plain = plain.to("cpu", dtype)
        mirrored = None
        if flip:
            turned = [np.ascontiguousarray(image[:, ::-1]) for image in images]
            mirrored = encode(model, to_tensor(turned), names, [_draw(pictures[i], "flipped") for i in batch])
            mirrored = mirrored.to("cpu", dtype)
        for k, i in enumerate(batch):
            mask = torch.from_numpy(opacity(pictures[i].path, placements[i])) if masked else None
            latents = Latents(_own(plain[k]), _own(mirrored[k]) if mirrored is not None else None, mask)
            found[i] = latents
            if store:
                store.write(pictures[i], placements[i], latents)
        done += len(batch)
        progress(done, len(pictures))
    return found  # type: ignore[return-value]


def _decoded_ahead(
    batches: list[list[int]], pictures: Sequence[Picture], placements: Sequence[Placement], *, matted: bool
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Each batch with its decoded images, while the next two are being read by other threads."""
    with ThreadPoolExecutor() as pool:
        waiting: list[Any] = []
        for batch in batches:
            waiting.append(
                (batch, [pool.submit(pixels, pictures[i].path, placements[i], matted=matted) for i in batch])
            )
            if len(waiting) > 2:
                ready, images = waiting.pop(0)
                yield ready, [image.result() for image in images]
        for ready, images in waiting:
            yield ready, [image.result() for image in images]


def _own(latents: torch.Tensor) -> torch.Tensor:
    return latents.clone(memory_format=torch.contiguous_format)


def _draw(picture: Picture, which: str) -> torch.Generator:
    """The random state for a picture's posterior: its own, so that order and batch don't matter."""
    digest = hashlib.blake2b(f"{picture.path.name}/{picture.size}/{which}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def encode(
    model: Any,
    pixels: torch.Tensor,
    names: Sequence[str],
    generators: list[torch.Generator] | None = None,
    among: tuple[Sequence[int], int] | None = None,
) -> torch.Tensor:
    """Latents [B,C,h,w] of pixels [B,3,H,W], with draws as the model's `encode` has them. Raises TrainingError naming the images whose latents are not numbers."""
    latents = model.encode(pixels, generators, **({"among": among} if among else {}))
    sound = latents.isfinite().flatten(1).all(1).tolist()
    if all(sound):
        return latents
    bad = [f'"{shown(name)}"' for name, is_sound in zip(names, sound, strict=True) if not is_sound]
    half = model.vae.dtype == torch.float16
    raise TrainingError(
        "not_a_number",
        f"The VAE made no numbers of {', '.join(bad)}"
        + (": it cannot compute in fp16, as SDXL's own cannot." if half else "."),
        "Switch on No half VAE (sdxl_no_half_vae), or set Mixed precision (mixed_precision) to bf16."
        if half
        else "Choose another VAE (vae), or leave it empty for the base model's own.",
    )


class Shelf:
    """Files of tensors in a folder beside the pictures. Read-only folders are used as they are, with a warning."""

    def __init__(self, folder: str, what: str) -> None:
        self.folder = folder
        self.what = what
        self._refused: set[Path] = set()

    def file(self, picture: Picture, size: str = "") -> Path:
        """Where a picture's entry lies."""
        return picture.path.parent / self.folder / f"{picture.path.name}{size}.safetensors"

    def read(self, file: Path, made_from: str) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """An entry's tensors and metadata; None if it is damaged, foreign, or made from something else."""
        try:
            with safe_open(file, framework="pt") as entry:
                metadata = entry.metadata() or {}
                if metadata.get("made_from") != made_from:
                    return None
                tensors = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        return (tensors, metadata) if all(tensor.isfinite().all() for tensor in tensors.values()) else None

    def write(self, file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Store one entry, whole or not at all."""
        if file.parent in self._refused:
            return
        try:
            file.parent.mkdir(exist_ok=True)
            write_whole(file, save(dict(tensors), metadata))
        except OSError as error:
            self._refused.add(file.parent)
            log.warning(
                "%s are not cached in %s: %s", self.what, file.parent, error.strerror or os.strerror(error.errno or 0)
            )


class DiskCache:
    """Latents in files beside the pictures."""

    def __init__(self, model: Any, dtype: torch.dtype, flip: bool, masked: bool = False) -> None:
        self.vae = fingerprint(model.vae)
        self.dtype = dtype
        self.flip = flip
        self.masked = masked
        self.shelf = Shelf(FOLDER, "latents")

    def file(self, picture: Picture, placement: Placement) -> Path:
        width, height = placement.bucket
        return self.shelf.file(picture, f"_{width}x{height}")

    def made_from(self, placement: Placement) -> str:
        source = {"vae": self.vae, "resized": placement.resized, "crop": placement.crop, "version": 1}
        return json.dumps(source | ({"alpha": "mask"} if self.masked else {}))

    def read(self, picture: Picture, placement: Placement) -> Latents | None:
        """The stored latents if they belong to this picture, VAE and crop, and are as exact as new ones; else None."""
        entry = self.shelf.read(self.file(picture, placement), self.made_from(placement))
        if entry is None:
            return None
        tensors, metadata = entry
        if not _same_picture(picture.path, metadata) or (self.flip and "flipped" not in tensors):
            return None
        # What lies there in float32 is rounded as new ones are; what was rounded already stays so.
        if tensors["plain"].dtype not in (self.dtype, torch.float32):
            return None
        plain = tensors["plain"].to(self.dtype)
        width, height = placement.bucket
        if plain.shape[1:] != (height // 8, width // 8):
            return None
        return Latents(
            plain,
            tensors["flipped"].to(self.dtype) if self.flip else None,
            tensors["mask"] if self.masked else None,
        )

    def write(self, picture: Picture, placement: Placement, latents: Latents) -> None:
        """Store one entry, whole or not at all."""
        stat = picture.path.stat()
        metadata = {
            "made_from": self.made_from(placement),
            "mtime_ns": str(stat.st_mtime_ns),
            "size": str(stat.st_size),
            "blake2b": _digest(picture.path),
        }
        tensors = {"plain": latents.plain, "flipped": latents.flipped, "mask": latents.mask}
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.shelf.write(self.file(picture, placement), given, metadata)


def _same_picture(path: Path, metadata: dict[str, str]) -> bool:
    stat = path.stat()
    if (str(stat.st_mtime_ns), str(stat.st_size)) == (metadata.get("mtime_ns"), metadata.get("size")):
        return True
    return _digest(path) == metadata.get("blake2b")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def fingerprint(module: torch.nn.Module) -> str:
    """A digest of a module's weights and their dtype, so that another VAE is told from this one."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        if "decoder" not in name:
            digest.update(f"{name}{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
