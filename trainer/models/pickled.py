"""PyTorch's checkpoint files (.ckpt, .pt), read as data: nothing that a pickle asks for is imported or called.

A checkpoint is a zip archive (torch.save, PyTorch ≥ 1.6): `*/data.pkl` holds the names, dtypes and shapes, a
record `*/data/KEY` each storage. The pickle is walked by an unpickler that knows tensors and dicts; whatever
else it names (training frameworks leave their own objects) becomes an empty stand-in. What a crafted file can
make this program hold is bounded by the file's own size and by `LARGEST_PICKLE`. Needs no torch.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import ModelError
from trainer.paths import shown
from trainer.tensorfile import BITS, Header, TensorInfo

ENDINGS = (".ckpt", ".pt")
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
LARGEST_PICKLE = 1 << 24  # bytes; a model's names and shapes take less than 1 MB
MOST_SIDES = 8
# Where the weights are when the file has more than them.
WRAPPERS = ("state_dict", "model", "module")


class Storage(NamedTuple):
    dtype: str
    key: str


class Tensor(NamedTuple):
    """A view on a storage: `offset` and `stride` in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("a tensor has no storage")
        return cls(storage, offset, tuple(shape), tuple(stride))


class _StandIn(dict):  # type: ignore[type-arg]
    """For every object that is no tensor: takes what the pickle gives it, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class _Reader(pickle.Unpickler):
    """Walks a pickle; every name in it leads to a class or function of this file.

    Functions are made anew for each name, since a pickle may set attributes of what it is given.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda *given: Tensor.of(*given)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        return _StandIn

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", str(dtype), str(key), *_):
                return Storage(dtype, key)
        raise pickle.UnpicklingError("a storage is of no known kind")


class Checkpoint:
    """An open checkpoint. Raises ModelError when it is damaged or of another format."""

    def __init__(self, path: Path) -> None:
        name = shown(path)
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError) as error:
            raise ModelError(
                f'"{name}" is cut off, or a checkpoint of PyTorch before 1.6, or none at all.',
                "Fetch it again; better still, its .safetensors version.",
            ) from error
        except OSError as error:
            raise ModelError(f'"{name}" cannot be read: {error.strerror}.') from error
        records = self._zip.namelist()
        pickles = [record for record in records if record.rsplit("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            self._zip.close()
            raise ModelError(f'"{name}" is a zip archive, but no PyTorch checkpoint.', "Name a .safetensors file.")
        self._root = pickles[0].removesuffix("data.pkl")
        try:
            _require_stored(self._zip, path.stat().st_size)
            content = _Reader(io.BytesIO(_modest(self._zip, pickles[0]))).load()
            self.tensors = dict(_weights(content))
            for tensor in self.tensors.values():
                _check(tensor, self.size_of(tensor.storage))
        except Exception as error:  # a damaged pickle or archive can fail in any way
            self._zip.close()
            raise ModelError(f'"{name}" is damaged ({error}).', "Fetch the file again.") from error
        self.header = Header({}, {n: TensorInfo(t.storage.dtype, t.shape) for n, t in self.tensors.items()})

    def size_of(self, storage: Storage) -> int:
        """In bytes."""
        return self._zip.getinfo(f"{self._root}data/{storage.key}").file_size

    def read_into(self, buffer: memoryview, storage: Storage) -> None:
        """Fill a buffer of `size_of(storage)` bytes. Raises ModelError where the content is not what was written."""
        done = 0
        try:
            with self._zip.open(f"{self._root}data/{storage.key}") as file:
                while piece := file.read(1 << 22):
                    buffer[done : done + len(piece)] = piece
                    done += len(piece)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ModelError(f'"{shown(self.path)}" is damaged ({error}).', "Fetch the file again.") from error

    def close(self) -> None:
        self._zip.close()


def header(path: Path) -> Header:
    """What tensors a checkpoint holds. Raises ModelError as `Checkpoint` does."""
    with closing(Checkpoint(path)) as checkpoint:
        return checkpoint.header


def _require_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raises ValueError where records are packed, overlap or claim more than the file's `size` in bytes."""
    records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, as PyTorch never writes them")
    if sum(record.file_size for record in records) > size:
        raise ValueError("its records are larger than the file")


def _modest(archive: zipfile.ZipFile, name: str) -> bytes:
    """The pickle. Raises ValueError where it, or what it asks to be remembered, would fill the memory."""
    if archive.getinfo(name).file_size > LARGEST_PICKLE:
        raise ValueError(f"its table of tensors is larger than {LARGEST_PICKLE >> 20} MB")
    content = archive.read(name)
    for operation, argument, _ in pickletools.genops(content):
        # The reader's memory has a place for every number up to the largest.
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError("it numbers what it remembers too highly")
    return content


def _weights(content: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint by name, from the innermost of its usual wrappers."""
    for _ in WRAPPERS:  # one in the other at most, and never itself
        if isinstance(content, Mapping):
            inner = (content.get(name) for name in WRAPPERS)
            content = next((one for one in inner if one and isinstance(one, Mapping)), content)
    if not isinstance(content, Mapping):
        raise pickle.UnpicklingError("it holds no table of tensors")
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield name, value


def _check(tensor: Tensor, size: int) -> None:
    """Raises ValueError where a tensor reaches beyond its storage of `size` bytes, holds more, or is none."""
    numbers = (tensor.offset, *tensor.shape, *tensor.stride)
    if (
        not len(tensor.shape) == len(tensor.stride) <= MOST_SIDES
        or not all(type(n) is int and 0 <= n < 2**48 for n in numbers)
        or math.prod(tensor.shape) * BITS[tensor.storage.dtype] > 8 * size
    ):
        raise ValueError("a tensor has an impossible shape")
    last = tensor.offset + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride, strict=True))
    if math.prod(tensor.shape) and (last + 1) * BITS[tensor.storage.dtype] > 8 * size:
        raise ValueError("a tensor is cut off")
