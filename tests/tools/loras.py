"""Small random LoRA files of the tiny model, and what they mean, computed with numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# A layer of each kind of the tiny model (tests/tiny.py) → its weight in the original layout, and its shape.
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PROJ_IN = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_1_mlp_fc1"
LAYERS = {
    TO_Q: ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", (32, 32)),
    PROJ_IN: ("model.diffusion_model.input_blocks.1.1.proj_in.weight", (32, 32, 1, 1)),
    CONV: ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", (32, 32, 3, 3)),
    TEXT: ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight", (64, 32)),
}


def write(
    path: Path,
    rank: int = 4,
    alpha: float = 2.0,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A LoRA of up and down matrices on every layer of LAYERS."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (_, shape) in LAYERS.items():
        ones = [1] * (len(shape) - 2)
        tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *ones, generator=generator)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path, dict(metadata or {}))
    return path


def delta(path: Path, name: str) -> np.ndarray:
    """ΔW [out, in·k·k] of a layer: alpha / rank · up · down; zeros where the file lacks it."""
    tensors = {key: tensor.double().numpy() for key, tensor in load_file(path).items()}
    if f"{name}.lora_up.weight" not in tensors:
        return np.zeros((1, 1))
    up = tensors[f"{name}.lora_up.weight"].reshape(len(tensors[f"{name}.lora_up.weight"]), -1)
    down = tensors[f"{name}.lora_down.weight"].reshape(up.shape[1], -1)
    return up @ down * float(tensors[f"{name}.alpha"]) / up.shape[1]


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of a rank (Eckart and Young 1936)."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def run(capsys, *words: object) -> tuple[int, str]:
    """The command line in this process: its exit code and what it printed."""
    from trainer.__main__ import main

    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err
