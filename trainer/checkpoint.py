"""Writing and reading LoRA files."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save

from trainer.errors import TrainingError
from trainer.networks import Network
from trainer.run import write_whole

T = TypeVar("T")
DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LEGACY_HASH_START, LEGACY_HASH_LENGTH = 0x100000, 0x10000


def file_name(name: str, *, epoch: int | None = None, step: int | None = None) -> str:
    """Kohya's names: NAME-000002 after an epoch, NAME-step00000200 after a step, NAME at the end."""
    if epoch is not None:
        return f"{name}-{epoch:06d}.safetensors"
    if step is not None:
        return f"{name}-step{step:08d}.safetensors"
    return f"{name}.safetensors"


def save_lora(path: Path, network: Network, precision: str, metadata: Mapping[str, str]) -> None:
    """Write the network's tensors and what describes them; whole or not at all.

    Raises TrainingError when a weight is not a number (nothing is written then) or the disk is full.
    """
    tensors = as_stored(network.tensors(), DTYPES[precision])
    sound(tensors, path.name)
    data = save(tensors, {**metadata, **hashes(tensors, metadata)})
    on_disk(path, lambda path: write_whole(path, data))


def as_stored(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in a file's number format, in main memory.

    An alpha that this cannot say stays in float32: LoKr's of whole matrices is the rank, often 100,000, and fp16 ends
    at 65,504.
    """
    found = {}
    for name, tensor in tensors.items():
        cast = tensor.to("cpu", dtype)
        keeps = name.endswith(".alpha") and not torch.equal(cast.float(), tensor.cpu().float())
        found[name] = (tensor.cpu().float() if keeps else cast).contiguous()
    return found


def sound(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise TrainingError when a value is not a number, before a file or folder `name` is written of them."""
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise TrainingError(
            "not_a_number",
            f"{len(bad)} of {len(tensors)} tensors of the LoRA are not numbers any more (the first: {bad[0]}), "
            f'so "{name}" was not written.',
            "Lower the learning rate, or set Mixed precision to bf16 or no; then start from the last good file.",
        )


def on_disk(path: Path, write: Callable[[Path], T]) -> T:
    """Call `write(path)` with its folder there. Raises TrainingError when the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write(path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise TrainingError(
            "disk_full",
            f'There is no room on the disk for "{path}".',
            "Free some space, or choose another place to write to: for a training, Output folder (output_dir).",
        ) from error


def hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The two digests by which web UIs know a LoRA.

    Both are taken of the file as it would be with its ss_ entries alone, since titles and the like
    may be edited later: of everything behind the header, and of 64 kB at 1 MB (the old one).
    """
    data = save(dict(tensors), {k: v for k, v in metadata.items() if k.startswith("ss_")})
    header = 8 + int.from_bytes(data[:8], "little")
    legacy = data[LEGACY_HASH_START : LEGACY_HASH_START + LEGACY_HASH_LENGTH]
    return {
        "sshs_model_hash": hashlib.sha256(data[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }
