"""Stable Diffusion 1.x and 2.x: one text encoder, a U-Net on f8 latents. They differ in their configs alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from trainer.errors import ModelError
from trainer.models import Schedule, Target, TextStates, clip_tokens, layout, weights
from trainer.models.clip_tokens import Tokens
from trainer.models.facts import FAMILIES, Encoder, Family
from trainer.models.families import Found
from trainer.paths import resolve, shown
from trainer.transfer import send

if TYPE_CHECKING:
    from trainer.models.lean_imports import AutoencoderKL, UNet2DConditionModel

PLACES = {"attentions": "attention", "resnets": "resnet", "downsamplers": "resnet", "upsamplers": "resnet"}
EDGES = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass
class StableDiffusion:
    """A frozen model. Latents are [B,4,H/8,W/8]; pixels [B,3,H,W] in −1…1."""

    family: Family
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: Mapping[str, torch.nn.Module]
    schedule: Schedule
    dtype: torch.dtype
    device: torch.device
    clip_skip: int
    max_tokens: int
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
        *,
        prediction: str = "",
        vae_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load from a diffusers folder or a single file in the original layout; see `trainer.models.load`.

        Raises ModelError naming the tensor or file that is missing or does not fit.
        """
        family = FAMILIES[found.family]
        configs = {part: dict(config) for part, config in family.configs.items()}
        vae_dtype = vae_dtype or dtype
        folders, names = {}, {}
        with ExitStack() as files, weights.reading() as readers:
            if found.layout == "diffusers":
                for part in family.parts:
                    configs[part] = _component_config(path / part)
                    if part != "vae" or not vae:
                        kind = vae_dtype if part == "vae" else dtype
                        folders[part] = weights.read_folder(path / part, kind, device, readers, files)
                scheduler = path / "scheduler" / "scheduler_config.json"
                if scheduler.exists():
                    configs["scheduler"] |= _known(json.loads(scheduler.read_text()), configs["scheduler"])
            else:
                file = files.enter_context(weights.opened(path))
                configs |= json.loads(file.header.metadata.get("config", "{}"))
                for part, table in layout.tables(family, configs, file.header.tensors).items():
                    if part != "vae" or not vae:
                        kind = vae_dtype if part == "vae" else dtype
                        names[part] = weights.read(table, file, kind, device, path, readers)
            modules = empty(family, configs)  # imports the libraries, while the threads read
            for part, coming in folders.items():
                weights.give_from_folder(modules[part], coming, path / part)
            for part, coming in names.items():
                weights.give(modules[part], coming, path)
        if vae:
            modules["vae"] = load_vae(resolve(vae), configs["vae"], vae_dtype, device)
        for module in modules.values():
            module.requires_grad_(False).eval()
        configs["scheduler"]["prediction_type"] = prediction or found.prediction or "epsilon"
        schedule = Schedule.of(configs["scheduler"]).to(device)
        encoders = {encoder.key: modules[encoder.part] for encoder in family.encoders}
        return cls(family, modules["unet"], modules["vae"], encoders, schedule, dtype, device, clip_skip, max_tokens)

    def targets(self, *, norms: bool = False) -> dict[str, Target]:
        """Kohya's name → every layer that a network may attach to.

        Text encoders: the projections of attention and MLP. U-Net: the linear layers and
        convolutions of its blocks and edges. 72 + 192 of attention, 86 of resnets and samplers, 4 at
        the edges for SD 1.5. With `norms`, the norm layers of the U-Net's blocks as well.
        """
        kinds = (torch.nn.Linear, torch.nn.Conv2d, *((torch.nn.GroupNorm, torch.nn.LayerNorm) if norms else ()))
        found: dict[str, Target] = {}
        for key, encoder in self.text_encoders.items():
            for name, layer in encoder.named_modules():
                name = name.removeprefix("text_model.")
                if name.startswith("encoder.layers.") and name.rsplit(".", 1)[-1] in TEXT_LAYERS:
                    found[f"lora_{key}_text_model_{name.replace('.', '_')}"] = Target("text_encoder", layer)
        original = self._original_names() if self.family.original_names else {}
        for name, layer in self.unet.named_modules():
            place = (
                "edge"
                if name.startswith(EDGES)
                else next((PLACES[part] for part in name.split(".") if part in PLACES), None)
            )
            if place and isinstance(layer, kinds):
                found[f"lora_unet_{original.get(name, name).replace('.', '_')}"] = Target("unet", layer, place)
        return found

    def _original_names(self) -> dict[str, str]:
        """Diffusers' names of the U-Net's modules → those of the original layout."""
        return {
            str(ours).rsplit(".", 1)[0]: theirs.removeprefix(layout.UNET_PREFIX).rsplit(".", 1)[0]
            for theirs, ours in layout.unet_names(self.unet.config).items()
        }

    def tokens(
        self, captions: list[str], *, weighted: bool = False, padded: bool = True, max_tokens: int | None = None
    ) -> tuple[Tokens, ...]:
        """Token ids of the captions for each text encoder, and their weights where brackets are read; in main memory.

        `max_tokens`: another length than that of the captions that are trained with.
        """
        length = max_tokens or self.max_tokens
        return tuple(
            clip_tokens.tokenize(captions, length, weighted=weighted, padded=padded, padding=encoder.padding)
            for encoder in self.family.encoders
        )

    def text_states(self, tokens: tuple[Tokens, ...]) -> TextStates:
        """The text encoder's states [B, 75·chunks + 2, C], multiplied by the tokens' weights.

        `clip_skip` 1 is the last layer's output, 2 the one before, …; always through the final
        layer norm. Of several chunks the inner begin and end marks are left out.
        """
        (only,), (encoder,) = tokens, self.text_encoders.values()
        only = only.to(self.device)
        answer = encoder(only.rows, output_hidden_states=True)
        return TextStates(only.joined(encoder.final_layer_norm(answer.hidden_states[-self.clip_skip])))

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: TextStates, sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The U-Net's answer [B,4,h,w] in float32."""
        latents = latents.to(self.dtype, memory_format=torch.channels_last)
        return self.unet(latents, timesteps, text.states.to(self.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def encode(
        self,
        pixels: torch.Tensor,
        generator: torch.Generator | None = None,
        among: tuple[Sequence[int], int] | None = None,
    ) -> torch.Tensor:
        """Scaled latents [B,4,H/8,W/8] in float32: one draw of the VAE's posterior.

        `among`: at which places of how many images these stand, whose draws theirs are a part of.
        Not numbers where the VAE overflows in fp16, as SDXL's own does for some pictures.
        """
        pixels = send(pixels, self.vae.device).to(self.vae.dtype, memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        if among is None:
            drawn = posterior.sample(generator)
        else:
            places, images = among
            mean = posterior.mean
            noise = torch.randn((images, *mean.shape[1:]), device=mean.device, dtype=mean.dtype)
            drawn = mean + posterior.std * noise[list(places)]
        return drawn.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [B,3,H,W] in float32, clamped to −1…1."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.device, self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)


def empty(family: Family, configs: Mapping[str, Any]) -> dict[str, Any]:
    """Modules without weights, by their part: "unet", "vae", and the text encoders'."""
    from trainer.models.lean_imports import AutoencoderKL, UNet2DConditionModel

    return {
        "unet": weights.build(lambda: UNet2DConditionModel(**configs["unet"])),
        "vae": weights.build(lambda: AutoencoderKL(**configs["vae"])),
        **{encoder.part: _empty_encoder(encoder, configs[encoder.part]) for encoder in family.encoders},
    }


def _empty_encoder(encoder: Encoder, config: Mapping[str, Any]) -> torch.nn.Module:
    from trainer.models.lean_imports import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if encoder.projected else CLIPTextModel
    return weights.build(lambda: kind(CLIPTextConfig(**config)))


def _component_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in ("architectures", "torch_dtype")}


def _known(config: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k in names}


def load_vae(path: Path, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """A VAE from a diffusers folder or a single file (bare, or inside a checkpoint)."""
    from trainer.models.lean_imports import AutoencoderKL

    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        vae = weights.build(lambda: AutoencoderKL(**_component_config(folder)))
        with ExitStack() as files, weights.reading() as readers:
            weights.give_from_folder(vae, weights.read_folder(folder, dtype, device, readers, files), folder)
        return vae  # type: ignore[return-value]
    vae = weights.build(lambda: AutoencoderKL(**config))
    with weights.opened(path) as file:
        names = layout.vae_names(config)
        keys = set(file.header.tensors)
        if "first_stage_model.encoder.conv_in.weight" not in keys:
            names = {theirs.removeprefix("first_stage_model."): ours for theirs, ours in names.items()}
        if "encoder.down_blocks.0.resnets.0.norm1.weight" in keys:
            names = {ours: ours for ours in names.values()}
        if not keys & set(names):
            raise ModelError(f'"{shown(path)}" is not a VAE.', "Leave VAE empty to use the base model's own.")
        weights.fill(vae, names, file, dtype, device, path)
    return vae  # type: ignore[return-value]
