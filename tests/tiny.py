"""A base model of SD 1.x's architecture, tiny and random, as one file in the original layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.models import layout

CONFIGS = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    },
    "vae": {
        "block_out_channels": [32, 32, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 64,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": 32,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
    },
}


def modules(seed: int = 0) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    torch.manual_seed(seed)
    return (
        UNet2DConditionModel(**CONFIGS["unet"]),
        AutoencoderKL(**CONFIGS["vae"]),
        CLIPTextModel(CLIPTextConfig(**CONFIGS["text_encoder"])),
    )


def write(path: Path, seed: int = 0) -> Path:
    """Write the model as one .safetensors file in the original layout."""
    unet, vae, text_encoder = modules(seed)
    tensors = layout.to_original(unet.state_dict(), vae.state_dict(), text_encoder.state_dict(), CONFIGS)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"config": json.dumps(CONFIGS)})
    return path
