"""The tensors of a LoRA file of any naming, under kohya's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from trainer.errors import ModelError
from trainer.lora.recognise import Lora, recognise
from trainer.paths import shown


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file: what it is (`about`) and its `tensors` under kohya's names, in the dtypes of the file.

    Every layer has its alpha, also where the file kept it elsewhere or left it to a convention.
    """

    about: Lora
    tensors: Mapping[str, torch.Tensor]

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.about.metadata


def read(path: Path | str) -> LoraFile:
    """Read a LoRA file of kohya's, diffusers', PEFT's or cloneofsimo's naming.

    Raises ModelError with the reason and what to do when it is none, malformed or damaged.
    """
    about = recognise(path)
    try:
        with safe_open(about.path, framework="pt") as file:
            tensors = {ours: file.get_tensor(name) for name, ours in about.names.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f'"{shown(about.path)}" cannot be read ({error}).', "Fetch the file again.") from error
    for name, alpha in about.alphas.items():
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=next(iter(tensors.values())).dtype)
    for name, tensor in tensors.items():
        if name.endswith(".dora_scale") and tensor.ndim == 1:  # PEFT's: one length an output
            ndim = tensors[name.replace("dora_scale", "lora_down.weight")].ndim
            tensors[name] = tensor.reshape(-1, *[1] * (ndim - 1))
    return LoraFile(about, tensors)
