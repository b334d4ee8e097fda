"""Safetensors files written one tensor at a time, whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer import run
from trainer.checkpoint import set_aside
from trainer.errors import TrainingError
from trainer.models.weights import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}

Shape = tuple[int, ...]


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


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """As that of `trainer.run`; what is in the way is kept under a name with its date."""
    with run.unfinished(path) as temporary:
        yield temporary
        set_aside(path)


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor in `dtype`. Raises TrainingError when a value is not a number there."""
    made = tensor.to(dtype)
    if made.is_floating_point() and dtype.itemsize > 1 and not torch.isfinite(made).all():
        raise TrainingError(
            "not_a_number",
            f"{name} has values that are not numbers in {str(dtype).removeprefix('torch.')}.",
            "Lower the strength, or choose bf16 or float as the precision.",
        )
    return made
