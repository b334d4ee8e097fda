"""Stable Diffusion 1.x: one CLIP text encoder, a U-Net that predicts noise on f8 latents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.errors import ModelError
from trainer.models import Schedule, Target, clip_tokens, layout, weights
from trainer.models.clip_tokens import Tokens
from trainer.models.families import Found
from trainer.paths import resolve

CONFIGS = Path(__file__).parent.parent / "assets" / "sd1" / "configs.json"
PLACES = {"attentions": "attention", "resnets": "resnet", "downsamplers": "resnet", "upsamplers": "resnet"}
EDGES = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass
class StableDiffusion:
    """A frozen SD 1.x model. Latents are [B,4,H/8,W/8]; pixels [B,3,H,W] in −1…1."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    schedule: Schedule
    dtype: torch.dtype
    device: torch.device
    clip_skip: int
    max_tokens: int
    family: str = "sd1"
    pixels_per_latent: int = 8

    @classmethod
    def load(
        cls,
        path: Path,
        found: Found,
        vae: str,
        dtype: torch.dtype,
        device: torch.device,
        clip_skip: int,
        max_tokens: int,
    ) -> StableDiffusion:
        """Load from a diffusers folder or a single file in the original layout.

        Raises ModelError naming the tensor or file that is missing or does not fit.
        """
        configs = json.loads(CONFIGS.read_text())
        if found.layout == "diffusers":
            for part in ("unet", "vae", "text_encoder"):
                configs[part] = _component_config(path / part)
            scheduler = path / "scheduler" / "scheduler_config.json"
            if scheduler.exists():
                configs["scheduler"] |= _known(json.loads(scheduler.read_text()), configs["scheduler"])
        else:
            with safe_open(path, framework="pt") as file:
                configs |= json.loads((file.metadata() or {}).get("config", "{}"))
        unet, autoencoder, text_encoder = _empty(configs)
        if found.layout == "diffusers":
            for part, module in (("unet", unet), ("vae", autoencoder), ("text_encoder", text_encoder)):
                weights.fill_from_folder(module, path / part, dtype, device)
        else:
            with safe_open(path, framework="pt") as file:
                weights.fill(unet, layout.unet_names(configs["unet"]), file, dtype, device, path)
                weights.fill(autoencoder, layout.vae_names(configs["vae"]), file, dtype, device, path)
                names = layout.text_encoder_names(configs["text_encoder"])
                weights.fill(text_encoder, names, file, dtype, device, path)
        if vae:
            autoencoder = load_vae(resolve(vae), configs["vae"], dtype, device)
        for module in (unet, autoencoder, text_encoder):
            module.requires_grad_(False).eval()
        unet.to(memory_format=torch.channels_last)
        autoencoder.to(memory_format=torch.channels_last)
        schedule = Schedule.of(configs["scheduler"]).to(device)
        return cls(unet, autoencoder, text_encoder, schedule, dtype, device, clip_skip, max_tokens)

    def targets(self) -> dict[str, Target]:
        """Kohya's name → every layer that a network may attach to.

        Text encoder: the projections of attention and MLP. U-Net: the linear layers and
        convolutions of its blocks and edges. 72 + 192 of attention, 86 of resnets and samplers, 4 at
        the edges for SD 1.5.
        """
        found: dict[str, Target] = {}
        for name, layer in self.text_encoder.named_modules():
            if name.startswith("encoder.layers.") and name.rsplit(".", 1)[-1] in TEXT_LAYERS:
                found[f"lora_te_text_model_{name.replace('.', '_')}"] = Target("text_encoder", layer)
        for name, layer in self.unet.named_modules():
            place = (
                "edge" if name in EDGES else next((PLACES[part] for part in name.split(".") if part in PLACES), None)
            )
            if place and isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                found[f"lora_unet_{name.replace('.', '_')}"] = Target("unet", layer, place)
        return found

    def tokens(self, captions: list[str], *, weighted: bool = False, padded: bool = True) -> Tokens:
        """Token ids of the captions, and their weights where brackets are read, on the model's device."""
        found = clip_tokens.tokenize(captions, self.max_tokens, weighted=weighted, padded=padded)
        weights = None if found.weights is None else found.weights.to(self.device)
        return Tokens(found.ids.to(self.device), weights)

    def text_states(self, tokens: Tokens) -> torch.Tensor:
        """The text encoder's states [B, 75·chunks + 2, C], multiplied by the tokens' weights.

        `clip_skip` 1 is the last layer's output, 2 the one before, …; always through the final
        layer norm. Of several chunks the inner begin and end marks are left out.
        """
        batch, count, length = tokens.ids.shape
        hidden = self.text_encoder(tokens.ids.view(-1, length), output_hidden_states=True).hidden_states
        states = self.text_encoder.final_layer_norm(hidden[-self.clip_skip]).view(batch, count, length, -1)
        if tokens.weights is not None:
            states = states * tokens.weights.to(states.dtype)[..., None]
        inner = states[:, :, 1:-1].flatten(1, 2)
        return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], 1)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The U-Net's answer [B,4,h,w] in float32."""
        latents = latents.to(self.dtype, memory_format=torch.channels_last)
        return self.unet(latents, timesteps, states.to(self.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Scaled latents [B,4,H/8,W/8] in float32: one draw of the VAE's posterior."""
        pixels = pixels.to(self.vae.device, self.vae.dtype, memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        return posterior.sample(generator).float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [B,3,H,W] in float32, clamped to −1…1."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.device, self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)


def _empty(configs: dict[str, Any]) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    unet = weights.build(lambda: UNet2DConditionModel(**configs["unet"]))
    vae = weights.build(lambda: AutoencoderKL(**configs["vae"]))
    text_encoder = weights.build(lambda: CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])))
    return unet, vae, text_encoder  # type: ignore[return-value]


def _component_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in ("architectures", "torch_dtype")}


def _known(config: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k in names}


def load_vae(path: Path, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """A VAE from a diffusers folder or a single file (bare, or inside a checkpoint)."""
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        vae = weights.build(lambda: AutoencoderKL(**_component_config(folder)))
        weights.fill_from_folder(vae, folder, dtype, device)
        return vae  # type: ignore[return-value]
    vae = weights.build(lambda: AutoencoderKL(**config))
    with safe_open(path, framework="pt") as file:
        names = layout.vae_names(config)
        keys = set(file.keys())
        if "first_stage_model.encoder.conv_in.weight" not in keys:
            names = {theirs.removeprefix("first_stage_model."): ours for theirs, ours in names.items()}
        if "encoder.down_blocks.0.resnets.0.norm1.weight" in keys:
            names = {ours: ours for ours in names.values()}
        if not keys & set(names):
            raise ModelError(f'"{path}" is not a VAE.', "Leave VAE empty to use the base model's own.")
        weights.fill(vae, names, file, dtype, device, path)
    return vae  # type: ignore[return-value]
