"""Weights from files into modules: tensor by tensor, in the wanted dtype, with no random start and no second copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights

from trainer.errors import ModelError
from trainer.models import layout, pickled
from trainer.models.families import weight_files
from trainer.paths import shown
from trainer.tensorfile import header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,  # positions of tokens, which some files list
    "I32": torch.int32,
}


THREADS = 2
"""One waits for the file while another copies; more take more memory, and hardly less time."""

Coming = Iterator[tuple[str, dict[str, torch.Tensor]]]
"""Tensors that are being read: the file's name of one, and what becomes of it by the module's names."""
ComingFromFolder = Iterator[tuple[str, torch.Tensor | ModelError]]
"""The same by the module's own names, or why one cannot be had."""


class _Buffer(threading.local):
    """Where one tensor after the other is read before it is copied to stay; each thread has its own.

    Freed one by one between those that stay, such tensors leave holes that nothing fits in: loading then
    takes 1.4 times the weights.
    """

    def __init__(self) -> None:
        self._content = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> torch.Tensor:
        if len(self._content) < size:
            self._content = torch.empty(size, dtype=torch.uint8)
        return self._content[:size]


class Safetensors:
    """A .safetensors file that is read, not mapped: pages of a mapped file count as this process's memory."""

    def __init__(self, path: Path, buffer: _Buffer | None = None) -> None:
        self.header = header(path)
        self._path, self._file, self._buffer = path, path.open("rb"), buffer or _Buffer()
        self._alone = threading.Lock()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.look(name).clone()

    def look(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, until this thread's next look."""
        info = self.header.tensors[name]
        content = self._buffer.of(info.size)
        with self._alone:
            self._file.seek(self.header.data_begin + info.begin)
            read = self._file.readinto(memoryview(content.numpy()))
        if read != info.size:
            raise ModelError(f'"{shown(self._path)}" ends within {name}.', "Fetch the file again.")
        return content.view(dtype_of(self._path, name, info.dtype)).view(info.shape)

    def close(self) -> None:
        self._file.close()


class Pickled:
    """A PyTorch checkpoint, read storage by storage."""

    def __init__(self, path: Path, buffer: _Buffer | None = None) -> None:
        self._file, self._path, self._buffer = pickled.Checkpoint(path), path, buffer or _Buffer()
        self.header = self._file.header

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.look(name).clone()

    def look(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, until this thread's next look."""
        tensor = self._file.tensors[name]
        content = self._buffer.of(self._file.size_of(tensor.storage))
        self._file.read_into(memoryview(content.numpy()), tensor.storage)
        whole = content.view(dtype_of(self._path, name, tensor.storage.dtype))
        return whole.as_strided(tensor.shape, tensor.stride, tensor.offset)

    def close(self) -> None:
        self._file.close()


def opened(path: Path, buffer: _Buffer | None = None) -> closing[Safetensors] | closing[Pickled]:
    """A file of tensors, open inside a with block. Only one called .ckpt or .pt is read as PyTorch's checkpoint.

    `buffer`: one that several files share.
    """
    if path.suffix.lower() in pickled.ENDINGS:
        return closing(Pickled(path, buffer))
    return closing(Safetensors(path, buffer))


def dtype_of(path: Path, name: str, code: str) -> torch.dtype:
    """The dtype by safetensors' name for it. Raises ModelError for one that no weight can be."""
    if code not in DTYPES:
        raise ModelError(
            f'"{shown(path)}": {name} is stored as {code}, which no weight can be.',
            "The file is quantised for another program; choose the fp16 or fp32 version.",
        )
    return DTYPES[code]


def build(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Make a module whose parameters take no memory yet; its buffers are real."""
    with init_empty_weights(include_buffers=False):
        return make()


@dataclass(frozen=True)
class Readers:
    """Threads that read weights."""

    pool: Executor = field(default_factory=lambda: ThreadPoolExecutor(THREADS))
    buffer: _Buffer = field(default_factory=_Buffer)


@contextmanager
def reading() -> Iterator[Readers]:
    """Threads that read weights; what they have not begun when something goes wrong is left."""
    readers = Readers()
    try:
        yield readers
    finally:
        readers.pool.shutdown(cancel_futures=True)


def read(
    names: layout.Names,
    file: Safetensors | Pickled,
    dtype: torch.dtype,
    device: torch.device,
    path: Path,
    readers: Readers,
) -> Coming:
    """Begin to read a module's weights from an open file, to stay on `device`; `give` takes them.

    `names` maps the file's tensor names to the module's. Raises ModelError naming what is missing.
    """
    missing = [name for name in names if name not in file.header.tensors]
    if missing:
        raise ModelError(
            f'"{shown(path)}" lacks {len(missing)} tensors of the model, the first is {missing[0]}.',
            "The file is damaged or of another kind; download it again or choose another base model.",
        )

    def kept(theirs: str) -> dict[str, torch.Tensor]:
        found = layout.taken(theirs, file.look(theirs), names[theirs])
        return {name: _kept(tensor, dtype, device) for name, tensor in found}

    return zip(names, readers.pool.map(kept, names), strict=True)


def give(module: torch.nn.Module, coming: Coming, path: Path) -> None:
    """Give an empty module its weights. Raises ModelError naming what is misshapen.

    A tensor of the same content in another shape (1×1 convolutions of the original layout that are linear in
    diffusers) is reshaped.
    """
    wanted = dict(module.named_parameters())
    state = {}
    for theirs, found in coming:
        for name, tensor in found.items():
            state[name] = _fitting(tensor, wanted[name].shape, theirs, path)
    module.load_state_dict(state, strict=False, assign=True)


def _fitting(tensor: torch.Tensor, shape: torch.Size, theirs: str, path: Path) -> torch.Tensor:
    if tensor.numel() != shape.numel():
        raise ModelError(
            f'"{shown(path)}": {theirs} has the shape {list(tensor.shape)}, the model needs {list(shape)}.',
            "The file is of another model family than its names say; choose another base model.",
        )
    return tensor.reshape(shape)


def fill(
    module: torch.nn.Module,
    names: layout.Names,
    file: Safetensors | Pickled,
    dtype: torch.dtype,
    device: torch.device,
    path: Path,
) -> None:
    """Read an empty module's weights from an open file and give it them."""
    with reading() as readers:
        give(module, read(names, file, dtype, device, path, readers), path)


def _kept(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A copy to stay; convolutions' weights channels last, in which order they compute fastest."""
    order = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    return tensor.to(device, dtype, memory_format=order, copy=True)


def read_folder(
    folder: Path, dtype: torch.dtype, device: torch.device, readers: Readers, files: ExitStack
) -> list[ComingFromFolder]:
    """Begin to read all weights of a diffusers component folder, sharded or not; the shards are closed with `files`."""

    def read_shard(file: Safetensors | Pickled) -> ComingFromFolder:
        def kept(name: str) -> torch.Tensor | ModelError:
            try:
                return _kept(file.look(name), dtype, device)
            except ModelError as error:  # which matters only where the module has such a weight
                return error

        names = list(file.header.tensors)
        return zip(names, readers.pool.map(kept, names), strict=True)

    return [read_shard(files.enter_context(opened(shard, readers.buffer))) for shard in weight_files(folder)]


def give_from_folder(module: torch.nn.Module, coming: Iterable[ComingFromFolder], folder: Path) -> None:
    """Give an empty module its weights from its folder. Raises ModelError naming what is missing or misshapen."""
    wanted = dict(module.named_parameters())
    state = {}
    for shard in coming:
        for name, tensor in shard:
            ours = name if name in wanted else name.removeprefix("text_model.")
            if ours not in wanted:
                continue
            if isinstance(tensor, ModelError):
                raise tensor
            state[ours] = _fitting(tensor, wanted[ours].shape, name, folder)
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise ModelError(
            f'"{shown(folder)}" lacks {len(missing)} tensors of the model, the first is {missing[0]}.',
            "The folder is incomplete; download the model again.",
        )
    module.load_state_dict(state, strict=False, assign=True)
