"""Base models of each family's architecture, tiny and random, as one file in the original layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.models import layout
from trainer.models.facts import FAMILIES, PREDICTIONS

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


OPEN_CLIP = {**CONFIGS["text_encoder"], "hidden_act": "gelu"}
SD2_CONFIGS = {
    **CONFIGS,
    "unet": {**CONFIGS["unet"], "attention_head_dim": [4, 8], "use_linear_projection": True},
    "text_encoder": OPEN_CLIP,
}
# As many levels, resnets and attentions as SDXL, so that the layers have its names and blocks.
SDXL_CONFIGS = {
    **CONFIGS,
    "unet": {
        "sample_size": 8,
        "block_out_channels": [32, 32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 32 + 48,
        "attention_head_dim": [4, 4, 8],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    "vae": {**CONFIGS["vae"], "scaling_factor": 0.13025},
    "text_encoder_2": {**OPEN_CLIP, "hidden_size": 48, "projection_dim": 24},
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
    return _write(path, "sd1", dict(zip(("unet", "vae", "text_encoder"), modules(seed), strict=True)), CONFIGS)


def sd2_modules(seed: int = 0) -> dict[str, torch.nn.Module]:
    """The parts of a model of SD 2.x's architecture, by diffusers' names."""
    torch.manual_seed(seed)
    return {
        "unet": UNet2DConditionModel(**SD2_CONFIGS["unet"]),
        "vae": AutoencoderKL(**SD2_CONFIGS["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**SD2_CONFIGS["text_encoder"])),
    }


def write_sd2(path: Path, seed: int = 0, prediction: str = "v_prediction") -> Path:
    """The same for SD 2.x. `prediction` is what the file says of itself; "": nothing."""
    return _write(path, "sd2", sd2_modules(seed), SD2_CONFIGS, prediction)


def sdxl_modules(seed: int = 0) -> dict[str, torch.nn.Module]:
    """The parts of a model of SDXL's architecture, by diffusers' names."""
    torch.manual_seed(seed)
    return {
        "unet": UNet2DConditionModel(**SDXL_CONFIGS["unet"]),
        "vae": AutoencoderKL(**SDXL_CONFIGS["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**SDXL_CONFIGS["text_encoder"])),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**SDXL_CONFIGS["text_encoder_2"])),
    }


def write_sdxl(path: Path, seed: int = 0, prediction: str = "epsilon", marks: tuple[str, ...] = ()) -> Path:
    """The same for SDXL. `marks`: empty tensors that say what the model is, as v_pred and ztsnr."""
    return _write(path, "sdxl", sdxl_modules(seed), SDXL_CONFIGS, prediction, marks)


def _write(path, family, parts, configs, prediction="epsilon", marks=()) -> Path:
    states = {part: module.state_dict() for part, module in parts.items()}
    tensors = layout.to_original(states, configs, FAMILIES[family]) | {mark: torch.zeros(()) for mark in marks}
    scheduler = {k: v for k, v in configs["scheduler"].items() if k != "prediction_type"}
    if prediction:
        assert prediction in PREDICTIONS
        scheduler["prediction_type"] = prediction
    metadata = {"config": json.dumps({**configs, "scheduler": scheduler})}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path
