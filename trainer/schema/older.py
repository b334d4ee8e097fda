"""Keys and values that presets of older versions have, and command lines with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.schema.declare import Parameter

KEYS = {
    "lora_network_weights": "network_weights",
    "conv_dims": "conv_block_dims",
    "conv_alphas": "conv_block_alphas",
    "no_half_vae": "sdxl_no_half_vae",
    "stop_text_encoder_training_pct": "stop_text_encoder_training",
    "use_wandb": "log_with",
    "wandb": "log_with",
}

# In lower case; a switch that became a choice is "true" or "false".
VALUES: Mapping[str, Mapping[str, Any]] = {
    "LoRA_type": {"locon": "LyCORIS/LoCon"},
    "xformers": {"true": "xformers", "1": "xformers", "false": "none", "0": "none", "": "none"},
    "save_precision": {"fp32": "float", "no": "float"},
    "mixed_precision": {"fp32": "no", "float": "no"},
    "log_with": {"true": "wandb", "1": "wandb", "false": "", "0": ""},
    "dynamo_backend": {"": "no", "eager": "no", "aot_eager": "no"},
    "bucket_reso_steps": {"1": 8},  # the VAE takes no smaller ones
    "optimizer": {"adamw 8bit": "AdamW8bit"},
}


def newer_value(parameter: Parameter, value: Any) -> Any:
    """What a value is called now, in any case of its letters; itself where it has no other name."""
    if not isinstance(value, str | bool | int):
        return value
    spelled = str(value).strip().lower()
    known = VALUES.get(parameter.key, {})
    if spelled in known:
        return known[spelled]
    if isinstance(value, str) and value.strip() not in parameter.choices:
        return next((choice for choice in parameter.choices if choice.lower() == spelled), value)
    return value
