"""How much one step computes: numbers that do not depend on how busy the machine is.

What a step may do is written down in tests/work_of_a_step.json. Where it is meant to do more,
`pytest tests/test_work.py --write-work` writes the new numbers there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_training import prepared
from trainer import bench, loop

WRITTEN_DOWN = Path(__file__).parent / "work_of_a_step.json"
MORE = 1.01
"""By how much a step's work may grow unnoticed."""
CASES = {
    "U-Net": {"unet_lr": 1e-4, "text_encoder_lr": 0},
    "U-Net and text encoder": {"unet_lr": 1e-4, "text_encoder_lr": 1e-4},
}


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


@dataclass
class Operators(TorchDispatchMode):
    """What is computed, by operator. `kernels`: calls that write something, which views of a tensor do not; `bytes`:
    what they write. `casts`: of the `frozen` weights, by where these are in memory.
    """

    frozen: set[int]
    calls: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    casts: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        name = operator.overloadpacket.__name__
        self.calls[name] += 1
        read = {tensor.untyped_storage()._cdata for tensor in tensors_in(arguments)}
        self.casts += operator is torch.ops.aten._to_copy.default and bool(read & self.frozen)
        answer = operator(*arguments, **(options or {}))
        slots = operator._schema.arguments
        given = [value for slot, value in zip(slots, arguments, strict=False) if slot.is_write]
        given += [options[slot.name] for slot in slots if slot.is_write and slot.name in (options or {})]
        written = [t for t in tensors_in(answer) if t.untyped_storage()._cdata not in read]
        written = [*tensors_in(given), *(written if not given else [])]
        if written and not name.startswith("empty"):
            self.kernels[name] += 1
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in written)
        return answer


def of_each(operators: Operators, operations: dict[str, int]) -> dict[str, list[int]]:
    """Each operator's kernels, bytes written, and operations."""
    names = sorted(operators.kernels | operations)
    return {name: [operators.kernels[name], operators.bytes[name], operations.get(name, 0)] for name in names}


def second_step(settings, folder, monkeypatch, *, optimizer: bool) -> tuple[Operators, dict[str, int], int]:
    """The operators of the second step, what they multiply and add, and the number of trained tensors.

    Convolutions and attention are as PyTorch has them, which is not so on every processor.
    """
    monkeypatch.setattr("trainer.prepare.arrange", lambda model: None)
    monkeypatch.setattr("trainer.attention.multiplies_bf16", lambda: False)
    session = prepared(settings | {"mixed_precision": "bf16"}, folder)
    session.network.attach()
    if not optimizer:
        session.optimizer.step = session.scheduler.step = lambda: None
    batches = session.feed.batches(range(2))
    loop.take_step(session, 1, batches)
    modules = (session.model.unet, *session.model.text_encoders.values())
    frozen = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    with bench._operations() as counter, Operators(frozen) as operators:
        loop.take_step(session, 2, batches)
    operations = {str(name).removeprefix("aten."): n for name, n in counter.get_flop_counts()["Global"].items()}
    return operators, operations, len(list(session.network.parameters()))


def grown(now: dict[str, list[int]], then: dict[str, list[int]]) -> str:
    """What grew and by which operators, in lines; empty where nothing did."""
    lines = []
    for place, what in enumerate(("kernels", "bytes written", "operations")):
        after, before = (Counter({name: row[place] for name, row in rows.items()}) for rows in (now, then))
        if after.total() > MORE * before.total():
            most = ", ".join(
                f"{name} {before[name]:,} → {after[name]:,}" for name, _ in (after - before).most_common(5)
            )
            lines.append(f"{what} {before.total():,} → {after.total():,}, most by {most}")
    return "\n".join(lines)


@pytest.mark.parametrize("case", CASES)
def test_a_step_does_no_more_than_is_written_down(settings, tmp_path, monkeypatch, request, case):
    operators, operations, _ = second_step(settings | CASES[case], tmp_path, monkeypatch, optimizer=True)
    now, every = of_each(operators, operations), json.loads(WRITTEN_DOWN.read_text(encoding="utf-8"))
    if request.config.getoption("--write-work"):
        text = json.dumps(every | {case: now}, indent=0).replace("[\n", "[").replace(",\n", ", ").replace("\n]", "]")
        WRITTEN_DOWN.write_text(text.replace("], ", "],\n") + "\n", encoding="utf-8")
        return
    more = grown(now, every[case])
    assert not more, f"A step of {case} does more than {WRITTEN_DOWN.name} says:\n{more}"


def test_a_step_waits_for_no_number_and_casts_no_frozen_weight(settings, tmp_path, monkeypatch):
    # An optimizer on a CPU counts its steps there, which nothing waits for.
    operators, _, trained = second_step(settings, tmp_path, monkeypatch, optimizer=False)
    assert operators.calls["_local_scalar_dense"] == 0, "each would make a GPU's step wait"
    assert operators.casts == 0
    # A trained weight is cast once on its way in, its gradient once on its way out.
    assert operators.calls["_to_copy"] <= 2 * trained + 12


def test_less_is_computed_where_the_text_encoder_is_not_trained():
    unet, both = json.loads(WRITTEN_DOWN.read_text(encoding="utf-8")).values()
    assert unet["native_layer_norm_backward"] < both["native_layer_norm_backward"]
    assert unet["_scaled_dot_product_flash_attention_for_cpu"] == both["_scaled_dot_product_flash_attention_for_cpu"]
