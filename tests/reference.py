"""The formula behind tests/data/reference: values that depend on a name and a shape alone."""

from __future__ import annotations

import json
import math
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent / "data" / "reference"
TABLE_LENGTH = 1_000_003


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@lru_cache
def table() -> torch.Tensor:
    """Uniform values in −1…1, float32 [1000003] (splitmix64)."""
    z = np.arange(1, TABLE_LENGTH + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1))


def uniform(name: str, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    count, start = math.prod(shape), zlib.crc32(name.encode()) % TABLE_LENGTH
    return table().repeat((start + count) // TABLE_LENGTH + 1)[start : start + count].reshape(shape)


def normal(name: str, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """Of unit variance, if not normal."""
    return math.sqrt(3) * uniform(name, shape)


def weight(name: str, shape: torch.Size) -> torch.Tensor:
    """A model's parameter."""
    if len(shape) == 1:
        return (1.0 if name.endswith("weight") else 0.0) + 0.1 * uniform(name, shape)
    if name.endswith(("token_embedding.weight", "position_embedding.weight")):
        return 0.05 * uniform(name, shape)
    return lora_weight(name, shape)


def lora_weight(name: str, shape: torch.Size) -> torch.Tensor:
    return math.sqrt(3 / math.prod(shape[1:])) * uniform(name, shape)


def expanded(row: list[Any]) -> list[Any]:
    """[id, n] stands for n times the id."""
    return [value for item in row for value in ([item[0]] * item[1] if isinstance(item, list) else [item])]


def assert_tensor(found: torch.Tensor, expected: dict[str, Any], tolerance: float) -> None:
    """Compare with the listed values, mean and deviation; `tolerance` is relative to the deviation."""
    flat = found.detach().float().flatten()
    atol = tolerance * expected["std"]
    torch.testing.assert_close(flat[expected["at"]], torch.tensor(expected["values"]), rtol=0, atol=atol)
    torch.testing.assert_close(flat.std(correction=0), torch.tensor(expected["std"]), rtol=0, atol=atol)
    torch.testing.assert_close(flat.mean(), torch.tensor(expected["mean"]), rtol=0, atol=atol)
