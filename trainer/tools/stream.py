"""Safetensors files written one tensor at a time, whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from trainer.aside import set_aside
from trainer.checkpoint import on_disk
from trainer.errors import TrainingError
from trainer.models.weights import DTYPES
from trainer.run import unfinished

CODES = {dtype: code for code, dtype in DTYPES.items()}

Shape = tuple[int, ...]
T = TypeVar("T")


def write(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, Shape]],
    make: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file whose tensors are made one after the other, each when its turn comes.

    `make(name)` returns the tensor; dtype and shape must be those announced. Larger dtypes come first,
    so that each tensor begins at a multiple of its own size.
    """
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in order:
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == tensors[name], name
            if tensor.numel():
                file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def finish(path: Path, write: Callable[[Path], T]) -> tuple[T, str]:
    """Have `write` make a file or folder under another name and give it this one, whole or not at all.

    What is in the way is kept under a name with its date. Returns what `write` does, and the sentence that tells of both.
    """

    def make(path: Path) -> tuple[T, str]:
        with unfinished(path) as temporary:
            made = write(temporary)
            kept = set_aside(path)
        return made, f"Written: {path}" + (f" (what was there is kept as {kept.name})" if kept else "")

    return on_disk(path, make)


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor in `dtype`. Raises TrainingError when a value is not a number there."""
    made = tensor.to(dtype)
    if made.is_floating_point() and dtype.itemsize > 1 and not torch.isfinite(made).all():
        raise TrainingError(
            "not_a_number",
            f"{name} has values that are not numbers in {str(dtype).removeprefix('torch.')}.",
            "Choose bf16 or float as Precision, which hold larger numbers; in float they come from an input that is broken.",
        )
    return made
