"""Base models, one file a family.

A family's class has what the loop, the samples and the networks need, so that they never ask
which family it is:

    unet, vae, text_encoder         the modules; frozen, in the compute dtype
    schedule                        the noise schedule and what is predicted
    targets()                       the layers that a network may attach to, by kohya's name
    targets()                       kohya's name → Target, of every layer that a network may attach to
    tokens(captions, weighted, padded), text_states(tokens), predict(latents, timesteps, states)
    encode(pixels), decode(latents)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Target(NamedTuple):
    """A layer that a network may attach to.

    `part`: "unet" or "text_encoder". `place`: "attention" for a text encoder's layers and those of
    the U-Net's transformers, "resnet" for the other layers of its blocks, "edge" for its first and
    last convolution and the embedding of the timestep.
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


def load(source: str, vae: str, dtype: torch.dtype, device: torch.device, clip_skip: int, max_tokens: int) -> Any:
    """Load the base model that `source` names (empty: the embedded one), frozen, on `device`.

    Raises ModelError when it is not a model, or of a family that is not supported.
    """
    from trainer.models import families, sd

    path = families.locate(source)
    found = families.detect(path)
    return sd.StableDiffusion.load(path, found, vae, dtype, device, clip_skip, max_tokens)
