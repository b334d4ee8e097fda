"""The embedded base model: loads its one file and draws pictures from prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.models.clip_tokens import tokenizer
from trainer.models.layout import from_original

BASE = Path(__file__).with_name("base.safetensors")


@dataclass
class BaseModel:
    unet: Any
    vae: Any
    text_encoder: Any
    scheduler: Any
    """A DDIMScheduler with the model's own noise schedule."""

    @classmethod
    def load(cls, path: Path = BASE) -> BaseModel:
        """Every part in fp32, from the file that holds weights and configuration."""
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        with safe_open(path, "pt") as file:
            configs = json.loads(file.metadata()["config"])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118: no iterator
        models = (
            UNet2DConditionModel(**configs["unet"]),
            AutoencoderKL(**configs["vae"]),
            CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        )
        for model, state in zip(models, from_original(weights, configs), strict=True):
            model.load_state_dict(state)
            model.eval().requires_grad_(False)
        return cls(*models, DDIMScheduler.from_config(configs["scheduler"]))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        """(prompts, 77, width) last hidden states."""
        encoded = tokenizer()(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return self.text_encoder(encoded.input_ids).last_hidden_state

    @torch.no_grad()
    def draw(
        self, prompts: list[str], steps: int = 25, guidance: float = 3.0, first_seed: int = 0, batch: int = 20
    ) -> torch.Tensor:
        """(prompts, 3, size, size) uint8; picture i starts from the noise of seed `first_seed` + i."""
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        drawn = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            seeds = range(first_seed + start, first_seed + start + len(part))
            noise = [torch.randn(channels, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            latents = torch.stack(noise)
            states = torch.cat([self.encode([""] * len(part)), self.encode(part)])
            self.scheduler.set_timesteps(steps)
            for time in self.scheduler.timesteps:
                plain, prompted = self.unet(torch.cat([latents, latents]), time, states).sample.chunk(2)
                predicted = plain + guidance * (prompted - plain)
                latents = self.scheduler.step(predicted, time, latents).prev_sample
            images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            drawn.append(((images.clamp(-1, 1) + 1) * 127.5).round().byte())
        return torch.cat(drawn)
