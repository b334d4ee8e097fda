"""Weights from files into modules: mapped, in the wanted dtype, with no random start and no second copy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open

from trainer.errors import ModelError


def build(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Make a module whose parameters take no memory yet; its buffers are real."""
    with init_empty_weights(include_buffers=False):
        return make()


def fill(
    module: torch.nn.Module, names: Mapping[str, str], file: Any, dtype: torch.dtype, device: torch.device, path: Path
) -> None:
    """Give an empty module its weights from an open safetensors file.

    `names` maps the file's tensor names to the module's. A tensor of the same content in another
    shape (1×1 convolutions of the original layout that are linear in diffusers) is reshaped.
    Raises ModelError naming what is missing or misshapen.
    """
    present = set(file.keys())
    wanted = dict(module.named_parameters())
    missing = [name for name in names if name not in present]
    if missing:
        raise ModelError(
            f'"{path}" lacks {len(missing)} tensors of the model, the first is {missing[0]}.',
            "The file is damaged or of another kind; download it again or choose another base model.",
        )
    state = {}
    for theirs, ours in names.items():
        tensor = file.get_tensor(theirs)
        shape = wanted[ours].shape
        if tensor.numel() != shape.numel():
            raise ModelError(
                f'"{path}": {theirs} has the shape {list(tensor.shape)}, the model needs {list(shape)}.',
                "The file is of another model family than its names say; choose another base model.",
            )
        state[ours] = tensor.reshape(shape).to(device, dtype)
    module.load_state_dict(state, strict=False, assign=True)


def fill_from_folder(module: torch.nn.Module, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Give an empty module its weights from a diffusers component folder, sharded or not."""
    shards = _shards(folder)
    wanted = dict(module.named_parameters())
    state = {}
    with ExitStack() as stack:
        for shard in shards:
            file = stack.enter_context(safe_open(shard, framework="pt"))
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                ours = name if name in wanted else name.removeprefix("text_model.")
                if ours in wanted:
                    state[ours] = file.get_tensor(name).to(device, dtype)
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise ModelError(
            f'"{folder}" lacks {len(missing)} tensors of the model, the first is {missing[0]}.',
            "The folder is incomplete; download the model again.",
        )
    module.load_state_dict(state, strict=False, assign=True)


def _shards(folder: Path) -> list[Path]:
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            single = folder / f"{stem}{variant}.safetensors"
            if single.exists():
                return [single]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise ModelError(
        f'"{folder}" holds no .safetensors weights.',
        "Save the model with safetensors (diffusers: save_pretrained) or choose another.",
    )
