"""LoCon: standard LoRA that reaches the 3×3 convolutions of the U-Net too, with a rank of their own."""

from __future__ import annotations

from trainer.networks import standard

LABEL = "Kohya LoCon"
USES = {
    "network_dim",
    "network_alpha",
    "conv_dim",
    "conv_alpha",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "network_dropout",
    "rank_dropout",
    "module_dropout",
    "scale_weight_norms",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
}
module_for = standard.module_for
