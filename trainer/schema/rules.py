"""Combinations of settings that cannot work, or that surely were not meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.schema import Config


def conflicts(config: Config) -> Iterator[Problem]:
    """Each bad combination; the message names both controls. Errors refuse the start."""
    network, optim, training, captions = config.network, config.optim, config.training, config.captions
    if network.dim_from_weights and not network.weights:
        yield Problem(
            "dim_from_weights",
            "DIM from weights",
            "needs a file in LoRA network weights (network_weights), which is empty. Name one or switch it off.",
        )
    if not network.dim_from_weights and network.alpha > network.rank:
        yield Problem(
            "network_alpha",
            "Network Alpha",
            f"{network.alpha:g} is larger than Network Rank ({network.rank}), so the update is scaled up by "
            f"{network.alpha / network.rank:g}; usually it is at most the rank.",
            "warning",
        )
    if unet_rate(config) == 0 and text_encoder_rate(config) == 0:
        yield Problem(
            "unet_lr",
            "Unet learning rate",
            "and Text Encoder learning rate (text_encoder_lr) are both 0, so nothing would be trained. Set one of them.",
        )
    if (optim.scheduler == "adafactor") and optim.optimizer != "Adafactor":
        yield Problem(
            "lr_scheduler",
            "LR Scheduler",
            f'"adafactor" works only with Optimizer "Adafactor", which is "{optim.optimizer}". Change one of the two.',
        )
    if optim.scheduler == "piecewise_constant" and "step_rules" not in optim.scheduler_arguments:
        yield Problem(
            "lr_scheduler",
            "LR Scheduler",
            '"piecewise_constant" needs step_rules in LR scheduler extra arguments (lr_scheduler_args), '
            'for instance step_rules="1:100,0.1".',
        )
    if optim.scheduler == "warmup_stable_decay" and "num_decay_steps" not in optim.scheduler_arguments:
        yield Problem(
            "lr_scheduler",
            "LR Scheduler",
            '"warmup_stable_decay" needs num_decay_steps in LR scheduler extra arguments (lr_scheduler_args), '
            "for instance num_decay_steps=100.",
        )
    if captions.max_tokens not in (75, 150, 225):
        yield Problem(
            "max_token_length",
            "Max Token Length",
            f'"{captions.max_tokens}" is not allowed; it must be 75, 150 or 225.',
        )
    if config.data.min_bucket_side > config.data.max_bucket_side:
        yield Problem(
            "min_bucket_reso",
            "Minimum bucket resolution",
            f"{config.data.min_bucket_side} is larger than Maximum bucket resolution ({config.data.max_bucket_side}).",
        )
    if config.data.cache_to_disk and not config.data.cache_latents:
        yield Problem(
            "cache_latents_to_disk",
            "Cache latents to disk",
            "needs Cache latents (cache_latents), which is off. Switch both on or both off.",
        )
    if config.saving.format != "safetensors":
        yield Problem(
            "save_model_as",
            "Save trained model as",
            f'"{config.saving.format}" files can hide programs; safetensors is written instead.',
            "warning",
        )
    if not config.saving.name or any(c in config.saving.name for c in '/\\:*?"<>|\0'):
        yield Problem(
            "output_name",
            "Model output name",
            f'"{config.saving.name}" cannot be a file name; use letters, digits, blanks, dots, - and _.',
        )
    if not config.objective.noise_offset and config.objective.adaptive_noise_scale:
        yield Problem(
            "adaptive_noise_scale",
            "Adaptive noise scale",
            "does nothing while Noise offset (noise_offset) is 0.",
            "warning",
        )
    if training.attention == "none" and training.checkpointing is False and config.data.resolution[0] >= 1024:
        yield Problem(
            "xformers",
            "CrossAttention",
            '"none" at 1024 pixels needs very much memory; sdpa gives the same result with far less.',
            "warning",
        )


def unet_rate(config: Config) -> float:
    """The U-Net's learning rate: its own, or the general one where that is empty."""
    own = config.optim.unet_lr
    return config.optim.learning_rate if own is None else own


def text_encoder_rate(config: Config) -> float:
    """The text encoder's learning rate: its own, or the general one where that is empty."""
    own = config.optim.text_encoder_lr
    return config.optim.learning_rate if own is None else own
