"""LoRA files of every naming, most written by the programs that the naming comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"

# What the names of SDXL's U-Net depend on.
SDXL_UNET = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
}


def pair(
    name: str, rank: int = 4, wide: int = 768, out: int = 320, alpha: float | None = 2.0
) -> dict[str, torch.Tensor]:
    """Up, down and alpha of one layer."""
    tensors = {f"{name}.lora_down.weight": torch.randn(rank, wide), f"{name}.lora_up.weight": torch.randn(out, rank)}
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}


def plain() -> dict[str, torch.Tensor]:
    """A small LoRA for SD 1.x: one layer of each part."""
    torch.manual_seed(0)
    return pair(KOHYA) | pair(TEXT, out=768)


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Write tensors and metadata as a file."""

    def write(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, name: str = "lora") -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata)
        return path

    return write


def adapted_unet(alpha: int, pattern: dict[str, int] | None = None, dora: bool = False):
    """A tiny U-Net of diffusers with PEFT's LoRA in its attentions and one convolution, up matrices not zero."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    from tests import tiny

    torch.manual_seed(1)
    unet = UNet2DConditionModel(**tiny.CONFIGS["unet"])
    targets = ["to_q", "to_out.0", "conv1"]
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, alpha_pattern=pattern or {}, use_dora=dora)
    )
    with torch.no_grad():
        for name, tensor in unet.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.1)
    return unet


def delta(module) -> torch.Tensor:
    """The ΔW that PEFT adds to a layer."""
    return module.get_delta_weight(next(iter(module.lora_A))).detach()


def cloneofsimo() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file of his text encoder part: two layers of CLIPAttention, scales in the up matrices."""
    torch.manual_seed(2)
    tensors, metadata = {}, {"text_encoder": json.dumps(["CLIPAttention"])}
    for i in range(8):
        tensors |= {f"text_encoder:{i}:up": torch.randn(768, 4), f"text_encoder:{i}:down": torch.randn(4, 768)}
        metadata[f"text_encoder:{i}:rank"] = "4"
    return tensors, metadata
