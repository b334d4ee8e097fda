"""A device of its own without one: what a training leaves in the wrong memory fails here as it would on a GPU.

Tensors on `card` are computed by the CPU, but an operator that is given some there and some here is refused, as CUDA
does, and whatever the host waits for is counted. It stands on PyTorch's interface for devices written in Python
(`torch.utils.backend_registration`). `pytest -p tests.card` runs any test with it; a process keeps it until its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "card"
aten = torch.ops.aten
HERE = torch.device("cpu")
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""What finds places on the card also by indices from the main memory, as CUDA does."""
waits: Counter[str] = Counter()
"""How often the host had to wait for the card, and by which operator."""
_kept: list[Any] = []


class OnCard(torch.Tensor):
    """A tensor that says that it is on the card; `inside` holds its numbers."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            layout=inside.layout,
            device=torch.device(NAME, 0),
        )
        made.inside = inside
        return made

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            # Which kernel it takes is settled in C++, which knows none for this device.
            function = _attend
        elif function is torch.Tensor.tolist:
            return arguments[0].cpu().tolist()
        elif function == torch.Tensor.data.__set__:
            arguments[0].inside = arguments[1].inside
        elif function is torch.Tensor.numpy:
            raise TypeError(f"a tensor on the {NAME} has no NumPy array; copy it with .cpu() first")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(options or {}))

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), options=None):
        return compute(operator, arguments, options or {})

    def __repr__(self) -> str:
        return f"OnCard({self.inside!r})"


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    answer, _ = aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return answer


def compute(operator: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """An operator's answer, computed here and held there."""
    if (asked := options.get("device")) is not None:
        target = torch.device(asked)
        options = options | {"device": HERE if target.type == NAME else target}
        there = target.type == NAME
    else:
        there = True
    leaves = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    held = {id(leaf.inside): leaf for leaf in leaves if isinstance(leaf, OnCard)}
    strangers = [leaf for leaf in leaves if not isinstance(leaf, OnCard) and (leaf.dim() or leaf.device != HERE)]
    moves = operator is aten.copy_.default or (operator in INDEXING and isinstance(arguments[0], OnCard))
    if strangers and held and not moves:
        sizes = ", ".join(str(list(leaf.shape)) for leaf in strangers)
        raise RuntimeError(f"{operator}: expected all tensors on one device, but {sizes} is not on the {NAME}")
    crosses = _crosses(operator, arguments, there) and not _behind(arguments, options)
    if crosses or _is_read(operator, leaves) or (strangers and operator in INDEXING):
        waits[operator.overloadpacket.__name__] += 1

    def inner(value: Any) -> Any:
        return value.inside if isinstance(value, OnCard) else value

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not there:
            return value
        known = held.get(id(value))
        return OnCard(value) if known is None else known

    answer = operator(*tree_map(inner, arguments), **tree_map(inner, options))
    return arguments[0] if operator is aten.copy_.default else tree_map(outer, answer)


def _crosses(operator: Any, arguments: Any, there: bool) -> bool:
    """Whether it takes numbers from one memory to the other."""
    if operator is aten.copy_.default:
        return isinstance(arguments[0], OnCard) != isinstance(arguments[1], OnCard)
    return operator is aten._to_copy.default and isinstance(arguments[0], OnCard) != there


def _is_read(operator: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether the host must know numbers on the card, for an answer or for an answer's shape."""
    by_mask = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    shaped = by_mask if operator in INDEXING else torch.Tag.dynamic_output_shape in operator.tags
    return torch.Tag.data_dependent_output in operator.tags or shaped


def _behind(arguments: Any, options: dict[str, Any]) -> bool:
    """Whether the host goes on before the numbers have come."""
    return bool(options.get("non_blocking") or (len(arguments) > 2 and arguments[2]))


def _factories() -> list[tuple[str, Any]]:
    """The operators that make a tensor on a device from none."""
    found = []
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        packet, _, overload = name.partition(".")
        if space != "aten" or packet in ("_pin_memory", "pin_memory", "is_pinned"):
            continue
        try:
            operator = getattr(getattr(aten, packet), overload or "default")
        except (AttributeError, RuntimeError):
            continue
        slots = operator._schema.arguments
        makes = len(operator._schema.returns) == 1 and "Tensor" in str(operator._schema.returns[0].type)
        if makes and any(s.name == "device" for s in slots) and not any("Tensor" in str(s.type) for s in slots):
            found.append((name, operator))
    return found


def _copy_from(source: torch.Tensor, into: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return compute(aten.copy_.default, (into, source, non_blocking), {})


class _Module:
    """What PyTorch asks of `torch.card`."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        waits["synchronize"] += 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def pytest_configure() -> None:
    insert()


def inserted() -> bool:
    return bool(_kept)


def insert() -> torch.device:
    """Make the card known to PyTorch in this process, and the device that accelerate chooses."""
    if not _kept:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        library = torch.library.Library("aten", "IMPL")

        def kernel(operator: Any) -> Callable[..., Any]:
            return lambda *arguments, **options: compute(operator, arguments, {"device": NAME} | options)

        for name, operator in _factories():
            library.impl(name, kernel(operator), "PrivateUse1")
        library.impl("_copy_from", _copy_from, "PrivateUse1")
        _kept.append(library)
        from accelerate.state import PartialState

        # An error in a thread of autograd's own would end the process without a word.
        torch.autograd.set_multithreading_enabled(False)
        PartialState.default_device = property(lambda self: torch.device(NAME, 0))
    return torch.device(NAME, 0)
