"""The tensors of a LoRA file of any naming, under kohya's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from trainer.errors import ModelError
from trainer.lora.recognise import ALPHA, DOWN, Lora, recognise
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


def read(path: Path | str, missing_alpha: Literal["", "rank"] = "") -> LoraFile:
    """Read a LoRA file of kohya's, diffusers', PEFT's or cloneofsimo's naming.

    `missing_alpha` "rank": take the rank for an alpha that a file of kohya's naming lacks. Raises
    ModelError with the reason and what to do when it is none, malformed or damaged.
    """
    about = recognise(path, missing_alpha)
    try:
        with safe_open(about.path, framework="pt") as file:
            tensors = {ours: _lengths_by_row(name, file.get_tensor(name)) for name, ours in about.names.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f'"{shown(about.path)}" cannot be read ({error}).', "Fetch the file again.") from error
    for name, alpha in about.alphas.items():
        exact = torch.tensor(alpha)
        like = exact.to(tensors[f"{name}.{DOWN}"].dtype)
        tensors[f"{name}.{ALPHA}"] = like if float(like) == float(exact) else exact
    return LoraFile(about, tensors)


def _lengths_by_row(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """PEFT's lengths of DoRA, [out] or [1, out, 1, 1], as kohya's: [out, 1] or [out, 1, 1, 1]. Others as they are."""
    if "lora_magnitude_vector" not in name:
        return tensor
    return tensor.reshape(-1, *[1] * max(1, tensor.ndim - 1))
