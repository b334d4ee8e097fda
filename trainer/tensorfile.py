"""The header of a .safetensors file, read without torch.

Layout (https://huggingface.co/docs/safetensors): 8 bytes with the header's length N, N bytes of
JSON {name: {dtype, shape, data_offsets}}, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ModelError
from trainer.paths import shown

LARGEST_HEADER = 100_000_000  # bytes; the format's own limit

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "C64": 64,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}

_OTHER_FORMATS = (
    (b"PK\x03\x04", "a PyTorch checkpoint (.ckpt, .pt, .bin) or another zip archive"),
    (b"\x80\x02", "an old PyTorch checkpoint (a pickle)"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"GGUF", "a GGUF file, made for running models, not for training"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"RIFF", "a picture (WebP) or sound"),
)


@dataclass(frozen=True)
class TensorInfo:
    """`begin`: where its bytes begin, counted from those of the first tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """What a file says about itself: free text by name, and its tensors."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    data_begin: int = 0  # the byte of the file at which the first tensor begins


def header(path: Path) -> Header:
    """Read and check a file's header; the tensors themselves are not read.

    Raises ModelError when the file is missing, damaged, or of another format, which it names.
    """
    name = shown(path)
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise ModelError(f'"{name}" is a folder, not a file.', "Name the .safetensors file inside it.")
        if not stat.S_ISREG(info.st_mode):
            raise ModelError(f'"{name}" is not a regular file.', "Name a .safetensors file.")
        with path.open("rb") as file:
            start = file.read(512)
            # The JSON's first byte. The length before it can look like any other format's mark.
            if start[8:9] != b"{":
                raise _other_format(name, info.st_size, start)
            (length,) = struct.unpack("<Q", start[:8])
            if length > LARGEST_HEADER:
                raise _not_safetensors(name)
            if 8 + length > info.st_size:
                raise _truncated(name, info.st_size)
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError as error:
        raise ModelError(f'There is no file "{name}".', "Correct the path.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f'"{name}" cannot be read: {getattr(error, "strerror", None) or error}.') from error
    return _parse(name, text, info.st_size - 8 - length, 8 + length)


def _parse(name: str, text: bytes, data_size: int, data_begin: int) -> Header:
    try:
        entries = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(name) from error
    if not isinstance(entries, dict):
        raise _not_safetensors(name)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(name, "its metadata is not text")
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for key, entry in entries.items():
        tensor, span = _tensor(name, key, entry)
        tensors[key] = tensor
        spans.append(span)
    end_before = 0
    for begin, end in sorted(spans):
        if begin != end_before:
            raise _damaged(name, "its tensors overlap or leave gaps")
        end_before = end
    if end_before > data_size:
        raise _truncated(name, data_size, end_before)
    if end_before < data_size:
        raise _damaged(name, f"{data_size - end_before} bytes follow its last tensor")
    return Header(metadata, tensors, data_begin)


def _tensor(name: str, key: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _damaged(name, f'tensor "{key}" lacks its dtype, shape or place')
    if dtype not in BITS:
        raise _damaged(name, f'tensor "{key}" has the unknown dtype "{dtype}"')
    if len(shape) > 16 or not all(type(side) is int and 0 <= side < 2**48 for side in shape):
        raise _damaged(name, f'tensor "{key}" has an impossible shape')
    if not 0 <= begin <= end or (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise _damaged(name, f'tensor "{key}" of shape {shape} cannot take {end - begin} bytes')
    return TensorInfo(dtype, tuple(shape), begin), (begin, end)


def _other_format(name: str, size: int, start: bytes) -> ModelError:
    """What a file is that does not begin as a .safetensors file does."""
    if size == 0:
        return ModelError(f'"{name}" is empty.', "Its download or copy failed; fetch it again.")
    if start.startswith(b"version https://git-lfs"):
        return ModelError(
            f'"{name}" is a git-lfs pointer of {size} bytes, not the file itself.',
            'Run "git lfs pull" in its folder, or download the file itself.',
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return ModelError(
            f'"{name}" is a web page, not a model.',
            "The download gave a page (a log-in or an error) instead of the file; fetch it again.",
        )
    for magic, what in _OTHER_FORMATS:
        if start.startswith(magic):
            return ModelError(f'"{name}" is {what}, not a .safetensors file.', "Name a .safetensors file.")
    return _not_safetensors(name)


def _not_safetensors(name: str) -> ModelError:
    said = ", whatever its name says" if name.endswith(".safetensors") else ""
    return ModelError(f'"{name}" is not a .safetensors file{said}.', "Name a .safetensors file.")


def _damaged(name: str, why: str) -> ModelError:
    return ModelError(f'"{name}" is damaged: {why}.', "Fetch the file again.")


def _truncated(name: str, there: int, wanted: int | None = None) -> ModelError:
    of = f" of {wanted:,}" if wanted is not None else ""
    return ModelError(
        f'"{name}" is cut off: it holds {there:,}{of} bytes.', "Its download or copy broke off; fetch it again."
    )
