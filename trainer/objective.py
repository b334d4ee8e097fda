"""What is learned: noise, timesteps, target and loss weights."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from trainer.models import Schedule
from trainer.schema.objective import Objective

Tensor = torch.Tensor


def noise_like(latents: Tensor, settings: Objective) -> Tensor:
    """The noise to add, [B,C,h,w], with the chosen kind of offset."""
    noise = torch.randn_like(latents)
    if settings.noise_type == "Original" and settings.noise_offset:
        return offset_noise(noise, latents, settings.noise_offset, settings.adaptive_noise_scale)
    if settings.noise_type == "Multires" and settings.multires_iterations:
        return pyramid_noise(noise, settings.multires_iterations, settings.multires_discount or 0.3)
    return noise


def offset_noise(noise: Tensor, latents: Tensor, offset: float, adaptive_scale: float) -> Tensor:
    """ε + o·n with one normal n per image and channel (Guttenberg, "Diffusion with offset noise").

    The offset o grows by adaptive_scale times the absolute mean of the channel's latent and is
    never negative.
    """
    strength = torch.full_like(noise[:, :, :1, :1], offset)
    if adaptive_scale:
        strength = (strength + adaptive_scale * latents.mean((2, 3), keepdim=True).abs()).clamp(min=0)
    return noise + strength * torch.randn_like(noise[:, :, :1, :1])


def pyramid_noise(noise: Tensor, iterations: int, discount: float) -> Tensor:
    """Noise of several sizes, each coarser one weighted by `discount` once more, at unit variance.

    Each level is smaller by a random factor r^i, r from 2 to 4 (Whitaker, "Multi-resolution noise").
    """
    batch, channels, height, width = noise.shape
    total = noise.clone()
    for i in range(iterations):
        ratio = float(torch.rand((), device="cpu")) * 2 + 2
        small = max(1, int(height / ratio**i)), max(1, int(width / ratio**i))
        level = torch.randn((batch, channels, *small), device=noise.device, dtype=noise.dtype)
        total = total + F.interpolate(level, (height, width), mode="bilinear") * discount**i
        if 1 in small:
            break
    return total / total.std()


def draw_timesteps(batch: int, schedule: Schedule) -> Tensor:
    """Uniform timesteps, int64 [B], on the schedule's device."""
    device = schedule.alphas_cumprod.device
    return torch.randint(0, schedule.steps, (batch,), device=device)


def target(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
    """What the U-Net should answer: ε, or the velocity."""
    if schedule.prediction == "v_prediction":
        return schedule.velocity(latents, noise, timesteps)
    return noise


def loss_per_image(
    prediction: Tensor, wanted: Tensor, timesteps: Tensor, weights: Tensor, schedule: Schedule, settings: Objective
) -> Tensor:
    """The weighted loss of each image, float32 [B]; its mean is what is minimised.

    `weights` [B] is 1, or the prior loss weight of a regularisation image.
    """
    loss = F.mse_loss(prediction.float(), wanted.float(), reduction="none").mean((1, 2, 3)) * weights
    if settings.min_snr_gamma:
        loss = loss * min_snr_weight(schedule.snr(timesteps), settings.min_snr_gamma, schedule.prediction)
    return loss


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """min(SNR, γ) / SNR for ε, / (SNR + 1) for velocity, [B] (Hang et al. 2023, eq. 4 and 5)."""
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction == "v_prediction" else clipped / snr
