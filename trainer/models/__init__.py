"""Base models, one file a family.

What must be known of a family before a model is loaded is its row in `facts.FAMILIES` (no torch).
A loaded model has what the loop, the samples and the networks need, so that they never ask which
family it is:

    family                  its row of facts
    unet, vae               the modules; frozen, in the compute dtype
    text_encoders           the modules by kohya's name without "lora_": {"te": …}; SDXL {"te1": …, "te2": …}
    schedule                the noise schedule and what is predicted
    targets()               kohya's name → Target, of every layer that a network may attach to
    tokens(captions, weighted, padded)          what text_states takes
    text_states(tokens)                         TextStates
    predict(latents, timesteps, text, sizes)    the U-Net's answer
    encode(pixels), decode(latents)

`sizes` [B, 6], pixels: the image's original height and width, the top and left of its crop, the
height and width that are aimed at. Families that are not conditioned on them pass them over.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class TextStates(NamedTuple):
    """What the U-Net is told of the captions: `states` [B, L, C], and `pooled` [B, P] where the family has it."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TextStates:
        """The same, with what `change` makes of its tensors."""
        return TextStates(change(self.states), None if self.pooled is None else change(self.pooled))


class Target(NamedTuple):
    """A layer that a network may attach to.

    `part`: "unet" or "text_encoder", which both of SDXL's are: they share one rate. `place`: "attention" for
    a text encoder's layers and those of the U-Net's transformers, "resnet" for the other layers of its
    blocks, "edge" for its first and last convolution and the embeddings of timestep and sizes.
    """

    part: str
    layer: torch.nn.Module
    place: str = "attention"


@dataclass(frozen=True)
class Schedule:
    """The forward process q(x_t | x_0) of the base model.

    `alphas_cumprod`: ᾱ_t, float32 [steps]. `prediction`: what the U-Net answers, "epsilon" or
    "v_prediction".
    """

    alphas_cumprod: torch.Tensor
    prediction: str
    config: dict[str, Any]

    @classmethod
    def of(cls, config: dict[str, Any]) -> Schedule:
        """From a diffusers scheduler config. Linear in √β, as Stable Diffusion has it, or in β."""
        import torch  # the check before the start needs this package's other modules, and no torch

        steps = config["num_train_timesteps"]
        start, end = config["beta_start"], config["beta_end"]
        if config["beta_schedule"] == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
        else:
            betas = torch.linspace(start, end, steps, dtype=torch.float32)
        return cls(torch.cumprod(1.0 - betas, 0), config["prediction_type"], config)

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> Schedule:
        return Schedule(self.alphas_cumprod.to(device), self.prediction, self.config)

    def with_zero_terminal_snr(self) -> Schedule:
        """√ᾱ shifted and stretched so that the last step is nothing but noise (Lin et al. 2023, algorithm 1).

        Samplers start at that step, and divide by ᾱ there: 2⁻²⁴ stands for its 0.
        """
        import torch

        roots = self.alphas_cumprod.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
        seen = alphas.cpu().double().clamp(min=2**-24)
        betas = 1 - seen / torch.cat([torch.ones(1, dtype=seen.dtype), seen[:-1]])
        config = self.config | {"trained_betas": betas.tolist(), "timestep_spacing": "trailing"}
        return Schedule(alphas, self.prediction, config)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, [B,C,H,W] (Ho et al. 2020, eq. 4)."""
        a = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = √ᾱ_t ε − √(1−ᾱ_t) x_0, [B,C,H,W] (Salimans & Ho 2022, appendix D)."""
        a = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return a.sqrt() * noise - (1 - a).sqrt() * latents

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """ᾱ_t / (1−ᾱ_t), [B]."""
        a = self.alphas_cumprod[timesteps]
        return a / (1 - a)


def recompute(model: Any) -> None:
    """Have the frozen modules forget intermediate results and compute them again in the backward pass."""
    model.unet.enable_gradient_checkpointing()
    for encoder in model.text_encoders.values():
        encoder.activation_checkpointing_enable()
        encoder.train()


def load(
    source: str,
    vae: str,
    dtype: torch.dtype,
    device: torch.device,
    clip_skip: int,
    max_tokens: int,
    *,
    prediction: str = "",
    vae_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """Load the base model that `source` names (empty: the embedded one), frozen, on `device`.

    `prediction`: "epsilon" or "v_prediction"; empty: what the model says of itself, else noise. `vae_dtype`: the
    VAE's, where it is to be another. `progress(done, total)` is told the bytes of a model that is fetched. Raises
    ModelError when it is not a model, or of a family that is not supported.
    """
    from trainer.models import facts, families

    path = families.locate(source, progress)
    found = families.detect(path)
    family = facts.FAMILIES[found.family]
    kind = getattr(importlib.import_module(family.module), family.kind)
    return kind.load(path, found, vae, dtype, device, clip_skip, max_tokens, prediction=prediction, vae_dtype=vae_dtype)
