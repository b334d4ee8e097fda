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
        offset = _strength(settings.noise_offset, settings.noise_offset_random, latents)
        return offset_noise(noise, latents, offset, settings.adaptive_noise_scale)
    if settings.noise_type == "Multires" and settings.multires_iterations:
        return pyramid_noise(noise, settings.multires_iterations, settings.multires_discount or 0.3)
    return noise


def _strength(most: float, random: bool, latents: Tensor) -> Tensor:
    """A strength for the whole batch, [1]: `most`, or uniform between 0 and it."""
    return most * (torch.rand((1,), device=latents.device) if random else torch.ones(1, device=latents.device))


def perturbed(noise: Tensor, settings: Objective) -> Tensor:
    """ε + γ·ε′: the noise that the input gets while ε stays the target (Ning et al. 2023, eq. 9)."""
    if not settings.ip_noise_gamma:
        return noise
    gamma = _strength(settings.ip_noise_gamma, settings.ip_noise_gamma_random, noise)
    return noise + gamma * torch.randn_like(noise)


def offset_noise(noise: Tensor, latents: Tensor, offset: Tensor, adaptive_scale: float) -> Tensor:
    """ε + o·n with one normal n per image and channel (Guttenberg, "Diffusion with offset noise").

    The offset o grows by adaptive_scale times the absolute mean of the channel's latent and is
    never negative.
    """
    strength = offset.view(1, 1, 1, 1)
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


def draw_timesteps(batch: int, schedule: Schedule, settings: Objective) -> Tensor:
    """Uniform timesteps in min … max − 1, or all the same where both are equal; int64 [B]."""
    device = schedule.alphas_cumprod.device
    low, high = settings.min_timestep, min(settings.max_timestep or schedule.steps, schedule.steps)
    if low == high:
        return torch.full((batch,), low, device=device)
    return torch.randint(low, high, (batch,), device=device)


def target(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
    """What the U-Net should answer: ε, or the velocity."""
    if schedule.prediction == "v_prediction":
        return schedule.velocity(latents, noise, timesteps)
    return noise


def loss_per_image(
    prediction: Tensor,
    wanted: Tensor,
    timesteps: Tensor,
    weights: Tensor,
    schedule: Schedule,
    settings: Objective,
    masks: Tensor | None = None,
) -> Tensor:
    """The weighted loss of each image, float32 [B]; its mean is what is minimised.

    `weights` [B] is 1, or the prior loss weight of a regularisation image. `masks` [B,h,w] in 0…1
    says how much each place counts; the mean stays that over all places.
    """
    loss = difference(prediction.float(), wanted.float(), timesteps, schedule, settings)
    if masks is not None:
        loss = loss * masks.unsqueeze(1)
    loss = loss.mean((1, 2, 3)) * weights
    snr = schedule.snr(timesteps)
    if settings.min_snr_gamma:
        loss = loss * min_snr_weight(snr, settings.min_snr_gamma, schedule.prediction)
    if settings.scale_v_loss:
        loss = loss * noise_share(snr)
    if settings.v_like_loss:
        loss = loss * (1 + settings.v_like_loss / noise_share(snr))
    if settings.debiased:
        loss = loss * debiased_weight(snr, schedule.prediction)
    return loss


def difference(
    prediction: Tensor, wanted: Tensor, timesteps: Tensor, schedule: Schedule, settings: Objective
) -> Tensor:
    """The loss of every place, [B,C,h,w]."""
    if settings.loss_type == "l2":
        return F.mse_loss(prediction, wanted, reduction="none")
    if settings.loss_type == "l1":
        return F.l1_loss(prediction, wanted, reduction="none")
    c = huber_threshold(timesteps, schedule, settings).view(-1, 1, 1, 1)
    smooth = 2 * (((prediction - wanted).square() + c.square()).sqrt() - c)
    return c * smooth if settings.loss_type == "huber" else smooth


def huber_threshold(timesteps: Tensor, schedule: Schedule, settings: Objective) -> Tensor:
    """c of the pseudo-Huber loss, [B] (Khrapov et al. 2024, "Improving diffusion models' robustness").

    exponential: c^(t/T); snr: (1 − c) / (1 + σ_t)² + c with σ² = 1 / SNR, which has no scale.
    """
    c = settings.huber_c
    if settings.huber_schedule == "exponential":
        return settings.huber_scale * c ** (timesteps / schedule.steps)
    if settings.huber_schedule == "snr":
        return (1 - c) / (1 + schedule.snr(timesteps).rsqrt()).square() + c
    return torch.full_like(timesteps, settings.huber_scale * c, dtype=torch.float32)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """min(SNR, γ) / SNR for ε, / (SNR + 1) for velocity, [B] (Hang et al. 2023, eq. 4 and 5)."""
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction == "v_prediction" else clipped / snr


def noise_share(snr: Tensor) -> Tensor:
    """SNR / (SNR + 1), [B]: what a velocity loss is to the loss of the noise; SNR counts to 1000."""
    snr = snr.clamp(max=1000)
    return snr / (snr + 1)


def debiased_weight(snr: Tensor, prediction: str) -> Tensor:
    """1 / √SNR for ε, 1 / (SNR + 1) for velocity, [B] (Yu et al. 2023, "Debias the training")."""
    snr = snr.clamp(max=1000)
    return 1 / (snr + 1) if prediction == "v_prediction" else snr.rsqrt()
