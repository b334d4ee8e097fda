"""SDXL: two text encoders, and a U-Net that is told the image's size and crop."""

from __future__ import annotations

import torch

from trainer.models import TextStates
from trainer.models.clip_tokens import Tokens
from trainer.models.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """A frozen SDXL base model."""

    def text_states(self, tokens: tuple[Tokens, ...]) -> TextStates:
        """Both encoders' states before their last layer, side by side [B, 75·chunks + 2, C1 + C2], and the pooled ones.

        No final layer norm, whatever clip_skip. Pooled [B, P]: the second encoder's projected answer at
        the end mark of the first chunk; weights do not touch it.
        """
        tokens = tuple(of_encoder.to(self.device) for of_encoder in tokens)
        first, second = (
            encoder(own.rows, output_hidden_states=True)
            for encoder, own in zip(self.text_encoders.values(), tokens, strict=True)
        )
        states = [own.joined(answer.hidden_states[-2]) for own, answer in zip(tokens, (first, second), strict=True)]
        pooled = second.text_embeds.unflatten(0, tokens[1].ids.shape[:2])[:, 0]
        return TextStates(torch.cat(states, -1), pooled)

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: TextStates, sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The U-Net's answer [B,4,h,w] in float32."""
        assert text.pooled is not None and sizes is not None
        # Sizes stay float32: bf16 has no 1023.
        added = {"text_embeds": text.pooled.to(self.dtype), "time_ids": sizes.float()}
        latents = latents.to(self.dtype, memory_format=torch.channels_last)
        states = text.states.to(self.dtype)
        return self.unet(latents, timesteps, states, added_cond_kwargs=added, return_dict=False)[0].float()
